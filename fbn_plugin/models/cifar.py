"""timm's networks as Revisiting batch norm initialization changes them for images of 32x32 pixels (its sections 4.1
and 4.4): built by timm, with fewer strides and with the paper's initial weights."""

import dataclasses
import functools
from collections.abc import Callable

from timm.models import byobnet, efficientnet, resnet
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fbn_plugin.models import CIFAR, Network
from fbn_plugin.training.revised_initialization import revised_init


def _resnet(entrypoint: Callable[..., nn.Module], **kwargs) -> nn.Module:
    """ResNet or ResNeXt with a 3x3 convolution of stride 1 first, and no pooling after it."""
    model = entrypoint(zero_init_last=False, **kwargs)
    old = model.conv1
    place = {"device": old.weight.device, "dtype": old.weight.dtype}
    model.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=False, **place)
    model.maxpool = nn.Identity()
    for info in model.feature_info:
        info["reduction"] //= 2 if info["module"] == "act1" else 4
    return model


def _mobilenet_v2(**kwargs) -> nn.Module:
    """MobileNetV2 with the first convolution and the stages of 24 and 32 channels at stride 1."""
    model = efficientnet.mobilenetv2_100(**kwargs)
    for conv in (model.conv_stem, model.blocks[1][0].conv_dw, model.blocks[2][0].conv_dw):
        conv.stride = (1, 1)
    for info in model.feature_info:
        info["reduction"] //= 2 ** min(3, info["reduction"].bit_length() - 1)
    return model


def _repvgg_a0(**kwargs) -> nn.Module:
    """RepVGG-A0 with the stages 0, which timm calls the stem, and 1 at stride 1."""
    first, *rest = byobnet.model_cfgs["repvgg_a0"].blocks
    model = byobnet.repvgg_a0(blocks=(dataclasses.replace(first, s=1), *rest), **kwargs)
    for branch in (model.stem.conv_kxk, model.stem.conv_1x1):
        branch.conv.stride = (1, 1)
    for info in model.feature_info:
        info["reduction"] //= 2
    return model


def _build(build: Callable[..., nn.Module], **kwargs) -> nn.Module:
    """Build a network and start it as the paper does: every scale at its constant, every shift and bias at 0."""
    if not kwargs.get("norm_layer", True):
        raise ValueError(
            f"timm cannot build this network without norms: norm_layer names one, got {kwargs['norm_layer']!r}"
        )
    model = build(**kwargs)
    revised_init(model)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.reset_parameters()
    return model


_BUILDERS = {
    **{
        f"resnet{depth}": functools.partial(_resnet, getattr(resnet, f"resnet{depth}"))
        for depth in (18, 34, 50, 101, 152)
    },
    "resnext50_32x4d": functools.partial(_resnet, resnet.resnext50_32x4d),
    "mobilenetv2_100": _mobilenet_v2,
    "repvgg_a0": _repvgg_a0,
}

NETWORKS = {f"{name}_cifar": Network(functools.partial(_build, build), **CIFAR) for name, build in _BUILDERS.items()}
