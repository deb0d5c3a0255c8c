"""What a study is and what its jobs gave, as values, and the one JSON file of both: a report can be made from that file
anywhere, without the run folders. It names no place of the machine that wrote it.
"""

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fbn_plugin.engine.files.disk import atomic_write
from fbn_plugin.engine.files.json_files import read_json
from fbn_plugin.engine.files.words import shown
from fbn_plugin.engine.studies.packed_rows import pack, packed_text, unpack
from fbn_plugin.engine.studies.seeds import SEED_RULES

__all__ = [
    "FULL_SCALE",
    "STATES",
    "Claim",
    "Combination",
    "Comparison",
    "KernelDensity",
    "LayerRange",
    "Metric",
    "Outcome",
    "Printed",
    "Study",
    "Together",
    "Variant",
    "read_outcomes",
    "write_outcomes",
]

STATES = ("done", "failed", "running", "waiting")

# The scale at which a study has the settings that its paper prints.
FULL_SCALE = "paper"

_FORMAT = 1
_PACKED = 2  # the same, by variant
_LARGEST = 200_000_000  # ten thousand jobs with long curves


@dataclass(frozen=True)
class Metric:
    """A figure that a study looks at.

    Attributes:
        higher_is_better: which way it improves.
        unit: such as ``"%"``; "" for none.
        label: its name for readers.
        row: what it is taken from along the run, as an evaluation or a row of ``metrics.json`` names it; "" for its own
            name.
        of: how, one of ``run_figures.PICKS``.
        threshold: of a metric that is the iterations until one is passed, ``first_at_least`` or ``first_at_most``; the
            iterations of one that is ``at`` some.
        row_label: what the row is, for the axis of its curve, where the label is of one figure of it; "" for its name.
        is_ranked: whether one end is better at all; of others no best is named.
    """

    higher_is_better: bool
    unit: str = ""
    label: str = ""
    row: str = ""
    of: str = "last"
    threshold: float | None = None
    row_label: str = ""
    is_ranked: bool = True


@dataclass(frozen=True)
class Together:
    """Rows of the runs that are drawn in one picture, such as quantiles of the same values.

    Attributes:
        label: what they are, for the axis, with its unit.
        rows: name of each for readers -> as an evaluation or a row of ``metrics.json`` names it.
    """

    label: str
    rows: dict[str, str]


@dataclass(frozen=True)
class Combination:
    """An evaluation of what other variants have trained with the same seed.

    Attributes:
        of: the variants; of several it is their ensemble.
        crops: views of an image: 1, 10 or 144.
        moments: ``"population"``, ``"batch"`` or ``"balanced"``; "" for the run's own.
    """

    of: list[str]
    crops: int = 1
    moments: str = ""


@dataclass(frozen=True)
class Variant:
    """One column of a study: the same settings, run with every seed.

    Attributes:
        levels: factor -> level where the variants are a product of factors; else empty.
        settings: config key -> value, beside those of the whole study.
        base: a config of its own, relative to the project's root; "" for the study's.
        combines: what is evaluated, where nothing is trained.
    """

    levels: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    base: str = ""
    combines: Combination | None = None


@dataclass(frozen=True)
class Comparison:
    """Two variants whose seeds are compared in pairs.

    Attributes:
        variant: what is tested.
        baseline: what it is tested against.
        group: of comparisons that a reader sees together, such as ``"batch 4"``; "" for one group.
    """

    variant: str
    baseline: str
    group: str = ""


@dataclass(frozen=True)
class Printed:
    """A figure that a paper prints.

    Attributes:
        value: in the metric's unit.
        sd: its standard deviation, where the paper prints one.
    """

    value: float
    sd: float | None = None


@dataclass(frozen=True)
class Claim:
    """What a paper says of a metric.

    Attributes:
        kind: one of ``claims.KINDS``.
        metric, variant: what it is about; neither has to be there at every scale.
        baseline: what the variant is compared with; "" where it is held against a number, or against itself.
        value: that number, or the margin within which two variants are alike.
        text: in the paper's sense, for readers.
        than: the other metric of the same runs that the metric is held against; "" where it is none.
    """

    kind: str
    metric: str
    variant: str
    baseline: str = ""
    value: float | None = None
    text: str = ""
    than: str = ""


@dataclass(frozen=True)
class Study:
    """A study file, checked.

    Attributes:
        title, description: for readers.
        tool: ``"classification"``, ``"torchvision"`` or ``"detectron2"``.
        base: the config of all variants, relative to the project's root where it lies within.
        settings: config key -> value of all jobs.
        factors: factor -> its levels in order; empty where the variants were named one by one.
        variants: name -> variant, in order.
        seeds: as the study counts them, such as 1 to 15.
        seed_rule: how SEED follows from them: ``"md5"`` or ``"plain"``.
        metrics: name -> what it is; the first is the one that matters most.
        comparisons: in order.
        alpha: level of the tests.
        id: of the table or figure that it makes again, or several with commas between; "" for a study of its own.
        source: that table or figure, in words.
        scale: at which of its scales the study was read; "" where it has none.
        printed: metric -> variant -> what the paper prints.
        claims: what the paper says of it.
        together: title of a picture -> the rows in it.
    """

    title: str
    description: str
    tool: str
    base: str
    settings: dict[str, Any]
    factors: dict[str, list[str]]
    variants: dict[str, Variant]
    seeds: list[int]
    seed_rule: str
    metrics: dict[str, Metric]
    comparisons: list[Comparison]
    alpha: float = 0.05
    id: str = ""
    source: str = ""
    scale: str = ""
    printed: dict[str, dict[str, Printed]] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    together: dict[str, Together] = field(default_factory=dict)

    @property
    def curve_rows(self) -> dict[str, str]:
        """Name of a curve of the runs -> the row that it is of: those of the metrics, each under the metric's name, and
        those that are drawn together and no metric is taken from, under the row's."""
        rows = {name: metric.row or name for name, metric in self.metrics.items()}
        drawn = [row for each in self.together.values() for row in each.rows.values()]
        return rows | {row: row for row in drawn if row not in rows.values()}

    @property
    def is_reduced(self) -> bool:
        """Whether it is at another scale than its paper's."""
        return self.scale not in ("", FULL_SCALE)

    @property
    def is_beyond(self) -> bool:
        """Whether its id is of no paper."""
        return self.id.startswith("X.")

    @property
    def conditional(self) -> list[str]:
        """Variants that are evaluated on batches which the test labels balanced."""
        return [
            name
            for name, each in self.variants.items()
            if (each.combines and each.combines.moments == "balanced")
            or (not each.combines and (self.settings | each.settings).get("TEST.MOMENTS") == "balanced")
        ]

    def setting(self, variant: str, key: str) -> Any:
        """What a variant sets a config key to; None where neither it nor the study sets it."""
        return self.variants[variant].settings.get(key, self.settings.get(key))

    @property
    def heading(self) -> str:
        """The title with the id and the scale: ``P0.fig5: Filtered BN in LeNet-5 (cpu scale, reduced)``."""
        scale = f" ({self.scale} scale{', reduced' if self.is_reduced else ''})" if self.scale else ""
        return f"{f'{self.id}: ' if self.id else ''}{self.title}{scale}"


@dataclass(frozen=True)
class LayerRange:
    """Between which ends the activations of a layer lie, in deviations, see ``analysis/bands.py``.

    Attributes:
        name: of the layer.
        minimum, maximum, median: of its finite values.
        bands: percent of the values -> the two ends between which these lie.
    """

    name: str
    minimum: float
    maximum: float
    median: float
    bands: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class KernelDensity:
    """How the activations of one unit of a layer are distributed, in deviations, see ``analysis/bands.py``.

    Attributes:
        layer, unit: whose.
        sigma: beyond it, to either side, an activation counts as passing.
        images, passing: how many were measured, and how many of them have such an activation.
        edges: of the bins, one more than there are.
        values: the density within each, per deviation.
    """

    layer: str
    unit: int
    sigma: float
    images: int
    passing: int
    edges: list[float]
    values: list[float]


@dataclass(frozen=True)
class Outcome:
    """One job: a variant with a seed.

    Attributes:
        variant: its name.
        levels: factor -> level; empty for variants that were named one by one.
        seed: as the study counts them.
        config_seed: SEED that the job was given.
        state: one of :data:`STATES`.
        metrics: metric -> final figure; NaN where the run has none, empty until it is done.
        curves: metric, or row, see ``Study.curve_rows`` -> (finished iterations, figure) along the run.
        seconds: that the job took, all of its attempts; None where unknown.
        command: that runs it, from the project's root.
        error: its last words, where it failed.
        hardware, versions: as ``run_info.json`` has them.
        layers, kernels: of a run that measured them, in the order of their calls.
    """

    variant: str
    seed: int
    config_seed: int
    state: str
    levels: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    seconds: float | None = None
    command: str = ""
    error: str | None = None
    hardware: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    layers: list[LayerRange] = field(default_factory=list)
    kernels: list[KernelDensity] = field(default_factory=list)


def write_outcomes(
    path: str | os.PathLike,
    study: Study,
    outcomes: Sequence[Outcome],
    statistics: Mapping[str, Any] | None = None,
    is_packed: bool = False,
) -> None:
    """Write a study and its jobs in one step; a job is a line, so that differences between two files can be read.

    Args:
        path: the file.
        study, outcomes: what it holds.
        statistics: what was computed of them, for other readers than :func:`read_outcomes`.
        is_packed: write a file of a quarter of the size, see ``packed_rows.py``.

    Raises:
        WriteError: the file cannot be written.
    """
    machines: list[dict[str, Any]] = []
    rows = []
    for outcome in outcomes:
        row = dataclasses.asdict(outcome)
        machine = {"hardware": row.pop("hardware"), "versions": row.pop("versions")}
        if machine not in machines:
            machines.append(machine)
        rows.append({**row, "machine": machines.index(machine)})
    rows = [_plain(row) for row in rows]
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    parts = [
        f'"format": {_PACKED if is_packed else _FORMAT}',
        f'"study": {json.dumps(_plain(dataclasses.asdict(study)), indent=None if is_packed else 1)}',
        f'"machines": {json.dumps(machines, indent=1)}',
        f'"runs": {packed_text(pack(rows))}' if is_packed else f'"outcomes": [\n{lines}\n]',
    ]
    if statistics is not None:
        parts.append(f'"statistics": {json.dumps(statistics, indent=1, allow_nan=False)}')
    atomic_write(path, ("{\n" + ",\n".join(parts) + "\n}\n").encode())


def read_outcomes(path: str | os.PathLike) -> tuple[Study, list[Outcome]]:
    """Read what :func:`write_outcomes` wrote.

    Raises:
        OSError, ValueError: the file is not there, or is no such file; one sentence.
    """
    content = read_json(path, _LARGEST)
    if not isinstance(content, dict) or content.get("format") not in (_FORMAT, _PACKED):
        raise ValueError(f"{path} is no file of a study's outcomes: it has no 'format' of {_FORMAT} or {_PACKED}")
    try:
        study = _built(Study, content.get("study"), "study")
        machines = content.get("machines")
        rows = content.get("outcomes")
        if content["format"] == _PACKED:
            rows = unpack(content.get("runs"), {name: each.levels for name, each in study.variants.items()})
        if not isinstance(rows, list) or not isinstance(machines, list):
            raise ValueError("it has no lists 'outcomes' and 'machines'")
        outcomes = [_outcome(row, machines, f"outcomes[{i}]") for i, row in enumerate(rows)]
        _check(study, outcomes)
    except ValueError as error:
        raise ValueError(f"{path} is no file of a study's outcomes: {error}") from None
    return study, outcomes


def _outcome(row: Any, machines: list[Any], where: str) -> Outcome:
    if not isinstance(row, dict) or type(row.get("machine")) is not int or not 0 <= row["machine"] < len(machines):
        raise ValueError(f"{where} has no 'machine' that is one of the {len(machines)}")
    machine = machines[row["machine"]]
    if not isinstance(machine, dict):
        raise ValueError(f"machines[{row['machine']}] must be a mapping, got {shown(machine, 80)}")
    rest = {key: value for key, value in row.items() if key != "machine"}
    return _built(Outcome, {**rest, **machine}, where)


def _check(study: Study, outcomes: Sequence[Outcome]) -> None:
    """What a report relies on: a study that can be, names that are there, and every job once."""
    _check_study(study)
    seen = set()
    for outcome in outcomes:
        name = f"variant {shown(outcome.variant, 80)} with seed {outcome.seed}"
        if outcome.variant not in study.variants or outcome.seed not in study.seeds:
            raise ValueError(f"{name} is none of the study's jobs")
        if outcome.state not in STATES:
            raise ValueError(f"{name}: state must be one of {', '.join(STATES)}, got {shown(outcome.state, 80)}")
        if (outcome.variant, outcome.seed) in seen:
            raise ValueError(f"{name} is there twice")
        seen.add((outcome.variant, outcome.seed))


def _check_study(study: Study) -> None:
    """What a study file is asked for, too."""
    for name, given in (("variants", study.variants), ("seeds", study.seeds), ("metrics", study.metrics)):
        if not given:
            raise ValueError(f"the study has no {name}")
    if not 0 < study.alpha < 0.5:
        raise ValueError(f"study.alpha must be above 0 and below 0.5, got {study.alpha}")
    if study.seed_rule not in SEED_RULES:
        raise ValueError(f"study.seed_rule must be one of {', '.join(SEED_RULES)}, got {shown(study.seed_rule, 80)}")
    if len(set(study.seeds)) < len(study.seeds) or min(study.seeds) < 0:
        raise ValueError("study.seeds must be different whole numbers from 0 on")
    for name, variant in study.variants.items():
        if variant.levels.keys() != study.factors.keys() or any(
            level not in study.factors[factor] for factor, level in variant.levels.items()
        ):
            raise ValueError(f"variant {shown(name, 80)} has other levels than the study's factors")
        if variant.combines and not (trained := _trained(study)).issuperset(variant.combines.of):
            missing = next(each for each in variant.combines.of if each not in trained)
            raise ValueError(f"variant {shown(name, 80)} combines {shown(missing, 80)}, which is none that trains")
    for comparison in study.comparisons:
        for variant in (comparison.variant, comparison.baseline):
            if variant not in study.variants:
                raise ValueError(f"a comparison names {shown(variant, 80)}, which is none of the variants")
        if comparison.variant == comparison.baseline or study.comparisons.count(comparison) > 1:
            pair = f"{shown(comparison.variant, 80)} and {shown(comparison.baseline, 80)}"
            raise ValueError(f"a comparison of {pair} is one with itself, or there twice")


def _trained(study: Study) -> set[str]:
    return {name for name, variant in study.variants.items() if variant.combines is None}


def _plain(value: Any) -> Any:
    """A value as JSON has it: null for a number that is not finite, lists for tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _built(kind: type, value: Any, where: str) -> Any:
    """An instance of one of the dataclasses above from JSON."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a mapping, got {shown(value, 80)}")
    hints = typing.get_type_hints(kind)
    if unknown := sorted(value.keys() - hints.keys()):
        raise ValueError(f"{where} has {shown(unknown[0], 80)}, which is none of {', '.join(hints)}")
    for each in dataclasses.fields(kind):
        is_needed = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        if is_needed and each.name not in value:
            raise ValueError(f"{where} has no {each.name!r}")
    return kind(**{name: _typed(hints[name], each, f"{where}.{name}") for name, each in value.items()})


def _typed(hint: Any, value: Any, where: str) -> Any:
    """A value from JSON in the type that a dataclass says."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _built(hint, value, where)
    if origin is types.UnionType:  # a type, or None
        return None if value is None else _typed(arguments[0], value, where)
    if origin is dict and isinstance(value, dict):
        return {key: _typed(arguments[1], each, f"{where}[{shown(key, 40)}]") for key, each in value.items()}
    if origin is list and isinstance(value, list):
        return [_typed(arguments[0], each, f"{where}[{i}]") for i, each in enumerate(value)]
    if origin is tuple and isinstance(value, list) and len(value) == len(arguments):
        return tuple(_typed(kind, each, where) for kind, each in zip(arguments, value))
    if hint is float and (value is None or type(value) in (int, float)):
        try:
            return math.nan if value is None else float(value)
        except OverflowError:
            raise ValueError(f"{where} must be of type float, got {shown(value, 80)}") from None
    if type(value) is hint:
        return value
    name = getattr(origin or hint, "__name__", str(hint))
    raise ValueError(f"{where} must be of type {name}, got {shown(value, 80)}")
