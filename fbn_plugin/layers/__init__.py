"""Normalization layers: parameters, buffers and ``state_dict`` around :mod:`fbn_plugin.ops`. One family a file."""

from fbn_plugin.layers.filtered_batch_norm import FilteredBatchNorm1d, FilteredBatchNorm2d, FilteredBatchNorm3d
from fbn_plugin.layers.filtered_batch_norm_act import FilteredBatchNormAct2d
from fbn_plugin.layers.filtered_group_norm import (
    FilteredGroupNorm,
    FilteredInstanceNorm2d,
    FilteredLayerNorm2d,
    LayerNorm2d,
)
from fbn_plugin.layers.frozen_batch_norm import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d

__all__ = [
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
]
