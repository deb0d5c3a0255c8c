"""detectron2: spec strings wherever it reads a norm name (``MODEL.*.NORM`` in YAML, ``norm=`` and ``conv_norm=`` in
LazyConfig), and configs with this package's keys.

detectron2 builds norms by ``get_norm`` of ``detectron2/layers/batch_norm.py``, which knows a closed set of names. Its
modules bind it when they are imported, and LazyConfigs and partials hold it: :func:`register` reaches them all, before
and after. Only RetinaNet's head looks at the name itself, to keep statistics per level: it is taught to do so for our
names.

Not reached: DensePose's DeepLab head compares with ``"GN"`` and builds no norm for any other name, ``"BN"`` included;
its HRNet has plain batch norms, and asks no config.

``get_default_optimizer_params`` gives the weight decay of norms to a closed set of classes: it is told of all others.

``get_cfg()`` has the keys of ``detectron2_keys.py`` besides, so that every YAML of this package's merges into it. Where
they are at their default, ``dump()`` leaves them out: what a script writes is detectron2's own config again.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, CycleBatchNormList, FrozenBatchNorm2d, NaiveSyncBatchNorm, batch_norm
from detectron2.modeling.backbone import resnet
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.solver.build import reduce_param_groups
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fbn_plugin.frameworks import replacement
from fbn_plugin.frameworks.detectron2_keys import add_keys, changed_keys, without_defaults
from fbn_plugin.layers.description import FROZEN, NormDescription, describe, describe_class
from fbn_plugin.registry import (
    NORMS,
    NormFactory,
    matching_names,
    norm_factory,
    refuse_two,
    with_registered_name,
)
from fbn_plugin.surgery.convert import make_plain
from fbn_plugin.surgery.fold import register_layer
from fbn_plugin.surgery.fuse import fused, register_fuser
from fbn_plugin.surgery.input_norm import Builder, normalize_images, register_prepender
from fbn_plugin.training.gamma_initialization import apply_gamma_init
from fbn_plugin.training.parameter_groups import named_without_decay, norm_parameters

DETECTRON2_NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")

_GET_NORM = "detectron2.layers.batch_norm.get_norm"
_CONVERT_FROZEN = "detectron2.layers.FrozenBatchNorm2d.convert_frozen_batchnorm.__func__"
_GET_CFG = "detectron2.config.get_cfg"
_DEFAULT_SETUP = "detectron2.engine.defaults.default_setup"
_OPTIMIZER_PARAMS = "detectron2.solver.build.get_default_optimizer_params"

_detectron2_get_norm = replacement.original(_GET_NORM)
_detectron2_convert_frozen = replacement.original(_CONVERT_FROZEN)
_detectron2_get_cfg = replacement.original(_GET_CFG)
_detectron2_default_setup = replacement.original(_DEFAULT_SETUP)
_detectron2_optimizer_params = replacement.original(_OPTIMIZER_PARAMS)
_detectron2_retinanet_init = RetinaNetHead.__init__
_detectron2_dump = CfgNode.dump
_logger = logging.getLogger(__name__)

# In one process this class is plain batch normalization; its forward differs only in how ranks are averaged.
describe_class(NormDescription("BN", "channel", 2, synchronized=True), NaiveSyncBatchNorm)
describe_class(FROZEN, FrozenBatchNorm2d)
describe_class(NormDescription("LN"), batch_norm.LayerNorm)
describe_class(NormDescription(batch_scale=True), CycleBatchNormList)  # the norms in it are what is converted
register_layer(Conv2d, "norm", "activation")


def check_norm(norm: str | Callable | None) -> NormFactory | str | Callable | None:
    """What detectron2's own ``get_norm`` is to be given for ``norm``: one of its names for such a name in any case, a
    factory for a spec of ours, and callables as they are.

    Raises:
        ValueError: neither a name of detectron2's nor a valid spec; or two of them, but for upper and lower case.
    """
    if not isinstance(norm, str) or norm in DETECTRON2_NORMS:
        return norm
    found = matching_names(norm.partition("(")[0].strip(), DETECTRON2_NORMS)
    refuse_two(norm, found)
    if found and found[0] in DETECTRON2_NORMS and "(" not in norm:
        return found[0]
    try:
        return norm_factory(norm)
    except ValueError as error:
        if found and found[0] in NORMS:
            raise
        own = ", ".join(name for name in DETECTRON2_NORMS if name and name not in NORMS)
        raise ValueError(f"{error}; and, without options, detectron2's {own}") from None


def canonical_norm(norm: Any) -> Any:
    """A norm of a config as it is stored: with the name in its own case; what is none is left as it is."""
    try:
        known = check_norm(norm)
    except ValueError:
        return norm
    return known if isinstance(known, str) else with_registered_name(norm)


def get_norm(norm: str | Callable | None, out_channels: int) -> nn.Module | None:
    """Build a norm as detectron2's ``get_norm`` does, or, where it does not know the name, as the spec ``norm`` says.

    Args:
        norm: a name of detectron2's, which keeps its meaning there; a spec such as ``"FBN(t_sigma=4.0)"``; either in
            any case; a callable ``(out_channels) -> nn.Module``; or ``""`` or None for no norm.
        out_channels: C.

    Raises:
        ValueError: neither a name of detectron2's nor a valid spec, or one that does not fit the channels.
    """
    known = check_norm(norm)
    if known is norm or isinstance(known, str):
        return _detectron2_get_norm(known, out_channels)
    try:
        return _detectron2_get_norm(known, out_channels)
    except ValueError as error:
        raise ValueError(f"norm {norm!r} for {out_channels} channels: {error}") from None


def _per_level(retinanet_init: Callable) -> Callable:
    """RetinaNet's head shares its convolutions between the levels of the pyramid, but for ``"BN"`` it keeps statistics
    of each level and one scale and shift. Do the same for a spec that is a batch normalization, but for those whose
    scale and shift are one piece; a callable is shared, as in detectron2."""

    @functools.wraps(retinanet_init)
    def __init__(self, *, input_shape, conv_dims, norm="", **kwargs):
        known = check_norm(norm)
        built = None if known is norm or isinstance(known, str) else known(conv_dims[0])
        if isinstance(built, _BatchNorm) and describe(built).splits_affine:
            _logger.info(f"RetinaNetHead: {norm} with statistics of its own for each of {len(input_shape)} levels.")
            norm = functools.partial(_norm_per_level, known, len(input_shape))
        elif isinstance(known, str):
            norm = known
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
    return _detectron2_convert_frozen(cls, module)


def _get_cfg() -> CfgNode:
    cfg = _detectron2_get_cfg()
    add_keys(cfg)
    return cfg


def _dump(self: CfgNode, *args, **kwargs) -> str:
    return _detectron2_dump(without_defaults(self), *args, **kwargs)


def _default_setup(cfg: Any, args: Any) -> None:
    """detectron2's, which its own scripts begin with. None of them does what our keys say."""
    _detectron2_default_setup(cfg, args)
    if isinstance(cfg, CfgNode) and (ours := changed_keys(cfg)):
        _logger.warning(
            "this script does nothing about %s of the config: fbn_plugin's tools/train_net.py does, by build_model and "
            "build_optimizer of fbn_plugin.engine.detectron2.model among others",
            ", ".join(ours),
        )


def _get_default_optimizer_params(*args, **kwargs) -> list[dict[str, Any]]:
    """detectron2's, with ``weight_decay_norm`` for the parameters of every norm, and none for what norms name in
    ``no_weight_decay()``."""
    groups = _detectron2_optimizer_params(*args, **kwargs)
    given = inspect.signature(_detectron2_optimizer_params).bind(*args, **kwargs).arguments
    model, decay = given["model"], given.get("weight_decay_norm")
    norms, named = norm_parameters(model), named_without_decay(model, norms_only=True)
    own = {name for name, settings in (given.get("overrides") or {}).items() if "weight_decay" in settings}
    own |= {"bias"} if given.get("weight_decay_bias") is not None else set()
    changes = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter in named:
            changes.append({"params": [parameter], "weight_decay": 0.0})
        elif parameter in norms and decay is not None and name.rpartition(".")[2] not in own:
            changes.append({"params": [parameter], "weight_decay": decay})
    return reduce_param_groups([*groups, *changes])


_REPLACED = {
    _GET_NORM: get_norm,
    _CONVERT_FROZEN: _convert_frozen_batchnorm,
    _GET_CFG: _get_cfg,
    _DEFAULT_SETUP: _default_setup,
    _OPTIMIZER_PARAMS: _get_default_optimizer_params,
}


def register() -> None:
    """Make spec strings valid wherever detectron2 reads a norm name, and this package's keys in its configs, whoever
    holds its functions already."""
    for name, ours in _REPLACED.items():
        replacement.replace(name, ours)
    RetinaNetHead.__init__ = _retinanet_init
    CfgNode.dump = _dump


def unregister() -> None:
    """Give detectron2 what is its own back."""
    for name in _REPLACED:
        replacement.restore(name)
    RetinaNetHead.__init__ = _detectron2_retinanet_init
    CfgNode.dump = _detectron2_dump


class FusedBasicBlock(resnet.BasicBlock):
    """``BasicBlock`` whose norms add the shortcut and hold the activation."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.shortcut is not None:
            shortcut = self.shortcut(x)
        x = self.conv2._conv_forward(self.conv1(x), self.conv2.weight, self.conv2.bias)
        return self.conv2.norm(x, shortcut)


class FusedBottleneckBlock(resnet.BottleneckBlock):
    """``BottleneckBlock`` whose norms add the shortcut and hold the activation."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.shortcut is not None:
            shortcut = self.shortcut(x)
        x = self.conv3._conv_forward(self.conv2(self.conv1(x)), self.conv3.weight, self.conv3.bias)
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
