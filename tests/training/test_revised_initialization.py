"""The paper's initialization: bounds and variances by fan-in, biases at 0, norms as they were."""

import math

import pytest
import torch
from torch import nn

from fbn_plugin import LearnedStatsNorm2d, revised_init


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = [nn.Conv2d(8, 64, 3, groups=2), nn.BatchNorm2d(64), nn.Conv1d(64, 32, 5), nn.Linear(200, 100)]
    model = nn.Sequential(*layers, nn.Linear(4, 4, bias=False))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    return model


def test_convolutions_are_normal_and_linear_layers_uniform_by_fan_in(model):
    assert revised_init(model) is model
    for conv, fan_in in ((model[0], 4 * 9), (model[2], 64 * 5)):
        weight = conv.weight.detach() / math.sqrt(2 / fan_in)
        assert weight.mean().abs() < 0.1 and weight.std() == pytest.approx(1, rel=0.05)
        assert weight.abs().max() > 2.5  # no uniform distribution of this variance reaches that
    weight, bound = model[3].weight.detach(), math.sqrt(6 / 200)
    assert 0.98 * bound < weight.abs().max() <= bound and weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_biases_are_zero_and_scales_are_left(model):
    revised_init(model)
    assert all((layer.bias == 0).all() for layer in model[:4])
    assert (model[1].weight == 0.5).all()


def test_variances_stay_through_a_deep_network_with_relu():
    torch.manual_seed(0)
    model = revised_init(nn.Sequential(*[nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()) for _ in range(10)]))
    x = torch.randn(4, 32, 16, 16)
    assert 0.1 < model(x).square().mean() < 2


def test_the_networks_of_learned_statistics_are_left():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), LearnedStatsNorm2d(8))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    revised_init(model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"0.weight", "0.bias"}
