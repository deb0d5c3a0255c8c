"""Evaluation by a batch's own moments: what they are, and that the statistics come back."""

import copy

import pytest
import torch
from torch import nn

from fbn_plugin import FilteredBatchNorm2d, batch_moments


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), FilteredBatchNorm2d(4, t_sigma=1.5)
    )
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var)
    return model.eval()


def test_own_moments_in_evaluation_are_those_of_training_and_buffers_stay():
    model, x = network(), torch.randn(5, 1, 9, 9)
    before = copy.deepcopy(model.state_dict())
    buffers = [id(buffer) for buffer in model.buffers()]
    evaluated, expected = model(x), copy.deepcopy(model).train()(x)
    with batch_moments(model) as same:
        assert same is model and not model.training
        torch.testing.assert_close(model(x), expected)
        assert (model(x) - evaluated).abs().max() > 0.1
    assert torch.equal(model(x), evaluated)
    assert [id(buffer) for buffer in model.buffers()] == buffers
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_exceptions_and_nesting_give_the_statistics_back():
    model, x = network(), torch.randn(5, 1, 9, 9)
    mean = model[4].running_mean
    with pytest.raises(KeyError), batch_moments(model):
        raise KeyError
    assert model[4].running_mean is mean
    with batch_moments(model[4]):
        with batch_moments(model):
            own = model(x)
        assert model[4].running_mean is None and model[1].running_mean is not None
        with batch_moments(model):
            assert torch.equal(model(x), own)
    assert model[4].running_mean is mean and not torch.equal(model(x), own)


def test_checkpoints_inside_of_the_block_have_all_keys():
    model, other = network(), network()
    nn.init.constant_(other[1].running_mean, 7.0)
    before = copy.deepcopy(model.state_dict())
    with batch_moments(model):
        inside = model.state_dict()
        assert list(inside) == list(before) and all(torch.equal(inside[key], before[key]) for key in before)
        assert model[1].running_mean is None and model[4].running_var is None
        model.load_state_dict(other.state_dict(), strict=True)
        assert model[1].running_mean is None
    assert (model[1].running_mean == 7).all()
    assert not model[1]._state_dict_hooks and not model[1]._load_state_dict_pre_hooks


def test_instance_frozen_and_group_norms_stay_as_they_are():
    from torchvision.ops import FrozenBatchNorm2d

    norms = [nn.InstanceNorm2d(4, track_running_stats=True), FrozenBatchNorm2d(4), nn.GroupNorm(2, 4)]
    model, x = nn.Sequential(*norms).eval(), torch.randn(3, 4, 5, 5) + 2
    expected = model(x)
    with batch_moments(model):
        assert torch.equal(model(x), expected)


def test_own_moments_in_timms_norm_with_activation():
    from timm.layers import BatchNormAct2d

    norm, x = BatchNormAct2d(4).eval(), torch.randn(3, 4, 5, 5) + 2
    with batch_moments(norm):
        torch.testing.assert_close(norm(x), torch.batch_norm(x, None, None, None, None, True, 0, 1e-5, False).relu())
