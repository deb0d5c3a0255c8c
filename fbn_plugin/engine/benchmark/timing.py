"""Times of peers that take turns, and the memory that a call needs.

All peers of a row take turns, in a new random order each round, so that a busy machine, a cold cache or a falling clock
hits them alike; ratios are taken within a round.
"""

import functools
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Call = Callable[[], object]


def interleave(
    calls: Mapping[str, Call], seconds: float, min_rounds: int, timer: Callable[[Call], float]
) -> dict[str, list[float]]:
    """Time the calls in turns until ``seconds`` are over: ``{name: [time of round 0, 1, ...]}``."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffler = list(calls), random.Random(0)
    deadline, rounds = time.perf_counter() + seconds, 0
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        while rounds < min_rounds or time.perf_counter() < deadline:
            shuffler.shuffle(order)
            for name in order:
                times[name].append(timer(calls[name]))
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return times


def _quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3


def summarize(times: Mapping[str, Sequence[float]], to: Mapping[str, str]) -> dict[str, dict]:
    """Medians and quartiles of interleaved times, and of the ratio within each round to the peer that ``to`` names.

    Args:
        times: name -> seconds, one for each round.
        to: name -> name of the peer that is 1.

    Returns:
        name -> ``ms`` and ``ratio``, each ``[lower quartile, median, upper quartile]``, ``to`` and ``rounds``.
    """
    result = {}
    for name, baseline in to.items():
        ratios = [own / other for own, other in zip(times[name], times[baseline])]
        ms = [1e3 * value for value in _quartiles(times[name])]
        result[name] = {"ms": ms, "ratio": _quartiles(ratios), "to": baseline, "rounds": len(ratios)}
    return result


def wall_timer(device: str) -> Callable[[Call], float]:
    """Seconds until the call's work is done, with the time that Python takes to launch it."""

    def measure(call: Call) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return measure


def gpu_timer() -> Callable[[Call], float]:
    """Seconds that the GPU works on the call, from an empty cache.

    Overwriting a large buffer first empties the cache, and keeps the GPU busy while Python launches the call.
    """
    buffer = torch.empty(2**29, dtype=torch.int8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measure(call: Call) -> float:
        buffer.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return measure


def host_timer(device: str, calls: int) -> Callable[[Call], float]:
    """Seconds that a call keeps the host: ``calls`` of them in a row, with no waiting for the device in between."""

    def measure(call: Call) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    return measure


@functools.cache
def side_stream(number: int) -> "torch.cuda.Stream":
    """The stream of that number besides the default one, always the same: kernels may leave more of the GPU free the
    more streams they have seen, which must not differ from a training's."""
    return torch.cuda.Stream()


def captured(call: Call) -> Call:
    """``call`` as a CUDA graph that is replayed, so that only the device's time is left.

    Raises:
        RuntimeError: it cannot be captured.
    """
    stream = side_stream(0)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def memory_of(call: Call, device: str, exclude: Sequence[Tensor] = ()) -> dict[str, int]:
    """Memory that one forward and backward pass needs.

    Args:
        call: runs it.
        device: where.
        exclude: tensors that are there anyhow: parameters.

    Returns:
        ``saved_bytes``: distinct storages that autograd keeps for the backward pass, whichever device; ``peak_bytes``
        on a GPU only: the most that was allocated during the call, beyond what was allocated before.
    """
    own = {each.untyped_storage().data_ptr() for each in exclude}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        call()
    result = {"saved_bytes": sum(saved.values())}
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        result["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return result
