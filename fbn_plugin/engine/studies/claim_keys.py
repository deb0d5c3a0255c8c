"""PRINTED and CLAIMS of a study file: the figures of a paper's table, and what the paper says of them. They are of the
paper and not of a scale, so they may name variants and metrics that only some scales have.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fbn_plugin.engine.files.words import hint, shown
from fbn_plugin.engine.studies.claims import ABOUT_NUMBERS, ABOUT_PAIRS, KINDS
from fbn_plugin.engine.studies.comparing import Comparing
from fbn_plugin.engine.studies.outcomes import Claim, Comparison, Printed, Variant
from fbn_plugin.engine.studies.study_keys import check_kinds, group, number

__all__ = ["Names", "comparisons_of", "read_claims", "read_printed"]

_CLAIM_KEYS = {
    "is": str,
    "metric": str,
    "factor": str,
    "variant": object,
    "baseline": str,
    "margin": float,
    "value": float,
    "than": str,
    "where": str,
    "text": str,
}
_EXAMPLE = "{variant: FBN, baseline: BN, metric: top1, is: higher}"


@dataclass(frozen=True)
class Names:
    """What a file names, at one scale or at any of them.

    Attributes:
        variants: names; at one scale with what they are.
        factors: factor -> levels.
        metrics: names, in order.
    """

    variants: Mapping[str, Variant | None]
    factors: Mapping[str, Sequence[str]]
    metrics: Sequence[str]

    @classmethod
    def joined(cls, parts: Sequence["Names"]) -> "Names":
        """All names of several scales."""
        factors: dict[str, dict[str, None]] = {}
        for part in parts:
            for factor, levels in part.factors.items():
                factors.setdefault(factor, {}).update(dict.fromkeys(levels))
        return cls(
            {name: None for part in parts for name in part.variants},
            {factor: list(levels) for factor, levels in factors.items()},
            list(dict.fromkeys(name for part in parts for name in part.metrics)),
        )


def _known(where: str, name: Any, known: Collection[str]) -> str:
    if not isinstance(name, str) or name not in known:
        listed = f"which is none of {', '.join(known)}{hint(name, tuple(known))}" if known else "and the study has none"
        raise ValueError(f"{where} names {shown(name)}, {listed}")
    return name


def read_printed(given: Any, known: Names) -> dict[str, dict[str, Printed]]:
    """PRINTED: metric -> variant -> a number, or ``{value: 84, sd: 0.3}``.

    Raises:
        ValueError: it is otherwise, or names what no scale has; one sentence.
    """
    found: dict[str, dict[str, Printed]] = {}
    for metric, figures in group("PRINTED", given, "{top1: {BN: 82, FBN: 84}}").items():
        _known("PRINTED", metric, known.metrics)
        rows = found[metric] = {}
        for variant, figure in group(f"PRINTED of {metric!r}", figures, "{BN: 82, FBN: 84}").items():
            _known(f"PRINTED of {metric!r}", variant, known.variants)
            where = f"PRINTED of {metric!r} and {variant!r}"
            if isinstance(figure, dict):
                check_kinds(where, figure, {"value": float, "sd": float})
                sd = figure.get("sd")
                rows[variant] = Printed(number(where, figure.get("value")), None if sd is None else float(sd))
            else:
                rows[variant] = Printed(number(where, figure))
    return found


def read_claims(given: Any, here: Names, anywhere: Names, printed: Mapping[str, Mapping[str, Printed]]) -> list[Claim]:
    """CLAIMS: a list of mappings, each of which may stand for several pairs.

    Args:
        given: as the file has it.
        here: names at the scale that is read; what only another has makes a claim that cannot be checked here.
        anywhere: names at any scale.
        printed: of :func:`read_printed`.

    Raises:
        ValueError: one sentence.
    """
    if not isinstance(given, list):
        raise ValueError(f"CLAIMS must be a list of mappings such as {_EXAMPLE}, got {shown(given)}")
    found: list[Claim] = []
    for i, each in enumerate(given, 1):
        where = f"claim {i}"
        check_kinds(where, group(where, each, _EXAMPLE), _CLAIM_KEYS)
        found += _Reading(where, each, here, anywhere, printed).claims()
    return list(dict.fromkeys(found))


class _Reading:
    """One entry of CLAIMS."""

    def __init__(self, where: str, given: dict[str, Any], here: Names, anywhere: Names, printed: Mapping[str, Any]):
        self.where, self.given, self.here, self.anywhere, self.printed = where, given, here, anywhere, printed
        self.kind = _known(f"'is' of {where}", given.get("is"), KINDS)
        self.metric = _known(where, given.get("metric", anywhere.metrics[0]), anywhere.metrics)
        variants = given.get("variant", "all" if "baseline" in given else None)
        self.variants = variants if isinstance(variants, list) else [variants]
        self.text = " ".join(given.get("text", "").split())

    def claims(self) -> list[Claim]:
        self._check_keys()
        if self.kind in ABOUT_NUMBERS:
            return [
                Claim(self.kind, self.metric, variant, value=self._number(variant), text=self.text)
                for variant in self.variants
                if _known(self.where, variant, self.anywhere.variants)
            ]
        margin = self.given.get("margin")
        value = None if margin is None else float(margin)
        if "than" in self.given:
            than = _known(f"than of {self.where}", self.given["than"], self.anywhere.metrics)
            if than == self.metric:
                raise ValueError(f"{self.where} compares {than!r} with itself")
            names = [_known(self.where, variant, self.anywhere.variants) for variant in self.variants]
            return [Claim(self.kind, self.metric, name, value=value, text=self.text, than=than) for name in names]
        pairs = self._pairs()
        if "where" in self.given:
            if not self.printed.get(self.metric):
                raise ValueError(f"{self.where} is of what is printed so, and PRINTED has nothing of {self.metric!r}")
            pairs = [pair for pair in pairs if self._is_printed_so(*pair)]
        return [Claim(self.kind, self.metric, one, other, value, self.text) for one, other in pairs]

    def _check_keys(self) -> None:
        wanted = {"alike": "margin", "at_least": "value", "at_most": "value"}
        is_pair = self.kind in ABOUT_PAIRS and "than" not in self.given
        other = {"than"} if self.kind in ABOUT_PAIRS and not is_pair else set()
        needed = {wanted.get(self.kind), "baseline" if is_pair else "variant", *other} - {None}
        if missing := sorted(needed - self.given.keys()):
            raise ValueError(f"{self.where} is that something is {self.kind}, and has no {missing[0]}")
        allowed = needed | {"is", "metric", "variant", "text"} | ({"factor"} if is_pair else set())
        allowed |= {"where"} if is_pair and self.kind != "alike" else set()
        if more := [key for key in self.given if key not in allowed]:
            raise ValueError(f"{self.where} is that something is {self.kind}, where {more[0]} has no meaning")
        if self.given.get("where", "printed") != "printed":
            raise ValueError(f"where of {self.where} must be 'printed', got {shown(self.given['where'])}")
        if self.kind == "alike" and self.given["margin"] <= 0:
            raise ValueError(f"margin of {self.where} must be above 0, got {self.given['margin']}")

    def _number(self, variant: str) -> float:
        if self.kind != "printed":
            return float(self.given["value"])
        figure = self.printed.get(self.metric, {}).get(variant)
        if figure is None:
            raise ValueError(f"{self.where}: PRINTED has no {self.metric!r} of {variant!r}")
        return figure.value

    def _is_printed_so(self, variant: str, baseline: str) -> bool:
        """Whether the paper's own figures are as claimed, or not known: those of a level that this scale lacks."""
        figures = self.printed.get(self.metric, {})
        if variant in figures and baseline in figures:
            difference = figures[variant].value - figures[baseline].value
            return difference > 0 if self.kind == "higher" else difference < 0
        return variant not in self.anywhere.variants

    def _pairs(self) -> list[tuple[str, str]]:
        factor, baseline = self.given.get("factor"), self.given["baseline"]
        here, anywhere = self.here.variants, self.anywhere.variants
        if factor is not None:
            _known(f"factor of {self.where}", factor, self.anywhere.factors)
            here, anywhere = self.here.factors.get(factor, ()), self.anywhere.factors[factor]
        names = [each for each in anywhere if each != baseline] if self.variants == ["all"] else self.variants
        for name in (baseline, *names):
            _known(self.where, name, anywhere)
        if baseline in names:
            raise ValueError(f"{self.where} compares {baseline!r} with itself")
        checked = [name for name in names if name in here and baseline in here]
        pairs = [(name, baseline) for name in names if name not in checked]
        if not checked:
            return pairs
        rule = {"baseline": baseline, "with": checked} | ({} if factor is None else {"factor": factor})
        compared = Comparing(rule, self.here.factors, self.here.variants, self.where).all()
        return [*((each.variant, each.baseline) for each in compared), *pairs]


def comparisons_of(
    claims: Sequence[Claim], known: Sequence[Comparison], variants: Mapping[str, Variant]
) -> list[Comparison]:
    """The comparisons that claims need, and that are not made either way round."""
    made = {(each.variant, each.baseline) for each in known}
    found = []
    for claim in claims:
        pair = (claim.variant, claim.baseline)
        if claim.kind in ABOUT_PAIRS and set(pair) <= variants.keys() and not {pair, pair[::-1]} & made:
            made.add(pair)
            found.append(Comparison(*pair))
    return found
