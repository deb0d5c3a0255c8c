"""What the pictures of a study show, as values: which lines and points in which panel. ``svg.py`` draws them for the
page, ``plots.py`` as PNG."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fbn_plugin.engine.studies.comparing import variant_name
from fbn_plugin.engine.studies.outcomes import Metric, Outcome, Study
from fbn_plugin.engine.studies.run_figures import FIRST
from fbn_plugin.engine.studies.statistics import (
    Interval,
    MetricStatistics,
    PairedComparison,
    as_number,
    compared_factor,
    compared_sets,
    figures_of,
    is_figure,
    numeric_factor,
)

__all__ = [
    "LEAST_POINTS",
    "ComparisonGroup",
    "Figure",
    "Line",
    "LinePanel",
    "Row",
    "RowPanel",
    "called",
    "comparison_groups",
    "curve_value",
    "difference_unit",
    "drawn_curves",
    "level_name",
    "line_ends",
    "mean_curve",
    "quantity",
    "row_values",
    "study_figures",
    "styles",
    "x_span",
]

# A curve of more points is drawn with every so-manieth.
_MOST_POINTS = 60
# A curve of fewer points tells no more than the figure at its end.
LEAST_POINTS = 3
# Where all that was reached spans so many times the range of the last three quarters, the beginning is cut off.
_MOST_BEGINNING = 2.5
# Lines of which one lies so many times higher than another are drawn on a logarithmic axis.
_MOST_APART = 8
# A longer name is cut in its middle: names often differ at the end.
_LONGEST_LABEL = 36
# Each side of a difference, where both together are longer than twice this.
_HALF = 24


@dataclass(frozen=True)
class Line:
    """One line: values of y at x, each with an interval or without.

    Attributes:
        label: its name in the legend.
        style: number of its colour and mark, the same in all pictures of a study.
        is_band: the intervals are drawn as a band, not as a bar at each point.
    """

    label: str
    style: int
    x: list[float]
    y: list[float]
    intervals: list[Interval | None]
    is_band: bool = True


@dataclass(frozen=True)
class LinePanel:
    """Lines over x.

    Attributes:
        is_log: of the x axis.
        ticks: of the x axis; empty where round numbers do.
        y_range: what is shown, the rest is cut off; None shows all.
        is_direct: each line's label stands at its end, beside the panel.
        is_log_y: of the y axis.
    """

    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    is_log: bool = False
    ticks: list[float] = field(default_factory=list)
    y_range: Interval | None = None
    is_direct: bool = False
    is_log_y: bool = False


@dataclass(frozen=True)
class Row:
    """One row of points: single values, their mean, and up to two intervals of it.

    Attributes:
        inner: drawn thick.
        outer: drawn thin.
        note: at the right end.
    """

    label: str
    style: int
    middle: float | None = None
    inner: Interval | None = None
    outer: Interval | None = None
    points: list[float] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class RowPanel:
    """Rows over a shared x.

    Attributes:
        has_zero: a line stands at 0, and 0 is within the range.
        x_range: what is shown; None shows all.
    """

    title: str
    x_label: str
    rows: list[Row]
    has_zero: bool = False
    x_range: Interval | None = None


@dataclass(frozen=True)
class Figure:
    """Panels that belong together.

    Attributes:
        name: of its file, without the ending.
        metric: that it shows.
        kind: ``"means"``, ``"differences"`` or ``"curves"`` of a metric; of none ``"layers"`` and the like.
        title: for readers.
        caption: what its marks mean.
        panels: all of one kind.
        legend: names and styles of the lines; empty where they are named in the panels.
        is_main: a short report shows it, too.
    """

    name: str
    metric: str
    kind: str
    title: str
    caption: str
    panels: list[LinePanel] | list[RowPanel]
    legend: list[tuple[str, int]] = field(default_factory=list)
    is_main: bool = True

    @property
    def has_marks(self) -> bool:
        """Whether its points have the marks of their styles, and the legend, too."""
        return any(isinstance(panel, RowPanel) or panel.ticks for panel in self.panels)


def study_figures(study: Study, outcomes: Sequence[Outcome], found: Mapping[str, MetricStatistics]) -> list[Figure]:
    """All pictures of a study, of each metric in turn; those with nothing to show are left out.

    Args:
        found: of :func:`~fbn_plugin.engine.studies.statistics.study_statistics`.
    """
    figures, owners = [], _curve_owners(study)
    for name, metric in study.metrics.items():
        what = quantity(name, metric)
        file = "".join(each if each.isalnum() else "-" for each in name).strip("-") or "metric"
        if numeric_factor(study):
            figures += _by_level(study, found[name], name, what, file)
        else:
            figures.append(_by_variant(study, outcomes, found[name], name, what, file))
        figures.append(_differences(study, found[name], name, metric, file))
        if name in owners:
            along = what if metric.of == "last" else metric.row_label or metric.row or name
            figures.append(_curves(study, outcomes, name, along, file))
    return [each for each in figures if each.panels]


def _curve_owners(study: Study) -> list[str]:
    """Of the metrics that are taken from the same row along the run the one whose curves are drawn; of rows that are
    drawn together none."""
    owners: dict[str, str] = {}
    together = {row for each in study.together.values() for row in each.rows.values()}
    for name, metric in sorted(study.metrics.items(), key=lambda pair: pair[1].of != "last"):
        owners.setdefault(metric.row or name, name)
    return [name for row, name in owners.items() if row not in together]


def quantity(name: str, metric: Metric, less: str | None = None) -> str:
    """A metric as an axis names it, with its unit, or its difference to something: ``"top-1 accuracy minus BN
    (points)"``."""
    what = (metric.label or name) + (f" minus {less}" if less else "")
    unit = metric.unit if less is None else difference_unit(metric)
    return f"{what} ({unit})" if unit else what


def difference_unit(metric: Metric) -> str:
    """The unit of a difference of two figures; of percentages it is percentage points."""
    return "points" if metric.unit == "%" else metric.unit


def line_ends(lines: Iterable[Line]) -> Interval:
    """The range of what lines show."""
    values = [value for line in lines for value in line.y]
    values += [end for line in lines for interval in line.intervals if interval for end in interval]
    return min(values), max(values)


def row_values(row: Row) -> list[float]:
    """All that a row shows."""
    return [*([] if row.middle is None else [row.middle]), *(row.inner or ()), *(row.outer or ()), *row.points]


def x_span(panel: LinePanel) -> Interval:
    """The range of a panel's x axis: without ticks with 0 in it."""
    values = [*panel.ticks, *(x for line in panel.lines for x in line.x)]
    low, high = min(values) if panel.ticks else min(0.0, *values), max(values)
    if low < high:
        return low, high
    return (low / 2, high * 2) if low > 0 else (low - 1, high + 1)


def level_name(study: Study, variant: str) -> str:
    """A variant's level of the compared factor, or its own name where the study has no factors."""
    factor, levels = compared_factor(study), study.variants[variant].levels
    return called(study, levels[factor]) if factor in levels else variant


def called(study: Study, level: str) -> str:
    """A level of the compared factor as a reader understands it alone: ``"scale 0.1"`` for ``"0.1"``."""
    factor = compared_factor(study)
    return variant_name({factor: level}) if factor else level


def _level(study: Study) -> str:
    return f"{100 * (1 - study.alpha):.4g} %"


def _short(name: str, longest: int = _LONGEST_LABEL) -> str:
    half = longest // 2
    return name if len(name) <= longest else f"{name[: half - 1]}…{name[-half:]}"


def _pair_label(variant: str, baseline: str) -> str:
    label = f"{variant} minus {baseline}"
    return label if len(label) <= 2 * _HALF else f"{_short(variant, _HALF)} minus {_short(baseline, _HALF)}"


def styles(study: Study) -> dict[str, int]:
    """Number of the style of each level of the compared factor, or of each variant; what most are compared with is
    0."""
    factor = compared_factor(study)
    names = [called(study, level) for level in study.factors[factor]] if factor else list(study.variants)
    baselines = [level_name(study, each.baseline) for each in study.comparisons]
    if baselines:
        first = max(dict.fromkeys(baselines), key=baselines.count)
        names = [first, *(name for name in names if name != first)]
    names += [level_name(study, name) for name in study.variants]
    return {name: i for i, name in enumerate(dict.fromkeys(names))}


def _by_level(study: Study, found: MetricStatistics, name: str, what: str, file: str) -> list[Figure]:
    """The metric over the numeric factor: all lines together, and each with a band beside the reference."""
    number, factor = numeric_factor(study), compared_factor(study)
    style = styles(study)
    together, apart = [], []
    others = [each for each in study.factors if each not in (number, factor)]
    ordered = sorted(study.factors[factor], key=lambda level: style[called(study, level)])
    for levels in itertools.product(*(study.factors[each] for each in others)):
        shared = dict(zip(others, levels))
        lines = [_line(study, found, shared | {factor: one}, number, style[called(study, one)]) for one in ordered]
        lines = [line for line in lines if line.x]
        if not lines:
            continue
        ticks = sorted({x for line in lines for x in line.x})
        setting = {"x_label": number, "y_label": what, "is_log": _is_log(ticks), "ticks": ticks}
        where = variant_name(shared)
        together.append(LinePanel(where, lines=_dodged(lines, setting["is_log"], ticks), is_direct=True, **setting))
        reference, rest = lines[0], lines[1:]
        ends = line_ends(lines)
        for line in rest if reference.style == 0 else []:
            title = f"{line.label}{', ' * bool(where)}{where}"
            apart.append(LinePanel(title, lines=[reference, line], y_range=ends, **setting))
    caption = f"Mean over the seeds; bars: its {_level(study)} interval by the bootstrap. "
    pair = f"Each line beside that of {{}}: mean over the seeds; band: its {_level(study)} interval by the bootstrap."
    first = next(iter(style))
    file, title = f"{file}-by-{_slug(number)}", f"{what} over {number}"
    return [
        Figure(file, name, "means", title, caption + _moved(together), together),
        Figure(
            f"{file}-each",
            name,
            "means",
            f"{title}, one by one",
            pair.format(first),
            apart,
            [(_short(first), 0)],
            is_main=False,
        ),
    ]


def _moved(panels: Sequence[LinePanel]) -> str:
    return "Points at one level stand a little apart." if any(len(panel.lines) > 1 for panel in panels) else ""


def _slug(text: str) -> str:
    return "".join(each if each.isalnum() else "-" for each in text)


def _line(study: Study, found: MetricStatistics, levels: Mapping[str, str], number: str, style: int) -> Line:
    """The means of the variants of some levels over the numeric factor."""
    points = []
    for name, variant in study.variants.items():
        summary = found.summaries[name]
        if summary.n and all(variant.levels.get(key) == level for key, level in levels.items()):
            points.append((as_number(variant.levels[number]), summary.mean, summary.interval))
    points.sort(key=lambda point: point[0])
    label = _short(called(study, levels[compared_factor(study)]))
    return Line(label, style, *([list(each) for each in zip(*points)] or [[], [], []]))


def _is_log(values: Sequence[float]) -> bool:
    return values[0] > 0 and values[-1] / values[0] >= 8


def _dodged(lines: Sequence[Line], is_log: bool, ticks: Sequence[float]) -> list[Line]:
    """Lines whose points at one level stand a little apart, with bars."""
    count = len(lines)
    places = [(i - (count - 1) / 2) / max(count - 1, 1) for i in range(count)]  # -0.5 to 0.5
    steps = [math.log(b / a) if is_log else b - a for a, b in itertools.pairwise(ticks)] or [1.0]
    width = min(0.35 * min(steps), 0.03 * sum(steps) * min(count - 1, 4))  # they stand close at levels far apart
    if is_log:
        moved = [[x * math.exp(width * place) for x in line.x] for line, place in zip(lines, places)]
    else:
        moved = [[x + width * place for x in line.x] for line, place in zip(lines, places)]
    return [Line(line.label, line.style, x, line.y, line.intervals, False) for line, x in zip(lines, moved)]


def _by_variant(
    study: Study, outcomes: Sequence[Outcome], found: MetricStatistics, name: str, what: str, file: str
) -> Figure:
    """The figures of single runs, and their means, a row a variant."""
    style = styles(study)
    sets = compared_sets(study)
    named = {variant for members in sets.values() for variant in members}
    rest = [variant for variant in study.variants if variant not in named]
    panels = []
    for context, members in [*sets.items(), *([("", rest)] if rest else [])]:
        rows = [
            Row(
                _short(level_name(study, variant)),
                style[level_name(study, variant)],
                found.summaries[variant].mean,
                inner=found.summaries[variant].interval,
                points=list(figures_of(outcomes, variant, name).values()),
            )
            for variant in members
        ]
        if rows := [row for row in rows if row.points]:
            panels.append(RowPanel(context, what, rows))
    caption = f"Small points: single runs. Large ones: their mean, with its {_level(study)} interval by the bootstrap."
    return Figure(f"{file}-by-variant", name, "means", f"{what} of each variant", caption, panels)


@dataclass(frozen=True)
class ComparisonGroup:
    """Comparisons that a reader sees together.

    Attributes:
        title: what all of them are within, such as ``"batch 4"``, or what is held against what, as
            ``"batch 4 minus batch 2"``; "" where neither is shared.
        rows: each comparison with the names of its two sides; the second is "" where the title says it.
    """

    title: str
    rows: list[tuple[PairedComparison, str, str]]

    @property
    def baseline(self) -> str:
        """What all are held against; "" where they have several, or the title says it."""
        baselines = {baseline for _, _, baseline in self.rows}
        return baselines.pop() if len(baselines) == 1 else ""

    @property
    def has_own_baselines(self) -> bool:
        """Whether a row is to name what it is held against."""
        return not self.baseline and any(baseline for _, _, baseline in self.rows)


def comparison_groups(study: Study, comparisons: Sequence[PairedComparison]) -> list[ComparisonGroup]:
    """Comparisons by what tells their sides apart: those of levels of the compared factor, in each setting; those of
    two levels of another factor, whatever else is equal; the rest with the full names of their variants."""
    factor = compared_factor(study)
    places = {name: i for i, members in enumerate(compared_sets(study).values()) for name in members}
    groups: dict[tuple[int, str], list[tuple[PairedComparison, str, str]]] = {}
    for each in sorted(comparisons, key=lambda each: places.get(each.variant, len(places))):
        first, second = study.variants[each.variant].levels, study.variants[each.baseline].levels
        apart = [key for key in study.factors if first.get(key) != second.get(key)]
        shared = variant_name({key: level for key, level in first.items() if key not in apart})
        if not first or not second:
            key, names = (0, each.group), (each.variant, each.baseline)
        elif apart == [factor]:
            key, names = (0, shared), (called(study, first[factor]), called(study, second[factor]))
        elif len(apart) == 1:
            ends = (variant_name({apart[0]: levels[apart[0]]}) for levels in (first, second))
            key, names = (1, " minus ".join(ends)), (shared or each.variant, "")
        else:
            key, names = (2, ""), (each.variant, each.baseline)
        groups.setdefault(key, []).append((each, *names))
    ordered = sorted(groups.items(), key=lambda group: group[0][0])
    return [ComparisonGroup(title, rows) for (_, title), rows in ordered]


def _differences(study: Study, found: MetricStatistics, name: str, metric: Metric, file: str) -> Figure:
    """The differences to the baselines with their intervals, a panel a group."""
    style = styles(study)
    panels = []
    for group in comparison_groups(study, found.comparisons):
        rows = []
        for each, variant, baseline in group.rows:
            if each.difference is None:
                continue
            label = _pair_label(variant, baseline) if group.has_own_baselines else _short(variant)
            mark = {"higher": "↑", "lower": "↓"}.get(each.verdict, "")
            number = style[level_name(study, each.variant)]
            rows.append(Row(label, number, each.difference, each.interval, each.t_interval, note=mark))
        less = group.baseline or ("its baseline" if group.has_own_baselines else "")
        label = quantity(name, metric, less) if less else f"difference of {quantity(name, metric, less)}"
        panels += [RowPanel(group.title, label, rows, True)] if rows else []
    values = [value for panel in panels for row in panel.rows for value in row_values(row)]
    ends = (min(0.0, *values), max(0.0, *values)) if values else None
    panels = [dataclasses.replace(panel, x_range=ends) for panel in panels]
    caption = (
        f"Mean of the differences, seed by seed, and its {_level(study)} intervals. Thick: by the bootstrap, which is "
        "too short for few seeds; thin: that of the t-test. ↑ ↓: told apart after Holm's adjustment over all "
        "comparisons of the metric."
    )
    title = f"{metric.label or name}: differences to the baseline"
    return Figure(f"{file}-differences", name, "differences", title, caption, panels)


def _curves(study: Study, outcomes: Sequence[Outcome], name: str, what: str, file: str) -> Figure:
    """The metric along the runs, a panel for each set of variants that are compared."""
    style = styles(study)
    sets = compared_sets(study) or {"": list(study.variants)}
    panels, used = [], {}
    for context, members in sets.items():
        lines = []
        for variant in members:
            points = mean_curve(study, outcomes, variant, name)
            if len(points) >= LEAST_POINTS:
                level = level_name(study, variant)
                used[_short(level)] = style[level]
                lines.append(Line(_short(level), style[level], *([list(each) for each in zip(*points)])))
        if lines:
            is_log = _are_far_apart(lines)
            shown = None if is_log else _late_range(lines)
            panels.append(LinePanel(context, "iteration", what, lines, y_range=shown, is_log_y=is_log))
    caption = (
        "Mean over the seeds whose run has ended; band: one standard deviation to each side, but no further than the "
        "lowest and the highest run."
    )
    if any(panel.y_range for panel in panels):
        caption += " What is only reached in the first quarter is cut off."
    if len(panels) == 1:  # room for the names
        panels, used = [dataclasses.replace(panels[0], is_direct=True)], {}
    legend = sorted(used.items(), key=lambda pair: pair[1])
    return Figure(f"{file}-curves", name, "curves", f"{what} along the training", caption, panels, legend, False)


def _are_far_apart(lines: Sequence[Line]) -> bool:
    """Whether some line lies so far above another that one of them would be flat."""
    if line_ends(lines)[0] <= 0:
        return False
    levels = [statistics.median(line.y) for line in lines]
    return max(levels) > _MOST_APART * min(levels)


def _late_range(lines: Sequence[Line]) -> Interval | None:
    """The range of what lines show behind the first quarter, where they are to be told apart; None where the rest does
    not hide that."""
    start = max(line.x[-1] for line in lines) / 4
    late = []
    for line in lines:
        kept = [i for i, x in enumerate(line.x) if x >= start] or [len(line.x) - 1]
        y, intervals = [line.y[i] for i in kept], [line.intervals[i] for i in kept]
        late.append(Line(line.label, line.style, [], y, intervals))
    (low, high), (least, greatest) = line_ends(late), line_ends(lines)
    return (low, high) if greatest - least > _MOST_BEGINNING * (high - low) else None


def drawn_curves(
    study: Study, outcomes: Sequence[Outcome], variant: str, name: str
) -> tuple[list[int], list[dict[int, float]]]:
    """What is drawn of the curves of a variant's finished runs: iterations at which all that have a final figure were
    evaluated, at most 60, and the figures there, to six digits. Where the figure is the iterations to a threshold, or
    the curve is that of a row alone, runs are drawn without one.

    Args:
        name: one of ``study.curve_rows``.
    """
    needs_figure = name in study.metrics and study.metrics[name].of not in FIRST
    curves = [
        {at: curve_value(value) for at, value in each.curves.get(name, []) if is_figure(value)}
        for each in outcomes
        if each.variant == variant and each.state == "done" and (not needs_figure or is_figure(each.metrics.get(name)))
    ]
    curves = [each for each in curves if each]
    if not curves:
        return [], []
    shared = sorted(set.intersection(*map(set, curves)))
    step = math.ceil(len(shared) / _MOST_POINTS) or 1
    return shared[::-1][::step][::-1], curves  # the last one is kept


def curve_value(value: float) -> float:
    """A figure along a run as it is drawn, to six digits, so that kept ones need no more."""
    return float(f"{value:.6g}")


def mean_curve(
    study: Study, outcomes: Sequence[Outcome], variant: str, name: str
) -> list[tuple[float, float, Interval | None]]:
    """Mean and band of :func:`drawn_curves`; no band leaves the range of the runs, such as below zero what never is."""
    places, curves = drawn_curves(study, outcomes, variant, name)
    points = []
    for at in places:
        values = sorted(each[at] for each in curves)
        mean = statistics.fmean(values)
        sd = statistics.stdev(values) if len(values) > 1 else None
        band = None if sd is None else (max(mean - sd, values[0]), min(mean + sd, values[-1]))
        points.append((float(at), mean, band))
    return points
