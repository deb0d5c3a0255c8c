"""Seeds: of a run, of an iteration, and of a block that must not disturb the generators around it."""

import contextlib
import functools
import os
import random
from collections.abc import Iterator

import numpy as np
import torch

from fbn_plugin.engine.run import distributed

__all__ = [
    "choose_seed",
    "generators_kept",
    "same_on_all_processes",
    "seed_generators",
    "seed_iteration",
    "seed_sample",
    "seeded_rng",
]


_BLOCK = 64  # iterations


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


def seed_iteration(seed: int, iteration: int, step: int = 0, with_numpy: bool = True) -> None:
    """Seed what one iteration draws on this process (dropout, mixup): no state has to outlive an interruption.

    Args:
        seed: of the run.
        iteration: from 0.
        step: of several in the iteration, from 0. Step s draws what as many more processes would draw.
        with_numpy: seed NumPy's global generator too. It takes ten times as long as PyTorch's, so that a loop in which
            nothing draws from it leaves it out.
    """
    block, number = divmod(iteration, _BLOCK)
    world = distributed.world_size()
    place = step * world + distributed.rank() if world > 1 else step
    for_torch, for_numpy = _iteration_seeds(seed, place, block)[number]
    if _has_accelerator():
        torch.manual_seed(for_torch)
    else:  # the same on a CPU, without a stack trace for a GPU that might come, which takes 0.1 ms
        torch.default_generator.manual_seed(for_torch)
    if with_numpy:
        np.random.seed(for_numpy)


@functools.lru_cache(maxsize=128)  # accumulation has as many as it has steps
def _iteration_seeds(seed: int, place: int, block: int) -> list[tuple[int, int]]:
    """Those of PyTorch and NumPy for a block of iterations: one by one, with the caches full of a model's weights and
    activations, they would take ten times as long."""
    iterations = range(block * _BLOCK, (block + 1) * _BLOCK)
    sequences = (_seed_sequence(seed, iteration, place) for iteration in iterations)
    return [tuple(sequence.generate_state(2).tolist()) for sequence in sequences]


def _seed_sequence(*entropy: int) -> np.random.SeedSequence:
    """NumPy's of these numbers, which it takes apart itself, but in five times as long."""
    words = [number >> shift & 0xFFFFFFFF for number in entropy for shift in range(0, number.bit_length() or 1, 32)]
    return np.random.SeedSequence(np.array(words, np.uint32))


@functools.cache
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()


def seed_sample(*entropy: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (CPU) for what one sample draws."""
    python_seed, numpy_seed, torch_seed = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(python_seed))
    np.random.seed(numpy_seed)
    torch.default_generator.manual_seed(int(torch_seed))


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Put the global generators of Python, NumPy and PyTorch (CPU) back after a block that seeds them."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextlib.contextmanager
def seeded_rng(*entropy: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and PyTorch (CPU) for the length of a block, then put them back."""
    with generators_kept():
        seed_sample(*entropy)
        yield
