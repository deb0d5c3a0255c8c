"""Tables and a picture of the results of :mod:`fbn_plugin.engine.benchmark`: how much longer than native batch
normalization, for each shape and for whole models."""

import io
import statistics
from collections.abc import Iterable, Mapping, Sequence

from fbn_plugin.engine.cli import format_table

# Colour-blind safe; filtered ones in blue and green, what they replace in grey, naive ones in red.
COLORS = {
    "FBN T=2": "#88bbee",
    "FBN T=5": "#3366aa",
    "FBN+ReLU fused": "#aa3377",
    "FBN, ReLU": "#66ccbb",
    "FGN T=2": "#99cc77",
    "FGN T=5": "#228833",
    "GN": "#aaaaaa",
    "no norm": "#aaaaaa",
    "compiled naive FBN": "#eeaa66",
    "naive FBN": "#ee6677",
}
LIGHT = ("FBN T=2", "FBN, ReLU", "FGN T=2", "GN", "no norm", "compiled naive FBN")
QUARTILES, WITHOUT, ROOFLINE = "quartiles", "without outliers", "BN's traffic at copy bandwidth"
# Bars beyond are cut; their figure says how long they are.
LIMIT = 1.75


def _shape(row: Mapping) -> str:
    return "x".join(map(str, row["shape"]))


def _outliers(row: Mapping) -> str:
    return f"{row['outliers']:.0e}".replace("e-0", "e-") if row["outliers"] else "none"


def _names(rows: Iterable[Mapping]) -> list[str]:
    """The peers of the rows, each once, in their order."""
    return list(dict.fromkeys(name for row in rows for name in row["peers"]))


def _ratio(peer: Mapping | None) -> str:
    if peer is None:
        return "-"
    low, middle, high = peer["ratio"]
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def _kinds(rows: Sequence[Mapping]) -> dict[tuple[str, str], list[Mapping]]:
    """Rows by pass, forward+backward first, and dtype."""
    kinds: dict[tuple[str, str], list[Mapping]] = {}
    for row in sorted(rows, key=lambda row: row["pass"] == "forward"):
        kinds.setdefault((row["pass"], row["dtype"]), []).append(row)
    return kinds


def summary_table(results: Mapping) -> list[list[str]]:
    """Rows of text, header first: each peer's median, best and worst row of layers, and its median ratio of
    memory."""
    table = [["pass", "dtype", "ratio", "median row", "best row", "worst row", "memory", "rows"]]
    for (which, dtype), rows in _kinds(results["layers"]).items():
        for name in _names(rows):
            found = [row["peers"][name] for row in rows if name in row["peers"]]
            if found[0]["to"] != name:
                ratios = [peer["ratio"][1] for peer in found]
                values = (statistics.median(ratios), min(ratios), max(ratios))
                cells = [which, dtype, f"({name}) / ({found[0]['to']})", *(f"{value:.2f}" for value in values)]
                memory = [
                    _memory(row["peers"][name]) / _memory(row["peers"][found[0]["to"]])
                    for row in rows
                    if name in row["peers"] and which == "forward+backward"
                ]
                table.append([*cells, f"{statistics.median(memory):.2f}" if memory else "-", str(len(ratios))])
    return table


def layer_table(rows: Sequence[Mapping]) -> list[list[str]]:
    """Rows of text, header first: medians and quartiles of the ratios of layers of one pass and dtype."""
    baselines = [name for name in _names(rows) if any(p["to"] == name for row in rows for p in row["peers"].values())]
    others = {name: row["peers"][name]["to"] for row in rows for name in row["peers"]}
    others = {name: to for name, to in others.items() if name != to}
    header = ["shape", "layout", "outliers", *(f"{name} [ms]" for name in baselines), "roofline [ms]"]
    table = [header + [f"({name}) / ({to})" for name, to in others.items()]]
    for row in rows:
        cells = [_shape(row), row["layout"], _outliers(row)]
        cells += [f"{row['peers'][name]['ms'][1]:.3g}" for name in baselines]
        roofline = [f"{ms:.3g}" for ms in row["roofline_ms"].values()]
        table.append([*cells, " - ".join(roofline), *(_ratio(row["peers"].get(name)) for name in others)])
    return table


def _memory(peer: Mapping) -> int:
    return peer.get("peak_bytes", peer["saved_bytes"])


def model_table(rows: Sequence[Mapping]) -> list[list[str]]:
    """Rows of text, header first: training steps, one peer a row."""
    kind = "peak" if any("peak_bytes" in peer for row in rows for peer in row["peers"].values()) else "saved"
    table = [["model", "images", "layout", "dtype", "norm", "step [ms]", "ratio to BN", f"{kind} [MiB]", "to BN"]]
    for row in rows:
        images = "x".join(map(str, (row["batch"], *row["image"])))
        for name, peer in row["peers"].items():
            memory = _memory(peer), _memory(row["peers"]["BN"])
            cells = [row["model"], images, row["layout"], row["dtype"], name, f"{peer['ms'][1]:.4g}"]
            low, middle, high = peer["ratio"]
            cells += [f"{middle:.3f} ({low:.3f}-{high:.3f})", f"{memory[0] / 2**20:.0f}"]
            table.append([*cells, f"{memory[0] / memory[1]:.3f}"])
    return table


def environment_line(results: Mapping) -> str:
    """The machine and the versions, in words."""
    facts, settings = results["environment"], results["settings"]
    parts = [facts["gpu"]] if settings["device"] == "cuda" else [facts["cpu"], f"{facts['threads']} threads"]
    parts += [f"{name} {facts[name]}" for name in ("torch", "fbn_plugin", "python") if facts.get(name)]
    parts += [facts["date"], *(["QUICK RUN, the figures mean nothing"] if settings["quick"] else [])]
    return ", ".join(parts)


def markdown(results: Mapping) -> str:
    """All results as a page of Markdown."""
    rounds = [peer["rounds"] for row in results["layers"] + results["models"] for peer in row["peers"].values()]
    parts = [f"{environment_line(results)}; {min(rounds)}-{max(rounds)} rounds a row." if rounds else "No rows."]
    if results["layers"]:
        parts += ["### Layers: ratios of time, over all rows", format_table(summary_table(results))]
        for (which, dtype), rows in _kinds(results["layers"]).items():
            title = f"### Layers, {which}, {dtype}: medians (quartiles)"
            parts += [title, format_table(layer_table(rows))]
        parts.append(
            "Roofline: what BN and FBN must move (3 and 4 tensor sizes forward, 8 and 9 with backward), at the "
            "bandwidth of a copy of the same tensor in the same rounds."
        )
    if results["models"]:
        parts += ["### One training step", format_table(model_table(results["models"]))]
    parts.append(
        "Memory: on a GPU the most that is allocated beyond what is there before (peak), on a CPU what autograd keeps "
        "for the backward pass (saved)."
    )
    return "\n\n".join(parts + [f"Note: {note}." for note in results["notes"]]) + "\n"


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
    shapes = list(dict.fromkeys(_shape(row) for row in rows))
    for position, shape in enumerate(shapes):
        first, *rest = sorted((row for row in rows if _shape(row) == shape), key=lambda row: -row["outliers"])
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
        memory = {name: _memory(peer) / _memory(row["peers"]["BN"]) for name, peer in others.items()}
        memories.append((label, {name: {"value": m, "low": m, "high": m} for name, m in memory.items()}))
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
    layouts, dtypes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("layout", "dtype"))
    bars = len({_shape(row) for row in rows}) * len(_names(rows))
    heights = [0.9 + 0.155 * bars] * len(dtypes)
    if results["models"]:
        heights.append(0.9 + 0.75 * len(results["models"]))
    figure = Figure(figsize=(11, sum(heights) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    for line, dtype in enumerate(dtypes):
        panels = grid[line].subgridspec(1, len(layouts)).subplots(squeeze=False)[0]
        for axes, layout in zip(panels, layouts):
            _bars(axes, *_layer_groups([row for row in rows if (row["layout"], row["dtype"]) == (layout, dtype)]))
            axes.set_title(f"layer, {dtype}, {layout}", fontsize=10, loc="left")
            axes.set_xlabel("forward + backward time, native = 1")
            axes.tick_params(axis="y", labelleft=axes is panels[0])
    if results["models"]:
        times, memories = _model_groups(results["models"])
        left, right = grid[len(dtypes)].subgridspec(1, 2).subplots()
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
