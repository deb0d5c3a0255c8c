"""What users call: filtered batch and group normalization as functions of tensors, and the checks of their arguments.

Source: Horváth and Al-afandi, "Filtered Batch Normalization" (2020).
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fbn_plugin.ops import derivatives, dispatch, eager, library, plain, reference
from fbn_plugin.ops.checks import (
    check_activation,
    check_batch,
    check_channels,
    check_eps,
    check_eps_of_moments,
    check_filter,
    check_groups,
)
from fbn_plugin.ops.reference import Options, RunningStats


def _options(
    by_moments: bool,
    num_groups: int,
    t_sigma: float,
    eps: float,
    gaussian_correction: bool,
    grad_mode: str,
    activation: str = "identity",
    negative_slope: float = 0.0,
) -> Options:
    """The options, checked; ``by_moments`` is whether the input is divided by its own deviation."""
    check_activation(activation, negative_slope)
    t_sigma = check_filter(t_sigma, grad_mode)
    eps = check_eps_of_moments(eps) if by_moments else check_eps(eps)
    return Options(num_groups, t_sigma, eps, gaussian_correction, grad_mode, activation, float(negative_slope))


_remembered = functools.lru_cache(maxsize=1024)(_options)  # a model's layers ask for the same ones at every step


def _checked(*options) -> Options:
    """As :func:`_options`; what has been found right is remembered, but by no compiler, whose numbers may be symbols,
    and not if there is something among them that cannot be."""
    if torch.compiler.is_compiling():
        return _options(*options)
    try:
        return _remembered(*options)
    except TypeError:
        return _options(*options)


def _normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: RunningStats | None,
    options: Options,
) -> Tensor:
    """Normalize and update the running statistics, by the shortest way that there is."""
    if not torch.compiler.is_compiling():
        if running is None:
            short = eager.takes(x, weight, bias, residual)
        else:
            short = eager.takes(x, weight, bias, residual, running[0], running[1], running[3])
        if short:
            return eager.normalize(x, weight, bias, residual, running, options)
    if not eager.needs_formula(x, weight, bias, residual):
        return library.normalize(x, weight, bias, residual, running, options)[0]
    y, (mean, var, _, _, count) = derivatives.formula(x, weight, bias, residual, options)
    if running is not None:
        eager.update_running_stats(running, mean, var, count)
    return y


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float | None,
    num_batches: Tensor | None,
    residual: Tensor | None,
    options: Options,
) -> Tensor:
    if running_mean is not None and running_mean.requires_grad:
        raise ValueError(
            "running_mean wants a gradient, so it is no running mean: the order is that of F.batch_norm, running_mean "
            "and running_var before weight and bias"
        )
    if not training:
        y = F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, options.eps)
        return _activate(y, residual, options)
    y = eager.hosted(x, weight, bias, residual, running_mean, running_var, momentum, num_batches, options)
    if y is not None:
        return y
    if options.t_sigma == math.inf or x.numel() == 0:
        y = plain.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, options.eps, num_batches)
        return _activate(y, residual, options)
    check_batch(x, weight, bias, running_mean, running_var)
    running = None
    if running_mean is not None and running_var is not None:
        if num_batches is None and momentum is None:
            momentum = 0.0
        running = RunningStats(running_mean, running_var, momentum, num_batches)
    elif num_batches is not None:
        num_batches.add_(1)
    if (residual is None and options.activation == "identity") or _fuses(x, residual, options.activation):
        return _normalize(x, weight, bias, residual, running, options)
    num_groups, t_sigma, eps, gaussian_correction, grad_mode, _, _ = options  # PyTorch 2.6 compiles no slice of it
    alone = Options(num_groups, t_sigma, eps, gaussian_correction, grad_mode)
    return _activate(_normalize(x, weight, bias, None, running, alone), residual, options)


def _fuses(x: Tensor, residual: Tensor | None, activation: str) -> bool:
    """Whether residual and activation are computed along with the norm. On a CPU they are PyTorch's own, which knows
    the derivative from the output, or, in a compiled graph, of what comes before and after."""
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        return False
    return x.is_cuda or (not torch.compiler.is_compiling() and dispatch.fuses(x, activation))


def _activate(y: Tensor, residual: Tensor | None, options: Options) -> Tensor:
    return reference.activate(y if residual is None else y + residual, options.activation, options.negative_slope)


def filtered_batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    t_sigma: float = 5.0,
    grad_mode: str = "exact",
    gaussian_correction: bool = False,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """Filtered batch normalization (Horváth and Al-afandi 2020, Eq. 2-8), with the arguments of ``F.batch_norm`` in
    their order.

    In training the mean and variance of a channel are computed a second time, without the values further than
    ``t_sigma`` deviations from the first mean; every value is normalized by them. In evaluation it is ``F.batch_norm``,
    to the bit and to the node in an exported graph.

    Args:
        x: ``(N, C, *spatial)`` of any floating dtype; statistics are float32, or float64 for float64.
        running_mean, running_var: ``(C,)``, or None; updated in place in training, used in evaluation. They become
            averages of the filtered mean and of the unbiased filtered variance ``var * M / (M - 1)``, ``M`` the number
            of kept values. A channel whose batch holds a NaN or an infinity gives NaN, as in batch normalization, but
            leaves its running statistics as they were.
        weight, bias: ``(C,)`` scale and shift, or None.
        training: use the batch's moments.
        momentum: weight of the new batch in the running statistics; None is a cumulative average by
            ``num_batches_tracked``, or, without that, leaves them as they are.
        eps: added to the variance, in the band's width (Eq. 3) and in the divisor (Eq. 7).
        t_sigma: cut in deviations, above 1; ``inf`` is plain batch normalization.
        grad_mode: ``"exact"``, the gradient of the forward pass with the mask held constant, or ``"paper"``, Eq. 9-13
            as printed.
        gaussian_correction: divide the filtered variance by the variance of a unit Gaussian cut at ``t_sigma``, so that
            the filter leaves a clean Gaussian as it is.
        num_batches_tracked: ``()``, int64; counted up in training, or None.

    Returns:
        Tensor like ``x``.

    Raises:
        ValueError: an option out of range, one value per channel in training, a channel count that does not fit, or
        running statistics that want a gradient, which weight and bias in their place would.

    Examples::

        >>> x = torch.randn(4, 8, 16, 16)
        >>> x[0, 0, 0, 0] = 1000.0  # one huge activation
        >>> y = fbn_plugin.ops.filtered_batch_norm(x, training=True, t_sigma=5.0)
        >>> y[1:, 0].std().item() > 0.9  # the others are normalized as if it were not there
        True
        >>> torch.nn.functional.batch_norm(x, None, None, training=True)[1:, 0].std().item() < 0.1
        True
    """
    options = _checked(training, 0, t_sigma, eps, gaussian_correction, grad_mode)
    running = running_mean, running_var
    return _batch_norm(x, weight, bias, *running, training, momentum, num_batches_tracked, None, options)


def filtered_batch_statistics(
    x: Tensor, eps: float = 1e-5, *, t_sigma: float = 5.0, gaussian_correction: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`filtered_batch_norm` normalizes ``x`` by in training, without a gradient.

    Args:
        x: ``(N, C, *spatial)``, not empty.
        eps, t_sigma, gaussian_correction: as in :func:`filtered_batch_norm`.

    Returns:
        Mean, biased variance and number of the values that the filter keeps, ``(C,)`` each, float32, or float64 for
        float64.
    """
    options = _checked(False, 0, t_sigma, eps, gaussian_correction, "exact")
    mean, var, _, _, count = library.normalize(x.detach(), None, None, None, None, options)[1]
    return mean, var, count


def filtered_share(x: Tensor, num_groups: int = 0, eps: float = 1e-5, *, t_sigma: float = 5.0) -> Tensor:
    """The share of the values of ``x`` that the filter leaves out, without a gradient.

    Args:
        x: ``(N, C, *spatial)``, not empty.
        num_groups: as in :func:`filtered_group_norm`; 0 is the batch form.
        eps, t_sigma: as in :func:`filtered_batch_norm`.

    Returns:
        A scalar, 0 to 1; NaN where a normalized set has a NaN or an infinity.
    """
    options = _checked(False, num_groups, t_sigma, eps, False, "exact")
    *_, count = library.normalize(x.detach(), None, None, None, None, options)[1]
    return (x.numel() - count.double().sum()) / x.numel()


def filtered_batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    t_sigma: float = 5.0,
    grad_mode: str = "exact",
    gaussian_correction: bool = False,
    activation: str = "relu",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """``activation(filtered_batch_norm(x) + residual)``, on a GPU in one pass over memory less for each.

    The value before the activation is not stored: the backward pass computes it again, or, with a residual, reads its
    sign from the output. The kernels for GPUs round once, at the end. On a CPU, in evaluation, and where the residual
    is not like ``x``, the three steps are taken one by one.

    Args:
        x, running_mean, running_var, weight, bias, training, momentum, eps, t_sigma, grad_mode, gaussian_correction:
            as in :func:`filtered_batch_norm`.
        activation: ``"relu"``, ``"leaky_relu"``, ``"silu"`` or ``"identity"``.
        negative_slope: of ``"leaky_relu"``, not below 0.
        residual: added before the activation; like ``x``, or anything that can be added to it.
        num_batches_tracked: as in :func:`filtered_batch_norm`.

    Returns:
        Tensor like ``x``.

    Raises:
        ValueError: as :func:`filtered_batch_norm`; an unknown activation or a negative slope.

    Examples::

        >>> x, shortcut = torch.randn(4, 8, 16, 16), torch.randn(4, 8, 16, 16)
        >>> y = fbn_plugin.ops.filtered_batch_norm_act(x, training=True, t_sigma=5.0, residual=shortcut)
        >>> y.min().item()
        0.0
    """
    options = _checked(training, 0, t_sigma, eps, gaussian_correction, grad_mode, activation, negative_slope)
    running = running_mean, running_var
    return _batch_norm(x, weight, bias, *running, training, momentum, num_batches_tracked, residual, options)


def filtered_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    t_sigma: float = 5.0,
    grad_mode: str = "exact",
    gaussian_correction: bool = False,
) -> Tensor:
    """Filtered group normalization: the filter of Eq. 4-8 on the values of each sample's group (Horváth and Al-afandi
    2020, section IV-D), with the arguments of ``F.group_norm`` in their order.

    There are no running statistics: training and evaluation are the same.

    Args:
        x: ``(N, C, *spatial)`` of any floating dtype, ``C`` divisible by ``num_groups``.
        num_groups: 1 is layer normalization over a whole sample, ``C`` is instance normalization.
        weight, bias: ``(C,)`` or None.
        eps, t_sigma, grad_mode, gaussian_correction: as in :func:`filtered_batch_norm`.

    Returns:
        Tensor like ``x``.

    Raises:
        ValueError: an option out of range, a single value in all, or groups that do not divide the
        channels.

    Examples::

        >>> x = torch.randn(1, 8, 16, 16)
        >>> y = fbn_plugin.ops.filtered_group_norm(x, 4, t_sigma=4.0)
        >>> torch.allclose(fbn_plugin.ops.filtered_group_norm(x, 4, t_sigma=torch.inf), nn.functional.group_norm(x, 4))
        True
    """
    options = _checked(True, num_groups, t_sigma, eps, gaussian_correction, grad_mode)
    y = eager.hosted(x, weight, bias, None, None, None, None, None, options) if num_groups else None
    if y is not None:
        return y
    check_channels(x, weight, bias)
    check_groups(num_groups, x.shape[1])
    if x.numel() == 0:  # of which PyTorch refuses maps of height or width 0
        return plain.without_values(x, [weight, bias])
    if options.t_sigma == math.inf:
        return F.group_norm(x, num_groups, weight, bias, eps)
    if x.numel() == num_groups:
        raise ValueError(f"Expected more than 1 value per group, got input size {x.shape} for {num_groups} groups")
    return _normalize(x, weight, bias, None, None, options)
