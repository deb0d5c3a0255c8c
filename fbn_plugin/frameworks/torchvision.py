"""How a norm gets into torchvision: classification models take ``norm_layer=norm_factory("FBN")``, and
``fbn_plugin.models.mask_rcnn`` builds a Mask R-CNN with a norm of one's choice in backbone, FPN and heads.

Models without a ``norm_layer`` argument (VGG, DenseNet, ShuffleNet, ...) are converted after building:
``convert_norm(model, "FBN")``. The argument replaces the settings of a model too: for MobileNetV3 give
``"FBN(eps=1e-3, momentum=0.01)"``.
"""

import functools
from typing import Any

from torch import Tensor, nn
from torchvision.models import feature_extraction, resnet
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d

from fbn_plugin import internals
from fbn_plugin.layers.description import FROZEN, describe_class
from fbn_plugin.models.mask_rcnn import ScaledResNet
from fbn_plugin.registry import registered_classes
from fbn_plugin.surgery.fuse import fuse_block, fuse_children, register_fuser
from fbn_plugin.surgery.input_norm import Builder, normalize_images, register_prepender

describe_class(FROZEN, FrozenBatchNorm2d)


def register() -> None:
    """Let ``create_feature_extractor`` treat registered norms of one's own as leaves, which tracing may not be able to
    follow. This package's own are nodes of any graph."""
    leaves = internals.optional("torchvision.models.feature_extraction._get_leaf_modules_for_ops")
    if leaves is not None and not hasattr(leaves, "__wrapped__"):

        @functools.wraps(leaves)
        def with_registered_norms() -> list[type]:
            return [*leaves(), *registered_classes()]

        feature_extraction._get_leaf_modules_for_ops = with_registered_norms


def unregister() -> None:
    """Undo ``register``."""
    leaves = getattr(feature_extraction, "_get_leaf_modules_for_ops", None)
    if hasattr(leaves, "__wrapped__"):
        feature_extraction._get_leaf_modules_for_ops = leaves.__wrapped__


class FusedBasicBlock(resnet.BasicBlock):
    """`BasicBlock` whose norms add the residual and hold the activation."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        if self.downsample is not None:
            identity = self.downsample(x)
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), identity)


class FusedBottleneck(resnet.Bottleneck):
    """`Bottleneck` whose norms add the residual and hold the activation."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        if self.downsample is not None:
            identity = self.downsample(x)
        x = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        return self.bn3(self.conv3(x), identity)


for kind in (resnet.ResNet, ScaledResNet):
    register_fuser(kind, lambda model: fuse_children(model, "bn1", "relu"))
register_fuser(resnet.BasicBlock, lambda block: fuse_block(block, FusedBasicBlock, ("bn1", "bn2")))
register_fuser(resnet.Bottleneck, lambda block: fuse_block(block, FusedBottleneck, ("bn1", "bn2", "bn3")))


def _prepend_input_norm(model: nn.Module, build: Builder) -> None:
    transform, channels = model.transform, len(model.transform.image_mean)
    transform.image_mean, transform.image_std = [0.0] * channels, [1.0] * channels
    transform.input_norm = build(channels)
    transform.register_forward_pre_hook(_normalize_images)


def _normalize_images(transform: GeneralizedRCNNTransform, args: tuple) -> tuple[Any, ...]:
    images, *targets = args
    return (normalize_images(transform.input_norm, images), *targets)


register_prepender(
    lambda model: isinstance(getattr(model, "transform", None), GeneralizedRCNNTransform), _prepend_input_norm
)
