"""Filtered group, layer and instance normalization against PyTorch's norms and the paper's equations."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fbn_plugin import FilteredGroupNorm, FilteredInstanceNorm2d, FilteredLayerNorm2d, LayerNorm2d
from fbn_plugin.ops import filtered_group_norm


def data(shape=(3, 6, 5, 4), seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1
    x[:, 0, 0, 0] = 30.0
    return x


LAYERS = [
    lambda **o: FilteredGroupNorm(2, 6, **o),
    lambda **o: FilteredLayerNorm2d(6, **o),
    lambda **o: FilteredInstanceNorm2d(6, **o),
]
PLAIN = [
    lambda: nn.GroupNorm(2, 6, dtype=torch.float64),
    lambda: LayerNorm2d(6, dtype=torch.float64),
    lambda: nn.InstanceNorm2d(6, affine=True, dtype=torch.float64),
]
NAMES = ["group", "layer", "instance"]


def randomize(*layers):
    generator = torch.Generator().manual_seed(3)
    weight = torch.rand(6, generator=generator, dtype=torch.float64)
    bias = torch.randn(6, generator=generator, dtype=torch.float64)
    for layer in layers:
        layer.weight.data.copy_(weight)
        layer.bias.data.copy_(bias)


@pytest.mark.parametrize("filtered, plain", list(zip(LAYERS, PLAIN)), ids=NAMES)
def test_infinite_cut_is_the_plain_norm(filtered, plain):
    ours, native = filtered(t_sigma=math.inf, dtype=torch.float64), plain()
    randomize(ours, native)
    inputs = [data().requires_grad_() for _ in range(2)]
    for layer, x in zip((ours, native), inputs):
        layer(x).square().sum().backward()
    torch.testing.assert_close(ours(data()), native(data()))
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(ours.weight.grad, native.weight.grad)
    assert list(ours.state_dict()) == list(native.state_dict())


@pytest.mark.parametrize("filtered", LAYERS, ids=NAMES)
def test_training_and_evaluation_are_the_same_and_copies_keep_the_filter(filtered):
    layer = filtered(t_sigma=1.5, grad_mode="paper", dtype=torch.float64)
    randomize(layer)
    assert torch.equal(layer.train()(data()), layer.eval()(data()))
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(data()), layer(data())) and repr(twin) == repr(layer)


@pytest.mark.parametrize("mode", ["exact", "paper"])
def test_layer_norm_filters_the_channels_of_each_position(mode):
    layer = FilteredLayerNorm2d(6, t_sigma=1.5, eps=1e-3, grad_mode=mode, dtype=torch.float64)
    randomize(layer)
    x = data().requires_grad_()
    y = layer(x)
    column = x.detach()[1, :, 0, 0]
    sigma = (column.var(correction=0) + 1e-3).sqrt()
    kept = column[(column - column.mean()).abs() <= 1.5 * sigma]
    assert 0 < len(kept) < 6
    expected = (column - kept.mean()) / (kept.var(correction=0) + 1e-3).sqrt() * layer.weight + layer.bias
    torch.testing.assert_close(y[1, :, 0, 0], expected)
    if mode == "exact":
        assert torch.autograd.gradcheck(layer, x)


@pytest.mark.parametrize("filtered", LAYERS, ids=NAMES)
def test_gradcheck_of_parameters(filtered):
    layer = filtered(t_sigma=1.5, dtype=torch.float64)
    randomize(layer)

    def call(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

    inputs = [t.detach().clone().requires_grad_() for t in (data((2, 6, 3, 2)), layer.weight, layer.bias)]
    assert torch.autograd.gradcheck(call, inputs)


def test_instance_norm_is_a_group_for_each_channel():
    layer = FilteredInstanceNorm2d(6, t_sigma=1.5, dtype=torch.float64)
    torch.testing.assert_close(layer(data()), filtered_group_norm(data(), 6, t_sigma=1.5))
    assert layer.num_features == 6
    assert (layer(data()) - F.instance_norm(data())).abs().max() > 0.1


@pytest.mark.parametrize("filtered", LAYERS, ids=NAMES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_layouts_and_no_affine(filtered, memory_format):
    layer = filtered(t_sigma=1.5, affine=False)
    assert not list(layer.parameters())
    x = data().float().contiguous(memory_format=memory_format)
    torch.testing.assert_close(layer(x), layer(data().float()))


@pytest.mark.parametrize("filtered", LAYERS, ids=NAMES)
def test_checkpoints_empty_batches_and_wrong_channels(filtered, tmp_path):
    layer = filtered(t_sigma=1.5)
    torch.save(layer.state_dict(), tmp_path / "weights.pth")
    filtered(t_sigma=1.5).load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    empty = torch.empty(0, 6, 3, 3, requires_grad=True)
    layer(empty).sum().backward()
    assert empty.grad.shape == empty.shape and layer.weight.grad.eq(0).all()
    with pytest.raises(ValueError, match="6 elements, but the input has 12 channels"):
        layer(torch.randn(2, 12, 4, 4))


@pytest.mark.parametrize("filtered", LAYERS, ids=NAMES)
def test_half_precision(filtered):
    layer = filtered(t_sigma=1.5)
    y = layer(data().bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(data().bfloat16().float()), rtol=1e-2, atol=1e-2)


def test_bad_options():
    with pytest.raises(ValueError, match="got 4 groups for 6 channels"):
        FilteredGroupNorm(4, 6)
    with pytest.raises(ValueError, match="got 0 groups for 6 channels"):
        FilteredGroupNorm(0, 6)
    with pytest.raises(ValueError, match="t_sigma must be a number greater than 1"):
        FilteredLayerNorm2d(6, t_sigma=0.9)
    with pytest.raises(ValueError, match="Expected more than 1 spatial element"):
        FilteredInstanceNorm2d(6)(torch.ones(3, 6, 1, 1))
