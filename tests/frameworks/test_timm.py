"""timm takes the registered norms: as ``norm_layer``, by conversion, and through the places of timm that test for
batch normalization (timm 1.0.31)."""

import copy
import functools
import pickle
import sys
import types
import warnings

import pytest
import timm
import timm.layers
import timm.utils
import torch
from timm.layers import BatchNormAct2d, SyncBatchNormAct, create_norm, create_norm_act
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import fbn_plugin
from fbn_plugin import (
    NORMS,
    FilteredBatchNorm2d,
    FilteredInstanceNorm2d,
    FilteredLayerNorm2d,
    FilterResponseNorm2d,
    norm_factory,
)
from fbn_plugin.frameworks import timm as adapter
from fbn_plugin.frameworks.timm import FilteredBatchNormAct2d
from fbn_plugin.layers.filtered_batch_norm import FilterMixin

NAMES = ["BN", "SyncBN", "FrozenBN", "GN", "LN", "IN", "FBN", "SyncFBN", "FGN", "FLN", "FIN"]
NAMES += ["FRN", "FFRN", "ConvNorm", "LearnedNorm"]
NAMES += ["ScaledBN", "ScaledBN-A1", "ScaledBN-A2", "RBN", "RBN-", "IEBN", "IEBN-"]
# So that they fit 16 channels, have a scale, and mean ours: "frn" alone is a norm+activation of timm's.
OPTIONS = {"GN": "(num_groups=4)", "FGN": "(num_groups=4)", "LearnedNorm": "(affine=True)", "FRN": "(affine=True)"}
FORMS = {
    "name": "fbn",
    "spec": "FBN(t_sigma=5.0, grad_mode='exact')",
    "class": FilteredBatchNorm2d,
    "partial": functools.partial(FilteredBatchNorm2d, t_sigma=5),
    "factory": norm_factory("FBN(t_sigma=5)"),
    "partial of a factory": functools.partial(norm_factory("FBN"), t_sigma=5),
}


@pytest.fixture(autouse=True)
def registered():
    torch.manual_seed(0)
    adapter.register()
    yield
    adapter.unregister()


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}


def others_of(model: nn.Module) -> dict[str, type]:
    return {name: type(m) for name, m in model.named_modules() if not isinstance(m, _BatchNorm)}


def trained(model: nn.Module) -> nn.Module:
    """In evaluation mode, with scales and shifts that differ from their initial values, and statistics to match."""
    for norm in norms_of(model).values():
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 64, 64))
    return model.eval()


# --- norm_layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "cs3darknet_focus_s", "densenet121", "regnetx_002", "resnetv2_18"]
)
def test_every_form_of_norm_layer_gives_the_same_network(name, form):
    plain = timm.create_model(name, num_classes=10)
    model = timm.create_model(name, num_classes=10, norm_layer=form)
    assert {type(m) for m in norms_of(model).values()} <= {FilteredBatchNorm2d, FilteredBatchNormAct2d}
    assert {m.t_sigma for m in norms_of(model).values()} == {5.0}
    assert norms_of(model).keys() == norms_of(plain).keys()
    assert others_of(model) == others_of(plain)  # all activations among them
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_options_of_the_spec_arrive(name):
    model = timm.create_model(name, norm_layer="fbn(t_sigma=2, momentum=0.3, grad_mode='paper', eps=1e-2)")
    options = {(m.t_sigma, m.momentum, m.grad_mode, m.eps) for m in norms_of(model).values()}
    assert options == {(2.0, 0.3, "paper", 1e-2)}


def test_a_models_own_options_join_those_of_the_spec():
    # dpn and maxxvit bind eps over what get_norm_act_layer returns; ConvNormAct then looks that up once more
    layer = functools.partial(timm.layers.get_norm_act_layer("fbn(t_sigma=3)", "silu"), eps=0.5)
    norm = timm.layers.get_norm_act_layer(layer, nn.ReLU)(8)
    assert isinstance(norm, FilteredBatchNormAct2d)
    assert (norm.t_sigma, norm.eps, type(norm.act).__name__) == (3.0, 0.5, "SiLU")


@pytest.mark.parametrize("norm_layer", ["fgn", "gn", "FGN(t_sigma=3)"])
@pytest.mark.parametrize("name", ["efficientnet_b0", "regnetx_002", "test_resnet"])
def test_group_norms_where_32_groups_do_not_divide_the_channels(name, norm_layer):
    model = timm.create_model(name, num_classes=10, norm_layer=norm_layer)
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) > 9 and not any(isinstance(module, _BatchNorm) for module in model.modules())
    assert any(norm.num_channels % 32 for norm in norms) or name == "test_resnet"
    assert all(norm.num_groups == max(g for g in range(1, 33) if norm.num_channels % g == 0) for norm in norms)


@pytest.mark.parametrize("name", NAMES)
def test_every_registered_norm_has_a_norm_act_form(name):
    options = OPTIONS.get(name, "")
    images = torch.randn(4, 16, 6, 6) + 1
    plain = fbn_plugin.get_norm(name + options, 16)
    layer = timm.layers.get_norm_act_layer(name.lower() + options, act_layer=nn.Tanh)
    norm = layer(16, inplace=True, device="cpu", dtype=torch.float32)
    assert norm.state_dict().keys() == plain.state_dict().keys()
    norm.load_state_dict(plain.state_dict())
    assert all(getattr(norm, key) == getattr(plain, key) for key in ("eps", "momentum") if hasattr(plain, key))
    for module in (plain, norm):
        with torch.no_grad():
            module.weight.copy_(torch.linspace(0.5, 1.5, 16))
            module.bias.copy_(torch.linspace(-1, 1, 16))
    if name == "SyncBN":  # needs a process group in training
        plain, norm = plain.eval(), norm.eval()
    torch.testing.assert_close(norm(images), plain(images).tanh())


@pytest.mark.parametrize("name", NAMES)
def test_arguments_of_timms_norm_act_convention(name):
    options = OPTIONS.get(name, "")
    build = timm.layers.get_norm_act_layer(name.lower() + options, act_layer="leaky_relu")
    norm = build(16, act_kwargs={"negative_slope": 0.3}, inplace=False, drop_layer=nn.Dropout2d)
    assert norm.act.negative_slope == 0.3
    assert not norm.act.inplace
    assert isinstance(norm.drop, nn.Dropout2d)
    assert isinstance(build(16, apply_act=False).act, nn.Identity)
    assert isinstance(timm.layers.get_norm_act_layer(name.lower() + options)(16).act, nn.Identity)
    with pytest.raises(TypeError, match="apply_akt"):
        build(16, apply_akt=False)


@pytest.mark.parametrize("cls", [FilteredLayerNorm2d, FilteredInstanceNorm2d])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_classes_without_batch_statistics(name, cls):
    model = timm.create_model(name, num_classes=10, norm_layer=functools.partial(cls, t_sigma=2))
    norms = [m for m in model.modules() if isinstance(m, FilterMixin)]
    assert len(norms) == len(norms_of(timm.create_model(name)))
    assert all(isinstance(m, cls) and m.t_sigma == 2 for m in norms)
    assert not norms_of(model)
    output = model(torch.randn(2, 3, 96, 96))
    output.sum().backward()
    assert output.isfinite().all()


@pytest.mark.parametrize("spec", ["frn(tlu=True)", "ffrn(tlu=True, t_sigma=2)"])
def test_the_threshold_of_filter_response_norm_is_the_activation(spec):
    layer = timm.layers.get_norm_act_layer(spec, nn.SiLU)
    norm = layer(16)
    assert norm.tau is not None and isinstance(norm.act, nn.Identity)
    images = torch.randn(2, 16, 5, 5)
    name, bracket, options = spec.partition("(")
    torch.testing.assert_close(norm(images), fbn_plugin.get_norm(name.upper() + bracket + options, 16)(images))
    without = layer(16, apply_act=False)
    assert without.tau is None and isinstance(without.act, nn.Identity)
    model = timm.create_model("test_efficientnet", num_classes=10, norm_layer=spec)
    norms = [m for m in model.modules() if isinstance(m, FilterResponseNorm2d)]
    plain = norms_of(timm.create_model("test_efficientnet"))
    assert [m.tau is not None for m in norms] == [not isinstance(m.act, nn.Identity) for m in plain.values()]
    assert all(isinstance(m.act, nn.Identity) for m in norms)
    model(torch.randn(2, 3, 64, 64)).sum().backward()


def test_converting_to_a_threshold_puts_it_in_the_activations_place():
    name = "FRN(tlu=True)"
    with_act = fbn_plugin.convert_norm(BatchNormAct2d(16), name)
    assert with_act.tau is not None and isinstance(with_act.act, nn.Identity)
    without = fbn_plugin.convert_norm(BatchNormAct2d(16, apply_act=False), name)
    assert without.tau is None and isinstance(without.act, nn.Identity)


def test_timms_own_filter_response_norm_keeps_its_name():
    theirs = timm.layers.get_norm_act_layer("frn", nn.ReLU)(16)
    assert type(theirs).__module__ == "timm.layers.filter_response_norm"
    norm = timm.layers.get_norm_act_layer(FilterResponseNorm2d, nn.ReLU)(16)
    assert isinstance(norm, FilterResponseNorm2d) and norm.tau is not None


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
@pytest.mark.parametrize("spec", ["convnorm(map_size=32)", "learnednorm", "frn(eps=1e-5)", "ffrn"])
def test_models_of_the_other_papers_norms_train(name, spec):
    model = timm.create_model(name, num_classes=10, norm_layer=spec)
    kind = type(fbn_plugin.get_norm({"c": "ConvNorm", "l": "LearnedNorm", "f": "FRN"}[spec[0]], 8))
    assert sum(isinstance(m, kind) for m in model.modules()) == len(norms_of(timm.create_model(name)))
    output = model(torch.randn(2, 3, 64, 64))
    output.sum().backward()
    assert output.isfinite().all()
    assert all(p.grad is not None for p in model.parameters())


def test_conv_norm_in_timms_hands():
    model = timm.create_model("test_efficientnet", num_classes=10, norm_layer="convnorm(kernel_sizes=(2, 2))")
    images = torch.randn(4, 3, 64, 64)
    model(images)
    before = model.eval()(images)
    frozen = timm.layers.freeze_batch_norm_2d(copy.deepcopy(model))
    torch.testing.assert_close(frozen.train()(images), before, rtol=1e-4, atol=1e-5)
    without, _ = param_groups_weight_decay(model, 0.1)
    kernels = {kernel for norm in norms_of(model).values() for kernel in norm.kernels}
    assert without["weight_decay"] == 0 and kernels and kernels <= set(without["params"])
    back = fbn_plugin.convert_norm(model, "BN")
    torch.testing.assert_close(back(images), before)
    again = fbn_plugin.convert_norm(back, "ConvNorm(init_spread=0)").train()
    assert all(type(m).__name__ == "ConvNormAct2d" for m in norms_of(again).values())


def test_create_norm_layer_functions_know_specs():
    assert isinstance(timm.layers.create_norm_layer("fbn", 8), FilteredBatchNorm2d)
    norm = timm.layers.create_norm_act_layer("fgn(num_groups=2)", 8, act_layer="gelu")
    assert (norm.num_groups, type(norm.act).__name__) == (2, "GELU")


@pytest.mark.parametrize("name", ["batchnorm", "BatchNorm2d", "groupnorm", "layernorm2d", "rms_norm", ""])
def test_timms_own_names_keep_their_meaning(name):
    ours = timm.layers.get_norm_layer(name), timm.layers.get_norm_act_layer(name, nn.ReLU)
    adapter.unregister()
    theirs = timm.layers.get_norm_layer(name), timm.layers.get_norm_act_layer(name, nn.ReLU)
    assert ours[0] is theirs[0]
    assert repr(ours[1]) == repr(theirs[1])


def test_no_registered_name_shadows_one_of_timms():
    ours = {key.lower() for key, _ in NORMS}
    own = {"frn"}  # timm's norm+activation FilterResponseNormAct2d; it stays timm's
    assert not ours & (create_norm._NORM_MAP.keys() | create_norm_act._NORM_ACT_MAP.keys()) - own


@pytest.mark.parametrize(
    "text, kind",
    [("rbn", "RBN"), ("RBN-", "RBN-"), ("rbn_minus", "RBN-"), ("iebnminus", "IEBN-"), ("scaledbna1", "ScaledBN-A1")],
)
def test_names_in_lower_case_without_punctuation(text, kind):
    assert timm.layers.get_norm_layer(text).spec.name == kind
    assert type(timm.layers.get_norm_act_layer(text)(4)) is type(timm.layers.get_norm_act_layer(kind)(4))
    assert timm.layers.get_norm_act_layer("iebn-")(4).gate_bias.eq(-1).all()


@pytest.mark.parametrize("name", ["ScaledBN", "ScaledBN-A1", "ScaledBN-A2", "RBN", "RBN-", "IEBN", "IEBN-"])
@pytest.mark.parametrize("model_name", ["test_resnet", "test_efficientnet"])
def test_scaled_and_gated_norms_in_models(model_name, name):
    plain = timm.create_model(model_name, num_classes=10)
    model = timm.create_model(model_name, num_classes=10, norm_layer=f"{name}(eps=1e-3)".lower())
    cls = type(fbn_plugin.get_norm(name, 8))
    assert norms_of(model).keys() == norms_of(plain).keys()
    assert all(isinstance(norm, cls) and norm.eps == 1e-3 for norm in norms_of(model).values())
    assert others_of(model) == others_of(plain)
    fbn_plugin.apply_gamma_init(model)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["ScaledBN", "ScaledBN-A1", "ScaledBN-A2", "RBN-", "IEBN-"])
@pytest.mark.parametrize("conversion", ["freeze_batch_norm_2d", "convert_sync_batchnorm"])
@pytest.mark.parametrize("model_name", ["test_resnet", "test_efficientnet"])
def test_what_reads_weight_and_bias_gets_those_of_the_whole_norm(model_name, conversion, name):
    model = trained(timm.create_model(model_name, num_classes=10, norm_layer=name))
    images = torch.randn(2, 3, 64, 64)
    before = model(images)
    converted = getattr(timm.layers, conversion)(model)
    assert not any(isinstance(m, fbn_plugin.layers.batch_norm.BatchNormMixin) for m in converted.modules())
    torch.testing.assert_close(converted.eval()(images), before, rtol=1e-3, atol=1e-4)


def test_a_norm_that_is_no_batch_norm_in_evaluation_is_not_frozen():
    model = timm.create_model("test_resnet", norm_layer="rbn")
    with pytest.raises(ValueError, match="RepresentativeBatchNorm2d .*evaluation"):
        timm.layers.freeze_batch_norm_2d(model)


def test_input_norms_freeze_without_a_shift():
    norm = fbn_plugin.InputNorm2d()
    images = torch.randn(4, 3, 8, 8)
    norm(images)
    expected = norm.eval()(images)
    torch.testing.assert_close(timm.layers.freeze_batch_norm_2d(norm)(images), expected)


def test_timms_own_norms_pass_as_before():
    model = timm.create_model("test_efficientnet", norm_layer=functools.partial(nn.BatchNorm2d, eps=0.01))
    assert {(type(m), m.eps) for m in norms_of(model).values()} == {(BatchNormAct2d, 0.01)}
    assert timm.layers.get_norm_layer(None) is None
    assert timm.layers.get_norm_act_layer(None) is None


@pytest.mark.parametrize("get", ["get_norm_layer", "get_norm_act_layer"])
def test_an_unknown_name_is_one_sentence_that_lists_what_exists(get):
    with pytest.raises(ValueError, match=r"norm_layer 'fbm'.*'fbn'.*fgn.*groupnorm"):
        getattr(timm.layers, get)("fbm")
    with pytest.raises(ValueError, match=r"unknown option of FBN 'sigma'.*t_sigma"):
        getattr(timm.layers, get)("fbn(sigma=3)")


def test_a_norm_that_is_registered_later_works_where_it_can():
    @NORMS.register()
    def Later(num_channels, dims=2, device=None, dtype=None, eps=1e-5):
        return nn.GroupNorm(1, num_channels, eps, device=device, dtype=dtype)

    try:
        assert timm.layers.get_norm_layer("later(eps=0.5)")(8).eps == 0.5
        norm = timm.layers.get_norm_act_layer("later", nn.ReLU)(8, apply_act=True)
        assert isinstance(norm, nn.GroupNorm) and norm(torch.randn(2, 8, 3, 3)).min() == 0
    finally:
        NORMS._obj_map.pop("Later")


@pytest.mark.parametrize("name", NAMES)
def test_norm_act_layers_and_modules_can_be_pickled_and_copied(name):
    options = OPTIONS.get(name, "")
    layer = pickle.loads(pickle.dumps(timm.layers.get_norm_act_layer(name + options, nn.SiLU)))
    norm = layer(16).eval()
    images = torch.randn(2, 16, 5, 5)
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        torch.testing.assert_close(twin(images), norm(images))
        assert "SiLU" in repr(twin)


# --- register, unregister --------------------------------------------------------------------------------------------


def _imports_timms_functions(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    exec("from timm.layers import get_norm_layer, get_norm_act_layer, convert_sync_batchnorm", vars(module))
    sys.modules[name] = module
    return module


def test_register_and_unregister_reach_modules_imported_before_and_after():
    adapter.unregister()
    names = ("get_norm_layer", "get_norm_act_layer", "convert_sync_batchnorm")
    try:
        early = _imports_timms_functions("imported_early")
        theirs = [getattr(early, name) for name in names]
        adapter.register()
        adapter.register()
        late = _imports_timms_functions("imported_late")
        for module in (early, late):
            assert isinstance(module.get_norm_layer("fbn")(4), FilteredBatchNorm2d)
            assert isinstance(module.get_norm_act_layer("fbn", nn.ReLU)(4), FilteredBatchNormAct2d)
        adapter.unregister()
        adapter.unregister()
        for module in (early, late, timm.layers):
            assert [getattr(module, name) for name in names] == theirs
            with pytest.raises(KeyError):
                module.get_norm_layer("fbn")
        with pytest.raises(KeyError):
            timm.create_model("test_efficientnet", norm_layer="fbn")
    finally:
        sys.modules.pop("imported_early", None)
        sys.modules.pop("imported_late", None)


def test_who_holds_timms_functions_before_gets_ours():
    adapter.unregister()
    lookup = functools.partial(timm.layers.get_norm_layer)
    conversions = {"sync": timm.layers.convert_sync_batchnorm, "split": timm.layers.convert_splitbn_model}
    adapter.register()
    assert isinstance(lookup("fbn")(4), FilteredBatchNorm2d)
    model = nn.Sequential(nn.Sequential(FilteredBatchNorm2d(4)), FilteredBatchNorm2d(4))
    for convert in conversions.values():
        with pytest.warns(UserWarning, match="without the filter of 2 filtered ones") as said:
            convert(copy.deepcopy(model))
        assert [warning.filename for warning in said] == [__file__]


def test_fbn_plugin_register_includes_timm():
    adapter.unregister()
    assert "timm" in fbn_plugin.register()
    try:
        assert norms_of(timm.create_model("test_resnet", norm_layer="fbn"))
    finally:
        fbn_plugin.unregister()


# --- convert_norm ----------------------------------------------------------------------------------------------------


def test_converting_batch_norm_act_keeps_all_but_the_moments():
    model = trained(timm.create_model("test_efficientnet", num_classes=10, act_layer="gelu", drop_path_rate=0.0))
    model.bn1.drop = nn.Dropout(0.0)
    images = torch.randn(2, 3, 64, 64)
    before, others, state = model(images), others_of(model), model.state_dict()
    act, drop, weight = model.bn1.act, model.bn1.drop, model.bn1.weight
    weight.requires_grad_(False)

    assert fbn_plugin.convert_norm(model, "FBN(t_sigma=2)") is model

    assert {type(m) for m in norms_of(model).values()} == {FilteredBatchNormAct2d}
    assert {m.t_sigma for m in norms_of(model).values()} == {2.0}
    assert (model.bn1.act is act, model.bn1.drop is drop, model.bn1.weight is weight) == (True, True, True)
    assert not model.bn1.weight.requires_grad
    assert not model.bn1.training
    assert others_of(model) == others
    assert model.state_dict().keys() == state.keys()
    torch.testing.assert_close(model(images), before)

    # and back: the same network again
    fbn_plugin.convert_norm(model, "BN")
    assert {type(m) for m in norms_of(model).values()} == {BatchNormAct2d}
    torch.testing.assert_close(model(images), before)


@pytest.mark.parametrize("name", NAMES)
def test_batch_norm_act_converts_to_every_norm(name):
    options = OPTIONS.get(name, "")
    old = BatchNormAct2d(16, eps=0.1, act_layer=nn.SiLU)
    nn.init.uniform_(old.weight, 0.5, 1.5)
    act = old.act
    new = fbn_plugin.convert_norm(old, name + options)
    assert new.act is act
    assert torch.equal(new.weight, old.weight) if name == "FrozenBN" else new.weight is old.weight
    assert new.eps == 0.1
    images = torch.randn(4, 16, 5, 5)
    expected = fbn_plugin.get_norm(name + options, 16).eval()
    expected.eps = 0.1
    expected.load_state_dict(new.state_dict())
    torch.testing.assert_close(new.eval()(images), act(expected(images)))


@pytest.mark.parametrize(
    "cls",
    [
        timm.layers.LayerNorm2d,
        timm.layers.LayerNorm2dFp32,
        timm.layers.norm.LayerNormExp2d,
        timm.layers.norm_act.LayerNormAct2dFp32,
    ],
)
def test_layer_norms_of_channels_first_convert(cls):
    """A filter that is wide leaves the evaluation as it was; where channels are last there is no place for one."""
    model = nn.Sequential(cls(6, eps=1e-3), nn.LayerNorm(5)).eval()
    nn.init.normal_(model[0].weight)
    nn.init.normal_(model[0].bias)
    input = torch.randn(2, 6, 4, 5)
    expected = model(input)
    with pytest.warns(UserWarning, match="LayerNorm .*its channels are not the second dimension"):
        fbn_plugin.convert_norm(model, "FLN(t_sigma=100)", sources="LN")
    assert isinstance(model[0], fbn_plugin.FilteredLayerNorm2d) and model[0].eps == 1e-3
    assert type(model[1]) is nn.LayerNorm
    torch.testing.assert_close(model(input), expected)


def test_timms_synchronized_norms_convert():
    model = timm.layers.convert_sync_batchnorm(trained(timm.create_model("test_efficientnet", num_classes=10)))
    images = torch.randn(2, 3, 64, 64)
    before = model(images)
    assert {type(m) for m in norms_of(model).values()} == {SyncBatchNormAct}
    fbn_plugin.convert_norm(model, "FBN")
    assert {type(m) for m in norms_of(model).values()} == {FilteredBatchNormAct2d}
    torch.testing.assert_close(model(images), before)
    assert isinstance(fbn_plugin.convert_norm(SyncBatchNormAct(4), "FBN").act, nn.Identity)  # made without either


def test_a_norm_that_cannot_hold_an_activation_is_refused_before_anything_changes():
    model = timm.create_model("test_efficientnet")
    NORMS._obj_map["Later"] = lambda num_channels, dims=2, device=None, dtype=None: nn.Sequential(nn.Identity())
    try:
        with pytest.raises(ValueError, match="'bn1' .*Later.*Sequential.*activation"):
            fbn_plugin.convert_norm(model, "Later")
    finally:
        NORMS._obj_map.pop("Later")
    assert {type(m) for m in norms_of(model).values()} == {BatchNormAct2d}


# --- where timm tests for batch normalization ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_freezing_makes_frozen_norms_with_the_same_evaluation(name):
    model = trained(timm.create_model(name, num_classes=10, norm_layer="fbn"))
    images = torch.randn(2, 3, 64, 64)
    before, count = model(images), len(norms_of(model))
    frozen = timm.layers.freeze_batch_norm_2d(model)
    assert not norms_of(frozen)
    assert sum("FrozenBatchNorm" in type(m).__name__ for m in frozen.modules()) == count
    torch.testing.assert_close(frozen.train()(images), before, rtol=1e-4, atol=1e-5)  # statistics stay
    # What timm unfreezes is batch normalization: frozen norms do not say what they were. Convert once more.
    with pytest.warns(
        UserWarning, match=f"unfreeze_batch_norm_2d makes {count} frozen norms .*without a filter.*'FBN'"
    ):
        thawed = timm.layers.unfreeze_batch_norm_2d(frozen)
    assert not any(isinstance(m, FilterMixin) for m in thawed.modules())
    fbn_plugin.convert_norm(thawed, "FBN")
    assert all(isinstance(m, FilteredBatchNorm2d) for m in norms_of(thawed).values())
    torch.testing.assert_close(thawed.eval()(images), before)


def test_unfreezing_what_is_not_frozen_says_nothing(recwarn):
    model = timm.create_model("test_resnet", norm_layer="fbn")
    timm.utils.freeze(model, include_bn_running_stats=False)
    timm.utils.unfreeze(model)
    assert not recwarn.list and norms_of(model)
    timm.utils.freeze(model)
    with pytest.warns(UserWarning, match="without a filter"):
        timm.utils.unfreeze(model)
    assert fbn_plugin.summarize(model).counts["FBN"] == 0


def test_freeze_of_submodules():
    model = timm.create_model("test_resnet", norm_layer="fbn")
    timm.utils.freeze(model, ["bn1", "layer1"])
    assert "FrozenBatchNorm" in type(model.bn1).__name__
    assert not norms_of(model.layer1)
    assert norms_of(model.layer2)
    assert not any(p.requires_grad for p in model.layer1.parameters())


@pytest.mark.parametrize("conversion", ["convert_sync_batchnorm", "convert_splitbn_model"])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_conversions_that_lose_the_filter_say_so_once(name, conversion):
    convert = getattr(timm.layers, conversion)
    model = trained(timm.create_model(name, num_classes=10, norm_layer="fbn"))
    images = torch.randn(2, 3, 64, 64)
    before = model(images)
    with pytest.warns(UserWarning) as caught:
        converted = convert(model)
    count = len(norms_of(timm.create_model(name)))
    message = f"timm's {conversion} makes batch norms without the filter of {count} filtered ones"
    if conversion == "convert_sync_batchnorm":
        message += ": fbn_plugin.convert_sync, or norm_layer='syncfbn' without this, keeps it"
    assert [str(w.message) for w in caught] == [message]
    plain = trained(timm.create_model(name, num_classes=10))
    expected = plain(images)
    if torch.allclose(convert(plain).eval()(images), expected, atol=1e-4):  # older releases of timm lose them
        torch.testing.assert_close(converted.eval()(images), before)  # the activations are kept
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(timm.create_model(name))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_convert_sync_keeps_filter_and_activation(name):
    model = trained(timm.create_model(name, num_classes=10, norm_layer="fbn(t_sigma=2.5, grad_mode='paper')"))
    images, parameters = torch.randn(2, 3, 64, 64), dict(model.named_parameters())
    expected, training = model(images), copy.deepcopy(model).train()(images)
    report = fbn_plugin.NormReport()
    assert fbn_plugin.convert_sync(model, report=report) is model
    norms = norms_of(model)
    assert len(report.changed) == len(norms) and not report.left
    assert {(isinstance(m, fbn_plugin.SyncFilteredBatchNorm), m.t_sigma, m.grad_mode) for m in norms.values()} == {
        (True, 2.5, "paper")
    }
    assert all(parameter is parameters[key] for key, parameter in model.named_parameters())
    assert torch.equal(model(images), expected)
    torch.testing.assert_close(model.train()(images), training)
    plain = fbn_plugin.convert_sync(timm.create_model(name))
    kind = nn.SyncBatchNorm if name == "test_resnet" else SyncBatchNormAct
    assert {type(m) for m in norms_of(plain).values()} == {kind}


def test_weight_decay_leaves_the_norms_out():
    model = timm.create_model("test_efficientnet", norm_layer="fbn")
    none, decayed = param_groups_weight_decay(model, weight_decay=0.1)
    assert (none["weight_decay"], decayed["weight_decay"]) == (0.0, 0.1)
    affine = {id(p) for norm in norms_of(model).values() for p in norm.parameters()}
    assert affine <= {id(p) for p in none["params"]}
    assert not affine & {id(p) for p in decayed["params"]}


def test_distribute_bn_averages_all_running_statistics(monkeypatch):
    model = trained(timm.create_model("test_efficientnet", norm_layer="fbn"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda buffer, op: buffer.add_(1.0))  # the other rank's: 1
    timm.utils.distribute_bn(model, world_size=2, reduce=True)
    for key, value in model.state_dict().items():
        averaged = key.endswith(("running_mean", "running_var"))
        torch.testing.assert_close(value, (before[key] + 1) / 2 if averaged else before[key])


def test_zero_init_last_reaches_the_last_norm_of_each_block():
    model = timm.create_model("test_resnet", norm_layer="fbn")
    for stage in (model.layer1, model.layer2):
        block = stage[0]
        last = getattr(block, "bn3", block.bn2)
        assert not last.weight.any()
        assert block.bn1.weight.all()


@pytest.mark.parametrize("name", ["mobileone_s0", "repghostnet_050", "fastvit_t8", "ghostnetv3_050", "repvit_m1"])
def test_reparameterization_folds_the_norms(name):
    model = fbn_plugin.convert_norm(timm.create_model(name, num_classes=10), "FBN")
    count, images = len(norms_of(trained(model))), torch.randn(2, 3, 64, 64)
    before = model(images)
    folded = timm.utils.reparameterize_model(model)
    assert len(norms_of(folded)) < count
    torch.testing.assert_close(folded(images), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", ["ScaledBN-A1", "ScaledBN-A2", "IEBN-"])
def test_reparameterization_folds_all_of_a_norm(norm):
    model = fbn_plugin.convert_norm(timm.create_model("mobileone_s0", num_classes=10), norm)
    before, images = copy.deepcopy(trained(model).state_dict()), torch.randn(2, 3, 64, 64)
    expected = model(images)
    torch.testing.assert_close(timm.utils.reparameterize_model(model)(images), expected, rtol=1e-3, atol=1e-4)
    assert model.state_dict().keys() == before.keys(), "the model itself stays as it was"
    torch.testing.assert_close(model(images), expected)


def test_pruned_models_keep_the_filter():
    # timm rebuilds their norms as batch normalization. (Its pruned EfficientNets refuse any norm_layer.)
    model = timm.create_model("ecaresnet50d_pruned", num_classes=10, norm_layer="fbn(t_sigma=3)")
    plain = timm.create_model("ecaresnet50d_pruned", num_classes=10)
    assert {(type(m), m.t_sigma) for m in norms_of(model).values()} == {(FilteredBatchNorm2d, 3.0)}
    gated = timm.create_model("ecaresnet50d_pruned", norm_layer="iebn-(gamma_init=0.5)")
    assert {(type(m), m.gate_bias[0].item()) for m in norms_of(gated).values()} == {(fbn_plugin.GatedBatchNorm2d, -1.0)}
    assert all(m.weight.eq(0.5).all() for m in norms_of(gated).values())
    assert others_of(model) == others_of(plain)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_features_only(name):
    plain = trained(timm.create_model(name, features_only=True))
    model = timm.create_model(name, features_only=True, norm_layer="fbn")
    model.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 64)
    for feature, expected in zip(model.eval()(images), plain(images), strict=True):
        torch.testing.assert_close(feature, expected)


@pytest.mark.parametrize("norm_layer", ["fbn", "fgn(num_groups=4)", "fln", "fin", "in", "scaledbn", "rbn"])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_fx_feature_extraction_does_not_trace_into_the_norms(name, norm_layer):
    model = timm.create_model(name, norm_layer=norm_layer)
    extractor = timm.layers.create_feature_extractor(model, ["bn1"])
    assert "bn1" in {node.target for node in extractor.graph.nodes if node.op == "call_module"}
    expected = []
    model.bn1.register_forward_hook(lambda module, inputs, output: expected.append(output.clone()))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model.eval()(images)
        torch.testing.assert_close(extractor.eval()(images)["bn1"], expected[0])
    extractor.train()(images)["bn1"].sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("norm_layer", [name for name in NAMES if name not in ("BN", "SyncBN")])
def test_norm_and_activation_in_torchscript(norm_layer):
    spec = norm_layer + OPTIONS.get(norm_layer, "")
    model = trained(timm.create_model("test_efficientnet", norm_layer=spec, scriptable=True))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(torch.jit.script(model)(images), model(images))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("block", [timm.models.resnet.BasicBlock, timm.models.resnet.Bottleneck])
def test_models_train_in_torchscript(block, fused):
    model = timm.models.resnet.ResNet(block, (1, 1, 1, 1), 4, norm_layer=norm_factory("FBN(t_sigma=3)")).double()
    model = fbn_plugin.fuse_norm_act(model) if fused else model
    scripted, images = torch.jit.script(copy.deepcopy(model)), torch.randn(2, 3, 64, 64).double()
    for module in (model, scripted):
        module(images).square().sum().backward()
    grads = [{key: p.grad for key, p in module.named_parameters()} for module in (model, scripted)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(scripted.eval()(images), model.eval()(images))


def test_norms_see_the_filter_in_training():
    torch.manual_seed(0)
    filtered, plain = FilteredBatchNormAct2d(4, t_sigma=2), BatchNormAct2d(4)
    images = torch.randn(4, 4, 8, 8)
    images[0, :, 0, 0] = 100.0
    assert filtered(images).std() > 5 * plain(images).std()  # the outlier does not shrink the rest
    assert filtered.running_var.max() < 1.2 < 4 < plain.running_var.min()


@pytest.mark.parametrize(
    "options, fused",
    [
        ({}, True),
        ({"act_layer": "silu"}, True),
        ({"apply_act": False}, True),
        ({"act_layer": "gelu"}, False),
        ({"drop_layer": nn.Dropout}, False),
    ],
)
def test_norm_act_form_uses_the_fused_operator_where_it_can(options, fused, monkeypatch):
    calls = []
    function = adapter.normalize_and_activate
    monkeypatch.setattr(adapter, "normalize_and_activate", lambda *a, **k: calls.append(a) or function(*a, **k))
    layer = adapter.FilteredBatchNormAct2d(4, t_sigma=2.0, **options)
    x = torch.randn(2, 4, 5, 5)
    torch.manual_seed(0)
    y = layer(x)
    assert len(calls) == fused
    torch.manual_seed(0)
    plain = fbn_plugin.FilteredBatchNorm2d(4, t_sigma=2.0)
    torch.testing.assert_close(y, layer.act(layer.drop(plain(x))))


def test_create_model_says_where_norm_layer_does_not_reach():
    with pytest.warns(UserWarning, match=r"fastvit_t8 has \d+ batch norms that norm_layer does not reach"):
        timm.create_model("fastvit_t8", norm_layer="fbn")
    with pytest.raises(TypeError, match=r"mobilenetv3_small_050 cannot be built.*convert_norm\(model, 'FBN'\)"):
        timm.create_model("mobilenetv3_small_050", norm_layer="fbn")
    with pytest.raises(TypeError, match=r"test_vit normalizes tokens .* norm_layer='FGN' is not for"):
        timm.create_model("test_vit", norm_layer="fgn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timm.create_model("test_vit", norm_layer="layernorm")
        timm.create_model("test_resnet", norm_layer="fbn(t_sigma=4)")
        timm.create_model("test_efficientnet", norm_layer=norm_factory("FBN"))
        timm.create_model("fastvit_t8")
