"""Parameter groups for timm's optimizers and schedules: norms are told by their type, where timm looks at names and
shapes.

timm asks the top of a model alone for ``no_weight_decay()``, and decays whatever has more than one dimension
(timm/optim/_param_groups.py, read in 1.0.21 and 1.0.31): the kernels and networks of norms that are somewhere in it.
"""

import glob
import inspect
from collections.abc import Callable
from typing import Any

from timm.optim import param_groups_layer_decay as timm_layer_decay
from torch import nn

from fbn_plugin.frameworks import replacement
from fbn_plugin.layers import InputNorm2d
from fbn_plugin.training.parameter_groups import named_without_decay, norm_parameters
from fbn_plugin.training.parameter_groups import param_groups as divided_groups

__all__ = ["REPLACED", "by_layer", "param_groups", "weight_decay_groups"]


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    scale_lr_divisor: float = 100.0,
    *,
    layer_decay: float | None = None,
) -> list[dict]:
    """:func:`fbn_plugin.param_groups` for timm's schedulers, which know two absolute rates, ``warmup_lr`` and
    ``min_lr``: all groups have the rate ``lr``, and a share ``lr_scale`` that timm's schedulers multiply theirs with.

    Without a scheduler of timm's the share has no effect.

    Args:
        model: what is to be trained.
        lr: learning rate, above 0.
        weight_decay: of everything else, 0 or more.
        scale_lr_divisor: the paper's c, above 0. 1 is the rate of all others: the paper's baseline.
        layer_decay: share of the rate of the layer behind it that each layer learns at, as timm has it.

    Raises:
        ValueError: a value out of range.
    """
    groups = divided_groups(model, lr, weight_decay, scale_lr_divisor)
    groups = [{**group, "lr": lr, "lr_scale": group["lr"] / lr} for group in groups]
    return groups if layer_decay is None else by_layer(model, groups, layer_decay)


def weight_decay_groups(model: nn.Module, weight_decay: float, filter_bias_and_bn: bool = True) -> list[dict]:
    """timm's two groups: what does not decay, and what does.

    Args:
        model: what is to be trained.
        weight_decay: 0 or more.
        filter_bias_and_bn: what has one dimension, biases and the parameters of norms do not decay. Without, all decays
            but what modules name in ``no_weight_decay()``.
    """
    exempt = named_without_decay(model)
    names = {glob.escape(name) for name, parameter in model.named_parameters() if parameter in exempt}
    if filter_bias_and_bn:
        return _param_groups_weight_decay(model, weight_decay, no_weight_decay_list=names)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    members = [p for p in trained if p in exempt], [p for p in trained if p not in exempt]
    return [{"params": params, "weight_decay": decay} for params, decay in zip(members, (0.0, weight_decay)) if params]


def by_layer(model: nn.Module, groups: list[dict], layer_decay: float) -> list[dict]:
    """Each group in as many as there are layers, as timm tells these, whose ``lr_scale`` falls towards the input.

    A prepended input norm learns as the first layer does. A model that timm finds no layers in stays as it is.

    Args:
        model: what the groups are of.
        groups: each with ``params``, and perhaps an ``lr_scale``.
        layer_decay: share of the rate of the layer behind it that each layer learns at.
    """
    layers = timm_layer_decay(model, weight_decay=0.0, layer_decay=layer_decay)
    scales = {parameter: layer["lr_scale"] for layer in layers for parameter in layer["params"]}
    for module in model.modules():
        if isinstance(module, InputNorm2d):
            scales.update(dict.fromkeys(module.parameters(), min(scales.values())))
    split: list[dict] = []
    for group in groups:
        members: dict[float, list] = {}
        for parameter in group["params"]:
            members.setdefault(scales[parameter], []).append(parameter)
        for scale, params in members.items():
            split.append({**group, "params": params, "lr_scale": group.get("lr_scale", 1.0) * scale})
    return split


def _exempting(theirs: Callable[..., list[dict]]) -> Callable[..., list[dict]]:
    """A function of timm's that makes groups, told of the norms in the model."""
    signature = inspect.signature(theirs)

    def groups(*args: Any, **kwargs: Any) -> list[dict]:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        model = given.arguments["model"]
        exempt = named_without_decay(model, norms_only=True)
        if given.arguments.get("weight_decay_exclude_1d", True):
            exempt |= norm_parameters(model)
        names = {glob.escape(name) for name, parameter in model.named_parameters() if parameter in exempt}
        given.arguments["no_weight_decay_list"] = {*given.arguments["no_weight_decay_list"], *names}
        return theirs(*given.args, **given.kwargs)

    return groups


_NAMES = ("timm.optim.param_groups_weight_decay", "timm.optim.param_groups_layer_decay")
# What register() puts in the place of timm's.
REPLACED = {name: _exempting(replacement.original(name)) for name in _NAMES}
_param_groups_weight_decay = REPLACED[_NAMES[0]]
