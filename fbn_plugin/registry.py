"""The one place where a norm has a name: ``NORMS``, and the spec strings that configs are written in.

A spec is a registered name, optionally with options: ``"FBN"``, ``"FBN(t_sigma=4.0)"``, ``"FGN(num_groups=16,
t_sigma=3)"``. The name may be in any case; what is stored and printed has the registered one. Values are Python
literals (``inf`` is allowed for floats); nothing is evaluated. The string alone says which layer is built, so a saved
config rebuilds its model.
"""

import ast
import difflib
import functools
import inspect
import math
import numbers
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fvcore.common.registry import Registry
from torch import nn

from fbn_plugin import layers
from fbn_plugin.layers.batch_norm import check_gamma_init
from fbn_plugin.layers.description import NormDescription, describe_class, describe_type, spatial_dims
from fbn_plugin.layers.random_start import separate_stream
from fbn_plugin.ops.checks import check_filter, check_groups

_BOUNDS = {"eps": (0, 1), "momentum": (0, 1), "num_groups": (1, math.inf)}
_LARGEST = 1e30  # what a float32 holds, with room for sums
_LONGEST_SPEC = 1000
_NOT_OPTIONS = ("num_channels", "dims", "device", "dtype", "process_group")


class NormRegistry(Registry):
    """Registered norms: name -> builder.

    A builder is called as ``builder(num_channels, dims=2, device=None, dtype=None, **options)`` and returns a module;
    ``dims`` is the number of spatial dimensions. The options that a spec may set are read from its signature. Add one
    of your own with ``@NORMS.register()``, a function or a class::

        @NORMS.register()
        def MyNorm(num_channels, eps=1e-5, *, dims=2, device=None, dtype=None):
            return ...

        @NORMS.register()
        class MyNorm2d(nn.BatchNorm2d):
            ...

    A class is called with the number of channels, ``device``, ``dtype`` and the options. It is for any number of
    dimensions, unless it derives from a class such as ``nn.BatchNorm2d`` or says so itself. What it is,
    :class:`fbn_plugin.NormDescription` says, as its attribute ``description``. A class without one is what the norm is
    that it derives from, as long as it has no forward of its own: of what that computes nothing is known, so that the
    norm is built and trained, but neither converted nor folded, and its population statistics are not measured. If it
    derives from no norm, it is a family of its own, under the name that it is registered by, whose evaluation is known
    if it has a method ``eval_affine()``.

    Examples::

        >>> @fbn_plugin.NORMS.register()
        ... class HalfBN(nn.BatchNorm2d):
        ...     description = fbn_plugin.NormDescription(
        ...         "BN", "channel", dims=2, affine_terms=lambda norm: (0.5 * norm.weight, 0.5 * norm.bias)
        ...     )
        ...     def forward(self, input):
        ...         return 0.5 * super().forward(input)
        >>> fbn_plugin.get_norm("HalfBN(eps=1e-3)", 8)
        HalfBN(8, eps=0.001, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._origins: dict[str, str] = {}  # name -> where what is registered under it is defined
        self.listeners: list[Callable[[str], object]] = []  # are told the name of each norm that is registered

    def register(self, obj: Callable[..., nn.Module] | None = None) -> Callable[..., nn.Module]:
        """Register a builder or a class under its name; without an argument, a decorator that does.

        What is defined anew under the same name in the same place, as by a notebook's cell that runs again, takes the
        place of what was registered before.

        Raises:
            ValueError: the name is taken, or the arguments are not those that a norm is called with.
        """
        if obj is None:
            return self.register
        name, origin = obj.__name__, f"{obj.__module__}.{obj.__qualname__}"
        _check_arguments(obj)
        if name in self and self._origins.get(name) != origin:
            raise ValueError(f"{origin} cannot be registered: the name {name!r} is taken by another norm")
        if isinstance(obj, type):
            _introduce(obj, name)
        self._obj_map.pop(name, None)
        self._origins[name] = origin
        super().register(class_builder(name, obj) if isinstance(obj, type) else obj)
        for tell in self.listeners:
            tell(name)
        return obj


def _check_arguments(norm: Callable[..., nn.Module]) -> None:
    """Refuse a class or function that cannot be called as a norm is."""
    parameters = list(inspect.signature(norm).parameters.values())
    first, *others = parameters or [None]
    positional = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    if first is None or first.kind not in positional:
        raise ValueError(f"norm {norm.__name__} must take the number of channels first")
    takes_all = not isinstance(norm, type) and any(p.kind is p.VAR_KEYWORD for p in others)
    needed = ("device", "dtype") if isinstance(norm, type) else ("dims", "device", "dtype")
    for name in () if takes_all else needed:
        if name not in [p.name for p in others]:
            hint = ": **kwargs does not say what it takes" if any(p.kind is p.VAR_KEYWORD for p in others) else ""
            what = f"take {name!r} by name, as it is called with {', '.join(needed)}{hint}"
            raise ValueError(f"norm {norm.__name__} must {what}")
    given = ("num_channels", "num_features", *needed)
    options = [p for p in others if p.name not in given and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for option in options:
        if option.default is option.empty:
            raise ValueError(f"norm {norm.__name__}: its option {option.name!r} must have a default value")


_NAMES: dict[type[nn.Module], list[str]] = {}  # what a class was registered as, in that order


def _introduce(cls: type[nn.Module], name: str) -> None:
    """Remember that a registered norm is of this class. PyTorch's own classes are known, and its containers no norm."""
    if cls.__module__.startswith("torch."):
        return
    if name not in _NAMES.setdefault(cls, []):
        _NAMES[cls].append(name)
    if describe_type(cls) is None:
        evaluation = "channel" if hasattr(cls, "eval_affine") else "sample"
        describe_class(NormDescription(name, evaluation), cls)


def registered_name(cls: type[nn.Module]) -> str | None:
    """The name that builds modules of a class, as far as one did; None for PyTorch's own classes and for others."""
    return next(iter(registered_names(cls)), None)


def registered_names(cls: type[nn.Module]) -> list[str]:
    """All names that build modules of a class, with other defaults each; see :func:`registered_name`."""
    return _NAMES.get(cls, [])


def registered_classes() -> list[type[nn.Module]]:
    """The classes of the registered norms, but for PyTorch's own; those that a function returns once it has done so."""
    return list(_NAMES)


def class_builder(name: str, *classes: type[nn.Module] | None, **defaults) -> Callable[..., nn.Module]:
    """A builder of module classes: one for 1, 2 and 3 spatial dimensions each, None where there is none, or a single
    one for any number.

    It takes the arguments of the class in the order of the class, only that the number of channels comes first, and
    ``dims`` by name. ``defaults`` take the place of those of the class; a default ``num_groups`` of None is
    :func:`default_num_groups`.
    """
    known = [cls for cls in classes if cls is not None]
    parameters = {key: p for key, p in inspect.signature(known[0]).parameters.items() if p.kind is not p.VAR_KEYWORD}
    channels = next((key for key in parameters if key in ("num_channels", "num_features")), next(iter(parameters)))
    first = parameters.pop(channels).replace(name="num_channels", default=inspect.Parameter.empty)
    others = [p.replace(default=defaults.get(key, p.default)) for key, p in parameters.items()]
    dims_parameter = inspect.Parameter("dims", inspect.Parameter.KEYWORD_ONLY, default=2)

    def build(*args, dims=2, **kwargs):
        given = build.__signature__.bind(*args, **kwargs).arguments  # as Python would, with its errors
        cls = classes[dims - 1] if len(classes) == 3 else classes[0]
        if cls is None:
            raise ValueError(f"{name} has no form for {dims} spatial dimensions, only {known[0].__name__}")
        num_channels, options = given.pop("num_channels"), {**defaults, **given}
        if not isinstance(num_channels, numbers.Integral) or num_channels < 0:
            raise ValueError(f"{name} wants a number of channels, got {num_channels!r}")
        if "num_groups" in options:
            if options["num_groups"] is None:
                options["num_groups"] = default_num_groups(num_channels)
            check_groups(options["num_groups"], num_channels)  # PyTorch 2.6 does not say which
        return cls(**{channels: num_channels}, **options)

    build.__signature__ = inspect.Signature([first, *others, dims_parameter])
    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"Builder of {', '.join(cls.__name__ for cls in known)}."
    return build


def default_num_groups(num_channels: int) -> int:
    """The groups of a group normalization that is not told how many: the largest number up to 32 that divides the
    channels. Networks such as EfficientNet and RegNet have layers of 16 or 24 channels."""
    return next(groups for groups in range(32, 0, -1) if num_channels % groups == 0)


NORMS = NormRegistry("NORM")


def _register(name: str, *classes: type[nn.Module] | None, **defaults) -> None:
    for cls in filter(None, classes):
        _introduce(cls, name)
    NORMS.register(class_builder(name, *classes, **defaults))


_register("BN", nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_register("SyncBN", nn.SyncBatchNorm)
_register("FrozenBN", layers.FrozenBatchNorm1d, layers.FrozenBatchNorm2d, layers.FrozenBatchNorm3d)
_register("GN", nn.GroupNorm, num_groups=None)
_register("LN", layers.LayerNorm2d)
_register("IN", layers.InstanceNorm1d, layers.InstanceNorm2d, layers.InstanceNorm3d, affine=True)
_register("FBN", layers.FilteredBatchNorm1d, layers.FilteredBatchNorm2d, layers.FilteredBatchNorm3d)
_register("SyncFBN", layers.SyncFilteredBatchNorm)
_register("FGN", layers.FilteredGroupNorm, num_groups=None)
_register("FLN", layers.FilteredLayerNorm2d)
_register("FIN", layers.FilteredInstanceNorm2d)
# Where a network has a norm, its own activation or an addition follows: the threshold is for those who ask for it.
_register("FRN", layers.FilterResponseNorm2d, tlu=False)
_register("FFRN", layers.FilteredFilterResponseNorm2d, tlu=False)
_register("PerActivationBN", layers.PerActivationBatchNorm2d)
_register("ConvNorm", None, layers.ConvNorm2d, None)
_register("LearnedNorm", layers.LearnedStatsNorm2d)
_register("ScaledBN", layers.ScaledBatchNorm1d, layers.ScaledBatchNorm2d, layers.ScaledBatchNorm3d)
_register("ScaledBN-A1", layers.ScaledBatchNormA1)
_register("ScaledBN-A2", layers.ScaledBatchNormA2)
_register("RBN", layers.RepresentativeBatchNorm2d)
_register("RBN-", layers.GatedBatchNorm2d, gate_init=1.0)
_register("IEBN", layers.InstanceEnhancementBatchNorm2d)
_register("IEBN-", layers.GatedBatchNorm2d, gate_init=-1.0)


@dataclass(frozen=True)
class NormSpec:
    """A norm's registered name and the options that a spec gives it. ``str`` writes the canonical spec string."""

    name: str
    options: dict = field(default_factory=dict)

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        return f"{self.name}({options})" if options else self.name


def norm_options(name: str) -> dict:
    """Names and default values of the options that a registered norm takes in a spec."""
    parameters = inspect.signature(NORMS.get(name)).parameters.values()
    variable = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return {p.name: p.default for p in parameters if p.name not in _NOT_OPTIONS and p.kind not in variable}


def matching_names(name: str, others: Iterable[str] = ()) -> list[str]:
    """The registered names that a name stands for: itself, else those that are it but for upper and lower case.

    Args:
        name: as someone wrote it.
        others: names that a framework has besides, with the same right.
    """
    names = dict.fromkeys([*others, *(key for key, _ in NORMS)])
    return [name] if name in names else [key for key in names if key.lower() == name.lower()]


def refuse_two(name: str, found: Sequence[str]) -> None:
    """Refuse a name that is more than one of :func:`matching_names`."""
    if len(found) > 1:
        names = " or ".join(map(repr, found))
        raise ValueError(f"norm {name!r} must be written {names}, which differ in upper and lower case alone")


def _unknown(what: str, word: str, known: list[str]) -> ValueError:
    by_lower = {name.lower(): name for name in known}
    # Letters that have changed places are the likeliest slip.
    turned = [name for name in by_lower if sorted(name) == sorted(word.lower())]
    nearest = turned or difflib.get_close_matches(word.lower(), by_lower, n=1)
    hint = f" (did you mean {by_lower[nearest[0]]!r}?)" if nearest else ""
    return ValueError(f"{what} {word!r}{hint}: accepted are {', '.join(known) or 'none'}")


# Options that are PyTorch's: what somebody writes without a name is rather one that the norm has of its own.
_COMMON = ("eps", "momentum", "affine", "track_running_stats", "bias")


def _meant(name: str, values: list, options: dict) -> str:
    """What to say where values have no name: they are rather meant for the norm's own options, in their order."""
    own = [key for key in norm_options(name) if key not in (*_COMMON, *options)]
    meant = str(NormSpec(name, {**dict(zip(own, values)), **options}))
    try:
        parse_spec(meant)
    except ValueError:
        own = []
    if len(values) > len(own):
        return f"accepted are {', '.join(f'{key}=...' for key in norm_options(name)) or 'none'}"
    return f"did you mean {meant!r}?"


def _arguments(text: str) -> tuple[list, list[tuple[str, Any]]]:
    """What stands between the brackets of a spec, without and with a name."""
    call = ast.parse(f"f({text})", mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ValueError
    values = [_literal(node) for node in call.args]
    if any(keyword.arg is None for keyword in call.keywords):
        raise ValueError
    return values, [(keyword.arg, _literal(keyword.value)) for keyword in call.keywords]


def _literal(node: ast.expr):
    if isinstance(node, ast.Name) and node.id == "inf":
        return math.inf
    return ast.literal_eval(node)


def _check_value(name: str, key: str, value, default) -> None:
    if key == "t_sigma":
        check_filter(value)
    elif key == "grad_mode":
        check_filter(math.inf, value)
    elif key == "gamma_init":
        check_gamma_init(value)
    elif key == "num_groups" and default is None:
        _check_value(name, key, value, 32)
    elif isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"option {key!r} of {name} takes True or False, got {value!r}")
    elif isinstance(default, (int, float)):
        allowed = (
            (int, float, type(None))
            if key == "momentum"
            else type(default)
            if isinstance(default, int)
            else (int, float)
        )
        if isinstance(value, bool) or not isinstance(value, allowed):
            raise ValueError(f"option {key!r} of {name} takes a number such as {default!r}, got {value!r}")
        infinite = key not in _BOUNDS and value in (-math.inf, math.inf)
        low, high = _BOUNDS.get(key, (-_LARGEST, _LARGEST))
        if value is not None and not infinite and not low <= value <= high:
            allowed = f"be at least {low}" if high == math.inf else f"lie between {low} and {high}"
            raise ValueError(f"option {key!r} of {name} must {allowed}, got {value!r}")


def parse_spec(spec: str | NormSpec) -> NormSpec:
    """Read a spec string and check it against the registry.

    Raises:
        ValueError: not of the form ``NAME`` or ``NAME(option=value, ...)``, an unknown name or option, or a value out
        of range.

    Examples::

        >>> spec = fbn_plugin.parse_spec("FGN(num_groups=16, t_sigma=3)")
        >>> spec.name, spec.options
        ('FGN', {'num_groups': 16, 't_sigma': 3})
    """
    if isinstance(spec, NormSpec):
        return spec
    if isinstance(spec, str) and len(spec) > _LONGEST_SPEC:
        raise ValueError(f"a spec has at most {_LONGEST_SPEC:,} characters, got {len(spec):,}: {spec[:80]!r}...")
    match = re.fullmatch(r"\s*([A-Za-z][\w-]*)\s*(?:\((.*)\))?\s*", spec, re.DOTALL) if isinstance(spec, str) else None
    if match is None:
        raise ValueError(f"a norm is written NAME or NAME(option=value, ...), such as 'FBN(t_sigma=4.0)', got {spec!r}")
    found = matching_names(match[1])
    refuse_two(match[1], found)
    if not found:
        raise _unknown("unknown norm", match[1], [key for key, _ in NORMS])
    name, defaults = found[0], norm_options(found[0])
    try:
        values, named = _arguments(match[2] or "")
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        written = "option=value, each value such as 4, True or 'text'"
        raise ValueError(f"a norm's options are written {written}, got {spec!r}") from error
    options = dict(named)
    if len(options) < len(named):
        twice = next(key for key in options if [other for other, _ in named].count(key) > 1)
        raise ValueError(f"option {twice!r} is given twice in {spec!r}")
    if values:
        raise ValueError(f"options are written by name, got {spec!r}: {_meant(name, values, options)}")
    for key, value in options.items():
        if key not in defaults:
            raise _unknown(f"unknown option of {name}", key, list(defaults))
        _check_value(name, key, value, defaults[key])
    return NormSpec(name, options)


def with_registered_name(spec: Any) -> Any:
    """A spec string as it is stored: as it is written, but for the case of its name. What is no spec is left alone."""
    try:
        name = parse_spec(spec).name
    except ValueError:
        return spec
    return spec.replace(spec.partition("(")[0].strip(), name, 1)


class NormFactory(functools.partial):
    """Builds one kind of norm: ``factory(num_channels, device=None, dtype=None)``, made by :func:`norm_factory`.

    What follows the number of channels may be what the norm's class takes there: ``norm_factory("FBN")(64, 1e-3)`` has
    an ``eps`` of 1e-3. It is a ``functools.partial`` of the registered builder, so frameworks that accept a partial as
    ``norm_layer`` accept it; it can be pickled and copied, and further keyword arguments override the spec's.
    """

    spec: NormSpec

    def __call__(self, *args, **kwargs) -> nn.Module:
        if "num_features" in kwargs:  # some models name the argument as nn.BatchNorm2d does
            kwargs["num_channels"] = kwargs.pop("num_features")
        with separate_stream():  # so that the layers that are built next start alike, whatever the norm
            norm = super().__call__(*args, **kwargs)
        _introduce(type(norm), self.spec.name)
        found, wanted = spatial_dims(type(norm)), kwargs.get("dims", self.keywords["dims"])
        if found not in (None, wanted):
            raise ValueError(f"{self.spec.name} is for {found} spatial dimensions, not for {wanted}")
        return norm

    def __reduce__(self):
        return norm_factory, (str(self.spec), self.keywords["dims"])

    def __repr__(self) -> str:
        dims = self.keywords["dims"]
        return f"norm_factory({str(self.spec)!r}{'' if dims == 2 else f', dims={dims}'})"


def norm_factory(spec: str | NormSpec, dims: int = 2) -> NormFactory:
    """A callable that builds the norm that ``spec`` names, to pass as ``norm_layer=``.

    Args:
        spec: such as ``"FBN(t_sigma=4.0)"``.
        dims: number of spatial dimensions of the inputs: 1, 2 or 3.

    Raises:
        ValueError: see :func:`parse_spec`.

    Examples::

        >>> make_norm = fbn_plugin.norm_factory("FBN(t_sigma=4)")
        >>> make_norm(64).t_sigma
        4.0
        >>> make_norm(64, eps=1e-3).eps
        0.001
    """
    spec = parse_spec(spec)
    if dims not in (1, 2, 3):
        raise ValueError(f"dims must be 1, 2 or 3, got {dims!r}")
    factory = NormFactory(NORMS.get(spec.name), dims=dims, **spec.options)
    factory.spec = spec
    return factory


def get_norm(
    spec: str | NormSpec | Callable | None, num_channels: int, dims: int = 2, device=None, dtype=None
) -> nn.Module | None:
    """Build the norm that ``spec`` names for ``num_channels`` channels.

    Args:
        spec: a spec string, a callable ``(num_channels) -> nn.Module``, or ``""`` or None for no norm.
        num_channels: C.
        dims: number of spatial dimensions of the inputs: 1, 2 or 3.

    Returns:
        A module, or None for no norm.

    Raises:
        ValueError: see :func:`parse_spec`; or the norm does not fit the number of channels or of dimensions.

    Examples::

        >>> fbn_plugin.get_norm("FGN(num_groups=16)", 64)
        FilteredGroupNorm(16, 64, eps=1e-05, affine=True, bias=True, t_sigma=5)
        >>> fbn_plugin.get_norm("", 64) is None
        True
    """
    if spec is None or spec == "":
        return None
    if callable(spec):
        return spec(num_channels)
    return norm_factory(spec, dims)(num_channels, device=device, dtype=dtype)
