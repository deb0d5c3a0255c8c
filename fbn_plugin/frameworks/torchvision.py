"""How a norm gets into torchvision: after :func:`register` every model builder takes a spec, ``norm_layer="FBN"``, and
the builders of detectors and segmentation models, which drop the argument without a word, honour a callable too.

A builder of torchvision's is a function that is held in many places: in ``torchvision.models.detection``, in the
registry that ``get_model`` reads, and wherever it was imported by name. Its code is exchanged, so that all are reached.
Without :func:`register`, classification models take ``norm_layer=norm_factory("FBN")``, which replaces the settings of
their own norm (for MobileNetV3 give ``"FBN(eps=1e-3, momentum=0.01)"``), and any model is converted after building:
``convert_norm(model, "FBN")``.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torchvision.models import (
    convnext,
    detection,
    feature_extraction,
    get_model_builder,
    list_models,
    resnet,
    segmentation,
)
from torchvision.models.detection import backbone_utils
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d

from fbn_plugin import internals
from fbn_plugin.frameworks import replacement
from fbn_plugin.layers.description import FROZEN, NormDescription, describe_class, family
from fbn_plugin.models.mask_rcnn import ScaledResNet
from fbn_plugin.registry import NormFactory, norm_factory, registered_classes
from fbn_plugin.surgery.convert import convert_norm, replace_norms
from fbn_plugin.surgery.fuse import fuse_block, fuse_children, register_fuser
from fbn_plugin.surgery.input_norm import Builder, normalize_images, register_prepender
from fbn_plugin.training.gamma_initialization import apply_gamma_init

describe_class(FROZEN, FrozenBatchNorm2d)
describe_class(NormDescription("LN", dims=2), convnext.LayerNorm2d)  # its channels are the second dimension

_SOURCES = ("BN", "FrozenBN")
# Their constructors get a backbone that is built, and drop the argument.
_DETECTORS = (detection.FasterRCNN, detection.RetinaNet, detection.FCOS, detection.ssd.SSD)
_detectors_init = {cls: cls.__init__ for cls in _DETECTORS}


def _swallows(builder: Callable) -> bool:
    """Whether a builder takes ``norm_layer`` as one of its ``**kwargs``, and does nothing with it."""
    room = builder.__module__.startswith((detection.__name__, segmentation.__name__))
    return room and "norm_layer" not in inspect.signature(builder).parameters


def _builders() -> list[str]:
    """Names of torchvision's own builders, below what they are wrapped in: a user may have registered others."""
    found = [get_model_builder(name) for name in list_models()]
    found += [backbone_utils.resnet_fpn_backbone, backbone_utils.mobilenet_backbone]
    names = []
    for builder in found:
        name = f"{builder.__module__}.{builder.__qualname__}"
        while hasattr(builder, "__wrapped__"):
            builder, name = builder.__wrapped__, f"{name}.__wrapped__"
        if builder.__module__.startswith("torchvision."):
            names.append(name)
    return names


_BUILDERS = _builders()


def _build(build: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Call a builder of torchvision's, and give the model the norm that it would not take."""
    name = build.__name__
    if not isinstance(kwargs.get("norm_layer"), str) and not _swallows(build):
        return build(*args, **kwargs)  # None has a meaning to some, as plain batch norms in place of frozen ones
    norm_layer = kwargs.pop("norm_layer", None)
    if norm_layer is None:
        return build(*args, **kwargs)
    if not isinstance(norm_layer, str) and not callable(norm_layer):
        raise ValueError(f"norm_layer of {name} must be a spec such as 'FBN' or a callable, got {norm_layer!r}")
    factory = norm_factory(norm_layer) if isinstance(norm_layer, str) else norm_layer
    model = build(*args, **kwargs)
    if not any(family(module) in _SOURCES for module in model.modules()):
        raise ValueError(f"{name} has no batch norm that norm_layer={norm_layer!r} could take the place of")
    if not isinstance(factory, NormFactory):
        return replace_norms(model, factory, _SOURCES)
    model = convert_norm(model, factory.spec, sources=_SOURCES)
    given = inspect.signature(build).bind(*args, **kwargs)
    given.apply_defaults()
    trained = any(given.arguments.get(key) is not None for key in ("weights", "weights_backbone"))
    return model if trained else apply_gamma_init(model)


def _with_norm_layer(signature: inspect.Signature) -> inspect.Signature:
    """The signature of a builder that swallows the argument, with the argument in it."""
    own = inspect.Parameter("norm_layer", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = list(signature.parameters.values())
    at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    return signature.replace(parameters=[*parameters[:at], own, *parameters[at:]])


def _refusing(cls: type[nn.Module]) -> Callable[..., None]:
    """The constructor of a detector, which says that it cannot take a norm."""

    @functools.wraps(_detectors_init[cls])
    def __init__(self, *args, **kwargs) -> None:
        if kwargs.get("norm_layer") is not None:
            what = "its backbone is built already: give norm_layer to what builds it, or convert_norm the detector"
            raise ValueError(f"{cls.__name__} takes no norm_layer, as {what}")
        _detectors_init[cls](self, *args, **kwargs)

    return __init__


def register() -> None:
    """Let torchvision's builders take specs and honour ``norm_layer``, in whatever hands they are, and let
    ``create_feature_extractor`` treat registered norms of one's own as leaves, which tracing may not be able to follow.
    This package's own are nodes of any graph."""
    for name in _BUILDERS:
        build = replacement.original(name)
        signature = _with_norm_layer(inspect.signature(build)) if _swallows(build) else None
        replacement.replace(name, functools.partial(_build, build), signature=signature)
    for cls in _DETECTORS:
        cls.__init__ = _refusing(cls)
    leaves = internals.optional("torchvision.models.feature_extraction._get_leaf_modules_for_ops")
    if leaves is not None and not hasattr(leaves, "__wrapped__"):

        @functools.wraps(leaves)
        def with_registered_norms() -> list[type]:
            return [*leaves(), *registered_classes()]

        feature_extraction._get_leaf_modules_for_ops = with_registered_norms


def unregister() -> None:
    """Undo ``register``; models that are built stay as they are."""
    for name in _BUILDERS:
        replacement.restore(name)
    for cls, init in _detectors_init.items():
        cls.__init__ = init
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
