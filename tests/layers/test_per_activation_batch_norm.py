"""Batch normalization per activation: against the equations, by the size of its maps, and between norms."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fbn_plugin import (
    NormReport,
    PerActivationBatchNorm2d,
    convert_norm,
    convert_sync,
    fold_norms,
    get_norm,
    param_groups,
    update_population_stats,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def equation(x, weight, bias, eps):
    """Algorithm 1 with the images alone as the batch; scale and shift (C, H, W)."""
    mean = x.mean(0)
    var = (x - mean).square().mean(0)
    return weight * (x - mean) / (var + eps).sqrt() + bias


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_forward_backward_and_running_statistics_are_those_of_each_position(layout):
    layer = PerActivationBatchNorm2d(3, map_size=(4, 5), dtype=torch.float64)
    x = (2 + 3 * torch.randn(6, 3, 4, 5, dtype=torch.float64)).to(memory_format=layout).requires_grad_()
    g = torch.randn(6, 3, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
    weight, bias = (each.detach().view(3, 4, 5).clone().requires_grad_() for each in (layer.weight, layer.bias))
    expected = equation(x, weight, bias, layer.eps)
    wanted = torch.autograd.grad(expected, (x, weight, bias), g)
    y = layer(x)
    found = torch.autograd.grad(y, (x, layer.weight, layer.bias), g)
    torch.testing.assert_close(y, expected)
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other.reshape(one.shape))
    torch.testing.assert_close(layer.running_mean.view(3, 4, 5), 0.1 * x.mean(0))
    torch.testing.assert_close(layer.running_var.view(3, 4, 5), 0.9 + 0.1 * x.var(0))
    mean, var = (each.view(3, 4, 5) for each in (layer.running_mean, layer.running_var))
    torch.testing.assert_close(layer.eval()(x[:1]), (x[:1] - mean) / (var + layer.eps).sqrt() * weight + bias)


def test_rows_are_normalized_as_batch_norm_does():
    x = torch.randn(8, 5)
    torch.testing.assert_close(PerActivationBatchNorm2d(5)(x), nn.BatchNorm1d(5)(x))


def test_the_first_input_tells_the_positions_and_parameters_stay_the_same_objects():
    layer = PerActivationBatchNorm2d(4, gamma_init=0.1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9)
    held = list(layer.parameters())
    layer(torch.randn(5, 4, 3, 3)).square().sum().backward()
    optimizer.step()
    assert all(one is other for one, other in zip(held, layer.parameters(), strict=True))
    assert layer.weight.shape == layer.running_var.shape == (36,) and layer.weight.unique().numel() > 1
    message = r"expected maps of 9 positions.*got input size \(5, 4, 4, 4\): .* for maps of one size"
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(5, 4, 4, 4))
    with pytest.raises(ValueError, match="expected maps of 4 positions"):
        PerActivationBatchNorm2d(4, map_size=2).eval()(torch.randn(5, 4, 1, 1))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1, 4, 3, 3))
    with pytest.raises(ValueError, match="map_size takes positive whole numbers.*got 0"):
        PerActivationBatchNorm2d(4, map_size=0)


def test_no_image_is_no_reason_to_take_a_size():
    layer = PerActivationBatchNorm2d(4)
    assert layer(torch.empty(0, 4, 0, 0)).shape == (0, 4, 0, 0) and layer.positions == 0
    layer(torch.randn(2, 4, 3, 3))


def test_weights_come_back_and_those_of_a_batch_norm_hold_for_every_position():
    layer = PerActivationBatchNorm2d(4)
    layer(torch.randn(5, 4, 3, 3))
    x = torch.randn(2, 4, 3, 3)
    expected = layer.eval()(x)
    for fresh in (PerActivationBatchNorm2d(4), PerActivationBatchNorm2d(4, map_size=3)):
        fresh.load_state_dict(layer.state_dict())
        torch.testing.assert_close(fresh.eval()(x), expected, rtol=0, atol=0)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(copied(x), expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PerActivationBatchNorm2d(4, map_size=2).load_state_dict(layer.state_dict())
    plain = nn.BatchNorm2d(4).train()
    plain(torch.randn(5, 4, 3, 3))
    expected = plain.eval()(x)
    for fresh in (PerActivationBatchNorm2d(4), PerActivationBatchNorm2d(4, map_size=3)):
        fresh.load_state_dict(plain.state_dict())
        torch.testing.assert_close(fresh.eval()(x), expected)


@pytest.mark.parametrize("spec", ["PerActivationBN", "PerActivationBN(map_size=3)"])
def test_a_network_is_converted_with_its_evaluation_and_not_back(spec):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).train()
    x = torch.randn(5, 3, 3, 3)
    model(x)
    expected = model.eval()(x)
    convert_norm(model, spec)
    torch.testing.assert_close(model(x), expected)
    assert model[1].positions == 9
    before = model[1]
    for change, reason in (
        (lambda report: convert_norm(model, "BN", report=report), "each position has a scale of its own"),
        (lambda report: convert_sync(model, report=report), "its moments are of each position"),
    ):
        report = NormReport()
        with pytest.warns(UserWarning, match="PerActivationBatchNorm2d"):
            change(report)
        assert reason in str(report)
    assert fold_norms(model)[1] is model[1] is before


def test_population_statistics_are_those_of_each_position():
    batches = [torch.randn(4, 2, 3, 3, dtype=torch.float64) for _ in range(3)]
    for layer in (get_norm("PerActivationBN", 2), get_norm("PerActivationBN(map_size=3)", 2)):
        layer.double().train()
        update_population_stats(layer, batches)
        torch.testing.assert_close(layer.running_mean.view(2, 3, 3), torch.stack([b.mean(0) for b in batches]).mean(0))
        torch.testing.assert_close(layer.running_var.view(2, 3, 3), torch.stack([b.var(0) for b in batches]).mean(0))


def test_scale_and_shift_do_not_decay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), PerActivationBatchNorm2d(4, map_size=2))
    groups = param_groups(model, 0.1, 0.01)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays[id(model[0].weight)] == 0.01 and decays[id(model[1].weight)] == decays[id(model[1].bias)] == 0


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("training", [True, False])
def test_in_torchscript_and_compiled(training):
    x = torch.randn(5, 4, 3, 3)
    for build in (torch.jit.script, lambda layer: torch.compile(layer, backend="aot_eager", fullgraph=True)):
        torch.compiler.reset()
        layer = PerActivationBatchNorm2d(4, map_size=3).train(training)
        other = copy.deepcopy(layer)
        compiled = build(other)
        for _ in range(2):
            torch.testing.assert_close(compiled(x), layer(x))
        torch.testing.assert_close(other.running_var, layer.running_var)


def test_in_torch_func_and_on_the_meta_device():
    layers = [PerActivationBatchNorm2d(4, map_size=3) for _ in range(2)]
    for layer in layers:
        nn.init.uniform_(layer.weight)
    x = torch.randn(2, 5, 4, 3, 3)
    expected = torch.stack([copy.deepcopy(layer)(each) for layer, each in zip(layers, x)])
    states = torch.func.stack_module_state(layers)
    run = torch.func.vmap(lambda *state_and_x: torch.func.functional_call(layers[0], state_and_x[:2], state_and_x[2]))
    torch.testing.assert_close(run(*states, x), expected)
    unsized = PerActivationBatchNorm2d(4)
    with pytest.raises(ValueError, match="cannot be one in torch.func: call it before, or give map_size"):
        torch.func.grad(lambda w: torch.func.functional_call(unsized, {"weight": w}, x[0]).sum())(unsized.weight)
    assert PerActivationBatchNorm2d(4, device="meta")(x[0].to("meta")).shape == x[0].shape
