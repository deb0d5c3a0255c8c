"""The C++ kernels (``cpu.cpp``) on PyTorch tensors: float32 and bfloat16, contiguous and channels-last, batch and group
form.

The library is built with the package if there is a C++ compiler, knows nothing of PyTorch, and is called on raw
pointers.
"""

import ctypes
import functools
import importlib.machinery
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from fbn_plugin.ops.reference import FilteredMoments, gaussian_kappa


class _Shape(Structure):
    _fields_ = [(name, c_int64) for name in ("n", "c", "s", "groups")]


class _Options(Structure):
    _fields_ = [(name, c_double) for name in ("t_sigma", "eps", "kappa")]
    _fields_ += [(name, c_int32) for name in ("channels_last", "bfloat16", "paper", "threads")]


class _Moments(Structure):
    _fields_ = [(name, c_void_p) for name in FilteredMoments._fields]


@functools.cache
def library() -> ctypes.CDLL | str:
    """The loaded kernels, or the reason why there are none."""
    files = [Path(__file__).with_name(f"_cpu{suffix}") for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    found = next((file for file in files if file.exists()), None)
    if found is None:
        return "the C++ kernels were not built when the package was installed: no compiler, or it failed"
    try:
        kernels = ctypes.CDLL(str(found))
    except OSError as error:
        return f"the C++ kernels cannot be loaded: {error}"
    kernels.fbn_instruction_set.restype = c_char_p
    kernels.fbn_forward.restype = kernels.fbn_backward.restype = None
    common = [POINTER(_Shape), POINTER(_Options), *[c_void_p] * 4, POINTER(_Moments)]
    kernels.fbn_forward.argtypes = common
    kernels.fbn_backward.argtypes = [*common, *[c_void_p] * 3]
    return kernels


def refuses(x: Tensor) -> str | None:
    """Why these kernels do not take ``x``; None if they do."""
    if x.device.type != "cpu":
        return f"the tensor is on {x.device.type}"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"{x.dtype} is not float32 or bfloat16"
    if _layout(x) is None:
        return "the tensor is neither contiguous nor channels-last"
    kernels = library()
    return kernels if isinstance(kernels, str) else None


def _layout(x: Tensor) -> bool | None:
    """True for channels-last, False for contiguous, None for anything else."""
    if x.is_contiguous():
        # (N, C) and (N, C, 1, 1) are rows of channels too, and are better read as such.
        return x.shape[2:].numel() == 1
    return True if x.movedim(1, -1).is_contiguous() else None


def _like(x: Tensor, other: Tensor) -> Tensor:
    """``other`` in the layout of ``x``."""
    if other.stride() == x.stride() and other.dtype == x.dtype:
        return other
    return torch.empty_like(x).copy_(other)


def _arguments(x: Tensor, num_groups: int, t_sigma: float, eps: float, gaussian_correction: bool, grad_mode: str):
    kappa = gaussian_kappa(t_sigma) if gaussian_correction else 1.0
    shape = _Shape(x.shape[0], x.shape[1], x.shape[2:].numel(), num_groups)
    flags = _layout(x), x.dtype is torch.bfloat16, grad_mode == "paper", torch.get_num_threads()
    return byref(shape), byref(_Options(t_sigma, eps, kappa, *flags))


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous().float()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def filtered_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    t_sigma: float,
    eps: float,
    gaussian_correction: bool,
) -> tuple[Tensor, FilteredMoments]:
    """As :func:`fbn_plugin.ops.reference.filtered_norm`, for what :func:`refuses` does not refuse."""
    shape, options = _arguments(x, num_groups, t_sigma, eps, gaussian_correction, "exact")
    stats = x.shape[1:2] if num_groups == 0 else (x.shape[0], num_groups)
    moments = FilteredMoments(*(torch.empty(stats, dtype=torch.float32) for _ in range(5)))
    y, weight, bias = torch.empty_like(x), _float(weight), _float(bias)
    pointers = _Moments(*map(_pointer, moments))
    library().fbn_forward(shape, options, x.data_ptr(), y.data_ptr(), _pointer(weight), _pointer(bias), byref(pointers))
    return y, moments


def filtered_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    moments: FilteredMoments,
    num_groups: int,
    t_sigma: float,
    eps: float,
    gaussian_correction: bool,
    grad_mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fbn_plugin.ops.reference.filtered_norm_backward`, for what :func:`refuses` does not refuse."""
    shape, options = _arguments(x, num_groups, t_sigma, eps, gaussian_correction, grad_mode)
    grad, weight = _like(x, grad), _float(weight)
    dx = torch.empty_like(x)
    d_weight, d_bias = (torch.empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    scratch = torch.empty(2 * x.shape[0] * x.shape[1], dtype=torch.float64)
    pointers = _Moments(*map(_pointer, moments))
    arrays = map(_pointer, (grad, x, dx, weight))
    library().fbn_backward(shape, options, *arrays, byref(pointers), *map(_pointer, (d_weight, d_bias, scratch)))
    return dx, d_weight, d_bias
