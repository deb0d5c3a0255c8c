"""Training loaders whose batches follow from the seed and their number alone, the same for every engine."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fbn_plugin.engine.data.sampling import (
    BalancedSampler,
    GroupedBatchSampler,
    InfiniteSampler,
    RepeatFactorSampler,
    SeededDataset,
)
from fbn_plugin.engine.run import distributed

__all__ = ["data_loader", "training_loader"]


def data_loader(dataset: Dataset, **options: Any) -> DataLoader:
    """A loader with a generator of its own: the draw that each pass begins with would move the global one, and a
    resumed run would differ.

    Args:
        dataset, options: as ``DataLoader`` has them.
    """
    return DataLoader(dataset, generator=torch.Generator(), **options)


def training_loader(
    dataset: Dataset,
    seed: int,
    batch_size: int,
    start: int = 0,
    groups: Sequence[int] | None = None,
    images_per_class: int = 0,
    factors: np.ndarray | None = None,
    **options: Any,
) -> DataLoader:
    """This process's training batches, from the ``start``-th on, without end.

    The same seed gives the same batches, whatever was drawn or loaded before, and by whichever worker.

    Args:
        dataset: training samples; its augmentation draws from the global generators.
        seed: of order and augmentation.
        batch_size: samples of one process.
        start: batches to pass over, to resume at that iteration.
        groups: the group of each sample; a batch is of one group.
        images_per_class: above 0, a batch holds so many samples of each class, ``batch_size`` together.
        factors: how often an epoch has each sample, see ``repeat_factors``; without, once.
        options: as ``DataLoader`` has them.
    """
    rank, world = distributed.rank(), distributed.world_size()

    def stream(start: int) -> InfiniteSampler | RepeatFactorSampler:
        if factors is not None:
            return RepeatFactorSampler(factors, seed, rank, world, start)
        return InfiniteSampler(len(dataset), seed, rank, world, start)

    if groups is not None:
        options["batch_sampler"] = GroupedBatchSampler(stream(0), groups, batch_size, skip=start)
    elif images_per_class:
        options["sampler"] = BalancedSampler(dataset, images_per_class, seed, rank, world, start)
        options["batch_size"] = batch_size
    else:
        options["sampler"] = stream(start * batch_size)
        options["batch_size"] = batch_size
    return data_loader(SeededDataset(dataset, seed), **options)
