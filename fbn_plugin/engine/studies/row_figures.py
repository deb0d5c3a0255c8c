"""Pictures of several rows of the runs, such as quantiles of a layer's activations over training, as Ioffe and Szegedy
(2015, figure 1) and Horváth and Al-afandi (2020, figure 4) draw them: a panel for each variant, all at one scale."""

import dataclasses
from collections.abc import Sequence

from fbn_plugin.engine.studies.figures import LEAST_POINTS, Figure, Line, LinePanel, line_ends, mean_curve
from fbn_plugin.engine.studies.outcomes import Outcome, Study, Together

__all__ = ["TOGETHER", "together_figures"]

TOGETHER = "together"  # their kind
_CAPTION = (
    "A panel for each variant, at one scale. Mean over the seeds; band: one standard deviation to each side, but no "
    "further than the lowest and the highest run."
)


def together_figures(study: Study, outcomes: Sequence[Outcome]) -> list[Figure]:
    """A picture for each of ``study.together`` of which some run has a row."""
    figures = []
    for number, (title, each) in enumerate(study.together.items(), 1):
        panels = [_panel(study, outcomes, variant, each) for variant in study.variants]
        panels = [panel for panel in panels if panel.lines]
        if panels:
            ends = line_ends([line for panel in panels for line in panel.lines])
            panels = [dataclasses.replace(panel, y_range=ends) for panel in panels]
            legend = [(name, style) for style, name in enumerate(each.rows, 1)]
            figures.append(Figure(f"together-{number}", "", TOGETHER, title, _CAPTION, panels, legend))
    return figures


def _panel(study: Study, outcomes: Sequence[Outcome], variant: str, drawn: Together) -> LinePanel:
    names = {row: name for name, row in reversed(study.curve_rows.items())}
    lines = []
    for style, (label, row) in enumerate(drawn.rows.items(), 1):
        points = mean_curve(study, outcomes, variant, names[row])
        if len(points) >= LEAST_POINTS:
            lines.append(Line(label, style, *(list(each) for each in zip(*points))))
    return LinePanel(variant, "iteration", drawn.label, lines)
