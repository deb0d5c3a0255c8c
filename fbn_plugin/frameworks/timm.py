"""How a norm gets into timm: spec strings, filtered classes and ``norm_factory(...)`` as ``norm_layer=``, the
norm+activation forms of the registered norms, and what converts timm's own ``BatchNormAct2d``.

timm finds a norm in ``get_norm_layer`` and ``get_norm_act_layer`` (timm/layers/create_norm.py and create_norm_act.py,
read in 1.0.31). Its models bind these by name when they are imported: :func:`register` reaches all who hold them.
"""

import copy
import difflib
import functools
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace

from timm.layers import (
    BatchNormAct2d,
    Conv2dSame,
    FrozenBatchNormAct2d,
    GroupNormAct,
    LayerNorm2d,
    LayerNorm2dFp32,
    LayerNormAct2d,
    SyncBatchNormAct,
    create_act_layer,
)
from timm.layers.grn import GlobalResponseNorm
from timm.layers.norm import LayerNormExp2d
from timm.layers.norm_act import LayerNormAct2dFp32
from timm.layers.typing import LayerType
from timm.models import resnet
from torch import Tensor, nn
from torch.jit import is_scripting
from torch.nn.modules.batchnorm import _BatchNorm

from fbn_plugin import internals, layers
from fbn_plugin.frameworks import replacement, timm_optimizers
from fbn_plugin.layers.batch_norm import OptionalBiasMixin
from fbn_plugin.layers.description import (
    FROZEN,
    NormDescription,
    describe_class,
    describe_type,
    family,
    has_known_forward,
    tells_moments,
)
from fbn_plugin.layers.filtered_batch_norm import FilteredBatchNormMixin
from fbn_plugin.layers.filtered_batch_norm_act import activation_of, normalize_and_activate
from fbn_plugin.layers.graph import Proxy, call_node, renamed
from fbn_plugin.registry import (
    NORMS,
    NormFactory,
    NormSpec,
    class_builder,
    default_num_groups,
    matching_names,
    norm_factory,
    norm_options,
    parse_spec,
    refuse_two,
    registered_classes,
    registered_name,
)
from fbn_plugin.surgery.convert import build_from, convert_norm, make_plain
from fbn_plugin.surgery.fold import register_layer
from fbn_plugin.surgery.fuse import fuse_children, fused, register_fuser
from fbn_plugin.surgery.input_norm import Builder, prepend_to_call, register_prepender
from fbn_plugin.training.gamma_initialization import apply_gamma_init

# timm's names of norms, and of norms with their activation, with the class of each.
_NORM_MAP = internals.optional("timm.layers.create_norm._NORM_MAP", {})
_NORM_ACT_MAP = internals.optional("timm.layers.create_norm_act._NORM_ACT_MAP", {})


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

    norm_class: type[nn.Module]

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
        self.set_activation(apply_act, act_layer, act_kwargs, inplace, drop_layer)

    def set_activation(
        self,
        apply_act: bool,
        act_layer: LayerType | None,
        act_kwargs: dict | None,
        inplace: bool,
        drop_layer: Callable[[], nn.Module] | None,
    ) -> None:
        """Put activation and drop layer behind the norm. A threshold that the norm has (``tau``) is its activation."""
        if getattr(self, "tau", None) is not None:
            self.tau = self.tau if apply_act else None
            apply_act = False
        act = create_act_layer(act_layer, **{"inplace": inplace, **(act_kwargs or {})}) if apply_act else None
        self.drop = nn.Identity() if drop_layer is None else drop_layer()
        self.act = nn.Identity() if act is None else act

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            return self.act(self.drop(self._forward_norm(input)))
        elif isinstance(input, Proxy):
            return call_node(self, input)
        if self.norm_class.forward is FilteredBatchNormMixin.forward and type(self.drop) is nn.Identity:
            known = activation_of(self.act)
            if known is not None:  # one operator does both
                name, negative_slope = known
                return normalize_and_activate(self, input, name, negative_slope)
        return self.act(self.drop(self._forward_norm(input)))

    def __reduce_ex__(self, protocol: int) -> tuple:  # by the norm's class, as this one may have no place in a module
        _, _, *state = super().__reduce_ex__(protocol)
        return _blank, (self.norm_class,), *state


@functools.cache
def act_class(norm_class: type[nn.Module]) -> type[nn.Module]:
    """The class of a norm with its activation: a subclass of ``norm_class`` with the same ``state_dict`` keys.

    The batch norms of this library are ``BatchNormAct2d`` besides, which timm looks for to freeze and to synchronize.
    """
    ours = issubclass(norm_class, OptionalBiasMixin) and issubclass(norm_class, nn.BatchNorm2d)
    bases = (_NormAct, norm_class, BatchNormAct2d) if ours else (_NormAct, norm_class)
    space = {
        "norm_class": norm_class,
        "_forward_norm": renamed(norm_class.forward, "_forward_norm"),
        "__doc__": f":class:`{norm_class.__name__}` and activation.",
        "__module__": __name__,
    }
    if has_known_forward(norm_class):
        space["description"] = replace(describe_type(norm_class), convert=_convert, rest=_drop_and_act)
    elif hasattr(norm_class, "batch_statistics") and tells_moments(norm_class):
        space["batch_statistics"] = norm_class.batch_statistics
    name = re.sub(r"(?=\dd$)|$", "Act", norm_class.__name__, count=1)
    return type(name, bases, space)


def _blank(norm_class: type[nn.Module]) -> nn.Module:
    return act_class(norm_class).__new__(act_class(norm_class))


def _build_act(
    build: Callable[..., nn.Module],
    *args,
    apply_act: bool = True,
    act_layer: LayerType | None = nn.ReLU,
    act_kwargs: dict | None = None,
    inplace: bool = True,
    drop_layer: Callable[[], nn.Module] | None = None,
    **options,
) -> nn.Module:
    """What ``build`` builds, and an activation behind it in the same module."""
    norm = build(*args, **options)
    if isinstance(norm, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise ValueError(f"a {type(norm).__name__} cannot hold the activation behind it, as timm wants it of a norm")
    norm.__class__ = act_class(type(norm))
    norm.set_activation(apply_act, act_layer, act_kwargs, inplace, drop_layer)
    return norm


def _drop_and_act(norm: nn.Module) -> nn.Module:
    drop, act = (getattr(norm, name, nn.Identity()) for name in ("drop", "act"))
    return act if type(drop) is nn.Identity else nn.Sequential(drop, act)


def _convert(old: nn.Module, factory: NormFactory) -> nn.Module:
    act = getattr(old, "act", nn.Identity())  # SyncBatchNormAct may have neither act nor drop
    form = functools.partial(_form(factory.spec), apply_act=not isinstance(act, nn.Identity))
    form.spec = factory.spec
    new = build_from(old, form)
    new.drop = getattr(old, "drop", new.drop)
    if getattr(new, "tau", None) is None:  # else the threshold is the activation
        new.act = act
    return new


# Layer norms whose channels are the second dimension, as in ConvNeXt.
describe_class(NormDescription("LN", dims=2), LayerNorm2d, LayerNorm2dFp32, LayerNormExp2d)
for _cls in (
    *(BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d),
    *(GroupNormAct, LayerNormAct2d, LayerNormAct2dFp32),
):
    describe_class(replace(describe_type(_cls) or FROZEN, convert=_convert, rest=_drop_and_act, why_left=None), _cls)

FilteredBatchNormAct2d = act_class(layers.FilteredBatchNorm2d)


def _sync_batch_norm_act(num_features: int, **kwargs) -> SyncBatchNormAct:
    """timm's synchronized form, which timm makes by conversion only."""
    return _THEIRS["convert_sync_batchnorm"](BatchNormAct2d(num_features, **kwargs))


def _group_norm_act(num_channels: int, num_groups: int | None = None, **kwargs) -> GroupNormAct:
    """timm's form, which by itself has 32 groups whether they divide the channels or not."""
    return GroupNormAct(num_channels, num_groups or default_num_groups(num_channels), **kwargs)


# timm's own norm+activation form of a registered norm, where there is one, with the defaults of the registry.
_TIMM_FORMS: dict[str, Callable[..., nn.Module]] = {
    "BN": BatchNormAct2d,
    "SyncBN": _sync_batch_norm_act,
    "FrozenBN": FrozenBatchNormAct2d,
    "GN": _group_norm_act,
    "LN": functools.partial(LayerNormAct2d, eps=1e-6),
}


def _form(spec: NormSpec) -> functools.partial:
    """The norm+activation form of the norm that ``spec`` names, with its options bound."""
    if spec.name in _TIMM_FORMS:
        return functools.partial(_TIMM_FORMS[spec.name], **spec.options)
    return functools.partial(_build_act, norm_factory(spec))


def find_spec(text: str, timm_names: Iterable[str]) -> NormSpec:
    """The spec that a string given as ``norm_layer`` means, if it is none of timm's: a registered name in any case,
    with or without its punctuation, and options as in any spec. A minus at the end may be spelled out: ``rbn_minus``
    is ``RBN-``."""

    def fold(name: str) -> str:
        return re.sub("[^a-z0-9]", "", re.sub("-$", "minus", name.strip().lower()))

    name, bracket, options = text.partition("(")
    ours = [key for key, _ in NORMS]
    found = matching_names(name.strip()) or [key for key in ours if fold(key) == fold(name)]
    refuse_two(text, found)
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
        return norm_factory(find_spec(norm_layer, _NORM_MAP))


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
            form = _form(find_spec(target, _NORM_ACT_MAP))
    elif (name := getattr(target, "__name__", None)) in NORMS and NORMS.get(name) is target:
        options.pop("dims", None)
        form = _form(NormSpec(name))
    elif target is _build_act or (isinstance(target, type) and issubclass(target, _NormAct)):
        form = functools.partial(target, *getattr(norm_layer, "args", ()))
    elif target in registered_classes():
        form = functools.partial(_build_act, class_builder(target.__name__, target))  # with the defaults of the class
    else:
        return _THEIRS["get_norm_act_layer"](norm_layer, act_layer)
    return functools.partial(form, **{"act_layer": act_layer, **options})


def adapt_model_from_string(parent_module: nn.Module, *args, **kwargs) -> nn.Module:
    """timm's function for its pruned models, which builds every norm anew as batch normalization: make them again what
    they were."""
    model = _THEIRS["adapt_model_from_string"](parent_module, *args, **kwargs)
    for name, old in parent_module.named_modules():
        kind = registered_name(getattr(old, "norm_class", type(old)))
        if kind is not None and isinstance(old, nn.BatchNorm2d):
            options = {key: getattr(old, key) for key in norm_options(kind) if key != "bias" and hasattr(old, key)}
            model.set_submodule(name, convert_norm(model.get_submodule(name), NormSpec(kind, options)))
            apply_gamma_init(model.get_submodule(name))
    return model


def _make_all_plain(model: nn.Module, instead: str = "") -> None:
    """timm's conversions read weight and bias of a batch norm: let these say all that it does in evaluation."""
    for module in model.modules():
        known = not isinstance(module, nn.BatchNorm2d) or isinstance(module, BatchNormAct2d)
        if isinstance(module, _NormAct) and not known:
            raise ValueError(
                f"{module.norm_class.__name__} is no batch norm that timm knows: it would lose its activation{instead}"
            )
        make_plain(module)


def freeze_batch_norm_2d(module: nn.Module) -> nn.Module:
    """timm's function, for norms whose scale is more than their weight, too."""
    instead = '; fbn_plugin.convert_norm(model, "FrozenBN") keeps it, where the class has a `description`'
    _make_all_plain(module, instead)
    return _THEIRS["freeze_batch_norm_2d"](module)


def reparameterize_model(model: nn.Module, inplace: bool = False) -> nn.Module:
    """timm's function, for norms whose scale is more than their weight, too."""
    if not inplace:
        model = copy.deepcopy(model)
    _make_all_plain(model)
    return _THEIRS["reparameterize_model"](model, inplace=True)


def _warn_of_lost_filter(conversion: Callable) -> Callable:
    @functools.wraps(conversion)
    def converted(module: nn.Module, *args, **kwargs) -> nn.Module:
        filtered = sum(isinstance(m, FilteredBatchNormMixin) for m in module.modules())
        if filtered:
            message = f"timm's {conversion.__name__} makes batch norms without the filter of {filtered} filtered ones"
            if conversion.__name__ == "convert_sync_batchnorm":
                message += ": fbn_plugin.convert_sync, or norm_layer='syncfbn' without this, keeps it"
            warnings.warn(message, stacklevel=replacement.CALLER)
        _make_all_plain(module)
        return conversion(module, *args, **kwargs)

    return converted


def unfreeze_batch_norm_2d(module: nn.Module) -> nn.Module:
    """timm's function, which says that what it makes is plain: a frozen norm does not know what it was."""
    frozen = sum(family(each) == "FrozenBN" for each in module.modules())
    module = _THEIRS["unfreeze_batch_norm_2d"](module)
    if made := frozen - sum(family(each) == "FrozenBN" for each in module.modules()):
        instead = "fbn_plugin.convert_norm(model, 'FBN') makes filtered ones of them"
        message = f"timm's unfreeze_batch_norm_2d makes {made} frozen norms batch norms without a filter: {instead}"
        warnings.warn(message, stacklevel=replacement.CALLER)
    return module


def _is_plain_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and registered_name(getattr(module, "norm_class", type(module))) is None


def _asked_for(norm_layer: LayerType | None) -> str | None:
    """The spec or name of a norm of this package, or a registered one, that is no plain batch normalization."""
    if isinstance(norm_layer, NormFactory):
        spec = norm_layer.spec
    elif isinstance(norm_layer, str) and norm_layer not in _NORM_MAP and norm_layer not in _NORM_ACT_MAP:
        try:
            spec = find_spec(norm_layer, ())
        except ValueError:  # whoever reads the string says so, or has a meaning for it
            return None
    else:
        return norm_layer.__name__ if norm_layer in registered_classes() else None
    return None if spec.name in ("BN", "SyncBN") else str(spec)


def create_model(model_name: str, *args, **kwargs) -> nn.Module:
    """timm's function, which says where a model leaves batch norms plain whatever ``norm_layer`` is, or does not take
    it.

    Raises:
        TypeError: the model does not take this ``norm_layer``, or is a transformer, whose tokens it is not for.
    """
    spec = _asked_for(kwargs.get("norm_layer"))
    instead = f"build it without norm_layer, then fbn_plugin.convert_norm(model, {spec!r})"
    try:
        model = _THEIRS["create_model"](model_name, *args, **kwargs)
    except TypeError as error:
        if spec is None:
            raise
        raise TypeError(f"{model_name} cannot be built with norm_layer={spec!r}: {instead} ({error})") from error
    if spec is not None and hasattr(model, "num_prefix_tokens"):
        raise TypeError(
            f"{model_name} normalizes tokens of shape (N, positions, C), which norm_layer={spec!r} is not for: it "
            "normalizes images, (N, C, H, W); leave norm_layer out"
        )
    if spec is not None and (plain := sum(map(_is_plain_batch_norm, model.modules()))):
        what = "a batch norm" if plain == 1 else f"{plain} batch norms"
        message = f"{model_name} has {what} that norm_layer does not reach, and left plain: {instead} reaches all"
        warnings.warn(message, stacklevel=3)
    return model


# Where timm defines what ours take the place of; and whether the function calls itself for each child of a model.
_REPLACED = {
    "timm.layers.create_norm.get_norm_layer": False,
    "timm.layers.create_norm_act.get_norm_act_layer": False,
    "timm.layers.norm_act.convert_sync_batchnorm": True,
    "timm.layers.norm_act.freeze_batch_norm_2d": True,
    "timm.layers.norm_act.unfreeze_batch_norm_2d": True,
    "timm.layers.split_batchnorm.convert_splitbn_model": True,
    "timm.models.adapt_model_from_string": False,
    "timm.models.create_model": False,
    "timm.utils.model.reparameterize_model": False,
    **dict.fromkeys(timm_optimizers.REPLACED, False),
}
_THEIRS = {name.rpartition(".")[2]: replacement.original(name) for name in _REPLACED}
_OURS = {
    "get_norm_layer": get_norm_layer,
    "get_norm_act_layer": get_norm_act_layer,
    "convert_sync_batchnorm": _warn_of_lost_filter(_THEIRS["convert_sync_batchnorm"]),
    "convert_splitbn_model": _warn_of_lost_filter(_THEIRS["convert_splitbn_model"]),
    "freeze_batch_norm_2d": freeze_batch_norm_2d,
    "unfreeze_batch_norm_2d": unfreeze_batch_norm_2d,
    "reparameterize_model": reparameterize_model,
    "adapt_model_from_string": adapt_model_from_string,
    "create_model": create_model,
    **{name.rpartition(".")[2]: groups for name, groups in timm_optimizers.REPLACED.items()},
}


def register() -> None:
    """Make timm understand registered norms as ``norm_layer``, in models that are loaded already and in later ones."""
    for name, calls_itself in _REPLACED.items():
        replacement.replace(name, _OURS[name.rpartition(".")[2]], calls_itself)


def unregister() -> None:
    """Give timm its own functions back; models that are built stay as they are."""
    for name in _REPLACED:
        replacement.restore(name)


register_layer(Conv2dSame)


param_groups = timm_optimizers.param_groups


class FusedBasicBlock(resnet.BasicBlock):
    """``BasicBlock`` whose last norm adds the shortcut and holds the activation."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(x)
        x = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))
        return self.bn2(self.conv2(x), shortcut)


class FusedBottleneck(resnet.Bottleneck):
    """``Bottleneck`` whose last norm adds the shortcut and holds the activation."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(x)
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


_TIMM_NORMS = {*_NORM_MAP.values(), *_NORM_ACT_MAP.values(), GlobalResponseNorm}
_UNKNOWN = [c for c in _TIMM_NORMS if isinstance(c, type) and describe_type(c) is None]
for _cls in _UNKNOWN:  # torchvision's frozen norm is one of timm's, too
    describe_class(FROZEN if _cls.__name__ == "FrozenBatchNorm2d" else NormDescription(), _cls)


def _prepend_input_norm(model: nn.Module, build: Builder) -> None:
    prepend_to_call(model, build)
    channels = model.input_norm.num_features
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.0,) * channels, "std": (1.0,) * channels}
    model.default_cfg = model.pretrained_cfg


# timm's models have no class in common; what they share is the description that loaders are built from.
register_prepender(lambda model: isinstance(getattr(model, "pretrained_cfg", None), dict), _prepend_input_norm)
