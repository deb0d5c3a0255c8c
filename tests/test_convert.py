"""Swapping the norms of built models."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fbn_plugin
from fbn_plugin import convert_norm
from fbn_plugin.convert import _CONVERTERS, copy_norm_state, register_converter


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8, eps=1e-3, momentum=0.01),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.SyncBatchNorm(8)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 8),
        nn.BatchNorm1d(8, momentum=None),
    )
    for module in model.modules():
        if hasattr(module, "running_mean"):
            nn.init.normal_(module.weight, 1, 0.1)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(7)
    return model


def test_keeps_state_and_settings():
    model = network()
    model[1].eval()
    model[1].weight.requires_grad_(False)
    before = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    assert convert_norm(model, "FBN(t_sigma=3)") is model
    kinds = [type(model[i]) for i in (1, 7)] + [type(model[3][1])]
    assert kinds == [
        fbn_plugin.FilteredBatchNorm2d,
        fbn_plugin.FilteredBatchNorm1d,
        fbn_plugin.FilteredBatchNorm2d,
    ]
    assert (model[1].eps, model[1].momentum, model[7].momentum, model[1].t_sigma) == (1e-3, 0.01, None, 3)
    assert not model[1].training and model[7].training and not model[1].weight.requires_grad
    assert all(parameters[name] is p for name, p in model.named_parameters()), "an optimizer keeps its parameters"
    for (name, old), (_, new) in zip(before.state_dict().items(), model.state_dict().items()):
        assert torch.equal(old, new), name
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(before.eval()(x), model.eval()(x))


def test_there_and_back():
    model = network()
    state = copy.deepcopy(model.state_dict())
    convert_norm(convert_norm(model, "FBN"), "BN")
    assert type(model[1]) is nn.BatchNorm2d and type(model[7]) is nn.BatchNorm1d
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("spec", ["GN(num_groups=4)", "FGN(num_groups=4)", "LN", "FLN"])
def test_norms_without_statistics_keep_scale_and_shift(spec):
    model = network()
    weight = model[1].weight
    convert_norm(model, spec)
    assert model[1].weight is weight and model[1].eps == 1e-3
    assert not any("running" in key for key in model.state_dict())
    model(torch.randn(2, 3, 9, 9)).sum().backward()


def test_the_spec_wins_over_the_old_settings():
    assert convert_norm(nn.BatchNorm2d(4, eps=1e-3), "FBN(eps=0.1)").eps == 0.1


def test_options_are_kept():
    for options in ({"affine": False}, {"track_running_stats": False}):
        norm = convert_norm(nn.BatchNorm2d(4, **options), "FBN")
        assert list(norm.state_dict()) == list(nn.BatchNorm2d(4, **options).state_dict())
        norm(torch.randn(2, 4, 3, 3))


def test_dtype_and_device_are_kept():
    assert convert_norm(nn.BatchNorm2d(4, dtype=torch.float64, device="meta"), "FBN").running_var.is_meta
    assert convert_norm(nn.BatchNorm2d(4, dtype=torch.float64), "FBN").weight.dtype == torch.float64


def test_a_shared_norm_stays_shared():
    norm = nn.BatchNorm2d(4)
    model = convert_norm(nn.ModuleDict({"a": norm, "b": nn.Sequential(norm, nn.ReLU())}), "FBN")
    assert model["a"] is model["b"][0] and isinstance(model["a"], fbn_plugin.FilteredBatchNorm2d)


def test_a_norm_with_two_names_keeps_both():
    norm = nn.BatchNorm2d(4)
    model = convert_norm(nn.ModuleDict({"a": norm, "b": norm}), "FBN")
    assert model["a"] is model["b"] and isinstance(model["a"], fbn_plugin.FilteredBatchNorm2d)


def test_affine_in_the_spec_wins():
    assert convert_norm(nn.BatchNorm2d(4, affine=False), "FBN(affine=True)").weight.shape == (4,)
    assert convert_norm(nn.BatchNorm2d(4), "FBN(affine=False)").weight is None


def test_a_refusal_names_the_layer_and_leaves_the_model_alone():
    model = network()
    with pytest.raises(ValueError, match="cannot convert '1' to FGN: .*32 groups for 8 channels"):
        convert_norm(model, "FGN")
    with pytest.raises(ValueError, match="unknown norm"):
        convert_norm(model, "FBM")
    assert type(model[1]) is nn.BatchNorm2d


class Loud(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_forward_of_its_own_is_left_with_a_warning_or_converted_by_its_converter():
    model = nn.Sequential(Loud(4), nn.BatchNorm2d(4))
    with pytest.warns(UserWarning, match="1 norms are left as they are: no converter for Loud .*'0'"):
        convert_norm(model, "FBN")
    assert type(model[0]) is Loud and isinstance(model[1], fbn_plugin.FilteredBatchNorm2d)

    register_converter(Loud, lambda old, factory: nn.Sequential(copy_norm_state(old, factory(4)), nn.Dropout()))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            convert_norm(model, "FBN")
    finally:
        _CONVERTERS.pop(Loud)
    assert isinstance(model[0][0], fbn_plugin.FilteredBatchNorm2d)


def test_a_model_without_norms_is_returned_as_it_is():
    model = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="nothing was converted to FBN: the model has no batch normalization"):
        assert convert_norm(model, "FBN") is model


def test_instance_norm_does_not_inherit_running_statistics():
    model = convert_norm(network(), "IN")
    assert isinstance(model[1], nn.InstanceNorm2d) and not model[1].track_running_stats and model[1].eps == 1e-3
    x = torch.randn(2, 8, 9, 9)
    assert torch.equal(model[1].train()(x), model[1].eval()(x))


def test_norms_inside_of_a_norm_that_is_left_are_left():
    class Split(nn.BatchNorm2d):
        def __init__(self, num_features):
            super().__init__(num_features)
            self.auxiliary = nn.BatchNorm2d(num_features)

        def forward(self, input):
            return super().forward(input) + self.auxiliary(input)

    model = nn.Sequential(Split(4), nn.BatchNorm2d(4))
    with pytest.warns(UserWarning, match="1 norms are left as they are: no converter for Split"):
        convert_norm(model, "FBN")
    assert type(model[0].auxiliary) is nn.BatchNorm2d
    assert type(model[1]) is fbn_plugin.FilteredBatchNorm2d


def test_conv_norm_in_and_out():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3, momentum=None))
    weight = model[1].weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_norm(model, "ConvNorm(kernel_sizes=(2, 2))")
        assert model[1].kernel_sizes == ((2, 2), (2, 2)) and (model[1].eps, model[1].momentum) == (1e-3, None)
        convert_norm(model, "FBN")
    assert type(model[1]) is fbn_plugin.FilteredBatchNorm2d and model[1].weight is weight
    with pytest.raises(ValueError, match="cannot convert '7' to ConvNorm: ConvNorm has no form for 1 spatial dim"):
        convert_norm(network(), "ConvNorm")
