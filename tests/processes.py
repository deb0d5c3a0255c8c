"""Real processes for tests: a gloo group of forks of this one, with a limit to the time that they may take, so that a
deadlock fails a test and does not hang it."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_processes(function: Callable[[int], object], count: int, folder: Path, seconds: float = 60) -> list:
    """What ``function(rank)`` returns in each of ``count`` processes with a process group; the test fails if one raises
    or time is up."""
    context = mp.start_processes(_process, (function, count, folder, seconds), count, join=False, start_method="fork")
    end = time.monotonic() + seconds
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{count} processes have not finished in {seconds} s: a deadlock?")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _process(rank: int, function: Callable[[int], object], count: int, folder: Path, seconds: float) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=seconds)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=count, timeout=limit)
    torch.save(function(rank), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
