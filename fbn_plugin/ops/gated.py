"""Batch normalization whose scale depends on each image through a gate, with a gradient of its own.

The gate needs an image's mean in each channel, which makes the scale one number an image and channel. Written with
autograd that takes some ten passes over memory; here the gradient is put together from the sums of ``g`` and ``g (x -
mean)`` over each image and channel, and what is in between is of size ``(N, C)``. Source of the equation: Davis and
Frank, "Revisiting Batch Norm Initialization" (2022), section 4.5.
"""

import torch
from torch import Tensor
from torch.jit import is_scripting

from fbn_plugin.ops import eager, plain
from fbn_plugin.ops.checks import check_batch
from fbn_plugin.ops.derivatives import by_formula
from fbn_plugin.ops.reference import accumulate_dtype, plain_moments


def _pool(x: Tensor) -> Tensor:
    """The mean over the positions of each image and channel, ``(N, C)``; 0 if there are none, as NaN would be the
    gradient of the gate."""
    if x.dim() == 2:
        return x.clone()
    positions = list(range(2, x.dim()))
    return x.mean(dim=positions) if x.numel() > 0 else x.sum(dim=positions)


def _gate(weight: Tensor | None, gate_weight: Tensor, gate_bias: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
    """The gate, and the scale that it makes of ``weight``: ``(N, C)`` both."""
    gate = torch.sigmoid(gate_weight * pooled + gate_bias)
    return gate, gate if weight is None else weight * gate


def _per_image(t: Tensor, like: Tensor) -> Tensor:
    """``(N, C)`` or ``(C,)`` to the rank of ``like``."""
    return t.reshape([-1, like.shape[1]] + [1] * (like.dim() - 2))


def _sums(grad: Tensor, x: Tensor, mean: Tensor, root: Tensor, contiguous: bool) -> tuple[Tensor, Tensor]:
    """Sums of ``g`` and of ``g xhat`` over each image and channel: two parameters' gradients of PyTorch's batch
    normalization, were each image a batch. It stores no product."""
    shape = x.shape[:2]
    if contiguous:  # then all images and channels are the channels of one
        batches = [(grad.reshape(1, shape.numel(), -1), x.reshape(1, shape.numel(), -1))]
        mean, root = mean.repeat(shape[0]), root.repeat(shape[0])
    else:
        batches = zip(grad.split(1), x.split(1))
    backward = torch.ops.aten.native_batch_norm_backward
    each = [backward(g, v, None, None, None, mean, root, True, 0.0, [False, True, True])[1:] for g, v in batches]
    sum_gx, sum_g = (torch.cat(sums).view(shape) for sums in zip(*each))
    return sum_g, sum_gx


def _formula(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor,
    eps: float,
    pool_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What :class:`_GatedNorm` computes, by standard operators."""
    values = x.to(accumulate_dtype(x.dtype))
    reduced = (0, *range(2, x.dim()))
    var, mean = torch.var_mean(values, dim=reduced, correction=0, keepdim=True)
    xhat = (values - mean) * torch.rsqrt(var + eps)
    _, scale = _gate(weight, gate_weight, gate_bias, _pool(values if pool_input else xhat))
    y = xhat * _per_image(scale, x)
    if bias is not None:
        y = y + _per_image(bias, x)
    count = x.numel() // x.shape[1]
    return y.to(x.dtype), mean.detach().flatten(), var.detach().flatten() * (count / (count - 1))


class _GatedNorm(torch.autograd.Function):
    """The output, and mean and unbiased variance of each channel."""

    @staticmethod
    def forward(ctx, x, weight, bias, gate_weight, gate_bias, eps, pool_input):
        values = x.to(accumulate_dtype(x.dtype))
        mean, var = plain_moments(values)
        root = torch.rsqrt(var + eps)
        pooled = _pool(values)
        if not pool_input:
            pooled = (pooled - mean) * root
        gate, scale = _gate(weight, gate_weight, gate_bias, pooled)
        factor = root * scale
        shift = -mean * factor if bias is None else torch.addcmul(bias, mean, factor, value=-1)
        y = torch.addcmul(_per_image(shift, x), values, _per_image(factor, x))
        count = x.numel() // x.shape[1]
        var = var * (count / (count - 1))
        ctx.mark_non_differentiable(mean, var)
        ctx.save_for_backward(x, weight, bias, gate_weight, gate_bias, mean, root, pooled, gate, scale)
        ctx.pool_input, ctx.eps = pool_input, eps
        ctx.contiguous = x.is_contiguous()  # the compiler of PyTorch 2.6 does not let the backward pass ask
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias, gate_weight, gate_bias)]
        return y.to(x.dtype), mean, var

    @staticmethod
    def backward(ctx, grad, *_):
        *inputs, mean, root, pooled, gate, scale = ctx.saved_tensors
        if eager.is_followed(grad):
            return *by_formula(lambda *t: _formula(*t, ctx.eps, ctx.pool_input)[:1], inputs, [grad]), None, None
        x, gate_weight = inputs[0], inputs[3]
        grad, values = grad.to(mean.dtype), x.to(mean.dtype)
        sum_g, sum_gx = _sums(grad, values, mean, root, ctx.contiguous)
        scaled = scale * sum_gx
        d_gate = scaled * (1 - gate)  # of the sigmoid's argument
        d_gate_weight, d_gate_bias = (d_gate * pooled).sum(0), d_gate.sum(0)

        # The gradient of xhat is h = scale g, plus gate_weight d_gate / positions where it is xhat that is pooled.
        positions = x.shape[2:].numel()
        sum_h, sum_hx = (scale * sum_g).sum(0), scaled.sum(0)
        of_1 = d_gate * (gate_weight / positions)
        if not ctx.pool_input:
            sum_h, sum_hx = sum_h + gate_weight * d_gate_bias, sum_hx + gate_weight * d_gate_weight
            of_1 = of_1 * root
        count = x.shape[0] * positions
        of_x = -root.square() * sum_hx / count
        of_1 = of_1 - (root * sum_h / count + of_x * mean)
        dx = torch.addcmul(_per_image(of_1, x), values, _per_image(of_x, x)).addcmul_(grad, _per_image(root * scale, x))
        gradients = dx, (gate * sum_gx).sum(0), sum_g.sum(0), d_gate_weight, d_gate_bias
        return *(None if dtype is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes)), None, None


def gated_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor,
    training: bool,
    momentum: float | None,
    eps: float,
    pool_input: bool,
    num_batches: Tensor | None,
) -> Tensor:
    """``weight * sigmoid(gate_weight * GAP(z) + gate_bias) * xhat + bias`` (Davis and Frank 2022, section 4.5).

    Args:
        x: ``(N, C, *spatial)`` of any floating dtype; sums are float32, or float64 for float64.
        weight, bias: ``(C,)``, or None for 1 and 0.
        gate_weight, gate_bias: ``(C,)``, the paper's v and w.
        running_mean, running_var, training, momentum, eps, num_batches: as in :func:`fbn_plugin.ops.plain.batch_norm`.
        pool_input: ``z`` is ``x``; otherwise it is ``xhat``, the normalized values. GAP is the mean over ``spatial``.

    Returns:
        Tensor like ``x``.

    Raises:
        ValueError: one value per channel in training, or a channel count that does not fit.
    """
    if is_scripting() or not training or x.numel() == 0:
        normalized = plain.batch_norm(x, running_mean, running_var, None, None, training, momentum, eps, num_batches)
        scale = _gate(weight, gate_weight, gate_bias, _pool(x if pool_input else normalized))[1]
        y = normalized * _per_image(scale, x)
        return (y if bias is None else y + _per_image(bias, x)).to(x.dtype)
    plain.check_training_eps(eps)
    check_batch(x, weight=weight, bias=bias, gate_weight=gate_weight, gate_bias=gate_bias, running_mean=running_mean)
    follows = eager.needs_formula(x, weight, bias, gate_weight, gate_bias)
    function = _formula if follows else _GatedNorm.apply
    y, mean, var = function(x, weight, bias, gate_weight, gate_bias, eps, pool_input)
    if num_batches is not None:
        num_batches.add_(1)
    if running_mean is not None and running_var is not None:
        if follows or momentum is None:
            plain.average_in(running_mean, running_var, mean, var, momentum, num_batches)
        else:  # in one operator each
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(var.to(running_var.dtype), momentum)
    return y
