"""detectron2: spec strings wherever it reads a norm name (``MODEL.*.NORM`` in YAML, ``norm=`` and ``conv_norm=`` in
LazyConfig).

detectron2 builds norms by ``get_norm`` of ``detectron2/layers/batch_norm.py``, which knows a closed set of names and
which its modules bind when they are imported. So :func:`register` rebinds it in every loaded module that holds it;
modules that are imported later find ours. Only RetinaNet's head looks at the name itself, to keep statistics per level:
it is taught to do so for our names.

Not reached: DensePose's DeepLab head compares with ``"GN"`` and builds no norm for any other name, ``"BN"`` included.
"""

import functools
import logging
import sys
from collections.abc import Callable
from types import ModuleType

from detectron2.config import configurable
from detectron2.layers import Conv2d, CycleBatchNormList, FrozenBatchNorm2d, NaiveSyncBatchNorm, batch_norm
from detectron2.modeling.backbone import resnet
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fbn_plugin.layers.description import FROZEN, NormDescription, describe, describe_class
from fbn_plugin.registry import NORMS, NormFactory, norm_factory
from fbn_plugin.surgery.convert import make_plain
from fbn_plugin.surgery.fold import register_layer
from fbn_plugin.surgery.fuse import fused, register_fuser
from fbn_plugin.surgery.input_norm import Builder, normalize_images, register_prepender
from fbn_plugin.training.gamma_initialization import apply_gamma_init

DETECTRON2_NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")

_detectron2_get_norm = batch_norm.get_norm
_detectron2_retinanet_init = RetinaNetHead.__init__
_detectron2_convert_frozen = vars(FrozenBatchNorm2d)["convert_frozen_batchnorm"]
_logger = logging.getLogger(__name__)

# In one process this class is plain batch normalization; its forward differs only in how ranks are averaged.
describe_class(NormDescription("BN", "channel", 2, synchronized=True), NaiveSyncBatchNorm)
describe_class(FROZEN, FrozenBatchNorm2d)
describe_class(NormDescription("LN"), batch_norm.LayerNorm)
describe_class(NormDescription(batch_scale=True), CycleBatchNormList)  # the norms in it are what is converted
register_layer(Conv2d, "norm", "activation")


def check_norm(norm: str | Callable | None) -> NormFactory | str | Callable | None:
    """What detectron2's own ``get_norm`` is to be given for ``norm``: names of detectron2's and callables as they are,
    and a factory for a spec of ours.

    Raises:
        ValueError: neither a name of detectron2's nor a valid spec.
    """
    if not isinstance(norm, str) or norm in DETECTRON2_NORMS:
        return norm
    try:
        return norm_factory(norm)
    except ValueError as error:
        if norm.partition("(")[0].strip() in NORMS:
            raise
        own = ", ".join(name for name in DETECTRON2_NORMS if name and name not in NORMS)
        raise ValueError(f"{error}; and, without options, detectron2's {own}") from None


def get_norm(norm: str | Callable | None, out_channels: int) -> nn.Module | None:
    """Build a norm as detectron2's ``get_norm`` does, or, where it does not know the name, as the spec ``norm`` says.

    Args:
        norm: a name of detectron2's, which keeps its meaning there; a spec such as ``"FBN(t_sigma=4.0)"``; a callable
            ``(out_channels) -> nn.Module``; or ``""`` or None for no norm.
        out_channels: C.

    Raises:
        ValueError: neither a name of detectron2's nor a valid spec, or one that does not fit the channels.
    """
    factory = check_norm(norm)
    if factory is norm:
        return _detectron2_get_norm(norm, out_channels)
    try:
        return _detectron2_get_norm(factory, out_channels)
    except ValueError as error:
        raise ValueError(f"norm {norm!r} for {out_channels} channels: {error}") from None


def _per_level(retinanet_init: Callable) -> Callable:
    """RetinaNet's head shares its convolutions between the levels of the pyramid, but for ``"BN"`` it keeps statistics
    of each level and one scale and shift. Do the same for a spec that is a batch normalization, but for those whose
    scale and shift are one piece; a callable is shared, as in detectron2."""

    @functools.wraps(retinanet_init)
    def __init__(self, *, input_shape, conv_dims, norm="", **kwargs):
        factory = check_norm(norm)
        built = factory(conv_dims[0]) if factory is not norm else None
        if isinstance(built, _BatchNorm) and describe(built).splits_affine:
            _logger.info(f"RetinaNetHead: {norm} with statistics of its own for each of {len(input_shape)} levels.")
            norm = functools.partial(_norm_per_level, factory, len(input_shape))
        retinanet_init(self, input_shape=input_shape, conv_dims=conv_dims, norm=norm, **kwargs)

    return __init__


def _norm_per_level(factory: NormFactory, levels: int, channels: int) -> CycleBatchNormList:
    norms = CycleBatchNormList(
        levels,
        bn_class=lambda num_features, affine: factory(num_features, affine=affine),
        num_features=channels,
        affine=factory.spec.options.get("affine", True),
    )
    norms.gamma_init = getattr(norms[0], "gamma_init", 1.0)
    return apply_gamma_init(norms)


# ``configurable`` goes around the wrapper, so that it sees the norm whether the head is built from a config or not.
_retinanet_init = configurable(_per_level(_detectron2_retinanet_init.__wrapped__))


def _convert_frozen_batchnorm(cls: type[nn.Module], module: nn.Module) -> nn.Module:
    """detectron2's conversion reads weight and bias of a batch norm: let these say all that it does in evaluation."""
    make_plain(module)
    return _detectron2_convert_frozen.__func__(cls, module)


def _rebind(old: Callable, new: Callable) -> None:
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and module is not sys.modules[__name__]:
            for name in [name for name, value in vars(module).items() if value is old]:
                setattr(module, name, new)


def register() -> None:
    """Make spec strings valid wherever detectron2 reads a norm name, in modules already imported and in later ones."""
    _rebind(_detectron2_get_norm, get_norm)
    RetinaNetHead.__init__ = _retinanet_init
    FrozenBatchNorm2d.convert_frozen_batchnorm = classmethod(_convert_frozen_batchnorm)


def unregister() -> None:
    """Give detectron2 its own ``get_norm`` back."""
    _rebind(get_norm, _detectron2_get_norm)
    RetinaNetHead.__init__ = _detectron2_retinanet_init
    FrozenBatchNorm2d.convert_frozen_batchnorm = _detectron2_convert_frozen


class FusedBasicBlock(resnet.BasicBlock):
    """``BasicBlock`` whose norms add the shortcut and hold the activation."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.shortcut is not None:
            shortcut = self.shortcut(x)
        x = self.conv1(x)
        x = F.conv2d(
            x,
            self.conv2.weight,
            self.conv2.bias,
            self.conv2.stride,
            self.conv2.padding,
            self.conv2.dilation,
            self.conv2.groups,
        )
        return self.conv2.norm(x, shortcut)


class FusedBottleneckBlock(resnet.BottleneckBlock):
    """``BottleneckBlock`` whose norms add the shortcut and hold the activation."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.shortcut is not None:
            shortcut = self.shortcut(x)
        x = self.conv2(self.conv1(x))
        x = F.conv2d(
            x,
            self.conv3.weight,
            self.conv3.bias,
            self.conv3.stride,
            self.conv3.padding,
            self.conv3.dilation,
            self.conv3.groups,
        )
        return self.conv3.norm(x, shortcut)


class FusedBasicStem(resnet.BasicStem):
    """``BasicStem`` whose norm holds the activation."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.conv1(x), kernel_size=3, stride=2, padding=1)


def _fuse_block(block: nn.Module, fused_class: type[nn.Module], *convs: str) -> None:
    layers = {name: fused(getattr(block, name).norm, F.relu) for name in convs}
    plain = all(getattr(block, name).activation is None for name in convs)
    if plain and None not in layers.values():
        for name, layer in layers.items():
            getattr(block, name).norm = layer
        block.__class__ = fused_class


def _fuse_conv(conv: Conv2d) -> None:
    layer = None if conv.activation is None else fused(conv.norm, conv.activation)
    if layer is not None:
        conv.norm, conv.activation = layer, None


register_fuser(Conv2d, _fuse_conv)
register_fuser(resnet.BasicStem, lambda block: _fuse_block(block, FusedBasicStem, "conv1"))
register_fuser(resnet.BasicBlock, lambda block: _fuse_block(block, FusedBasicBlock, "conv1", "conv2"))
register_fuser(
    resnet.BottleneckBlock, lambda block: _fuse_block(block, FusedBottleneckBlock, "conv1", "conv2", "conv3")
)


def _prepend_input_norm(model: nn.Module, build: Builder) -> None:
    model.input_norm = build(model.pixel_mean.numel())
    model.pixel_mean.zero_()
    model.pixel_std.fill_(1)
    entry = "preprocess_image" if hasattr(model, "preprocess_image") else "forward"
    setattr(model, entry, functools.partial(_with_normalized_images, model, entry))


def _with_normalized_images(model: nn.Module, entry: str, batched_inputs: list[dict], *args, **kwargs):
    images = [each["image"].to(model.pixel_mean.device) for each in batched_inputs]
    images = normalize_images(model.input_norm, images)
    batched_inputs = [{**each, "image": image} for each, image in zip(batched_inputs, images)]
    return getattr(type(model), entry)(model, batched_inputs, *args, **kwargs)


# A meta architecture holds its mean and deviation as buffers of these names, and either normalizes in a method of its
# own, which inference calls too, or in the midst of its forward.
register_prepender(lambda model: isinstance(getattr(model, "pixel_mean", None), Tensor), _prepend_input_norm)
