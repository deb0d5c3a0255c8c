"""What runs measured while they trained (the group MEASURE), read back from their folders."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from fbn_plugin.engine.classification.run_folder import ClassificationRun, read_classification_run
from fbn_plugin.engine.run.logging import read_metrics

__all__ = ["MeasuredRun", "common_iterations", "medians", "read_measured_run"]


@dataclass(frozen=True)
class MeasuredRun:
    """A run and one group of what it measured.

    Args:
        name: short.
        run: its settings.
        iterations: finished ones, in order.
        curves: figure -> values at these, without the group's name; NaN where there is none.
    """

    name: str
    run: ClassificationRun
    iterations: list[int]
    curves: dict[str, list[float]]


def read_measured_run(folder: Path, name: str, group: str) -> MeasuredRun:
    """Read what a run measured.

    Args:
        folder: OUTPUT_DIR.
        name: short, for tables.
        group: ``"landscape"`` or ``"moments"``.

    Raises:
        FileNotFoundError, ValueError: it is no run folder of a classifier, or it has measured no such thing.
    """
    run = read_classification_run(folder)
    rows: dict[int, dict[str, float | None]] = {}
    for row in read_metrics(run.metrics_file):
        found = {key.partition("/")[2]: value for key, value in row.items() if key.startswith(f"{group}/")}
        if found:
            rows.setdefault(row["iteration"] + 1, {}).update(found)
    if not rows:
        raise ValueError(
            f"{folder} has no {group}/... in its metrics.json: nothing was measured, see MEASURE.{group.upper()}.PERIOD"
        )
    keys = dict.fromkeys(key for row in rows.values() for key in row)
    curves = {key: [_number(row.get(key)) for row in rows.values()] for key in keys}
    return MeasuredRun(name, run, list(rows), curves)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def common_iterations(runs: Sequence[MeasuredRun]) -> list[int]:
    """The iterations that all runs have measured, in order: over these they can be compared.

    Raises:
        ValueError: there is none.
    """
    shared = set(runs[0].iterations).intersection(*(run.iterations for run in runs))
    if not shared:
        names = ", ".join(run.name for run in runs)
        raise ValueError(f"{names} have no iteration in common at which all were measured")
    return sorted(shared)


def medians(run: MeasuredRun, names: Iterable[str], iterations: Iterable[int]) -> dict[str, float]:
    """The median of some curves over some iterations; NaN for one with a NaN among these, as the median of the rest
    would tell of a run that went better."""
    places = [run.iterations.index(iteration) for iteration in iterations]
    found = {name: [run.curves[name][place] for place in places] for name in names if name in run.curves}
    return {
        name: math.nan if name not in found or any(map(math.isnan, found[name])) else median(found[name])
        for name in names
    }
