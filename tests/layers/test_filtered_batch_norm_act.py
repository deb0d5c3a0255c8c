"""The fused layer: batch normalization's checkpoints, and the same values as its parts."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fbn_plugin import FilteredBatchNorm2d, FilteredBatchNormAct2d


@pytest.mark.parametrize("momentum", [0.1, None])
def test_same_state_and_values_as_norm_add_and_relu(momentum):
    torch.manual_seed(0)
    norm, fused = (cls(4, t_sigma=2.0, momentum=momentum) for cls in (FilteredBatchNorm2d, FilteredBatchNormAct2d))
    assert fused.state_dict().keys() == nn.BatchNorm2d(4).state_dict().keys()
    for training in (True, True, False):
        x, residual = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
        norm.train(training), fused.train(training)
        torch.testing.assert_close(fused(x, residual), (norm(x) + residual).relu())
        torch.testing.assert_close(fused.state_dict(), norm.state_dict())


def test_activations_and_repr():
    x = torch.randn(3, 4, 5, 5)
    for activation, function in (("silu", nn.SiLU()), ("leaky_relu", nn.LeakyReLU(0.2)), ("identity", nn.Identity())):
        layer = FilteredBatchNormAct2d(4, activation=activation, negative_slope=0.2)
        torch.testing.assert_close(layer(x), function(FilteredBatchNorm2d(4)(x)))
        assert f"activation='{activation}'" in repr(layer)
        assert ("negative_slope=0.2" in repr(layer)) == (activation == "leaky_relu")


def test_can_be_copied_and_pickled():
    layer = FilteredBatchNormAct2d(4, t_sigma=3.0, activation="silu")
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(other) == repr(layer)
