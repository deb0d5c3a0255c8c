"""Filtered batch and group normalization for TorchScript: what :mod:`fbn_plugin.ops.functional` computes, in PyTorch's
own operators and in the part of Python that TorchScript compiles.

A scripted or traced model so needs nothing of this package to be loaded and run, by C++ either. The layers call these
functions where they are compiled; tracing takes them for their operators, too. Options are taken as they are: a layer
has checked its own. Source: Horváth and Al-afandi, "Filtered Batch Normalization" (2020), Eq. 2-13.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from fbn_plugin.ops import plain, reference
from fbn_plugin.ops.reference import Options, RunningStats, update_running_stats


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    num_batches: Tensor | None,
    residual: Tensor | None,
    options: Options,
) -> Tensor:
    """:func:`fbn_plugin.ops.filtered_batch_norm_act`.

    Raises:
        ValueError: one value per channel in training.
    """
    num_groups, t_sigma, eps, gaussian_correction, grad_mode, activation, negative_slope = options
    if not training or t_sigma == math.inf or x.numel() == 0:
        y = plain.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps, num_batches)
    else:
        plain.check_training_eps(eps)
        if x.numel() == x.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
        alone = Options(num_groups, t_sigma, eps, gaussian_correction, grad_mode, "identity", 0.0)
        y, moments = reference.formula(x, weight, bias, None, alone)
        if running_mean is not None and running_var is not None:
            running = RunningStats(running_mean, running_var, momentum, num_batches)
            update_running_stats(running, moments.mean.detach(), moments.var.detach(), moments.count)
        elif num_batches is not None:
            num_batches.add_(1)
    return reference.activate(y if residual is None else y + residual, activation, negative_slope)


def group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options) -> Tensor:
    """:func:`fbn_plugin.ops.filtered_group_norm`.

    Raises:
        ValueError: a channel count that does not fit, or a single value in all.
    """
    groups = options.num_groups
    if x.dim() < 2 or x.shape[1] % groups != 0:
        raise ValueError(f"num_groups must divide the number of channels, got {groups} groups for {x.shape}")
    if x.numel() == 0:
        return plain.without_values(x, [weight, bias])
    if options.t_sigma == math.inf:
        return F.group_norm(x, groups, weight, bias, options.eps)
    if x.numel() == groups:
        raise ValueError(f"Expected more than 1 value per group, got input size {x.shape} for {groups} groups")
    return reference.formula(x, weight, bias, None, options)[0]
