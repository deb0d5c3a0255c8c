"""Filtered batch normalization and its relatives for detectron2, timm, torchvision and plain PyTorch.

``import fbn_plugin`` imports torch and nothing heavier; a framework is imported by :func:`register`.
"""

from fbn_plugin import internals as internals  # first, as it checks torch
from fbn_plugin import ops
from fbn_plugin.analysis.bands import measure_bands
from fbn_plugin.analysis.landscape import Landscape, measure_landscape
from fbn_plugin.analysis.moments import MomentDistance, measure_moments
from fbn_plugin.analysis.quantiles import QuantileSketch
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
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    GatedBatchNorm2d,
    InputNorm2d,
    InstanceEnhancementBatchNorm2d,
    InstanceNorm2d,
    LayerNorm2d,
    LearnedStatsNorm2d,
    PerActivationBatchNorm2d,
    RepresentativeBatchNorm2d,
    ScaledBatchNorm1d,
    ScaledBatchNorm2d,
    ScaledBatchNorm3d,
    ScaledBatchNormA1,
    ScaledBatchNormA2,
    SyncFilteredBatchNorm,
)
from fbn_plugin.layers.description import NormDescription, describe_class
from fbn_plugin.registry import NORMS, get_norm, norm_factory, parse_spec
from fbn_plugin.surgery.convert import convert_norm, convert_sync, register_converter
from fbn_plugin.surgery.fold import fold_norms
from fbn_plugin.surgery.fuse import fuse_norm_act
from fbn_plugin.surgery.input_norm import prepend_input_norm
from fbn_plugin.surgery.norm_report import NormReport
from fbn_plugin.surgery.norm_summary import NormSummary, summarize
from fbn_plugin.training.balanced_batches import BalancedBatchSampler, evaluate_balanced, self_label
from fbn_plugin.training.evaluation_modes import batch_moments
from fbn_plugin.training.gamma_initialization import apply_gamma_init
from fbn_plugin.training.parameter_groups import param_groups
from fbn_plugin.training.population_statistics import update_population_stats
from fbn_plugin.training.revised_initialization import revised_init

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
    "InstanceNorm2d",
    "Landscape",
    "LayerNorm2d",
    "LearnedStatsNorm2d",
    "MomentDistance",
    "NormDescription",
    "NormReport",
    "NormSummary",
    "PerActivationBatchNorm2d",
    "QuantileSketch",
    "RepresentativeBatchNorm2d",
    "ScaledBatchNorm1d",
    "ScaledBatchNorm2d",
    "ScaledBatchNorm3d",
    "ScaledBatchNormA1",
    "ScaledBatchNormA2",
    "SyncFilteredBatchNorm",
    "apply_gamma_init",
    "batch_moments",
    "convert_norm",
    "convert_sync",
    "describe_class",
    "evaluate_balanced",
    "fold_norms",
    "fuse_norm_act",
    "get_norm",
    "measure_bands",
    "measure_landscape",
    "measure_moments",
    "norm_factory",
    "ops",
    "param_groups",
    "parse_spec",
    "prepend_input_norm",
    "register",
    "register_converter",
    "revised_init",
    "self_label",
    "summarize",
    "unregister",
    "update_population_stats",
]
