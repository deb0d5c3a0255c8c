"""What a study says of its paper's claims and of the figures that the paper prints, in sentences and tables."""

from collections import Counter
from collections.abc import Mapping, Sequence

from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.studies.claims import ABOUT_PAIRS, VERDICTS, ClaimVerdict, check_claims, joint_text
from fbn_plugin.engine.studies.document import Block, Heading, Inline, Paragraph, Strong, Table
from fbn_plugin.engine.studies.figures import quantity
from fbn_plugin.engine.studies.findings import Numbers, p_text
from fbn_plugin.engine.studies.outcomes import Claim, Printed, Study
from fbn_plugin.engine.studies.run_figures import FIRST
from fbn_plugin.engine.studies.statistics import MetricStatistics

__all__ = ["claim_blocks", "claim_text", "printed_blocks", "printed_text", "verdict_text"]


def claim_text(study: Study, claim: Claim) -> str:
    """A claim as a sentence without its full stop: the paper's, if the file has one, and what is held against what."""
    metric = study.metrics.get(claim.metric)
    what, unit = (metric.label or claim.metric, metric.unit) if metric else (claim.metric, "")
    number = "" if claim.value is None else f"{claim.value:g}" + (f" {unit}" if unit else "")
    margin = number.replace(" %", " point" if claim.value == 1 else " points")  # of a difference of percentages
    higher, lower = ("more", "fewer") if metric and metric.of in FIRST else ("higher", "lower")
    other = study.metrics.get(claim.than)
    baseline = claim.baseline or (other.label if other and other.label else claim.than)
    said = {
        "higher": f"{claim.variant}: {higher} {what} than {baseline}",
        "lower": f"{claim.variant}: {lower} {what} than {baseline}",
        "alike": f"{claim.variant} and {baseline}: alike in {what}, to within ±{margin}",
        "at_least": f"{claim.variant}: {what} of at least {number}",
        "at_most": f"{claim.variant}: {what} of at most {number}",
        "printed": f"{claim.variant}: {what} as printed, {number}",
    }[claim.kind]
    return f"{claim.text.rstrip('.')} ({said})" if claim.text else said


_OPEN = {"alike": ", neither alike nor different", **dict.fromkeys(("higher", "lower"), ", not told apart")}


def verdict_text(each: ClaimVerdict) -> str:
    """A verdict with its reason, where it has one."""
    said = each.verdict
    if said == "inconclusive" and each.p is not None:
        said += _OPEN.get(each.claim.kind, ", not told from the number")
    return f"{said}: {each.why}" if each.why else said


def claim_blocks(study: Study, found: Mapping[str, MetricStatistics], rank: int) -> list[Block]:
    """The paper's claims with a verdict each, and one of all; nothing where there are none.

    Args:
        study: its claims.
        found: of ``study_statistics``.
        rank: of the heading.
    """
    verdicts = check_claims(study, found)
    if not verdicts:
        return []
    counts = Counter(each.verdict for each in verdicts)
    parts = ", ".join(f"{counts[name]} {name}" for name in VERDICTS if counts[name])
    rows: list[list[Inline]] = [["claim", "verdict", "seen", "n", "p", "seeds needed"]]
    for each in sorted(verdicts, key=lambda verdict: verdict.verdict == "not run"):  # these last
        numbers = Numbers(found[each.claim.metric]) if each.claim.metric in found else None
        seen = "-" if numbers is None else _seen(each, numbers)
        verdict = verdict_text(each)
        rows.append(
            [
                claim_text(study, each.claim),
                verdict if each.verdict == "not run" else Strong(verdict),
                seen,
                str(each.n),
                p_text(each.p),
                "-" if each.seeds_needed is None else f"{each.seeds_needed:,}",
            ]
        )
    scale = ", at a reduced scale" if study.is_reduced else ""
    return [
        Heading(rank, "What was expected" if study.is_beyond else "What the paper claims"),
        Paragraph(
            (Strong(joint_text(verdicts).capitalize()), f"{scale}. Of {counted(len(rows) - 1, 'claim')}: {parts}.")
        ),
        Table(rows, (0, 1)),
        Paragraph((_note(study, verdicts),), "note"),
    ]


def _seen(each: ClaimVerdict, numbers: Numbers) -> str:
    return numbers.signed(each.seen) if each.claim.kind in ABOUT_PAIRS else numbers.plain(each.seen)


def _note(study: Study, verdicts: Sequence[ClaimVerdict]) -> str:
    kinds = {each.claim.kind for each in verdicts}
    text = (
        "Reproduced: told apart in the claimed direction; not reproduced: in the other one; inconclusive: not told "
        "apart, which does not mean equal. Seen: the mean difference of the pairs of seeds, or the mean. p: two-sided "
        "paired t-test, adjusted by Holm over the comparisons of the metric. Seeds needed: for a power of 80 %, were "
        "the truth what was seen."
    )
    if "alike" in kinds:
        text += (
            " Alike: two one-sided t-tests say that the difference lies within the margin, or that it lies beyond, "
            "adjusted by Holm over such claims. Papers print no margins: they are the study file's."
        )
    if kinds & {"at_least", "at_most"}:
        text += " At least and at most: one-sided t-tests of the mean against the number, adjusted likewise."
    if "printed" in kinds:
        text += f" As printed: the number lies within the {100 * (1 - study.alpha):.4g} % interval of the mean, by t."
    return text


def printed_text(printed: Printed) -> str:
    """``84`` or ``84 ± 0.3``."""
    return f"{printed.value:,g}" + ("" if printed.sd is None else f" ± {printed.sd:g}")


def printed_blocks(study: Study, name: str, found: MetricStatistics) -> list[Block]:
    """The figures that the paper prints of a metric, beside the study's."""
    figures = {variant: each for variant, each in study.printed.get(name, {}).items() if variant in study.variants}
    if not figures:
        return []
    numbers = Numbers(found)
    rows: list[list[Inline]] = [["variant", "printed", "here, mean ± sd", "n"]]
    for variant, printed in figures.items():
        summary = found.summaries[variant]
        rows.append([variant, printed_text(printed), numbers.spread(summary.mean, summary.sd), str(summary.n)])
    what = f"{quantity(name, study.metrics[name])}, printed"
    what += " at the paper's scale and here at a reduced one:" if study.is_reduced else " and here:"
    return [Paragraph((what,)), Table(rows)]
