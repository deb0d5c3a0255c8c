"""Mask R-CNN and Faster R-CNN on torchvision's parts, with a norm of one's choice in backbone, feature pyramid and
heads: torchvision's own builders choose between FrozenBatchNorm2d and BatchNorm2d themselves.
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import resnet
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from fbn_plugin import internals
from fbn_plugin.registry import norm_factory
from fbn_plugin.surgery.convert import make_plain
from fbn_plugin.training.gamma_initialization import apply_gamma_init

internals.require("torchvision")

BACKBONES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)

# Those whose widths can be set, with their blocks.
_BLOCKS = {
    "resnet18": (resnet.BasicBlock, [2, 2, 2, 2]),
    "resnet34": (resnet.BasicBlock, [3, 4, 6, 3]),
    "resnet50": (resnet.Bottleneck, [3, 4, 6, 3]),
    "resnet101": (resnet.Bottleneck, [3, 4, 23, 3]),
    "resnet152": (resnet.Bottleneck, [3, 8, 36, 3]),
}

_STAGES = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))


class ScaledResNet(resnet.ResNet):
    """torchvision's ResNet with other widths, as detectron2's config names them; the names of parameters stay.

    Args:
        block: ``resnet.BasicBlock`` or ``resnet.Bottleneck``.
        layers: number of blocks in each of the four stages.
        stem_channels: output channels of ``conv1``; torchvision's are 64.
        res2_channels: output channels of ``layer1``, doubled by each later stage; torchvision's are 64 with basic
            blocks and 256 with bottlenecks, where it is a multiple of 4.
        groups, width_per_group: of ``layer1``'s 3x3 convolutions; the width doubles with each stage. For bottlenecks.
        kwargs: ResNet's other arguments.
    """

    def __init__(
        self,
        block: type[nn.Module],
        layers: list[int],
        stem_channels: int = 64,
        res2_channels: int = 256,
        groups: int = 1,
        width_per_group: int = 64,
        **kwargs: Any,
    ):
        self._widths = (stem_channels, res2_channels, width_per_group)
        super().__init__(block, layers, groups=groups, **kwargs)
        self.fc = nn.Linear(8 * res2_channels, self.fc.out_features)

    def _make_layer(self, block: type[nn.Module], planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        stem_channels, res2_channels, width_per_group = self._widths
        scale = planes // 64  # 1, 2, 4, 8
        if scale == 1:
            self.inplanes = stem_channels
            self.conv1 = nn.Conv2d(3, stem_channels, 7, stride=2, padding=3, bias=False)
            self.bn1 = self._norm_layer(stem_channels)
        planes = scale * res2_channels // block.expansion
        if block is resnet.Bottleneck:
            # A block computes int(planes * base_width / 64): the half keeps that from falling below the integer.
            self.base_width = 64 * (scale * width_per_group + 0.5) / planes
        return super()._make_layer(block, planes, *args, **kwargs)


def stride_in_1x1(body: nn.Module) -> None:
    """Move the stride of each bottleneck from its 3x3 convolution to the 1x1 before it, where He et al. (2015) and the
    weights of MSRA have it."""
    for block in body.modules():
        if isinstance(block, resnet.Bottleneck) and block.conv2.stride != (1, 1):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)


def mask_rcnn_fpn(
    backbone: str = "resnet18",
    norm: str = "FBN",
    norm_fpn: str = "",
    norm_box_head: str = "",
    norm_mask_head: str = "",
    *,
    num_classes: int = 91,
    masks: bool = True,
    trainable_layers: int = 5,
    weights_backbone: str | os.PathLike | None = None,
    backbone_options: Mapping[str, Any] | None = None,
    bottleneck_stride: str = "3x3",
    fpn_channels: int = 256,
    anchor_sizes: Sequence[Sequence[float]] = ((32,), (64,), (128,), (256,), (512,)),
    aspect_ratios: Sequence[Sequence[float]] = ((0.5, 1.0, 2.0),),
    rpn_convs: int = 1,
    box_convs: Sequence[int] | None = None,
    box_fcs: Sequence[int] | None = None,
    box_resolution: int = 7,
    box_sampling_ratio: int = 2,
    mask_convs: Sequence[int] = (256, 256, 256, 256),
    mask_resolution: int = 14,
    mask_sampling_ratio: int = 2,
    **kwargs: Any,
) -> FasterRCNN:
    """Build torchvision's Mask R-CNN with a feature pyramid, every norm by a spec string.

    Args:
        backbone: one of ``BACKBONES``.
        norm: spec of the backbone's norm, such as ``"FBN(t_sigma=5)"``; also ``"FrozenBN"``.
        norm_fpn, norm_box_head, norm_mask_head: the same for pyramid and heads; ``""`` is none, and gives the
            convolutions a bias. The box head's norm follows its convolutions; fully connected layers have none.
        num_classes: classes with the background, which is class 0.
        masks: False builds Faster R-CNN.
        trainable_layers: of stem, layer1, ..., layer4, how many are trained, counted from the end: 5 is all. What is
            frozen keeps its running statistics too: each batch norm there becomes a FrozenBatchNorm2d. Below 5 is for a
            backbone that gets weights.
        weights_backbone: file with a state dict of torchvision's classification model (or of this library's: the keys
            are the same); None starts from random weights. Nothing is downloaded.
        backbone_options: further arguments of the ResNet, such as ``{"groups": 32, "width_per_group": 4}``; with
            ``stem_channels`` or ``res2_channels``, those of :class:`ScaledResNet`.
        bottleneck_stride: of a bottleneck's convolutions, the one that has the stride: ``"3x3"`` as torchvision's
            weights want it, or ``"1x1"`` as MSRA's do.
        fpn_channels: channels of each of the five pyramid levels.
        anchor_sizes, aspect_ratios: for each of the five levels, or one entry for all.
        rpn_convs: 3x3 convolutions in the proposal network's head.
        box_convs, box_fcs: widths of the box head's convolutions and fully connected layers; without a norm none and
            two of 1024 by default, with one four of 256 and one of 1024, as detectron2 and torchvision set them.
        mask_convs: widths of the mask head's convolutions.
        box_resolution, mask_resolution, box_sampling_ratio, mask_sampling_ratio: of the RoI pooling; a sampling ratio
            of 0 adapts to the size of the region.
        kwargs: the other arguments of ``torchvision.models.detection.MaskRCNN``: ``min_size``, ``image_mean``,
            ``rpn_batch_size_per_image``, ``box_detections_per_img``, ...

    Raises:
        ValueError: an unknown backbone, norm or place of the stride, a norm that does not fit the channels, or weights
            of another network.
        FileNotFoundError: no such weights.
    """
    body = _body(backbone, norm, trainable_layers, weights_backbone, backbone_options or {}, bottleneck_stride)
    widths = [body.inplanes // 8 * 2**level for level in range(4)]
    levels = {f"layer{level + 1}": str(level) for level in range(4)}
    pyramid = BackboneWithFPN(body, levels, widths, fpn_channels, norm_layer=_norm_layer(norm_fpn))

    anchors = AnchorGenerator(_for_levels("anchor_sizes", anchor_sizes), _for_levels("aspect_ratios", aspect_ratios))
    per_location = set(anchors.num_anchors_per_location())
    if len(per_location) > 1:
        raise ValueError(f"every level needs the same number of anchors, got {anchors.num_anchors_per_location()}")
    if box_convs is None:
        box_convs = (256,) * 4 if norm_box_head else ()
    if box_fcs is None:
        box_fcs = (1024,) if box_convs else (1024, 1024)
    box_head = _box_head(fpn_channels, box_resolution, box_convs, box_fcs, _norm_layer(norm_box_head))
    box_width = box_fcs[-1] if box_fcs else (*box_convs, fpn_channels)[len(box_convs) - 1] * box_resolution**2
    parts = {
        "rpn_anchor_generator": anchors,
        "rpn_head": RPNHead(fpn_channels, per_location.pop(), conv_depth=rpn_convs),
        "box_roi_pool": MultiScaleRoIAlign(list(levels.values()), box_resolution, box_sampling_ratio),
        "box_head": box_head,
        "box_predictor": FastRCNNPredictor(box_width, num_classes),
        **kwargs,
    }
    if not masks:
        return FasterRCNN(pyramid, **parts)
    return MaskRCNN(
        pyramid,
        mask_roi_pool=MultiScaleRoIAlign(list(levels.values()), mask_resolution, mask_sampling_ratio),
        mask_head=MaskRCNNHeads(fpn_channels, mask_convs, 1, norm_layer=_norm_layer(norm_mask_head)),
        mask_predictor=MaskRCNNPredictor((fpn_channels, *mask_convs)[-1], (fpn_channels, *mask_convs)[-1], num_classes),
        **parts,
    )


def _body(
    backbone: str,
    norm: str,
    trainable_layers: int,
    weights: str | os.PathLike | None,
    options: Mapping[str, Any],
    bottleneck_stride: str,
) -> resnet.ResNet:
    """The backbone without its pyramid; arguments and errors as in :func:`mask_rcnn_fpn`."""
    if backbone not in BACKBONES:
        raise ValueError(f"unknown backbone {backbone!r}; accepted are {', '.join(BACKBONES)}")
    if not 0 <= trainable_layers <= len(_STAGES):
        raise ValueError(f"trainable_layers must be 0 to {len(_STAGES)}, got {trainable_layers!r}")
    if not norm:
        raise ValueError(f'norm must name one for the backbone, such as "FBN", "BN" or "FrozenBN", got {norm!r}')
    if bottleneck_stride not in ("3x3", "1x1"):
        raise ValueError(f"bottleneck_stride must be '3x3' or '1x1', got {bottleneck_stride!r}")
    body = apply_gamma_init(_resnet(backbone, norm_layer=_norm_layer(norm), **options))
    if bottleneck_stride == "1x1":
        stride_in_1x1(body)
    if weights is not None:
        load_backbone(body, weights)
    for stage in _STAGES[: len(_STAGES) - trainable_layers]:
        for name in stage:
            setattr(body, name, _freeze(getattr(body, name)))
    return body


def load_backbone(body: nn.Module, weights: str | os.PathLike | Mapping[str, Tensor], name: str = "") -> list[str]:
    """Load a classification model's weights into a ResNet or a detector's ``backbone.body``.

    Args:
        body: with any norm. One without running statistics leaves those of the weights out, with a warning; what else a
            norm has, and the weights have not, keeps its value.
        weights: a state dict, or a file of one, as torchvision publishes them.
        name: what errors call the weights; the file, by default.

    Returns:
        the names in ``body.state_dict()`` that were loaded.

    Raises:
        FileNotFoundError, ValueError: no such file; not a state dict of this network.
    """
    name = name or "the state dict"
    if isinstance(weights, str | os.PathLike):
        name = os.fspath(weights)
        if not os.path.isfile(name):
            raise FileNotFoundError(f"backbone weights {name} are not there")
        try:
            weights = torch.load(name, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler fails in any way on any bytes
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"backbone weights {name} cannot be read: {reason}") from None
        if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
            raise ValueError(f"backbone weights {name} are not a dictionary of tensors")
    own = body.state_dict()
    given = {key: value for key, value in weights.items() if not key.startswith("fc.")}
    norms = {key.removesuffix("weight") for key in given if key.endswith(".weight") and given[key].dim() == 1}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    dropped = [key for key in given if key not in own and key.endswith(statistics)]
    unknown = [key for key in given if key not in own and key not in dropped]
    missing = [key for key in own if key not in given and not key.startswith(("fc.", *norms))]
    if wrong := unknown + missing:
        raise ValueError(f"{name} does not fit the backbone: {len(wrong)} names differ, such as {wrong[0]!r}")
    if wrong := [key for key in given if key in own and given[key].shape != own[key].shape]:
        shapes = f"{tuple(given[wrong[0]].shape)}, the backbone wants {tuple(own[wrong[0]].shape)}"
        raise ValueError(f"{name} does not fit the backbone: {wrong[0]!r} is {shapes}")
    if any(not key.endswith("num_batches_tracked") for key in dropped):
        warnings.warn(f"the running statistics in {name} are left out: the backbone's norm has none", stacklevel=2)
    body.load_state_dict({key: value for key, value in given.items() if key in own}, strict=False)
    return [key for key in given if key in own]


def _resnet(name: str, **options: Any) -> resnet.ResNet:
    if options.keys().isdisjoint(("stem_channels", "res2_channels")):
        return getattr(resnet, name)(**options)
    if name not in _BLOCKS:
        raise ValueError(f"{name} has no stem_channels and res2_channels, but {', '.join(_BLOCKS)} have")
    return ScaledResNet(*_BLOCKS[name], **options)


def _norm_layer(spec: str) -> Callable[[int], nn.Module] | None:
    if spec == "FrozenBN":
        return FrozenBatchNorm2d
    return norm_factory(spec) if spec else None


def _for_levels(name: str, values: Sequence[Sequence[float]], levels: int = 5) -> tuple[tuple[float, ...], ...]:
    if len(values) not in (1, levels):
        raise ValueError(f"{name} takes one entry, or one for each of the {levels} pyramid levels, got {len(values)}")
    return tuple(tuple(each) for each in values) * (levels // len(values))


def _box_head(
    channels: int, resolution: int, convs: Sequence[int], fcs: Sequence[int], norm_layer: Callable | None
) -> nn.Module:
    if not convs and len(fcs) == 2 and fcs[0] == fcs[1]:  # under the keys of torchvision's checkpoints
        return TwoMLPHead(channels * resolution**2, fcs[0])
    return FastRCNNConvFCHead((channels, resolution, resolution), list(convs), list(fcs), norm_layer=norm_layer)


def _freeze(module: nn.Module) -> nn.Module:
    """``module`` with nothing left to train: each batch norm in it (filtered ones too, which in evaluation are batch
    norms) becomes a FrozenBatchNorm2d with its parameters and statistics."""
    module.requires_grad_(False)
    if isinstance(module, _BatchNorm):
        make_plain(module)
        frozen = FrozenBatchNorm2d(module.num_features, module.eps)
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(module, name) is not None:
                getattr(frozen, name).copy_(getattr(module, name))
        return frozen
    for name, child in module.named_children():
        setattr(module, name, _freeze(child))
    return module
