"""Checks of arguments that all the public functions share; a room of their own, as the operators, which the public
functions are built on, make them too."""

import math
import numbers
import sys

import torch
from torch import Tensor

from fbn_plugin.ops.plain import check_training_eps
from fbn_plugin.ops.reference import ACTIVATIONS

GRAD_MODES = ("exact", "paper")
_LARGEST = sys.float_info.max  # looked up here, as the compiler of PyTorch 2.6 cannot see into sys


def check_filter(t_sigma: float, grad_mode: str = "exact") -> float:
    """Return ``t_sigma`` as a float; ValueError if a filter option has no meaning.

    The cut must lie above one deviation: only then does Chebyshev's inequality promise that at least one value is kept.
    """
    if isinstance(t_sigma, bool) or not isinstance(t_sigma, numbers.Real) or not t_sigma > 1:
        raise ValueError(f"t_sigma must be a number greater than 1 (inf filters nothing), got {t_sigma!r}")
    if grad_mode not in GRAD_MODES:
        raise ValueError(f"grad_mode must be one of {', '.join(map(repr, GRAD_MODES))}, got {grad_mode!r}")
    return float(min(t_sigma, _LARGEST)) if t_sigma != math.inf else math.inf


def check_eps(eps: float) -> float:
    """Return ``eps``; ValueError if it is no number in [0, 1).

    What is added to a variance is tiny. A cut or a scale that stands where ``eps`` belongs is caught here.
    """
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real) or not 0 <= eps < 1:
        raise ValueError(
            f"eps must be a number in [0, 1), got {eps!r}: arguments have PyTorch's order, and what PyTorch has not, "
            "such as t_sigma or gamma_init, is passed by name"
        )
    return eps


def check_eps_of_moments(eps: float) -> float:
    """As :func:`check_eps`, and as :func:`fbn_plugin.ops.plain.check_training_eps`."""
    check_training_eps(check_eps(eps))
    return eps


def check_groups(num_groups: int, num_channels: int) -> None:
    """ValueError unless the channels fall into that many equal groups."""
    if num_groups < 1 or num_channels % num_groups:
        raise ValueError(
            f"num_groups must divide the number of channels, got {num_groups} groups for {num_channels} channels"
        )


def check_device(device: str | int | torch.device | None) -> None:
    """ValueError if ``device`` is none: it stands where a cut may be given that belongs by name."""
    number = isinstance(device, int) and not 0 <= device < torch.accelerator.device_count()
    if number or isinstance(device, bool) or not isinstance(device, str | int | torch.device | None):
        raise ValueError(
            f"device must be a torch.device, its name, the number of one that is there, or None, got {device!r}: what "
            "PyTorch's layer has not, such as t_sigma, is given by name"
        )


def check_activation(activation: str, negative_slope: float) -> None:
    """ValueError if the activation is none that :func:`fbn_plugin.ops.filtered_batch_norm_act` knows."""
    if activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation must be one of {known}, got {activation!r}")
    if not negative_slope >= 0:
        raise ValueError(f"negative_slope must not be below 0, got {negative_slope!r}")


def check_channels(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    **others: Tensor | None,
) -> None:
    """ValueError if ``x`` is not floating point of shape ``(N, C, ...)``, or a tensor does not fit C or the device."""
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"the input must be floating point of shape (N, C, ...), got {x.dtype} of {tuple(x.shape)}")
    channels, device = x.shape[1], x.device
    for tensor in (weight, bias, running_mean, running_var, *others.values()):
        if tensor is not None and (tensor.numel() != channels or tensor.device != device):
            break
    else:
        return
    named = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var, **others}
    for name, tensor in named.items():
        if tensor is not None and tensor.numel() != channels:
            shape = f"the second dimension of {tuple(x.shape)}"
            raise ValueError(f"{name} has {tensor.numel()} elements, but the input has {channels} channels, {shape}")
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, but the input is on {device}")


def check_batch(x: Tensor, *per_channel: Tensor | None, **others: Tensor | None) -> None:
    """As :func:`check_channels`; ValueError, too, if a channel has one value only."""
    check_channels(x, *per_channel, **others)
    if x.numel() == x.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
