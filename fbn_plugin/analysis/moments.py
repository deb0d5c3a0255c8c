"""The consistency of a batch's moments: how far mean and variance that a norm takes of a few of a batch's images are
from those of the whole batch, layer by layer.

Source: Horváth and Al-afandi, "Filtered Batch Normalization" (2020), section IV-B and Fig. 9. What the paper leaves
open stands in docs/landscape.md.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from statistics import fmean

import torch
from torch import nn

from fbn_plugin.analysis.state import buffers_kept
from fbn_plugin.layers.description import describe
from fbn_plugin.layers.filtered_batch_norm import FilteredBatchNormMixin
from fbn_plugin.ops import reference
from fbn_plugin.registry import get_norm
from fbn_plugin.training.population_statistics import batch_statistics

__all__ = ["MomentDistance", "batch_norms", "check_norm", "flat_distances", "measure_moments"]


@dataclass(frozen=True)
class MomentDistance:
    """How far the moments of some images are from those of the whole batch, as means over a layer's channels.

    Args:
        mean: absolute difference of the means, in the unit of the activations.
        var: absolute difference of the biased variances, in that unit's square.
        relative_mean: the first in deviations of the whole batch.
        relative_var: the second in variances of the whole batch.
    """

    mean: float
    var: float
    relative_mean: float
    relative_var: float


Distances = dict[str, dict[str, MomentDistance]]


def check_norm(spec: str) -> None:
    """Refuse a norm that has no moments of a part of a batch.

    Raises:
        ValueError: it is no spec, or neither plain nor filtered batch normalization.
    """
    norm = get_norm(spec, 4)
    described = None if norm is None else describe(norm)
    plain = isinstance(norm, FilteredBatchNormMixin) or not hasattr(norm, "batch_statistics")
    if described is None or described.family != "BN" or described.synchronized or not plain:
        raise ValueError(f"{spec!r} is neither BN nor FBN, whose moments of some images can be told")


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of the norms in training mode whose moments are those of a batch."""
    return {
        name: module
        for name, module in model.named_modules()
        if module.training and (described := describe(module)) is not None and described.family == "BN"
    }


@torch.no_grad()
def measure_moments(
    model: nn.Module, forward: Callable[[], object], chosen: Sequence[int], norms: Sequence[str]
) -> Distances:
    """Compare the moments of some images with those of the batch that they are in, at the inputs of each batch norm.

    The batch passes once through the model, which normalizes by the whole batch as it does in training; at each norm
    the values of some images are taken out, and their mean and variance are computed by each of ``norms``. What they
    are compared with are plain mean and variance of the whole batch, whatever norm the model has. Buffers, such as
    running statistics, do not change.

    Args:
        model: in training mode.
        forward: passes the batch through it; the images are the first dimension of what the norms get.
        chosen: which images, from 0.
        norms: specs of plain or filtered batch normalization, ``"BN"`` or ``"FBN(t_sigma=2)"``.

    Returns:
        ``{layer: {spec: distance}}``, in the order of the calls. A layer that the pass uses several times has the means
        over its calls.

    Raises:
        ValueError: no batch norm, none that the pass reaches, a norm that is another one, or images that a norm's input
            does not have, as where a model merges its first dimensions.

    Examples::

        >>> from fbn_plugin.analysis.moments import measure_moments
        >>> norm, x = nn.BatchNorm1d(1), torch.tensor([[1.0], [3.0], [2.0], [6.0]])
        >>> found = measure_moments(nn.Sequential(norm), lambda: norm(x), [0, 1], ["BN"])["0"]["BN"]
        >>> found.mean, found.var  # 2 and 1 of the first two, 3 and 3.5 of all
        (1.0, 2.5)
    """
    for spec in norms:
        check_norm(spec)
    layers, found = batch_norms(model), {}
    if not layers:
        raise ValueError(f"no batch norm of the {type(model).__name__} is in training mode, to compare its moments")
    hooks = [
        layer.register_forward_pre_hook(functools.partial(_look, found, name, list(chosen), norms), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        with buffers_kept(model):
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise ValueError(f"no value reached a batch norm, of which there are {len(layers)}")
    return {name: {spec: _mean([call[spec] for call in calls]) for spec in norms} for name, calls in found.items()}


def _look(
    found: dict[str, list[dict[str, MomentDistance]]],
    name: str,
    chosen: Sequence[int],
    norms: Sequence[str],
    layer: nn.Module,
    args: tuple,
    kwargs: dict,
) -> None:
    x = args[0] if args else kwargs["input"]
    if not x.numel():
        return
    if max(chosen) >= len(x):
        what = f"{name or 'the norm'!r} gets {len(x)} images, and {max(chosen)} was to be one of them, counted from 0"
        raise ValueError(what)
    x = x.to(reference.accumulate_dtype(x.dtype))
    x = x.reshape(*x.shape[:2], -1, 1)  # for a norm of two dimensions, whatever the layer's are
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    scale = var + layer.eps
    distances = {}
    for spec in norms:
        norm = get_norm(spec, x.shape[1], device=x.device)
        part_mean, part_var, _ = batch_statistics(norm, x[chosen])
        off, wide = (part_mean - mean).abs(), (part_var - var).abs()
        values = off, wide, off / scale.sqrt(), wide / scale
        distances[spec] = MomentDistance(*(value.mean().item() for value in values))
    found.setdefault(name, []).append(distances)


def _mean(distances: Sequence[MomentDistance]) -> MomentDistance:
    return MomentDistance(*map(fmean, zip(*map(astuple, distances))))


def flat_distances(distances: Distances) -> dict[str, float]:
    """What a run records: ``LAYER/SPEC/mean``, ``LAYER/SPEC/var`` and so on, and the means over the layers as
    ``SPEC/mean`` and so on.

    Examples::

        >>> from fbn_plugin.analysis.moments import MomentDistance, flat_distances
        >>> figures = flat_distances({"norm1": {"BN": MomentDistance(1.0, 2.0, 3.0, 4.0)}})
        >>> figures["norm1/BN/var"], figures["BN/relative_mean"]
        (2.0, 3.0)
    """
    specs = next(iter(distances.values()))
    over_layers = {spec: _mean([layer[spec] for layer in distances.values()]) for spec in specs}
    groups = {f"{name}/{spec}": found for name, layer in distances.items() for spec, found in layer.items()}
    names = [field.name for field in fields(MomentDistance)]
    return {
        f"{group}/{name}": getattr(found, name) for group, found in {**groups, **over_layers}.items() for name in names
    }
