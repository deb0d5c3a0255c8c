"""Times of single layers in training: what the device needs, and what the host needs for a small one."""

import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fbn_plugin import ops
from fbn_plugin.engine.benchmark.peers import COMPILED, HOST_PEERS, Peer
from fbn_plugin.engine.benchmark.settings import DTYPES, LAYOUTS, Settings
from fbn_plugin.engine.benchmark.timing import (
    Call,
    captured,
    gpu_timer,
    host_timer,
    interleave,
    memory_of,
    summarize,
    wall_timer,
)

# How often one pass streams a tensor of the input's size: BN reads x for the moments and again to normalize it, and
# writes y; backward it reads x and dL/dy for the sums and again for the result, which it writes. The filter reads x
# once more; where few tiles hold an outlier it need not, and BN's figure holds for FBN too.
SIZES_MOVED = {"forward": {"BN": 3, "FBN": 4}, "forward+backward": {"BN": 8, "FBN": 9}}
# Kernels on a GPU that keep their data on the chip read x once and write y, then read x and dL/dy and write dL/dx.
SIZES_MOVED_ON_CHIP = {"forward": 2, "forward+backward": 5}
HOST_SHAPE = (2, 64, 8, 8)


def layer_input(shape: Sequence[int], outliers: float, layout: str, dtype: str, device: str) -> Tensor:
    """Activations of a layer: Gaussian, each channel with a mean and a deviation of its own.

    They are cut at 4.5 deviations, and a share ``outliers`` of them then set 20 deviations off: without any, T = 5
    filters nothing, while T = 2 always filters a Gaussian's 4.6 %.
    """
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device}
    x = torch.randn(*shape, **options).clamp_(-4.5, 4.5)
    x = torch.where(torch.rand(*shape, **options) < outliers, 20 * x.sign(), x)
    scale, shift = (torch.rand(shape[1], 1, 1, **options) + 0.5 for _ in range(2))
    x = (x * scale + shift).to(DTYPES[dtype])
    return x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()


def layer_call(module: nn.Module, inputs: Sequence[Tensor], grad: Tensor, which: str) -> Call:
    """A call of a layer, ``which`` one of ``PASSES``."""
    wanted = [*inputs, *module.parameters()]

    def forward() -> None:
        module(*inputs)

    def forward_backward() -> None:
        torch.autograd.grad(module(*inputs), wanted, grad)

    return forward if which == "forward" else forward_backward


def first_line(error: BaseException) -> str:
    """What a note says of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def usable(calls: Mapping[str, Call], to: Mapping[str, str], notes: list[str], where: str) -> dict[str, Call]:
    """The calls that run, after two runs of each. What fails, or whose baseline does, is left out with a note.

    Raises:
        RuntimeError: no call is left.
    """
    running, reason = {}, ""
    for name, call in calls.items():
        try:
            call()
            call()
        except Exception as error:  # of the compilers and the driver, too, whose types differ between releases
            reason = first_line(error)
            if (note := f"{name} is left out{where}: {reason}") not in notes:
                notes.append(note)
        else:
            running[name] = call
    kept = {name: call for name, call in running.items() if to.get(name, name) in running}
    notes += [f"{name} is left out{where}, as there is no {to[name]}" for name in running if name not in kept]
    if not any(name in to for name in kept):
        raise RuntimeError(reason)
    return kept


def _replayed(calls: Mapping[str, Call], notes: list[str], where: str) -> dict[str, Call]:
    """The calls as CUDA graphs; where one cannot be captured, the call itself, with a note."""
    graphs = {}
    for name, call in calls.items():
        try:
            graphs[name] = captured(call)
        except Exception as error:
            notes.append(f"{name} was no CUDA graph{where}, its time is between two events: {first_line(error)}")
            graphs[name] = call
    return graphs


def layer_row(
    settings: Settings,
    peers: Sequence[Peer],
    x: Tensor,
    which: str,
    until: float,
    notes: list[str],
    where: str = "",
) -> dict:
    """Time layers on one input.

    Args:
        settings: for how long.
        peers: what to time.
        x: the input, see :func:`layer_input`.
        which: one of ``PASSES``.
        until: the ``time.perf_counter()`` by which to be done.
        notes: gets a sentence for each peer that could not be timed.
        where: the input in words, for the notes.

    Returns:
        ``pass``, ``backend``, ``tensor_bytes``, ``copy_gb_per_s``, ``roofline_ms``, and ``peers`` as in
        :func:`.timing.summarize`, with the memory of :func:`.timing.memory_of`.
    """
    grad, source, target = torch.randn_like(x), x.detach(), torch.empty_like(x)
    residual = torch.randn_like(x).requires_grad_()
    modules, calls = {}, {}
    for peer in peers:
        module = peer.build(x.shape[1]).to(x.device)
        if "GN" in peer.name:
            module.to(x.dtype)  # group normalization has no mixed form on a GPU; batch norms keep float32, as autocast
        modules[peer.name] = module
        calls[peer.name] = layer_call(module, (x, residual) if peer.residual else (x,), grad, which)
    to = {peer.name: peer.to for peer in peers}
    calls = usable(calls | {"copy": lambda: target.copy_(source)}, to, notes, where)
    cuda = settings.device == "cuda"
    timed = _replayed(calls, notes, where) if cuda else calls
    seconds = min(settings.seconds("layers"), until - time.perf_counter())
    times = interleave(timed, seconds, settings.min_rounds, gpu_timer() if cuda else wall_timer("cpu"))
    results = summarize(times, {name: to[name] for name in calls if name in to})
    if which == "forward+backward":
        for name in results:
            results[name] |= memory_of(calls[name], settings.device, list(modules[name].parameters()))
    copy_ms = 1e3 * statistics.median(times["copy"])
    size = x.numel() * x.element_size()
    moved = SIZES_MOVED[which] | ({"on chip": SIZES_MOVED_ON_CHIP[which]} if cuda else {})
    return {
        "pass": which,
        "backend": ops.explain(x),
        "tensor_bytes": size,
        "copy_gb_per_s": 2 * size / copy_ms / 1e6,
        # A copy moves two sizes.
        "roofline_ms": {name: sizes / 2 * copy_ms for name, sizes in moved.items()},
        "peers": results,
    }


def measure_layer(
    settings: Settings,
    peers: Sequence[Peer],
    shape: Sequence[int],
    layout: str,
    dtype: str,
    outliers: float,
    which: str,
    until: float,
    notes: list[str],
) -> dict:
    """:func:`layer_row` on an input of its own, with what tells the row from the others."""
    if any(peer is COMPILED for peer in peers):
        torch.compiler.reset()  # or it gives up after a few shapes
    x = layer_input(shape, outliers, layout, dtype, settings.device)
    where = f" for {'x'.join(map(str, shape))} {layout} {dtype}" if settings.targets else ""
    return layer_row(settings, peers, x, which, until, notes, where) | {
        "shape": list(shape), "layout": layout, "dtype": dtype, "outliers": outliers,
    }  # fmt: skip


def measure_host(settings: Settings, depth: int, which: str, until: float, notes: list[str]) -> dict:
    """Time the host alone: calls in a row of ``depth`` small layers, one after the other, without waiting for the
    device; milliseconds and ratios for one layer."""
    x = layer_input(HOST_SHAPE, 0.0, "contiguous", "float32", settings.device)
    calls = {}
    for peer in HOST_PEERS:
        module = nn.Sequential(*(peer.build(x.shape[1]) for _ in range(depth))).to(x.device)
        calls[peer.name] = layer_call(module, (x,), torch.ones_like(x), which)
    to = {peer.name: peer.to for peer in HOST_PEERS}
    calls = usable(calls, to, notes, f" of the host's time, {depth} layers")
    repeat = max(1, (4 if settings.quick else 100) // depth)
    seconds = min(settings.seconds("host"), until - time.perf_counter())
    times = interleave(calls, seconds, settings.min_rounds, host_timer(settings.device, repeat))
    times = {name: [each / depth for each in values] for name, values in times.items()}
    return {
        "shape": list(HOST_SHAPE), "dtype": "float32", "pass": which, "depth": depth,
        "backend": ops.explain(x), "peers": summarize(times, {name: to[name] for name in calls}),
    }  # fmt: skip
