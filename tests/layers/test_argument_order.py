"""Every layer and operator takes its arguments in the order of the one in PyTorch that it stands for."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fbn_plugin
from fbn_plugin import layers, norm_factory, ops

RELATIVES = {
    layers.ConvNorm2d: nn.BatchNorm2d,
    layers.FilterResponseNorm2d: nn.InstanceNorm2d,
    layers.FilteredBatchNorm1d: nn.BatchNorm1d,
    layers.FilteredBatchNorm2d: nn.BatchNorm2d,
    layers.FilteredBatchNorm3d: nn.BatchNorm3d,
    layers.FilteredBatchNormAct2d: nn.BatchNorm2d,
    layers.FilteredFilterResponseNorm2d: nn.InstanceNorm2d,
    layers.FilteredGroupNorm: nn.GroupNorm,
    layers.FilteredInstanceNorm2d: nn.InstanceNorm2d,
    layers.FilteredLayerNorm2d: nn.LayerNorm,
    layers.FrozenBatchNorm1d: nn.BatchNorm1d,
    layers.FrozenBatchNorm2d: nn.BatchNorm2d,
    layers.FrozenBatchNorm3d: nn.BatchNorm3d,
    layers.GatedBatchNorm2d: nn.BatchNorm2d,
    layers.InputNorm2d: nn.BatchNorm2d,
    layers.InstanceEnhancementBatchNorm2d: nn.BatchNorm2d,
    layers.InstanceNorm1d: nn.InstanceNorm1d,
    layers.InstanceNorm2d: nn.InstanceNorm2d,
    layers.InstanceNorm3d: nn.InstanceNorm3d,
    layers.LayerNorm2d: nn.LayerNorm,
    layers.LearnedStatsNorm2d: nn.InstanceNorm2d,
    layers.PerActivationBatchNorm2d: nn.BatchNorm2d,
    layers.RepresentativeBatchNorm2d: nn.BatchNorm2d,
    layers.ScaledBatchNorm1d: nn.BatchNorm1d,
    layers.ScaledBatchNorm2d: nn.BatchNorm2d,
    layers.ScaledBatchNorm3d: nn.BatchNorm3d,
    layers.ScaledBatchNormA1: nn.BatchNorm2d,
    layers.ScaledBatchNormA2: nn.BatchNorm2d,
    layers.SyncFilteredBatchNorm: nn.SyncBatchNorm,
}
OURS = {"normalized_shape": "num_channels", "elementwise_affine": "affine"}
FILTERED = [cls for cls in RELATIVES if "t_sigma" in inspect.signature(cls).parameters]


def positional(function):
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY
    return [OURS.get(p.name, p.name) for p in inspect.signature(function).parameters.values() if p.kind in kinds]


def build(cls, *args, **options):
    return cls(*([2, 8] if "num_groups" in positional(cls) else [8]), *args, **options)


def test_the_table_here_is_all_layers():
    assert set(RELATIVES) == {getattr(layers, name) for name in layers.__all__}


@pytest.mark.parametrize("cls", RELATIVES, ids=lambda cls: cls.__name__)
def test_a_layer_begins_like_its_relative(cls):
    """Where ours has fewer arguments by position, the others are passed by name; never is one in another's place."""
    ours, theirs = positional(cls), positional(RELATIVES[cls])
    assert len(ours) >= 2 and ours == theirs[: len(ours)]


def test_numbers_by_position_are_what_they_are_in_pytorch():
    norm = fbn_plugin.FilteredBatchNorm2d(8, 1e-3, 0.01, False, False, "meta", torch.float64)
    assert (norm.eps, norm.momentum, norm.affine, norm.track_running_stats) == (1e-3, 0.01, False, False)
    assert fbn_plugin.FilteredBatchNorm2d(8, 1e-3, 0.01, True, True, "meta").weight.is_meta
    assert fbn_plugin.FilteredGroupNorm(2, 8, 1e-3, False).eps == 1e-3
    assert fbn_plugin.FilteredLayerNorm2d(8, 1e-3, True, False).bias is None


@pytest.mark.parametrize("name", ["FBN", "SyncFBN", "ScaledBN", "ScaledBN-A2", "RBN", "RBN-", "ConvNorm", "BN"])
def test_a_factory_takes_arguments_as_the_class_does(name):
    norm = norm_factory(name)(8, 1e-3, 0.01, False)
    assert (norm.eps, norm.momentum, norm.affine) == (1e-3, 0.01, False)


def test_a_factory_with_groups_takes_the_channels_first():
    norm = norm_factory("FGN")(8, 4, 1e-3)
    assert (norm.num_channels, norm.num_groups, norm.eps) == (8, 4, 1e-3)
    with pytest.raises(TypeError, match="too many positional arguments"):
        norm_factory("FBN")(8, 1e-3, 0.1, True, True, None, None, 5.0)


@pytest.mark.parametrize("t_sigma", [1.01, 5, math.inf])
@pytest.mark.parametrize("cls", FILTERED, ids=lambda cls: cls.__name__)
def test_a_cut_by_position_is_refused(cls, t_sigma):
    """It used to stand first: no cut is small enough to pass for an ``eps``."""
    with pytest.raises(ValueError, match=r"eps must be a number in \[0, 1\), got .* t_sigma .* by name"):
        build(cls, t_sigma)
    with pytest.raises(TypeError):
        build(cls, *[1e-5] * 8)


@pytest.mark.parametrize("cls", FILTERED, ids=lambda cls: cls.__name__)
def test_a_cut_in_the_place_of_the_device_is_refused(cls):
    names = positional(cls)
    if "device" in names:
        first = {"num_groups": 2, "num_channels": 8, "num_features": 8, "eps": 1e-5, "momentum": 0.1}
        before = [first.get(name, name != "process_group" or None) for name in names[: names.index("device")]]
        with pytest.raises(ValueError, match=r"device must be .*, got 5\.0: .*t_sigma, is given by name"):
            cls(*before, 5.0)
        if torch.accelerator.device_count() <= 5:
            with pytest.raises(ValueError, match=r"device must be .* one that is there.*, got 5: .*t_sigma, is given"):
                cls(*before, 5)


@pytest.mark.parametrize("cls", RELATIVES, ids=lambda cls: cls.__name__)
def test_without_a_bias(cls):
    """As PyTorch's layer norm has it, and in new versions its other norms."""
    if "bias" not in inspect.signature(cls).parameters:
        if cls is layers.FilteredBatchNormAct2d:
            assert build(cls, bias=False).bias is None
        return
    norm = build(cls, bias=False, affine=True)
    assert norm.bias is None and norm.weight.shape == (8,)
    if cls not in (layers.FilterResponseNorm2d, layers.FilteredFilterResponseNorm2d, layers.LearnedStatsNorm2d):
        with torch.no_grad():
            norm.weight.fill_(7.0)
        norm.reset_parameters()
        assert (norm.weight == getattr(norm, "gamma_init", 1.0)).all() and norm.bias is None
    norm.load_state_dict(build(cls, bias=False, affine=True).state_dict())
    shape = (4, 8, 6, 6)[: 3 if "1d" in cls.__name__ else 4] if "3d" not in cls.__name__ else (4, 8, 3, 3, 3)
    x = torch.randn(shape)
    with_bias = build(cls, affine=True)
    with_bias.load_state_dict(norm.state_dict(), strict=False)
    torch.testing.assert_close(norm(x), with_bias(x))


@pytest.mark.parametrize("ours", [ops.filtered_batch_norm, ops.filtered_batch_norm_act])
def test_an_operator_begins_like_its_relative(ours):
    assert positional(ours) == ["x", *positional(F.batch_norm)[1:]]
    assert positional(ops.filtered_group_norm) == ["x", *positional(F.group_norm)[1:]]
    assert positional(ops.sync_filtered_batch_norm) == ["x", *positional(F.batch_norm)[1:5]]


def test_weight_and_bias_in_the_place_of_running_statistics_are_refused():
    x, weight, bias = torch.randn(4, 3), nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"order is that of F\.batch_norm, running_mean and running_var before weight"):
        ops.filtered_batch_norm(x, weight, bias, torch.zeros(3), torch.ones(3), True)
    with pytest.raises(TypeError, match="positional arguments"):
        ops.filtered_batch_norm(x, None, None, weight, bias, True, 0.1, 1e-5, 5.0)
    with pytest.raises(ValueError, match="eps must be a number"):
        ops.filtered_group_norm(x, 1, weight, bias, 5.0)
