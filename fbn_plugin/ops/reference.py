"""Filtered normalization in plain PyTorch: the arithmetic of Horváth and Al-afandi, "Filtered Batch Normalization"
(2020), Eq. 2-13.

Written to be read and to be right: it takes any floating dtype, device, layout and number of dimensions, is the oracle
that other backends are tested against, and the fallback where none of them applies. It has the functions of a backend
(:class:`fbn_plugin.ops.dispatch.Backend`), and the types that they share. Nothing here knows modules.

:func:`formula` is what is computed where no backend can be called: tracers and transforms look into it, and TorchScript
compiles it (:mod:`fbn_plugin.ops.scripted`), so that it is written in the part of Python that TorchScript knows.

Batch and group normalization differ only in which values share a mean and a deviation, so both are written as a
reduction over some dimensions of one view of the input:

======  =================================  ==============================  =====================
form    view of x                          reduced dimensions              one mean for each
======  =================================  ==============================  =====================
batch   ``(N, C, *spatial)``               ``N`` and ``spatial``           channel, ``(C,)``
group   ``(N, G, C / G, *spatial)``        ``C / G`` and ``spatial``       sample, group, ``(N, G)``
======  =================================  ==============================  =====================
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("identity", "relu", "leaky_relu", "silu")
# Those whose derivative is known from the sign of their output.
SIGN_TELLS = ("relu", "leaky_relu")


class Options(NamedTuple):
    """What a norm computes, the same in every call of a layer."""

    num_groups: int  # 0: the batch form; otherwise the groups of the group form
    t_sigma: float  # cut in deviations, above 1
    eps: float  # added to the variance, in the band's width and in the divisor
    gaussian_correction: bool  # divide the filtered variance by gaussian_kappa
    grad_mode: str  # "exact" or "paper"
    activation: str = "identity"  # one of ACTIVATIONS
    negative_slope: float = 0.0  # of "leaky_relu"


class RunningStats(NamedTuple):
    """What a batch's moments are averaged into, in place; batch form only."""

    mean: Tensor  # (C,)
    var: Tensor  # (C,), unbiased
    momentum: float | None  # weight of the new batch; None: one over the number of batches, this one included
    num_batches: Tensor | None  # (), int64, counted up by each batch; None: nobody counts, and momentum is a number


class FilteredMoments(NamedTuple):
    """Moments of the values that the filter keeps, one entry for each normalized set (batch form: ``(C,)``, group form:
    ``(N, G)``): the rows, in this order, of the tensor that backends call ``moments``.

    All are float32, or float64 for float64 input. A value ``x`` is kept if ``lower <= x <= upper``.
    """

    mean: Tensor  # mu', Eq. 6
    var: Tensor  # sigma'^2 without eps, biased, Eq. 7
    lower: Tensor  # mu - t_sigma * sigma, Eq. 5
    upper: Tensor  # mu + t_sigma * sigma, Eq. 5
    count: Tensor  # number of kept values, the M = sum f of Eq. 6


def gaussian_kappa(t_sigma: float) -> float:
    """Variance of a unit Gaussian that is cut at ``±t_sigma``: ``1 - 2 T phi(T) / (2 Phi(T) - 1)``.

    It is what the filter takes away from the variance of a clean Gaussian (0.774 at T = 2, 0.973 at 3), which the paper
    leaves in.
    """
    if t_sigma == math.inf:
        return 1.0
    density = math.exp(-0.5 * t_sigma**2) / math.sqrt(2 * math.pi)
    return 1 - 2 * t_sigma * density / math.erf(t_sigma / math.sqrt(2))


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32  # promote_types ends up in exported graphs


def plain_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, ``(C,)``, in at least float32; many times as fast as
    ``torch.var_mean`` on a CPU."""
    if x.device.type == "cpu" and x.is_contiguous() and x.dtype == accumulate_dtype(x.dtype):
        # Group normalization's kernel, a group for each image and channel, takes half of the time of batch
        # normalization's or less, though it writes an output that nobody needs.
        n, c = x.shape[:2]
        _, means, roots = torch.native_group_norm(x, None, None, n, c, x.shape[2:].numel(), c, 0.0)
        mean = means.mean(0)
        return mean, (roots.pow(-2) + (means - mean).square()).mean(0)
    if x.device.type == "meta":  # for which there is none of what follows
        var, mean = torch.var_mean(x.to(accumulate_dtype(x.dtype)), [0, *range(2, x.dim())], correction=0)
        return mean, var
    averages = x.new_zeros(2, x.shape[1], dtype=accumulate_dtype(x.dtype))  # their dtype is that of the result
    return torch.batch_norm_update_stats(x, *averages, 0.0)


class _View(NamedTuple):
    """One form's view of an ``(N, C, *spatial)`` tensor, see the table at the top of the file."""

    shape: list[int]  # of the view
    reduced: list[int]  # dimensions that share a mean
    stats: list[int]  # a statistic's shape, to broadcast against the view
    channel: list[int]  # a per-channel parameter's shape, to broadcast against the view
    not_channel: list[int]  # dimensions that share a parameter


def _view(x: Tensor, num_groups: int) -> _View:
    # Lists are added, as TorchScript knows no star in them.
    n, c, spatial, ones = x.shape[0], x.shape[1], list(x.shape[2:]), [1] * (x.dim() - 2)
    if num_groups == 0:
        reduced = [0] + list(range(2, x.dim()))  # noqa: RUF005
        channel = [1, c] + ones  # noqa: RUF005
        return _View([n, c] + spatial, reduced, channel, channel, reduced)  # noqa: RUF005
    g, k = num_groups, c // num_groups
    space = list(range(3, x.dim() + 1))
    stats, channel = [n, g, 1] + ones, [1, g, k] + ones  # noqa: RUF005
    return _View([n, g, k] + spatial, [2] + space, stats, channel, [0] + space)  # noqa: RUF005


def rounding_of(dtype: torch.dtype) -> tuple[float, float]:
    """The relative rounding and the smallest normal number of a dtype of statistics: ``torch.finfo``, which TorchScript
    does not have."""
    return (2.0**-52, 2.0**-1022) if dtype == torch.float64 else (2.0**-23, 2.0**-126)


def band(mean: Tensor, var: Tensor, t_sigma: float, eps: float) -> tuple[Tensor, Tensor]:
    """The lowest and highest value that the filter keeps (Eq. 5), for moments of any shape."""
    sigma = torch.sqrt(var + eps)
    # With T > 1 Chebyshev's inequality keeps at least one value. It speaks of exact moments: where the deviation is
    # below the rounding of the mean (a constant 1e6, say), the band is widened by that rounding, so that the promise
    # holds for the computed ones too.
    rounding, tiny = rounding_of(mean.dtype)
    least = sigma + 16 * rounding * (sigma + mean.abs())
    half_width = torch.maximum(t_sigma * sigma.clamp_min(tiny), least)
    return mean - half_width, mean + half_width


def kept_moments(x: Tensor, reduced: list[int], lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of the values within a band (Eq. 6, 7), reduced dimensions kept."""
    # A second look at the kept values around their first mean recovers the digits that summing large values loses.
    kept = (x >= lower) & (x <= upper)
    count = kept.sum(dim=reduced, keepdim=True).to(x.dtype)
    rough_mean = torch.where(kept, x, 0).sum(dim=reduced, keepdim=True) / count
    deviation = torch.where(kept, x - rough_mean, 0)
    shift = deviation.sum(dim=reduced, keepdim=True) / count
    var = (deviation.square().sum(dim=reduced, keepdim=True) / count - shift.square()).clamp_min(0)
    return rough_mean + shift, var, count


def _moments(x: Tensor, reduced: list[int], t_sigma: float, eps: float, gaussian_correction: bool) -> FilteredMoments:
    var, mean = torch.var_mean(x.detach(), dim=reduced, correction=0, keepdim=True)  # the mask carries no derivative
    lower, upper = band(mean, var, t_sigma, eps)
    mean, var, count = kept_moments(x, reduced, lower, upper)
    if gaussian_correction:
        var = var / gaussian_kappa(t_sigma)
    return FilteredMoments(mean, var, lower, upper, count)


def describe() -> str:
    return "plain PyTorch, takes everything"


def refuses(x: Tensor, num_groups: int = 0, activation: str = "identity") -> None:
    """None: it takes everything."""
    return None


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: RunningStats | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Normalize ``x`` by the moments of the values within ``t_sigma`` deviations of the mean (Eq. 2-8).

    Args:
        x: ``(N, C, *spatial)``, not empty.
        weight, bias: ``(C,)`` or None.
        residual: like ``x``, added before the activation, or None.
        running: brought nearer to the moments, in place, or None; batch form only.

    Returns:
        ``y`` in the shape, dtype and memory format of ``x``, filtered values normalized along with the rest, and the
        :class:`FilteredMoments` as one tensor, ``(5, C)`` or ``(5, N, G)``. A set that holds a NaN or an infinity has
        no band: its moments, and so its outputs, are NaN.
    """
    num_groups, t_sigma, eps, gaussian_correction, _, activation, negative_slope = options
    moments = filtered_moments(x, num_groups, t_sigma, eps, gaussian_correction)
    y = normalize(x, weight, bias, moments, num_groups, eps, residual, activation, negative_slope)
    if running is not None:
        update_running_stats(running, moments.mean, moments.var, moments.count)
    return y, torch.stack(moments)


def filtered_moments(
    x: Tensor, num_groups: int, t_sigma: float, eps: float, gaussian_correction: bool
) -> FilteredMoments:
    """The first half of :func:`forward`: the moments of the kept values, (C,) or (N, G) each."""
    view = _view(x, num_groups)
    values = x.reshape(view.shape).to(accumulate_dtype(x.dtype))
    flat = [x.shape[1]] if num_groups == 0 else [x.shape[0], num_groups]
    mean, var, lower, upper, count = _moments(values, view.reduced, t_sigma, eps, gaussian_correction)
    lower, upper = lower.reshape(flat), upper.reshape(flat)
    return FilteredMoments(mean.reshape(flat), var.reshape(flat), lower, upper, count.reshape(flat))


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
    """The second half of :func:`forward`: all values by these moments (Eq. 8), then what may follow a norm, rounded
    once: ``activation(y + residual)``."""
    mean, var = moments[0], moments[1]
    return _like(x, _normalized(x, weight, bias, mean, var, num_groups, eps, residual, activation, negative_slope))


def _like(x: Tensor, value: Tensor) -> Tensor:
    """``value`` in the shape, dtype and memory format of ``x``."""
    return torch.empty_like(x).copy_(value.reshape(x.shape))


def _normalized(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    num_groups: int,
    eps: float,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """:func:`normalize`, in the shape of the form's view and in the dtype of the moments."""
    view = _view(x, num_groups)
    mean, var = mean.view(view.stats), var.view(view.stats)
    y = (x.reshape(view.shape).to(mean.dtype) - mean) * torch.rsqrt(var + eps)
    if weight is not None:
        y = y * weight.to(y.dtype).view(view.channel)
    if bias is not None:
        y = y + bias.to(y.dtype).view(view.channel)
    if residual is not None:
        y = y + residual.reshape(view.shape)
    return activate(y, activation, negative_slope)


def activate(z: Tensor, activation: str, negative_slope: float) -> Tensor:
    """One of :data:`ACTIVATIONS`; it may overwrite ``z``."""
    if activation == "relu":
        return F.relu(z, inplace=True)
    if activation == "leaky_relu":
        return F.leaky_relu(z, negative_slope, inplace=True)
    return F.silu(z) if activation == "silu" else z


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    other: Tensor | None,
    moments: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`forward` for ``x``, ``weight``, ``bias`` and ``residual``, given ``grad = dL/dy``; the mask
    carries none.

    The value before the activation is not stored. Without a residual it is computed anew from ``x``.

    With ``g = weight * grad``, ``xhat = (x - mean) / sigma'``, ``f`` the mask, ``M = sum f`` and sums over one
    normalized set:

    ``exact``, the true gradient: ``dx = (g - f (sum g + xhat sum g xhat / k) / M) / sigma'``, where k is
    :func:`gaussian_kappa` if that correction is on and 1 otherwise; ``dweight = sum grad xhat``, ``dbias = sum grad``.

    ``paper``, Eq. 9-13 as printed: the mask multiplies the summands of every sum, and in ``dx`` only the term of the
    variance: ``dx = (g - (sum f g + f xhat sum f g xhat / k) / M) / sigma'``, ``dweight = sum f grad xhat``, ``dbias =
    sum f grad``. (The second summand of Eq. 10 is zero by the definition of the filtered mean, Eq. 6.)

    Args:
        bias: needed only where there is an activation.
        other: None without a residual, or with the identity, whose residual's gradient is ``grad``; the output if its
            sign tells the derivative of the activation (:data:`SIGN_TELLS`), and the residual otherwise.
        moments: those of :func:`forward`, ``(5, C)`` or ``(5, N, G)``.

    Returns:
        The gradient of ``x`` like ``x``; those of weight and bias, ``(C,)``, in the moments' dtype; and that of the
        residual like ``x``, or None if ``other`` is.
    """
    dx, d_weight, d_bias, dz = _gradients(grad, x, weight, bias, other, moments, options)
    return _like(x, dx), d_weight, d_bias, dz


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    other: Tensor | None,
    moments: FilteredMoments | Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """:func:`backward`, but for that of ``x``, which has the shape of the form's view and the dtype of the moments."""
    num_groups, t_sigma, eps, gaussian_correction, grad_mode, activation, negative_slope = options
    if activation != "identity":
        wide = moments[0].dtype
        if other is not None and activation in SIGN_TELLS:
            z = other.to(wide)
        else:
            mean, var = moments[0], moments[1]
            z = _normalized(x.to(wide), weight, bias, mean, var, num_groups, eps, other, "identity", 0.0)
            z = z.reshape(x.shape)
        grad = (grad.to(wide) * _slope(z, activation, negative_slope)).to(x.dtype)

    parts = _gradient_parts(grad, x, moments, num_groups, eps)
    view, masked = parts.view, parts.summands(grad_mode)
    d_bias = masked.sum(dim=view.not_channel)
    d_weight = (masked * parts.xhat).sum(dim=view.not_channel)

    scale = 1.0 if weight is None else weight.to(masked.dtype).view(view.channel)
    sum_g = (masked * scale).sum(dim=view.reduced, keepdim=True)
    sum_g_xhat = (masked * scale * parts.xhat).sum(dim=view.reduced, keepdim=True)
    if gaussian_correction:
        sum_g_xhat = sum_g_xhat / gaussian_kappa(t_sigma)
    count = FilteredMoments(*moments).count.view(view.stats)
    dx = parts.dx(scale, sum_g / count, sum_g_xhat / count, grad_mode)
    return dx, d_weight.flatten(), d_bias.flatten(), None if other is None else grad


class _GradientParts(NamedTuple):
    """What the gradients are made of, in the shapes of the form's view and in the dtype of the statistics."""

    view: _View
    grad: Tensor
    xhat: Tensor
    rstd: Tensor
    mask: Tensor

    def summands(self, grad_mode: str) -> Tensor:
        """Of the sum over a set that is the shift's gradient."""
        return self.grad * self.mask if grad_mode == "paper" else self.grad

    def dx(self, scale: Tensor | float, mean_g: Tensor, mean_g_xhat: Tensor, grad_mode: str) -> Tensor:
        spread = 1.0 if grad_mode == "paper" else self.mask
        return self.rstd * (self.grad * scale - (spread * mean_g + self.mask * self.xhat * mean_g_xhat))


def _gradient_parts(
    grad: Tensor, x: Tensor, moments: FilteredMoments | Tensor, num_groups: int, eps: float
) -> _GradientParts:
    view = _view(x, num_groups)
    values = x.reshape(view.shape).to(moments[0].dtype)
    mean, var, lower, upper, _ = (m.view(view.stats) for m in moments)
    rstd = torch.rsqrt(var + eps)
    mask = ((values >= lower) & (values <= upper)).to(values.dtype)
    return _GradientParts(view, grad.reshape(view.shape).to(values.dtype), (values - mean) * rstd, rstd, mask)


def _slope(z: Tensor, activation: str, negative_slope: float) -> Tensor:
    """The derivative of :func:`activate`."""
    if activation == "silu":
        sigmoid = torch.sigmoid(z)
        return sigmoid * (1 + z * (1 - sigmoid))
    below = {"identity": 1.0, "relu": 0.0, "leaky_relu": negative_slope}[activation]
    return torch.where(z <= 0, below, torch.ones_like(z))


# --- as functions that can be differentiated and exported -------------------------------------------------------------


def formula(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, options: Options
) -> tuple[Tensor, FilteredMoments]:
    """:func:`forward` by PyTorch's standard operators alone, without a write into memory: autograd's derivatives of it,
    forward or reverse, are those of ``grad_mode``. The memory format is whatever comes out."""
    num_groups, t_sigma, eps, gaussian_correction, grad_mode, activation, negative_slope = options
    moments = filtered_moments(x, num_groups, t_sigma, eps, gaussian_correction)
    if grad_mode == "paper":
        y = _normalized_as_printed(x, weight, bias, moments, num_groups, eps)
        y = activate(y if residual is None else y + residual.reshape(y.shape), activation, negative_slope)
    else:
        mean, var = moments.mean, moments.var
        y = _normalized(x, weight, bias, mean, var, num_groups, eps, residual, activation, negative_slope)
    return y.reshape(x.shape).to(x.dtype), moments


def _normalized_as_printed(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, moments: FilteredMoments, num_groups: int, eps: float
) -> Tensor:
    """The values of :func:`_normalized`, and the gradient of Eq. 9-13 as printed (see :func:`backward`): what the
    values share has its gradient from the kept ones alone, and the mean hands its own on to every value."""
    view = _view(x, num_groups)
    values = x.reshape(view.shape).to(moments.mean.dtype)
    kept = (values >= moments.lower.view(view.stats)) & (values <= moments.upper.view(view.stats))
    share = values.sum(dim=view.reduced, keepdim=True) / moments.count.view(view.stats)
    mean = moments.mean.detach().view(view.stats) + (share - share.detach())
    rstd = torch.rsqrt(moments.var.view(view.stats) + eps)
    y = (values - _from_kept(kept, mean)) * _from_kept(kept, rstd)
    if weight is not None:
        y = y * _from_kept(kept, weight.to(y.dtype).view(view.channel))
    if bias is not None:
        y = y + _from_kept(kept, bias.to(y.dtype).view(view.channel))
    return y


def _from_kept(kept: Tensor, shared: Tensor) -> Tensor:
    """``shared``, spread over the values, with a gradient from the kept ones alone."""
    return torch.where(kept, shared, shared.detach())


def gradient_formula(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, other: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """:func:`backward`, in either ``grad_mode``, as :func:`formula` is :func:`forward`. It takes the moments from
    ``x``, so that they are differentiated too."""
    num_groups, t_sigma, eps, gaussian_correction, *_ = options
    moments = filtered_moments(x, num_groups, t_sigma, eps, gaussian_correction)
    dx, d_weight, d_bias, dz = _gradients(grad, x, weight, bias, other, moments, options)
    return dx.reshape(x.shape).to(x.dtype), d_weight, d_bias, dz


# --- the batch form step by step, for batches whose values are on several processes -----------------------------------


def measure(x: Tensor) -> tuple[Tensor, Tensor, None]:
    """Mean and biased variance of each channel, ``(C,)`` each in the dtype of statistics, and what
    :func:`measure_kept` wants to know of this pass: here nothing. ``x`` is not empty."""
    return *plain_moments(x), None


def measure_kept(x: Tensor, lower: Tensor, upper: Tensor, measured: None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of each channel's values in ``[lower, upper]``, all ``(C,)``; where the number
    is 0, the others are NaN."""
    view = _view(x, 0)
    moments = kept_moments(x.to(lower.dtype), view.reduced, lower.view(view.stats), upper.view(view.stats))
    return tuple(moment.flatten() for moment in moments)


def gradient_sums(grad: Tensor, x: Tensor, moments: Tensor, eps: float, grad_mode: str) -> tuple[Tensor, Tensor]:
    """The sums over this ``x`` that are the gradients of weight and bias, ``(C,)`` each."""
    parts = _gradient_parts(grad, x, moments, 0, eps)
    masked = parts.summands(grad_mode)
    return (masked * parts.xhat).sum(dim=parts.view.reduced), masked.sum(dim=parts.view.reduced)


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
    """The gradient of ``x``, from the sums of all ``x`` whose moments these are.

    Args:
        moments: ``(5, C)``.
        mean_g, mean_g_xhat: ``(C,)``, the sums of ``weight * grad`` and of that times xhat, divided by the number of
            kept values, the second by :func:`gaussian_kappa` too if that correction is on.
    """
    parts = _gradient_parts(grad, x, moments, 0, eps)
    scale = 1.0 if weight is None else weight.to(parts.xhat.dtype).view(parts.view.channel)
    mean_g, mean_g_xhat = (mean.to(parts.xhat.dtype).view(parts.view.stats) for mean in (mean_g, mean_g_xhat))
    return _like(x, parts.dx(scale, mean_g, mean_g_xhat, grad_mode))


def update_running_stats(running: RunningStats, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """Bring running statistics nearer to a batch's mean and unbiased variance, in place, and count the batch. The
    moments are ``(C,)`` each, without a gradient."""
    momentum, num_batches = running.momentum, running.num_batches
    if num_batches is not None:
        num_batches.add_(1)
    unbiased = var * (count / (count - 1).clamp_min(1))
    # A NaN in a running statistic stays for good and shows only in evaluation; the batch's NaN output is warning
    # enough.
    finite = torch.isfinite(mean) & torch.isfinite(unbiased)
    for average, batch in ((running.mean, mean), (running.var, unbiased)):
        if momentum is not None:
            nearer = (1 - momentum) * average + momentum * batch
        elif num_batches is not None:  # a tensor, as reading a number would make a GPU's host wait
            share = num_batches.to(mean.device, mean.dtype).reciprocal()
            nearer = (1 - share) * average + share * batch
        else:
            nearer = average
        average.copy_(torch.where(finite, nearer, average))
