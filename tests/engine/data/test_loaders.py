"""Training loaders: batches that the seed and their number decide."""

import random
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from fbn_plugin.engine.data.loaders import training_batches, training_loader


class Labelled(Dataset):
    """Twelve samples of three classes; a sample is its index with a random number."""

    labels = tuple(index % 3 for index in range(12))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return index, random.random()


def batches(number, start=0, num_workers=0, **options):
    chosen = training_batches(Labelled(), 5, 3, start, **options)
    loader = training_loader(Labelled(), 5, chosen, collate_fn=list, num_workers=num_workers)
    return list(islice(loader, number))


FACTORS = np.array([1.0] * 9 + [2.5] * 3)
HALVES = [index // 6 for index in range(12)]


@pytest.mark.parametrize(
    "how",
    [{}, {"groups": HALVES}, {"images_per_class": 1}, {"factors": FACTORS}, {"factors": FACTORS, "groups": HALVES}],
)
def test_batches_go_on_where_they_stopped(how):
    whole = batches(8, **how)
    state = torch.get_rng_state()
    assert batches(5, start=3, **how) == whole[3:] == batches(5, start=3, num_workers=2, **how)
    assert torch.equal(torch.get_rng_state(), state)
    for batch in whole:
        indices = [index for index, _ in batch]
        if "groups" in how:
            assert len({index // 6 for index in indices}) == 1
        if "images_per_class" in how:
            assert sorted(index % 3 for index in indices) == [0, 1, 2]
