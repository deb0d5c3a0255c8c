"""The pictures of a study as SVG: written here, so that the same study gives the same bytes with whatever versions, and
in the reader's colours, light or dark. Lengths are in pixels."""

import html
import math
import textwrap
from collections.abc import Callable, Sequence

from fbn_plugin.engine.studies.figures import (
    Figure,
    Line,
    LinePanel,
    Row,
    RowPanel,
    line_ends,
    row_values,
    x_span,
)

__all__ = [
    "COLORS",
    "DASHES",
    "MARKS",
    "STYLE",
    "figure_file",
    "least_width",
    "legend_svg",
    "log_tick_text",
    "log_ticks",
    "nice_ticks",
    "padded",
    "panel_svg",
    "svg_size",
    "tick_text",
    "y_span",
]

# (on white, on black): grey for what others are compared with, then seven that the colour-blind tell apart (Okabe and
# Ito's, a darker one for their yellow). A style beyond has the first colours again, dashed, and other marks.
COLORS = (
    ("#555555", "#c4c4c4"),
    ("#0072b2", "#4da6e0"),
    ("#d55e00", "#ff8b45"),
    ("#009e73", "#2ec99c"),
    ("#cc79a7", "#e39fc5"),
    ("#e69f00", "#f5bb45"),
    ("#56b4e9", "#8ad0f7"),
    ("#882255", "#cf6f9f"),
)
# Circle, square, diamond, four triangles, plus, cross: names as Matplotlib has them. One more than there are colours.
MARKS = ("o", "s", "D", "^", "v", "P", "X", "<", ">")
DASHES = ("", "6 3", "2 2")

# The widths of letters at 11 pixels, rather too much than too little.
_LETTER, _CAPITAL, _WIDE = 6.3, 8.2, 11.0
_LINE = 14


def _rules() -> str:
    light = " ".join(f"--s{i}: {pair[0]};" for i, pair in enumerate(COLORS))
    dark = " ".join(f"--s{i}: {pair[1]};" for i, pair in enumerate(COLORS))
    classes = " ".join(f".s{i} {{ --c: var(--s{i}); }}" for i in range(len(COLORS)))
    dashes = " ".join(f".d{i} {{ stroke-dasharray: {dash}; }}" for i, dash in enumerate(DASHES) if dash)
    return (
        f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{classes} {dashes}\n"
        "svg text { font: 11px system-ui, sans-serif; fill: var(--ink); }\n"
        "svg .title { font-size: 13px; font-weight: 600; }\n"
        "svg .soft { fill: var(--soft); } .grid { stroke: var(--line); } .axis { stroke: var(--soft); }\n"
        ".line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }\n"
        ".band { fill: var(--c); opacity: .17; }\n"
        ".bar { stroke: var(--c); stroke-width: 1.3; } .thick { stroke: var(--c); stroke-width: 4; }\n"
        ".leader { stroke: var(--c); opacity: .55; }\n"
        ".mark { fill: var(--c); stroke: var(--paper); stroke-width: .8; stroke-dasharray: none; }\n"
        ".point { fill: var(--c); opacity: .55; }"
    )


STYLE = _rules()

_ALONE = (
    ":root { --ink: #222; --soft: #555; --line: #ddd; --paper: #fff; }\n"
    "@media (prefers-color-scheme: dark) {\n"
    "  :root { --ink: #e6e6e6; --soft: #a8a8a8; --line: #3a3d42; --paper: #16181c; }\n}\n"
)


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most so many round numbers within a range: multiples of 1, 2 or 5 times a power of ten.

    Examples::

        >>> nice_ticks(0.0, 43.0)
        [0.0, 10.0, 20.0, 30.0, 40.0]
    """
    span = high - low
    if span <= 0:
        return [low]
    power = math.floor(math.log10(span / most))
    step = next(f * 10.0**p for p in range(power, power + 3) for f in (1, 2, 5) if span / (f * 10.0**p) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) + 0.0 for i in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers within a range of positive ones, for a logarithmic axis: all powers of ten, and numbers between
    them where that makes no more than so many.

    Examples::

        >>> log_ticks(0.03, 4.0)
        [0.05, 0.1, 0.2, 0.5, 1.0, 2.0]
        >>> log_ticks(0.5, 2000)
        [1.0, 10.0, 100.0, 1000.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{factor}e{power}") for power in powers for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= most:
            break
    return ticks or [low]


def tick_text(value: float, ticks: Sequence[float]) -> str:
    """A tick's number, with as many decimals as all ticks of the axis need."""
    largest = max(map(abs, ticks))
    if largest >= 1e6 or 0 < largest < 1e-3:
        return f"{value:.3g}"
    decimals = next((d for d in range(6) if all(abs(round(t, d) - t) <= 1e-9 * largest for t in ticks)), 6)
    return f"{value:,.{decimals}f}"


def log_tick_text(value: float, ticks: Sequence[float]) -> str:
    """A tick's number on a logarithmic axis: as a power of ten where the axis reaches far.

    Examples::

        >>> log_tick_text(0.01, [0.001, 0.01]), log_tick_text(0.01, [1e-6, 0.0001, 0.01])
        ('0.01', '1e-2')
    """
    if min(ticks) >= 1e-4 and max(ticks) < 1e6:
        return tick_text(value, [value])
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    kinds = f' class="{kind}"' if kind else ""
    ends = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}"{kinds}{ends}>{html.escape(text)}</text>'


def _stroke(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path class="{kind}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>'


def _classes(style: int) -> str:
    return f"s{style % len(COLORS)}" + (f" d{style // len(COLORS) % len(DASHES)}" if style >= len(COLORS) else "")


def _mark(x: float, y: float, style: int, size: float = 4.0) -> str:
    """A mark of its style's form; those of like area."""
    kind, s = MARKS[style % len(MARKS)], size
    if kind == "o":
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="{s:.1f}"/>'
    t, u = 1.25 * s, 0.45 * s
    forms = {
        "s": [(-s, -s), (s, -s), (s, s), (-s, s)],
        "D": [(0, -t), (t, 0), (0, t), (-t, 0)],
        "^": [(0, -t), (t, s), (-t, s)],
        "v": [(0, t), (t, -s), (-t, -s)],
        "<": [(-t, 0), (s, -t), (s, t)],
        ">": [(t, 0), (-s, -t), (-s, t)],
        "P": [(-u, -t), (u, -t), (u, -u), (t, -u), (t, u), (u, u)],
        "X": [(0, -u), (u, -t), (t, -u), (u, 0), (t, u), (u, t)],
    }  # fmt: skip
    if kind in "PX":  # the other half by half a turn
        forms[kind] += [(-dx, -dy) for dx, dy in forms[kind]]
    corners = "L".join(f"{x + dx:.1f} {y + dy:.1f}" for dx, dy in forms[kind])
    return f'<path class="mark" d="M{corners}Z"/>'


def _scale(low: float, high: float, first: float, last: float, is_log: bool = False) -> Callable[[float], float]:
    """A function from values to pixels."""
    if is_log:
        low, high = math.log(low), math.log(high)
    factor = (last - first) / (high - low)
    return lambda value: first + ((math.log(value) if is_log else value) - low) * factor


def padded(low: float, high: float, share: float = 0.06) -> tuple[float, float]:
    pad = share * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad


def y_span(panel: LinePanel) -> tuple[float, float]:
    """The range of a panel's y axis, with room at both ends."""
    low, high = panel.y_range or line_ends(panel.lines)
    if not panel.is_log_y:
        return padded(low, high)
    low, high = padded(math.log(low), math.log(high))
    return math.exp(low), math.exp(high)


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near to the wanted ones, which are sorted, as a gap between them allows, and within a range where there
    is room: isotonic regression of what is wanted less the gaps, by pooling neighbours that are too near."""
    pools: list[list[float]] = []
    for i, place in enumerate(wanted):
        pools.append([place - i * gap])
        while len(pools) > 1 and sum(pools[-2]) / len(pools[-2]) > sum(pools[-1]) / len(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    free = [sum(pool) / len(pool) for pool in pools for _ in pool]
    highest = max(high - (len(free) - 1) * gap, low)
    return [min(max(place, low), highest) + i * gap for i, place in enumerate(free)]


def _svg(width: float, height: float, text: str, parts: Sequence[str]) -> str:
    label = html.escape(text)
    body = "\n".join(parts)
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{label}">\n{body}\n</svg>'


def least_width(panel: LinePanel | RowPanel) -> int:
    """Pixels below which a panel cannot be read."""
    if isinstance(panel, RowPanel):
        return 360
    return 640 if panel.is_direct else 300


def panel_svg(panel: LinePanel | RowPanel) -> str:
    """An element ``<svg>`` that the page's colours apply to, see :data:`STYLE`."""
    return _lines(panel) if isinstance(panel, LinePanel) else _rows(panel)


def _title(text: str, width: float) -> tuple[list[str], float]:
    """Lines of the title, and the height that they take."""
    lines = textwrap.wrap(text, max(int(width / 7.8), 12))
    return [_text(8, 16 + 16 * i, line, "title") for i, line in enumerate(lines)], 16 * len(lines)


def _width_of(text: str) -> float:
    """Pixels that a text takes."""
    return sum(_WIDE if each in "MW@%" else _CAPITAL if each.isupper() else _LETTER for each in text)


def _wrapped(text: str, width: float) -> list[str]:
    """A label in as many lines as it needs, one at least."""
    return textwrap.wrap(text, int(width / _LETTER)) or [""]


def _lines(panel: LinePanel) -> str:
    width, height = (820, max(420, 90 + 16 * len(panel.lines))) if panel.is_direct else (340, 250)
    labels = max((_width_of(line.label) for line in panel.lines), default=0) + 34 if panel.is_direct else 24
    parts, top = _title(panel.title, width)
    y_label = _wrapped(panel.y_label, width - 16)
    parts += [_text(8, top + 16 + _LINE * i, line, "soft") for i, line in enumerate(y_label)]
    top += _LINE * (len(y_label) - 1)
    height += _LINE * (len(y_label) - 1)
    low, high = y_span(panel)
    y_ticks = log_ticks(low, high) if panel.is_log_y else nice_ticks(low, high)
    y_texts = [(log_tick_text if panel.is_log_y else tick_text)(tick, y_ticks) for tick in y_ticks]
    left = 14 + max(map(_width_of, y_texts))
    right, first, last = width - labels, top + 26, height - 40
    xs = [*panel.ticks, *(x for line in panel.lines for x in line.x)]
    inset = 10 if panel.ticks else 4
    at_x = _scale(*x_span(panel), left + inset, right - inset, panel.is_log)
    at_y = _scale(low, high, last, first, panel.is_log_y)
    for tick, text in zip(y_ticks, y_texts):
        parts.append(_stroke("grid", left, at_y(tick), right, at_y(tick)))
        parts.append(_text(left - 5, at_y(tick) + 4, text, "soft", "end"))
    parts.append(_stroke("axis", left, last, right, last))
    parts += _x_ticks(panel.ticks or nice_ticks(min(0.0, *xs), max(xs), 4 if width < 500 else 8), at_x, last)
    parts.append(_text((left + right) / 2, height - 6, panel.x_label, "soft", "middle"))
    place = f"{left:.0f} {first:.0f} {right - left:.0f} {last - first:.0f}"
    x, y, across, down = place.split()
    parts.append(
        f'<svg x="{x}" y="{y}" width="{across}" height="{down}" viewBox="{place}">'
    )  # cuts off what is outside
    for line in panel.lines:
        parts += _line(line, at_x, at_y, has_marks=bool(panel.ticks))
    parts.append("</svg>")
    if panel.is_direct:
        parts += _direct_labels(panel.lines, at_x, at_y, right, first, last)
    return _svg(width, height, f"{panel.y_label} over {panel.x_label}: {panel.title}", parts)


def _x_ticks(ticks: Sequence[float], at_x: Callable[[float], float], y: float) -> list[str]:
    """Ticks with their numbers, but for those that another stands upon."""
    parts, taken = [], -math.inf
    for tick in ticks:
        text = tick_text(tick, ticks if len(ticks) < 2 or not float(tick).is_integer() else [tick])
        x, half = at_x(tick), _width_of(text) / 2
        parts.append(_stroke("axis", x, y, x, y + 4))
        if x - half > taken + 4:
            parts.append(_text(x, y + 17, text, "soft", "middle"))
            taken = x + half
    return parts


def _line(line: Line, at_x: Callable[[float], float], at_y: Callable[[float], float], has_marks: bool) -> list[str]:
    """Band or bars, line and marks, in a group that has the style."""
    places = [(at_x(x), at_y(y)) for x, y in zip(line.x, line.y)]
    parts = [f'<g class="{_classes(line.style)}">']
    ends = [(x, at_y(each[0]), at_y(each[1])) for (x, _), each in zip(places, line.intervals) if each]
    if line.is_band and len(ends) > 1:
        corners = [(x, low) for x, low, _ in ends] + [(x, high) for x, _, high in reversed(ends)]
        parts.append(f'<path class="band" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in corners)}Z"/>')
    elif not line.is_band:
        parts += [_stroke("bar", x, low, x, high) for x, low, high in ends]
    parts.append(f'<path class="line" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in places)}"/>')
    if has_marks or len(places) == 1:
        parts += [_mark(x, y, line.style, 3.6) for x, y in places]
    return [*parts, "</g>"]


def _direct_labels(
    lines: Sequence[Line],
    at_x: Callable[[float], float],
    at_y: Callable[[float], float],
    right: float,
    first: float,
    last: float,
) -> list[str]:
    """The lines' names beside their ends."""
    ordered = sorted(lines, key=lambda line: at_y(line.y[-1]))
    places = _spread([at_y(line.y[-1]) for line in ordered], _LINE + 2, first, last)
    parts = []
    for line, y in zip(ordered, places):
        parts.append(f'<g class="{_classes(line.style)}">')
        parts.append(_stroke("leader", at_x(line.x[-1]) + 5, at_y(line.y[-1]), right + 12, y))
        parts.append(_mark(right + 18, y, line.style, 3.6) + "</g>")
        parts.append(_text(right + 27, y + 4, line.label))
    return parts


def _rows(panel: RowPanel) -> str:
    left, step = 20 + max(_width_of(row.label) for row in panel.rows), 22
    width = max(480, math.ceil(left) + 220)
    parts, top = _title(panel.title, width)
    right, first = width - 26, top + 14
    last = first + step * len(panel.rows) + 4
    values = [value for row in panel.rows for value in row_values(row)]
    low, high = padded(*(panel.x_range or (min(values), max(values))), 0.03)
    at_x = _scale(low, high, left, right)
    ticks = nice_ticks(low, high, 8)
    for tick in ticks:
        parts.append(_stroke("axis" if panel.has_zero and tick == 0 else "grid", at_x(tick), first, at_x(tick), last))
    parts.append(_stroke("axis", left, last, right, last))
    parts += _x_ticks(ticks, at_x, last)
    x_label = _wrapped(panel.x_label, width - 16)
    for i, line in enumerate(x_label):
        half = _width_of(line) / 2
        middle = max(min((left + right) / 2, width - 8 - half), 8 + half)
        parts.append(_text(middle, last + 34 + _LINE * i, line, "soft", "middle"))
    for i, row in enumerate(panel.rows):
        parts += _row(row, at_x, first + step * (i + 0.5), left, right)
    return _svg(width, last + 42 + _LINE * (len(x_label) - 1), f"{panel.x_label}: {panel.title}", parts)


def _row(row: Row, at_x: Callable[[float], float], y: float, left: float, right: float) -> list[str]:
    parts = [_text(left - 8, y + 4, row.label, anchor="end"), f'<g class="{_classes(row.style)}">']
    below = 5 if row.points else 0  # single points above, their mean below
    parts += [f'<circle class="point" cx="{at_x(x):.1f}" cy="{y - 4:.1f}" r="2.4"/>' for x in row.points]
    for kind, interval in (("bar", row.outer), ("thick", row.inner)):
        if interval:
            parts.append(_stroke(kind, at_x(interval[0]), y + below, at_x(interval[1]), y + below))
    if row.middle is not None:
        parts.append(_mark(at_x(row.middle), y + below, row.style))
    parts.append("</g>")
    return parts + ([_text(right + 6, y + 4, row.note)] if row.note else [])


def figure_file(figure: Figure) -> bytes:
    """All panels of a figure as one SVG file, with legend, for pages that take pictures as files."""
    drawn = [panel_svg(panel) for panel in figure.panels]
    sizes = [svg_size(svg) for svg in drawn]
    widest = max(width for width, _ in sizes)
    columns = max(1, min(len(sizes), 1030 // widest))
    total, y, parts = columns * widest, 12, []
    if figure.legend:
        items, height = _legend(figure.legend, total, figure.has_marks)
        parts += items
        y += height
    for start in range(0, len(drawn), columns):
        for i in range(start, min(start + columns, len(drawn))):
            x, (width, height) = (i - start) * widest, sizes[i]
            parts.append(drawn[i].replace("<svg ", f'<svg x="{x}" y="{y}" width="{width}" height="{height}" ', 1))
        y += max(height for _, height in sizes[start : start + columns]) + 12
    size = f'width="{total}" height="{y}"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {y}" {size}>\n'
        f"<title>{html.escape(figure.title)}</title>\n<style>\n{_ALONE}{STYLE}\n</style>\n"
        f'<rect {size} style="fill: var(--paper)"/>\n'
    )
    return (head + "\n".join(parts) + "\n</svg>\n").encode()


def svg_size(svg: str) -> tuple[int, int]:
    """Width and height of what :func:`panel_svg` drew."""
    width, height = svg.partition('viewBox="0 0 ')[2].partition('"')[0].split()
    return int(width), int(height)


def _entry(label: str, style: int, x: float, y: float, has_mark: bool) -> str:
    """A piece of line, with its mark where the lines have some, and the name."""
    mark = _mark(x + 12, y, style) if has_mark else ""
    piece = f'<g class="{_classes(style)}">{_stroke("line", x, y, x + 24, y)}{mark}</g>'
    return piece + _text(x + 29, y + 4, label)


def _legend(entries: Sequence[tuple[str, int]], width: float, has_marks: bool) -> tuple[list[str], int]:
    """Entries in as many lines as they need, and the height of these."""
    parts, x, y = [], 10.0, 12
    for label, style in entries:
        needed = 44 + _width_of(label)
        if x + needed > width and x > 10:
            x, y = 10.0, y + 20
        parts.append(_entry(label, style, x, y, has_marks))
        x += needed
    return parts, y + 18


def legend_svg(label: str, style: int, has_mark: bool = True) -> str:
    """One entry of a legend, for the page, which sets as many in a line as there is room for."""
    width = math.ceil(34 + _width_of(label))
    drawn = _svg(width, 20, label, [_entry(label, style, 2, 10, has_mark)])
    return drawn.replace("<svg ", f'<svg width="{width}" height="20" ', 1)
