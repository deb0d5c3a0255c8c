"""The Triton kernels (``kernels.py``) on PyTorch tensors: float32, float16 and bfloat16, contiguous and
channels-last, batch and group form, with an optional residual and activation.

Nothing here waits for the GPU or looks at a value, so that CUDA graphs can capture it. Launches go through Triton's
dispatcher: a compiled kernel that is launched without it is not part of Triton's documented interface (its maintainers
discuss one, https://github.com/triton-lang/triton/issues/10140). Triton is imported
when the first tensor on a GPU asks for it; with ``TRITON_INTERPRET=1`` in the environment its interpreter runs the
kernels on CPU tensors.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import math
import os
from types import ModuleType

import torch
from torch import Tensor

from fbn_plugin.ops.reference import SIGN_TELLS, Options, RunningStats, gaussian_kappa

OLDEST = (3, 2)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Values that a program of 8 warps holds at a time: 16 a thread, and half of that where each value has an accumulator to
# itself, of which registers would run out. Programs that fill a large GPU.
_TILE, _PROGRAMS = 4096, 512
# Sums that a warp adds up at a time: so few that adding up needs no more registers than the tile, since all programs
# have as many as the last one needs. Tiles, at least, whose sums are added up in a stage of their own.
_ADDED, _CHUNK = 64, 64


@functools.cache
def version() -> str | None:
    """Triton's version, without importing it; None if it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return importlib.import_module("triton").__version__


@functools.cache
def missing() -> str | None:
    """Why the kernels cannot be used on any tensor; None if they can."""
    installed = version()
    if installed is None:
        return "Triton is not installed"
    if tuple(map(int, installed.split("+")[0].split(".")[:2])) < OLDEST:
        return f"Triton {installed} is older than {'.'.join(map(str, OLDEST))}"
    return None


@functools.cache
def load_kernels() -> ModuleType:
    return importlib.import_module("fbn_plugin.ops.triton.kernels")


def interpreted() -> bool:
    """True if Triton runs on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refuses(x: Tensor, num_groups: int = 0, activation: str = "identity") -> str | None:
    """Why these kernels do not take ``x``; None if they do."""
    if x.device.type != ("cpu" if interpreted() else "cuda"):
        return f"the tensor is on {x.device.type}"
    if x.dtype not in _DTYPES:
        return f"{x.dtype} is not float32, float16 or bfloat16"
    if not (x.is_contiguous() or x.movedim(1, -1).is_contiguous()):
        return "the tensor is neither contiguous nor channels-last"
    if x.device.type == "cuda" and torch.version.hip is None:
        needed, (major, minor) = 8 if x.dtype is torch.bfloat16 else 7, torch.cuda.get_device_capability(x.device)
        if major < needed:
            return f"{x.dtype} needs compute capability {needed}.0, the GPU has {major}.{minor}"
    return missing()


class _Plan:
    """How an input is cut into tiles, in the words of ``kernels.py``."""

    def __init__(self, shape: torch.Size, channels_last: bool, num_groups: int, itemsize: int) -> None:
        n, c, s = shape[0], shape[1], shape[2:].numel()
        self.set_units = k = c // num_groups if num_groups else 1
        self.samples = n if num_groups else 1
        self.channels, self.units = c, self.samples * c
        self.sets = self.units // k
        self.stats = (n, num_groups) if num_groups else (c,)
        tile = _TILE // 2 if channels_last else _TILE
        if channels_last:
            reduced, blocks, rows, cols = 0, self.samples, n * s // self.samples, c
            block_stride, row_stride = rows * c, c
            b = min(_power(cols), 128 // itemsize)
            a = min(_power(rows), tile // b)
            steps = min(4, _power(rows) // a)
        else:
            reduced, blocks, rows, cols = (1, n * num_groups, k, s) if num_groups else (2, c, n, s)
            block_stride, row_stride = (k * s, s) if num_groups else (s, c * s)
            a = min(_power(rows), max(1, tile // min(_power(cols), 512)))
            b = min(_power(cols), tile // a)
            steps = 1

        def tiles() -> tuple[int, int]:
            return -(-rows // (a * steps)), -(-cols // b)

        while blocks * math.prod(tiles()) < _PROGRAMS and a * steps > 8:  # too few to fill the GPU
            a, steps = (a, steps // 2) if steps > 1 else (a // 2, steps)
        tiles_a, tiles_b = tiles()
        warps = min(8, max(1, 8 * a * b // tile))
        self.grid = (blocks * tiles_a * tiles_b,)
        self.sizes = rows, cols, tiles_a, tiles_b, block_stride, row_stride
        self.tiling = {
            "VECTOR": math.gcd(cols, 16 // itemsize),  # values that a thread can read at once
            "REDUCED": reduced,
            "A": a,
            "B": b,
            "STEPS": steps,
            "num_warps": warps,
        }
        # A contiguous tile is of one set, and leaves the moments one slot; the gradients of weight and bias want to
        # know its channels.
        joint, at_once = num_groups > 0, _ADDED * warps
        one = math.prod((tiles_a, tiles_b)), 1, 1, 1
        by_columns, by_rows = (tiles_a, cols, b, tiles_b), (tiles_b, rows, a, tiles_a)
        self.moments = _Sums(blocks, *(by_columns if channels_last else one), joint and channels_last, k, at_once)
        self.gradients = _Sums(blocks, *(by_columns, by_rows, one)[reduced], joint, k, at_once)


class _Sums:
    """How the sums of tiles are laid out and added up, in the words of ``kernels.py``.

    Args:
        blocks: of the input.
        entries, width: tiles that the lanes of a block are cut into, and lanes.
        lanes: of a tile, a power of two.
        across: tiles next to each other across the lanes of a block.
        joint: whether sets are made of several lanes.
        set_units: lanes of a set.
        at_once: sums that a program holds at a time, a power of two.
    """

    def __init__(
        self, blocks: int, entries: int, width: int, lanes: int, across: int, joint: bool, set_units: int, at_once: int
    ) -> None:
        chunk = max(_CHUNK, at_once // lanes, _power(math.isqrt(entries)))
        if entries <= 4 * chunk:  # one stage will do, two where the lanes of a block have many programs
            chunk = 4 * chunk if joint and across > 1 else 0
        chunks = -(-entries // chunk) if chunk else 0
        self.slots, self.chunks = blocks * entries * width, blocks * chunks * width
        self.counters = blocks * (1 if joint else across) + blocks * chunks * across
        self.lanes = lanes
        self.at_last = (chunks or entries) * (width if joint else lanes)  # sums that the last of a family adds up
        at_last = min(_power(width), max(lanes, at_once // 16)) if joint else lanes
        set_entries = min(_power(set_units), at_once)
        self.options = {
            "JOINT": joint,
            "CHUNK": chunk,
            "CHUNK_ENTRIES": max(1, at_once // lanes),
            "ENTRIES": max(1, at_once // at_last),
            "LANES": at_last,
            "SET_ENTRIES": set_entries,
            "SETS": min(_power(-(-width // set_units)), max(1, at_once // set_entries)),
        }


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


@functools.lru_cache(maxsize=4096)
def _planned(shape: torch.Size, channels_last: bool, num_groups: int, itemsize: int) -> _Plan:
    return _Plan(shape, channels_last, num_groups, itemsize)


def _plan(x: Tensor, num_groups: int) -> _Plan:
    # (N, C) and (N, C, 1, 1) are rows of channels too, and are better read as such.
    channels_last = not x.is_contiguous() or x.shape[2:].numel() == 1
    return _planned(x.shape, channels_last, num_groups, x.element_size())


def _like(x: Tensor, other: Tensor) -> Tensor:
    """``other`` in the layout of ``x``."""
    if other.stride() == x.stride() and other.dtype == x.dtype:
        return other
    return torch.empty_like(x).copy_(other)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def describe() -> str:
    """What the kernels are, or why they cannot be used here."""
    reason = missing()
    if reason is not None:
        return reason
    if interpreted():
        return f"Triton {version()} kernels in its interpreter, on the CPU"
    return f"Triton {version()} kernels" if torch.cuda.is_available() else "there is no GPU"


# One for each device, for launches on its default stream.
_default_counters: dict[int, Tensor] = {}


def _counters(x: Tensor, number: int) -> Tensor:
    """So many zeros for one kernel after another, each of which leaves them zero: (at least number,), int32.

    Kernels of one stream follow each other, so those of the default stream share what has been zeroed once. On other
    streams, and there a CUDA graph is captured or warmed up in a memory pool of its own, each call has its own, which
    costs filling it.
    """
    if x.device.type != "cuda" or _raw_stream(x.device.index) != 0:
        return x.new_zeros(number, dtype=torch.int32)
    counters = _default_counters.get(x.device.index)
    if counters is None or counters.numel() < number:
        counters = x.new_zeros(max(number, 1 << 14), dtype=torch.int32)
        _default_counters[x.device.index] = counters
    return counters


def _raw_stream(device: int) -> int:
    """The handle of the current stream, 0 for the default one, from where Triton's launches have it."""
    return importlib.import_module("triton.runtime").driver.active.get_current_stream(device)


def _kappa(options: Options) -> float:
    return gaussian_kappa(options.t_sigma) if options.gaussian_correction else 1.0


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: RunningStats | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """As :func:`fbn_plugin.ops.reference.forward`, for what :func:`refuses` does not refuse: three launches."""
    plan, y = _plan(x, options.num_groups), torch.empty_like(x)
    residual = None if residual is None else _like(x, residual)
    with torch.cuda.device_of(x):
        moments = _measure_moments(plan, x, running, options)
        load_kernels().normalize[plan.grid](
            x,
            y,
            residual,
            moments,
            _dense(weight),
            _dense(bias),
            None if running is None else running.num_batches,
            plan.channels,
            plan.set_units,
            options.eps,
            options.negative_slope,
            *plan.sizes,
            ACTIVATION=options.activation,
            **plan.tiling,
        )
    _tell_autograd(running)
    return y, moments


def _measure_moments(plan: _Plan, x: Tensor, running: RunningStats | None, options: Options) -> Tensor:
    """The first two launches: moments, (5, *sets), and the running statistics, but for the counter of batches."""
    sums, kernels = plan.moments, load_kernels()
    moments = x.new_empty((5, *plan.stats), dtype=torch.float32)
    workspace, counters = _workspace(x, plan), _counters(x, sums.counters)
    running_mean, running_var, momentum, num_batches = running or (None,) * 4
    kernels.measure[plan.grid](
        x,
        workspace,
        counters,
        moments,
        plan.set_units,
        options.t_sigma,
        options.eps,
        *plan.sizes,
        WRITES="band edges",
        **sums.options,
        **plan.tiling,
    )
    kernels.measure_kept[plan.grid](
        x,
        workspace,
        counters,
        moments,
        running_mean,
        running_var,
        num_batches,
        momentum,
        _kappa(options),
        plan.set_units,
        *plan.sizes,
        **sums.options,
        **plan.tiling,
    )
    return moments


def _workspace(x: Tensor, plan: _Plan) -> Tensor:
    """Of the moments: (6 slots + 4 chunks + 4 units,) float32."""
    sums = plan.moments
    units = plan.units if sums.options["JOINT"] else 0
    return x.new_empty(6 * sums.slots + 4 * sums.chunks + 4 * units, dtype=torch.float32)


def _tell_autograd(running: RunningStats | None) -> None:
    """That the kernels have written the running statistics."""
    if running is not None:
        written = (running.mean, running.var, running.num_batches)
        torch.autograd.graph.increment_version([tensor for tensor in written if tensor is not None])


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    other: Tensor | None,
    moments: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As :func:`fbn_plugin.ops.reference.backward`, for what :func:`refuses` does not refuse: two launches."""
    plan, kernels = _plan(x, options.num_groups), load_kernels()
    grad, weight, bias = _like(x, grad), _dense(weight), _dense(bias)
    other = None if other is None else _like(x, other)
    dz = None if other is None else torch.empty_like(x)
    activation = options.activation
    with torch.cuda.device_of(x):
        workspace, parameters = _measure_gradient(
            plan, grad, x, other, dz, moments, weight, bias, _kappa(options), options
        )
        if dz is not None:  # the first pass has undone the activation
            grad, other, activation = dz, None, "identity"
        dx = torch.empty_like(x)
        kernels.input_gradient[plan.grid](
            grad,
            x,
            other,
            dx,
            moments,
            weight,
            bias,
            workspace,
            parameters,
            plan.samples,
            plan.channels,
            plan.set_units,
            options.eps,
            options.negative_slope,
            *plan.sizes,
            PAPER=options.grad_mode == "paper",
            ACTIVATION=activation,
            JOINT=plan.gradients.options["JOINT"],
            **plan.tiling,
        )
    return dx, *parameters.unbind(), dz


def _measure_gradient(
    plan: _Plan,
    grad: Tensor,
    x: Tensor,
    other: Tensor | None,
    dz: Tensor | None,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kappa: float,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """The first pass: what the second wants to know, and the gradients of weight and bias, (2, C), in the group form
    yet to be written."""
    sums = plan.gradients
    parameters = x.new_empty((2, plan.channels), dtype=torch.float32)
    units = plan.units if sums.options["JOINT"] else 0
    workspace = x.new_empty(2 * (plan.sets + units + sums.slots + sums.chunks), dtype=torch.float32)
    load_kernels().measure_gradient[plan.grid](
        grad,
        x,
        other,
        dz,
        moments,
        weight,
        bias,
        workspace,
        _counters(x, sums.counters),
        parameters,
        plan.channels,
        plan.set_units,
        kappa,
        options.eps,
        options.negative_slope,
        *plan.sizes,
        PAPER=options.grad_mode == "paper",
        ACTIVATION=options.activation,
        OUTPUT=other is not None and options.activation in SIGN_TELLS,
        **sums.options,
        **plan.tiling,
    )
    return workspace, parameters


# --- the batch form step by step, for batches whose values are on several processes -----------------------------------


def measure(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fbn_plugin.ops.reference.measure`, for what :func:`refuses` does not refuse."""
    plan = _plan(x, 0)
    moments, workspace = x.new_empty((5, plan.channels), dtype=torch.float32), _workspace(x, plan)
    with torch.cuda.device_of(x):
        load_kernels().measure[plan.grid](
            x,
            workspace,
            _counters(x, plan.moments.counters),
            moments,
            plan.set_units,
            0.0,
            0.0,
            *plan.sizes,
            WRITES="moments",
            **plan.moments.options,
            **plan.tiling,
        )
    return moments[0], moments[1], workspace


def measure_kept(x: Tensor, lower: Tensor, upper: Tensor, measured: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fbn_plugin.ops.reference.measure_kept`, once for what :func:`measure` has measured."""
    plan = _plan(x, 0)
    moments = torch.stack((lower, lower, lower, upper, upper))  # the kernel reads its band edges from rows 2 and 3
    with torch.cuda.device_of(x):
        load_kernels().measure_kept[plan.grid](
            x,
            measured,
            _counters(x, plan.moments.counters),
            moments,
            None,
            None,
            None,
            None,
            1.0,
            plan.set_units,
            *plan.sizes,
            **plan.moments.options,
            **plan.tiling,
        )
    return moments[0], moments[1], moments[4]


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Tensor, num_groups: int, eps: float
) -> Tensor:
    """As :func:`fbn_plugin.ops.reference.normalize`, for what :func:`refuses` does not refuse."""
    plan, y = _plan(x, num_groups), torch.empty_like(x)
    with torch.cuda.device_of(x):
        load_kernels().normalize[plan.grid](
            x,
            y,
            None,
            moments,
            _dense(weight),
            _dense(bias),
            None,
            plan.channels,
            plan.set_units,
            eps,
            0.0,
            *plan.sizes,
            ACTIVATION="identity",
            **plan.tiling,
        )
    return y


def gradient_sums(grad: Tensor, x: Tensor, moments: Tensor, eps: float, grad_mode: str) -> tuple[Tensor, Tensor]:
    """As :func:`fbn_plugin.ops.reference.gradient_sums`, for what :func:`refuses` does not refuse."""
    options = Options(0, math.inf, eps, False, grad_mode)
    with torch.cuda.device_of(x):
        arguments = _like(x, grad), x, None, None, moments, None, None
        _, parameters = _measure_gradient(_plan(x, 0), *arguments, 1.0, options)
    return parameters[0], parameters[1]


def input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    moments: Tensor,
    eps: float,
    grad_mode: str,
    mean_g: Tensor,
    mean_g_xhat: Tensor,
) -> Tensor:
    """As :func:`fbn_plugin.ops.reference.input_gradient`, for what :func:`refuses` does not refuse."""
    plan, dx = _plan(x, 0), torch.empty_like(x)
    with torch.cuda.device_of(x):
        load_kernels().input_gradient[plan.grid](
            _like(x, grad),
            x,
            None,
            dx,
            moments,
            _dense(weight),
            None,
            torch.stack((mean_g_xhat, mean_g)).to(torch.float32),
            None,
            plan.samples,
            plan.channels,
            plan.set_units,
            eps,
            0.0,
            *plan.sizes,
            PAPER=grad_mode == "paper",
            ACTIVATION="identity",
            JOINT=False,
            **plan.tiling,
        )
    return dx


def update_running_stats(running: RunningStats, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """As :func:`fbn_plugin.ops.reference.update_running_stats`, in one kernel."""
    with torch.cuda.device_of(mean):
        load_kernels().update_running_stats[(1,)](
            running.mean,
            running.var,
            running.num_batches,
            *(_dense(moment) for moment in (mean, var, count)),
            running.momentum,
            mean.numel(),
            BLOCK=1024,
        )
    _tell_autograd(running)
