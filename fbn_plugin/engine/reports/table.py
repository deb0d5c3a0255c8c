"""Tables of AP from run folders: Table I of the paper with its printed figures beside ours, one with all six APs, and
what a reader must know to compare them: data, length, hardware, seeds, and the settings in which the runs differ."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fbn_plugin.engine.data.coco_eval import no_detections
from fbn_plugin.engine.files.words import counted
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
from fbn_plugin.engine.run.detection_keys import detection_config
from fbn_plugin.engine.run.evaluation_names import METRICS
from fbn_plugin.engine.run.run_folder import NORM_KEYS, Run, norm_label
from fbn_plugin.frameworks.detectron2_keys import KEYS

__all__ = ["PAPER_AP", "PAPER_SOURCE", "Column", "Table", "build_tables", "paper_table"]

PAPER_SOURCE = "Horváth and Al-afandi, Filtered Batch Normalization, ICPR 2020, Table I"

# (task, iterations at two images a batch) -> norm -> AP and AP50 in percent, as printed.
PAPER_AP = {
    ("segm", 50_000): {"BN": (23.87, 44.56), "FBN": (25.41, 45.42)},
    ("segm", 100_000): {"BN": (26.86, 45.55), "FBN": (27.34, 52.40)},
    ("segm", 150_000): {"BN": (28.66, 51.80), "FBN": (34.15, 55.43)},
    ("segm", 270_000): {"BN": (36.47, 58.07), "FBN": (37.06, 58.92)},
    ("bbox", 50_000): {"BN": (23.63, 41.90), "FBN": (27.86, 47.84)},
    ("bbox", 100_000): {"BN": (28.16, 48.43), "FBN": (28.74, 49.65)},
    ("bbox", 150_000): {"BN": (30.53, 50.79), "FBN": (34.24, 53.13)},
    ("bbox", 270_000): {"BN": (40.01, 61.32), "FBN": (41.12, 61.71)},
}
_PAPER_NORMS = ("BN", "FBN")  # "FBN" is T_sigma = 5, the paper's and the default
_PAPER_ITERATIONS = sorted({iterations for _, iterations in PAPER_AP})
_PAPER_IMAGES = 2  # a batch
_TASKS = ("segm", "bbox")  # in the paper's order

_PAPER_DATA = (["coco_2017_train"], "coco_2017_val")
_PAPER_BACKBONE = "ResNeXt-101 32x8d"
_BACKBONE_KEYS = tuple(f"MODEL.RESNETS.{key}" for key in ("DEPTH", "NUM_GROUPS", "WIDTH_PER_GROUP"))

# This project's configs of Table I, configs/COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_{BN,FBN}.yaml, where
# they are not detectron2's defaults. The paper gives backbone, images a batch and iterations, and no more.
_PAPER_SETTINGS = {
    "MODEL.WEIGHTS": "detectron2://ImageNetPretrained/FAIR/X-101-32x8d.pkl",
    "MODEL.MASK_ON": True,
    "MODEL.PIXEL_STD": [57.375, 57.120, 58.395],
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RESNETS.NUM_GROUPS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.DEPTH": 101,
    "INPUT.MIN_SIZE_TRAIN": [640, 672, 704, 736, 768, 800],
    "SOLVER.BASE_LR": 0.0025,
    "SOLVER.STEPS": [210_000, 250_000],
}

# Of these, what makes a run smaller than the paper's, not only another.
_SIZE_KEYS = (
    "MODEL.FPN.OUT_CHANNELS",
    "MODEL.ROI_BOX_HEAD.FC_DIM",
    "MODEL.ROI_MASK_HEAD.CONV_DIM",
    "INPUT.MIN_SIZE_TEST",
)

# Of these, what the linear rule scales with the images of a batch.
_RATE_KEY, _SCHEDULE_KEYS = "SOLVER.BASE_LR", ("SOLVER.STEPS", "SOLVER.WARMUP_ITERS")

# Settings that may be otherwise in runs that are averaged: they change what is written and when, not what is learned.
_NO_EFFECT = (
    "MODEL.DEVICE",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.BEST_CHECKPOINT_METRIC",
    "TEST.EVAL_PERIOD",
    "TEST.EVAL_ITERATIONS",
    "TEST.EXPECTED_RESULTS",
    "NORM_STATS_PERIOD",
    *(key for key in KEYS if key.startswith("MEASURE.")),
    "VIS_PERIOD",
)

# What is not compared with the paper's setting key by key: it has no effect, or stands in the table or in a sentence of
# its own. Whether evaluation used moving averages or PRECISE_BN's statistics, the paper does not say; both will do.
_NOT_COMPARED = (
    *_NO_EFFECT,
    *_BACKBONE_KEYS,
    "MODEL.RESNETS.NORM",
    "DATASETS.TRAIN",
    "DATASETS.TEST",
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.MAX_ITER",
    "SOLVER.REFERENCE_WORLD_SIZE",
    "TEST.PRECISE_BN.ENABLED",
    "TEST.PRECISE_BN.NUM_ITER",
    "CUDNN_BENCHMARK",
    "OUTPUT_DIR",
    "SEED",
    "VERSION",
)


def _at_two_images(run: Run, iterations: int) -> int:
    """Iterations that see as many images at the paper's two images a batch; the paper's own where they were rounded."""
    for printed in _PAPER_ITERATIONS:
        if iterations == round(printed * _PAPER_IMAGES / run.images_per_batch):
            return printed
    return round(iterations * run.images_per_batch / _PAPER_IMAGES)


def _reductions(run: Run, test_set: str) -> list[str]:
    """In what a run is less than the paper's; empty for one of full size."""
    found = []
    train_sets = run.config["DATASETS.TRAIN"]
    if (train_sets, test_set) != _PAPER_DATA:
        found.append(f"data {', '.join(train_sets)} and {test_set} in place of COCO 2017")
    iterations = _at_two_images(run, run.max_iter)
    if iterations < _PAPER_ITERATIONS[-1]:
        found.append(f"{iterations:,} of {_PAPER_ITERATIONS[-1]:,} iterations")
    if (backbone := _backbone(run)) != _PAPER_BACKBONE:
        found.append(f"{backbone} in place of {_PAPER_BACKBONE}")
    return found + _unlike_paper(run, _SIZE_KEYS)


def _backbone(run: Run) -> str:
    depth, groups, width = (run.config.get(key) for key in _BACKBONE_KEYS)
    if None in (depth, groups, width):
        return "a backbone that config.yaml does not tell"
    if groups == 1:
        return f"ResNet-{depth}" if width == 64 else f"ResNet-{depth} of width {width}"
    return f"ResNeXt-{depth} {groups}x{width}d"


def _departures(run: Run) -> list[str]:
    """In what else a run is not the paper's, or where the paper is silent, not this project's setting of Table I."""
    found = []
    if run.engine != "detectron2":
        found.append(f"{run.engine} in place of detectron2")
    if run.norm not in _PAPER_NORMS:
        found.append(f"{run.norm} in place of BN or FBN at T_sigma = 5")
    if run.images_per_batch != _PAPER_IMAGES:
        found.append(f"{counted(run.images_per_batch, 'image')} a batch in place of {_PAPER_IMAGES}")
    if (iterations := _at_two_images(run, run.max_iter)) > _PAPER_ITERATIONS[-1]:
        found.append(f"{counted(iterations, 'iteration')} in place of {_PAPER_ITERATIONS[-1]:,}")
    keys = [key for key in _paper_config() if key not in (*_NOT_COMPARED, *_SIZE_KEYS)]
    if missing := [key for key in keys if key not in run.config]:
        found.append(f"{counted(len(missing), 'setting')} that config.yaml does not tell, such as {missing[0]}")
    return found + _unlike_paper(run, keys)


def _unlike_paper(run: Run, keys: Sequence[str]) -> list[str]:
    """``KEY own in place of the paper's`` for the keys that a run has otherwise, its batch's size allowed for."""
    paper, found = _paper_config(), []
    scale = run.config["SOLVER.IMS_PER_BATCH"] / _PAPER_IMAGES  # rate and schedule of the file are for the file's batch
    for key in keys:
        expected = paper[key]
        if key == _RATE_KEY:
            expected = expected * scale
        elif key in _SCHEDULE_KEYS:
            expected = [round(e / scale) for e in expected] if isinstance(expected, list) else round(expected / scale)
        own = run.config.get(key, expected)
        if not _equal(key, own, expected):
            found.append(f"{key} {own!r} in place of {expected!r}")
    return found


def _equal(key: str, own: Any, expected: Any) -> bool:
    if key == "MODEL.WEIGHTS":  # wherever the file lies
        return str(own).rpartition("/")[2] == expected.rpartition("/")[2]
    if isinstance(own, list | tuple) and isinstance(expected, list):
        return len(own) == len(expected) and all(_equal(key, *pair) for pair in zip(own, expected))
    if isinstance(own, int | float) and isinstance(expected, int | float):
        return math.isclose(own, expected)
    return own == expected


@functools.cache
def _paper_config() -> dict[str, Any]:
    """``_PAPER_SETTINGS`` with detectron2's defaults for all other keys, as a run's ``config.yaml`` has them."""

    def flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            if isinstance(value, Mapping):
                yield from flatten(value, f"{prefix}{name}.")
            else:
                yield prefix + name, list(value) if isinstance(value, tuple) else value

    return {**dict(flatten(detection_config())), **_PAPER_SETTINGS}


@dataclass(frozen=True)
class Column:
    """Runs that differ in the seed alone.

    Attributes:
        label: the norm's spec, see ``norm_label``, or the user's word.
        norm: the norm's spec.
        runs: in the order of their seeds.
        evaluations: of each run: iterations at two images a batch -> its figures.
        notes: why the paper's figures are not to be compared with these; empty where they are.
    """

    label: str
    norm: str
    runs: list[Run]
    evaluations: list[dict[int, dict[str, float | None]]]
    notes: list[str]

    def printed(self, task: str, iterations: int) -> dict[str, float]:
        """The paper's figures, by metric; empty where it has none."""
        return dict(zip(METRICS, PAPER_AP.get((task, iterations), {}).get(self.norm, ())))

    def at(self, iterations: int) -> list[dict[str, float | None]]:
        """The figures of the runs that have an evaluation there."""
        return [each[iterations] for each in self.evaluations if iterations in each]

    @property
    def last(self) -> int | None:
        """The last evaluation of the run that is furthest; None before any."""
        return max((max(each) for each in self.evaluations if each), default=None)

    @property
    def base(self) -> str:
        """The norm's name without options."""
        return self.norm.partition("(")[0]

    def by_seed(self, iterations: int) -> dict[int, dict[str, float | None]]:
        """Figures of the runs whose seed is known and not that of two."""
        seeds = [run.seed for run in self.runs]
        return {
            run.seed: each[iterations]
            for run, each in zip(self.runs, self.evaluations)
            if run.seed is not None and seeds.count(run.seed) == 1 and iterations in each
        }


@dataclass(frozen=True)
class Table:
    """Columns that may stand side by side: one framework, the same data.

    Attributes:
        engine: ``"detectron2"``, ``"torchvision"``, or ``""`` where nothing was run.
        train_sets, test_set: names.
        columns: plain norms first, each followed by its filtered form.
    """

    engine: str
    train_sets: tuple[str, ...]
    test_set: str
    columns: list[Column]

    @property
    def beside_paper(self) -> bool:
        """Whether the paper's figures can stand beside these at all: AP on other images is another quantity."""
        return self.test_set == _PAPER_DATA[1]

    @property
    def iterations(self) -> list[int]:
        """Rows: every evaluation of the runs and, where a norm of the paper stands on its data, the paper's."""
        own = {iterations for column in self.columns for each in column.evaluations for iterations in each}
        has_paper = self.beside_paper and any(column.norm in _PAPER_NORMS for column in self.columns)
        return sorted(own.union(_PAPER_ITERATIONS if has_paper else ()))

    def _printed(self, column: Column, task: str, iterations: int) -> dict[str, float]:
        return column.printed(task, iterations) if self.beside_paper else {}

    def rows(self) -> list[list[str]]:
        """Table I as rows of text, header first; the paper's figures in parentheses, with ``*`` not comparable."""
        header = ["task", "iterations"]
        for column in self.columns:
            paper = " (paper)" if self.beside_paper and column.norm in _PAPER_NORMS else ""
            header += [f"{column.label} {metric}{paper}" for metric in METRICS[:2]]
        body = []
        for task in _TASKS:
            for iterations in self.iterations:
                row = [task, f"{iterations:,}"]
                for column in self.columns:
                    printed = self._printed(column, task, iterations)
                    mark = "*" * self._is_marked(column)
                    for metric in METRICS[:2]:
                        ours = _cell(column, iterations, f"{task}/{metric}")
                        row.append(f"{ours} ({printed[metric]:.2f}{mark})" if metric in printed else ours)
                body.append(row)
        return [header, *body]

    def _is_marked(self, column: Column) -> bool:
        """Whether the paper's figures in a column are not comparable; in an empty one, with those beside it."""
        if not self.beside_paper or column.norm not in _PAPER_NORMS:
            return False
        return any(each.notes for each in ([column] if column.runs else self.columns) if each.norm in _PAPER_NORMS)

    def all_metrics(self) -> list[list[str]]:
        """The six APs at each column's last evaluation as rows of text, header first."""
        body = []
        for task in _TASKS:
            for column in self.columns:
                at = column.last
                cells = ["not run"] * 6 if at is None else [_cell(column, at, f"{task}/{name}") for name in METRICS]
                body.append([task, column.label, "-" if at is None else f"{at:,}", *cells])
        return [["task", "norm", "iterations", *METRICS], *body]

    def notes(self) -> list[str]:
        """Sentences to stand below: what was run, on what, and how far the figures can be compared."""
        runs = [run for column in self.columns for run in column.runs]
        if not runs:
            return ["Nothing was run; in parentheses, the paper's figures."]
        lines = [
            f"{self.engine}; trained on {_images(runs, 'train_images', self.train_sets)}, evaluated on "
            f"{_images(runs, 'test_images', [self.test_set])}.",
            f"{either_of((run.max_iter for run in runs), 'iteration')} of "
            f"{either_of((run.images_per_batch for run in runs), 'image')} a batch; the table counts iterations of "
            f"{_PAPER_IMAGES} images.",
            f"Hardware: {either(hardware_of(run.info) for run in runs)}.",
        ]
        for column in self.columns:
            if column.runs:
                lines.append(f"{column.label}: {seeds_of(column.runs)}.")
        lines += [f"{remark}." for run in runs for remark in _remarks(run, self.test_set)]
        if any(len(column.runs) > 1 for column in self.columns):
            lines.append("Of several runs: mean ± sample standard deviation; n where not all runs have the figure.")
        reduced = list(dict.fromkeys(reason for run in runs for reason in _reductions(run, self.test_set)))
        if reduced:
            lines.append(f"Reduced run: {'; '.join(reduced)}.")
        other = list(dict.fromkeys(reason for run in runs for reason in _departures(run)))
        if other and self.beside_paper:
            lines.append(
                f"Not the paper's setting or, where it is silent, this project's of Table I: {'; '.join(other)}."
            )
        if not self.beside_paper:
            lines.append(
                f"The paper's rows (COCO 2017, {_PAPER_ITERATIONS[0]:,} to {_PAPER_ITERATIONS[-1]:,} iterations) are "
                "not run; make_table.py without arguments prints them."
            )
        if any(self._is_marked(column) for column in self.columns):
            lines.append("(*) The paper's figure is not comparable with these runs.")
        if other := _differences(runs):
            lines.append(f"The configs differ in more than norm, seed and output folder: {'; '.join(other)}.")
        return [*lines, *self.comparisons()]

    def comparisons(self) -> list[str]:
        """A sentence for each filtered norm beside its plain one, where both have runs with the same seeds."""
        lines = []
        for filtered in self.columns:
            for plain in self.columns:
                if filtered.base in FILTERED and plain.base == FILTERED[filtered.base]:
                    lines += _comparison(plain, filtered)
        return lines

    def as_json(self) -> dict[str, Any]:
        """The table as plain data."""
        cells = [
            {
                "task": task,
                "iterations": iterations,
                "column": column.label,
                "metric": metric,
                **summary(values),
                "paper": self._printed(column, task, iterations).get(metric),
            }
            for task in _TASKS
            for iterations in self.iterations
            for column in self.columns
            for metric in METRICS
            for values in [_values(column.at(iterations), f"{task}/{metric}")]
        ]
        columns = [
            {
                "label": column.label,
                "norm": column.norm,
                "not_comparable_with_paper_because": column.notes,
                "runs": [
                    {
                        "folder": str(run.folder),
                        "seed": run.seed,
                        "iterations": run.max_iter,
                        "images_per_batch": run.images_per_batch,
                        "hardware": run.info.get("hardware"),
                        "processes": run.info.get("processes"),
                        "train_images": run.info.get("train_images"),
                        "test_images": run.info.get("test_images"),
                    }
                    for run in column.runs
                ],
            }
            for column in self.columns
        ]
        head = {"framework": self.engine, "train": list(self.train_sets), "test": self.test_set}
        return {**head, "columns": columns, "cells": cells, "notes": self.notes()}


def build_tables(runs: Sequence[Run], labels: Mapping[Path, str] | None = None) -> list[Table]:
    """Put runs into tables: one for each framework and data set, a column for each norm and setting.

    Args:
        runs: run folders, none twice.
        labels: folder of a run -> the column to put it in, in place of its norm's.

    Raises:
        FileNotFoundError, ValueError: no readable ``metrics.json`` or ``evaluation.json``, no DATASETS.TEST, or a label
            that joins norms.
    """
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        if not run.test_sets:
            raise ValueError(f"{run.folder} was never evaluated: its DATASETS.TEST is empty")
        for test_set in run.test_sets:
            groups.setdefault((run.engine, tuple(run.config["DATASETS.TRAIN"]), test_set), []).append(run)
    return [Table(*key, _columns(members, key[-1], labels or {})) for key, members in groups.items()]


def _columns(runs: Sequence[Run], test_set: str, labels: Mapping[Path, str]) -> list[Column]:
    found: dict[str, list[list[Run]]] = {}  # label -> the runs of each setting
    for run in runs:
        settings = found.setdefault(labels.get(run.folder, run.norm), [])
        same = [other for other in settings if run.folder in labels or _same_setting(run, other[0])]
        if same:
            same[0].append(run)
        else:
            settings.append([run])
    columns = []
    for label, settings in found.items():
        for number, members in enumerate(settings, start=1):
            if other := [run for run in members if run.norm != members[0].norm]:
                raise ValueError(f"label {label!r} would average {members[0].norm} and {other[0].norm}")
            members = sorted(members, key=lambda run: (run.seed is None, run.seed or 0))
            columns.append(
                Column(
                    label if len(settings) == 1 else f"{label} ({number})",
                    members[0].norm,
                    members,
                    [{_at_two_images(run, i): v for i, v in run.evaluations(test_set).items()} for run in members],
                    list(dict.fromkeys(n for run in members for n in _reductions(run, test_set) + _departures(run))),
                )
            )
    present = {column.norm for column in columns}
    if test_set == _PAPER_DATA[1] and present & set(_PAPER_NORMS):
        columns += [Column(norm, norm, [], [], []) for norm in _PAPER_NORMS if norm not in present]
    return sorted(columns, key=lambda column: registry_order(column.base, column.label))


def _same_setting(run: Run, other: Run) -> bool:
    differences = (each.partition(" ")[0] for each in _differences([run, other]))
    return run.images_per_batch == other.images_per_batch and all(key in _NO_EFFECT for key in differences)


def paper_table() -> Table:
    """Table I with the paper's figures and nothing of ours."""
    return Table("", (), "coco_2017_val", [Column(norm, norm, [], [], []) for norm in _PAPER_NORMS])


def _values(figures: Sequence[Mapping[str, float | None]], key: str) -> list[float]:
    return [each[key] for each in figures if each.get(key) is not None]


def _cell(column: Column, iterations: int, key: str) -> str:
    figures = column.at(iterations)
    values = _values(figures, key)
    if not values:
        return "-" if figures else "not run"
    text = with_deviation(values)
    return text if len(values) == len(column.runs) else f"{text} (n = {len(values)})"


def _remarks(run: Run, test_set: str) -> list[str]:
    """What must be known of a run's figures."""
    found = []
    if run.is_evaluation:
        weights, iterations = run.evaluated_weights
        unknown = f"; they do not tell their iterations, for which its SOLVER.MAX_ITER {run.max_iter:,} is taken"
        found.append(f"{run.folder} is an evaluation of {weights}{unknown if iterations is None else ''}")
    if run.detects_nothing(test_set):
        found.append(f"{run.folder}, the last evaluation on {no_detections(test_set)}")
    return found


def _images(runs: Sequence[Run], which: str, names: Sequence[str]) -> str:
    parts = []
    for name in names:
        counts = [run.info.get(which, {}).get(name) for run in runs]
        known = [f"{count:,}" for count in counts if count is not None]
        parts.append(f"{name} ({either(known) if known else 'number of'} images{'' if known else ' not recorded'})")
    return ", ".join(parts)


def _differences(runs: Sequence[Run]) -> list[str]:
    """``KEY a or b`` for every key, but for norm, seed and output folder, that is not the same in all runs."""
    configs = []
    for run in runs:
        config = {key: value for key, value in run.config.items() if key not in ("SEED", "OUTPUT_DIR")}
        # Where the backbone's norm stands elsewhere too, it is the one thing that is meant to differ.
        config.update({key: "the norm" for key in NORM_KEYS if norm_label(config.get(key, "")) == run.norm})
        configs.append(config)
    return [f"{key} {either(values)}" for key, values in differing(configs).items()]


def _comparison(plain: Column, filtered: Column) -> list[str]:
    """At most one sentence on the differences between runs with the same seed."""
    iterations = {i for each in plain.evaluations for i in each} & {i for each in filtered.evaluations for i in each}
    at = max((i for i in iterations if plain.by_seed(i).keys() & filtered.by_seed(i).keys()), default=None)
    if at is None:
        return []
    first, second = plain.by_seed(at), filtered.by_seed(at)
    seeds = sorted(first.keys() & second.keys())
    parts = []
    for task in _TASKS:
        pairs = [(first[seed].get(f"{task}/AP"), second[seed].get(f"{task}/AP")) for seed in seeds]
        pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
        if pairs:
            parts.append(f"{task} AP {paired_difference(pairs)}")
    what = f"{filtered.label} minus {plain.label} after {counted(at, 'iteration')}, seed by seed (n = {len(seeds)})"
    if not parts:
        return []
    caution = "" if len(seeds) > 1 else "; one pair of runs does not tell a difference from chance"
    if _differences([*plain.runs, *filtered.runs]):
        caution += "; their configs differ in more than the norm"
    return [f"{what}: {'; '.join(parts)}{caution}."]
