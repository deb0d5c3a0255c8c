"""Whether a study bears out what its paper claims. A claim about two variants is held against their paired comparison,
one of equality against an equivalence test, and one about a number against the runs' mean.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.studies.equivalence import equivalence_p, mean_p, seeds_for_equivalence
from fbn_plugin.engine.studies.outcomes import FULL_SCALE, Claim, Study
from fbn_plugin.engine.studies.statistics import MetricStatistics, PairedComparison, Summary, holm, seeds_needed

__all__ = [
    "ABOUT_NUMBERS",
    "ABOUT_PAIRS",
    "KINDS",
    "VERDICTS",
    "ClaimVerdict",
    "check_claims",
    "joint_text",
    "joint_verdict",
]

ABOUT_PAIRS = ("higher", "lower", "alike")
ABOUT_NUMBERS = ("at_least", "at_most", "printed")
KINDS = (*ABOUT_PAIRS, *ABOUT_NUMBERS)

VERDICTS = ("reproduced", "not reproduced", "inconclusive", "not run")


@dataclass(frozen=True)
class ClaimVerdict:
    """What a study says of a claim.

    Attributes:
        claim: that was checked.
        verdict: one of :data:`VERDICTS`.
        why: what no number says: why it was not run, or why there is no test; "" where there is one.
        n: pairs, or runs, that it rests on.
        seen: difference of the variant to its baseline, or the variant's mean; None without any.
        p: of the test that the verdict rests on, adjusted by Holm over what is tested of the metric; of a printed
            number as it is.
        seeds_needed: for a power of 0.8, were the truth what was seen; None where no number is enough.
    """

    claim: Claim
    verdict: str
    why: str = ""
    n: int = 0
    seen: float | None = None
    p: float | None = None
    seeds_needed: int | None = None


@dataclass(frozen=True)
class _Tested:
    """A claim with p for it and against it, still to be adjusted."""

    draft: ClaimVerdict
    for_it: float
    against_it: float


def check_claims(study: Study, found: Mapping[str, MetricStatistics]) -> list[ClaimVerdict]:
    """The verdict of each claim of a study, in order.

    Args:
        study: its claims.
        found: of :func:`~fbn_plugin.engine.studies.statistics.study_statistics`.
    """
    checks = [_check(study, claim, found) for claim in study.claims]
    families: dict[tuple[str, bool], list[int]] = {}
    for i, each in enumerate(checks):
        if isinstance(each, _Tested):
            claim = each.draft.claim
            families.setdefault((claim.metric, claim.kind == "alike"), []).append(i)
    for members in families.values():
        adjusted = [holm([getattr(checks[i], side) for i in members]) for side in ("for_it", "against_it")]
        for i, for_it, against_it in zip(members, *adjusted):
            checks[i] = _judged(checks[i].draft, for_it, against_it, study.alpha)
    return checks


def joint_verdict(verdicts: Sequence[ClaimVerdict]) -> str:
    """Of an experiment: not reproduced where a claim is not, else inconclusive where one is, else reproduced; claims
    that were not run do not count, unless none was.

    Examples::

        >>> claim = Claim("higher", "top1", "FBN", "BN")
        >>> joint_verdict([ClaimVerdict(claim, "reproduced"), ClaimVerdict(claim, "not run")])
        'reproduced'
    """
    given = {each.verdict for each in verdicts}
    return next((each for each in ("not reproduced", "inconclusive", "reproduced") if each in given), "not run")


def joint_text(verdicts: Sequence[ClaimVerdict]) -> str:
    """:func:`joint_verdict` beside figures, which were run even where no claim could be checked."""
    joint = joint_verdict(verdicts)
    return "no claim was checked" if joint == "not run" else joint


def _judged(draft: ClaimVerdict, for_it: float, against_it: float, alpha: float) -> ClaimVerdict:
    if for_it < alpha:
        return dataclasses.replace(draft, verdict="reproduced", p=for_it)
    if against_it < alpha:
        return dataclasses.replace(draft, verdict="not reproduced", p=against_it)
    return dataclasses.replace(draft, p=min(for_it, against_it))


def _check(study: Study, claim: Claim, found: Mapping[str, MetricStatistics]) -> ClaimVerdict | _Tested:
    if missing := next((each for each in (claim.metric, claim.than) if each and each not in study.metrics), None):
        return ClaimVerdict(claim, "not run", f"this scale does not measure {missing}")
    variants = [each for each in (claim.variant, claim.baseline) if each]
    if left_out := [each for each in variants if each not in study.variants]:
        levels = {level for factor in study.factors.values() for level in factor}
        unknown = [each for each in left_out if each not in levels] or left_out
        return ClaimVerdict(claim, "not run", f"this scale has no {' and no '.join(unknown)}")
    if claim.kind == "printed" and study.scale != FULL_SCALE:
        return ClaimVerdict(claim, "not run", "only the paper's scale can tell")
    summaries = [found[claim.metric].summaries[each] for each in variants]
    if to_end := sum(len(each.unfinished) for each in summaries):
        jobs = len(variants) * len(set(study.seeds))
        return ClaimVerdict(claim, "not run", f"{to_end} of its {counted(jobs, 'job')} are still to end")
    if claim.kind in ABOUT_NUMBERS:
        return _about_a_number(claim, summaries[0], study)
    compared = found[claim.metric].with_others if claim.than else found[claim.metric].comparisons
    return _about_a_pair(claim, compared, study.alpha)


def _about_a_pair(claim: Claim, comparisons: Sequence[PairedComparison], alpha: float) -> ClaimVerdict | _Tested:
    pair = (claim.variant, claim.than or claim.baseline)
    each = next((one for one in comparisons if (one.variant, one.baseline) in (pair, pair[::-1])), None)
    if each is None:
        return ClaimVerdict(claim, "not run", "this study does not compare the two")
    is_turned = each.variant != claim.variant
    difference = None if each.difference is None else (-each.difference if is_turned else each.difference) + 0.0
    draft = ClaimVerdict(claim, "inconclusive", each.note, each.n, difference)
    if claim.kind == "alike":
        if each.sd == 0:  # nothing but the difference itself can be looked at
            verdict = "reproduced" if abs(difference) <= claim.value else "not reproduced"
            return dataclasses.replace(draft, verdict=verdict)
        if each.sd is None:
            return draft
        draft = dataclasses.replace(draft, seeds_needed=seeds_for_equivalence(difference, each.sd, claim.value, alpha))
        return _Tested(draft, *equivalence_p(difference, each.sd, each.n, claim.value))
    seen = {"higher": "lower", "lower": "higher"}.get(each.verdict, each.verdict) if is_turned else each.verdict
    draft = dataclasses.replace(draft, p=each.p_holm, seeds_needed=each.seeds_needed)
    if seen == "not told apart":
        return draft
    return dataclasses.replace(draft, verdict="reproduced" if seen == claim.kind else "not reproduced")


def _about_a_number(claim: Claim, summary: Summary, study: Study) -> ClaimVerdict | _Tested:
    draft = ClaimVerdict(claim, "inconclusive", n=summary.n, seen=summary.mean)
    is_trained = study.setting(claim.variant, "SOLVER.MAX_EPOCH") != 0
    if summary.n < 2 and (is_trained or not summary.n):
        why = "one run tells nothing of chance" if summary.n else "no run gave a figure"
        return dataclasses.replace(draft, why=why)
    number = claim.value
    if not summary.sd:  # nothing but the number itself can be looked at; None of one run
        holds = {"at_least": summary.mean >= number, "at_most": summary.mean <= number}
        verdict = "reproduced" if holds.get(claim.kind, math.isclose(summary.mean, number)) else "not reproduced"
        why = "every run gave the same figure" if is_trained else "nothing is trained, and there is no chance in it"
        return dataclasses.replace(draft, verdict=verdict, why=why)
    above, below = mean_p(summary.mean, summary.sd, summary.n, number)
    if claim.kind == "printed":
        p = min(1.0, 2 * min(above, below))
        return dataclasses.replace(draft, verdict="not reproduced" if p < study.alpha else "reproduced", p=p)
    draft = dataclasses.replace(draft, seeds_needed=seeds_needed((summary.mean - number) / summary.sd, study.alpha))
    return _Tested(draft, *((above, below) if claim.kind == "at_least" else (below, above)))
