"""Swapping the norms of built models."""

import copy
import functools
import pickle
import warnings

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fbn_plugin
from fbn_plugin import NormReport, convert_norm, convert_sync, registry
from fbn_plugin.layers import description
from fbn_plugin.layers.description import NormDescription
from fbn_plugin.registry import NormSpec
from fbn_plugin.surgery.convert import copy_norm_state
from fbn_plugin.surgery.norm_summary import OWN_FORWARD


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


def test_a_function_whose_norms_filter_and_that_takes_no_cut(monkeypatch):
    def CutAtFour(num_channels, eps=1e-5, *, dims=2, device=None, dtype=None):
        return fbn_plugin.norm_factory("FBN(t_sigma=4)", dims)(num_channels, eps=eps, device=device, dtype=dtype)

    monkeypatch.setattr(registry, "_NAMES", {cls: list(names) for cls, names in registry._NAMES.items()})
    monkeypatch.setitem(fbn_plugin.NORMS._obj_map, "CutAtFour", CutAtFour)
    model = nn.Sequential(nn.BatchNorm2d(4, eps=1e-3), nn.BatchNorm1d(4), fbn_plugin.FilteredBatchNorm2d(4))
    convert_norm(model, "CutAtFour", report=(report := NormReport()))
    assert [module.t_sigma for module in model] == [4, 4, 4] and model[0].eps == 1e-3
    assert not any("t_sigma" in each.note for each in report.changed)


@pytest.mark.parametrize("spec", ["GN(num_groups=4)", "FGN(num_groups=4)", "LN", "FLN"])
def test_norms_without_statistics_keep_scale_and_shift(spec):
    model = network()
    weight = model[1].weight
    convert_norm(model, spec)
    assert model[1].weight is weight and model[1].eps == 1e-3
    assert not any("running" in key for key in model.state_dict())
    model(torch.randn(2, 3, 9, 9)).sum().backward()


@pytest.mark.parametrize("spec", ["GN", "FGN(t_sigma=3)"])
def test_the_groups_divide_the_channels_of_each_layer(spec):
    model = convert_norm(nn.Sequential(nn.BatchNorm2d(24), nn.BatchNorm2d(64)), spec)
    assert [norm.num_groups for norm in model] == [24, 32]
    other = "FGN" if spec == "GN" else "GN"
    assert convert_norm(nn.GroupNorm(4, 24), other, sources="GN").num_groups == 4  # those that it has stay


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
    with pytest.raises(ValueError, match="'1' .*FGN.*32 groups .*8 channels"):
        convert_norm(model, "FGN(num_groups=32)")
    with pytest.raises(ValueError, match="unknown norm"):
        convert_norm(model, "FBM")
    assert type(model[1]) is nn.BatchNorm2d


class Loud(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_forward_of_its_own_is_left_with_a_warning_or_converted_as_it_says(monkeypatch):
    model = nn.Sequential(Loud(4), nn.BatchNorm2d(4))
    with pytest.warns(UserWarning, match="1 norm is .*Loud .*'0'"):
        convert_norm(model, "FBN")
    assert type(model[0]) is Loud and isinstance(model[1], fbn_plugin.FilteredBatchNorm2d)

    def convert(old, factory):
        return nn.Sequential(copy_norm_state(old, factory(4)), nn.Dropout())

    monkeypatch.setattr(Loud, "description", NormDescription("BN", convert=convert), raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_norm(model, "FBN")
    assert isinstance(model[0][0], fbn_plugin.FilteredBatchNorm2d)


def test_a_model_without_norms_is_returned_as_it_is():
    model = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="FBN.*no batch normalization"):
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
    with pytest.warns(UserWarning, match="1 norm is .*Split"):
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
    with pytest.raises(ValueError, match="'7' .*ConvNorm .*1 spatial dim"):
        convert_norm(network(), "ConvNorm")


# --- frozen norms --------------------------------------------------------------------------------------------------


def test_freezing_keeps_the_evaluation_and_nothing_moves():
    model = network()
    before, weight = copy.deepcopy(model).eval(), model[1].weight
    convert_norm(model, "FrozenBN")
    assert type(model[1]) is fbn_plugin.FrozenBatchNorm2d and type(model[7]) is fbn_plugin.FrozenBatchNorm1d
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(model.train()(x), before(x))
    kept = model[1].weight.clone()
    with torch.no_grad():
        weight.zero_()  # an optimizer may still hold it
    assert torch.equal(model[1].weight, kept)


@pytest.mark.parametrize("spec", ["BN", "FBN(t_sigma=3)", "GN(num_groups=4)"])
@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "torchvision"])
def test_thawing_keeps_the_statistics_and_gives_the_filter(spec, theirs):
    model = network()
    before = copy.deepcopy(model).eval()
    convert_norm(model, "FrozenBN")
    if theirs:
        frozen = torchvision.ops.FrozenBatchNorm2d(8, eps=1e-3)
        frozen.load_state_dict(model[1].state_dict())
        model[1] = frozen
    with pytest.warns(UserWarning, match="the model has no batch normalization"):
        assert type(convert_norm(model, spec)[1]).__name__ == "FrozenBatchNorm2d", "frozen norms stay by default"
    convert_norm(model, spec, sources="FrozenBN")
    assert type(model[1]) is type(fbn_plugin.get_norm(spec, 8))
    assert isinstance(model[1].weight, nn.Parameter) and model[1].weight.requires_grad and model[1].eps == 1e-3
    if spec[:2] != "GN":
        x = torch.randn(2, 3, 9, 9)
        torch.testing.assert_close(model.eval()(x), before(x))
        assert (model[1].running_var != 1).all() and type(model[7]) is type(fbn_plugin.get_norm(spec, 8, dims=1))
    model.train()(torch.randn(2, 3, 9, 9)).sum().backward()


def test_timms_frozen_norms_keep_their_activation():
    norm = timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU)
    norm.running_mean.normal_()
    x = torch.randn(2, 8, 3, 3)
    expected = norm.eval()(x)
    frozen = convert_norm(norm, "FrozenBN")
    assert type(frozen) is timm.layers.norm_act.FrozenBatchNormAct2d
    torch.testing.assert_close(frozen(x), expected)
    thawed = convert_norm(frozen, "FBN", sources="FrozenBN")
    assert isinstance(thawed, fbn_plugin.FilteredBatchNorm2d)
    torch.testing.assert_close(thawed.eval()(x), expected)


def test_what_has_no_statistics_cannot_be_frozen():
    for norm, sources in ((nn.BatchNorm2d(4, track_running_stats=False), "BN"), (nn.GroupNorm(2, 4), "GN")):
        with pytest.raises(ValueError, match="has no running statistics to freeze"):
            convert_norm(norm, "FrozenBN", sources=sources)


def test_a_norm_without_scale_and_shift_is_frozen_with_one_and_zero():
    norm = nn.BatchNorm2d(4, affine=False)
    frozen = convert_norm(norm, "FrozenBN")
    assert frozen.weight.eq(1).all() and frozen.bias.eq(0).all()


# --- other families ------------------------------------------------------------------------------------------------

OLD = {
    "GN": lambda: nn.GroupNorm(2, 8, eps=1e-3),
    "FGN": lambda: fbn_plugin.FilteredGroupNorm(2, 8, eps=1e-3),
    "LN": lambda: fbn_plugin.LayerNorm2d(8, eps=1e-3),
    "FLN": lambda: fbn_plugin.FilteredLayerNorm2d(8, eps=1e-3),
    "IN": lambda: nn.InstanceNorm2d(8, eps=1e-3, affine=True),
    "FIN": lambda: fbn_plugin.FilteredInstanceNorm2d(8, eps=1e-3),
    "timm GN": lambda: timm.layers.GroupNormAct(8, 2, eps=1e-3, act_layer=nn.SiLU),
}


@pytest.mark.parametrize("spec", ["BN", "FBN", "GN(num_groups=4)", "FGN(num_groups=4)", "LN", "FLN", "IN", "FIN"])
@pytest.mark.parametrize("old", OLD)
def test_every_family_converts_to_every_norm(old, spec):
    norm = OLD[old]()
    nn.init.normal_(norm.weight)
    new = convert_norm(norm, spec, sources=("GN", "LN", "IN"))
    assert new.weight is norm.weight and new.bias is norm.bias and new.eps == 1e-3
    if "timm" in old:
        assert type(new.act) is nn.SiLU
    elif "F" in spec or "(" in spec or spec == "BN":
        assert type(new) is type(fbn_plugin.get_norm(spec, 8))
    if "BN" in spec:
        assert new.running_mean.eq(0).all() and new.running_var.eq(1).all()
    new(torch.randn(2, 8, 3, 3)).sum().backward()


def test_groups_are_kept_and_the_same_norm_comes_back():
    norm = nn.GroupNorm(2, 8)
    filtered = convert_norm(norm, "FGN(t_sigma=inf)", sources="GN")
    x = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(filtered(x), norm(x))
    assert repr(convert_norm(filtered, "GN", sources="GN")) == repr(norm)


def test_a_layer_norm_of_the_last_dimension_is_left():
    model = nn.Sequential(nn.LayerNorm(8), fbn_plugin.LayerNorm2d(8))
    with pytest.warns(UserWarning, match=r"1 norm is .*, LayerNorm \(at '0'\): its channels are not"):
        convert_norm(model, "BN", sources="LN")
    assert [type(m) for m in model] == [nn.LayerNorm, nn.BatchNorm2d]


def test_unknown_family():
    with pytest.raises(ValueError, match="'FBN'.*BN, FrozenBN, GN, LN, IN, FRN"):
        convert_norm(network(), "FBN", sources=["BN", "FBN"])


def norm_with_learned_state(spec):
    """A norm of 4 channels in which no parameter or statistic is what it starts at."""
    torch.manual_seed(0)
    norm = fbn_plugin.get_norm(spec, 4)
    for tensor in norm.parameters():
        nn.init.uniform_(tensor, 0.2, 0.8)
    if getattr(norm, "running_mean", None) is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm.eval()


@pytest.mark.parametrize("spec", ["ScaledBN-A1", "ScaledBN-A2", "RBN-", "IEBN-(affine=False)"])
def test_weights_of_another_meaning_become_those_of_the_same_evaluation(spec):
    norm = norm_with_learned_state(spec).requires_grad_(False)
    x = torch.randn(2, 4, 3, 3)
    expected, report = norm(x), fbn_plugin.NormReport()
    new = convert_norm(norm, "FBN(t_sigma=3, affine=True)", report=report)
    assert type(new) is fbn_plugin.FilteredBatchNorm2d and not new.training and report.changed[0].note == ""
    assert not any(parameter.requires_grad for parameter in new.parameters())
    torch.testing.assert_close(new(x), expected)


@pytest.mark.parametrize("spec", ["ScaledBN-A1", "ScaledBN-A2", "RBN-", "IEBN-", "ConvNorm", "LearnedNorm", "FFRN"])
def test_the_same_kind_keeps_all_of_its_parameters(spec):
    norm = norm_with_learned_state(spec)
    x, parameters, report = torch.randn(2, 4, 3, 3), dict(norm.named_parameters()), fbn_plugin.NormReport()
    expected = norm(x)
    new = convert_norm(norm, spec, sources=("BN", "FRN", "LearnedNorm"), report=report)
    assert new is not norm and torch.equal(new(x), expected) and report.changed[0].note == ""
    assert all(parameter is parameters[name] for name, parameter in new.named_parameters())


@pytest.mark.parametrize("spec", ["ScaledBN-A1", "ScaledBN-A2", "RBN", "RBN-", "IEBN", "IEBN-"])
def test_report_says_that_weights_take_another_meaning(spec):
    report = fbn_plugin.NormReport()
    convert_norm(nn.BatchNorm2d(4), spec, report=report)
    assert report.changed[0].note == "weight and bias mean something else, so the evaluation changes"


def test_filter_response_and_learned_norms_are_reported_and_converted():
    model = nn.Sequential(*(fbn_plugin.get_norm(spec, 4) for spec in ("FRN", "FRN(tlu=True)", "LearnedNorm", "BN")))
    weight, report = model[0].weight, fbn_plugin.NormReport()
    convert_norm(model, "FBN", report=report)
    assert [(entry.name, entry.reason) for entry in report.left] == [
        ("0", "FRN is not among the sources"),
        ("1", "FRN is not among the sources"),
        ("2", "LearnedNorm is not among the sources"),
    ]
    report = fbn_plugin.NormReport()
    with pytest.warns(UserWarning, match="left as it is, FilterResponseNorm2d"):  # its threshold is an activation
        convert_norm(model, "BN", sources=("FRN", "LearnedNorm"), report=report)
    assert [type(norm).__name__ for norm in model] == [
        "BatchNorm2d",
        "FilterResponseNorm2d",
        "BatchNorm2d",
        "FilteredBatchNorm2d",
    ]
    assert model[0].weight is weight and model[2].weight is None
    assert report.changed[1].note == "not carried over: mean_network, std_network; running statistics are fresh"


def test_report_names_lost_kernels():
    report = fbn_plugin.NormReport()
    convert_norm(fbn_plugin.ConvNorm2d(4, kernel_sizes=(2, 2)), "BN", report=report)
    assert report.changed[0].note == "not carried over: kernel0, kernel1"


# --- report --------------------------------------------------------------------------------------------------------


def test_report_says_what_was_changed_and_what_was_left_and_why():
    model = network()
    model.add_module("group", nn.GroupNorm(2, 8))
    model.add_module("loud", Loud(8))
    report = fbn_plugin.NormReport()
    with pytest.warns(UserWarning, match="left as it is, Loud .*give the class a `description`"):
        assert convert_norm(model, "GN(num_groups=4)", report=report) is model
    assert [c.name for c in report.changed] == ["1", "3.1", "7"]
    assert str(report) == (
        "3 norms changed, 2 left\n"
        "  1 x BatchNorm2d -> GroupNorm (not carried over: running_mean, running_var, momentum): 1\n"
        "  1 x SyncBatchNorm -> GroupNorm (not carried over: running_mean, running_var, momentum): 3.1\n"
        "  1 x BatchNorm1d -> GroupNorm (not carried over: running_mean, running_var): 7\n"
        "  1 x GroupNorm left: GN is not among the sources: group\n"
        f"  1 x Loud left: {OWN_FORWARD}: loud"
    )


def test_report_names_fresh_statistics_lost_filters_and_hooks():
    report = fbn_plugin.NormReport()
    norm = fbn_plugin.FilteredGroupNorm(2, 8)
    norm.register_forward_hook(lambda *_: None)
    convert_norm(norm, "BN", sources="GN", report=report)
    assert report.changed[0].note == "not carried over: the filter, hooks; running statistics are fresh"
    assert "the model" in str(report)


# --- what is chosen, and what is said of the rest ------------------------------------------------------------------


def staged():
    """A frozen stage and two that train, all of their norms frozen, and a head with a batch norm."""
    stages = [
        nn.ModuleDict({"conv": nn.Conv2d(8, 8, 1), "norm": torchvision.ops.FrozenBatchNorm2d(8)}) for _ in range(3)
    ]
    stages[0].requires_grad_(False)
    return nn.ModuleDict({"body": nn.Sequential(*stages), "head": nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))})


def kinds(model):
    return [entry.kind for entry in fbn_plugin.summarize(model).entries]


def said(model, *args, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert_norm(model, *args, **kwargs)
    return [str(each.message) for each in caught]


def test_frozen_stages_stay_frozen_unless_thawed():
    report = fbn_plugin.NormReport()
    model = staged()
    assert said(model, "FBN", sources=("BN", "FrozenBN"), report=report) == []
    assert kinds(model) == ["FrozenBN", "FBN", "FBN", "FBN"]
    assert [(left.name, left.reason) for left in report.left] == [
        ("body.0.norm", "the Conv2d beside it is frozen: thaw=True")
    ]
    convert_norm(model, "FBN", sources="FrozenBN", thaw=True)
    assert kinds(model) == ["FBN"] * 4


def test_one_sentence_says_what_seems_forgotten():
    assert said(staged(), "FBN") == [
        "2 frozen norms beside layers that train are left, such as 'body.1.norm': sources=('BN', 'FrozenBN') converts "
        "them too"
    ]
    assert said(staged(), "FBN", sources="BN") == []
    only_frozen = staged()["body"]
    assert said(only_frozen, "FBN") == [
        "nothing was converted to FBN: the model has no batch normalization, but 3 frozen ones: sources='FrozenBN' "
        "converts them"
    ]
    assert said(only_frozen[:1], "FBN", sources="FrozenBN") == [
        "nothing was converted to FBN: the model has no norm of FrozenBN beside a layer that trains, but 1 in frozen "
        "stages: thaw=True converts them"
    ]
    groups = nn.Sequential(nn.GroupNorm(2, 8), nn.GroupNorm(2, 8))
    assert said(groups, "FBN") == [
        "nothing was converted to FBN: the model has no batch normalization, but 2 of GN: sources='GN'"
    ]
    assert said(nn.Sequential(nn.BatchNorm2d(8)), "FBN", exclude="0") == [
        "nothing was converted to FBN: the model has no batch normalization among those that include and exclude "
        "leave, out of 1"
    ]


@pytest.mark.parametrize(
    "layers",
    [
        lambda: nn.Sequential(torchvision.ops.FrozenBatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)),  # before its layer
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(nn.ReLU(), torchvision.ops.FrozenBatchNorm2d(4))),
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 1), fbn_plugin.FilteredBatchNorm2d(4), torchvision.ops.FrozenBatchNorm2d(4)
        ),
        lambda: HoldsItsNorm(4, 4, 1),
    ],
)
def test_the_layer_that_a_frozen_norm_belongs_to(layers):
    for frozen in (False, True):
        model = nn.Sequential(layers(), nn.Linear(3, 3))
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.requires_grad_(not frozen)
        assert bool(said(model, "FBN", sources="FrozenBN")) == frozen
        assert ("FrozenBN" in kinds(model)) == frozen


class HoldsItsNorm(nn.Conv2d):
    def __init__(self, *args):
        super().__init__(*args)
        self.norm = torchvision.ops.FrozenBatchNorm2d(4)


def test_include_and_exclude_name_modules_or_patterns():
    def converted(**arguments):
        model = convert_norm(torchvision.models.resnet18(), "FBN", **arguments)
        return {entry.name for entry in fbn_plugin.summarize(model).entries if entry.kind == "FBN"}

    every = converted()
    assert len(every) == 20
    assert converted(include="bn1") == {"bn1"}
    assert converted(include="layer1") == {f"layer1.{i}.bn{j}" for i in (0, 1) for j in (1, 2)}
    assert converted(include=["layer1", "layer[23].1"]) == converted(include="layer1") | {
        f"layer{i}.1.bn{j}" for i in (2, 3) for j in (1, 2)
    }
    down = {f"layer{i}.0.downsample.1" for i in (2, 3, 4)}
    assert converted(exclude="*.downsample.1") == every - down == converted(exclude="*.downsample")
    assert converted(include="layer2", exclude=("layer2.0", "*bn2")) == {"layer2.1.bn1"}
    report = fbn_plugin.NormReport()
    convert_norm(torchvision.models.resnet18(), "FBN", include="layer*", exclude="layer1", report=report)
    assert [(left.name, left.reason) for left in report.left[:2]] == [
        ("bn1", "include does not name it"),
        ("layer1.0.bn1", "exclude names it"),
    ]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_name_that_no_norm_has_is_an_error_that_names_it(argument):
    model = network()
    with pytest.raises(ValueError, match=f"{argument}='3.2' names no norm of the model, which has 3, such as '3.1'"):
        convert_norm(model, "FBN", **{argument: ["1", "3.2"]})
    assert type(model[1]) is nn.BatchNorm2d


def test_arguments_that_name_nothing():
    for argument, value in (("include", 3), ("exclude", [nn.Identity()]), ("sources", 2)):
        with pytest.raises(ValueError, match=f"{argument} takes a name or several, got "):
            convert_norm(network(), "FBN", **{argument: value})
    with pytest.raises(ValueError, match="sources names no family of norms: accepted are BN, FrozenBN"):
        convert_norm(network(), "FBN", sources=())


def test_a_shared_norm_is_chosen_by_any_of_its_names():
    def shared():
        norm = nn.BatchNorm2d(4)
        return nn.ModuleDict({"a": norm, "b": norm, "c": nn.BatchNorm2d(4)})

    assert kinds(convert_norm(shared(), "FBN", include="b")) == ["FBN", "BN"]
    assert kinds(convert_norm(shared(), "FBN", exclude="b")) == ["BN", "FBN"]


def test_lazy_norms_are_to_run_once():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LazyBatchNorm2d())
    with pytest.warns(UserWarning, match="LazyBatchNorm2d .*run the model once, then convert"):
        convert_norm(model, "FBN")
    model(torch.randn(2, 3, 4, 4))
    assert kinds(convert_norm(model, "FBN")) == ["FBN"]


def test_a_norm_whose_forward_was_replaced_is_left():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model[1].forward = lambda x: 2 * x
    with pytest.warns(UserWarning, match=r"1 norm is left as it is, BatchNorm2d \(at '1'\): its forward was replaced"):
        assert kinds(convert_norm(model, "FBN")) == ["BN", "FBN"]


class Theirs(nn.Module):
    """A frozen norm of somebody else's."""

    def __init__(self, channels):
        super().__init__()
        for name, start in (("weight", 2.0), ("bias", 1.0), ("running_mean", 0.5), ("running_var", 4.0)):
            self.register_buffer(name, torch.full((channels,), start))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def test_a_class_that_is_not_known_is_told_and_can_be_registered():
    class Unknown(Theirs):
        def __init__(self, channels):
            super().__init__(channels)
            self.weight = nn.Parameter(self._buffers.pop("weight"))  # so it is not taken for a frozen norm

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Unknown(4), Theirs(4))
    with pytest.warns(UserWarning, match=r"1 norm is .*Unknown \(at '1'\): .*not known.*fbn_plugin.register_converter"):
        convert_norm(nn.Sequential(*model, nn.BatchNorm2d(4)), "FBN", sources="BN")
    with pytest.warns(UserWarning, match=r"Theirs \(at '0'\): .*fbn_plugin.register_converter"):
        convert_norm(nn.Sequential(Theirs(4)), "FBN", sources="FrozenBN")
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    try:
        fbn_plugin.register_converter(Theirs, "FrozenBN", dims=2)
        fbn_plugin.register_converter(Unknown, "Theirs", lambda old, factory: copy_norm_state(old, factory(4)))
        convert_norm(model, "FBN", sources=("Theirs", "FrozenBN"))
    finally:
        for cls in (Theirs, Unknown):
            description._DESCRIPTIONS.pop(cls, None)
    assert kinds(model) == ["FBN", "FBN"]
    torch.testing.assert_close(model.eval()(x), expected)


# --- options of the old norm ---------------------------------------------------------------------------------------

FILTERED = ["FBN", "SyncFBN", "FGN", "FLN", "FIN", "FFRN"]


@settings(max_examples=50, deadline=None)
@given(*[st.sampled_from(FILTERED)] * 2, st.floats(1.5, 9), st.booleans(), st.sampled_from([1e-3, 1e-6]))
def test_between_filtered_norms_the_filter_keeps_its_options(first, second, t_sigma, corrected, eps):
    old = fbn_plugin.get_norm(f"{first}(t_sigma={t_sigma!r}, gaussian_correction={corrected}, eps={eps})", 32)
    same = (first == "FFRN") == (second == "FFRN")  # whose cut is in units of another kind
    expected = (t_sigma, corrected, eps) if same else (5.0, False, eps)
    sources = ("BN", "GN", "LN", "IN", "FRN")
    new = convert_norm(copy.deepcopy(old), second, sources=sources)
    assert (new.t_sigma, new.gaussian_correction, new.eps) == expected
    assert convert_norm(old, f"{second}(t_sigma=2.5)", sources=sources).t_sigma == 2.5


IMAGE = ("RBN", "IEBN")  # whose scale depends on the image, so that they are left


@pytest.mark.parametrize("name", [name for name, _ in fbn_plugin.NORMS if name not in IMAGE])
def test_a_norm_converted_to_its_own_name_keeps_all_of_its_options(name):
    options = {
        "eps": 0.01, "momentum": 0.3, "t_sigma": 3.0, "gamma_init": 0.5, "num_groups": 2, "bias": False, "tlu": False,
        "kernel_sizes": (2, 2), "weighted_std": True, "gate_init": 0.5,
    }  # fmt: skip
    known = fbn_plugin.registry.norm_options(name)
    spec = NormSpec(name, {key: value for key, value in options.items() if key in known})
    old = fbn_plugin.get_norm(spec, 4)
    sources = ("BN", "FrozenBN", "GN", "LN", "IN", "FRN", "LearnedNorm")
    assert repr(convert_norm(copy.deepcopy(old), name, sources=sources)) == repr(old)


def test_report_says_which_cut_was_kept():
    report = fbn_plugin.NormReport()
    convert_norm(fbn_plugin.FilteredBatchNorm2d(4, t_sigma=4), "SyncFBN", report=report)
    assert report.changed[0].note == "keeps t_sigma=4"


def test_an_eps_of_zero_is_not_thawed():
    """torchvision's detectors with weights freeze with an eps of 0, with which a constant channel would be NaN."""
    frozen = torchvision.ops.FrozenBatchNorm2d(4, eps=0.0)
    frozen.running_var.copy_(torch.tensor([1e-6, 0.1, 1.0, 0.0]))
    frozen.bias.normal_()
    x, eps = torch.randn(2, 4, 3, 3), 1e-5
    norm = convert_norm(copy.deepcopy(frozen), "FBN", sources="FrozenBN")
    assert norm.eps == eps
    torch.testing.assert_close(norm.eval()(x)[:, :3], frozen(x)[:, :3])
    assert norm.train()(torch.zeros(2, 4, 3, 3)).isfinite().all()
    assert convert_norm(copy.deepcopy(frozen), "FrozenBN", sources="FrozenBN").eps == 0
    by_batch = convert_norm(copy.deepcopy(frozen), "FBN(track_running_stats=False)", sources="FrozenBN")
    assert by_batch.running_var is None and torch.equal(by_batch.weight, frozen.weight)


# --- norms that are held outside of the modules --------------------------------------------------------------------


class Holding(nn.Module):
    def __init__(self, hold, run):
        super().__init__()
        self.norm, self.run = nn.BatchNorm2d(4), run
        self.held = hold(self.norm)

    def forward(self, x):
        return self.run(self.held, x)


HELD = {
    "list": (lambda norm: [norm, nn.ReLU()], lambda held, x: held[0](x)),
    "dict of tuples": (lambda norm: {"a": (norm, 1)}, lambda held, x: held["a"][0](x)),
    "partial": (lambda norm: functools.partial(F.relu, norm), lambda held, x: held.args[0](x)),
    "partial of it": (lambda norm: functools.partial(norm), lambda held, x: held(x)),
    "bound method": (lambda norm: norm.forward, lambda held, x: held(x)),
}


@pytest.mark.parametrize("name", HELD)
def test_a_norm_that_is_also_held_elsewhere_is_replaced_there(name):
    model = Holding(*HELD[name])
    assert said(model, "FBN(t_sigma=2)") == []
    x = torch.randn(2, 4, 5, 5)
    x[0, 0, 0, 0] = 100.0
    expected = copy.deepcopy(model.norm)(x)
    assert torch.equal(model(x), expected) and model.norm.num_batches_tracked == 1
    fbn_plugin.convert_sync(model)
    model(x)
    assert model.norm.num_batches_tracked == 2 and type(model.norm) is fbn_plugin.SyncFilteredBatchNorm


@pytest.mark.parametrize(
    "hold", [lambda norm: lambda x: norm(x), lambda norm: lambda x, norm=norm: norm(x), lambda n: {n}]
)
def test_a_norm_that_a_closure_holds_is_told(hold):
    model = nn.Sequential(Holding(hold, None))
    assert said(model, "FBN") == ["the model still holds a norm that was replaced, outside of its modules: in '0.held'"]
    with pytest.warns(UserWarning, match="still holds a norm"):
        fbn_plugin.convert_sync(nn.Sequential(Holding(hold, None)))


def test_what_is_held_comes_back_with_an_error():
    model = Holding(*HELD["list"])
    norm = model.norm
    with pytest.raises(ValueError, match="empty"):
        convert_norm(model, "FBN", recalibrate=[])
    assert model.norm is norm and model.held[0] is norm


def test_a_list_that_holds_itself_and_other_things():
    model = Holding(lambda norm: [norm], None)
    model.held.append(model.held)
    model.other = {1: torch.ones(2), "x": None}
    convert_norm(model, "FBN")
    assert model.held[0] is model.norm and model.held[1] is model.held


# --- recalibration -------------------------------------------------------------------------------------------------


def test_refitting_is_least_squares_of_the_old_outputs():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(norm.weight)  # negative ones, too
    batches = [torch.randn(n, 4, 3, 5) * 2 + torch.randn(n, 1, 1, 1) for n in (3, 5)]
    x = torch.cat(batches)
    goal = norm.eval()(x).detach()
    base = torch.nn.functional.group_norm(x, 2)
    new = convert_norm(norm, "GN(num_groups=2)", recalibrate=[(batch, None) for batch in batches])
    for c in range(4):
        design = np.stack([base[:, c].numpy().ravel(), np.ones(base[:, c].numel())], 1).astype(np.float64)
        slope, shift = np.linalg.lstsq(design, goal[:, c].numpy().ravel(), rcond=None)[0]
        assert new.weight[c].item() == pytest.approx(slope, abs=1e-5)
        assert new.bias[c].item() == pytest.approx(shift, abs=1e-5)


@pytest.mark.parametrize("spec", ["GN(num_groups=2)", "FGN(num_groups=2)", "LN"])
def test_a_refitted_network_is_nearer_to_the_old_one_and_otherwise_untouched(spec):
    model = network()
    model[1].eval()
    model[1].register_forward_hook(lambda module, args, output: output * 1.0)
    old, copied = copy.deepcopy(model), convert_norm(copy.deepcopy(model), spec)
    data = [torch.randn(8, 3, 9, 9) for _ in range(3)]
    parameters = list(model.parameters())
    convert_norm(model, spec, recalibrate=data)
    assert all(a is b for a, b in zip(model.parameters(), parameters))
    assert not model[1].training and model[3].training and not model[1]._forward_pre_hooks
    x, first = torch.randn(8, 3, 9, 9), slice(0, 5)  # up to the second norm
    goal = old.eval()[first](x)
    errors = [(m.eval()[first](x) - goal).square().mean() for m in (model, copied)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("spec", ["FRN", "LearnedNorm(affine=True)"])
def test_other_norms_are_refitted_too(spec):
    torch.manual_seed(0)
    data = [torch.randn(8, 4, 5, 5) + 3]
    norm = norm_with_learned_state("BN")
    goal = norm(data[0])
    fresh, refitted = (
        convert_norm(nn.Sequential(copy.deepcopy(norm)), spec, recalibrate=batches) for batches in (None, data)
    )
    errors = [(model(data[0]) - goal).square().mean().item() for model in (fresh, refitted)]
    assert errors[1] < 0.5 * errors[0]


def test_refitting_leaves_activations_out():
    norm = timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU)
    data = [torch.randn(64, 8, 9, 9) * 3 + 2]
    norm.running_mean.fill_(2)
    norm.running_var.fill_(9)
    new = convert_norm(norm, "GN(num_groups=1)", recalibrate=data)
    assert type(new.act) is nn.SiLU
    torch.testing.assert_close(new.weight, torch.ones(8), atol=0.02, rtol=0)
    torch.testing.assert_close(new.bias, torch.zeros(8), atol=0.02, rtol=0)


def test_refitting_needs_data_and_norms_that_are_not_frozen():
    model = network()
    before = str(model)
    with pytest.raises(ValueError, match="recalibrate has no batch"):
        convert_norm(model, "LN", recalibrate=[])
    with pytest.raises(ValueError, match="recalibrate refits norms that are not frozen"):
        convert_norm(model, "FrozenBN", recalibrate=[torch.randn(2, 3, 9, 9)])
    assert str(model) == before


def test_refitted_scales_that_a_norm_cannot_hold_are_an_error():
    norm = nn.BatchNorm2d(4).half().eval()
    norm.weight.data.fill_(60000.0)
    norm.running_var.fill_(0)
    model = nn.Sequential(norm)
    with pytest.raises(ValueError, match="the weight that is fitted to a GroupNorm is not finite in torch.float16"):
        convert_norm(model, "GN(num_groups=1)", recalibrate=[torch.randn(2, 4, 3, 3).half() * 1e-2])
    assert model[0] is norm


def test_batch_norms_get_population_statistics():
    pytest.importorskip("fbn_plugin.training.population_statistics")
    norm, x = nn.GroupNorm(2, 4), torch.randn(16, 4, 8, 8) * 3 + 1
    model = nn.Sequential(norm, nn.BatchNorm2d(4)).eval()
    with pytest.raises(ValueError, match="empty"):
        convert_norm(model, "BN", sources="GN", recalibrate=[])
    assert model[0] is norm
    new = convert_norm(model, "BN", sources="GN", recalibrate=[x])[0]
    assert not new.training and model[1].running_mean.eq(0).all(), "what was not converted keeps its statistics"
    torch.testing.assert_close(new.running_mean, x.mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(new.running_var, x.var((0, 2, 3)), atol=0.05, rtol=0.01)


# --- synchronized norms --------------------------------------------------------------------------------------------


def test_convert_sync_keeps_filter_state_and_settings():
    options = {"t_sigma": 2.5, "grad_mode": "paper", "gaussian_correction": True, "gamma_init": 0.1}
    filtered = [
        fbn_plugin.FilteredBatchNorm2d(8, eps=1e-3, momentum=None, **options),
        fbn_plugin.FilteredBatchNorm1d(8, affine=False, **options),
        fbn_plugin.FilteredBatchNorm3d(8, track_running_stats=False, **options),
    ]
    model = nn.Sequential(*filtered, nn.BatchNorm2d(8, eps=1e-3, momentum=0.3), nn.BatchNorm1d(8))
    model[0].running_mean.normal_()
    model[0].eval()
    state, parameters, group = model.state_dict(), dict(model.named_parameters()), object()
    report = fbn_plugin.NormReport()
    assert fbn_plugin.convert_sync(model, group, report) is model
    assert [type(m) for m in model] == [fbn_plugin.SyncFilteredBatchNorm] * 3 + [nn.SyncBatchNorm] * 2
    assert all(getattr(m, name) == value for m in model[:3] for name, value in options.items())
    assert all(m.process_group is group for m in model)
    assert [m.eps for m in model] == [1e-3, 1e-5, 1e-5, 1e-3, 1e-5]
    assert [m.momentum for m in model] == [None, 0.1, 0.1, 0.3, 0.1]
    assert not model[0].training and model[1].training and model[1].weight is None and model[2].running_mean is None
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [(change.name, change.note) for change in report.changed] == [(str(i), "") for i in range(5)]
    assert type(fbn_plugin.convert_sync(nn.BatchNorm2d(4))) is nn.SyncBatchNorm, "a norm by itself"


def test_convert_sync_keeps_shared_norms_shared():
    norm = fbn_plugin.FilteredBatchNorm2d(4)
    model = fbn_plugin.convert_sync(nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)}))
    assert model["a"] is model["b"][0] and type(model["a"]) is fbn_plugin.SyncFilteredBatchNorm


def test_convert_sync_reports_what_it_leaves_and_warns_of_local_moments():
    group = object()
    names = ["GN(num_groups=2)", "FLN", "FrozenBN", "RBN", "ScaledBN-A1", "ConvNorm", "FRN"]
    synchronized = [fbn_plugin.SyncFilteredBatchNorm(4, process_group=group), nn.SyncBatchNorm(4)]
    others = [fbn_plugin.FilteredBatchNormAct2d(4), Loud(4)]
    model = nn.Sequential(*(fbn_plugin.get_norm(name, 4) for name in names), *synchronized, *others)
    before, report = list(model), fbn_plugin.NormReport()
    with pytest.warns(UserWarning) as caught:
        fbn_plugin.convert_sync(model, report=report)
    assert [str(w.message) for w in caught] == [
        "5 batch norms are left unsynchronized, such as RepresentativeBatchNorm2d (at '3'): see the report"
    ]
    assert list(model) == before and not report.changed and model[7].process_group is group
    more = "it does more than normalize, and has no synchronized form"
    nothing = "takes no moments of a batch, so there is nothing to synchronize"
    assert [left.reason for left in report.left] == [
        *(f"GN {nothing}", f"LN {nothing}", "it is frozen", more, more, more, f"FRN {nothing}"),
        *("it is synchronized already",) * 2,
        "it is fused with its activation: synchronize before fuse_norm_act",
        OWN_FORWARD,
    ]
    with pytest.warns(UserWarning, match="synchronized.*no batch normalization"):
        fbn_plugin.convert_sync(nn.Linear(2, 2))


def test_process_groups_stay_between_synchronized_norms():
    group = object()
    norm = convert_norm(fbn_plugin.SyncFilteredBatchNorm(4, t_sigma=2.0, process_group=group), "SyncBN")
    assert type(norm) is nn.SyncBatchNorm and norm.process_group is group
    assert convert_norm(norm, "SyncFBN(t_sigma=3)").process_group is group
    assert convert_norm(fbn_plugin.FilteredBatchNorm2d(4), "SyncFBN").process_group is None


@pytest.mark.parametrize("spec", ["BN", "FBN(t_sigma=3)", "SyncBN", "FrozenBN", "GN(num_groups=2)"])
def test_synchronized_filtered_norms_convert_there_and_back(spec):
    norm = norm_with_learned_state("SyncFBN(t_sigma=3)")
    x, weight = torch.randn(2, 4, 3, 3), norm.weight
    expected = norm(x)
    there = convert_norm(norm, spec)
    assert type(there) is type(fbn_plugin.get_norm(spec, 4))
    back = convert_norm(there, "SyncFBN(t_sigma=3)", sources=("BN", "FrozenBN", "GN"))
    assert repr(back) == repr(norm)
    assert spec == "FrozenBN" or back.weight is weight
    if "GN" not in spec:
        torch.testing.assert_close(there(x), expected)
        torch.testing.assert_close(back(x), expected)


def test_convert_sync_says_where_a_small_scale_is_forgotten():
    report = fbn_plugin.NormReport()
    model = fbn_plugin.convert_sync(nn.Sequential(fbn_plugin.ScaledBatchNorm2d(4, gamma_init=0.25)), report=report)
    assert torch.equal(model[0].weight, torch.full((4,), 0.25)) and not hasattr(model[0], "gamma_init")
    assert [change.note for change in report.changed] == ["not carried over: gamma_init"]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("between", ["SyncFBN", "ScaledBN-A1", "GN(num_groups=2)", "SyncBN"])
def test_norms_for_any_number_of_dimensions_remember_theirs(dims, between):
    """A copy and a pickle, too."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    model = nn.Sequential(conv(3, 4, 1), (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](4))
    convert_sync(model) if between == "SyncBN" else convert_norm(model, between)
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    convert_norm(model, "FBN", sources=("BN", "GN"))
    assert type(model[1]).__name__ == f"FilteredBatchNorm{dims}d"
    model(torch.randn(2, 3, *(5,) * dims))


def test_an_empty_include_is_refused():
    with pytest.raises(ValueError, match="include names no norm, got .*None is all"):
        convert_norm(nn.Sequential(nn.BatchNorm2d(4)), "FBN", include=[])


def test_a_group_for_each_channel_of_rows_is_said():
    model, report = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), NormReport()
    with pytest.warns(UserWarning, match="FGN at '1': .*group for each channel.*constant"):
        convert_norm(model, "FGN", report=report)
    assert "constant" in report.changed[0].note
    with warnings.catch_warnings():  # Python 3.10 takes no action here
        warnings.simplefilter("error")
        convert_norm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "FGN(num_groups=2)")


def test_no_model():
    with pytest.raises(TypeError, match="takes a model, an nn.Module, and a spec, got str"):
        convert_norm("FBN", nn.BatchNorm2d(4))
    with pytest.raises(TypeError, match="got str"):
        fbn_plugin.summarize("FBN")
