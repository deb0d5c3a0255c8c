"""The operators that layers call: filtered batch and group normalization as PyTorch operators with fake and autograd
rules.

``torch.compile`` and ``torch.export`` see ``fbn_plugin::filtered_norm`` as one operator, and so the form with an
activation, ``fbn_plugin::filtered_norm_act``. What is kept for the backward pass is the input and a few numbers a
normalized set; the mask is recomputed from the band's two edges. Source: Horváth and Al-afandi, "Filtered Batch
Normalization" (2020).
"""

import math
import numbers
import sys
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fbn_plugin.ops import cpu, reference, triton

GRAD_MODES = ("exact", "paper")
_PLAIN = (Tensor, nn.Parameter)


# In the order in which they are asked; the reference refuses nothing.
_BACKENDS = {"cpu": cpu, "triton": triton}


def _backend(x: Tensor) -> ModuleType:
    return next((backend for backend in _BACKENDS.values() if backend.refuses(x) is None), reference)


def act_backend(x: Tensor) -> ModuleType:
    """The backend of what the C++ kernels have no part for: activations, and the single steps of a batch that is spread
    over processes."""
    return reference if triton.refuses(x) else triton


def running_backend(running_mean: Tensor, running_var: Tensor, mean: Tensor) -> ModuleType:
    """The backend that moves running statistics."""
    dense = running_mean.is_contiguous() and running_var.is_contiguous()
    return triton if dense and triton.refuses(mean) is None else reference


def backends() -> dict[str, str]:
    """The backends in the order in which they are asked, each with what it is or why it cannot be used here."""
    kernels = cpu.library()
    if not isinstance(kernels, str):
        kernels = f"C++ kernels for {kernels.fbn_instruction_set().decode()}"
    gpu = triton.missing()
    if gpu is None and triton.interpreted():
        gpu = f"Triton {triton.version()} kernels in its interpreter, on the CPU"
    elif gpu is None:
        gpu = f"Triton {triton.version()} kernels" if torch.cuda.is_available() else "there is no GPU"
    return {"cpu": kernels, "triton": gpu, "reference": "plain PyTorch, takes everything"}


def explain(x: Tensor) -> str:
    """Which backend filters ``x`` in training, and why."""
    reasons = {}
    for name, backend in _BACKENDS.items():
        reasons[name] = backend.refuses(x)
        if reasons[name] is None:
            return f"{name}: {backends()[name]}"
    # The backend that was made for the device knows best.
    return f"reference: {reasons['triton' if x.device.type == 'cuda' else 'cpu']}"


def check_filter(t_sigma: float, grad_mode: str = "exact") -> float:
    """Return ``t_sigma`` as a float; ValueError if a filter option has no meaning.

    The cut must lie above one deviation: only then does Chebyshev's inequality promise that at least one value is kept.
    """
    if isinstance(t_sigma, bool) or not isinstance(t_sigma, numbers.Real) or not t_sigma > 1:
        raise ValueError(f"t_sigma must be a number greater than 1 (inf filters nothing), got {t_sigma!r}")
    if grad_mode not in GRAD_MODES:
        raise ValueError(f"grad_mode must be one of {', '.join(map(repr, GRAD_MODES))}, got {grad_mode!r}")
    return float(min(t_sigma, sys.float_info.max)) if t_sigma != math.inf else math.inf


def check_channels(x: Tensor, **per_channel: Tensor | None) -> None:
    """ValueError if ``x`` is not floating point of shape ``(N, C, ...)``, or a tensor does not fit C or the device."""
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"the input must be floating point of shape (N, C, ...), got {x.dtype} of {tuple(x.shape)}")
    for name, tensor in per_channel.items():
        if tensor is not None and tensor.numel() != x.shape[1]:
            raise ValueError(f"{name} has {tensor.numel()} elements, but the input has {x.shape[1]} channels")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but the input is on {x.device}")


def _check_batch(x: Tensor, **per_channel: Tensor | None) -> None:
    check_channels(x, **per_channel)
    if x.numel() == x.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")


def check_activation(activation: str, negative_slope: float) -> None:
    """ValueError if the activation is none that :func:`filtered_batch_norm_act` knows."""
    if activation not in reference.ACTIVATIONS:
        known = ", ".join(map(repr, reference.ACTIVATIONS))
        raise ValueError(f"activation must be one of {known}, got {activation!r}")
    if not negative_slope >= 0:
        raise ValueError(f"negative_slope must not be below 0, got {negative_slope!r}")


@torch.library.custom_op("fbn_plugin::filtered_norm", mutates_args=())
def _filtered_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    t_sigma: float,
    eps: float,
    gaussian_correction: bool,
    grad_mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_channels(x, weight=weight, bias=bias)  # the kernels read them by address
    y, moments = _backend(x).filtered_norm(x, weight, bias, num_groups, t_sigma, eps, gaussian_correction)
    return (y, *moments)


@_filtered_norm.register_fake
def _(x, weight, bias, num_groups, *_):
    return _fake_norm(x, num_groups)


def _fake_norm(x: Tensor, num_groups: int) -> tuple[Tensor, ...]:
    stats = x.shape[1:2] if num_groups == 0 else (x.shape[0], num_groups)
    dtype = reference.accumulate_dtype(x.dtype)
    return (torch.empty_like(x), *(x.new_empty(stats, dtype=dtype) for _ in range(5)))


@torch.library.custom_op("fbn_plugin::filtered_norm_backward", mutates_args=())
def _filtered_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    lower: Tensor,
    upper: Tensor,
    count: Tensor,
    num_groups: int,
    t_sigma: float,
    eps: float,
    gaussian_correction: bool,
    grad_mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    moments = reference.FilteredMoments(mean, var, lower, upper, count)
    return _backend(x).filtered_norm_backward(
        grad, x, weight, moments, num_groups, t_sigma, eps, gaussian_correction, grad_mode
    )


@_filtered_norm_backward.register_fake
def _(grad, x, weight, mean, *_):
    per_channel = x.shape[1:2]
    return torch.empty_like(x), mean.new_empty(per_channel), mean.new_empty(per_channel)


def _keep_for_backward(ctx, inputs, output):
    x, weight, bias, *options = inputs
    _, *moments = output
    ctx.mark_non_differentiable(*moments)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, *moments)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.options = options


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    x, weight, *moments = ctx.saved_tensors
    gradients = _filtered_norm_backward(grad, x, weight, *moments, *ctx.options)
    return *as_inputs(gradients, weight, ctx.bias_dtype), *(None,) * 5


def as_inputs(gradients: tuple[Tensor, Tensor, Tensor], weight: Tensor | None, bias_dtype: torch.dtype | None):
    """The gradients of x, weight and bias in the dtype of each, None for what is not there."""
    dx, d_weight, d_bias = gradients
    return (
        dx,
        None if weight is None else d_weight.to(weight.dtype),
        None if bias_dtype is None else d_bias.to(bias_dtype),
    )


def _no_double_backward(ctx, *_):
    raise RuntimeError("filtered normalization has no second derivative: it cannot be differentiated twice")


_filtered_norm.register_autograd(_backward, setup_context=_keep_for_backward)
_filtered_norm_backward.register_autograd(_no_double_backward)


class _DirectOnCPU(torch.autograd.Function):
    """The operator and the running statistics in one call of the C++ kernels, without the dispatcher, which takes
    longer than the kernels do for a small map."""

    @staticmethod
    def forward(ctx, x, weight, bias, moving, options):
        y, moments = cpu.forward(x, weight, bias, *moving, *options[:-1])
        ctx.save_for_backward(x, weight, moments)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, moments = ctx.saved_tensors
        if _is_plain_gradient(grad) and cpu.refuses(x) is None:  # a saved-tensor hook may have changed x
            gradients = cpu.backward(grad, x, weight, moments, *ctx.options)
        else:
            gradients = _filtered_norm_backward(grad, x, weight, *moments, *ctx.options)
        return *as_inputs(gradients, weight, ctx.bias_dtype), None, None


class _Direct(torch.autograd.Function):
    """The operator and the running statistics without the dispatcher, on any backend."""

    @staticmethod
    def forward(ctx, x, weight, bias, moving, options):
        running_mean, running_var, momentum = moving
        y, moments = _backend(x).filtered_norm(x, weight, bias, *options[:-1])
        if running_mean is not None:
            batch = moments.mean, moments.var, moments.count
            running_backend(running_mean, running_var, moments.mean).update_running_stats(
                running_mean, running_var, *batch, momentum
            )
        ctx.save_for_backward(x, weight, *moments)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, *moments = ctx.saved_tensors
        if _is_plain_gradient(grad):
            moments = reference.FilteredMoments(*moments)
            gradients = _backend(x).filtered_norm_backward(grad, x, weight, moments, *ctx.options)
        else:
            gradients = _filtered_norm_backward(grad, x, weight, *moments, *ctx.options)
        return *as_inputs(gradients, weight, ctx.bias_dtype), None, None


def _is_plain(tensor: Tensor) -> bool:
    """Whether the values are those in its memory. Where a bit says that they are to be negated, or are zeros without
    memory, the dispatcher sees to it."""
    return type(tensor) in _PLAIN and not tensor.is_neg() and not tensor._is_zerotensor()


def _nothing_watches(*tensors: Tensor | None) -> bool:
    """Whether plain tensors are computed with, and no compiler, tracer, transform or mode is to see the operator."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._len_torch_dispatch_stack()
        and not torch.jit.is_tracing()
        and all(t is None or _is_plain(t) for t in tensors)
    )


def _is_plain_gradient(grad: Tensor) -> bool:
    """False if the operator is to be called: it knows batched gradients, and refuses to be differentiated again."""
    batched = torch._C._functorch.is_legacy_batchedtensor(grad)
    return not torch.is_grad_enabled() and not batched and _nothing_watches(grad)


def _transformed(*tensors: Tensor | None) -> bool:
    """True inside of a ``torch.func`` transform, which cannot see through the operators."""
    return not torch.compiler.is_compiling() and any(
        t is not None and torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors
    )


def _normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    *options,
) -> Tensor:
    """Normalize and update the running statistics, by the shortest way that there is."""
    if running_mean is None or running_var is None:
        running_mean = running_var = None
    if _nothing_watches(x, weight, bias, running_mean, running_var):
        statistics = running_mean is None or (cpu.takes_statistic(running_mean) and cpu.takes_statistic(running_var))
        way = _DirectOnCPU if cpu.refuses(x) is None and statistics else _Direct
        return way.apply(x, weight, bias, (running_mean, running_var, momentum), options)
    if not _transformed(x, weight, bias):
        y, *moments = _filtered_norm(x, weight, bias, *options)
    else:  # the reference that it stands for
        *options, grad_mode = options
        if grad_mode != "exact":
            raise ValueError(f"torch.func transforms follow the exact gradient only, got grad_mode {grad_mode!r}")
        y, moments = reference.filtered_norm(x, weight, bias, *options)
    if running_mean is not None:
        mean, var, _, _, count = moments
        _update_running_stats(running_mean, running_var, mean, var, count, momentum)
    return y


@torch.library.custom_op("fbn_plugin::filtered_norm_act", mutates_args=())
def _filtered_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    num_groups: int,
    t_sigma: float,
    eps: float,
    gaussian_correction: bool,
    grad_mode: str,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_channels(x, weight=weight, bias=bias)
    backend = act_backend(x)
    moments = backend.filtered_moments(x, num_groups, t_sigma, eps, gaussian_correction)
    y = backend.normalize(x, weight, bias, moments, num_groups, eps, residual, activation, negative_slope)
    return (y, *moments)


@_filtered_norm_act.register_fake
def _(x, weight, bias, residual, num_groups, t_sigma, eps, gaussian_correction, *_):
    return _fake_norm(x, num_groups)


@torch.library.custom_op("fbn_plugin::filtered_norm_act_backward", mutates_args=())
def _filtered_norm_act_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    other: Tensor | None,
    mean: Tensor,
    var: Tensor,
    lower: Tensor,
    upper: Tensor,
    count: Tensor,
    num_groups: int,
    t_sigma: float,
    eps: float,
    gaussian_correction: bool,
    grad_mode: str,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    moments = reference.FilteredMoments(mean, var, lower, upper, count)
    options = num_groups, t_sigma, eps, gaussian_correction, grad_mode, activation, negative_slope
    *gradients, dz = act_backend(x).filtered_norm_act_backward(grad, x, weight, bias, other, moments, *options)
    return *gradients, x.new_empty(0) if dz is None else dz  # an operator's outputs cannot be optional


@_filtered_norm_act_backward.register_fake
def _(grad, x, weight, bias, other, mean, *_):
    per_channel = x.shape[1:2]
    dz = x.new_empty(0) if other is None else torch.empty_like(x)
    return torch.empty_like(x), mean.new_empty(per_channel), mean.new_empty(per_channel), dz


def _keep_for_act_backward(ctx, inputs, output):
    x, weight, bias, residual, *options = inputs
    y, *moments = output
    activation = options[-2]
    other = None if activation == "identity" else residual
    if other is not None and activation in reference.SIGN_TELLS:
        other = y
    ctx.mark_non_differentiable(*moments)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, other, *moments)
    ctx.residual = residual is not None
    ctx.options = options


def _act_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 11
    x, weight, bias, other, *moments = ctx.saved_tensors
    dx, d_weight, d_bias, dz = _filtered_norm_act_backward(grad, x, weight, bias, other, *moments, *ctx.options)
    d_weight = None if weight is None else d_weight.to(weight.dtype)
    d_bias = None if bias is None else d_bias.to(bias.dtype)
    d_residual = (grad if other is None else dz) if ctx.residual else None
    return dx, d_weight, d_bias, d_residual, *(None,) * 7


_filtered_norm_act.register_autograd(_act_backward, setup_context=_keep_for_act_backward)
_filtered_norm_act_backward.register_autograd(_no_double_backward)


@torch.library.custom_op("fbn_plugin::update_running_stats", mutates_args=("running_mean", "running_var"))
def _update_running_stats(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: Tensor, momentum: float
) -> None:
    backend = running_backend(running_mean, running_var, mean)
    backend.update_running_stats(running_mean, running_var, mean, var, count, momentum)


@_update_running_stats.register_fake
def _(*_):
    return None


def filtered_batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    t_sigma: float = 5.0,
    grad_mode: str = "exact",
    gaussian_correction: bool = False,
) -> Tensor:
    """Filtered batch normalization (Horváth and Al-afandi 2020, Eq. 2-8).

    In training the mean and variance of a channel are computed a second time, without the values further than
    ``t_sigma`` deviations from the first mean; every value is normalized by them. In evaluation it is ``F.batch_norm``,
    to the bit and to the node in an exported graph.

    Args:
        x: ``(N, C, *spatial)`` of any floating dtype; statistics are float32, or float64 for float64.
        weight, bias: ``(C,)`` scale and shift, or None.
        running_mean, running_var: ``(C,)``; updated in place in training, used in evaluation. They become averages of
            the filtered mean and of the unbiased filtered variance ``var * M / (M - 1)``, ``M`` the number of kept
            values. A channel whose batch holds a NaN or an infinity gives NaN, as in batch normalization, but leaves
            its running statistics as they were.
        training: use the batch's moments.
        momentum: weight of the new batch in the running statistics.
        eps: added to the variance, in the band's width (Eq. 3) and in the divisor (Eq. 7).
        t_sigma: cut in deviations, above 1; ``inf`` is plain batch normalization.
        grad_mode: ``"exact"``, the gradient of the forward pass with the mask held constant, or ``"paper"``, Eq. 9-13
            as printed.
        gaussian_correction: divide the filtered variance by the variance of a unit Gaussian cut at ``t_sigma``, so that
            the filter leaves a clean Gaussian as it is.

    Returns:
        Tensor like ``x``.

    Raises:
        ValueError: ``t_sigma`` or ``grad_mode`` out of range, one value per channel in training, or a channel count
        that does not fit.
    """
    t_sigma = check_filter(t_sigma, grad_mode)
    if not training or t_sigma == math.inf or x.numel() == 0:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    _check_batch(x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    moving = running_mean, running_var, momentum
    return _normalize(x, weight, bias, *moving, 0, t_sigma, eps, gaussian_correction, grad_mode)


def filtered_batch_statistics(
    x: Tensor, eps: float = 1e-5, t_sigma: float = 5.0, gaussian_correction: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`filtered_batch_norm` normalizes ``x`` by in training, without a gradient.

    Args:
        x: ``(N, C, *spatial)``, not empty.
        eps, t_sigma, gaussian_correction: as in :func:`filtered_batch_norm`.

    Returns:
        Mean, biased variance and number of the values that the filter keeps, ``(C,)`` each, float32, or float64 for
        float64.
    """
    t_sigma = check_filter(t_sigma)
    _, mean, var, _, _, count = _filtered_norm(x.detach(), None, None, 0, t_sigma, eps, gaussian_correction, "exact")
    return mean, var, count


def filtered_share(x: Tensor, num_groups: int = 0, eps: float = 1e-5, t_sigma: float = 5.0) -> Tensor:
    """The share of the values of ``x`` that the filter leaves out, without a gradient.

    Args:
        x: ``(N, C, *spatial)``, not empty.
        num_groups: as in :func:`filtered_group_norm`; 0 is the batch form.
        eps, t_sigma: as in :func:`filtered_batch_norm`.

    Returns:
        A scalar, 0 to 1; NaN where a normalized set has a NaN or an infinity.
    """
    t_sigma = check_filter(t_sigma)
    *_, count = _filtered_norm(x.detach(), None, None, num_groups, t_sigma, eps, False, "exact")
    return (x.numel() - count.double().sum()) / x.numel()


def filtered_batch_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    t_sigma: float = 5.0,
    grad_mode: str = "exact",
    gaussian_correction: bool = False,
    activation: str = "relu",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(filtered_batch_norm(x) + residual)``, on a GPU in one pass over memory less for each.

    The kernels for GPUs round once, at the end, and do not store the value before the activation: the backward pass
    computes it again, or, with a residual, reads its sign from the output. Elsewhere, and in evaluation, the three
    steps are taken one by one.

    Args:
        x, weight, bias, running_mean, running_var, training, momentum, eps, t_sigma, grad_mode, gaussian_correction:
            as in :func:`filtered_batch_norm`.
        activation: ``"relu"``, ``"leaky_relu"``, ``"silu"`` or ``"identity"``.
        negative_slope: of ``"leaky_relu"``, not below 0.
        residual: added before the activation; like ``x``, or anything that can be added to it.

    Returns:
        Tensor like ``x``.

    Raises:
        ValueError: as :func:`filtered_batch_norm`; an unknown activation or a negative slope.
    """
    check_activation(activation, negative_slope)
    t_sigma = check_filter(t_sigma, grad_mode)
    alike = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    plain = not training or t_sigma == math.inf or x.numel() == 0
    if plain or not alike or triton.refuses(x) or _transformed(x, weight, bias, residual):
        moving = running_mean, running_var, training, momentum, eps
        y = filtered_batch_norm(x, weight, bias, *moving, t_sigma, grad_mode, gaussian_correction)
        return reference.activate(y if residual is None else y + residual, activation, negative_slope)
    _check_batch(x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    options = 0, t_sigma, eps, gaussian_correction, grad_mode, activation, float(negative_slope)
    y, mean, var, _, _, count = _filtered_norm_act(x, weight, bias, residual, *options)
    if running_mean is not None and running_var is not None:
        _update_running_stats(running_mean, running_var, mean, var, count, momentum)
    return y


def filtered_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    t_sigma: float = 5.0,
    grad_mode: str = "exact",
    gaussian_correction: bool = False,
) -> Tensor:
    """Filtered group normalization: the filter of Eq. 4-8 on the values of each sample's group (Horváth and Al-afandi
    2020, section IV-D).

    There are no running statistics: training and evaluation are the same.

    Args:
        x: ``(N, C, *spatial)`` of any floating dtype, ``C`` divisible by ``num_groups``.
        num_groups: 1 is layer normalization over a whole sample, ``C`` is instance normalization.
        weight, bias: ``(C,)`` or None.
        eps, t_sigma, grad_mode, gaussian_correction: as in :func:`filtered_batch_norm`.

    Returns:
        Tensor like ``x``.

    Raises:
        ValueError: ``t_sigma`` or ``grad_mode`` out of range, a single value in all, or groups that do not divide the
        channels.
    """
    t_sigma = check_filter(t_sigma, grad_mode)
    check_channels(x, weight=weight, bias=bias)
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"num_groups must divide the number of channels, got {num_groups} groups for {channels} channels"
        )
    if t_sigma == math.inf or x.numel() == 0:
        return F.group_norm(x, num_groups, weight, bias, eps)
    if x.numel() == num_groups:
        raise ValueError(f"Expected more than 1 value per group, got input size {x.shape} for {num_groups} groups")
    return _normalize(x, weight, bias, None, None, 0.0, num_groups, t_sigma, eps, gaussian_correction, grad_mode)
