"""Pictures of several rows of a run, such as quantiles of a layer's activations over training: a panel for each
variant, all at one scale. They are of one run of each, as Ioffe and Szegedy (2015, figure 1) and Horváth and Al-afandi
(2020, figure 4) draw them of one network: a mean over runs would hide how much such a row varies along one."""

import dataclasses
from collections.abc import Sequence

from fbn_plugin.engine.studies.figures import (
    LEAST_POINTS,
    Figure,
    Line,
    LinePanel,
    curve_value,
    drawn_curves,
    line_ends,
)
from fbn_plugin.engine.studies.outcomes import Outcome, Study, Together

__all__ = ["TOGETHER", "together_figures", "undrawn_rows"]

TOGETHER = "together"  # their kind
_CAPTION = "Of the first run of each variant. All panels have one scale."


def together_figures(study: Study, outcomes: Sequence[Outcome]) -> list[Figure]:
    """A picture for each of ``study.together`` of which some run has a row."""
    figures = []
    for number, (title, each) in enumerate(study.together.items(), 1):
        panels = [_panel(study, outcomes, variant, each) for variant in study.variants]
        panels = [panel for panel in panels if panel.lines]
        if panels:
            ends = line_ends([line for panel in panels for line in panel.lines])
            panels = [dataclasses.replace(panel, y_range=ends) for panel in panels]
            drawn = dict.fromkeys((line.label, line.style) for panel in panels for line in panel.lines)
            legend = sorted(drawn, key=lambda entry: entry[1])
            figures.append(Figure(f"together-{number}", "", TOGETHER, title, _CAPTION, panels, legend))
    return figures


def undrawn_rows(study: Study, figures: Sequence[Figure]) -> list[str]:
    """A sentence for each of ``study.together`` with rows that none of the pictures of a report has."""
    drawn = {each.title: {label for label, _ in each.legend} for each in figures if each.kind == TOGETHER}
    sentences = []
    for title, each in study.together.items():
        if left := [row for name, row in each.rows.items() if name not in drawn.get(title, ())]:
            rows = ", ".join(left)
            why = f"the first run of no variant has {LEAST_POINTS} values or more of it"
            sentences.append(f"{title}: not drawn, as {why}: {rows}.")
    return sentences


def _panel(study: Study, outcomes: Sequence[Outcome], variant: str, drawn: Together) -> LinePanel:
    names = {row: name for name, row in reversed(study.curve_rows.items())}
    mine = [each for each in outcomes if each.variant == variant and each.state == "done"]
    run = min(mine, key=lambda each: each.seed, default=None)
    lines = []
    for style, (label, row) in enumerate(drawn.rows.items(), 1):
        places, _ = drawn_curves(study, outcomes, variant, names[row])
        curve = dict(run.curves.get(names[row], [])) if run else {}
        if len(places) >= LEAST_POINTS and curve.keys() >= set(places):
            y = [curve_value(curve[at]) for at in places]
            lines.append(Line(label, style, [float(at) for at in places], y, [None] * len(y)))
    return LinePanel(variant, "iteration", drawn.label, lines)
