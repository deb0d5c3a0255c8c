"""Normalization layers: parameters, buffers and ``state_dict`` around :mod:`fbn_plugin.ops`. One family a file."""

from fbn_plugin.layers.conv_norm import ConvNorm2d, LearnedStatsNorm2d
from fbn_plugin.layers.filter_response_norm import FilteredFilterResponseNorm2d, FilterResponseNorm2d
from fbn_plugin.layers.filtered_batch_norm import FilteredBatchNorm1d, FilteredBatchNorm2d, FilteredBatchNorm3d
from fbn_plugin.layers.filtered_batch_norm_act import FilteredBatchNormAct2d
from fbn_plugin.layers.filtered_group_norm import (
    FilteredGroupNorm,
    FilteredInstanceNorm2d,
    FilteredLayerNorm2d,
    LayerNorm2d,
)

__all__ = [
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
]
