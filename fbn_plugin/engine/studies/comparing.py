"""What a study file compares: COMPARE as pairs of variants, and the names of variants that are products of levels."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fbn_plugin.engine.files.words import counted, hint, shown
from fbn_plugin.engine.studies.outcomes import Comparison, Variant
from fbn_plugin.engine.studies.study_keys import check_key

__all__ = ["Comparing", "variant_name"]


def variant_name(levels: Mapping[str, str]) -> str:
    """The name of a combination of levels: these, and before one without a letter its factor.

    Examples::

        >>> variant_name({"norm": "FBN, T=3", "batch": "4"})
        'FBN, T=3, batch 4'
    """
    parts = (level if re.search(r"[^\W\d_]", level) else f"{factor} {level}" for factor, level in levels.items())
    return ", ".join(parts)


class Comparing:
    """Reads COMPARE.

    Args:
        given: pairs; or a factor and the level that the others are compared with; or a variant that they are; or a list
            of these.
        factors: factor -> its levels.
        variants: of the study.
        key: what sentences call it.
    """

    def __init__(
        self,
        given: Any,
        factors: Mapping[str, Sequence[str]],
        variants: Mapping[str, Variant],
        key: str = "COMPARE",
    ):
        self.given, self.factors, self.variants, self.key = given, factors, variants, key

    def all(self) -> Iterator[Comparison]:
        """The comparisons, in order; ValueError in one sentence."""
        given = self.given if isinstance(self.given, list) else [self.given]
        for each in given:
            if isinstance(each, dict):
                yield from self._rule(each)
            elif isinstance(each, list) and len(each) == 2:
                variant, baseline = (self._known("a pair", name) for name in each)
                if variant == baseline:
                    raise ValueError(f"{self.key}: a pair compares {variant!r} with itself")
                yield Comparison(variant, baseline)
            else:
                raise ValueError(
                    f"{self.key} must be pairs [variant, baseline], or mappings with baseline and with, "
                    f"got {shown(each)}"
                )

    def _known(self, where: str, name: Any, known: Sequence[str] | None = None) -> str:
        known = tuple(self.variants if known is None else known)
        if name not in known:
            listed = ", ".join(known) if len(known) <= 10 else f"{counted(len(known), 'variant')}"
            raise ValueError(f"{self.key}: {where} names {shown(name)}, which is none of {listed}{hint(name, known)}")
        return name

    def _rule(self, rule: dict[str, Any]) -> Iterator[Comparison]:
        for key in rule:
            check_key(f"key of {self.key}", key, {"factor": str, "baseline": str, "with": object})
        if "baseline" not in rule:
            raise ValueError(f"{self.key} has no baseline")
        if "factor" not in rule:
            baseline = self._known("baseline", rule["baseline"])
            for name in self._chosen(rule, tuple(self.variants), baseline):
                yield Comparison(name, baseline)
            return
        if not self.factors:
            raise ValueError(f"{self.key} names the factor {shown(rule['factor'])}, and the study has no FACTORS")
        factor = self._known("factor", rule["factor"], tuple(self.factors))
        baseline = self._known("baseline", rule["baseline"], self.factors[factor])
        chosen = self._chosen(rule, self.factors[factor], baseline)
        by_levels = {tuple(each.levels.items()): name for name, each in self.variants.items()}
        for name, each in self.variants.items():
            if each.levels[factor] in chosen:
                other = by_levels[tuple({**each.levels, factor: baseline}.items())]
                rest = {key: level for key, level in each.levels.items() if key != factor}
                yield Comparison(name, other, variant_name(rest))

    def _chosen(self, rule: dict[str, Any], known: Sequence[str], baseline: str) -> list[str]:
        """What ``with`` names, without the baseline; all by default."""
        given = rule.get("with", "all")
        names = known if given == "all" else given if isinstance(given, list) else [given]
        chosen = [name for each in names if (name := self._known("with", each, known)) != baseline]
        if not chosen:
            raise ValueError(f"{self.key} has nothing to compare with {baseline!r}: with has {shown(given)}")
        return chosen
