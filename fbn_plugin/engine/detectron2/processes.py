"""One process or many for a detectron2 run, on GPUs or on the CPU, and what is said when one of them dies."""

import datetime
import signal
import socket
import sys
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import multiprocessing as mp
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from fbn_plugin.engine.run.output_dir import how_to_continue

__all__ = ["launch"]

_TIMEOUT = datetime.timedelta(minutes=30)


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
        ProcessRaisedException: a process raised an error.
    """
    if processes * machines == 1:
        if torch.device(device).type == "cuda" and torch.cuda.is_available():
            torch.cuda.set_device(torch.device(device).index or 0)
        function(*args)
        return
    if dist_url == "auto":
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
    context = mp.start_processes(
        _process,
        args=(function, args, processes, machines, machine_rank, dist_url, device),
        nprocs=processes,
        join=False,
    )
    try:
        while not context.join():
            pass
    except KeyboardInterrupt:
        for process in context.processes:  # where the signal was for this process alone
            process.terminate()
            process.join()
        raise
    except (ProcessExitedException, ProcessRaisedException) as error:
        codes = [process.exitcode for process in context.processes]
        number, code = _killed(error, codes)
        print(
            f"error: process {machine_rank * processes + number} of {processes * machines} was killed by "
            f"{signal.Signals(-code).name}, and the others were stopped; {how_to_continue(folder)}",
            file=sys.stderr,
        )
        raise SystemExit(1) from None


def _killed(error: ProcessExitedException | ProcessRaisedException, codes: Sequence[int]) -> tuple[int, int]:
    """The process that was killed and brought the others down, with its exit code, a signal's number below 0.

    One that was killed makes the others fail, or be stopped, and may not be the first that is noticed.

    Args:
        error: what was noticed first.
        codes: exit codes of all processes of this machine.

    Raises:
        SystemExit: none was, and one ended with a code of its own, having said why.
        ProcessRaisedException: none was, and one raised an error.
    """
    if 2 in codes:  # bad input: one process said what is wrong with it
        raise SystemExit(2) from None
    killed = [(number, code) for number, code in enumerate(codes) if code < 0 and code != -signal.SIGTERM]
    if killed:
        return killed[0]
    if isinstance(error, ProcessRaisedException):
        raise error
    if error.exit_code >= 0:
        raise SystemExit(error.exit_code) from None
    return error.error_index, error.exit_code


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _process(
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
