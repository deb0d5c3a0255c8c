"""The Triton kernels (``kernels.py``) on PyTorch tensors: float32, float16 and bfloat16, contiguous and
channels-last, batch and group form, with an optional residual and activation.

Nothing here waits for the GPU or looks at a value, so that CUDA graphs can capture it. Triton is imported when the
first tensor on a GPU asks for it; with ``TRITON_INTERPRET=1`` in the environment its interpreter runs the kernels on
CPU tensors.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import math
import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fbn_plugin.ops import reference
from fbn_plugin.ops.reference import SIGN_TELLS, FilteredMoments, Options, RunningStats, gaussian_kappa

OLDEST = (3, 2)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Values that a program of 8 warps holds at a time: 16 a thread, and half of that where each value has an accumulator to
# itself, of which registers would run out. Programs that fill a large GPU.
_TILE, _PROGRAMS = 4096, 512


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
        samples = n if num_groups else 1
        self.sets, self.samples, self.channels = samples * c // k, samples, c
        self.set_size = n * c * s // self.sets
        tile = _TILE // 2 if channels_last else _TILE
        if channels_last:
            reduced, blocks, rows, cols = 0, samples, n * s // samples, c
            block_stride, row_stride, self.set_width = rows * c, c, k
            b = min(_power(cols), 128 // itemsize)
            a = min(_power(rows), tile // b)
            steps = min(4, _power(rows) // a)
        else:
            reduced, blocks, rows, cols = (1, n * num_groups, k, s) if num_groups else (2, c, n, s)
            block_stride, row_stride = (k * s, s) if num_groups else (s, c * s)
            self.set_width = s
            a = min(_power(rows), max(1, tile // min(_power(cols), 512)))
            b = min(_power(cols), tile // a)
            steps = 1

        def tiles() -> tuple[int, int]:
            return -(-rows // (a * steps)), -(-cols // b)

        while blocks * math.prod(tiles()) < _PROGRAMS and a * steps > 8:  # too few to fill the GPU
            a, steps = (a, steps // 2) if steps > 1 else (a // 2, steps)
        tiles_a, tiles_b = tiles()
        self.unit_slots = (tiles_a, tiles_b, tiles_a * tiles_b)[reduced]
        self.slots = samples * c * self.unit_slots
        self.grid = (blocks * tiles_a * tiles_b,)
        self.tiling = {
            "rows": rows,
            "cols": cols,
            "tiles_a": tiles_a,
            "tiles_b": tiles_b,
            "block_stride": block_stride,
            "row_stride": row_stride,
            "VECTOR": math.gcd(cols, 16 // itemsize),  # values that a thread can read at once
            "REDUCED": reduced,
            "A": a,
            "B": b,
            "STEPS": steps,
            "num_warps": min(8, max(1, 8 * a * b // tile)),
        }

    def adding_up(self, slots: int) -> dict:
        """Options of a kernel that adds up this many slots in a program."""
        block = min(4096, max(16, _power(slots)))
        return {"BLOCK": block, "num_warps": max(1, block // 256)}


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


def filtered_moments(
    x: Tensor, num_groups: int, t_sigma: float, eps: float, gaussian_correction: bool
) -> FilteredMoments:
    """As :func:`fbn_plugin.ops.reference.filtered_moments`, for what :func:`refuses` does not refuse."""
    plan, run = _plan(x, num_groups), load_kernels()
    stats = x.shape[1:2] if num_groups == 0 else (x.shape[0], num_groups)
    mean, var, lower, upper, count, shift = (x.new_empty(stats, dtype=torch.float32) for _ in range(6))
    partial = x.new_empty((5, plan.slots), dtype=torch.float32)
    set_slots, size = plan.set_units * plan.unit_slots, plan.set_size
    units = plan.channels, plan.set_units
    adding_up = plan.adding_up(set_slots)
    kappa = gaussian_kappa(t_sigma) if gaussian_correction else 1.0
    with torch.cuda.device_of(x):
        run.measure[plan.grid](
            x, shift, partial, plan.slots, *units, size // plan.set_width, plan.set_width, **plan.tiling
        )
        run.draw_band[(plan.sets,)](
            shift, lower, upper, partial, plan.slots, set_slots, size, t_sigma, eps, **adding_up
        )
        run.measure_kept[plan.grid](x, shift, lower, upper, partial, plan.slots, *units, **plan.tiling)
        run.settle[(plan.sets,)](shift, mean, var, count, partial, plan.slots, set_slots, size, kappa, **adding_up)
    return FilteredMoments(mean, var, lower, upper, count)


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: FilteredMoments | Tensor,
    num_groups: int,
    eps: float,
    residual: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.0,
) -> Tensor:
    """As :func:`fbn_plugin.ops.reference.normalize`, for what :func:`refuses` does not refuse."""
    plan, y = _plan(x, num_groups), torch.empty_like(x)
    mean, var, *_ = moments
    residual = None if residual is None else _like(x, residual)
    parameters = _dense(weight), _dense(bias), plan.channels, plan.set_units
    with torch.cuda.device_of(x):
        load_kernels().normalize[plan.grid](
            x,
            y,
            residual,
            mean,
            var,
            *parameters,
            eps,
            negative_slope,
            ACTIVATION=activation,
            **plan.tiling,
        )
    return y


def filtered_norm_act_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    other: Tensor | None,
    moments: FilteredMoments,
    num_groups: int,
    t_sigma: float,
    eps: float,
    gaussian_correction: bool,
    grad_mode: str,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """:func:`backward` with the options one by one."""
    plan, run = _plan(x, num_groups), load_kernels()
    mean, var, lower, upper, count = moments
    grad, weight, bias = _like(x, grad), _dense(weight), _dense(bias)
    dx, dz = torch.empty_like(x), None
    if other is not None:
        other, dz = _like(x, other), torch.empty_like(x)
    d_weight, d_bias = (x.new_empty(plan.channels, dtype=torch.float32) for _ in range(2))
    partial = x.new_empty((2, plan.slots), dtype=torch.float32)
    coefficients = x.new_empty((2, plan.sets), dtype=torch.float32)
    kappa = gaussian_kappa(t_sigma) if gaussian_correction else 1.0
    shared = plan.channels, plan.set_units, eps, negative_slope
    paper = grad_mode == "paper"
    with torch.cuda.device_of(x):
        run.measure_gradient[plan.grid](
            grad,
            x,
            other,
            dz,
            mean,
            var,
            lower,
            upper,
            weight,
            bias,
            partial,
            plan.slots,
            *shared,
            PAPER=paper,
            ACTIVATION=activation,
            OUTPUT=other is not None and activation in SIGN_TELLS,
            **plan.tiling,
        )
        run.settle_gradient[(plan.sets + plan.channels,)](
            weight,
            count,
            coefficients,
            d_weight,
            d_bias,
            partial,
            plan.slots,
            plan.sets,
            plan.samples,
            plan.channels,
            plan.set_units,
            plan.unit_slots,
            kappa,
            **plan.adding_up(max(plan.set_units, plan.samples) * plan.unit_slots),
        )
        if dz is not None:  # the first pass has undone the activation
            grad, other, activation = dz, None, "identity"
        run.input_gradient[plan.grid](
            grad,
            x,
            other,
            dx,
            mean,
            var,
            lower,
            upper,
            weight,
            bias,
            coefficients,
            plan.sets,
            *shared,
            PAPER=paper,
            ACTIVATION=activation,
            **plan.tiling,
        )
    return dx, d_weight, d_bias, dz


class _Measured(NamedTuple):
    """What the first pass over a batch leaves for the second."""

    shift: Tensor
    partial: Tensor


def measure(x: Tensor) -> tuple[Tensor, Tensor, _Measured]:
    """As :func:`fbn_plugin.ops.reference.measure`, for what :func:`refuses` does not refuse."""
    plan = _plan(x, 0)
    shift = x.new_empty(plan.sets, dtype=torch.float32)
    partial = x.new_empty((5, plan.slots), dtype=torch.float32)
    rows = plan.set_size // plan.set_width
    with torch.cuda.device_of(x):
        load_kernels().measure[plan.grid](
            x, shift, partial, plan.slots, plan.channels, plan.set_units, rows, plan.set_width, **plan.tiling
        )
    measured = _Measured(shift, partial)
    mean, var, _ = _settled(x, plan, measured)
    return mean, var, measured


def measure_kept(x: Tensor, lower: Tensor, upper: Tensor, measured: _Measured) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fbn_plugin.ops.reference.measure_kept`, once for what :func:`measure` has measured."""
    plan, (shift, partial) = _plan(x, 0), measured
    with torch.cuda.device_of(x):
        load_kernels().measure_kept[plan.grid](
            x, shift, lower, upper, partial, plan.slots, plan.channels, plan.set_units, **plan.tiling
        )
    return _settled(x, plan, measured)


def _settled(x: Tensor, plan: _Plan, measured: _Measured) -> tuple[Tensor, Tensor, Tensor]:
    mean, var, count = (torch.empty_like(measured.shift) for _ in range(3))
    slots = plan.set_units * plan.unit_slots
    with torch.cuda.device_of(x):
        load_kernels().settle[(plan.sets,)](
            measured.shift,
            mean,
            var,
            count,
            measured.partial,
            plan.slots,
            slots,
            plan.set_size,
            1.0,
            **plan.adding_up(slots),
        )
    return mean, var, count


def gradient_sums(grad: Tensor, x: Tensor, moments: Tensor, eps: float, grad_mode: str) -> tuple[Tensor, Tensor]:
    """As :func:`fbn_plugin.ops.reference.gradient_sums`, for what :func:`refuses` does not refuse."""
    plan = _plan(x, 0)
    mean, var, lower, upper, count = moments
    d_weight, d_bias = (torch.empty_like(mean) for _ in range(2))
    partial = x.new_empty((2, plan.slots), dtype=torch.float32)
    coefficients = x.new_empty((2, plan.sets), dtype=torch.float32)  # of a batch that is here as a whole
    with torch.cuda.device_of(x):
        load_kernels().measure_gradient[plan.grid](
            _like(x, grad),
            x,
            None,
            None,
            mean,
            var,
            lower,
            upper,
            None,
            None,
            partial,
            plan.slots,
            plan.channels,
            plan.set_units,
            eps,
            0.0,
            PAPER=grad_mode == "paper",
            ACTIVATION="identity",
            OUTPUT=False,
            **plan.tiling,
        )
        load_kernels().settle_gradient[(plan.sets + plan.channels,)](
            None,
            count,
            coefficients,
            d_weight,
            d_bias,
            partial,
            plan.slots,
            plan.sets,
            plan.samples,
            plan.channels,
            plan.set_units,
            plan.unit_slots,
            1.0,
            **plan.adding_up(max(plan.set_units, plan.samples) * plan.unit_slots),
        )
    return d_weight, d_bias


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
    mean, var, lower, upper, _ = moments
    with torch.cuda.device_of(x):
        load_kernels().input_gradient[plan.grid](
            _like(x, grad),
            x,
            None,
            dx,
            mean,
            var,
            lower,
            upper,
            _dense(weight),
            None,
            torch.stack((mean_g, mean_g_xhat)).to(mean.dtype),
            plan.sets,
            plan.channels,
            plan.set_units,
            eps,
            0.0,
            PAPER=grad_mode == "paper",
            ACTIVATION="identity",
            **plan.tiling,
        )
    return dx


def update_running_stats(running: RunningStats, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """As :func:`fbn_plugin.ops.reference.update_running_stats`, in one kernel where the momentum is a number."""
    running_mean, running_var, momentum, num_batches = running
    if momentum is None:
        return reference.update_running_stats(running, mean, var, count)
    if num_batches is not None:
        num_batches.add_(1)
    block, channels = 256, mean.numel()
    with torch.cuda.device_of(mean):
        load_kernels().update_running[(-(-channels // block),)](
            running_mean, running_var, mean, var, count, momentum, channels, BLOCK=block
        )
    torch.autograd.graph.increment_version((running_mean, running_var))


def describe() -> str:
    """What the kernels are, or why there are none."""
    reason = missing()
    if reason is not None:
        return reason
    if interpreted():
        return f"Triton {version()} kernels in its interpreter, on the CPU"
    return f"Triton {version()} kernels" if torch.cuda.is_available() else "there is no GPU"


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: RunningStats | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """As :meth:`fbn_plugin.ops.dispatch.Backend.forward`."""
    num_groups, t_sigma, eps, gaussian_correction, _, activation, negative_slope = options
    moments = filtered_moments(x, num_groups, t_sigma, eps, gaussian_correction)
    y = normalize(x, weight, bias, moments, num_groups, eps, residual, activation, negative_slope)
    if running is not None:
        update_running_stats(running, moments.mean, moments.var, moments.count)
    return y, torch.stack(moments)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    other: Tensor | None,
    moments: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As :meth:`fbn_plugin.ops.dispatch.Backend.backward`."""
    return filtered_norm_act_backward(grad, x, weight, bias, other, FilteredMoments(*moments), *options)
