"""A small initial scale survives what frameworks do to a model after its norms are built."""

import timm
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import fbn_plugin
from fbn_plugin import apply_gamma_init, convert_norm, fuse_norm_act, norm_factory


def scales(model: nn.Module) -> set[float]:
    return {value for m in model.modules() if isinstance(m, _BatchNorm) for value in m.weight.detach().tolist()}


def test_torchvision_sets_scales_to_one_and_gets_them_back():
    model = torchvision.models.resnet18(norm_layer=norm_factory("ScaledBN(gamma_init=0.25)"), zero_init_residual=True)
    assert scales(model) == {0.0, 1.0}
    assert apply_gamma_init(model) is model
    assert scales(model) == {0.25}


def test_timm_sets_a_blocks_last_scale_to_zero_and_gets_it_back():
    fbn_plugin.register()
    try:
        model = timm.create_model("test_resnet", norm_layer="FBN(gamma_init=0.25)")
    finally:
        fbn_plugin.unregister()
    assert 0.0 in scales(model)
    assert scales(apply_gamma_init(model)) == {0.25}


def test_all_but_the_scale_of_norms_with_a_gamma_init_stays():
    layers = [nn.BatchNorm2d(3), fbn_plugin.InputNorm2d(), fbn_plugin.ScaledBatchNormA2(3), nn.Conv2d(3, 3, 1)]
    model = nn.Sequential(
        *layers, fbn_plugin.ScaledBatchNorm2d(3, affine=False), fbn_plugin.RepresentativeBatchNorm2d(3)
    )
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.7)
        parameter.requires_grad_(False)
    apply_gamma_init(model)
    changed = {name: p[0].item() for name, p in model.named_parameters() if not p.eq(0.7).all()}
    assert {name: round(value, 6) for name, value in changed.items()} == {"1.weight": 0.058, "2.weight": 0.1}
    assert not any(p.requires_grad for p in model.parameters())


def test_conversion_and_fusion_hand_gamma_init_on():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), fbn_plugin.ScaledBatchNorm2d(4, gamma_init=0.3), nn.ReLU())
    weight = model[1].weight
    convert_norm(model, "FBN")
    assert type(model[1]) is fbn_plugin.FilteredBatchNorm2d and model[1].weight is weight
    fuse_norm_act(model)
    assert type(model[1]) is fbn_plugin.FilteredBatchNormAct2d
    nn.init.ones_(weight)
    assert scales(apply_gamma_init(model)) == {torch.tensor(0.3).item()}
    convert_norm(model := nn.Sequential(nn.BatchNorm2d(4)), "ScaledBN")
    assert model[0].weight.eq(1).all(), "weights are kept"
    assert model[0].gamma_init == 0.1
    assert convert_norm(fbn_plugin.FilteredBatchNorm2d(4), "ScaledBN").gamma_init == 0.1
    assert convert_norm(fbn_plugin.ScaledBatchNorm2d(4, gamma_init=0.3), "FBN(gamma_init=0.2)").gamma_init == 0.2
