"""Tables of classification runs: top-1, top-5 and loss by norm, mean ± deviation over seeds, and what a reader must
know to compare them: data, length, hardware, seeds, and the settings in which the runs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fbn_plugin.engine.classification.config import classification_config
from fbn_plugin.engine.classification.evaluation import CONDITIONAL
from fbn_plugin.engine.classification.run_folder import ClassificationRun
from fbn_plugin.engine.reports.seeds import (
    FILTERED,
    differing,
    either,
    either_of,
    hardware_of,
    paired_difference,
    registry_order,
    seeds_of,
    summary,
    with_deviation,
)
from fbn_plugin.engine.run.config import flatten

__all__ = ["ClassificationTable", "build_classification_tables"]

# Settings that may be otherwise in runs that are averaged: they change what is written and when, or the speed.
_NO_EFFECT = (
    "MODEL.DEVICE",
    "MODEL.CHANNELS_LAST",
    "MODEL.COMPILE",
    "MODEL.GRAD_CHECKPOINTING",
    "MODEL.WEIGHTS",
    "CUDNN_BENCHMARK",
    "DATALOADER.NUM_WORKERS",
    "DATALOADER.IN_MEMORY",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.BEST_CHECKPOINT_METRIC",
    "TEST.EVAL_PERIOD",
    "TEST.EVAL_ITERATIONS",
    "LOGGERS",
    "NORM_STATS_PERIOD",
    *(f"MEASURE.{key}" for key, _ in flatten(classification_config().MEASURE)),
)
_OF_THE_RUN = ("SEED", "OUTPUT_DIR", "MODEL.NORM")

_TITLES = {"top1": "top-1 (%)", "top5": "top-5 (%)", "loss": "loss"}


@dataclass(frozen=True)
class Row:
    """Runs of one norm and setting.

    Args:
        label: what the row is called.
        norm: of the runs.
        runs: by seed.
        finished: iterations behind each run's figures; None where its weights do not tell.
        figures: of each run's last evaluation.
    """

    label: str
    norm: str
    runs: list[ClassificationRun]
    finished: list[int | None]
    figures: list[dict[str, float]]

    @property
    def base(self) -> str:
        """The norm's name without options."""
        return self.norm.partition("(")[0]

    def values(self, name: str) -> list[float]:
        """A figure of the runs that have it."""
        return [figures[name] for figures in self.figures if name in figures]

    def by_seed(self) -> dict[int, dict[str, float]]:
        """Seed -> figures, of seeds that are there once."""
        seeds = [run.seed for run in self.runs]
        return {seed: each for seed, each in zip(seeds, self.figures) if seeds.count(seed) == 1}


@dataclass(frozen=True)
class ClassificationTable:
    """The runs on one set of images.

    Args:
        title: of the set.
        lines: by norm.
    """

    title: str
    lines: list[Row]

    @property
    def metrics(self) -> list[str]:
        """The figures that there are: those of the validation first."""
        found = dict.fromkeys(name for row in self.lines for figures in row.figures for name in figures)
        return sorted(
            found,
            key=lambda name: (name.count("/"), name.rpartition("/")[0], [*_TITLES, _last(name)].index(_last(name))),
        )

    def rows(self) -> list[list[str]]:
        """Rows of text, header first."""
        header = ["norm", "runs", *(_title(name) for name in self.metrics)]
        body = []
        for row in self.lines:
            cells = []
            for name in self.metrics:
                values = row.values(name)
                text = with_deviation(values, _digits(name)) if values else "-"
                cells.append(text if len(values) in (0, len(row.runs)) else f"{text} (n = {len(values)})")
            body.append([row.label, str(len(row.runs)), *cells])
        return [header, *body]

    def notes(self) -> list[str]:
        """Sentences to stand below: what was run, on what, and how far the figures can be compared."""
        runs = [run for row in self.lines for run in row.runs]
        batches = either_of((run.config["SOLVER.IMS_PER_BATCH"] for run in runs), "image")
        lines = [
            f"{either(run.config['MODEL.NAME'] for run in runs)}; trained on {_images(runs, 'train_images')}, "
            f"evaluated on {_images(runs, 'test_images')}.",
            f"{batches} a batch; figures after {_iterations(self.lines)}.",
            f"Hardware: {either(hardware_of(run.info) for run in runs)}.",
            *(f"{row.label}: {seeds_of(row.runs)}." for row in self.lines),
            *(f"{run.folder} is an evaluation of weights from elsewhere." for run in runs if run.is_evaluation),
        ]
        metrics = [run.config["SOLVER.BEST_CHECKPOINT_METRIC"] for run in runs if not run.is_evaluation]
        if metrics and any(name.startswith("test/") for name in self.metrics):
            chosen = either(f"the best in validation by {metric}" if metric else "the last" for metric in metrics)
            lines.append(f"Test figures are of the weights that were {chosen}.")
        if marked := [row.label for row in self.lines if row.runs[0].conditional]:
            lines.append(f"{', '.join(marked)}: {CONDITIONAL}.")
        if any(len(row.runs) > 1 for row in self.lines):
            lines.append("Of several runs: mean ± sample standard deviation; n where not all runs have the figure.")
        if other := differing([_settings(run) for run in runs]):
            told = "; ".join(f"{key} {either(values)}" for key, values in other.items())
            lines.append(f"The configs differ in more than norm, seed and output folder: {told}.")
        return [*lines, *self.comparisons()]

    def comparisons(self) -> list[str]:
        """A sentence for each filtered norm beside its plain one, where both have runs with the same seeds."""
        lines = []
        for filtered in self.lines:
            for plain in self.lines:
                if plain.base == FILTERED.get(filtered.base) and _same_setting(plain.runs[0], filtered.runs[0]):
                    lines += _comparison(plain, filtered)
        return lines

    def as_json(self) -> dict[str, Any]:
        """The table as plain data."""
        rows = [
            {
                "label": row.label,
                "norm": row.norm,
                "conditional": row.runs[0].conditional,
                "metrics": {name: summary(row.values(name)) for name in self.metrics},
                "runs": [
                    {
                        "folder": str(run.folder),
                        "seed": run.seed,
                        "iterations": finished,
                        "images_per_batch": run.config["SOLVER.IMS_PER_BATCH"],
                        "hardware": run.info.get("hardware"),
                        "processes": run.info.get("processes"),
                    }
                    for run, finished in zip(row.runs, row.finished)
                ],
            }
            for row in self.lines
        ]
        return {"framework": "classification", "dataset": self.title, "rows": rows, "notes": self.notes()}


def build_classification_tables(
    runs: Sequence[ClassificationRun], labels: Mapping[Path, str] | None = None
) -> list[ClassificationTable]:
    """Put runs into tables: one for each set of images, a row for each norm and setting.

    Args:
        runs: run folders, none twice.
        labels: folder of a run -> the row to put it in, in place of its norm's.

    Raises:
        FileNotFoundError, ValueError: a run without an evaluation, or a label that joins norms.
    """
    groups: dict[str, list[ClassificationRun]] = {}
    for run in runs:
        groups.setdefault(run.title, []).append(run)
    return [ClassificationTable(title, _rows(members, labels or {})) for title, members in groups.items()]


def _rows(runs: Sequence[ClassificationRun], labels: Mapping[Path, str]) -> list[Row]:
    found: dict[str, list[list[ClassificationRun]]] = {}  # label -> the runs of each setting
    for run in runs:
        settings = found.setdefault(labels.get(run.folder, run.norm), [])
        same = [other for other in settings if run.folder in labels or _same_setting(run, other[0])]
        if same:
            same[0].append(run)
        else:
            settings.append([run])
    rows = []
    for label, settings in found.items():
        told = _told_apart([members[0] for members in settings])
        for members, more in zip(settings, told):
            if other := [run for run in members if run.norm != members[0].norm]:
                raise ValueError(f"label {label!r} would average {members[0].norm} and {other[0].norm}")
            members = sorted(members, key=lambda run: run.seed)
            evaluations = [run.last_evaluation() for run in members]
            finished, figures = ([*each] for each in zip(*evaluations))
            rows.append(Row(", ".join([label, *more]), members[0].norm, members, finished, figures))
    return sorted(rows, key=lambda row: registry_order(row.base, row.label))


def _told_apart(runs: Sequence[ClassificationRun]) -> list[list[str]]:
    """What each of the settings of one norm has otherwise: up to three keys, or their number."""
    keys = differing([_settings(run) for run in runs])
    if len(keys) > 3:
        return [[f"setting {number}"] for number in range(1, len(runs) + 1)]
    return [[f"{key} {values[number]}" for key, values in keys.items()] for number in range(len(runs))]


def _settings(run: ClassificationRun) -> dict[str, Any]:
    left_out = {*_OF_THE_RUN, *_NO_EFFECT}
    if run.config["DATASETS.VAL_SHARE"]:  # it chooses the weights that the test set measures
        left_out.discard("SOLVER.BEST_CHECKPOINT_METRIC")
    if run.config["TEST.MOMENTS"] == "population":
        left_out.add("TEST.IMS_PER_BATCH")
    return {key: value for key, value in run.config.items() if key not in left_out}


def _same_setting(run: ClassificationRun, other: ClassificationRun) -> bool:
    return run.is_evaluation == other.is_evaluation and not differing([_settings(run), _settings(other)])


def _comparison(plain: Row, filtered: Row) -> list[str]:
    first, second = plain.by_seed(), filtered.by_seed()
    seeds = sorted(first.keys() & second.keys())
    parts = []
    for name in ("top1", "loss"):
        pairs = [
            (first[seed][name], second[seed][name]) for seed in seeds if name in first[seed] and name in second[seed]
        ]
        if pairs:
            parts.append(f"{_TITLES[name].partition(' ')[0]} {paired_difference(pairs, _digits(name))}")
    if not parts:
        return []
    caution = "" if len(seeds) > 1 else "; one pair of runs does not tell a difference from chance"
    return [f"{filtered.label} minus {plain.label}, seed by seed (n = {len(seeds)}): {'; '.join(parts)}{caution}."]


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _title(name: str) -> str:
    group, _, figure = name.rpartition("/")
    groups = {"": "", "ema": "averaged weights, ", "test": "test, "}
    return groups.get(group, f"{group}, ") + _TITLES.get(figure, figure)


def _digits(name: str) -> int:
    return 4 if _last(name) in ("loss", "beyond5") else 2


def _images(runs: Sequence[ClassificationRun], which: str) -> str:
    counts = [count for run in runs for count in run.info.get(which, {}).values()]
    return either_of(counts, "image") if counts else "a number of images that is not recorded"


def _iterations(lines: Sequence[Row]) -> str:
    known = sorted({finished for row in lines for finished in row.finished if finished is not None})
    return either_of(known, "iteration") if known else "iterations that the weights do not tell"
