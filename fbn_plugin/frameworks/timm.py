"""How a norm gets into timm: spec strings, filtered classes and ``norm_factory(...)`` as ``norm_layer=``, the
norm+activation forms of the registered norms, and what converts timm's own ``BatchNormAct2d``.

timm finds a norm in ``get_norm_layer`` and ``get_norm_act_layer`` (timm/layers/create_norm.py and create_norm_act.py,
read in 1.0.31). Its models bind these by name when they are imported, so :func:`register` puts ours in their place in
every loaded module.
"""

import difflib
import functools
import re
import sys
import warnings
from collections.abc import Callable, Iterable

from timm.layers import (
    BatchNormAct2d,
    GroupNormAct,
    LayerNormAct2d,
    SyncBatchNormAct,
    create_act_layer,
    create_norm,
    create_norm_act,
    norm_act,
    register_notrace_module,
    split_batchnorm,
)
from timm.layers.typing import LayerType
from timm.models import _prune, resnet
from torch import Tensor, nn

from fbn_plugin import layers
from fbn_plugin.convert import build_like, convert_norm, register_converter
from fbn_plugin.fuse import fuse_children, fused, register_fuser
from fbn_plugin.layers.filtered_batch_norm import FilteredBatchNormMixin
from fbn_plugin.layers.filtered_batch_norm_act import activation_of
from fbn_plugin.ops import filtered_batch_norm_act
from fbn_plugin.registry import NORMS, NormFactory, NormSpec, norm_factory, parse_spec


class _NormAct:
    """timm's convention for a norm with its activation, to stand before the norm's class in the bases.

    Args:
        *args, **kwargs: those of the norm.
        apply_act: False leaves the activation out.
        act_layer: class or timm name of the activation; None for no activation.
        act_kwargs: arguments of the activation.
        inplace: let the activation overwrite the normalized values, if it can.
        drop_layer: class of a layer between norm and activation.
    """

    def __init__(
        self,
        *args,
        apply_act: bool = True,
        act_layer: LayerType | None = nn.ReLU,
        act_kwargs: dict | None = None,
        inplace: bool = True,
        drop_layer: Callable[[], nn.Module] | None = None,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        act = create_act_layer(act_layer, **{"inplace": inplace, **(act_kwargs or {})}) if apply_act else None
        self.drop = nn.Identity() if drop_layer is None else drop_layer()
        self.act = nn.Identity() if act is None else act

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


class FilteredBatchNormAct2d(_NormAct, layers.FilteredBatchNorm2d, BatchNormAct2d):
    """Filtered batch normalization and activation: :class:`fbn_plugin.FilteredBatchNorm2d` in the form of timm's
    ``BatchNormAct2d``, with the same ``state_dict`` keys and the same evaluation.

    Takes the arguments of :class:`fbn_plugin.FilteredBatchNorm2d` and those of ``BatchNormAct2d``. Norm and activation
    are one operator if that knows the activation and there is no drop layer.
    """

    def forward(self, input: Tensor) -> Tensor:
        known = activation_of(self.act) if type(self.drop) is nn.Identity else None
        if known is None:
            return super().forward(input)
        arguments = self._norm_arguments(input)
        return filtered_batch_norm_act(input, **arguments, activation=known[0], negative_slope=known[1])


class FilteredGroupNormAct(_NormAct, layers.FilteredGroupNorm):
    """Filtered group normalization and activation; the number of channels comes first, as timm calls its norms."""

    def __init__(self, num_channels: int, num_groups: int = 32, **kwargs) -> None:
        super().__init__(num_groups, num_channels, **kwargs)


class FilteredLayerNormAct2d(_NormAct, layers.FilteredLayerNorm2d):
    """Filtered layer normalization over the channels, and activation."""


class FilteredInstanceNormAct2d(_NormAct, layers.FilteredInstanceNorm2d):
    """Filtered instance normalization and activation."""


class FilterResponseNormAct2d(_NormAct, layers.FilterResponseNorm2d):
    """Filter response normalization and activation. With ``tlu=True`` the threshold is the activation, in place of
    ``act_layer``, and ``apply_act=False`` leaves it out."""

    def __init__(self, num_features: int, *, tlu: bool = True, apply_act: bool = True, **kwargs) -> None:
        super().__init__(num_features, tlu=tlu and apply_act, apply_act=apply_act and not tlu, **kwargs)


class FilteredFilterResponseNormAct2d(FilterResponseNormAct2d, layers.FilteredFilterResponseNorm2d):
    """The filtered form of :class:`FilterResponseNormAct2d`."""


class ConvNormAndAct2d(_NormAct, layers.ConvNorm2d, BatchNormAct2d):
    """ConvNorm and activation; timm's ``ConvNormAct`` is something else, a convolution with what follows it."""


class LearnedStatsNormAct2d(_NormAct, layers.LearnedStatsNorm2d):
    """Normalization by learned statistics, and activation."""


class InstanceNormAct2d(_NormAct, nn.InstanceNorm2d):
    """Instance normalization and activation, which timm has no class for."""


def _sync_batch_norm_act(num_features: int, **kwargs) -> SyncBatchNormAct:
    """timm's synchronized form, which timm makes by conversion only."""
    return _THEIRS["convert_sync_batchnorm"](BatchNormAct2d(num_features, **kwargs))


# The norm+activation form of each registered norm, timm's own where there is one, with the defaults of the registry.
_FORMS: dict[str, Callable[..., nn.Module]] = {
    "BN": BatchNormAct2d,
    "SyncBN": _sync_batch_norm_act,
    "GN": GroupNormAct,
    "LN": functools.partial(LayerNormAct2d, eps=1e-6),
    "IN": functools.partial(InstanceNormAct2d, affine=True),
    "FBN": FilteredBatchNormAct2d,
    "FGN": FilteredGroupNormAct,
    "FLN": FilteredLayerNormAct2d,
    "FIN": FilteredInstanceNormAct2d,
    "FRN": functools.partial(FilterResponseNormAct2d, tlu=False),
    "FFRN": functools.partial(FilteredFilterResponseNormAct2d, tlu=False),
    "ConvNorm": ConvNormAndAct2d,
    "LearnedNorm": LearnedStatsNormAct2d,
}
_FORM_OF_CLASS = {
    layers.FilteredBatchNorm2d: FilteredBatchNormAct2d,
    layers.FilteredLayerNorm2d: FilteredLayerNormAct2d,
    layers.FilteredInstanceNorm2d: FilteredInstanceNormAct2d,
    layers.FilterResponseNorm2d: FilterResponseNormAct2d,
    layers.FilteredFilterResponseNorm2d: FilteredFilterResponseNormAct2d,
    layers.ConvNorm2d: ConvNormAndAct2d,
    layers.LearnedStatsNorm2d: LearnedStatsNormAct2d,
}


def _form(spec: NormSpec) -> functools.partial:
    """The norm+activation form of the norm that ``spec`` names, with its options bound."""
    if spec.name not in _FORMS:
        raise ValueError(f"norm {spec.name!r} has no norm+activation form in timm: accepted are {', '.join(_FORMS)}")
    return functools.partial(_FORMS[spec.name], **spec.options)


def _find_spec(text: str, timm_names: Iterable[str]) -> NormSpec:
    """The spec that a string given as ``norm_layer`` means, if it is none of timm's: a registered name in any case,
    with or without its punctuation, and options as in any spec."""

    def fold(name: str) -> str:
        return re.sub("[^a-z0-9]", "", name.lower())

    name, bracket, options = text.partition("(")
    ours = [key for key, _ in NORMS]
    found = [key for key in ours if key.lower() == name.strip().lower()] or [k for k in ours if fold(k) == fold(name)]
    if not found:
        known = [fold(key) for key in ours] + sorted(timm_names)
        nearest = difflib.get_close_matches(fold(name), known, n=1)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        raise ValueError(f"unknown norm_layer {text!r}{hint}: accepted are {', '.join(known)}")
    return parse_spec(found[0] + bracket + options)


def get_norm_layer(norm_layer: LayerType | None) -> Callable[..., nn.Module] | None:
    """timm's ``get_norm_layer``, which also knows the specs of registered norms. timm's own names come first.

    Raises:
        ValueError: a string that neither knows, or a wrong option.
    """
    try:
        return _THEIRS["get_norm_layer"](norm_layer)
    except KeyError:
        return norm_factory(_find_spec(norm_layer, create_norm._NORM_MAP))


def get_norm_act_layer(
    norm_layer: LayerType | None, act_layer: LayerType | None = None
) -> Callable[..., nn.Module] | None:
    """timm's ``get_norm_act_layer``, which also knows registered norms, given as a spec, a filtered class, a
    ``norm_factory(...)`` or a partial of these. The activation is bound as timm binds it for its own classes.

    Raises:
        ValueError: a string that neither knows, a wrong option, or a norm without a norm+activation form.
    """
    target, options = norm_layer, {}
    while isinstance(target, functools.partial):
        target, options = target.func, {**target.keywords, **options}
    if isinstance(target, str):
        try:
            return _THEIRS["get_norm_act_layer"](norm_layer, act_layer)
        except KeyError:
            form = _form(_find_spec(target, create_norm_act._NORM_ACT_MAP))
    elif (name := getattr(target, "__name__", None)) in NORMS and NORMS.get(name) is target:
        options.pop("dims", None)
        form = _form(NormSpec(name))
    elif isinstance(target, type) and issubclass(target, _NormAct):
        form = target
    elif target in _FORM_OF_CLASS:
        form = _FORM_OF_CLASS[target]
    else:
        return _THEIRS["get_norm_act_layer"](norm_layer, act_layer)
    return functools.partial(form, **{"act_layer": act_layer, **options})


def adapt_model_from_string(parent_module: nn.Module, *args, **kwargs) -> nn.Module:
    """timm's function for its pruned models, which builds every norm anew as batch normalization: filter them again."""
    model = _THEIRS["adapt_model_from_string"](parent_module, *args, **kwargs)
    for name, old in parent_module.named_modules():
        if isinstance(old, FilteredBatchNormMixin):
            spec = NormSpec("FBN", old._filter_options())
            model.set_submodule(name, convert_norm(model.get_submodule(name), spec))
    return model


def _warn_of_lost_filter(conversion: Callable) -> Callable:
    @functools.wraps(conversion)
    def converted(module: nn.Module, *args, **kwargs) -> nn.Module:
        filtered = sum(isinstance(m, FilteredBatchNormMixin) for m in module.modules())
        if filtered:
            message = f"timm's {conversion.__name__} makes batch norms without the filter of {filtered} filtered ones"
            warnings.warn(message, stacklevel=2)
        return conversion(module, *args, **kwargs)

    return converted


_THEIRS = {
    function.__name__: function
    for function in (
        create_norm.get_norm_layer,
        create_norm_act.get_norm_act_layer,
        norm_act.convert_sync_batchnorm,
        split_batchnorm.convert_splitbn_model,
        _prune.adapt_model_from_string,
    )
}
_OURS = {
    "get_norm_layer": get_norm_layer,
    "get_norm_act_layer": get_norm_act_layer,
    "convert_sync_batchnorm": _warn_of_lost_filter(_THEIRS["convert_sync_batchnorm"]),
    "convert_splitbn_model": _warn_of_lost_filter(_THEIRS["convert_splitbn_model"]),
    "adapt_model_from_string": adapt_model_from_string,
}


def _replace(old: dict[str, Callable], new: dict[str, Callable]) -> None:
    for module in list(sys.modules.values()):
        if module in (norm_act, split_batchnorm):  # their conversions call themselves by name for each child
            continue
        namespace = getattr(module, "__dict__", {})
        for name, function in old.items():
            if namespace.get(name) is function:
                setattr(module, name, new[name])


def register() -> None:
    """Make timm understand registered norms as ``norm_layer``, in models that are loaded already and in later ones."""
    _replace(_THEIRS, _OURS)


def unregister() -> None:
    """Give timm its own functions back; models that are built stay as they are."""
    _replace(_OURS, _THEIRS)


def _convert(old: nn.Module, factory: NormFactory) -> nn.Module:
    act = getattr(old, "act", nn.Identity())  # SyncBatchNormAct may have neither act nor drop
    form = functools.partial(_form(factory.spec), apply_act=not isinstance(act, nn.Identity))
    form.spec = factory.spec
    new = build_like(old, form)
    new.drop = getattr(old, "drop", new.drop)
    if getattr(new, "tau", None) is None:  # else the threshold is the activation
        new.act = act
    return new


for _norm_act_class in (BatchNormAct2d, SyncBatchNormAct):
    register_converter(_norm_act_class, _convert)

# FX feature extraction traces into modules from outside torch.nn, unless they are registered as leaves.
for _leaf in (
    layers.FilteredBatchNorm1d,
    layers.FilteredBatchNorm2d,
    layers.FilteredBatchNorm3d,
    layers.FilteredBatchNormAct2d,
    layers.FilteredGroupNorm,
    layers.FilteredInstanceNorm2d,
    layers.FilteredLayerNorm2d,
    layers.LayerNorm2d,
    layers.FilterResponseNorm2d,
    layers.FilteredFilterResponseNorm2d,
    layers.ConvNorm2d,
    layers.LearnedStatsNorm2d,
    FilteredBatchNormAct2d,
    FilteredGroupNormAct,
    FilteredLayerNormAct2d,
    FilteredInstanceNormAct2d,
    FilterResponseNormAct2d,
    FilteredFilterResponseNormAct2d,
    ConvNormAndAct2d,
    LearnedStatsNormAct2d,
    InstanceNormAct2d,
):
    register_notrace_module(_leaf)


class FusedBasicBlock(resnet.BasicBlock):
    """``BasicBlock`` whose last norm adds the shortcut and holds the activation."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))
        return self.bn2(self.conv2(x), shortcut)


class FusedBottleneck(resnet.Bottleneck):
    """``Bottleneck`` whose last norm adds the shortcut and holds the activation."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(x)))))
        return self.bn3(self.conv3(x), shortcut)


def _fuse_block(block: nn.Module, fused_class: type[nn.Module], last: int) -> None:
    # Attention and stochastic depth stand between the last norm and the addition, drop_block before one activation.
    for number in range(1, last):
        if number < last - 1 or type(block.drop_block) is nn.Identity:
            fuse_children(block, f"bn{number}", f"act{number}")
    layer = fused(getattr(block, f"bn{last}"), getattr(block, f"act{last}"))
    if layer is not None and block.se is None and block.drop_path is None:
        setattr(block, f"bn{last}", layer)
        setattr(block, f"act{last}", nn.Identity())
        block.__class__ = fused_class


register_fuser(resnet.ResNet, lambda model: fuse_children(model, "bn1", "act1"))
register_fuser(resnet.BasicBlock, lambda block: _fuse_block(block, FusedBasicBlock, 2))
register_fuser(resnet.Bottleneck, lambda block: _fuse_block(block, FusedBottleneck, 3))
