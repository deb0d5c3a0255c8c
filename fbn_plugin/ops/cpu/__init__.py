"""The C++ kernels (``kernels.cpp``) on PyTorch tensors: float32 and bfloat16, contiguous and channels-last, batch and
group form.

The library is built with the package if there is a C++ compiler, knows nothing of PyTorch, and is called on raw
pointers.
"""

import ctypes
import functools
import importlib.machinery
from ctypes import POINTER, Structure, c_char_p, c_double, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from fbn_plugin.ops.reference import FilteredMoments, gaussian_kappa


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
    kernels.fbn_forward.argtypes = [*common, *[c_void_p] * 2, c_double]
    kernels.fbn_backward.argtypes = [*common, *[c_void_p] * 2]
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


def takes_statistic(running: Tensor) -> bool:
    """Whether :func:`forward` can update this running statistic."""
    return running.dtype is torch.float32 and running.is_contiguous() and running.device.type == "cpu"


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


@functools.lru_cache(maxsize=1024)  # a model's layers ask for the same ones at every step
def _structures(
    shape: torch.Size, num_groups: int, t_sigma: float, eps: float, gaussian_correction: bool, *flags: bool
):
    kappa = gaussian_kappa(t_sigma) if gaussian_correction else 1.0
    return _Shape(shape[0], shape[1], shape[2:].numel(), num_groups), _Options(t_sigma, eps, kappa, *flags)


def _arguments(x: Tensor, num_groups: int, t_sigma: float, eps: float, gaussian_correction: bool, grad_mode: str):
    flags = _layout(x), x.dtype is torch.bfloat16, grad_mode == "paper", torch.get_num_threads()
    return _structures(x.shape, num_groups, t_sigma, eps, gaussian_correction, *flags)


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous().float()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    num_groups: int,
    t_sigma: float,
    eps: float,
    gaussian_correction: bool,
) -> tuple[Tensor, Tensor]:
    """Normalize ``x`` and update the running statistics, if there are any: contiguous and float32.

    Returns:
        ``y``, and the five :class:`FilteredMoments` as one tensor, ``(5, C)`` or ``(5, N, G)``.
    """
    shape, options = _arguments(x, num_groups, t_sigma, eps, gaussian_correction, "exact")
    y, weight, bias = torch.empty_like(x), _float(weight), _float(bias)
    moments = x.new_empty((5, shape.c) if num_groups == 0 else (5, shape.n, num_groups), dtype=torch.float32)
    arrays = map(_pointer, (x, y, weight, bias, moments, running_mean, running_var))
    library().fbn_forward(shape, options, *arrays, momentum)
    if running_mean is not None:
        torch.autograd.graph.increment_version((running_mean, running_var))
    return y, moments


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    moments: Tensor,
    num_groups: int,
    t_sigma: float,
    eps: float,
    gaussian_correction: bool,
    grad_mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fbn_plugin.ops.reference.filtered_norm_backward`, with the moments of :func:`forward`."""
    shape, options = _arguments(x, num_groups, t_sigma, eps, gaussian_correction, grad_mode)
    grad, weight, moments, dx = _like(x, grad), _float(weight), _float(moments), torch.empty_like(x)
    d_weight, d_bias = (x.new_empty(shape.c, dtype=torch.float32) for _ in range(2))
    library().fbn_backward(shape, options, *map(_pointer, (grad, x, dx, weight, moments, d_weight, d_bias)))
    return dx, d_weight, d_bias


def filtered_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *options: float | bool
) -> tuple[Tensor, FilteredMoments]:
    """As :func:`fbn_plugin.ops.reference.filtered_norm`, for what :func:`refuses` does not refuse."""
    y, moments = forward(x, weight, bias, None, None, 0.0, *options)
    return y, FilteredMoments(*(each.clone() for each in moments))  # an operator's outputs share no memory


def filtered_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, moments: FilteredMoments, *options: float | bool | str
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fbn_plugin.ops.reference.filtered_norm_backward`, for what :func:`refuses` does not refuse."""
    return backward(grad, x, weight, torch.stack(moments), *options)
