"""Seeds: drawn once for a run, for an iteration, and for a block that leaves no trace."""

import random

import numpy as np
import pytest
import torch

from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.seeding import (
    choose_seed,
    same_on_all_processes,
    seed_generators,
    seed_iteration,
    seeded_rng,
)


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_the_block_leaves_the_global_generators_alone():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    with seeded_rng(1, 2):
        inside = draw()
    assert draw() == expected != inside
    with seeded_rng(1, 2):
        assert draw() == inside
    with seeded_rng(2, 1):
        assert draw() != inside


def test_a_seed_is_taken_or_drawn():
    assert choose_seed(7) == 7
    drawn = {choose_seed(-1) for _ in range(4)}
    assert len(drawn) > 1 and all(0 <= seed < 2**31 for seed in drawn)


def test_generators_follow_the_seed_however_large():
    seed_generators(2**40 + 1)
    first = draw()
    seed_generators(2**40 + 1)
    assert draw() == first
    seed_generators(2**40 + 2)
    assert draw() != first


def test_processes_build_the_same_and_then_draw_their_own(monkeypatch):
    def inside_and_behind(rank):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        with same_on_all_processes(7):
            built = draw()
        return built, draw()

    (first, own), (second, other) = inside_and_behind(0), inside_and_behind(3)
    assert first == second and own != other


def test_an_iteration_draws_the_same_whatever_came_before():
    seed_iteration(3, 5)
    first = draw()[1:]
    seed_iteration(3, 5)
    assert draw()[1:] == first
    seed_iteration(3, 6)
    assert draw()[1:] != first


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**40, 2**64 - 1])
def test_the_seeds_of_an_iteration_are_numpys_of_its_numbers(seed):
    for iteration, step in [(0, 0), (63, 1), (2**32, 3)]:
        for_torch, for_numpy = np.random.SeedSequence([seed, iteration, step]).generate_state(2)
        seed_iteration(seed, iteration, step)
        assert torch.initial_seed() == for_torch
        assert np.random.rand() == np.random.RandomState(for_numpy).rand()


def test_numpy_is_left_alone_where_nothing_draws_from_it():
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    seed_iteration(3, 5)
    drawn = torch.rand(())
    np.random.seed(5)
    seed_iteration(3, 5, with_numpy=False)
    assert np.random.rand() == expected and torch.rand(()) == drawn


def test_runs_of_older_versions_had_the_same_numbers():
    with seeded_rng(1, 2):
        assert draw() == (0.4445909587580523, 0.712957831731238, 0.8410797715187073)
    seed_iteration(2**40, 200)
    assert draw()[1:] == (0.8427117686030365, 0.6069238781929016)
