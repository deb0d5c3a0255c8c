"""Filtered batch normalization and its relatives for detectron2, timm, torchvision and plain PyTorch.

``import fbn_plugin`` imports torch and nothing heavier; a framework is imported by :func:`register`.
"""

import functools

from torch import nn

from fbn_plugin import convert, fold, frameworks, fuse, ops
from fbn_plugin.frameworks import register, unregister
from fbn_plugin.layers import (
    FilteredBatchNorm1d,
    FilteredBatchNorm2d,
    FilteredBatchNorm3d,
    FilteredBatchNormAct2d,
    FilteredGroupNorm,
    FilteredInstanceNorm2d,
    FilteredLayerNorm2d,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    LayerNorm2d,
)
from fbn_plugin.norm_report import NormReport
from fbn_plugin.registry import NORMS, get_norm, norm_factory, parse_spec

__version__ = "0.1.0"

__all__ = [
    "NORMS",
    "FilteredBatchNorm1d",
    "FilteredBatchNorm2d",
    "FilteredBatchNorm3d",
    "FilteredBatchNormAct2d",
    "FilteredGroupNorm",
    "FilteredInstanceNorm2d",
    "FilteredLayerNorm2d",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "LayerNorm2d",
    "NormReport",
    "convert_norm",
    "fold_norms",
    "fuse_norm_act",
    "get_norm",
    "norm_factory",
    "ops",
    "parse_spec",
    "register",
    "unregister",
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
