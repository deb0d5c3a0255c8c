"""Optimizer groups by module type: a slower learning rate for the scale of batch norms, no weight decay on norms and
biases. Source: Davis and Frank, "Revisiting Batch Norm Initialization" (2022), sections 3.2 and 4.2.
"""

import fnmatch
import math

from torch import nn

from fbn_plugin.adapters import load_adapters
from fbn_plugin.layers.description import describe


def param_groups(model: nn.Module, lr: float, weight_decay: float, scale_lr_divisor: float = 100.0) -> list[dict]:
    """Groups of ``model``'s trainable parameters for any optimizer, each parameter once.

    The scale (``weight``) of a batch normalization, and of any other norm with a ``gamma_init``, learns at
    ``lr / scale_lr_divisor``. No decay is put on the parameters of norms (ConvNorm's kernels and LearnedNorm's networks
    are such), on biases, and on what a module names in ``no_weight_decay()`` (timm's convention: names or wildcards,
    relative to the module). The second parameter of ScaledBN-A2, lambda, learns at the full rate: the paper slows the
    scale alone.

    The ratio outlasts whatever multiplies the rate of each group: torch's schedulers and detectron2's. timm's warm up
    from, and end at, one rate for all groups, so for them there is
    :func:`fbn_plugin.frameworks.timm.param_groups`.

    Args:
        model: what is to be trained.
        lr: learning rate, above 0.
        weight_decay: of everything else, 0 or more.
        scale_lr_divisor: the paper's c, above 0. 1 is the rate of all others: the paper's baseline.

    Returns:
        At most three groups with ``params``, ``lr`` and ``weight_decay``: what decays, what does not, and the scales.

    Raises:
        ValueError: a value out of range.

    Examples::

        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), fbn_plugin.ScaledBatchNorm2d(8))
        >>> groups = fbn_plugin.param_groups(model, lr=0.1, weight_decay=1e-4)
        >>> [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups]
        [(0.1, 0.0001, 1), (0.1, 0.0, 2), (0.001, 0.0, 1)]
        >>> optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    """
    load_adapters()
    for name, value in (("lr", lr), ("scale_lr_divisor", scale_lr_divisor)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0 and finite, got {value!r}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be 0 or more and finite, got {weight_decay!r}")
    scales, norms, named = (given(model) for given in (batch_scales, norm_parameters, named_without_decay))
    members: tuple[list, list, list] = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter in norms or parameter in named or "bias" in name.rpartition(".")[2].split("_")
        members[2 if parameter in scales else int(plain)].append(parameter)
    settings = (lr, weight_decay), (lr, 0.0), (lr / scale_lr_divisor, 0.0)
    return [
        {"params": params, "lr": rate, "weight_decay": decay}
        for params, (rate, decay) in zip(members, settings)
        if params
    ]


def batch_scales(model: nn.Module) -> set[nn.Parameter]:
    """The scales of batch normalizations, and of any other norm with a ``gamma_init``."""
    found = set()
    for module in model.modules():
        norm = describe(module)
        if hasattr(module, "gamma_init") or (norm is not None and norm.has_batch_scale):
            found.add(dict(module.named_parameters(recurse=False)).get("weight"))
    return found - {None}


def norm_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of all norms, those of networks that are part of a norm included."""
    found = set()
    for module in model.modules():
        norm = describe(module)
        if norm is not None:
            found.update(module.parameters(recurse=norm.owns_children))
    return found


def named_without_decay(model: nn.Module, norms_only: bool = False) -> set[nn.Parameter]:
    """The parameters that modules, or norms alone, name in ``no_weight_decay()``."""
    found = set()
    for module in model.modules():
        if hasattr(module, "no_weight_decay") and not (norms_only and describe(module) is None):
            patterns = module.no_weight_decay()
            for name, parameter in module.named_parameters(remove_duplicate=False):
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                    found.add(parameter)
    return found
