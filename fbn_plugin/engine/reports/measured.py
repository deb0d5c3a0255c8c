"""What loss landscapes and distances of moments are written as: tables, JSON and the papers' figures, of runs that
measured them while they trained, and of checkpoints."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from fbn_plugin.analysis.landscape import Landscape
from fbn_plugin.analysis.moments import Distances, flat_distances
from fbn_plugin.analysis.pictures import draw_distances, draw_landscapes, draw_moments, draw_steps
from fbn_plugin.engine.classification.measured_checkpoints import Measured
from fbn_plugin.engine.classification.measured_runs import MeasuredRun, common_iterations, medians
from fbn_plugin.engine.files.disk import atomic_write, writing
from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run.config import flatten
from fbn_plugin.engine.run.run_info import hardware, package_versions
from fbn_plugin.engine.run.source import source_commit

__all__ = ["figure_rows", "landscape_report", "moment_report", "run_landscapes", "run_moments", "write_measured"]

Report = tuple[dict[str, Any], bytes, dict[str, dict[str, float]]]

_SHOWN = {
    "landscape": ("loss", "loss_range", "gradient_norm", "gradient_max", "smoothness"),
    "moments": ("mean", "var", "relative_mean", "relative_var", "own_mean", "own_var"),
}


def run_landscapes(runs: Sequence[MeasuredRun]) -> Report:
    """Landscapes along the training of runs.

    Returns:
        what ``landscape.json`` has, the figure, and of each run the medians of its figures over the iterations that all
        runs have measured.

    Raises:
        ValueError: there is none.
    """
    common = common_iterations(runs)
    found = {run.name: medians(run, _SHOWN["landscape"], common) for run in runs}
    entries = [
        {**_of_run(run), "iterations": run.iterations, "curves": run.curves, "medians": found[run.name]} for run in runs
    ]
    curves = {run.name: {"iteration": run.iterations, **run.curves} for run in runs}
    record = {"over": _medians_over(common), "entries": entries}
    return record, draw_landscapes(curves, _titles(run.run.title for run in runs)), found


def run_moments(runs: Sequence[MeasuredRun], layer: str | None = None) -> Report:
    """Distances of moments along the training of runs.

    Args:
        runs: in order.
        layer: the norm that the figure is of; None takes the means over all.

    Returns:
        what ``moments.json`` has, the figure, and of each run and norm the medians of its figures over the iterations
        that all runs have measured.

    Raises:
        ValueError: there is none, or a run has no such layer.
    """
    common = common_iterations(runs)
    prefix = "" if layer is None else f"{layer}/"
    drawn, found = {}, {}
    for run in runs:
        specs = _specs(run.curves, prefix)
        if not specs:
            layers = sorted({key.split("/")[0] for key in run.curves if key.count("/") == 2})
            raise ValueError(f"--layer must be one of {', '.join(layers)} for {run.name}, got {layer!r}")
        drawn[run.name] = {spec: {"iteration": run.iterations} for spec in specs}
        for spec in specs:
            names = {name: f"{prefix}{spec}/{name}" for name in _SHOWN["moments"]}
            drawn[run.name][spec] |= {name: run.curves[key] for name, key in names.items()}
            values = medians(run, names.values(), common)
            found[f"{run.name}, {spec}"] = {name: values[key] for name, key in names.items()}
    entries = [{**_of_run(run), "iterations": run.iterations, "curves": run.curves} for run in runs]
    place = "mean over layers and channels" if layer is None else f"{layer}, mean over channels"
    norms = list(dict.fromkeys(spec for curves in drawn.values() for spec in curves))
    note = f"{_titles(run.run.title for run in runs)}; {place}"
    record = {"layer": layer, "over": _medians_over(common), "entries": entries, "medians": found}
    return record, draw_moments(drawn, norms, note), found


def _specs(curves: Mapping[str, Sequence[float]], prefix: str) -> list[str]:
    """The norms that a layer, or with no prefix all layers together, have curves of."""
    names = [key.removeprefix(prefix) for key in curves if key.startswith(prefix)]
    return list(dict.fromkeys(name.split("/")[0] for name in names if name.count("/") == 1))


def landscape_report(measured: Sequence[Measured[Landscape]]) -> Report:
    """Landscapes at checkpoints; see :func:`run_landscapes`, with means over batches in the place of medians."""
    found = {each.checkpoint.name: _means([batch.figures() for batch in each.batches]) for each in measured}
    entries = [
        {
            **_of_checkpoint(each),
            "batches": [{**asdict(batch), **batch.figures()} for batch in each.batches],
            "means": found[each.checkpoint.name],
        }
        for each in measured
    ]
    drawn = {each.checkpoint.name: each.batches for each in measured}
    shown = {name: {key: figures[key] for key in _SHOWN["landscape"]} for name, figures in found.items()}
    record = {"over": _means_over(measured), "entries": entries}
    return record, draw_steps(drawn, _titles(each.title for each in measured)), shown


def moment_report(measured: Sequence[Measured[Distances]]) -> Report:
    """Distances of moments at checkpoints; see :func:`run_moments`, with means over batches in the place of medians."""
    entries, found, norms = [], {}, {}
    for each in measured:
        own = dict.fromkeys(next(iter(each.batches[0].values())))
        norms |= own
        figures = [flat_distances(batch) for batch in each.batches]
        means = _means(figures)
        entries.append({**_of_checkpoint(each), "batches": figures, "means": means})
        for spec in own:
            shown = {name: means[f"{spec}/{name}"] for name in _SHOWN["moments"]}
            found[f"{each.checkpoint.name}, {spec}"] = shown
    drawn = {each.checkpoint.name: each.batches for each in measured}
    note = f"{_titles(each.title for each in measured)}; mean over channels"
    record = {"over": _means_over(measured), "entries": entries}
    return record, draw_distances(drawn, list(norms), note), found


def _medians_over(iterations: Sequence[int]) -> str:
    return f"medians over {counted(len(iterations), 'iteration')}"


def _means_over(measured: Sequence[Measured]) -> str:
    return f"means over {counted(len(measured[0].batches), 'batch')}"


def _means(batches: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: fmean(batch[name] for batch in batches) for name in batches[0]}


def _titles(titles: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(titles))


def _of_run(run: MeasuredRun) -> dict[str, Any]:
    config = run.run.config
    return {"name": run.name, "folder": str(run.run.folder), "dataset": run.run.title, **_settings(config)}


def _of_checkpoint(measured: Measured) -> dict[str, Any]:
    checkpoint = measured.checkpoint
    place = {"weights": checkpoint.weights, "iteration": measured.iteration, "dataset": measured.title}
    return {"name": checkpoint.name, **place, **_settings(dict(flatten(checkpoint.cfg)))}


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": config["MODEL.NAME"],
        "norm": config["MODEL.NORM"] or "the model's own",
        "seed": config["SEED"],
        "images_per_batch": config["SOLVER.IMS_PER_BATCH"],
        "learning_rate": config["SOLVER.BASE_LR"],
    }


def figure_rows(found: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """A table for a terminal, header first."""
    names = list(next(iter(found.values())))
    return [["", *names], *([label, *(f"{figures[name]:.4g}" for name in names)] for label, figures in found.items())]


def write_measured(folder: Path, name: str, record: Mapping[str, Any], picture: bytes, command: str) -> None:
    """Write ``NAME.json`` and ``NAME.png``.

    Args:
        folder: is made where it is not there.
        name: of both files.
        record: for the first.
        picture: PNG.
        command: the command line.

    Raises:
        OSError: they cannot be written.
    """
    commit, dirty = source_commit() or (None, None)
    made = {
        "command": command,
        "commit": commit,
        "dirty": dirty,
        "hardware": hardware(),
        "versions": package_versions(),
    }
    with writing(folder):
        os.makedirs(folder, exist_ok=True)
    text = json.dumps(_without_nan({**record, **made, "versions": package_versions()}), indent=1)
    atomic_write(folder / f"{name}.json", f"{text}\n".encode())
    atomic_write(folder / f"{name}.png", picture)


def _without_nan(value: Any) -> Any:
    """With null for what is not finite, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
