"""Weight decay by the type of the module, whatever the norm, the network and the options are: in our groups, in those
of the classification tool, and in timm's own after register()."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import nn

import fbn_plugin
from fbn_plugin import prepend_input_norm
from fbn_plugin.engine.classification.config import classification_config
from fbn_plugin.engine.classification.model import create_model
from fbn_plugin.engine.classification.optimization import build_optimizer
from fbn_plugin.frameworks.timm_optimizers import by_layer, param_groups, weight_decay_groups
from fbn_plugin.layers.description import describe

NORMS = [name for name, _ in fbn_plugin.NORMS]
DECAY = 0.1


@pytest.fixture(autouse=True)
def registered():
    fbn_plugin.register()


def decay_of(groups) -> dict[nn.Parameter, float]:
    return {p: group["weight_decay"] for group in groups for p in group["params"]}


def kinds(model: nn.Module) -> tuple[set, set, set]:
    """The parameters of norms, those of them that are no scales and shifts, and other biases."""
    norms, own, biases = set(), set(), set()
    for module in model.modules():
        if describe(module) is not None:
            norms.update(module.parameters())
    for module in model.modules():
        if type(module).__name__.startswith("ConvNorm"):
            own.update(p for name, p in module.named_parameters() if name.startswith("kernel"))
        elif type(module).__name__.startswith("LearnedStats"):
            own.update(p for name, p in module.named_parameters() if "network" in name)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and parameter not in norms:
            biases.add(parameter)
    return norms, own, biases


def solver(**values):
    cfg = classification_config()
    cfg.SOLVER.WEIGHT_DECAY = DECAY
    for key, value in values.items():
        cfg.SOLVER[key] = value
    return cfg


def assert_by_type(groups, model: nn.Module, filtered: bool = True) -> None:
    decay, (norms, own, biases) = decay_of(groups), kinds(model)
    assert decay.keys() == set(model.parameters())
    off = norms | biases if filtered else own
    assert {p for p in decay if not decay[p]} == off
    assert all(decay[p] == DECAY for p in decay if p not in off)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("network", ["resnet18_cifar", "all_cnn_c", "lenet5_convs", "test_resnet"])
def test_which_parameters_decay(network, norm):
    with torch.device("meta"):
        model = create_model(network, norm)
    for options in (
        {},
        {"LAYER_DECAY": 0.75},
        {"SCALE_LR_DIVISOR": 100.0, "LAYER_DECAY": 0.75},
        {"SCALE_LR_DIVISOR": 1.0},
    ):
        assert_by_type(build_optimizer(solver(**options), model).param_groups, model)
    for options in ({}, {"LAYER_DECAY": 0.75}):
        groups = build_optimizer(solver(FILTER_BIAS_AND_BN=False, **options), model).param_groups
        assert_by_type(groups, model, filtered=False)
    assert_by_type(create_optimizer_v2(model, "momentum", lr=0.1, weight_decay=DECAY).param_groups, model)
    layers = create_optimizer_v2(model, "momentum", lr=0.1, weight_decay=DECAY, layer_decay=0.75)
    assert_by_type(layers.param_groups, model)


@pytest.mark.parametrize("norm", ["ConvNorm(kernel_sizes=(2, 2))", "LearnedNorm"])
def test_norms_that_a_model_is_built_with(norm):
    """As by timm's own train.py, under `python -m fbn_plugin`."""
    model = timm.create_model("test_efficientnet", norm_layer=norm)
    assert_by_type(create_optimizer_v2(model, "adamw", weight_decay=DECAY).param_groups, model)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_without_our_norms_the_groups_are_timms(name):
    model = timm.create_model(name)
    ours = [make(model, DECAY) for make in (param_groups_weight_decay, param_groups_layer_decay)]
    named = param_groups_weight_decay(model, DECAY, no_weight_decay_list=getattr(model, "no_weight_decay", set)())
    fbn_plugin.unregister()
    theirs = [make(model, DECAY) for make in (param_groups_weight_decay, param_groups_layer_decay)]
    assert [[*map(decay_of, each)] if isinstance(each[0], list) else decay_of(each) for each in ours] == [
        decay_of(each) for each in theirs
    ]
    assert decay_of(weight_decay_groups(model, DECAY)) == decay_of(named)


def test_the_rate_falls_towards_the_input():
    model = prepend_input_norm(timm.create_model("test_resnet", norm_layer="ScaledBN"), 0.5)
    groups = param_groups(model, 0.4, DECAY, 50.0, layer_decay=0.5)
    scale = {p: group["lr_scale"] for group in groups for p in group["params"]}
    assert scale.keys() == set(model.parameters()) and {group["lr"] for group in groups} == {0.4}
    assert scale[model.fc.weight] == 1 and scale[model.fc.bias] == 1
    first = scale[model.conv1[0].weight if isinstance(model.conv1, nn.Sequential) else model.conv1.weight]
    assert first < scale[model.layer4[0].conv1.weight] < 1
    assert scale[model.input_norm.weight] == pytest.approx(first / 50)
    assert scale[model.bn1.weight] == pytest.approx(first / 50) and scale[model.bn1.bias] == first
    assert len(groups) == len({(g["weight_decay"], g["lr_scale"]) for g in groups})


@pytest.mark.parametrize("name", ["lenet5_all", "all_cnn_c", "pooled_resnet20"])
def test_layers_of_the_papers_networks_are_told(name):
    model = create_model(name, "FBN")
    groups = by_layer(model, weight_decay_groups(model, DECAY), 0.5)
    scale = {p: group["lr_scale"] for group in groups for p in group["params"]}
    in_order = [scale[m.weight] for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert in_order == sorted(in_order) and in_order[-1] == 1 and len(set(in_order)) > 3
