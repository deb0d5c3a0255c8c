"""One process or many: set-up from torchrun's environment, rank helpers, collectives that one process may call too."""

import functools
import os
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run import stopping
from fbn_plugin.engine.run.rules import refusal

__all__ = [
    "all_gather",
    "barrier",
    "broadcast_buffers",
    "broadcast_object",
    "data_parallel",
    "finish",
    "init",
    "is_main",
    "lost_process",
    "on_main",
    "rank",
    "reduce_mean",
    "start_mean",
    "world_size",
]


def init(device: str = "cuda") -> torch.device:
    """Join torchrun's process group, if there is one, and return this process's device.

    Args:
        device: ``"cuda"`` falls back to ``"cpu"`` where no GPU is present; ``"cpu"``, ``"cuda:1"`` and the like are
            taken as they are.

    Raises:
        ValueError: ``device`` is no device, or there are more processes than GPUs on this machine, or the environment
            has no numbers where torchrun sets some.
    """
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise refusal("MODEL.DEVICE", "'cuda', 'cuda:0' and the like, or 'cpu'", device) from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        chosen = torch.device("cpu")
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    local_rank = _launched("LOCAL_RANK", 0)
    if chosen.type == "cuda":
        if launched:
            chosen = torch.device("cuda", local_rank)
        index = chosen.index or 0
        if index >= torch.cuda.device_count():
            gpus = counted(torch.cuda.device_count(), "GPU")
            raise ValueError(f"this process wants cuda:{index}, and this machine has {gpus}")
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    if launched and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return chosen


def finish() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def lost_process(error: BaseException) -> str | None:
    """A sentence for an error by which a process notices that another one is gone; None for any other error.

    Another process of the run is noticed by an exchange that fails, gloo's with an error of its own, NCCL's with a
    DistError; one that loads images by the signal that the system sends.
    """
    text = str(error)
    if not isinstance(error, RuntimeError):
        return None
    if worker := re.search(r"DataLoader worker \(pid.*?\) (?:is killed by signal: (\w+)|exited unexpectedly)", text):
        how = f"was killed ({worker[1]}), perhaps for want of memory" if worker[1] else "exited unexpectedly"
        return f"a process that loads images {how}; --resume continues the run"
    several = world_size() > 1 or int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and (isinstance(error, dist.DistError) or re.search(r"gloo|[Cc]onnection (closed|reset) by peer", text)):
        return "another process of this run stopped; what that one printed says why, and --resume continues the run"
    return None


def rank() -> int:
    """This process's number, from 0; torchrun's word for it before ``init``."""
    return dist.get_rank() if dist.is_initialized() else _launched("RANK", 0)


def _launched(name: str, default: int) -> int:
    """A number that torchrun says to its processes by the environment.

    Raises:
        ValueError: it is none, or there are fewer processes.
    """
    given, processes = os.environ.get(name), os.environ.get("WORLD_SIZE", "")
    if given is None and not processes:
        return default
    given = str(default) if given is None else given
    for variable, number in (("WORLD_SIZE", processes or "1"), (name, given)):
        if not re.fullmatch(r"\d{1,9}", number) or (variable == "WORLD_SIZE" and int(number) < 1):
            raise refusal(variable, "a number as torchrun sets it in the environment", number)
    if processes and int(given) >= int(processes):
        raise refusal(name, f"less than WORLD_SIZE, {processes}, as torchrun sets them in the environment", given)
    return int(given)


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and logs."""
    return rank() == 0


def barrier() -> None:
    """Wait for every process."""
    if world_size() > 1:
        dist.barrier()


def on_main(action: Callable[[], object]) -> None:
    """Let rank 0 do what concerns files while the others wait, so that none of them waits for ever where it fails.

    Raises:
        OSError, ValueError: what ``action`` raises on rank 0; on every process.
        RuntimeError: in the place of any other error, on ranks but 0.
    """
    if not dist.is_initialized():
        if is_main():
            action()
        return
    error = told = None
    if is_main():
        try:
            action()
        except Exception as caught:  # a bug as well: nobody else would know of it
            error = told = caught
            if not isinstance(caught, OSError | ValueError):  # perhaps one that cannot be sent
                told = RuntimeError(f"rank 0 failed: {type(caught).__name__}: {caught}")
    told = broadcast_object(told)
    if told is not None:
        raise error or told


def all_gather(value: Any) -> list[Any]:
    """Every process's ``value`` (any picklable object), by rank, on every process."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's ``value`` (any picklable object) on every process."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process rank 0's buffers, so that running statistics agree before an evaluation that is shared out."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def data_parallel(model: nn.Module, device: str | torch.device, **options: Any) -> nn.Module:
    """The model in ``DistributedDataParallel``; of one process alone, the model itself.

    Args:
        model: on ``device``.
        device: of this process.
        options: of ``DistributedDataParallel``.
    """
    if world_size() == 1:
        return model
    device = torch.device(device)
    return DistributedDataParallel(model, [device] if device.type == "cuda" else None, **options)


def reduce_mean(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """The mean over processes of each entry; the keys must be the same everywhere.

    With them goes whether a process was asked to stop, so that all know it after the same iteration, see
    ``stopping.agreed``.
    """
    if world_size() == 1:
        stopping.agree(stopping.asked())
        return values
    sums = torch.tensor([*values.values(), stopping.asked()], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    *means, stop = (sums / world_size()).tolist()
    stopping.agree(stop > 0)
    return dict(zip(values, means))


def start_mean(values: dict[str, Tensor]) -> Callable[[], dict[str, float]]:
    """The mean over processes of single values that a device may still be computing, as :func:`reduce_mean`.

    Asked for here, and waited for where the function that is returned is called: what the device is given in between
    goes on, and is not waited for.

    Args:
        values: name -> tensor of one element; the names must be the same everywhere.
    """
    device, several = next(iter(values.values())).device, world_size() > 1
    if not several and device.type == "cpu":  # as short as can be: it is part of every iteration
        return functools.partial(_mean_of_one, values)
    tensors = [value.detach() for value in values.values()]
    if several:
        tensors = [value.double() for value in tensors]
        tensors.append(tensors[0].new_full((), stopping.asked()))
    sums = torch.stack(tensors)
    if several:
        dist.all_reduce(sums)
    there = None
    if device.type == "cuda":
        sums = sums.to("cpu", non_blocking=True)
        there = torch.cuda.Event()
        there.record()

    def wait() -> dict[str, float]:
        if there is not None:
            there.synchronize()
        means = (sums / world_size() if several else sums).tolist()
        stopping.agree(means.pop() > 0 if several else stopping.asked())
        return dict(zip(values, means))

    return wait


def _mean_of_one(values: dict[str, Tensor]) -> dict[str, float]:
    stopping.agree(stopping.asked())
    return {name: value.item() for name, value in values.items()}
