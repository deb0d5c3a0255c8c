"""Fusing norms with activation and residual in built models: nothing but the modules changes."""

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from torch import nn

import fbn_plugin
from fbn_plugin import FilteredBatchNorm2d, FilteredBatchNormAct2d

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = "FBN(t_sigma=2.0)"


def torchvision_model(name, **options):
    return getattr(torchvision.models, name)(norm_layer=fbn_plugin.norm_factory(SPEC), num_classes=5, **options)


def timm_model(name, **options):
    return timm.create_model(name, norm_layer=fbn_plugin.norm_factory(SPEC), num_classes=5, **options)


def vgg():
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"], batch_norm=True)
    return fbn_plugin.convert_norm(layers, SPEC)


# The model, its fused norms and those that stay: before a downsampled shortcut, attention or a dropped path.
MODELS = {
    "torchvision resnet18": (lambda: torchvision_model("resnet18"), 17, 3),
    "torchvision resnet50": (lambda: torchvision_model("resnet50"), 49, 4),
    "torchvision vgg11_bn": (vgg, 8, 0),
    "timm resnet18": (lambda: timm_model("resnet18", zero_init_last=False), 17, 3),
    "timm resnet50d": (lambda: timm_model("resnet50d", zero_init_last=False), 51, 4),
    "timm seresnet18": (lambda: timm_model("seresnet18", zero_init_last=False), 9, 11),
    "timm resnet18, drop path": (lambda: timm_model("resnet18", drop_path_rate=0.1), 10, 10),
    "timm resnet18, silu": (lambda: timm_model("resnet18", act_layer="silu"), 17, 3),
    "timm resnet18, gelu": (lambda: timm_model("resnet18", act_layer="gelu"), 0, 20),
}


def assert_same_training_step(old, new, x):
    """Values, gradients and buffers. In double precision, where nothing that is lost to rounding hides a difference."""
    results = []
    for model in (old.double().train(), new.double().train()):
        torch.manual_seed(0)
        y = model(x)
        y.square().sum().backward()
        results.append((y, {name: p.grad for name, p in model.named_parameters()}, model.state_dict()))
        model.eval()
        results[-1] += (model(x),)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_same_model(name):
    build, fused, left = MODELS[name]
    torch.manual_seed(0)
    old = build()
    new = copy.deepcopy(old)
    parameters = list(new.parameters())
    assert fbn_plugin.fuse_norm_act(new) is new
    assert all(a is b for a, b in zip(new.parameters(), parameters)), "an optimizer still trains them"
    assert list(new.state_dict()) == list(old.state_dict())
    kinds = [type(m) for m in new.modules()]
    assert (kinds.count(FilteredBatchNormAct2d), kinds.count(FilteredBatchNorm2d)) == (fused, left)
    assert_same_training_step(old, new, torch.randn(3, 3, 32, 32).double())
    assert str(fbn_plugin.fuse_norm_act(copy.deepcopy(new))) == str(new), "a second time changes nothing"


def test_fused_models_can_be_copied_and_pickled():
    model = fbn_plugin.fuse_norm_act(torchvision_model("resnet18")).eval()
    x = torch.randn(1, 3, 32, 32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), model(x))


def test_fused_model_compiles_without_a_graph_break():
    model = fbn_plugin.fuse_norm_act(torchvision_model("resnet18"))
    x = torch.randn(2, 3, 32, 32)
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


def test_sequences():
    relu = nn.ReLU()
    model = nn.Sequential(relu, FilteredBatchNorm2d(3, t_sigma=2.0), relu, nn.SiLU(), FilteredBatchNorm2d(3), nn.Tanh())
    new = fbn_plugin.fuse_norm_act(copy.deepcopy(model))
    assert [type(m).__name__ for m in new.children()] == [
        "ReLU", "FilteredBatchNormAct2d", "Identity", "SiLU", "FilteredBatchNorm2d", "Tanh"
    ]  # fmt: skip
    assert_same_training_step(model, new, torch.randn(4, 3, 5, 5).double())


@pytest.mark.parametrize("place", [0, 1])
def test_hooks_are_called(place):
    model = nn.Sequential(FilteredBatchNorm2d(3), nn.ReLU())
    model[place].register_forward_hook(lambda *_: None)
    assert type(fbn_plugin.fuse_norm_act(model)[0]) is FilteredBatchNorm2d


def test_other_norms_and_blocks_of_ones_own_stay():
    class Block(torchvision.models.resnet.BasicBlock):
        def forward(self, x):
            return self.relu(self.bn1(self.conv1(x)).tanh())

    block = Block(4, 4, norm_layer=fbn_plugin.norm_factory(SPEC))
    plain = torchvision.models.resnet18()
    for model in (block, plain):
        before = str(model)
        assert str(fbn_plugin.fuse_norm_act(model)) == before
    assert type(block) is Block
