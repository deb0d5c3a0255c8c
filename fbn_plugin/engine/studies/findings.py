"""What a study found, in words and tables: which variant may be the best where, means, comparisons, and what became of
the runs. All of it is computed from the figures; no sentence knows what they say."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.studies.comparing import variant_name
from fbn_plugin.engine.studies.document import Block, Inline, Mono, Paragraph, Strong, Table
from fbn_plugin.engine.studies.figures import (
    ComparisonGroup,
    called,
    comparison_groups,
    difference_unit,
    level_name,
    quantity,
)
from fbn_plugin.engine.studies.outcomes import Metric, Outcome, Study
from fbn_plugin.engine.studies.run_figures import FIRST
from fbn_plugin.engine.studies.statistics import (
    POWER,
    RESAMPLES,
    SEEDS_OF_P2,
    BestOf,
    Interval,
    MetricStatistics,
    PairedComparison,
    Summary,
    compared_factor,
    compared_sets,
    numeric_factor,
)

__all__ = [
    "Numbers",
    "best_blocks",
    "comparison_blocks",
    "glance_blocks",
    "mean_blocks",
    "p_text",
    "run_blocks",
    "state_blocks",
    "variant_blocks",
]

_UNDERPOWERED = "underpowered"
_MARKS = {"higher": " ↑", "lower": " ↓", "not told apart": ""}
_MOST_NAMED = 20
_P_BETTER = "p better (Holm)"


class Numbers:
    """Numbers of one metric with as many decimals as tell two digits of a typical standard deviation; a dash for
    None."""

    def __init__(self, found: MetricStatistics):
        spreads = [each.sd for each in found.summaries.values() if each.sd]
        means = [abs(each.mean) for each in found.summaries.values() if each.mean]
        scale = statistics.median(spreads) if spreads else statistics.median(means) / 100 if means else 1.0
        self.decimals = min(max(1 - math.floor(math.log10(scale)), 0), 8)

    def plain(self, value: float | None) -> str:
        """``71.23``."""
        return "-" if value is None else self._text(value, "")

    def signed(self, value: float | None) -> str:
        """``+71.23``."""
        return "-" if value is None else self._text(value, "+")

    def spread(self, middle: float | None, sd: float | None, sign: str = "") -> str:
        """``71.23 ± 0.80``."""
        if middle is None:
            return "-"
        return self._text(middle, sign) + ("" if sd is None else f" ± {self._text(sd, '')}")

    def interval(self, ends: Interval | None, sign: str = "") -> str:
        """``71.20 to 71.30``."""
        return "-" if ends is None else f"{self._text(ends[0], sign)} to {self._text(ends[1], sign)}"

    def _text(self, value: float, sign: str) -> str:
        if abs(value) >= 1e9:
            return f"{value:{sign}.3e}"
        return f"{round(value, self.decimals) + 0.0:{sign},.{self.decimals}f}"


def p_text(value: float | None) -> str:
    """``0.012``, ``< 0.001``, or a dash for None."""
    if value is None:
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.0995 else f"{value:.2f}"


def _p_pair(raw: float | None, adjusted: float | None) -> str:
    return "-" if raw is None else f"{p_text(raw)} ({p_text(adjusted)})"


def _effect(value: float) -> str:
    return f"{value:+.2f}" if abs(value) < 1000 else f"{value:+.1e}"


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _seeds_label(n: int) -> str:
    return f"n = {n}" + (f", {_UNDERPOWERED}" if n < SEEDS_OF_P2 else "")


def state_blocks(study: Study, outcomes: Sequence[Outcome], found: Mapping[str, MetricStatistics]) -> list[Block]:
    """How far the study is, and a warning where it cannot tell much."""
    jobs = len(study.variants) * len(set(study.seeds))
    states = Counter(each.state for each in outcomes)
    text = f"{states['done']:,} of {counted(jobs, 'job')} done: {counted(len(study.variants), 'variant')}, "
    text += f"{counted(len(set(study.seeds)), 'seed')} each."
    blocks: list[Block] = [Paragraph((text,))]
    ended = [metric for name, metric in found.items() if study.metrics[name].of not in FIRST]
    diverged = max((sum(len(each.diverged) for each in metric.summaries.values()) for metric in ended), default=0)
    counts = {
        "failed": states["failed"],
        "diverged": diverged,
        "still to end": jobs - states["done"] - states["failed"],
    }
    parts = [f"{count:,} {what}" for what, count in counts.items() if count]
    if parts:
        blocks.append(Paragraph((Strong("Not all runs gave a figure"), f": {', '.join(parts)}."), "warning"))
    if study.conditional:
        text = f": the test labels balanced the batches that {'; '.join(study.conditional)} are evaluated on."
        blocks.append(Paragraph((Strong("Conditional"), text), "warning"))
    if len(set(study.seeds)) < SEEDS_OF_P2:
        text = (
            f": {counted(len(set(study.seeds)), 'seed')} a variant. Davis and Frank (2022) compare {SEEDS_OF_P2}. "
            "With so few much that truly differs is not told apart, and what is may look larger than it is."
        )
        blocks.append(Paragraph((Strong(_UNDERPOWERED.capitalize()), text), "warning"))
    return blocks


def best_blocks(study: Study, name: str, found: MetricStatistics) -> list[Block]:
    """Which variant is best where, and which others may be."""
    metric, numbers = study.metrics[name], Numbers(found)
    most = "highest" if metric.higher_is_better else "lowest"
    what = metric.label or name
    known = [each for each in found.best if each.best is not None]
    blocks: list[Block] = []
    if not found.best:  # nothing is compared
        return blocks
    if not known:
        return [Paragraph((f"No variant has a figure of {what} for every seed yet, so none is named the best.",))]
    if len(known) == 1:
        blocks.append(_one_best(study, known[0], found, numbers, f"{most} {what}"))
    else:
        blocks.append(Paragraph(tuple(_over_all(study, known, f"{most} {what}"))))
        header = ["where", f"{most} mean", quantity(name, metric), "not told apart from it", "beaten", "left out"]
        rows = [
            [
                each.context,
                Strong(level_name(study, each.best)),
                numbers.spread(found.summaries[each.best].mean, found.summaries[each.best].sd),
                _names(study, each.possible[1:]),
                _names(study, each.beaten),
                _names(study, each.left_out),
            ]
            for each in known
        ]
        rows = [header, *rows]
        if not any(each.left_out for each in known):
            rows = [row[:-1] for row in rows]
        blocks.append(Table(rows, (0, 1, 3, 4, 5)))
    level = _percent(1 - study.alpha)
    note = (
        f"Beaten: some other one is better by the one-sided paired t-test, at {study.alpha:g} over the number of "
        f"others and of settings. So with a confidence of {level}, in all settings together, the truly best of those "
        "that were tested is among those not beaten. Not to be told apart does not mean to be equal. The comparisons "
        "are two-sided, adjusted over all of the metric and want an interval without 0 too: what is beaten here need "
        "not be told apart there."
    )
    if any(each.left_out for each in known):
        note += " Left out: not every run gave a figure, and the mean of those that did says less than it seems."
    blocks.append(Paragraph((note,), "note"))
    return blocks


def glance_blocks(studies: Sequence[tuple[Study, Mapping[str, MetricStatistics]]]) -> list[Block]:
    """What several studies say of the first metric of each: each in a paragraph, and who is not beaten where.

    Args:
        studies: each with its statistics; those that compare nothing, or have no full set of figures, are left out.
    """
    blocks: list[Block] = []
    columns: dict[str, dict[str, str]] = {}  # study and metric -> setting -> who is not beaten
    for number, (study, found) in enumerate(studies, 1):
        name, metric = next(iter(study.metrics.items()))
        known = [each for each in found[name].best if each.best is not None]
        if not known:
            continue
        most = f"{'highest' if metric.higher_is_better else 'lowest'} {metric.label or name}"
        if len(known) == 1:
            said = _one_best(study, known[0], found[name], Numbers(found[name]), most).parts
        else:
            said = (*_over_all(study, known, most), *_together(study, found[name], difference_unit(metric)))
            heading = f"{study.heading}, {quantity(name, metric)}"
            heading += f", study {number}" if heading in columns else ""
            columns[heading] = {each.context: _names(study, each.possible) for each in known}
        blocks.append(Paragraph((Strong(study.heading), ". ", *said)))
    if columns:
        rows: list[list[Inline]] = [["where", *columns]]
        for context in dict.fromkeys(context for column in columns.values() for context in column):
            rows.append([context, *(column.get(context, "-") for column in columns.values())])
        note = (
            "Each cell: who is not beaten there, the best mean first. Not to be told apart does not mean to be equal."
        )
        blocks += [Table(rows, tuple(range(len(rows[0])))), Paragraph((note,), "note")]
    return blocks


def _together(study: Study, found: MetricStatistics, unit: str) -> list[Inline]:
    """What is told apart by the mean over settings."""
    numbers = Numbers(found)
    parts = [
        f"{called(study, each.variant)} {each.verdict} than {called(study, each.baseline)} by "
        f"{numbers.spread(abs(each.difference), each.sd)}"
        f"{' ' * bool(unit)}{unit} (adjusted p {p_text(each.p_holm)})"
        for each in found.over_all
        if each.verdict != "not told apart"
    ]
    if not found.over_all:
        return []
    return [f" By the mean over the settings, told apart: {'; '.join(parts) or 'none'}."]


def _names(study: Study, variants: Sequence[str]) -> str:
    return "; ".join(level_name(study, each) for each in variants) or "-"


def _one_best(study: Study, best: BestOf, found: MetricStatistics, numbers: Numbers, what: str) -> Paragraph:
    summary = found.summaries[best.best]
    text = f" has the {what}: {numbers.spread(summary.mean, summary.sd)} ({_seeds_label(best.n)})."
    if best.possible[1:]:
        text += f" Not told apart from it: {_names(study, best.possible[1:])}."
    if best.beaten:
        text += f" Beaten: {_names(study, best.beaten)}."
    if best.left_out:
        text += f" Left out: {_names(study, best.left_out)}."
    return Paragraph((Strong(level_name(study, best.best)), text))


def _over_all(study: Study, known: Sequence[BestOf], what: str) -> list[Inline]:
    """Who is first how often, and who is never or always beaten."""
    firsts = Counter(level_name(study, each.best) for each in known)
    parts: list[Inline] = [f"The {what}, by the mean ({_seeds_label(known[0].n)}): "]
    for i, (name, count) in enumerate(firsts.most_common()):
        parts += [
            ", " if i else "",
            Strong(name),
            f" in {count:,}" + ("" if i else f" of {counted(len(known), 'setting')}"),
        ]
    alone = sum(len(each.possible) == 1 and bool(each.beaten) for each in known)
    where = f"In {counted(alone, 'setting')} it is" if alone else "In no setting is it"
    parts.append(f". {where} told apart from all others that were tested. ")
    tested: Counter[str] = Counter()
    beaten: Counter[str] = Counter()
    for each in known:
        tested.update(level_name(study, name) for name in (*each.possible, *each.beaten))
        beaten.update(level_name(study, name) for name in each.beaten)
    everywhere = [name for name, count in tested.items() if count == len(known)]
    never = [name for name in everywhere if not beaten[name]]
    always = [name for name in everywhere if beaten[name] == len(known)]
    parts.append(f"Nowhere beaten: {'; '.join(sorted(never)) or 'none'}. ")
    parts.append(f"Beaten everywhere: {'; '.join(sorted(always)) or 'none'}.")
    return parts


def mean_blocks(study: Study, name: str, found: MetricStatistics) -> list[Block]:
    """Tables of mean ± standard deviation: factor by factor, or variant by variant."""
    metric = study.metrics[name]
    factor = compared_factor(study)
    across = numeric_factor(study) or next((each for each in study.factors if each != factor), None)
    if factor is None or across is None:
        return variant_blocks(study, name, found)
    blocks: list[Block] = []
    sets, numbers = compared_sets(study), Numbers(found)
    tables: dict[str, dict[str, list[str]]] = {}
    for members in sets.values():
        levels = study.variants[members[0]].levels
        where = variant_name({key: level for key, level in levels.items() if key not in (factor, across)})
        tables.setdefault(where, {})[levels[across]] = members
    for where, columns in tables.items():
        rows: list[list[Inline]] = [[factor, *(variant_name({across: level}) for level in columns)]]
        for level in study.factors[factor]:
            by_column = [
                next((each for each in members if study.variants[each].levels[factor] == level), None)
                for members in columns.values()
            ]
            if any(by_column):
                rows.append([level, *(_cell(study, found, variant, numbers) for variant in by_column)])
        blocks += [Paragraph((f"{quantity(name, metric)}{', ' * bool(where)}{where}:",)), Table(rows)]
    blocks.append(Paragraph((_cell_note(study, metric),), "note"))
    return blocks


def _cell(study: Study, found: MetricStatistics, variant: str | None, numbers: Numbers) -> Inline:
    """``71.23 ± 0.80 ↑ °``; what has the best mean of its column stands out."""
    if variant is None:
        return ""
    summary = found.summaries[variant]
    text = numbers.spread(summary.mean, summary.sd)
    if summary.n < len(set(study.seeds)):
        text += f" (n = {summary.n})"
    first = next((each for each in found.comparisons if each.variant == variant), None)
    text += _MARKS[first.verdict] if first else ""
    if any(variant in each.possible for each in found.best):
        text += " °"
    return Strong(text) if any(variant == each.best for each in found.best) else text


def _cell_note(study: Study, metric: Metric) -> str:
    most = "highest" if metric.higher_is_better else "lowest"
    best = f"Bold: the {most} mean of the column, if every run gave a figure; °: not told apart from it. "
    return (
        f"Mean ± standard deviation of {counted(len(set(study.seeds)), 'seed')}; n where fewer runs gave a figure. "
        f"{best if metric.is_ranked else ''}↑ ↓: "
        "higher or lower than what it is compared with first below, told apart from chance after Holm's adjustment."
    )


def variant_blocks(study: Study, name: str, found: MetricStatistics) -> list[Block]:
    """One row a variant: number of runs, mean, spread and interval."""
    numbers, level = Numbers(found), _percent(1 - study.alpha)
    header = [
        "variant",
        "n",
        "mean ± sd",
        f"{level} bootstrap",
        f"{level} t",
        "median",
        "least",
        "greatest",
        "no figure",
    ]
    rows: list[list[Inline]] = [header]
    for variant in study.variants:
        each = found.summaries[variant]
        rows.append(
            [
                variant,
                str(each.n),
                numbers.spread(each.mean, each.sd),
                numbers.interval(each.interval),
                numbers.interval(each.t_interval),
                numbers.plain(each.median),
                numbers.plain(each.least),
                numbers.plain(each.greatest),
                _without(each, study.metrics[name]),
            ]
        )
    return [Paragraph((f"{quantity(name, study.metrics[name])}:",)), Table(rows, (0, 8))]


def _without(summary: Summary, metric: Metric) -> str:
    diverged = "never got there" if metric.of in FIRST else "diverged"
    kinds = {"failed": summary.failed, diverged: summary.diverged, "to end": summary.unfinished}
    return ", ".join(f"{len(seeds)} {kind}" for kind, seeds in kinds.items() if seeds) or "-"


def comparison_blocks(study: Study, name: str, found: MetricStatistics) -> list[Block]:
    """A table of comparisons for each group, and how it is to be read."""
    numbers, blocks = Numbers(found), []
    for group in comparison_groups(study, found.comparisons):
        blocks += _comparison_table(study, name, group, numbers)
    if blocks:
        tests = sum(each.p is not None for each in found.comparisons)
        blocks.append(Paragraph((_comparison_note(study, tests),), "note"))
    over_all: dict[str, list[PairedComparison]] = {}
    for each in found.over_all:
        over_all.setdefault(each.group, []).append(each)
    for title, members in over_all.items():
        rows = [(each, called(study, each.variant), called(study, each.baseline)) for each in members]
        blocks += _comparison_table(study, name, ComparisonGroup(title, rows), numbers)
    if over_all:
        tests = sum(each.p is not None for each in found.over_all)
        note = (
            "One figure a seed, its mean over the settings, so that what is small in each, and alike in all, is seen. "
            f"Adjusted by Holm over these {counted(tests, 'comparison')} alone."
        )
        blocks.append(Paragraph((note,), "note"))
    return blocks


def _comparison_table(study: Study, name: str, group: ComparisonGroup, numbers: Numbers) -> list[Block]:
    """The comparisons of one group; a baseline that all of them share stands above the table."""
    unit, level = difference_unit(study.metrics[name]), _percent(1 - study.alpha)
    header: list[Inline] = ["variant", "minus", "verdict", f"difference ± sd{f' ({unit})' if unit else ''}"]
    header += [f"{level} bootstrap", "p two-sided (Holm)", _P_BETTER, "p signed rank (Holm)"]
    header += ["d_z (g_z)", "seeds needed"]
    hidden = {"" if group.has_own_baselines else "minus", "" if study.metrics[name].is_ranked else _P_BETTER}
    rows = [header, *(_comparison_row(each, numbers, names) for each, *names in group.rows)]
    rows = [[cell for head, cell in zip(header, row) if head not in hidden] for row in rows]
    what = f"{group.title}{', ' * bool(group.title)}{study.metrics[name].label or name}"
    what += f" minus that of {group.baseline}" if group.baseline else ""
    return [Paragraph((f"{what}:",)), Table(rows, (0, 1, 2) if group.has_own_baselines else (0, 1))]


def _comparison_row(each: PairedComparison, numbers: Numbers, names: Sequence[str]) -> list[Inline]:
    label = f"{each.verdict} ({_seeds_label(each.n)}{f'; {each.note}' if each.note else ''})"
    return [
        *names,
        label if each.verdict == "not told apart" else Strong(label),
        numbers.spread(each.difference, each.sd, "+"),
        numbers.interval(each.interval, "+"),
        _p_pair(each.p, each.p_holm),
        _p_pair(each.p_better, each.p_better_holm),
        _p_pair(each.p_signed_rank, each.p_signed_rank_holm),
        "-" if each.d_z is None else f"{_effect(each.d_z)} ({_effect(each.g_z)})",
        "-" if each.seeds_needed is None else f"{each.seeds_needed:,}",
    ]


def _comparison_note(study: Study, tests: int) -> str:
    return (
        "Differences are taken seed by seed (n pairs). p: paired t-tests, two-sided and one-sided for the variant "
        "being better, and Wilcoxon's signed-rank test, exact, zeros by Pratt's way; in parentheses adjusted by Holm "
        f'over the {counted(tests, "comparison")} of this metric. A verdict other than "not told apart" needs the '
        f"adjusted two-sided p below {study.alpha:g} and a bootstrap interval (BCa, {RESAMPLES:,} resamples) without "
        '0; "not told apart" does not mean equal. d_z: Cohen\'s effect size of pairs, difference / sd; g_z: with '
        f"Hedges' correction. Seeds needed: for a power of {_percent(POWER)} in one two-sided t-test at "
        f"{study.alpha:g}, were the true effect the one seen. Fewer than {SEEDS_OF_P2} pairs are labelled "
        f"{_UNDERPOWERED}."
    )


def run_blocks(study: Study, outcomes: Sequence[Outcome], found: Mapping[str, MetricStatistics]) -> list[Block]:
    """Runs without a figure, named with the reason; nothing where there are none."""
    failed = [(each.variant, each.seed, each.error or "failed") for each in outcomes if each.state == "failed"]
    for name, each in found.items():
        if study.metrics[name].of in FIRST:  # which not to reach is no failure
            continue
        row = study.metrics[name].row or name
        what = f"no finite {study.metrics[name].label or name}: it diverged, or metrics.json has no {row}"
        failed += [(variant, seed, what) for variant, summary in each.summaries.items() for seed in summary.diverged]
    if not failed:
        return []
    rows: list[list[Inline]] = [["variant", "seed", "why it has no figure"]]
    rows += [[variant, str(seed), Mono(why)] for variant, seed, why in failed[:_MOST_NAMED]]
    more = len(failed) - _MOST_NAMED
    rest: list[Block] = [Paragraph((f"And {counted(more, 'other')}.",))] if more > 0 else []
    return [Table(rows, (0, 2)), *rest]
