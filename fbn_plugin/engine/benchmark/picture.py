"""Results as a picture: bars of times and memory, as ratios to what is native."""

import io
from collections.abc import Mapping, Sequence

from fbn_plugin.engine.benchmark.report import environment_line, memory_bytes, shape_text

# Colour-blind safe; filtered ones in blue and green, what they replace in grey, naive ones in red.
COLORS = {
    "FBN T=2": "#88bbee",
    "FBN T=5": "#3366aa",
    "FBN T=inf": "#ccbb44",
    "FBN+ReLU fused T=2": "#dd99bb",
    "FBN+ReLU fused": "#aa3377",
    "FBN+add+ReLU fused T=2": "#bb99dd",
    "FBN+add+ReLU fused": "#663399",
    "FBN T=5 fused": "#aa3377",
    "FBN, ReLU": "#66ccbb",
    "FGN T=2": "#99cc77",
    "FGN T=5": "#228833",
    "GN": "#aaaaaa",
    "no norm": "#aaaaaa",
    "compiled naive FBN": "#eeaa66",
    "naive FBN": "#ee6677",
}
LIGHT = (
    "FBN T=2", "FBN T=inf", "FBN+ReLU fused T=2", "FBN+add+ReLU fused T=2", "FBN, ReLU", "FGN T=2", "GN", "no norm",
    "compiled naive FBN",
)  # fmt: skip
QUARTILES, WITHOUT, ROOFLINE = "quartiles", "without outliers", "BN's traffic at copy bandwidth"
# Bars beyond are cut; their figure says how long they are.
LIMIT = 1.75


def _bars(axes, groups: Sequence[tuple[str, Mapping[str, Mapping]]], marks: Mapping[int, float]) -> None:
    """Horizontal bars ``{name: {value, low, high, other}}`` in labelled groups, the first group on top."""
    names = [name for name in COLORS if any(name in bars for _, bars in groups)]
    height = 0.84 / max(len(names), 1)
    for position, (_, bars) in enumerate(groups):
        shown = [name for name in names if name in bars]
        for index, name in enumerate(shown):
            bar = bars[name]
            y = position + (index - (len(shown) - 1) / 2) * height
            axes.barh(y, min(bar["value"], LIMIT), 0.9 * height, color=COLORS[name], label=name)
            text = f"{bar['value']:.2f}" if bar["value"] <= LIMIT else f"{bar['value']:.1f}"
            axes.text(0.02, y, text, va="center", fontsize=7.5, color="black" if name in LIGHT else "white")
            if bar["value"] > LIMIT:
                axes.text(LIMIT, y, "▸", ha="right", va="center", fontsize=9, color="white")
                continue
            axes.plot([bar["low"], min(bar["high"], LIMIT)], [y, y], color="#333333", linewidth=0.9, label=QUARTILES)
            if "other" in bar:
                style = {"markersize": 3.2, "color": "white", "markeredgecolor": "#333333", "label": WITHOUT}
                axes.plot(min(bar["other"], LIMIT), y, "D", **style)
        if position in marks:
            ends = [position - 0.45, position + 0.45]
            axes.plot([marks[position]] * 2, ends, ":", color="black", linewidth=1.2, label=ROOFLINE)
    axes.axvspan(0, 1, color="#f2f2f2", zorder=0)
    axes.axvline(1, color="black", linewidth=1.2)
    axes.set(xlim=(0, LIMIT), ylim=(len(groups) - 0.5, -0.5))
    axes.set_yticks(range(len(groups)), [label for label, _ in groups])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _layer_groups(rows: Sequence[Mapping]) -> tuple[list[tuple[str, dict]], dict[int, float]]:
    """Rows of one panel as groups of bars, and the roofline of each: the bar with outliers, a diamond without."""
    groups, marks = [], {}
    shapes = list(dict.fromkeys(shape_text(row) for row in rows))
    for position, shape in enumerate(shapes):
        first, *rest = sorted((row for row in rows if shape_text(row) == shape), key=lambda row: -row["outliers"])
        bars = {}
        for name, peer in first["peers"].items():
            low, middle, high = peer["ratio"]
            bars[name] = {"value": middle, "low": low, "high": high}
            if rest and name in rest[0]["peers"]:
                bars[name]["other"] = rest[0]["peers"][name]["ratio"][1]
        groups.append((shape.replace("x", "×"), bars))
        marks[position] = first["roofline_ms"]["BN"] / first["peers"]["BN"]["ms"][1]
    return groups, marks


def _model_groups(rows: Sequence[Mapping]) -> tuple[list, list]:
    """Time and memory of the models as groups of bars."""
    times, memories = [], []
    for row in rows:
        label = f"{row['model']}\n{row['batch']}×{row['image'][0]}×{row['image'][1]}, {row['dtype']}\n{row['layout']}"
        others = {name: peer for name, peer in row["peers"].items() if name != "BN"}
        ratios = {name: peer["ratio"] for name, peer in others.items()}
        times.append((label, {name: {"value": r[1], "low": r[0], "high": r[2]} for name, r in ratios.items()}))
        kept = {name: memory_bytes(peer) / memory_bytes(row["peers"]["BN"]) for name, peer in others.items()}
        memories.append((label, {name: {"value": m, "low": m, "high": m} for name, m in kept.items()}))
    return times, memories


def plot(results: Mapping) -> bytes:
    """PNG: for each layout and dtype the layers' forward+backward time, and the models' step time and memory, all as
    ratios to the native norm.

    Raises:
        ValueError: there is nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in results["layers"] if row["pass"] == "forward+backward"]
    if not rows and not results["models"]:
        raise ValueError("the results hold nothing to draw")
    panels = list(dict.fromkeys((row["dtype"], row["layout"]) for row in rows))
    columns = len({layout for _, layout in panels})
    if len(panels) != columns * len({dtype for dtype, _ in panels}):  # not each layout with each dtype
        columns = min(len(panels), 3)
    lines = [panels[start : start + columns] for start in range(0, len(panels), columns or 1)]
    bars = len({shape_text(row) for row in rows}) * len({name for row in rows for name in row["peers"]})
    heights = [0.9 + 0.155 * bars] * len(lines)
    if results["models"]:
        heights.append(0.9 + sum(0.3 + 0.15 * len(row["peers"]) for row in results["models"]))
    figure = Figure(figsize=(11, sum(heights) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    for number, line in enumerate(lines):
        places = grid[number].subgridspec(1, columns).subplots(squeeze=False)[0]
        for axes, (dtype, layout) in zip(places, line):
            _bars(axes, *_layer_groups([row for row in rows if (row["dtype"], row["layout"]) == (dtype, layout)]))
            axes.set_title(f"layer, {dtype}, {layout}", fontsize=10, loc="left")
            axes.set_xlabel("forward + backward time, native = 1")
            axes.tick_params(axis="y", labelleft=axes is places[0])
    if results["models"]:
        times, memories = _model_groups(results["models"])
        left, right = grid[len(lines)].subgridspec(1, 2).subplots()
        _bars(left, times, {})
        _bars(right, memories, {})
        left.set_title("model", fontsize=10, loc="left")
        left.set_xlabel("time of a training step, BN = 1")
        peak = any("peak_bytes" in peer for row in results["models"] for peer in row["peers"].values())
        right.set_xlabel(f"{'peak memory of a step' if peak else 'memory kept for backward'}, BN = 1")
        right.tick_params(axis="y", labelleft=False)
    _legend(figure)
    title = "Shaded: less than native BatchNorm (FGN: GroupNorm; with ReLU: BatchNorm, then ReLU)"
    figure.suptitle(f"{title}\n{environment_line(results)}", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _legend(figure) -> None:
    found = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            found.setdefault(label, handle)
    labels = [name for name in (*COLORS, QUARTILES, WITHOUT, ROOFLINE) if name in found]
    handles = [found[name] for name in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
