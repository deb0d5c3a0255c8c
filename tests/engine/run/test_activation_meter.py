"""Quantiles of activations while a model trains: of the right values, in the chosen iterations, changing nothing."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import fbn_plugin
from fbn_plugin.analysis.normalized_values import normalized
from fbn_plugin.engine.run.activation_meter import ActivationMeter, build_activation_meter
from fbn_plugin.engine.run.cli import UserError

LEVELS = (0.0, 0.15, 0.5, 1.0)


def network(norm="FBN(t_sigma=2)"):
    torch.manual_seed(0)
    names = {"conv": nn.Conv2d(3, 4, 3), "norm": fbn_plugin.get_norm(norm, 4), "act": nn.Sigmoid()}
    model = nn.Sequential()
    for name, module in {**names, "flat": nn.Flatten(), "fc": nn.Linear(64, 2)}.items():
        model.add_module(name, module)
    return model.train()


def images(count=5):
    x = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    x.view(-1)[::37] *= 6
    return x


def measured(model, x, layers, iteration=0, period=1):
    meter = ActivationMeter(model, period, layers, LEVELS)
    with meter.measure(iteration) as found:
        y = model(x)
        assert not found
    y.sum().backward()
    return found


def assert_quantiles(found, name, values):
    wanted = np.quantile(values.detach().double().numpy().ravel(), LEVELS, method="inverted_cdf")
    got = [found[f"activations/{name}/q{level}"] for level in (0, 15, 50, 100)]
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("norm", ["FBN(t_sigma=2)", "BN", "GN", "FrozenBN"])
def test_what_is_measured_of_which_layer(norm):
    model, x = network(norm), images()
    y = copy.deepcopy(model.conv)(x)
    z, after = normalized(model.norm, y), copy.deepcopy(model.norm)(y)
    layers = ["norm", "norm[2]", "norm@output[2]", "act@input[2]", "conv", "conv@input", "fc[1]", "act"]
    found = measured(model, x, layers)
    assert len(found) == len(layers) * len(LEVELS)
    wanted = {"norm": z, "norm[2]": z[:, 2], "norm@output[2]": after[:, 2], "act@input[2]": after[:, 2], "conv": y}
    wanted |= {"conv@input": x, "fc[1]": model.fc(after.sigmoid().flatten(1))[:, 1], "act": after.sigmoid()}
    for name, values in wanted.items():
        assert_quantiles(found, name, values)


def test_nothing_changes():
    x, states = images(), []
    for layers in ([], ["norm", "fc", "norm@input"]):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        meter = ActivationMeter(model, 2, layers, LEVELS)
        for iteration in range(4):
            with meter.measure(iteration) as found:
                loss = model(x).square().sum()
            loss.backward()
            optimizer.step()
            assert bool(found) == bool(layers and iteration % 2)
        states.append(model.state_dict())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_several_passes_count_together_and_what_is_not_reached_is_left_out():
    model, x = network(), images(6)
    meter = ActivationMeter(model, 1, ["conv", "fc"], LEVELS)
    with meter.measure(0) as found:
        model.conv(x[:2])
        model.conv(x[2:])
        model.fc(x.new_zeros(0, 64))
    assert_quantiles(found, "conv", model.conv(x))
    assert not [name for name in found if "fc" in name]
    with ActivationMeter(model, 0, ["conv"], LEVELS).measure(0) as never:
        model(x)
    assert not never


def test_values_that_are_not_finite_are_counted():
    model, x = network("BN"), images()
    x[0, 0, 0, 0] = torch.nan
    found = measured(model, x, ["conv@input", "conv[1]"])
    assert found["activations/conv@input/not_finite"] == 1 and found["activations/conv[1]/not_finite"] == 1
    assert found["activations/conv@input/q100"] == x.nan_to_num(0).max()


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        ("nrom", "the model has no layer 'nrom'; did you mean 'norm'?"),
        ("norm[4]", "layer 'norm' has units 0 to 3, got 4"),
        ("conv@input[3]", "layer 'conv' has units 0 to 2, got 3"),
        ("fc[2]", "layer 'fc' has units 0 to 1, got 2"),
    ],
)
def test_what_is_not_there(layer, sentence):
    config = {"MEASURE": {"ACTIVATIONS": {"PERIOD": 0, "LAYERS": [layer], "QUANTILES": LEVELS}}}
    with pytest.raises(ValueError) as error:
        build_activation_meter(config, network())
    assert str(error.value) == f"MEASURE.ACTIVATIONS.LAYERS: {sentence}"


def test_a_unit_that_only_the_values_show_to_be_missing():
    with pytest.raises(UserError, match="layer 'act' has units 0 to 3, got 4"):
        measured(network(), images(), ["act[4]"])
    config = {"MEASURE": {"ACTIVATIONS": {"PERIOD": 3, "LAYERS": (), "QUANTILES": LEVELS}}}
    with pytest.raises(ValueError, match=r"LAYERS must be one layer or more with MEASURE.ACTIVATIONS.PERIOD, got \(\)"):
        build_activation_meter(config, network())
    with pytest.raises(ValueError, match="got -1"):
        ActivationMeter(network(), -1, [], LEVELS)
