"""Filtered batch normalization of a batch whose images are spread over processes: every process normalizes its share by
the filtered moments of the whole.

A process with no image takes part like any other. What is exchanged is a few numbers a channel: once before the band
can be drawn, once after, and once in the backward pass. Moments of shares are put together by means and deviations, as
Chan, Golub and LeVeque do ("Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979), never by
sums of squares. Source of the filter: Horváth and Al-afandi, "Filtered Batch Normalization" (2020), Eq. 2-13.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fbn_plugin.ops import dispatch
from fbn_plugin.ops.checks import check_channels, check_eps_of_moments, check_filter
from fbn_plugin.ops.dispatch import backend_of
from fbn_plugin.ops.reference import FilteredMoments, RunningStats, accumulate_dtype, band, gaussian_kappa

# Made at the first call, as it imports the compiler; ``DistributedDataParallel`` does, ``import fbn_plugin`` does not.
_uncompiled: Callable[..., Tensor] | None = None


def sync_filtered_batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    t_sigma: float = 5.0,
    grad_mode: str = "exact",
    gaussian_correction: bool = False,
    process_group: "dist.ProcessGroup | None" = None,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """:func:`fbn_plugin.ops.filtered_batch_norm` in training, over the batches of all processes of a group: outputs,
    gradients and running statistics are those of one process with the concatenated batch.

    All processes of the group must call it, and run its backward pass, alike often and in the same order; their batches
    may be of different sizes, and empty. The forward pass exchanges twice (once where ``t_sigma`` is inf, which needs
    no second look), the backward pass once. The process whose input needs no gradient takes part in that, too, if
    any other's does.

    The gradients of ``weight`` and ``bias`` are the sums over this process's values, as those of
    :class:`torch.nn.SyncBatchNorm`: like those of any other parameter they add up over processes to the gradient
    of the sum of the losses, and ``DistributedDataParallel`` averages them.

    On a GPU the kernels are those of :func:`fbn_plugin.ops.filtered_batch_norm`, the exchanges between them: the batch
    is read and written as often as by :class:`torch.nn.SyncBatchNorm`, and tiles of it that hold an outlier are read
    once more. On a CPU it is plain PyTorch. ``torch.compile`` breaks its graph here.

    Args:
        x: this process's ``(N, C, *spatial)``; N may be 0.
        running_mean, running_var, weight, bias, momentum, eps, t_sigma, grad_mode, gaussian_correction: as in
            :func:`fbn_plugin.ops.filtered_batch_norm`; the running statistics end equal on all processes.
        process_group: of ``torch.distributed``, which is initialized; None is all processes.
        num_batches_tracked: as in :func:`fbn_plugin.ops.filtered_batch_norm`.

    Returns:
        Tensor like ``x``.

    Raises:
        ValueError: an option out of range, a channel count that does not fit, or, on every process
        alike, one value per channel on all processes together.

    Examples::

        >>> store = torch.distributed.HashStore()  # here for one process alone
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> fbn_plugin.ops.sync_filtered_batch_norm(torch.randn(4, 8, 16, 16), t_sigma=5.0).shape
        torch.Size([4, 8, 16, 16])
        >>> torch.distributed.destroy_process_group()
    """
    global _uncompiled
    if _uncompiled is None:
        _uncompiled = torch.compiler.disable(_sync_filtered_batch_norm)
    running = running_mean, running_var, momentum
    options = eps, t_sigma, grad_mode, gaussian_correction
    return _uncompiled(x, weight, bias, *running, *options, process_group, num_batches_tracked)


def _sync_filtered_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | None,
    eps: float,
    t_sigma: float,
    grad_mode: str,
    gaussian_correction: bool,
    process_group: "dist.ProcessGroup | None",
    num_batches: Tensor | None,
) -> Tensor:
    t_sigma, eps = check_filter(t_sigma, grad_mode), check_eps_of_moments(eps)
    check_channels(x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    differentiates = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    with torch.no_grad():
        moments, who = _moments(x, eps, t_sigma, gaussian_correction, differentiates, process_group)
        if running_mean is not None and running_var is not None:
            if momentum is None and num_batches is None:
                momentum = 0.0
            running = RunningStats(running_mean, running_var, momentum, num_batches)
            dispatch.update_running_stats(running, moments.mean, moments.var, moments.count)
        elif num_batches is not None:
            num_batches.add_(1)
    if torch.is_grad_enabled() and not differentiates and who.any():
        x = x.detach().requires_grad_()  # so that the backward pass comes here
    kappa = gaussian_kappa(t_sigma) if gaussian_correction else 1.0
    return _Normalize.apply(x, weight, bias, torch.stack(moments), eps, grad_mode, kappa, process_group)


def _moments(
    x: Tensor,
    eps: float,
    t_sigma: float,
    gaussian_correction: bool,
    differentiates: bool,
    group: "dist.ProcessGroup | None",
) -> tuple[FilteredMoments, Tensor]:
    """The filtered moments of all processes' values, and which processes differentiate."""
    backend, channels, values = backend_of(x), x.shape[1], x.numel() // x.shape[1]
    local = x.new_zeros(2, channels, dtype=torch.float64)
    facts = [local.new_full((1,), fact) for fact in (values, differentiates)]
    measured = None
    if values:
        mean, var, measured = backend.measure(x)
        local = torch.stack((mean, var)).double()
    of_all = _gather(torch.cat((local.flatten(), *facts)), group)
    counts, who = of_all[:, -2:].unbind(1)
    mean, var, count = _together(*of_all[:, :-2].unflatten(1, (2, channels)).unbind(1), counts[:, None])
    # Looked at where it matters only: reading a number makes a GPU's host wait.
    if values < 2 and counts.sum() == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got 1 on {len(counts)} processes, and here input "
            f"size {x.shape}"
        )

    wide = accumulate_dtype(x.dtype)
    mean, var, count = mean.to(wide), var.to(wide), count.expand(channels).to(wide)
    if math.isinf(t_sigma):
        edge = torch.full_like(mean, math.inf)
        return FilteredMoments(mean, var, -edge, edge, count), who
    lower, upper = band(mean, var, t_sigma, eps)
    local = x.new_zeros(3, channels, dtype=torch.float64)
    if values:
        mean, var, count = backend.measure_kept(x, lower, upper, measured)
        local = torch.where(count > 0, torch.stack((mean, var, count)).double(), 0)
    mean, var, count = _together(*_gather(local.flatten(), group).unflatten(1, (3, channels)).unbind(1))
    if gaussian_correction:
        var = var / gaussian_kappa(t_sigma)
    return FilteredMoments(mean.to(wide), var.to(wide), lower, upper, count.to(wide)), who


def _gather(numbers: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """Each process's ``numbers``, one row a process."""
    # Into one tensor: a list of rows costs a copy for each process. Later releases of PyTorch have another name for it.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    processes = dist.get_world_size(group)
    rows = numbers.new_empty(processes * len(numbers))
    gather(rows, numbers, group=group)
    return rows.view(processes, -1)


def _together(mean: Tensor, var: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of all values, ``(C,)``, from those of shares, ``(shares, C)``; NaN where there
    is no value, or where a share has one. The counts may be one a share."""
    total = count.sum(0)
    center = (count * mean).sum(0) / total
    squares = (count * (var + (mean - center).square())).sum(0)
    return center, squares / total, total


class _Normalize(torch.autograd.Function):
    """Normalization by moments of all processes, and a gradient that knows of all of them."""

    @staticmethod
    def forward(ctx, x, weight, bias, moments, eps, grad_mode, kappa, group):
        ctx.save_for_backward(x, weight, moments)
        ctx.options = eps, grad_mode, kappa, group
        if x.numel() == 0:
            return torch.empty_like(x)
        return backend_of(x).normalize(x, weight, bias, moments, 0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, moments = ctx.saved_tensors
        eps, grad_mode, kappa, group = ctx.options
        backend, count = backend_of(x), FilteredMoments(*moments).count
        d_weight = d_bias = torch.zeros_like(count)
        if x.numel():
            d_weight, d_bias = backend.gradient_sums(grad, x, moments, eps, grad_mode)
        sums = torch.stack((d_bias, d_weight)).double()
        dist.all_reduce(sums, group=group)
        if x.numel() and ctx.needs_input_grad[0]:
            scale = 1.0 if weight is None else weight.double()
            mean_g, mean_g_xhat = sums * scale / count.double()
            dx = backend.input_gradient(grad, x, weight, moments, eps, grad_mode, mean_g, mean_g_xhat / kappa)
        else:
            dx = torch.zeros_like(x)
        _, of_weight, of_bias, *_ = ctx.needs_input_grad
        return dx, d_weight if of_weight else None, d_bias if of_bias else None, *(None,) * 5
