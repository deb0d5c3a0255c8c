"""What a trained classifier is measured by: accuracies and loss over a set of images, on any number of processes, by
the population's moments, a batch's own or a balanced batch's own.

Moments of balanced batches: Hajaj and Gillies, "Batch Normalization and the impact of batch structure on the behavior
of deep convolution networks" (2018). Test labels decide there which images come together, so the figures are
conditional, and say so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.data.loader import PrefetchLoader
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader
from tqdm import tqdm

from fbn_plugin.engine.classification.data import build_val_loader
from fbn_plugin.engine.data.image_data import Images
from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run import distributed, stopping
from fbn_plugin.engine.run.config import CfgNode, with_value
from fbn_plugin.engine.run.rules import named
from fbn_plugin.layers.description import check_moments
from fbn_plugin.training.balanced_batches import BalancedBatchSampler
from fbn_plugin.training.evaluation_modes import batch_moments

__all__ = ["CONDITIONAL", "MOMENTS", "BatchOrder", "Evaluator", "evaluate", "moments_of", "order_batches"]

MOMENTS = ("population", "batch", "balanced")
CONDITIONAL = "conditional: the test labels balanced the batches"

_SEED = 0  # of the order of batches, which is the same in every evaluation


@dataclass(frozen=True)
class BatchOrder:
    """In which order images come where batches matter.

    Args:
        indices: of the images (M), dealt out to the processes in turn; some come again, as company.
        counts: whether a place is the first one of its image (M).
        batch_size: images of a batch of one process.
    """

    indices: np.ndarray
    counts: np.ndarray
    batch_size: int


def order_batches(
    labels: Sequence[int], moments: str, batch_size: int, images_per_class: int = 1, processes: int = 1, epoch: int = 0
) -> BatchOrder:
    """Put images into batches whose own moments they are to be normalized by: all of the same size, the last ones
    filled up with images that come again. Labels are looked at for ``"balanced"`` only.

    Args:
        labels: class index of each image (N).
        moments: ``"batch"``, images in random order, or ``"balanced"``, equally many of each class.
        batch_size: of one process, for ``"batch"``; at most all images.
        images_per_class: in a batch, for ``"balanced"``.
        processes: how many share the images.
        epoch: another one is another order.

    Raises:
        ValueError: a class has no image.

    Examples::

        >>> order = order_batches([0, 0, 1], "balanced", 8)
        >>> order.batch_size, order.counts.tolist().count(True)
        (2, 3)
    """
    count = len(labels)
    if moments == "balanced":
        ranks = []
        for rank in range(processes):
            sampler = BalancedBatchSampler(
                labels, images_per_class, "cycle", seed=_SEED, num_replicas=processes, rank=rank
            )
            sampler.set_epoch(epoch)
            ranks.append(np.concatenate(list(sampler)))
        indices, batch_size = np.stack(ranks, axis=1).flatten(), sampler.batch_size
    else:
        batch_size = min(batch_size, -(-count // processes))
        whole = batch_size * processes
        order = np.random.default_rng([_SEED, epoch]).permutation(count)
        indices = np.resize(order, -(-count // whole) * whole)
    counts = np.zeros(len(indices), dtype=bool)
    counts[np.unique(indices, return_index=True)[1]] = True
    return BatchOrder(indices, counts, batch_size)


@contextlib.contextmanager
def moments_of(model: nn.Module, moments: str) -> Iterator[nn.Module]:
    """The model in evaluation by some moments, one of ``MOMENTS``, for the length of a block."""
    with contextlib.nullcontext(model) if moments == "population" else batch_moments(model):
        yield model


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader | PrefetchLoader,
    device: torch.device,
    top_k: Sequence[int] = (1, 5),
    counts: Sequence[bool] | None = None,
) -> dict[str, float]:
    """Top-k accuracies in percent, `top1`, `top5`, and the mean cross entropy `loss`, over all processes.

    Args:
        model: gives logits (N, classes); it is evaluated in evaluation mode and left in the mode it was in.
        loader: timm's evaluation loader. What its sampler repeats to give every process equally many samples is not
            counted.
        top_k: each at most the number of classes.
        counts: whether each sample of the loader's dataset counts; all do without.

    Raises:
        EvaluationLeft: a process is asked to stop.
    """
    counts = np.ones(len(loader.dataset), dtype=bool) if counts is None else np.asarray(counts)
    mine = torch.from_numpy(counts[distributed.rank() :: distributed.world_size()])
    sums = dict.fromkeys([*(f"top{k}" for k in top_k), "loss"], 0.0)
    training = model.training
    model.eval()
    bar = tqdm(loader, "evaluating", leave=False, disable=None if distributed.is_main() else True)
    seen = 0
    for images, targets in stopping.until_asked(bar):
        if seen == len(mine):
            break
        counted_here = mine[seen : seen + len(targets)]
        images, targets = images[: len(counted_here)].to(device), targets[: len(counted_here)].to(device)
        seen += len(targets)
        logits = model(images).float()
        if not counted_here.all():
            logits, targets = logits[counted_here], targets[counted_here]
        sums["loss"] += nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        for k in top_k:
            sums[f"top{k}"] += 100 * (logits.topk(k).indices == targets[:, None]).sum().item()
    model.train(training)
    everyones, stops = zip(*distributed.all_gather((sums, stopping.asked())))
    stopping.unless_asked(stops)
    return {name: sum(each[name] for each in everyones) / counts.sum().item() for name in sums}


class Evaluator:
    """The evaluations of a run: which images, in which batches, by which moments.

    Args:
        cfg: TEST says all of that.
        images: a validation set, or a test set.
        num_classes: of the model.
        device: of this process.
        kind: what the images are called.
        epoch: another one is another order of the batches.
        processes: how many share the images; None is all of the run's.

    Attributes:
        images: in the order of the batches, and with those that come again as company.
        targets: class indices of what is measured (N), each image once.

    Raises:
        ValueError: TEST.MOMENTS does not go with the images.
    """

    def __init__(
        self,
        cfg: CfgNode,
        images: Images,
        num_classes: int,
        device: torch.device,
        kind: str = "validation image",
        epoch: int = 0,
        processes: int | None = None,
    ):
        self.cfg, self.device, self.moments, self.kind = cfg, device, cfg.TEST.MOMENTS, kind
        self.top_k = (1, 5) if num_classes > 5 else (1,)
        self.targets, self.size, self._order = images.targets, len(images), None
        if self.moments != "population":
            processes = processes or distributed.world_size()
            share = max(1, cfg.TEST.IMS_PER_BATCH // processes), cfg.DATALOADER.IMAGES_PER_CLASS or 1
            with named("TEST.MOMENTS"):
                self._order = order = order_batches(images.targets, self.moments, *share, processes, epoch)
            images = images.part(order.indices.tolist())
            self.cfg = with_value(cfg, "TEST.IMS_PER_BATCH", order.batch_size * processes)
        self.images = images

    @property
    def names(self) -> list[str]:
        """Of the figures."""
        return [*(f"top{k}" for k in self.top_k), "loss"]

    @property
    def conditional(self) -> bool:
        """Whether test labels decide what is measured."""
        return self.moments == "balanced"

    @property
    def details(self) -> dict[str, Any]:
        """What a record of the figures has to say of them."""
        return {"val_images": self.size, "moments": self.moments, "conditional": self.conditional}

    @property
    def note(self) -> str:
        """In words: how many images, and where moments are not the population's, which."""
        parts = [counted(self.size, self.kind)]
        if self.moments != "population":
            kind = "balanced batches" if self.conditional else "batches"
            parts.append(f"moments of {kind} of {counted(self._order.batch_size, 'image')}")
        return "; ".join([*parts, *[CONDITIONAL] * self.conditional])

    def in_order(self, values: Tensor) -> Tensor:
        """One value for each of ``images`` (M, ...) as one for each of ``targets`` (N, ...): what comes again is left
        out."""
        if self._order is None:
            return values
        ordered = values.new_empty(self.size, *values.shape[1:])
        ordered[self._order.indices[self._order.counts]] = values[: len(self._order.counts)][self._order.counts]
        return ordered

    def check(self, model: nn.Module) -> None:
        """ValueError where a model has a batch norm whose moments of a batch are not known."""
        if self.moments != "population":
            with named("TEST.MOMENTS"):
                check_moments(module for module in model.modules() if isinstance(module, _BatchNorm))

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The figures of a model, see :func:`evaluate`; every process calls it.

        Raises:
            EvaluationLeft: a process is asked to stop.
        """
        distributed.broadcast_buffers(model)
        loader = build_val_loader(self.cfg, self.images, self.device)
        counts = None if self._order is None else self._order.counts
        with moments_of(model, self.moments):
            return evaluate(model, loader, self.device, self.top_k, counts)
