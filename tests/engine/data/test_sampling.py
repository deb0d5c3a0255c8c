"""Sampling: permutations that can be entered anywhere and shared out, randomness that only positions decide."""

import random
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from fbn_plugin.engine.data.sampling import (
    BalancedSampler,
    GroupedBatchSampler,
    InfiniteSampler,
    RepeatFactorSampler,
    SeededDataset,
    repeat_factors,
)

sizes = st.integers(1, 12)
seeds = st.integers(0, 2**32)


@given(sizes, seeds)
def test_every_epoch_is_a_permutation(size, seed):
    items = list(islice(InfiniteSampler(size, seed), 3 * size))
    assert [position for _, position in items] == list(range(3 * size))
    for epoch in range(3):
        assert sorted(index for index, _ in items[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_epochs_and_seeds_differ():
    first, second = (list(islice(InfiniteSampler(20, seed), 40)) for seed in (0, 1))
    assert [i for i, _ in first[:20]] != [i for i, _ in first[20:]]
    assert first != second


@given(sizes, seeds, st.integers(1, 4), st.integers(0, 30))
def test_ranks_share_one_stream_and_start_enters_it(size, seed, world, start):
    stream = list(islice(InfiniteSampler(size, seed), (start + 5) * world))
    for rank in range(world):
        part = list(islice(InfiniteSampler(size, seed, rank, world, start), 5))
        assert part == stream[rank::world][start:]


@given(sizes, seeds, st.integers(1, 3), st.integers(0, 8), st.data())
def test_grouped_batches_are_pure_and_lose_nothing(size, seed, batch_size, skip, data):
    groups = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    batches = list(islice(GroupedBatchSampler(InfiniteSampler(size, seed), groups, batch_size), skip + 4))
    assert all(len({groups[index] for index, _ in batch}) == 1 and len(batch) == batch_size for batch in batches)
    positions = [position for batch in batches for _, position in batch]
    assert len(set(positions)) == len(positions)
    for group in {groups[index] for batch in batches for index, _ in batch}:  # in a group, nothing is passed over
        seen = [item for batch in batches for item in batch if groups[item[0]] == group]
        stream = (item for item in InfiniteSampler(size, seed) if groups[item[0]] == group)
        assert seen == list(islice(stream, len(seen)))
    again = GroupedBatchSampler(InfiniteSampler(size, seed), groups, batch_size, skip=skip)
    assert list(islice(again, 4)) == batches[skip:]


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        InfiniteSampler(0, 0)


class Noise(Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return index, random.random(), np.random.rand(), torch.rand(()).item()


@pytest.mark.parametrize("workers", [0, 2])
def test_randomness_does_not_depend_on_workers(workers):
    dataset = SeededDataset(Noise(), seed=3)
    loader = DataLoader(dataset, 2, sampler=InfiniteSampler(5, 3), num_workers=workers, collate_fn=list)
    batches = [sample for batch in islice(loader, 4) for sample in batch]
    assert batches == [dataset[item] for item in islice(InfiniteSampler(5, 3), 8)]
    assert len({sample[1:] for sample in batches}) == 8


@pytest.mark.parametrize("world_size", [1, 2])
def test_balanced_batches_and_a_resumed_stream(world_size):
    labels = [0] * 7 + [1] * 3 + [2] * 5

    def batches(rank, start, number):
        stream = iter(BalancedSampler(labels, 2, seed=1, rank=rank, world_size=world_size, start=start))
        return [[next(stream) for _ in range(6)] for _ in range(number)]

    positions = []
    for rank in range(world_size):
        stream = batches(rank, 0, 12)
        assert all(sorted(labels[index] for index, _ in batch) == [0, 0, 1, 1, 2, 2] for batch in stream)
        assert batches(rank, 5, 7) == stream[5:]
        assert stream[0] != stream[6]
        positions += [position for batch in stream for _, position in batch]
    assert sorted(positions) == list(range(12 * 6 * world_size)), "each sample's augmentation is its own"


def test_rare_categories_are_repeated():
    """Of ten images, five have a, one has b, and one has none of either."""
    categories = [{"a"}, {"a"}, {"a"}, {"a"}, {"a", "b"}, {"c"}, {"c"}, {"c"}, {"c"}, ()]
    assert repeat_factors(categories, 0.4).tolist() == [1, 1, 1, 1, 2, 1, 1, 1, 1, 1]
    assert repeat_factors(categories, 0.4, sqrt=False).tolist() == [1, 1, 1, 1, 4, 1, 1, 1, 1, 1]
    assert repeat_factors(categories, 0.8, sqrt=False).tolist() == pytest.approx([1.6] * 4 + [8] + [2] * 4 + [1])
    assert repeat_factors(categories, 0.0).tolist() == [1] * 10


def test_epochs_repeat_images_by_their_factors():
    factors = np.array([1.0, 2.5, 1.0, 3.0])
    items = [index for index, _ in islice(RepeatFactorSampler(factors, 1), 4000)]
    counts = np.bincount(items)
    assert counts / counts[0] == pytest.approx(factors, rel=0.1)
    assert sorted(items[:7])[:6] == [0, 1, 1, 2, 3, 3] and items[:7] != sorted(items[:7])


@given(seeds, st.integers(1, 4), st.integers(0, 30))
def test_ranks_share_one_stream_of_repeated_images(seed, world, start):
    factors = np.array([1.0, 2.5, 1.25])
    stream = list(islice(RepeatFactorSampler(factors, seed), (start + 5) * world))
    assert [position for _, position in stream] == list(range(len(stream)))
    for rank in range(world):
        part = list(islice(RepeatFactorSampler(factors, seed, rank, world, start), 5))
        assert part == stream[rank::world][start:]
