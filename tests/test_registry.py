"""Spec strings, the registry and the factories that frameworks receive."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fbn_plugin
from fbn_plugin import NORMS, get_norm, layers, norm_factory, parse_spec
from fbn_plugin.registry import norm_options

EXPECTED = {
    "BN": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    "SyncBN": (nn.SyncBatchNorm,) * 3,
    "FrozenBN": (fbn_plugin.FrozenBatchNorm1d, fbn_plugin.FrozenBatchNorm2d, fbn_plugin.FrozenBatchNorm3d),
    "GN": (nn.GroupNorm,) * 3,
    "LN": (fbn_plugin.LayerNorm2d,) * 3,
    "IN": (layers.InstanceNorm1d, layers.InstanceNorm2d, layers.InstanceNorm3d),
    "FBN": (fbn_plugin.FilteredBatchNorm1d, fbn_plugin.FilteredBatchNorm2d, fbn_plugin.FilteredBatchNorm3d),
    "SyncFBN": (fbn_plugin.SyncFilteredBatchNorm,) * 3,
    "FGN": (fbn_plugin.FilteredGroupNorm,) * 3,
    "FLN": (fbn_plugin.FilteredLayerNorm2d,) * 3,
    "FIN": (fbn_plugin.FilteredInstanceNorm2d,) * 3,
    "FRN": (fbn_plugin.FilterResponseNorm2d,) * 3,
    "FFRN": (fbn_plugin.FilteredFilterResponseNorm2d,) * 3,
    "PerActivationBN": (fbn_plugin.PerActivationBatchNorm2d,) * 3,
    "ConvNorm": (None, fbn_plugin.ConvNorm2d, None),
    "LearnedNorm": (fbn_plugin.LearnedStatsNorm2d,) * 3,
    "ScaledBN": (fbn_plugin.ScaledBatchNorm1d, fbn_plugin.ScaledBatchNorm2d, fbn_plugin.ScaledBatchNorm3d),
    "ScaledBN-A1": (fbn_plugin.ScaledBatchNormA1,) * 3,
    "ScaledBN-A2": (fbn_plugin.ScaledBatchNormA2,) * 3,
    "RBN": (fbn_plugin.RepresentativeBatchNorm2d,) * 3,
    "RBN-": (fbn_plugin.GatedBatchNorm2d,) * 3,
    "IEBN": (fbn_plugin.InstanceEnhancementBatchNorm2d,) * 3,
    "IEBN-": (fbn_plugin.GatedBatchNorm2d,) * 3,
}
START = {
    "ScaledBN": 0.1,
    "ScaledBN-A1": 0.1,
    "ScaledBN-A2": 0.1,
    "RBN": 0.731,
    "RBN-": 0.731,
    "IEBN": 0.269,
    "IEBN-": 0.269,
}


def test_the_table_here_is_the_registry():
    assert [name for name, _ in NORMS] == list(EXPECTED)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("name", EXPECTED)
def test_every_name_builds_its_class_and_normalizes(name, dims):
    if EXPECTED[name][dims - 1] is None:
        with pytest.raises(ValueError, match=f"{name} .*{dims} spatial dimensions"):
            get_norm(name, 32, dims=dims)
        return
    norm = get_norm(name, 32, dims=dims)
    assert type(norm) is EXPECTED[name][dims - 1]
    assert name == "LearnedNorm" or norm.weight.shape == (32,), "every norm has a scale and a shift unless told not to"
    if name == "LearnedNorm":  # whose statistics are to be learned yet, and which has no scale and shift in the paper
        assert norm(torch.randn(2, 32, *[3] * dims)).isfinite().all() and norm.weight is None
        return
    if name not in ("SyncBN", "FrozenBN"):  # one refuses to train on a CPU, the other does not look at its input
        y = norm(torch.randn(2, 32, *[3] * dims) * 3 + 1)
        centered = name not in ("FRN", "FFRN")
        size = y.std() if centered else y.square().mean().sqrt()
        assert (y.mean().abs() < 0.1 or not centered) and 0.8 < size / START.get(name, 1) < 1.2


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", EXPECTED)
def test_every_norm_takes_a_batch_of_no_images(name, training):
    """As the mask head of a detector gets it where nothing is detected."""
    if name == "SyncBN":
        pytest.skip("SyncBN trains on GPUs only")
    norm = get_norm(name, 32).train(training)
    x = torch.empty(0, 32, 14, 14, requires_grad=True)
    y = norm(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert not training or all((parameter.grad == 0).all() for parameter in norm.parameters())
    assert all(buffer.isfinite().all() for buffer in norm.buffers())


def test_options_reach_the_layer():
    norm = get_norm("FBN(t_sigma=4.0, eps=1e-3, momentum=None, affine=False, grad_mode='paper')", 8)
    assert (norm.t_sigma, norm.eps, norm.momentum, norm.weight, norm.grad_mode) == (4.0, 1e-3, None, None, "paper")
    assert get_norm("FBN(t_sigma=inf)", 8).t_sigma == math.inf
    assert get_norm("FBN(gamma_init=0.1)", 8, dims=3).weight.eq(0.1).all()
    assert get_norm("ScaledBN-A2(gamma_init=0.2)", 8).weight.eq(0.2).all()
    assert get_norm("RBN-(gate_init=0.5)", 8).gate_bias.eq(0.5).all()
    assert get_norm("FGN(num_groups=4, t_sigma=3)", 8).num_groups == 4
    assert get_norm("GN(num_groups=2)", 8).num_groups == 2
    norm = get_norm("FBN", 8, device="meta", dtype=torch.float64)
    assert norm.weight.is_meta and norm.weight.dtype == torch.float64


@pytest.mark.parametrize("name", ["GN", "FGN"])
def test_as_many_groups_as_divide_the_channels_up_to_32(name):
    groups = {channels: get_norm(name, channels).num_groups for channels in (1, 16, 24, 40, 48, 64, 74, 136, 2048)}
    assert groups == {1: 1, 16: 16, 24: 24, 40: 20, 48: 24, 64: 32, 74: 2, 136: 17, 2048: 32}
    again = get_norm(str(pickle.loads(pickle.dumps(norm_factory(name))).spec), 24)
    assert again.num_groups == 24
    with pytest.raises(ValueError, match="32 groups for 24 channels"):  # those that are asked for stay
        get_norm(f"{name}(num_groups=32)", 24)
    with pytest.raises(ValueError, match="'num_groups' of .*None"):
        get_norm(f"{name}(num_groups=None)", 24)


@pytest.mark.parametrize("channels", ["8", None, -1, 8.0])
@pytest.mark.parametrize("spec", ["BN", "FBN", "GN(num_groups=2)", "FGN", "LN", "ConvNorm", "RBN"])
def test_what_is_no_number_of_channels_is_named(spec, channels):
    with pytest.raises(ValueError, match=rf"wants a number of channels, got {channels!r}"):
        get_norm(spec, channels)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", EXPECTED)
def test_a_batch_without_images(name, training):
    """As in the head of a detector for images in which nothing is found; DDP waits for the gradients all the same."""
    norm = get_norm(name, 32).train(training)
    x = torch.empty(0, 32, 4, 4, requires_grad=True)
    y = norm(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert not training or all(parameter.grad is not None for parameter in norm.parameters())


def test_no_norm_and_callables():
    assert get_norm("", 8) is None and get_norm(None, 8) is None
    assert isinstance(get_norm(nn.BatchNorm2d, 8), nn.BatchNorm2d)
    assert isinstance(get_norm(norm_factory("FBN"), 8), fbn_plugin.FilteredBatchNorm2d)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("FBM", "unknown norm 'FBM' \\(did you mean 'FBN'\\?\\): accepted are BN, SyncBN, .*FIN, .*IEBN-$"),
        ("FBN(" + "(" * 900 + ")", "a norm's options are written option=value, each .* or 'text', got 'FBN"),
        ("FBN(t_sigma=" + "-" * 900 + "3)", "a norm's options are written option=value|t_sigma must be a number"),
        ("FBN(" + "(" * 100_000, "a spec has at most 1,000 characters, got 100,004: 'FBN"),
        ("F" * 100_000, "a spec has at most 1,000 characters"),
        ("FBN(t_sigma=\0)", "a norm's options are written option=value"),
        ("FBN(t_sigma=exit())", "a norm's options are written option=value"),
        ("FBN(t_sigma=[9 for x in (1,) * 10**9])", "a norm's options are written option=value"),
        ("FBN(t_sigma=9**9**9)", "a norm's options are written option=value"),
        ("FBN)(t_sigma=4", "a norm is written NAME"),
        ("FBN()(t_sigma=4)", "a norm's options are written option=value"),
        ("RBN-(gate_init=1e31)", "option 'gate_init' of RBN- must lie between -1e\\+30 and 1e\\+30, got 1e\\+31"),
        ("RBN-(gate_init=1" + "0" * 400 + ")", "option 'gate_init' of RBN- must lie between"),
        ("Banana", "unknown norm 'Banana'.*: accepted are BN"),
        ("FBN(t_sgma=3)", "unknown option of FBN 't_sgma' \\(did you mean 't_sigma'\\?\\): accepted are eps, momentum"),
        ("FBN(num_groups=3)", "unknown option of FBN 'num_groups'"),
        ("FBN(num_channels=3)", "unknown option of FBN 'num_channels'"),
        ("FBN(t_sigma=0.5)", "t_sigma .*greater than 1.*0.5"),
        ("FBN(grad_mode='true')", "grad_mode .*'exact', 'paper'.*'true'"),
        ("FBN(eps='a')", "'eps' of FBN .*number.*'a'"),
        ("FBN(affine=1)", "'affine' of FBN .*True or False.*1"),
        ("ScaledBN(gamma_init=0)", r"gamma_init .*\(0, 1\].*0"),
        ("RBN--", "unknown norm 'RBN--' \\(did you mean 'RBN-'"),
        ("FGN(num_groups=2.5)", "'num_groups' of FGN .*number.*2.5"),
        ("GN(num_groups=3)", "3 groups .*8 channels"),
        ("GN(num_groups=0)", "'num_groups' of GN must be at least 1, got 0$"),
        ("FGN(num_groups=3)", "3 groups .*8 channels"),
        ("FBN(4)", r"options are written by name, got 'FBN\(4\)': did you mean 'FBN\(t_sigma=4\)'\?$"),
        ("fgn(16)", r"did you mean 'FGN\(num_groups=16\)'"),
        ("FGN(16, 3, eps=1e-3)", r"did you mean 'FGN\(num_groups=16, t_sigma=3, eps=0.001\)'"),
        ("FGN(16, num_groups=8)", r"did you mean 'FGN\(t_sigma=16, num_groups=8\)'"),
        ("ScaledBN-A1(0.2)", r"did you mean 'ScaledBN-A1\(gamma_init=0.2\)'"),
        ("FBN(0.5)", r"options are written by name, got .*: accepted are eps=\.\.\., .*t_sigma=\.\.\."),
        ("FBN(4, t_sigma=0.5)", "options are written by name, got .*: accepted are eps"),
        ("FrozenBN(1e-3)", r"options are written by name, got .*: accepted are eps=\.\.\.$"),
        ("BN(1e-3)", r"options are written by name, got .*: accepted are eps=\.\.\., momentum"),
        ("FBN(t_sigma=3, 4)", "option=value"),
        ("FBN(*[4])", "option=value"),
        ("FBN(t_sigma=x)", "option=value"),
        ("FBN(t_sigma=__import__('os').getcwd())", "option=value"),
        ("FBN(**{})", "option=value"),
        ("FBN(t_sigma=2, t_sigma=3)", "given twice"),
        ("FBN(t_sigma=4)(eps=1e-3)", "option=value"),
        ("FBN(t_sigma=2).g(eps=1e-3)", "option=value"),
        ("FBN(eps={[]: 1})", "option=value"),
        ("FBN(eps=-1)", "'eps' of FBN .*0.*1.*-1"),
        ("FBN(momentum=3)", "'momentum' of FBN .*0.*1.*3"),
        ("FBN(t_sigma=2))(", "NAME.*option=value"),
        ("FBN(t_sigma=2", "NAME.*option=value"),
        ("3", "NAME.*option=value"),
        (3, "NAME.*option=value.*got 3"),
    ],
)
def test_bad_specs_are_one_sentence(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        get_norm(spec, 8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_name_in_any_case_is_stored_as_it_is_registered(name):
    for written in (name.lower(), name.upper(), name.swapcase()):
        spec = parse_spec(f" {written} (eps=1e-3)")
        assert str(spec) == f"{name}(eps=0.001)" and norm_factory(written).spec.name == name


def test_of_names_that_differ_in_case_the_exact_one_wins():
    def OwnBN(num_channels, *, dims=2, device=None, dtype=None):
        return nn.BatchNorm2d(num_channels)

    def OWNbn(num_channels, *, dims=2, device=None, dtype=None):
        return nn.Identity()

    before = dict(NORMS)
    try:
        NORMS.register(OwnBN)
        assert parse_spec("ownbn").name == "OwnBN"
        NORMS.register(OWNbn)
        assert (parse_spec("OwnBN").name, parse_spec("OWNbn").name) == ("OwnBN", "OWNbn")
        with pytest.raises(ValueError, match="'ownbn' must be written 'OwnBN' or 'OWNbn'"):
            parse_spec("ownbn")
    finally:
        for name in set(dict(NORMS)) - set(before):
            del NORMS._obj_map[name]


def test_dims_out_of_range():
    with pytest.raises(ValueError, match="dims .*1, 2 or 3.*4"):
        norm_factory("FBN", dims=4)


numbers = st.floats(1.001, 1e6) | st.integers(2, 100) | st.just(math.inf)


@given(st.sampled_from(["FBN", "FGN", "FLN", "FIN"]), numbers, st.floats(0, 1), st.sampled_from(["exact", "paper"]))
def test_specs_survive_the_trip_through_text(name, t_sigma, eps, mode):
    spec = parse_spec(f"  {name} ( t_sigma = {t_sigma} , eps={eps},grad_mode={mode!r})")
    assert spec.options == {"t_sigma": t_sigma, "eps": eps, "grad_mode": mode}
    assert parse_spec(str(spec)) == spec


PIECES = ["FBN", "GN", "t_sigma", "eps", "num_groups", *"()=,-'", "1e-3", "9" * 400, "inf", "{[]: 1}"]
words = st.sampled_from(PIECES)


@given(st.text(max_size=30) | st.lists(words, max_size=9).map("".join))
def test_no_text_does_anything_but_parse_or_say_why(text):
    try:
        spec = parse_spec(text)
    except ValueError as error:
        assert str(error)
    else:
        assert spec.name in NORMS


@pytest.mark.parametrize(
    "spec", ["FBN(t_sigma=inf)", "FGN(num_groups=4, t_sigma=3)", "BN", "RBN-", "ScaledBN-A1(gamma_init=0.2)"]
)
def test_factories_can_be_pickled_copied_and_printed(spec):
    factory = norm_factory(spec, dims=1)
    for twin in (pickle.loads(pickle.dumps(factory)), copy.deepcopy(factory), eval(repr(factory))):
        assert twin.spec == factory.spec and repr(twin(8)) == repr(factory(8))


def test_factory_overrides():
    assert norm_factory("FBN(eps=1e-3)")(8, eps=1e-2).eps == 1e-2
    assert norm_factory("FGN(num_groups=4)")(num_features=8).num_channels == 8


def test_a_norm_of_ones_own():
    @NORMS.register()
    def Scale(num_channels, dims=2, device=None, dtype=None, init=2.0):
        norm = nn.Conv2d(num_channels, num_channels, 1, groups=num_channels, bias=False, device=device, dtype=dtype)
        nn.init.constant_(norm.weight, init)
        return norm

    try:
        assert norm_options("Scale") == {"init": 2.0}
        assert get_norm("Scale(init=3.0)", 4).weight.eq(3).all()
        with pytest.raises(ValueError, match="unknown option of Scale 'inti' \\(did you mean 'init'"):
            get_norm("Scale(inti=3.0)", 4)
    finally:
        NORMS._obj_map.pop("Scale")


def test_an_option_that_is_given_twice():
    with pytest.raises(ValueError, match="option 't_sigma' is given twice in 'FBN"):
        parse_spec("FBN(t_sigma=4, t_sigma=5)")
