"""PyTorch's batch normalization with the running statistics of :class:`torch.nn.BatchNorm2d`, cumulative averages
included, and no number read from a tensor: reading one breaks a compiled graph, fails in ``torch.func.vmap``, and makes
a GPU's host wait."""

import torch.nn.functional as F
from torch import Tensor

SMALLEST_EPS = 1.1754943508222875e-38  # smaller numbers are 0 in float32, or to a GPU


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    num_batches: Tensor | None,
) -> Tensor:
    """``F.batch_norm``, the batch counted.

    Args:
        x, running_mean, running_var, weight, bias, training, eps: as in ``F.batch_norm``.
        momentum: as there; None is a cumulative average by ``num_batches``, or, without that, leaves the running
            statistics as they are.
        num_batches: ``()``, int64, counted up in training, or None.

    Returns:
        Tensor like ``x``.

    Raises:
        ValueError: an ``eps`` in training that float32 has no room for, as 0.
    """
    if training:
        check_training_eps(eps)
    if training and num_batches is not None:
        num_batches.add_(1)
        if momentum is None and running_mean is not None and running_var is not None:
            mean, var = running_mean.clone(), running_var.clone()
            y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, eps)  # which makes them this batch's
            average_in(running_mean, running_var, mean, var, None, num_batches)
            return y
    factor = 0.0 if momentum is None else momentum
    return F.batch_norm(x, running_mean, running_var, weight, bias, training, factor, eps)


def check_training_eps(eps: float, least: float = SMALLEST_EPS) -> None:
    """ValueError if ``eps`` is too small to normalize by the moments of the input with.

    By running statistics a norm may have an ``eps`` of 0. By those of its input it may not: values that are equal, or
    are as good as equal in float32, would become NaN, and so would the weights. Newer versions of PyTorch refuse to
    train batch normalization with it. TorchScript compiles this function.
    """
    if eps < least:
        raise ValueError(
            f"eps must be a number in [1.2e-38, 1) to normalize by the moments of the input, got {eps}: "
            "values that are equal would become NaN"
        )


def without_values(x: Tensor, parameters: list[Tensor | None]) -> Tensor:
    """What a norm makes of an ``x`` that has no elements, with a gradient of zero for each of its parameters, as
    distributed training waits for one. A mean of no values would make these NaN."""
    y = x.clone()
    for parameter in parameters:
        if parameter is not None:
            y = y + parameter.sum()  # nothing is added to no values
    return y.to(x.dtype)


def average_in(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    momentum: float | None,
    num_batches: Tensor | None,
) -> None:
    """Bring running statistics nearer to a batch's mean and unbiased variance, ``(C,)`` each, as PyTorch does; the
    batch is counted already. Not by ``lerp_``, which vmap has no rule for."""
    for running, batch in ((running_mean, mean), (running_var, var)):
        batch = batch.to(running.dtype)
        if momentum is not None:
            running.copy_((1 - momentum) * running + momentum * batch)
        elif num_batches is not None:
            share = num_batches.to(running.device, running.dtype).reciprocal()
            running.copy_((1 - share) * running + share * batch)
