"""Which norms of a model ``convert_norm`` takes, which it leaves and why, and what of that a user has to hear."""

import difflib
import fnmatch
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from fbn_plugin.layers.description import describe, families, family, has_known_forward, is_replaced
from fbn_plugin.surgery.norm_report import NormLeft
from fbn_plugin.surgery.norm_summary import LAZY, OWN_FORWARD, SCRIPTED, UNKNOWN, is_scripted, norm_names
from fbn_plugin.surgery.stages import frozen_layer


def as_tuple(argument: str, names: str | Iterable[str]) -> tuple[str, ...]:
    """One name or several; ValueError for anything else."""
    several = (names,) if isinstance(names, str) else tuple(names) if isinstance(names, Iterable) else (names,)
    if wrong := [name for name in several if not isinstance(name, str)]:
        raise ValueError(f"{argument} takes a name or several, got {wrong[0]!r}")
    return several


def check_sources(sources: str | Iterable[str] | None) -> tuple[str, ...]:
    """The families to replace; ValueError for one that is not known."""
    sources, known = ("BN",) if sources is None else as_tuple("sources", sources), families()
    if not sources:
        raise ValueError(f"sources names no family of norms: accepted are {', '.join(known)}")
    for source in sources:
        if source not in known:
            raise ValueError(f"unknown family of norms {source!r}: accepted are {', '.join(known)}")
    return sources


def why_left(module: nn.Module) -> str | None:
    """Why a norm cannot become another."""
    description = describe(module)
    if description is None or not has_known_forward(type(module)):
        return OWN_FORWARD
    if is_replaced(module):
        return "its forward was replaced on this very module, and what that computes is not known"
    if isinstance(module, LazyModuleMixin):
        return LAZY
    if description.evaluation == "image":
        return "its scale depends on the image, which no other norm's does"
    if description.evaluation == "activation":
        return "each position has a scale of its own, which no other norm's has"
    return None if description.why_left is None else description.why_left(module)


@dataclass
class Choice:
    """The norms of a model that are to be converted, by name, and the others.

    ``odd`` are those of the others that look as if they should be converted and cannot be, ``frozen`` those that are
    frozen beside layers that train, ``staged`` those in frozen stages.
    """

    sources: tuple[str, ...]
    chosen: dict[nn.Module, str] = field(default_factory=dict)
    left: list[NormLeft] = field(default_factory=list)
    odd: list[NormLeft] = field(default_factory=list)
    frozen: list[NormLeft] = field(default_factory=list)
    staged: list[NormLeft] = field(default_factory=list)

    def leave(self, module: nn.Module, name: str, reason: str, *lists: list[NormLeft]) -> None:
        """Note a norm that is not converted, in ``left`` and in further lists."""
        for entries in (self.left, *lists):
            entries.append(NormLeft(name, type(module).__name__, reason))

    def remarks(self, spec: str, by_default: bool) -> list[str]:
        """What a user has to hear, a sentence each.

        Args:
            spec: what was converted to.
            by_default: no sources were given.
        """
        said = []
        if not self.chosen and not self.odd:
            what = "batch normalization" if self.sources == ("BN",) else f"norm of {', '.join(self.sources)}"
            said.append(f"nothing was converted to {spec}: the model has no {what}{self._instead()}")
        elif by_default and self.frozen:
            number, first = len(self.frozen), self.frozen[0].name
            more = "sources=('BN', 'FrozenBN') converts them too"
            what = (
                "norms beside layers that train are left, such as"
                if number > 1
                else "norm beside layers that train is left,"
            )
            said.append(f"{number} frozen {what} {first!r}: {more}")
        if self.odd:
            first = self.odd[0]
            number, where = len(self.odd), f"{first.kind} (at {first.name!r})"
            what = "norms are left as they are, such as" if number > 1 else "norm is left as it is,"
            said.append(f"{number} {what} {where}: {first.reason}")
        return said

    def _instead(self) -> str:
        """What else there is that could have been converted."""
        frozen = [entry for entry in self.left if entry.reason.startswith("FrozenBN is not")]
        if frozen:
            return f", but {len(frozen)} frozen ones: sources='FrozenBN' converts them"
        if self.staged:
            return f" beside a layer that trains, but {len(self.staged)} in frozen stages: thaw=True converts them"
        if chosen_otherwise := sum(entry.reason in _BY_NAME for entry in self.left):
            return f" among those that include and exclude leave, out of {chosen_otherwise}"
        others = Counter(entry.reason.partition(" is not among")[0] for entry in self.left)
        return "".join(f", but {number} of {kind}: sources={kind!r}" for kind, number in others.most_common(1))


_BY_NAME = ("include does not name it", "exclude names it")


def choose_norms(
    model: nn.Module, sources: tuple[str, ...], include: str | Iterable[str] | None, exclude: tuple, thaw: bool
) -> Choice:
    """Choose the norms of some families by name.

    Args:
        model: any module.
        sources: families.
        include, exclude: names of modules or patterns; ``include=None`` is all.
        thaw: take frozen norms whose layers are frozen, too.

    Raises:
        ValueError: a name or pattern that no norm has, or an ``include`` without any.
    """
    norms, choice = norm_names(model), Choice(sources)
    inside = set(norms) if include is None else _matching(norms, "include", as_tuple("include", include))
    if include is not None and not inside:
        raise ValueError(f"include names no norm, got {include!r}: None is all of them")
    outside = _matching(norms, "exclude", exclude)
    for module, (name, *others) in norms.items():
        if any(name.startswith(f"{entry.name}.") for entry in choice.odd):  # the norms inside of a norm that is left
            continue
        kind = family(module)
        layer = frozen_layer(model, [name, *others]) if kind == "FrozenBN" else None
        if module in outside or module not in inside:
            choice.leave(module, name, _BY_NAME[module in outside])
        elif describe(module) is None:
            choice.leave(module, name, SCRIPTED if is_scripted(module) else UNKNOWN, choice.odd)
        elif kind not in sources:
            beside_training = kind == "FrozenBN" and layer is None
            if kind is not None:
                reason = f"{kind} is not among the sources"
                choice.leave(module, name, reason, *([choice.frozen] if beside_training else []))
        elif layer is not None and not thaw:
            choice.leave(module, name, f"the {type(layer).__name__} beside it is frozen: thaw=True", choice.staged)
        elif (reason := why_left(module)) is not None:
            choice.leave(module, name, reason, choice.odd)
        else:
            choice.chosen[module] = name
    return choice


def _matching(norms: dict[nn.Module, list[str]], argument: str, patterns: tuple[str, ...]) -> set[nn.Module]:
    """The norms that have one of these names, or are in a module that has."""
    found: set[nn.Module] = set()
    for pattern in patterns:
        hits = {norm for norm, names in norms.items() if any(_matches(name, pattern) for name in names)}
        if not hits:
            known = sorted(name for names in norms.values() for name in names)
            near = difflib.get_close_matches(pattern, known, n=1) or known[:1]
            hint = f", which has {len(norms)}, such as {near[0]!r}" if near else ""
            raise ValueError(f"{argument}={pattern!r} names no norm of the model{hint}")
        found |= hits
    return found


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: end + 1]), pattern) for end in range(len(parts)))
