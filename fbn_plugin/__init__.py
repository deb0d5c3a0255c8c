"""Filtered batch normalization and its relatives for detectron2, timm, torchvision and plain PyTorch.

``import fbn_plugin`` imports torch and nothing heavier; a framework is imported by :func:`register`.
"""

from torch import nn

from fbn_plugin import convert, frameworks, fuse, ops
from fbn_plugin.balanced import BalancedBatchSampler, batch_moments, evaluate_balanced, self_label
from fbn_plugin.frameworks import register, unregister
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
    LayerNorm2d,
    LearnedStatsNorm2d,
)
from fbn_plugin.population import update_population_stats
from fbn_plugin.registry import NORMS, get_norm, norm_factory, parse_spec

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
    "LayerNorm2d",
    "LearnedStatsNorm2d",
    "batch_moments",
    "convert_norm",
    "evaluate_balanced",
    "fuse_norm_act",
    "get_norm",
    "norm_factory",
    "ops",
    "parse_spec",
    "register",
    "self_label",
    "unregister",
    "update_population_stats",
]


def convert_norm(model: nn.Module, spec: str) -> nn.Module:
    frameworks.load_converters()
    return convert.convert_norm(model, spec)


convert_norm.__doc__ = convert.convert_norm.__doc__


def fuse_norm_act(model: nn.Module) -> nn.Module:
    frameworks.load_converters()
    return fuse.fuse_norm_act(model)


fuse_norm_act.__doc__ = fuse.fuse_norm_act.__doc__
