"""The values inside a norm: normalized, and not yet scaled and shifted. Horváth and Al-afandi, "Filtered Batch
Normalization" (2020), section II-B, measures a network there, "before parameters gamma and beta were applied".
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from fbn_plugin.layers.description import describe, describe_type, has_known_forward, tells_moments
from fbn_plugin.ops.reference import accumulate_dtype

__all__ = ["BATCH", "RUNNING", "SAMPLE", "channel_dim", "moments_taken", "normalized"]

RUNNING = "running statistics"
BATCH = "moments of the batch"
SAMPLE = "moments of the sample"

_SAMPLE_FAMILIES = ("GN", "LN", "IN", "FRN", "LearnedNorm")
_LAST = describe_type(nn.LayerNorm)


def moments_taken(norm: nn.Module) -> str | None:
    """By which moments a module normalizes in the mode that it is in: ``RUNNING``, ``BATCH`` or ``SAMPLE``; None for
    what is no norm, or one of which nothing is known."""
    description = describe(norm)
    if isinstance(norm, nn.RMSNorm):
        return SAMPLE
    if description is None or description.family is None:
        return None
    if description.family == "FrozenBN":
        return RUNNING
    if isinstance(norm, _BatchNorm):
        if norm.running_mean is not None and not norm.training:
            return RUNNING if has_known_forward(type(norm)) else None
        return BATCH if tells_moments(type(norm)) else None
    if isinstance(norm, _InstanceNorm) and norm.track_running_stats and not norm.training:
        return RUNNING
    return SAMPLE if description.family in _SAMPLE_FAMILIES and has_known_forward(type(norm)) else None


def normalized(norm: nn.Module, x: Tensor) -> Tensor:
    """What a norm makes of its input before its scale and shift, in at least float32 and with the input's shape.

    Neither threshold nor activation that the norm may hold is applied, nor the gate of RBN and IEBN. Nothing in the
    norm changes. In training the moments are those that it takes then: of FBN the filtered ones, of ConvNorm with the
    weighted mean, of a synchronized norm those of all processes, which all have to call this.

    Args:
        norm: one that :func:`moments_taken` knows.
        x: its input.

    Raises:
        ValueError: nothing is known of the norm.

    Examples::

        >>> norm = torch.nn.BatchNorm2d(8).eval()
        >>> x = torch.randn(2, 8, 4, 4)
        >>> torch.allclose(normalized(norm, x), x / (1 + norm.eps) ** 0.5)
        True
    """
    taken = moments_taken(norm)
    if taken is None:
        raise ValueError(f"of a {type(norm).__name__} it is not known by what it normalizes")
    with torch.no_grad():
        x = x.to(accumulate_dtype(x.dtype))
        if taken == SAMPLE or (taken == BATCH and _is_one_of_many(norm)):
            return _without_scale(norm, x)
        mean, var = (norm.running_mean, norm.running_var) if taken == RUNNING else _moments_of_batch(norm, x)
        deviation = (var.to(x.dtype) + getattr(norm, "eps", 1e-5)).sqrt()
        # A norm with moments of each place of a map has them in the order of the map.
        shape = (-1, *(1,) * (x.dim() - 2)) if mean.numel() == x.shape[1] else x.shape[1:]
        return (x - mean.to(x.dtype).view(shape)) / deviation.view(shape)


def _moments_of_batch(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    if hasattr(norm, "batch_statistics"):
        return norm.batch_statistics(x)[:2]
    var, mean = torch.var_mean(x, dim=(0, *range(2, x.dim())), correction=0)
    return mean, var


def _is_one_of_many(norm: nn.Module) -> bool:
    """Whether a norm's moments are those of several processes now."""
    if not (norm.training and describe(norm).synchronized and dist.is_available() and dist.is_initialized()):
        return False
    return dist.get_world_size(getattr(norm, "process_group", None)) > 1


def _without_scale(norm: nn.Module, x: Tensor) -> Tensor:
    """The forward pass of a norm whose scale is 1 and whose shift is 0, without threshold and activation."""
    bare, description = copy.copy(norm), describe(norm)
    neutral = {"weight": torch.ones_like, "bias": torch.zeros_like, "tau": lambda threshold: None}
    bare._parameters = {
        name: neutral[name](value.detach()) if value is not None and name in neutral else value
        for name, value in norm._parameters.items()
    }
    # What is counted or averaged there is so in copies.
    bare._buffers = {name: value if value is None else value.clone() for name, value in norm._buffers.items()}
    if description is None or not description.owns_children:
        bare._modules = {name: nn.Identity() for name in norm._modules}
    return type(norm).forward(bare, x)


def channel_dim(layer: nn.Module, values: Tensor) -> int:
    """The dimension whose index is the channel, or unit, of what a layer takes or gives: the last one of dense layers
    and of PyTorch's layer norms, of convolutions the one before the map, else the second one."""
    if isinstance(layer, nn.Linear | nn.RMSNorm) or describe(layer) is _LAST or values.dim() == 1:
        return values.dim() - 1
    if isinstance(layer, _ConvNd):
        return values.dim() - 1 - len(layer.kernel_size)
    return 1
