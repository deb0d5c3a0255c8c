"""What the training loop of ``tools/train_classification.py`` takes beyond a bare one of the same model and optimizer,
whose batches lie in memory.

    python -m fbn_plugin.engine.benchmark.loop CONFIG [KEY VALUE ...]

prints the time of an iteration of both and their ratio: lower quartile, median and upper quartile over rounds in which
they take turns. The loop's own time is all that lies between two iterations: loading, logging, schedules, signals.
"""

import contextlib
import copy
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fbn_plugin.engine.benchmark.timing import summarize
from fbn_plugin.engine.classification import trainer
from fbn_plugin.engine.classification.config import classification_config
from fbn_plugin.engine.classification.data import build_train_loader
from fbn_plugin.engine.classification.optimization import build_optimizer
from fbn_plugin.engine.run.config import CfgNode, load_config

Batch = tuple[Tensor, Tensor]

_PREPARED = 32  # batches of the bare loop
_SECONDS = 30.0
_ROUND = 0.25  # seconds of each: enough iterations to share what is done for several at once


class _Over(Exception):
    """The time is."""


def bare_step(cfg: CfgNode, trained: trainer.ClassificationTrainer) -> Callable[[], None]:
    """An iteration of a loop that has nothing but forward pass, backward pass and update, on a copy of the model."""
    model = copy.deepcopy(trained.model).train()
    optimizer = build_optimizer(cfg, model)
    batches = list(itertools.islice(build_train_loader(cfg, trained.data.train, trained.device), _PREPARED))
    endless = itertools.cycle(batches)

    def step() -> None:
        images, targets = next(endless)
        loss = cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def measure_loop(cfg: CfgNode, seconds: float, min_rounds: int = 5) -> dict[str, dict]:
    """Time a config's training loop and a bare one, in turns.

    Args:
        cfg: of ``tools/train_classification.py``; where it is saved and evaluated does not matter.
        seconds: of both together.
        min_rounds: of a quarter of a second of each, however long they take.

    Returns:
        ``loop`` and ``bare``, see ``timing.summarize``; times are of an iteration.
    """
    times: dict[str, list[float]] = {"loop": [], "bare": []}

    def in_turns(batches: Iterator[Batch], step: Callable[[], None]) -> Iterator[Batch]:
        yield from itertools.islice(batches, 3)
        seconds_of_one = [_seconds(step) for _ in range(5)]
        number = max(1, round(_ROUND / min(seconds_of_one)))
        deadline = time.perf_counter() + seconds
        while len(times["bare"]) < min_rounds or time.perf_counter() < deadline:
            begin = time.perf_counter()
            yield from itertools.islice(batches, number)
            times["loop"].append((time.perf_counter() - begin) / number)
            times["bare"].append(_seconds(step, number) / number)
        raise _Over

    with tempfile.TemporaryDirectory() as folder:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.merge_from_list(["OUTPUT_DIR", folder, "SOLVER.MAX_ITER", 0, "SOLVER.MAX_EPOCH", 10**6])
        cfg.merge_from_list(["TEST.EVAL_PERIOD", 0, "SOLVER.CHECKPOINT_PERIOD", 10**9])
        cfg.freeze()
        trained = trainer.ClassificationTrainer(cfg)
        step = bare_step(cfg, trained)

        def loader(*args: object) -> Iterator[Batch]:
            return in_turns(build_train_loader(*args), step)

        with mock.patch.object(trainer, "build_train_loader", loader), contextlib.suppress(_Over):
            trained.train()
    return summarize(times, {"loop": "bare", "bare": "bare"})


def _seconds(step: Callable[[], None], number: int = 1) -> float:
    begin = time.perf_counter()
    for _ in range(number):
        step()
    return time.perf_counter() - begin


def main(argv: Sequence[str]) -> None:
    cfg = load_config(classification_config(), argv[0], argv[1:])
    result = measure_loop(cfg, _SECONDS)
    ratio, rounds = result["loop"]["ratio"], result["loop"]["rounds"]
    loop, bare = (result[name]["ms"] for name in ("loop", "bare"))
    threads = torch.get_num_threads()
    print(f"ms an iteration on {threads} threads: loop {_three(loop)}, bare {_three(bare)}")
    print(f"ratio {_three(ratio)} in {rounds} rounds; {1e3 * (loop[1] - bare[1]):.0f} microseconds more")


def _three(quartiles: Sequence[float]) -> str:
    return " | ".join(f"{each:.3f}" for each in quartiles)


if __name__ == "__main__":
    main(sys.argv[1:])
