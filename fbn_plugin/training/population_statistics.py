"""Population statistics: batch norms' running statistics computed anew from data, for the weights as they are.

Source: Ioffe and Szegedy, "Batch Normalization" (2015), Algorithm 2 and section 3.1; for the filter, Horváth and
Al-afandi, "Filtered Batch Normalization" (2020), Eq. 2-7.
"""

import contextlib
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from fbn_plugin.adapters import load_adapters
from fbn_plugin.layers.description import check_moments
from fbn_plugin.layers.filtered_batch_norm import FilteredBatchNormMixin
from fbn_plugin.ops import reference
from fbn_plugin.training.evaluation_modes import batch_moments, evaluation_mode

Forward = Callable[[nn.Module, Any], Any]


@torch.no_grad()
def update_population_stats(
    model: nn.Module,
    loader: Iterable[Any],
    num_batches: int | None = None,
    exact: bool = False,
    forward: Forward | None = None,
) -> None:
    """Set the running statistics of batch norms to those of the loader's data (Ioffe and Szegedy 2015, Algorithm 2).

    ``running_mean`` becomes the mean of the batches' means, ``running_var`` the mean of their unbiased variances
    ``m / (m - 1) * var``, where m is the number of values that a moment is of: for filtered norms the kept ones. Each
    batch counts alike, and each call of a layer that a forward pass uses several times is a batch.

    With ``exact`` they are the moments of all values together, so that the same data in other batches, or on another
    number of processes, gives the same answer. Layer after layer, in the order of their calls, the data pass through
    the network in evaluation, each layer normalizing by its new statistics. The filter needs a second pass: its band is
    drawn from the moments of all values. That costs a pass over the data, up to that layer, for each layer and call,
    two if it filters, and one in advance. For its k-th call in a forward pass a layer has the statistics of the k - 1
    calls before it.

    What is updated: batch norms in training mode that have running statistics; call ``model.train()`` before. Those in
    evaluation mode and frozen ones normalize by the statistics that they have, and keep them. A layer that no value
    reaches keeps its own. The rest of the model runs in evaluation mode: dropout is off, other modules' state does not
    change, none of them draws random numbers, detectors run inference and need no targets. No parameter, gradient,
    ``momentum``, ``num_batches_tracked`` or training flag changes, and no statistics at all if something fails.

    With ``torch.distributed``, call it in every process, each with its own share of the data: shares of all sizes
    count, and every process ends with the same statistics. A synchronized norm is measured on each process's own
    batches: no process waits in the middle of a pass for one that has fewer.

    Args:
        model: a model or its ``DistributedDataParallel``.
        loader: training batches. ``exact`` iterates over it many times and needs the same data each time.
        num_batches: how many batches of each process to use at most; None for all.
        exact: pool all values; for plain and filtered batch norms.
        forward: called with the model (out of ``DistributedDataParallel``) and a batch. By default, ``(input,
            target)`` pairs, torchvision's ``(images, targets)``, tensors and whatever else the model takes as it is
            (detectron2's list of dicts) are understood; tensors are moved to the model's device.

    Raises:
        ValueError: no batch norm in training mode, one whose moments are not known (with a forward of its own, and
            neither a method ``batch_statistics`` nor a description, see :class:`fbn_plugin.NormDescription`), no value
            reached one, statistics that are not finite, or larger than a float16 buffer holds, or for ``exact`` an
            iterator that can be used only once or a norm whose moments cannot be pooled.

    Examples::

        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), fbn_plugin.FilteredBatchNorm2d(8)).train()
        >>> loader = [torch.randn(4, 3, 16, 16) for _ in range(3)]
        >>> fbn_plugin.update_population_stats(model, loader)
        >>> bool(model[1].running_var.eq(1).any())  # no longer what it started at
        False
    """
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"num_batches must be at least 1 or None, got {num_batches}")
    if isinstance(model, DistributedDataParallel):  # its forward would exchange buffers
        model = model.module
    norms = norms_to_update(model)
    load_adapters()
    check_moments(norms.values())
    if not norms:
        raise ValueError("the model has no batch norm in training mode to update: call model.train() before")
    forward = forward or functools.partial(forward_batch, device=next(iter(norms.values())).running_mean.device)

    run = functools.partial(_run, model, norms, loader, num_batches, forward)
    with evaluation_mode(model):
        found = _exact_statistics(norms, run, loader) if exact else _algorithm_2(norms, run)
    if not found:
        raise ValueError(f"no value reached a batch norm, of which there are {len(norms)}: is the loader empty?")
    _write(norms, found)


def norms_to_update(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of what :func:`update_population_stats` updates: batch norms in training mode that have running
    statistics."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.training and module.running_mean is not None
    }


def forward_batch(model: nn.Module, batch: Any, device: torch.device) -> Any:
    """Call ``model`` with the inputs in ``batch``, on ``device``."""
    pair = isinstance(batch, (tuple, list)) and len(batch) > 0 and isinstance(batch[0], (Tensor, tuple, list))
    inputs = batch[0] if pair else batch
    if isinstance(inputs, Tensor):
        return model(inputs.to(device))
    if isinstance(inputs, (tuple, list)):
        inputs = [item.to(device) if isinstance(item, Tensor) else item for item in inputs]
    return model(inputs)


class _SeenEnough(Exception):
    """Ends a forward pass at a norm behind which nothing is of interest."""


def _run(
    model: nn.Module,
    norms: dict[str, nn.Module],
    loader: Iterable[Any],
    num_batches: int | None,
    forward: Forward,
    look: Callable[[str, int, Tensor], None],
) -> None:
    """Pass the data through ``model``; before the k-th call of a norm in a forward pass, ``look(name, k, input)``,
    unless the input is empty."""
    calls = Counter()

    def before(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls[name] += 1
        x = args[0] if args else kwargs["input"]
        if x.numel():
            look(name, calls[name], x)

    handles = [
        norm.register_forward_pre_hook(functools.partial(before, name), with_kwargs=True)
        for name, norm in norms.items()
    ]
    try:
        for batch in itertools.islice(loader, num_batches):
            calls.clear()
            with contextlib.suppress(_SeenEnough):
                forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def _sum_over_processes(tensor: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def _unbiased(var: Tensor, count: Tensor) -> Tensor:
    return var * (count / (count - 1).clamp_min(1))


def _write(norms: dict[str, nn.Module], found: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Put mean and variance into the buffers: of all layers, or, with an error, of none."""
    for name, (mean, var) in found.items():
        if not (mean.isfinite().all() and var.isfinite().all()):
            raise ValueError(f"the statistics of {name or 'the norm'!r} are not finite: its input has NaN or infinity")
        for buffer, values in {"running_mean": mean, "running_var": var}.items():
            dtype = getattr(norms[name], buffer).dtype
            if (largest := values.abs().max().item()) > torch.finfo(dtype).max:
                raise ValueError(
                    f"the {buffer} of {name or 'the norm'!r} is {largest:.4g}, more than its {str(dtype)[6:]} buffer "
                    "holds: compute it with the norms in float32, as by model.float()"
                )
    for name, (mean, var) in found.items():
        for buffer, values in ((norms[name].running_mean, mean), (norms[name].running_var, var)):
            buffer.resize_(values.shape).copy_(values)  # another shape where a norm knows its positions only now


def batch_statistics(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance, number of values, as ``norm`` has them in training."""
    if hasattr(norm, "batch_statistics"):
        return norm.batch_statistics(x)
    x = x.to(reference.accumulate_dtype(x.dtype))
    var, mean = torch.var_mean(x, dim=(0, *range(2, x.dim())), correction=0)
    return mean, var, torch.full_like(mean, x.numel() // x.shape[1])


def _algorithm_2(norms: dict[str, nn.Module], run: Callable) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of each layer that was called, by averaging over batches."""
    totals = {
        name: norm.running_mean.new_zeros(3, norm.num_features, dtype=torch.float64) for name, norm in norms.items()
    }

    def add(name: str, number: int, x: Tensor) -> None:
        mean, var, count = batch_statistics(norms[name], x)
        found = torch.stack((mean, _unbiased(var, count), torch.ones_like(mean)))
        if found.shape != totals[name].shape:  # of a norm per activation, whose first call tells the positions
            totals[name] = totals[name].new_zeros(found.shape)
        totals[name] += found

    with batch_moments(nn.ModuleList(norms.values())):
        run(add)
    for total in totals.values():
        _sum_over_processes(total)
    return {name: (mean / calls, var / calls) for name, (mean, var, calls) in totals.items() if calls[0] > 0}


def _exact_statistics(
    norms: dict[str, nn.Module], run: Callable, loader: Iterable[Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of each layer that was called, by pooling all values, layer after layer."""
    if isinstance(loader, Iterator):
        raise ValueError("exact statistics pass over the data many times: give a loader, not an iterator")
    for name, norm in norms.items():
        if hasattr(norm, "batch_statistics") and not isinstance(norm, FilteredBatchNormMixin):
            kind = type(norm).__name__
            raise ValueError(f"exact statistics are those of plain and filtered batch norms, {name!r} is a {kind}")
    before = {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in norms.items()}
    found = {}
    try:
        for name, calls in _order_of_calls(run):
            norm = norms[name]
            mean, var, count = _pool(norm, name, calls, run)
            if isinstance(norm, FilteredBatchNormMixin) and not math.isinf(norm.t_sigma):
                edges = reference.band(mean, var, norm.t_sigma, norm.eps)
                mean, var, count = _pool(norm, name, calls, run, edges)
                if norm.gaussian_correction:
                    var = var / reference.gaussian_kappa(norm.t_sigma)
            found[name] = mean, _unbiased(var, count)
            _write(norms, {name: found[name]})
    finally:
        for name, (mean, var) in before.items():
            norms[name].running_mean.copy_(mean)
            norms[name].running_var.copy_(var)
    return found


def _order_of_calls(run: Callable) -> list[tuple[str, int]]:
    """``(name, k)`` for the k-th call of a layer in a forward pass, in the order of the calls; the same on every
    process."""
    order = {}
    run(lambda name, number, x: order.setdefault((name, number)))
    orders = [list(order)]
    if dist.is_available() and dist.is_initialized():
        orders = [None] * dist.get_world_size()
        dist.all_gather_object(orders, list(order))
    return list(dict.fromkeys(itertools.chain.from_iterable(orders)))


def _pool(
    norm: nn.Module, name: str, calls: int, run: Callable, edges: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of the values of a layer's first ``calls`` calls in each forward pass, on all
    processes, if they lie between two edges."""
    count, mean, squares = norm.running_mean.new_zeros(3, norm.num_features, dtype=torch.float64)

    def add(called: str, number: int, x: Tensor) -> None:
        nonlocal count, mean, squares
        if called != name or number > calls:
            return
        x = x.double()
        reduced = (0, *range(2, x.dim()))
        if edges is None:
            v, m = torch.var_mean(x, dim=reduced, correction=0)
            n = torch.full_like(m, x.numel() // x.shape[1])
        else:
            lower, upper = (edge.view(-1, *(1,) * (x.dim() - 2)) for edge in edges)
            m, v, n = (moment.flatten() for moment in reference.kept_moments(x, reduced, lower, upper))
            m, v = (torch.where(n > 0, moment, 0) for moment in (m, v))
        together = (count + n).clamp_min(1)
        squares = squares + v * n + (m - mean).square() * count * n / together
        mean = mean + (m - mean) * n / together
        count = count + n
        if number == calls:
            raise _SeenEnough

    run(add)
    total = _sum_over_processes(count.clone())
    center = _sum_over_processes(count * mean) / total
    squares = _sum_over_processes(squares + count * (mean - center).square())
    return center, squares / total, total
