"""timm's networks for images of 32x32 pixels differ from timm's own by what the paper says, and by nothing else."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fbn_plugin import frameworks as adapter
from fbn_plugin.models import cifar

NAMES = {name: name.removesuffix("_cifar") for name in cifar.NETWORKS}


@pytest.fixture(autouse=True)
def registered():
    torch.manual_seed(0)
    adapter.register()
    yield
    adapter.unregister()


class SmallScale(nn.BatchNorm2d):
    """A norm that starts with a small scale of its own, and a shift that is not 0."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.weight, 0.1)


def on_meta(name: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, num_classes=10, **kwargs)


def maps(name: str, width: int) -> list[int]:
    """Widths of the maps from which timm takes features, for images of that width."""
    features = on_meta(name, features_only=True, out_indices=(-4, -3, -2, -1)).eval()
    sizes = [m.shape[-1] for m in features(torch.empty(1, 3, width, width, device="meta"))]
    assert sizes == [width // reduction for reduction in features.feature_info.reduction()]
    return sizes


@pytest.mark.parametrize(("name", "original"), NAMES.items())
def test_parameters(name, original):
    """The 3x3 stem has 40 weights a map fewer; RepVGG's first block, now of stride 1, has an identity branch."""
    more = 0 if "mobilenet" in name else 2 * 48 if "repvgg" in name else -40 * 3 * 64
    assert sum(p.numel() for p in on_meta(name).parameters()) == more + sum(
        p.numel() for p in on_meta(original).parameters()
    )


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("resnet18_cifar", [32, 16, 8, 4]),
        ("resnet50_cifar", [32, 16, 8, 4]),
        ("resnext50_32x4d_cifar", [32, 16, 8, 4]),
        ("mobilenetv2_100_cifar", [32, 32, 16, 8]),
        ("repvgg_a0_cifar", [32, 16, 8, 4]),
    ],
)
def test_maps(name, sizes):
    assert maps(name, 32) == sizes


def test_resnet_stem():
    model = on_meta("resnet18_cifar")
    assert model.conv1.kernel_size == (3, 3) and model.conv1.stride == (1, 1) and model.conv1.padding == (1, 1)
    assert type(model.maxpool) is nn.Identity


@pytest.mark.parametrize("name", ["resnet18_cifar", "mobilenetv2_100_cifar", "repvgg_a0_cifar"])
def test_initial_weights(name):
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() * (fan_in / 2) ** 0.5 == pytest.approx(1, abs=0.1)
        elif isinstance(module, nn.Linear):
            assert 0.99 < module.weight.abs().max() * (module.in_features / 6) ** 0.5 <= 1.0001
            assert not module.bias.any()
        elif isinstance(module, _BatchNorm):  # even the last of a residual branch
            assert torch.all(module.weight == 1) and not module.bias.any()


def test_a_norms_own_initial_scale_is_kept():
    model = timm.create_model("resnet18_cifar", norm_layer=SmallScale)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    assert len(norms) == 20 and all(torch.all(norm.weight == 0.1) for norm in norms)


@pytest.mark.parametrize("name", ["resnet18_cifar", "mobilenetv2_100_cifar", "repvgg_a0_cifar"])
def test_filtered(name):
    model = timm.create_model(name, norm_layer="FBN(t_sigma=3)")
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    assert norms and {norm.t_sigma for norm in norms} == {3.0}
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_repvgg_becomes_a_plain_network():
    model = timm.create_model("repvgg_a0_cifar")
    x = torch.randn(4, 3, 16, 16)
    model(x)
    model.eval()
    before = model(x)
    for module in list(model.modules()):
        if hasattr(module, "reparameterize"):
            module.reparameterize()
    assert not any(isinstance(module, _BatchNorm) for module in model.modules())
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-4)


def test_no_norm():
    with pytest.raises(ValueError, match="cannot build this network without norms.*got ''"):
        timm.create_model("resnet18_cifar", norm_layer="")
