"""Training loaders whose batches follow from the seed and their number alone, the same for every engine."""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from fbn_plugin.engine.data.sampling import (
    AlternatingBatchSampler,
    BalancedSampler,
    GroupedBatchSampler,
    InfiniteSampler,
    RepeatFactorSampler,
    SeededDataset,
)
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.stopping import blocked, end_with_parent

__all__ = ["data_loader", "shield_workers", "training_batches", "training_loader"]


class _ShieldedLoader(DataLoader):
    def __iter__(self):
        if self.num_workers == 0:
            return super().__iter__()
        with blocked():  # from their first moment on
            return super().__iter__()


def shield_workers(loader: DataLoader) -> DataLoader:
    """Let the workers of a loader hear no SIGTERM and no Ctrl-C but their own process's, which needs them for what it
    does then, when a scheduler or a terminal signals the whole process group. They end with it.

    Args:
        loader: of ``DataLoader``'s own class.

    Returns:
        ``loader``.
    """
    loader.__class__ = _ShieldedLoader
    loader.worker_init_fn = functools.partial(_obey_parent, loader.worker_init_fn)
    return loader


def _obey_parent(init: Callable[[int], None] | None, worker: int) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    if init is not None:
        init(worker)


def data_loader(dataset: Dataset, **options: Any) -> DataLoader:
    """A loader with a generator of its own: the draw that each pass begins with would move the global one, and a
    resumed run would differ.

    Args:
        dataset, options: as ``DataLoader`` has them.
    """
    return shield_workers(DataLoader(dataset, generator=torch.Generator(), **options))


def training_batches(
    dataset: Dataset,
    seed: int,
    batch_size: int,
    start: int = 0,
    groups: Sequence[int] | None = None,
    images_per_class: int = 0,
    factors: np.ndarray | None = None,
    steps: int = 1,
    repeats: int = 1,
) -> Sampler[list[tuple[int, int]]]:
    """What this process's training batches are of, from the ``start``-th on, without end: lists of (index, position in
    the stream). The same seed gives the same ones.

    Args:
        dataset: training samples; with ``images_per_class`` one that has labels, see ``BalancedBatchSampler``.
        seed: of the order.
        batch_size: samples of one process.
        start: iterations to pass over, to resume there.
        groups: the group of each sample; a batch is of one group.
        images_per_class: above 0, a batch holds so many samples of each class, ``batch_size`` together.
        factors: how often an epoch has each sample, see ``repeat_factors``; without, once.
        steps: batches of an iteration: those of one process are the batches of ``steps`` processes, one behind the
            other, so that the images of an iteration, and of each batch, are the same on ``steps`` times as many. Not
            with ``groups`` or ``factors``.
        repeats: how often a sample comes in a row, see ``InfiniteSampler``.
    """
    rank, world = distributed.rank(), distributed.world_size()
    if steps > 1:
        places = [(step * world + rank, steps * world) for step in range(steps)]
        if images_per_class:
            streams = [BalancedSampler(dataset, images_per_class, seed, *place, start) for place in places]
        else:
            streams = [
                InfiniteSampler(len(dataset), seed, *place, start * batch_size, repeats=repeats) for place in places
            ]
        return AlternatingBatchSampler(streams, batch_size)

    def stream(start: int) -> InfiniteSampler | RepeatFactorSampler:
        if factors is not None:
            return RepeatFactorSampler(factors, seed, rank, world, start)
        return InfiniteSampler(len(dataset), seed, rank, world, start, repeats=repeats)

    if groups is not None:
        return GroupedBatchSampler(stream(0), groups, batch_size, skip=start)
    if images_per_class:
        sampler = BalancedSampler(dataset, images_per_class, seed, rank, world, start)
    else:
        sampler = stream(start * batch_size)
    return BatchSampler(sampler, batch_size, drop_last=False)


def training_loader(dataset: Dataset, seed: int, batches: Sampler[list[tuple[int, int]]], **options: Any) -> DataLoader:
    """This process's training batches, without end.

    The same seed gives the same batches, whatever was drawn or loaded before, and by whichever worker.

    Args:
        dataset: training samples; its augmentation draws from the global generators.
        seed: of the augmentation.
        batches: what they are of, see ``training_batches``.
        options: as ``DataLoader`` has them.
    """
    return data_loader(SeededDataset(dataset, seed), batch_sampler=batches, **options)
