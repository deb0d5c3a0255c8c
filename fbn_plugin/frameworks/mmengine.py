"""MMDetection and what else is built on mmengine and mmcv: the registered norms as ``norm_cfg=dict(type="FBN",
t_sigma=4)``, by entering mmengine's registry of models.

mmcv's ``build_norm_layer`` (mmcv/cnn/bricks/norm.py, read in 2.1.0 and 2.2.0) takes a *class* from the registry, calls
it with the number of channels and what else stands in the dict, and names the layer by the class's ``_abbr_``. It adds
an ``eps`` of 1e-5 if there is none. ``BN``, ``SyncBN``, ``GN``, ``LN`` and ``IN`` are mmcv's own and keep their
meaning.

Where mmcv and mmengine read weight and bias of a batch norm, or make it a synchronized one, ours is seen to.
"""

import functools
import sys
import warnings
from collections.abc import Callable

from mmengine.registry import MODELS
from torch import Tensor, nn

from fbn_plugin import internals
from fbn_plugin.adapters import register_loader
from fbn_plugin.frameworks import replacement
from fbn_plugin.frameworks.imports import after_import, forget
from fbn_plugin.layers.description import describe, family
from fbn_plugin.registry import NORMS, NormSpec, norm_factory, norm_options, parse_spec, registered_classes
from fbn_plugin.surgery.convert import convert_sync, make_plain
from fbn_plugin.surgery.fold import register_layer

MMCV_NORMS = ("BN", "SyncBN", "GN", "LN", "IN")  # mmcv enters them when it is imported, and would refuse to if we had

# What mmcv names its own, so that a model with our norm has the checkpoint keys of the same model with theirs.
_ABBREVIATIONS = {"BN": "bn", "FrozenBN": "bn", "GN": "gn", "LN": "ln", "IN": "in"}
_MMCV_EPS = 1e-5


class _Entry(type):
    """A registered norm as the registry's entry: a class, because mmcv asks for one, whose call builds the norm."""

    norm: str

    @property
    def _abbr_(cls) -> str:
        norm = norm_factory(cls.norm)(32)
        return getattr(norm, "_abbr_", _ABBREVIATIONS.get(family(norm), "norm_layer"))

    def __call__(cls, *args, **kwargs) -> nn.Module:
        placement = {key: kwargs.pop(key) for key in ("device", "dtype", "dims") if key in kwargs}
        channels = {key: kwargs.pop(key) for key in ("num_channels", "num_features") if key in kwargs}
        if "eps" not in norm_options(cls.norm) and kwargs.get("eps") == _MMCV_EPS:
            del kwargs["eps"]
        spec = parse_spec(str(NormSpec(cls.norm, kwargs)))  # with the checks that a spec string gets
        return norm_factory(spec, placement.pop("dims", 2))(*args, **channels, **placement)


def _enter(norm: str) -> None:
    """Enter a registered norm, under its name in lower case too, unless a name has a meaning already."""
    doc = f"The norm {norm} of fbn_plugin, called with the number of channels and its options."
    entry = _Entry(norm, (), {"norm": norm, "__doc__": doc, "__module__": __name__})
    for name in () if norm in MMCV_NORMS else dict.fromkeys((norm, norm.lower())):
        there = MODELS.module_dict.get(name)
        if there is None:
            MODELS.register_module(name=name, module=entry)
        elif not isinstance(there, _Entry):
            warnings.warn(
                f"mmengine's MODELS has a {name!r} already, {there.__module__}.{there.__name__}: it keeps its meaning",
                stacklevel=2,
            )


def convert_sync_batchnorm(module: nn.Module, implementation: str = "torch") -> nn.Module:
    """mmengine's function, by which its runner obeys ``sync_bn="torch"``; filtered norms keep their filter. It calls
    itself by name for every child, so that this one sees every module."""
    if type(module) in registered_classes() and family(module) == "BN":
        return convert_sync(module)
    return replacement.original("mmengine.model.convert_sync_batchnorm")(module, implementation)


def fuse_conv_bn(module: nn.Module) -> nn.Module:
    """mmcv's function, for norms whose scale is more than their weight, too."""
    for each in module.modules():
        make_plain(each)
    return replacement.original("mmcv.cnn.fuse_conv_bn")(module)


def _efficient_forward(name: str) -> Callable[[nn.Module, nn.Module, Tensor], Tensor]:
    """The function under ``name`` multiplies the weight of a frozen norm into the convolution before it. A norm whose
    scale is more than its weight is left to itself."""

    def efficient_conv_bn_eval_forward(bn: nn.Module, conv: nn.Module, x: Tensor) -> Tensor:
        description = describe(bn)
        if description is not None and description.keeps_meaning:
            return replacement.original(name)(bn, conv, x)
        return bn(type(conv).forward(conv, x))  # conv.forward itself may be this function at the moment

    return efficient_conv_bn_eval_forward


_EFFICIENT = (
    "mmengine.model.efficient_conv_bn_eval.efficient_conv_bn_eval_forward",
    "mmcv.cnn.bricks.conv_module.efficient_conv_bn_eval_forward",
)
_OURS = {
    "mmengine.model.convert_sync_batchnorm": convert_sync_batchnorm,
    "mmcv.cnn.fuse_conv_bn": fuse_conv_bn,
    **{name: _efficient_forward(name) for name in _EFFICIENT},
}


def _replace(name: str) -> None:
    if internals.optional(name) is not None:
        replacement.replace(name, _OURS[name])


# Both packages are large and import only what a program asks for, so each is entered when it is there.
_ENTERED = {name: (".".join(name.split(".")[:2]), functools.partial(_replace, name)) for name in _OURS}


def _know_layers() -> None:
    from mmcv.cnn.bricks import wrappers

    for cls in (wrappers.Conv2d, wrappers.Conv3d, wrappers.ConvTranspose2d, wrappers.ConvTranspose3d, wrappers.Linear):
        register_layer(cls)


register_loader("mmcv.cnn", _know_layers)
if "mmcv.cnn" in sys.modules:
    _know_layers()


def register() -> None:
    """Enter the registered norms, and those that will be, and see to the functions that would lose them."""
    for name, _ in NORMS:
        _enter(name)
    if _enter not in NORMS.listeners:
        NORMS.listeners.append(_enter)
    for module, replace in _ENTERED.values():
        after_import(module, replace)


def unregister() -> None:
    """Take out again what :func:`register` entered; models that are built stay as they are."""
    for name in [name for name, entry in MODELS.module_dict.items() if isinstance(entry, _Entry)]:
        MODELS.module_dict.pop(name)
    if _enter in NORMS.listeners:
        NORMS.listeners.remove(_enter)
    for module, replace in _ENTERED.values():
        forget(module, replace)
    for name in _OURS:
        replacement.restore(name)
