"""What the training loop of ``tools/train_classification.py`` takes beyond a bare one of the same model.

    python -m fbn_plugin.engine.benchmark.loop CONFIG [KEY VALUE ...]

prints the time of an iteration of both and their ratio: the least, and the quartiles over rounds in which they take
turns. On a CPU it is the time that the process computes, on all threads, so that a busy machine changes little.

The bare loop is the shortest that trains the same: a copy of the model, the config's own optimizer with the same
settings, PyTorch's cross entropy, ``zero_grad``, ``backward``, ``step`` and ``loss.item()``; no schedule, no seeds, no
mixed precision, no log, no check of the loss. Its data are the training images, decoded before, in one tensor of bytes,
and for each batch the config's crop, flips and normalization in the simplest code that has them (:func:`bare_batches`).
Both are measured a second time with batches that are ready, so that what data cost is apart. The loop has all else that
lies between two iterations: schedules, seeds, logging, signals, checkpoints that are not due.
"""

import contextlib
import copy
import io
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from fbn_plugin.engine.benchmark.timing import summarize
from fbn_plugin.engine.classification import trainer
from fbn_plugin.engine.classification.batch import BatchSizes
from fbn_plugin.engine.classification.config import classification_config
from fbn_plugin.engine.classification.data import build_train_loader, build_train_transform, images_in_memory
from fbn_plugin.engine.classification.memory_data import ImagesInMemory
from fbn_plugin.engine.classification.optimization import build_optimizer
from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.config import CfgNode, load_config

Batch = tuple[Tensor, Tensor]

_READY = 32  # batches
_SECONDS = 60.0
_ROUND = 0.25  # seconds of each: enough iterations to share what is done for several at once


class _Over(Exception):
    """The time is."""


def bare_step(cfg: CfgNode, trained: trainer.ClassificationTrainer) -> Callable[[Iterator[Batch]], None]:
    """An iteration of a loop that has nothing but forward pass, backward pass and update, on a copy of the model."""
    model = copy.deepcopy(trained.model).train()
    optimizer = build_optimizer(cfg, model)

    def step(batches: Iterator[Batch]) -> None:
        images, targets = next(batches)
        loss = cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def bare_batches(images: ImagesInMemory, batch_size: int, device: torch.device) -> Iterator[Batch]:
    """Endless random batches of images that lie in one tensor: crops one by one, flips and normalization by the batch.

    Args:
        images: of one shape, whose crops are not resized.
        batch_size: images of a batch.
        device: where the images lie.
    """
    augmentation = images.augmentation
    everything, labels = zip(*(images[index] for index in range(len(images))))
    pixels, labels = (torch.from_numpy(np.stack(each)).to(device) for each in (everything, labels))
    pixels = pad(pixels, [getattr(augmentation.crop, "padding", None) or 0] * 4)
    height, width = augmentation.size
    while True:
        for chosen in torch.randperm(len(pixels)).split(batch_size)[: len(pixels) // batch_size]:
            tops = torch.randint(pixels.shape[2] - height + 1, (batch_size,)).tolist()
            lefts = torch.randint(pixels.shape[3] - width + 1, (batch_size,)).tolist()
            crops = [
                pixels[index, :, top : top + height, left : left + width]
                for index, top, left in zip(chosen.tolist(), tops, lefts)
            ]
            batch = torch.stack(crops)
            for chance, axis in ((augmentation.hflip, 3), (augmentation.vflip, 2)):
                if chance:
                    flipped = torch.rand(batch_size) < chance
                    batch[flipped] = batch[flipped].flip(axis)
            yield augmentation.normalize(batch), labels[chosen]


def measure_loop(cfg: CfgNode, seconds: float, min_rounds: int = 5) -> dict[str, dict]:
    """Time a config's training loop and a bare one, in turns.

    Args:
        cfg: of ``tools/train_classification.py``; where it is saved and evaluated does not matter.
        seconds: of all together.
        min_rounds: of a quarter of a second of each, however long they take.

    Returns:
        ``loop`` and ``bare``, and both with batches that are ready: see ``timing.summarize``, with ``least_ms``; times
        are of an iteration. Where the images do not fit one tensor, as their crops are resized, ``loop`` is compared
        with the bare loop whose batches are ready.
    """
    with tempfile.TemporaryDirectory() as folder:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.merge_from_list(["OUTPUT_DIR", folder, "SOLVER.MAX_ITER", 0, "SOLVER.MAX_EPOCH", 10**6])
        cfg.merge_from_list(["TEST.EVAL_PERIOD", 0, "SOLVER.CHECKPOINT_PERIOD", 10**9])
        cfg.freeze()
        trained = trainer.ClassificationTrainer(cfg)
        ready = list(itertools.islice(build_train_loader(cfg, trained.data.train, trained.device), _READY))
        bare = {"bare, batches ready": itertools.cycle(ready)}
        images = images_in_memory(cfg, trained.data.train, build_train_transform(cfg, prefetch=False))
        if images is not None and _fit_one_tensor(images):
            bare["bare"] = bare_batches(images, BatchSizes.of(cfg).step, trained.device)
        turns = _Turns(bare, bare_step(cfg, trained), trained.device, seconds, min_rounds)

        def loader(*args: object) -> Iterator[Batch]:
            return turns({"loop": build_train_loader(*args), "loop, batches ready": itertools.cycle(ready)})

        with mock.patch.object(trainer, "build_train_loader", loader), contextlib.suppress(_Over):
            trained.train()
    result = summarize(turns.times, {name: _baseline(name, turns.times) for name in turns.times})
    return {name: {**row, "least_ms": 1e3 * min(turns.times[name])} for name, row in result.items()}


def _fit_one_tensor(images: ImagesInMemory) -> bool:
    """Whether images are of one shape, and arrays as they are; all are decoded with that."""
    return not images.augmentation.resizes and len({images[index][0].shape for index in range(len(images))}) == 1


def _baseline(name: str, names: Collection[str]) -> str:
    """What one is compared with."""
    if name == "loop" and "bare" not in names:
        return "bare, batches ready"
    return name.replace("loop", "bare")


class _Turns:
    """Batches for a training loop, which is timed by them, in turns with a bare one.

    Args:
        bare: name -> batches of the bare loop.
        step: one iteration of it.
        device: of both.
        seconds, min_rounds: see :func:`measure_loop`.
    """

    def __init__(
        self,
        bare: Mapping[str, Iterator[Batch]],
        step: Callable[[Iterator[Batch]], None],
        device: torch.device,
        seconds: float,
        min_rounds: int,
    ):
        self._bare, self._step, self._seconds, self._min_rounds = bare, step, seconds, min_rounds
        self._clock = time.process_time if device.type == "cpu" else time.perf_counter
        self.times: dict[str, list[float]] = {}

    def __call__(self, loops: Mapping[str, Iterator[Batch]]) -> Iterator[Batch]:
        """The batches of the loop, from each of ``loops`` in turn."""
        for batches in loops.values():
            yield from itertools.islice(batches, 3)
        least = min(self._bare_seconds(batches, 1) for batches in self._bare.values() for _ in range(5))
        number = max(1, round(_ROUND / least))
        self.times = {name: [] for name in (*loops, *self._bare)}
        deadline = time.perf_counter() + self._seconds
        while len(self.times["loop"]) < self._min_rounds or time.perf_counter() < deadline:
            for name, batches in loops.items():
                begin = self._clock()
                yield from itertools.islice(batches, number)
                self.times[name].append((self._clock() - begin) / number)
            for name, batches in self._bare.items():
                self.times[name].append(self._bare_seconds(batches, number) / number)
        raise _Over

    def _bare_seconds(self, batches: Iterator[Batch], number: int) -> float:
        begin = self._clock()
        for _ in range(number):
            self._step(batches)
        return self._clock() - begin


def main(argv: Sequence[str]) -> None:
    """Print what the config ``argv[0]`` takes, with the keys and values behind it."""
    cfg = load_config(classification_config(), argv[0], argv[1:])
    with contextlib.redirect_stdout(io.StringIO()):  # what the loop logs
        result = measure_loop(cfg, _SECONDS)
    clock = "CPU ms" if distributed.init(cfg.MODEL.DEVICE).type == "cpu" else "ms"
    threads, rounds = counted(torch.get_num_threads(), "thread"), result["loop"]["rounds"]
    print(f"{clock} an iteration on {threads}: lower quartile | median | upper quartile (least)")
    for name, row in result.items():
        print(f"{name:19} {_three(row['ms'])} ({row['least_ms']:.3f})")
    for name, row in result.items():
        if name != row["to"]:
            more = 1e3 * (row["ms"][1] - result[row["to"]]["ms"][1])
            least = row["least_ms"] / result[row["to"]]["least_ms"]
            ratio = f"{_three(row['ratio'])} ({least:.3f})"
            print(f"{name} / {row['to']}: {ratio} in {rounds} rounds; {more:.0f} microseconds more")


def _three(quartiles: Sequence[float]) -> str:
    return " | ".join(f"{each:.3f}" for each in quartiles)


if __name__ == "__main__":
    main(sys.argv[1:])
