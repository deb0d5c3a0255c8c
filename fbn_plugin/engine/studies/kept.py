"""Studies that are kept with the project: of each that has ended one JSON file below ``benchmarks/papers``, from which
the same report can be written again, and ``docs/results`` is.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fbn_plugin.engine.files.words import counted, shown
from fbn_plugin.engine.studies.figures import curve_value, drawn_curves
from fbn_plugin.engine.studies.layer_figures import KERNELS, LAYERS, first_measured
from fbn_plugin.engine.studies.outcomes import Metric, Outcome, Study, read_outcomes, write_outcomes
from fbn_plugin.engine.studies.scales import folder_name

__all__ = ["KEPT", "keep_again", "keep_study", "kept_file", "thinned"]

# Where they lie, from the project's root.
KEPT = Path("benchmarks", "papers")


def kept_file(root: str | os.PathLike, file: str | os.PathLike, scale: str) -> Path:
    """Where a study file's figures at a scale are kept.

    Examples::

        >>> kept_file("", "configs/experiments/p0_fig5.yaml", "cpu").as_posix()
        'benchmarks/papers/p0_fig5-cpu.json'
    """
    return Path(root) / KEPT / f"{folder_name(file, scale)}.json"


def keep_study(study: Study, outcomes: Sequence[Outcome], target: str | os.PathLike) -> Path:
    """Write a study that has ended into a file that is small enough to be kept.

    Args:
        study: at a scale other than ``smoke``.
        outcomes: of all of its jobs; those that failed stay failed.
        target: the file; its folder is made.

    Raises:
        ValueError: jobs are still to end, or the scale says nothing.
        WriteError: the file cannot be written.
    """
    if study.scale == "smoke":
        raise ValueError("the smoke scale shows that an experiment runs, and its figures are not kept")
    jobs = len(study.variants) * len(set(study.seeds))
    if left := jobs - sum(each.state in ("done", "failed") for each in outcomes):
        ended = f"{left} of {counted(jobs, 'job')} are still to end, and a study is kept when all have ended"
        raise ValueError(f"{study.heading}: {ended}")
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_outcomes(target, study, thinned(study, outcomes), is_packed=True)
    return target


def keep_again(study: Study, target: str | os.PathLike) -> Path:
    """Write a kept study anew with what its file says now of the same jobs: title, comparisons, claims, and of the
    metrics those that are still wanted.

    Args:
        study: as the file has it now.
        target: the kept file.

    Raises:
        OSError, ValueError: there is no such file, or its jobs are others than the study's; nothing is written then.
        WriteError: the file cannot be written.
    """
    if not Path(target).exists():
        raise FileNotFoundError(f"{study.heading}: nothing is kept of it, {target} is not there")
    kept, outcomes = read_outcomes(target)
    where = f"{study.heading}: the jobs in {target} cannot be kept again"
    for what in ("tool", "base", "settings", "variants", "seeds", "seed_rule"):
        if getattr(kept, what) != getattr(study, what):
            name, then, now = _first_difference(what.replace("_", " "), getattr(kept, what), getattr(study, what))
            said = f"{shown(then, 80)} then, {shown(now, 80)} in the study file now"
            raise ValueError(f"{where}: {name}: {said}")
    for name, metric in study.metrics.items():
        if name not in kept.metrics or _picked(kept.metrics[name]) != _picked(metric):
            raise ValueError(f"{where}, as nothing was kept of {name!r} as the study file has it")
    if missing := [name for name in study.curve_rows if name not in kept.curve_rows]:
        raise ValueError(f"{where}, as nothing was kept of {missing[0]!r} as the study file has it")
    return keep_study(study, outcomes, target)


def _first_difference(name: str, then: Any, now: Any) -> tuple[str, Any, Any]:
    """Of two values that differ what differs first: of mappings one key, with None where it is not there."""
    if not isinstance(then, dict) or not isinstance(now, dict):
        return name, then, now
    key = next(key for key in [*then, *now] if then.get(key) != now.get(key) or (key in then) != (key in now))
    return f"{name} {key!r}", then.get(key), now.get(key)


def _picked(metric: Metric) -> tuple[str, str, float | None]:
    """How a figure is taken from a run."""
    return metric.row, metric.of, metric.threshold


def thinned(study: Study, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes with as much as a report draws: of curves at most 60 points, to six digits, and each run's last one;
    of measured layers and kernels those of the first run of each variant, and no figures but those of the study's
    metrics."""
    places = {
        (variant, name): set(drawn_curves(study, outcomes, variant, name)[0])
        for variant in study.variants
        for name in study.curve_rows
    }
    first = {what: first_measured(outcomes, what) for what in (LAYERS, KERNELS)}
    found = []
    for each in outcomes:
        measured = {what: getattr(each, what) if runs.get(each.variant) is each else [] for what, runs in first.items()}
        curves = {
            name: [(at, curve_value(y)) for at, y in curve if at in places[each.variant, name] or at == curve[-1][0]]
            for name, curve in each.curves.items()
            if each.state == "done" and name in study.curve_rows
        }
        metrics = {name: figure for name, figure in each.metrics.items() if name in study.metrics}
        found.append(dataclasses.replace(each, metrics=metrics, curves=curves, **measured))
    return found
