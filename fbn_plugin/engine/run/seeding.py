"""Seeds: of a run, of an iteration, and of a block that must not disturb the generators around it."""

import contextlib
import os
import random
from collections.abc import Iterator

import numpy as np
import torch

from fbn_plugin.engine.run import distributed

__all__ = ["choose_seed", "same_on_all_processes", "seed_generators", "seed_iteration", "seeded_rng"]


def choose_seed(seed: int) -> int:
    """SEED, or where it is negative one that is drawn from the system; the same on every process."""
    return distributed.broadcast_object(seed if seed >= 0 else int.from_bytes(os.urandom(4), "little") % 2**31)


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch, on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def same_on_all_processes(seed: int) -> Iterator[None]:
    """Let what a block builds have the same first values on every process; behind it each one draws its own."""
    seed_generators(seed)
    yield
    seed_generators(seed + distributed.rank())


def seed_iteration(seed: int, iteration: int, step: int = 0) -> None:
    """Seed what one iteration draws on this process (dropout, mixup): no state has to outlive an interruption.

    Args:
        seed: of the run.
        iteration: from 0.
        step: of several in the iteration, from 0. Step s draws what as many more processes would draw.
    """
    place = step * distributed.world_size() + distributed.rank()
    for_torch, for_numpy = np.random.SeedSequence([seed, iteration, place]).generate_state(2)
    torch.manual_seed(int(for_torch))
    np.random.seed(for_numpy)


@contextlib.contextmanager
def seeded_rng(*entropy: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and PyTorch (CPU) for the length of a block, then put them back."""
    python_seed, numpy_seed, torch_seed = (int(x) for x in np.random.SeedSequence(entropy).generate_state(3))
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(python_seed)
    np.random.seed(numpy_seed)
    torch.default_generator.manual_seed(torch_seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
