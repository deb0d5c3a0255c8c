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
from fbn_plugin.layers.frozen_batch_norm import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from fbn_plugin.layers.gated_batch_norm import (
    GatedBatchNorm2d,
    InstanceEnhancementBatchNorm2d,
    RepresentativeBatchNorm2d,
)
from fbn_plugin.layers.instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from fbn_plugin.layers.per_activation_batch_norm import PerActivationBatchNorm2d
from fbn_plugin.layers.scaled_batch_norm import (
    InputNorm2d,
    ScaledBatchNorm1d,
    ScaledBatchNorm2d,
    ScaledBatchNorm3d,
    ScaledBatchNormA1,
    ScaledBatchNormA2,
)
from fbn_plugin.layers.sync_filtered_batch_norm import SyncFilteredBatchNorm

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
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "GatedBatchNorm2d",
    "InputNorm2d",
    "InstanceEnhancementBatchNorm2d",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm2d",
    "LearnedStatsNorm2d",
    "PerActivationBatchNorm2d",
    "RepresentativeBatchNorm2d",
    "ScaledBatchNorm1d",
    "ScaledBatchNorm2d",
    "ScaledBatchNorm3d",
    "ScaledBatchNormA1",
    "ScaledBatchNormA2",
    "SyncFilteredBatchNorm",
]
