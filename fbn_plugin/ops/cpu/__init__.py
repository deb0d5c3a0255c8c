"""The C++ kernels (``kernels.cpp``) on PyTorch tensors: float32 and bfloat16, contiguous and channels-last, batch and
group form.

The library is built with the package if there is a C++ compiler, knows nothing of PyTorch, and is called on raw
pointers.
"""

import ctypes
import functools
import importlib.machinery
import math
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from fbn_plugin.ops.reference import (
    SIGN_TELLS,
    Options,
    RunningStats,
    activate,
    gaussian_kappa,
    gradient_sums,
    input_gradient,
    measure,
    measure_kept,
    normalize,
    update_running_stats,
)

# The steps of a batch that is spread over processes are plain PyTorch.
__all__ = [
    "backward",
    "describe",
    "forward",
    "gradient_sums",
    "input_gradient",
    "measure",
    "measure_kept",
    "normalize",
    "refuses",
    "update_running_stats",
]


_DTYPES = (torch.float32, torch.bfloat16)


class _Shape(Structure):
    _fields_ = [(name, c_int64) for name in ("n", "c", "s", "groups")]


class _Options(Structure):
    _fields_ = [(name, c_double) for name in ("t_sigma", "eps", "kappa")]
    _fields_ += [(name, c_int32) for name in ("channels_last", "bfloat16", "paper", "threads")]


@functools.cache
def library() -> ctypes.CDLL | str:
    """The loaded kernels, or the reason why there are none."""
    files = [Path(__file__).with_name(f"_kernels{suffix}") for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    found = next((file for file in files if file.exists()), None)
    if found is None:
        return "the C++ kernels were not built when the package was installed: no compiler, or it failed"
    try:
        kernels = ctypes.CDLL(str(found))
    except OSError as error:
        return f"the C++ kernels cannot be loaded: {error}"
    kernels.fbn_instruction_set.restype = c_char_p
    kernels.fbn_forward.restype = kernels.fbn_backward.restype = None
    common = [POINTER(_Shape), POINTER(_Options), *[c_void_p] * 5]
    kernels.fbn_forward.argtypes = [*common, *[c_void_p] * 2, c_double, c_void_p]
    kernels.fbn_backward.argtypes = [*common, *[c_void_p] * 2]
    return kernels


def refuses(x: Tensor, num_groups: int = 0, activation: str = "identity") -> str | None:
    """Why these kernels do not take ``x``; None if they do."""
    if not x.is_cpu:
        return f"the tensor is on {x.device.type}"
    if x.dtype not in _DTYPES:
        return f"{x.dtype} is not float32 or bfloat16"
    if not x.is_contiguous() and not _is_channels_last(x):
        return "the tensor is neither contiguous nor channels-last"
    kernels = library()
    return kernels if isinstance(kernels, str) else None


def describe() -> str:
    """What the kernels are, or why there are none."""
    kernels = library()
    return kernels if isinstance(kernels, str) else f"C++ kernels for {kernels.fbn_instruction_set().decode()}"


def _is_channels_last(x: Tensor) -> bool:
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()


def _like(x: Tensor, other: Tensor) -> Tensor:
    """``other`` in the layout of ``x``."""
    if other.stride() == x.stride() and other.dtype == x.dtype:
        return other
    return torch.empty_like(x).copy_(other)


@functools.lru_cache(maxsize=1024)  # a model's layers ask for the same ones at every step
def _structures(shape: torch.Size, options: Options, contiguous: bool, dtype: torch.dtype, threads: int):
    n, c, spatial = shape[0], shape[1], shape[2:].numel()
    # (N, C) and (N, C, 1, 1) are rows of channels too, and are better read as such.
    flags = not contiguous or spatial == 1, dtype is torch.bfloat16, options.grad_mode == "paper", threads
    kappa = gaussian_kappa(options.t_sigma) if options.gaussian_correction else 1.0
    stats = (5, n, options.num_groups) if options.num_groups else (5, c)
    pointers = (
        byref(_Shape(n, c, spatial, options.num_groups)),
        byref(_Options(options.t_sigma, options.eps, kappa, *flags)),
    )
    return *pointers, c, stats


def _arguments(x: Tensor, options: Options) -> tuple:
    """Pointers to both structures, number of channels, and shape of the moments."""
    return _structures(x.shape, options, x.is_contiguous(), x.dtype, torch.get_num_threads())


def _float(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or (tensor.dtype is torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.contiguous().float()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: RunningStats | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """As :meth:`fbn_plugin.ops.dispatch.Backend.forward`; residual and activation are PyTorch's, one by one."""
    shape, structure, _, stats = _arguments(x, options)
    y, weight, bias = torch.empty_like(x), _float(weight), _float(bias)
    moments = x.new_empty(stats, dtype=torch.float32)
    mean = var = num_batches = None
    momentum = 0.0
    if running is not None:
        mean, var, momentum, num_batches = running
        momentum = math.nan if momentum is None else momentum
        torch.autograd.graph.increment_version((mean, var) if num_batches is None else (mean, var, num_batches))
    library().fbn_forward(
        shape,
        structure,
        x.data_ptr(),
        y.data_ptr(),
        _pointer(weight),
        _pointer(bias),
        moments.data_ptr(),
        _pointer(mean),
        _pointer(var),
        momentum,
        _pointer(num_batches),
    )
    if residual is not None:
        y.add_(residual)
    activation = options[5]
    return y if activation == "identity" else activate(y, activation, options[6]), moments


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    other: Tensor | None,
    moments: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As :meth:`fbn_plugin.ops.dispatch.Backend.backward`; the activation's gradient is PyTorch's."""
    if options[5] != "identity":
        grad = _activation_gradient(grad, x, weight, bias, other, moments, options)
    dz = None if other is None else grad
    shape, structure, channels, _ = _arguments(x, options)
    grad, weight, dx = _like(x, grad), _float(weight), torch.empty_like(x)
    d_weight, d_bias = moments.new_empty(channels), moments.new_empty(channels)
    library().fbn_backward(
        shape,
        structure,
        grad.data_ptr(),
        x.data_ptr(),
        dx.data_ptr(),
        _pointer(weight),
        moments.data_ptr(),
        d_weight.data_ptr(),
        d_bias.data_ptr(),
    )
    return dx, d_weight, d_bias, dz


def _activation_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    other: Tensor | None,
    moments: Tensor,
    options: Options,
) -> Tensor:
    """The gradient of the value before the activation, which is computed anew where no output tells its sign."""
    num_groups, _, eps, _, _, activation, negative_slope = options
    if other is not None and activation in SIGN_TELLS:
        z = other
    else:
        mean, scale = moments[0], torch.rsqrt(moments[1] + eps)
        if num_groups:
            mean, scale = (each.repeat_interleave(x.shape[1] // num_groups, 1) for each in (mean, scale))
        scale = scale if weight is None else scale * weight
        spatial = (1,) * (x.dim() - 2)
        z = (x - mean.view(*mean.shape, *spatial)).mul_(scale.view(*scale.shape, *spatial))
        if bias is not None:
            z.add_(bias.view(-1, *spatial))
        if other is not None:
            z.add_(other)
    wide = grad.to(z.dtype)
    if activation == "relu":
        dz = torch.ops.aten.threshold_backward(wide, z, 0)
    elif activation == "leaky_relu":
        dz = torch.ops.aten.leaky_relu_backward(wide, z, negative_slope, False)
    else:
        dz = torch.ops.aten.silu_backward(wide, z)
    return dz.to(x.dtype)
