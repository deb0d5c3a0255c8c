"""Results as tables: how much longer than native batch normalization, for each shape and for whole models; and what of
the targets is met."""

import statistics
from collections.abc import Iterable, Mapping, Sequence

from fbn_plugin.engine.benchmark.targets import target_table
from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run.cli import format_table


def shape_text(row: Mapping) -> str:
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
                    memory_bytes(row["peers"][name]) / memory_bytes(row["peers"][found[0]["to"]])
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
        cells = [shape_text(row), row["layout"], _outliers(row)]
        cells += [f"{row['peers'][name]['ms'][1]:.3g}" for name in baselines]
        roofline = [f"{ms:.3g}" for ms in row["roofline_ms"].values()]
        table.append([*cells, " - ".join(roofline), *(_ratio(row["peers"].get(name)) for name in others)])
    return table


def memory_bytes(peer: Mapping) -> int:
    return peer.get("peak_bytes", peer["saved_bytes"])


def model_table(rows: Sequence[Mapping]) -> list[list[str]]:
    """Rows of text, header first: training steps, one peer a row."""
    kind = "peak" if any("peak_bytes" in peer for row in rows for peer in row["peers"].values()) else "saved"
    table = [["model", "images", "layout", "dtype", "norm", "step [ms]", "ratio to BN", f"{kind} [MiB]", "to BN"]]
    for row in rows:
        images = "x".join(map(str, (row["batch"], *row["image"])))
        for name, peer in row["peers"].items():
            memory = memory_bytes(peer), memory_bytes(row["peers"]["BN"])
            cells = [row["model"], images, row["layout"], row["dtype"], name, f"{peer['ms'][1]:.4g}"]
            low, middle, high = peer["ratio"]
            cells += [f"{middle:.3f} ({low:.3f}-{high:.3f})", f"{memory[0] / 2**20:.0f}"]
            table.append([*cells, f"{memory[0] / memory[1]:.3f}"])
    return table


def environment_line(results: Mapping) -> str:
    """The machine and the versions, in words."""
    facts, settings = results["environment"], results["settings"]
    if not facts:
        return "unknown machine"
    parts = [facts["gpu"]] if settings["device"] == "cuda" else [facts["cpu"], counted(facts["threads"], "thread")]
    parts += [f"{name} {facts[name]}" for name in ("torch", "fbn_plugin", "python") if facts.get(name)]
    parts += [facts["date"], *(["QUICK RUN, the figures mean nothing"] if settings["quick"] else [])]
    return ", ".join(parts)


def host_table(rows: Sequence[Mapping]) -> list[list[str]]:
    """Rows of text, header first: microseconds that a small layer keeps the host, one peer a row."""
    table = [["layer", "layers in a row", "pass", "norm", "host [us]", "to", "ratio"]]
    for row in rows:
        for name, peer in row["peers"].items():
            cells = [shape_text(row), str(row["depth"]), row["pass"], name, f"{1e3 * peer['ms'][1]:.1f}"]
            table.append([*cells, peer["to"], _ratio(peer)])
    return table


def compiled_table(rows: Sequence[Mapping]) -> list[list[str]]:
    """Rows of text, header first: compiled training steps, one peer a row."""
    table = [["model", "images", "layout", "dtype", "norm", "step [ms]", "ratio to BN", "compile [s]"]]
    for row in rows:
        images = "x".join(map(str, (row["batch"], *row["image"])))
        for name, peer in row["peers"].items():
            cells = [row["model"], images, row["layout"], row["dtype"], name, f"{peer['ms'][1]:.4g}", _ratio(peer)]
            table.append([*cells, f"{peer['compile_seconds']:.0f}"])
    return table


def first_step_table(rows: Sequence[Mapping]) -> list[list[str]]:
    """Rows of text, header first: seconds of the first step of a process."""
    table = [["model", "BN [s]", "FBN, cold cache [s]", "FBN, warm cache [s]"]]
    for row in rows:
        cells = (", ".join(f"{value:.2f}" for value in row["seconds"][kind]) for kind in ("BN", "cold", "warm"))
        table.append([row["model"], *cells])
    return table


def checks_line(rows: Sequence[Mapping]) -> str:
    """How many checks have passed, in words."""
    passed = sum(row["passed"] for row in rows)
    backends = sorted({row["backend"] for row in rows if "backend" in row})
    return f"{passed} of {len(rows)} checks passed ({'; '.join(backends) or 'no backend answered'})."


def markdown(*files: Mapping) -> str:
    """Results, of one run or of several, as a page of Markdown, with the targets at its end; without any, the targets
    alone."""
    parts = [part for results in files for part in _parts(results)]
    quick = ["A quick run counts as not measured."] if any(each["settings"]["quick"] for each in files) else []
    return "\n\n".join([*parts, "### Targets", format_table(target_table(files)), *quick]) + "\n"


def _parts(results: Mapping) -> list[str]:
    timed = [*results["layers"], *results["models"], *results["host"], *results["compiled"]]
    rounds = [peer["rounds"] for row in timed for peer in row["peers"].values()]
    parts = [f"{environment_line(results)}; {min(rounds)}-{max(rounds)} rounds a row." if rounds else "No rows."]
    if results["checks"]:
        parts += ["### Checks", checks_line(results["checks"])]
    if results["layers"]:
        parts += ["### Layers: ratios of time, over all rows", format_table(summary_table(results))]
        for (which, dtype), rows in _kinds(results["layers"]).items():
            title = f"### Layers, {which}, {dtype}: medians (quartiles)"
            parts += [title, format_table(layer_table(rows))]
        parts.append(
            "Roofline: what BN and FBN must move (3 and 4 tensor sizes forward, 8 and 9 with backward; kernels that "
            "keep their data on a GPU's chip 2 and 5), at the bandwidth of a copy of the same tensor in the same "
            "rounds."
        )
    if results["models"]:
        parts += ["### One training step", format_table(model_table(results["models"]))]
        parts.append(
            "Memory: on a GPU the most that is allocated beyond what is there before (peak), on a CPU what autograd "
            "keeps for the backward pass (saved)."
        )
    tables = {
        "host": ("Host", host_table),
        "compiled": ("One compiled training step", compiled_table),
        "first_steps": ("First step of a process", first_step_table),
    }
    for kind, (title, table) in tables.items():
        if results[kind]:
            parts += [f"### {title}", format_table(table(results[kind]))]
    return parts + [f"Note: {note}." for note in results["notes"]]
