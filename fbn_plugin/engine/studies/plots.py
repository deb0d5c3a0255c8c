"""The pictures of a study as PNG, by Matplotlib, for places that show no SVG. The bytes differ from one version of
Matplotlib to the next."""

import io
import textwrap

from fbn_plugin.engine.studies.figures import Figure, LinePanel, RowPanel, row_values, x_span
from fbn_plugin.engine.studies.svg import COLORS, DASHES, MARKS, log_ticks, nice_ticks, padded, tick_text, y_span

__all__ = ["figure_png"]

_INK, _SOFT, _GRID = "#222222", "#555555", "#dddddd"
_DPI = 110


def figure_png(figure: Figure) -> bytes:
    """All panels of a figure, on white.

    Raises:
        ModuleNotFoundError: Matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    panels = figure.panels
    width, _ = _size(panels[0])
    columns = max(1, min(len(panels), int(11 // width)))
    lines = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [max(_size(panel)[1] for panel in line) for line in lines]
    canvas = Canvas(figsize=(columns * width, sum(heights) + 0.4 * bool(figure.legend)), layout="constrained")
    FigureCanvasAgg(canvas)
    grid = canvas.subplots(len(lines), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for places, line in zip(grid, lines):
        for axes in places[len(line) :]:
            axes.set_axis_off()
        for axes, panel in zip(places, line):
            axes.set_title(panel.title, fontsize=10, loc="left", fontweight="bold", color=_INK)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.spines["bottom"].set_color(_SOFT)
            axes.tick_params(colors=_SOFT, labelsize=8)
            axes.tick_params(axis="y", length=0)
            (_lines if isinstance(panel, LinePanel) else _rows)(axes, panel)
    if figure.legend:
        marks = figure.has_marks
        handles = [
            canvas.axes[0].plot([], [], label=label, **_style(style, marks))[0] for label, style in figure.legend
        ]
        longest = max(len(label) for label, _ in figure.legend)
        columns = min(len(handles), max(1, int(12 * columns * width / (longest + 8))))
        canvas.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=8)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _size(panel: LinePanel | RowPanel) -> tuple[float, float]:
    """Width and height in inches."""
    if isinstance(panel, RowPanel):
        return 5.0, 0.9 + 0.24 * len(panel.rows)
    return (8.6, max(4.6, 0.8 + 0.2 * len(panel.lines))) if panel.is_direct else (3.6, 2.6)


def _style(style: int, marked: bool = True) -> dict:
    return {
        "color": COLORS[style % len(COLORS)][0],
        "marker": MARKS[style % len(MARKS)] if marked else None,
        "linestyle": (0, tuple(map(int, dash.split())))
        if (dash := DASHES[style // len(COLORS) % len(DASHES)])
        else "-",
        "markeredgecolor": "white",
        "markeredgewidth": 0.7,
        "markersize": 6,
        "linewidth": 1.5,
    }


def _lines(axes, panel: LinePanel) -> None:
    for line in panel.lines:
        color = COLORS[line.style % len(COLORS)][0]
        ends = [(x, *interval) for x, interval in zip(line.x, line.intervals) if interval]
        if ends and line.is_band:
            x, low, high = zip(*ends)
            axes.fill_between(x, low, high, color=color, alpha=0.17, linewidth=0)
        elif ends:
            axes.vlines(*zip(*ends), color=color, linewidth=1.2)
        axes.plot(line.x, line.y, **_style(line.style, bool(panel.ticks) or len(line.x) == 1))
    low, high = y_span(panel)
    if panel.is_log_y:
        axes.set_yscale("log")
        at = log_ticks(low, high)
        axes.set_yticks(at, [tick_text(tick, [tick]) for tick in at])
    if panel.is_log:
        axes.set_xscale("log")
    first, last = x_span(panel)
    axes.set_xlim(*((first / 1.12, last * 1.12) if panel.is_log else padded(first, last, 0.03)))
    ticks = panel.ticks or nice_ticks(min(0.0, first), last, 4)
    axes.set_xticks(ticks, [tick_text(tick, [tick]) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(low, high)
    axes.set_xlabel(panel.x_label, fontsize=8.5, color=_SOFT)
    axes.set_ylabel(textwrap.fill(panel.y_label, 64 if panel.is_direct else 40), fontsize=8.5, color=_SOFT)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    if panel.is_direct:
        handles = [axes.plot([], [], label=line.label, **_style(line.style))[0] for line in _by_end(panel)]
        axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8.5)


def _by_end(panel: LinePanel) -> list:
    """The lines in the order of their right ends, the upper one first."""
    return sorted(panel.lines, key=lambda line: -line.y[-1])


def _rows(axes, panel: RowPanel) -> None:
    for i, row in enumerate(panel.rows):
        color, below = COLORS[row.style % len(COLORS)][0], 0.2 if row.points else 0.0
        axes.plot(
            row.points, [i - 0.2] * len(row.points), "o", color=color, alpha=0.55, markersize=3.2, markeredgewidth=0
        )
        for interval, width in ((row.outer, 1.2), (row.inner, 3.5)):
            if interval:
                axes.hlines(i + below, *interval, color=color, linewidth=width)
        if row.middle is not None:
            axes.plot([row.middle], [i + below], **_style(row.style))
        axes.text(1.01, i, row.note, transform=axes.get_yaxis_transform(), va="center", fontsize=9, color=_INK)
    values = [value for row in panel.rows for value in row_values(row)]
    axes.set_xlim(*padded(*(panel.x_range or (min(values), max(values))), 0.03))
    axes.set_ylim(len(panel.rows) - 0.5, -0.5)
    axes.set_yticks(range(len(panel.rows)), [row.label for row in panel.rows])
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    if panel.has_zero:
        axes.axvline(0, color=_SOFT, linewidth=1.2, zorder=1)
    axes.set_xlabel(textwrap.fill(panel.x_label, 64), fontsize=8.5, color=_SOFT)
