"""One process or many for a detectron2 run, on GPUs or on the CPU, and what is said when one of them dies."""

import contextlib
import datetime
import multiprocessing.connection
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import multiprocessing as mp

from fbn_plugin.engine.run import stopping
from fbn_plugin.engine.run.cli import stoppable
from fbn_plugin.engine.run.output_dir import how_to_continue

__all__ = ["launch"]

_TIMEOUT = datetime.timedelta(minutes=30)

# Seconds in which processes notice by themselves that another one is gone, or that the run is to stop at once.
_PATIENCE = 10.0


def launch(
    function: Callable[..., None],
    args: tuple,
    processes: int,
    machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    device: str = "cuda",
    folder: str = "",
) -> None:
    """Call ``function(*args)`` in every process of the run; with one process, in this one.

    Args:
        processes: on this machine; on GPUs, one for each.
        machines, machine_rank: how many machines there are, and which one this is.
        dist_url: where the processes meet; ``"auto"``, for one machine, is a free port.
        device: MODEL.DEVICE.
        folder: OUTPUT_DIR, for the sentence on what a run that broke off left behind.

    Raises:
        SystemExit: a process was killed (1, with one sentence on stderr), or ended with a code of its own, having said
            why.
        Terminated: the run was asked to stop, and its processes have saved and left.
    """
    if processes * machines == 1:
        if torch.device(device).type == "cuda" and torch.cuda.is_available():
            torch.cuda.set_device(torch.device(device).index or 0)
        function(*args)
        return
    if dist_url == "auto":
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
    with stopping.blocked("spawn"):  # until they can answer a signal
        context = mp.start_processes(
            _process,
            args=(function, args, processes, machines, machine_rank, dist_url, device),
            nprocs=processes,
            join=False,
        )
    try:
        with stopping.deferred():
            codes = _wait(context.processes)
    except KeyboardInterrupt:
        for process in context.processes:  # where the signal was for this process alone
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
        _end(context.processes, _PATIENCE)
        raise
    finally:
        _end(context.processes)
    _judge(codes, machine_rank * processes, processes * machines, folder)


def _wait(processes: Sequence[BaseProcess]) -> list[int | None]:
    """Wait for all processes, hand a request to stop on to them, and when one fails end those that do not notice it.

    Returns:
        their exit codes, a signal's number below 0; None of a process that was ended here.
    """
    told = False
    while alive := [process for process in processes if process.is_alive()]:
        if any(process.exitcode for process in processes):
            return _end(processes, _PATIENCE)
        if stopping.asked() and not told:
            told = True
            for process in alive:
                process.terminate()
        multiprocessing.connection.wait([process.sentinel for process in alive], 0.2)
    return [process.exitcode for process in processes]


def _end(processes: Sequence[BaseProcess], patience: float = 0.0) -> list[int | None]:
    """Kill the processes that do not end by themselves within so many seconds; the exit codes of the others."""
    end = time.monotonic() + patience
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return codes


def _judge(codes: Sequence[int | None], first: int, total: int, folder: str) -> None:
    """Say what ended a run, where its processes have not.

    One that was killed or failed makes the others fail, and may not be the first that is noticed.

    Args:
        codes: see :func:`_wait`.
        first: number of the first of these processes among all of the run.
        total: processes of the run.
        folder: OUTPUT_DIR.

    Raises:
        SystemExit: one failed.
        Terminated: they were asked to stop, and have.
    """
    if 2 in codes:  # bad input: one process said what is wrong with it
        raise SystemExit(2)
    for number, code in enumerate(codes):
        if code is not None and code < 0:
            print(
                f"error: process {first + number} of {total} was killed by {signal.Signals(-code).name}, and the "
                f"others were stopped; {how_to_continue(folder)}",
                file=sys.stderr,
            )
            raise SystemExit(1)
    if stopping.STOPPED in codes:
        stopping.leave()
    if any(codes):
        raise SystemExit(max(code for code in codes if code is not None))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _process(local_rank: int, *arguments: Any) -> None:
    """What a started process does: :func:`_join_and_call`, with the sentences of a tool."""
    try:
        with stoppable():
            stopping.unblock()
            _join_and_call(local_rank, *arguments)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def _join_and_call(
    local_rank: int,
    function: Callable[..., None],
    args: tuple,
    processes: int,
    machines: int,
    machine_rank: int,
    dist_url: str,
    device: str,
) -> None:
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=dist_url,
        world_size=processes * machines,
        rank=machine_rank * processes + local_rank,
        timeout=_TIMEOUT,
    )
    comm.create_local_process_group(processes)
    comm.synchronize()
    function(*args)
    dist.destroy_process_group()
