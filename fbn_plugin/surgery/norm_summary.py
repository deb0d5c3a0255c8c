"""Which norms a model has, where, with which options, and what is plain or frozen: ``fbn_plugin.summarize``."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from fbn_plugin.adapters import load_adapters
from fbn_plugin.layers.description import describe, family, has_known_forward
from fbn_plugin.registry import NORMS, NormSpec, default_num_groups, norm_options, registered_name, registered_names
from fbn_plugin.surgery.stages import frozen_layer, is_frozen

LAZY = "it does not know its channels yet: run the model once, then convert"
OWN_FORWARD = (
    "what its own forward computes is not known: give the class a `description`, or, if it is not yours, "
    "say what it is by fbn_plugin.register_converter"
)
UNKNOWN = "its class is not known: say what it is by fbn_plugin.register_converter"

SCRIPTED = "it is TorchScript, of which nothing can be changed: convert before scripting"

# PyTorch's own, which are registered under these names.
_PLAIN = {nn.SyncBatchNorm: "SyncBN", _BatchNorm: "BN", nn.GroupNorm: "GN", nn.LayerNorm: "LN", _InstanceNorm: "IN"}
_LITERALS = (bool, int, float, str, tuple, list, type(None))
_PARAMETERS = {"affine": "weight", "tlu": "tau"}  # options that are whether a norm has a parameter


def norm_kind(module: nn.Module) -> str:
    """What a norm is called: the name that it is registered by, its family's if a framework brings it, or that of its
    class, if it is of no family, or a batch norm with a forward of its own that nothing describes."""
    description, cls = describe(module), getattr(module, "norm_class", type(module))
    if description is None or description.family is None:
        return _class_name(module)
    if description.family == "FrozenBN":
        return "FrozenBN"
    if not has_known_forward(type(module)):
        return type(module).__name__ if description.family == "BN" else description.family
    if description.synchronized and registered_name(cls) is None:
        return "SyncBN"
    for base in cls.__mro__:
        if names := registered_names(base):
            return min(names, key=lambda name: _differing(module, name))  # the first of equal ones
        if base in _PLAIN:
            return _PLAIN[base]
    return description.family


def _differing(module: nn.Module, name: str) -> int:
    """How many options of a norm are not at the default that they have under a name."""
    options = norm_options(name)
    found = {key: getattr(module, key, options[key]) for key in options}
    return sum(isinstance(value, _LITERALS) and value != options[key] for key, value in found.items())


def is_scripted(module: nn.Module) -> bool:
    """Whether a module is TorchScript."""
    return isinstance(module, torch.jit.ScriptModule)


def _class_name(module: nn.Module) -> str:
    return module.original_name if is_scripted(module) else type(module).__name__


def norm_settings(module: nn.Module) -> dict:
    """The options of a norm as it is, by the names that a spec gives them; empty for a norm without registered name."""
    kind = norm_kind(module)
    found = {}
    for key in norm_options(kind) if kind in NORMS else ():
        value = getattr(module, key, NORMS)  # which no option can be
        if key == "bias":
            value = getattr(module, "bias", None) is not None or getattr(module, "weight", None) is None
        elif key in _PARAMETERS and hasattr(module, _PARAMETERS[key]):
            value = getattr(module, _PARAMETERS[key]) is not None
        if isinstance(value, _LITERALS):
            found[key] = value
    return found


def norm_spec(module: nn.Module) -> str:
    """The spec string of a norm as it is: its kind, the options that are not at their default, and always its cut."""
    kind = norm_kind(module)
    defaults = norm_options(kind) if kind in NORMS else {}
    settings, channels = norm_settings(module), num_channels(module)
    if defaults.get("num_groups", 0) is None and channels:
        defaults["num_groups"] = default_num_groups(channels)
    options = {k: v for k, v in settings.items() if k == "t_sigma" or v != defaults[k]}
    if float(options.get("t_sigma", 0.5)).is_integer():  # the layers make it a float, and 4 reads better than 4.0
        options["t_sigma"] = int(options["t_sigma"])
    return str(NormSpec(kind, options))


def has_running_stats(module: nn.Module) -> bool:
    """Whether a module looks like a batch normalization, whatever it is."""
    return all(isinstance(getattr(module, name, None), Tensor) for name in ("running_mean", "running_var"))


def num_channels(module: nn.Module) -> int | None:
    """Number of channels of a norm; None if nothing tells."""
    for name in ("num_features", "num_channels"):
        if hasattr(module, name):
            return getattr(module, name)
    if hasattr(module, "normalized_shape"):
        return module.normalized_shape[0]
    weight = getattr(module, "weight", None)
    return len(weight) if isinstance(weight, Tensor) and weight.dim() else None


def norm_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The norms of a model, and what is none that is known but has running statistics, each with all of its names."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if describe(module) is None and not has_running_stats(module):
            continue
        inner = itertools.islice(module.modules(), 1, None)
        if family(module) is None and any(family(child) is not None for child in inner):
            continue  # what holds norms, such as one for each level of a pyramid
        found.setdefault(module, []).append(name)
    return found


@dataclass(frozen=True)
class NormEntry:
    """A norm of a model.

    Attributes:
        name: its name in ``named_modules()``.
        kind: the name that it is registered by, such as ``"FBN"``, ``"BN"`` or ``"FrozenBN"``; of a norm that is not
            known, the name of its class.
        spec: the kind with its options, such as ``"FBN(t_sigma=4)"``.
        class_name: of the module.
        channels: C; None if it is not known.
        frozen: nothing in it trains: it is a FrozenBN, or its parameters want no gradient.
        shared: the other names that the same module has.
        note: what else there is to say, such as why it may be frozen.
    """

    name: str
    kind: str
    spec: str
    class_name: str
    channels: int | None
    frozen: bool
    shared: tuple[str, ...] = ()
    note: str = ""

    @property
    def label(self) -> str:
        """``spec``, and whether its weights are frozen while its statistics are not."""
        return f"{self.spec} with frozen weights" if self.frozen and self.kind != "FrozenBN" else self.spec


@dataclass(frozen=True)
class NormSummary:
    """The norms of a model, made by :func:`summarize`. ``str`` shows all of them.

    Attributes:
        entries: one for each norm, in the model's order; a module that is used in several places is one.

    Examples::

        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), fbn_plugin.FilteredBatchNorm2d(8))
        >>> fbn_plugin.summarize(model).line
        '1 FBN(t_sigma=5), 0 BN'
    """

    entries: tuple[NormEntry, ...]

    @property
    def counts(self) -> Counter[str]:
        """Number of norms of each kind."""
        return Counter(entry.kind for entry in self.entries)

    @property
    def line(self) -> str:
        """The numbers in one line, frozen ones apart: ``"42 FBN(t_sigma=5), 11 FrozenBN, 0 BN"``."""
        labels = Counter(entry.label for entry in self.entries)
        parts = [f"{number} {label}" for label, number in labels.most_common()]
        return ", ".join(parts if self.counts["BN"] else [*parts, "0 BN"])

    def __str__(self) -> str:
        lines = [f"{len(self.entries)} norm{'s' * (len(self.entries) != 1)}: {self.line}"]
        groups: dict[str, dict[str, list[str]]] = {}
        for entry in self.entries:
            state = "frozen" if entry.frozen else "trains"
            head = f"{entry.label} ({entry.class_name}), {state}{entry.note and f': {entry.note}'}"
            channels = "" if entry.channels is None else f"{entry.channels} channels: "
            others = f" (also {', '.join(entry.shared)})" if entry.shared else ""
            groups.setdefault(head, {}).setdefault(channels, []).append(entry.name + others or "the model")
        for head, places in groups.items():
            lines.append(f"{sum(map(len, places.values()))} x {head}")
            lines += [f"    {channels}{', '.join(join_names(names))}" for channels, names in places.items()]
        return "\n".join(lines)


def join_names(names: Iterable[str]) -> list[str]:
    """Names that differ in a number put into one, the numbers as ranges: ``layer1.0.bn1``, ``layer1.0.bn2`` and
    ``layer1.1.bn1`` are ``layer1.0.bn1-2`` and ``layer1.1.bn1``."""
    parts = [re.split(r"(\d+)", name) for name in names]
    for place in range(max(map(len, parts), default=0) - 2, 0, -2):
        merged: dict[tuple, list[str]] = {}
        for part in parts:
            key = (*part[:place], None, *part[place + 1 :]) if len(part) > place else (*part,)
            merged.setdefault(key, []).append(part[place] if len(part) > place else "")
        parts = [[_ranges(numbers) if text is None else text for text in key] for key, numbers in merged.items()]
    return ["".join(part) for part in parts]


def _ranges(numbers: list[str]) -> str:
    """Numbers as ranges, such as ``0-2,5``; what is a range already stays."""
    plain = sorted({int(number) for number in numbers if number.isdigit()})
    runs = [list(run) for _, run in itertools.groupby(enumerate(plain), lambda pair: pair[1] - pair[0])]
    texts = [f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs]
    return ",".join([*texts, *(number for number in numbers if not number.isdigit())])


def _note(model: nn.Module, module: nn.Module, names: list[str]) -> str:
    if isinstance(module, LazyModuleMixin):
        return LAZY
    if describe(module) is None:
        return SCRIPTED if is_scripted(module) else UNKNOWN
    if family(module) == "FrozenBN":
        layer = frozen_layer(model, names)
        return "" if layer is None else f"the {type(layer).__name__} beside it is frozen too"
    if family(module) == "BN" and not has_known_forward(type(module)):
        return OWN_FORWARD
    return "its statistics move in training" if is_frozen(module) and has_running_stats(module) else ""


def summarize(model: nn.Module) -> NormSummary:
    """Tell which norms a model has: am I really training with FBN?

    A norm is what PyTorch, this library, timm, torchvision or detectron2 say is one, what was registered, and any other
    module with a ``running_mean`` and a ``running_var``. A norm that a forward pass computes by a function
    (``F.batch_norm``, ``F.layer_norm``) is no module, and cannot be seen.

    Args:
        model: any module.

    Returns:
        A summary: print it, log its ``line``, or read its ``counts`` and ``entries``.

    Examples::

        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
        >>> model = fbn_plugin.convert_norm(model, "FBN(t_sigma=4)", include="1")
        >>> summary = fbn_plugin.summarize(model)
        >>> summary.line
        '1 FBN(t_sigma=4), 1 BN'
        >>> print(summary)
        2 norms: 1 FBN(t_sigma=4), 1 BN
        1 x FBN(t_sigma=4) (FilteredBatchNorm2d), trains
            8 channels: 1
        1 x BN (BatchNorm2d), trains
            8 channels: 3
        >>> summary.counts["BN"], summary.entries[1].name
        (1, '3')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"summarize takes a model, an nn.Module, got {type(model).__name__}")
    load_adapters()
    entries = [
        NormEntry(
            name=names[0],
            kind=norm_kind(module),
            spec=norm_spec(module),
            class_name=_class_name(module),
            channels=None if isinstance(module, LazyModuleMixin) else num_channels(module),
            frozen=family(module) == "FrozenBN" or is_frozen(module),
            shared=tuple(names[1:]),
            note=_note(model, module, names),
        )
        for module, names in norm_names(model).items()
    ]
    return NormSummary(tuple(entries))
