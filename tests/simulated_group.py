"""A process group in one process: what stands for a process is a thread, and only one of them runs at a time, so that
code which was not made for threads (Triton's interpreter) can be run on it too."""

import threading
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor


class SimulatedGroup:
    """To put in the place of the module ``torch.distributed``: what :mod:`fbn_plugin` calls of it.

    Attributes:
        calls: how often rank 0 has called each collective.
        sizes: bytes that it gave to each, in order.
    """

    def __init__(self, size: int) -> None:
        self.size, self.calls, self.sizes = size, Counter(), []
        self._slots: list[Tensor | None] = [None] * size
        self._here = threading.local()
        self._turn, self._barrier = threading.Lock(), threading.Barrier(size, timeout=30)

    def run(self, function: Callable[[int], object]) -> list:
        """``function(rank)`` on every rank: what it returns, or the exception that it raises."""
        results = [None] * self.size

        def of_rank(rank: int) -> None:
            self._here.rank = rank
            with self._turn:
                try:
                    results[rank] = function(rank)
                except Exception as error:
                    results[rank] = error
                    if not isinstance(error, ValueError):
                        self._barrier.abort()

        threads = [threading.Thread(target=of_rank, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self, group=None) -> int:
        return self.size

    def all_gather_into_tensor(self, everyones: Tensor, mine: Tensor, group=None) -> None:
        everyones.copy_(torch.cat(self._exchange("all_gather", mine)))

    def all_reduce(self, tensor: Tensor, group=None) -> None:
        tensor.copy_(torch.stack(self._exchange("all_reduce", tensor)).sum(0))

    def _exchange(self, what: str, mine: Tensor) -> list[Tensor]:
        if self._here.rank == 0:
            self.calls[what] += 1
            self.sizes.append(mine.numel() * mine.element_size())
        self._slots[self._here.rank] = mine.detach().clone()
        self._wait()
        everyones = list(self._slots)
        self._wait()  # before anyone writes anew
        return everyones

    def _wait(self) -> None:
        self._turn.release()
        try:
            self._barrier.wait()
        finally:
            self._turn.acquire()
