"""Filtered batch normalization and its relatives for detectron2, timm, torchvision and plain PyTorch.

``import fbn_plugin`` imports torch and nothing heavier; a framework is imported by :func:`register`.
"""

import functools

from torch import nn

from fbn_plugin import convert, fold, frameworks, fuse, ops
from fbn_plugin import input_norm as _input_norm
from fbn_plugin import param_groups as _param_groups
from fbn_plugin.balanced import BalancedBatchSampler, batch_moments, evaluate_balanced, self_label
from fbn_plugin.frameworks import register, unregister
from fbn_plugin.gamma_init import apply_gamma_init
from fbn_plugin.layers import (
    ConvNorm2d,
    FilteredBatchNorm1d,
    FilteredBatchNorm2d,
    FilteredBatchNorm3d,
    FilteredBatchNormAct2d,
    FilteredFilterResponseNorm2d,
    FilteredGroupNorm,
    FilteredInstanceNorm2d,
    FilteredLayerNorm2d,
    FilterResponseNorm2d,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    GatedBatchNorm2d,
    InputNorm2d,
    InstanceEnhancementBatchNorm2d,
    LayerNorm2d,
    LearnedStatsNorm2d,
    RepresentativeBatchNorm2d,
    ScaledBatchNorm1d,
    ScaledBatchNorm2d,
    ScaledBatchNorm3d,
    ScaledBatchNormA1,
    ScaledBatchNormA2,
)
from fbn_plugin.norm_report import NormReport
from fbn_plugin.population import update_population_stats
from fbn_plugin.registry import NORMS, get_norm, norm_factory, parse_spec
from fbn_plugin.revised_init import revised_init

__version__ = "0.1.0"

__all__ = [
    "NORMS",
    "BalancedBatchSampler",
    "ConvNorm2d",
    "FilterResponseNorm2d",
    "FilteredBatchNorm1d",
    "FilteredBatchNorm2d",
    "FilteredBatchNorm3d",
    "FilteredBatchNormAct2d",
    "FilteredFilterResponseNorm2d",
    "FilteredGroupNorm",
    "FilteredInstanceNorm2d",
    "FilteredLayerNorm2d",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "GatedBatchNorm2d",
    "InputNorm2d",
    "InstanceEnhancementBatchNorm2d",
    "LayerNorm2d",
    "LearnedStatsNorm2d",
    "NormReport",
    "RepresentativeBatchNorm2d",
    "ScaledBatchNorm1d",
    "ScaledBatchNorm2d",
    "ScaledBatchNorm3d",
    "ScaledBatchNormA1",
    "ScaledBatchNormA2",
    "apply_gamma_init",
    "batch_moments",
    "convert_norm",
    "evaluate_balanced",
    "fold_norms",
    "fuse_norm_act",
    "get_norm",
    "norm_factory",
    "ops",
    "param_groups",
    "parse_spec",
    "prepend_input_norm",
    "register",
    "revised_init",
    "self_label",
    "unregister",
    "update_population_stats",
]


@functools.wraps(convert.convert_norm)
def convert_norm(model: nn.Module, *args, **kwargs) -> nn.Module:
    frameworks.load_converters()
    return convert.convert_norm(model, *args, **kwargs)


@functools.wraps(fold.fold_norms)
def fold_norms(model: nn.Module, *args, **kwargs) -> nn.Module:
    frameworks.load_converters()
    return fold.fold_norms(model, *args, **kwargs)


def fuse_norm_act(model: nn.Module) -> nn.Module:
    frameworks.load_converters()
    return fuse.fuse_norm_act(model)


fuse_norm_act.__doc__ = fuse.fuse_norm_act.__doc__


def param_groups(model: nn.Module, lr: float, weight_decay: float, scale_lr_divisor: float = 100.0) -> list[dict]:
    frameworks.load_converters()
    return _param_groups.param_groups(model, lr, weight_decay, scale_lr_divisor)


param_groups.__doc__ = _param_groups.param_groups.__doc__


def prepend_input_norm(model: nn.Module, gamma_init: float = 0.1) -> nn.Module:
    frameworks.load_converters()
    return _input_norm.prepend_input_norm(model, gamma_init)


prepend_input_norm.__doc__ = _input_norm.prepend_input_norm.__doc__
