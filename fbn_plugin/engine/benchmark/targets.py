"""What the figures shall be: every aim in one list, and how results compare to it."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fbn_plugin.engine.files.words import counted

HALF = ("float16", "bfloat16")
FBN, FUSED_STEP = ("FBN T=5",), ("FBN T=5 fused",)
BOTH_PASSES = {"pass": ("forward+backward",)}


@dataclass(frozen=True)
class Target:
    """An aim for some rows of results.

    Args:
        what: the rows in words.
        device: on which they are measured, ``"cpu"`` or ``"cuda"``.
        kind: the list of the results that they are in.
        peers: whose values count; for ``first_steps`` the kind of cache.
        rows: how many values there are if all is measured.
        every: no value above it; None is no aim.
        median: nor their median above this.
        where: name of a row's field -> values that it may have.
        value: ``"ratio"`` of times to the peer's baseline, of ``"peak"`` memory to BN's, or ``"seconds"`` more than BN.
    """

    what: str
    device: str
    kind: str
    peers: tuple[str, ...]
    rows: int
    every: float | None
    median: float | None = None
    where: Mapping[str, tuple] = field(default_factory=dict)
    value: str = "ratio"


def _steps(
    what: str, models: Mapping[str, int], dtypes: tuple, layouts: tuple, peers: tuple, rows: int, every: float
) -> Target:
    where = {"model": tuple(models), "batch": tuple(models.values()), "dtype": dtypes, "layout": layouts}
    return Target(what, "cuda", "models", peers, rows, every, where=where)


_NCHW, _LAST, _LARGE = ("contiguous",), ("channels_last",), {"resnet50": 64, "vgg16": 16}
_ALL, _ANY = ("float32", *HALF), (*_NCHW, *_LAST)
_DETECTORS = {"mask_rcnn_R_50_FPN": 2, "mask_rcnn_X_101_32x8d_FPN": 2}
_LARGE_NAME, _DETECTOR_NAME = "ResNet-50 64x224 and VGG-16 16x224", "Mask R-CNN R-50 and X-101-32x8d FPN, 2x800x1216"

TARGETS = (
    _steps(f"step, {_LARGE_NAME}, float32 NCHW", _LARGE, ("float32",), _NCHW, FBN, 2, 0.95),
    _steps(f"step, {_LARGE_NAME}, float32 channels_last", _LARGE, ("float32",), _LAST, FBN, 2, 1.00),
    _steps(f"step, {_LARGE_NAME}, half precision, both layouts", _LARGE, HALF, _ANY, FBN, 4, 1.00),
    _steps(f"step, {_LARGE_NAME}, all of these, fused", _LARGE, _ALL, _ANY, FUSED_STEP, 8, 0.90),
    _steps(f"step, {_DETECTOR_NAME}, float32", _DETECTORS, ("float32",), _NCHW, FBN, 2, 0.98),
    _steps(f"step, {_DETECTOR_NAME}, fp16 AMP", _DETECTORS, ("float16",), _NCHW, FBN, 2, 1.01),
    _steps(f"step, {_DETECTOR_NAME}, float32, fused", _DETECTORS, ("float32",), _NCHW, FUSED_STEP, 2, 0.95),
    _steps(f"step, {_DETECTOR_NAME}, fp16 AMP, fused", _DETECTORS, ("float16",), _NCHW, FUSED_STEP, 2, 0.98),
    _steps("step, ResNet-50 8x224", {"resnet50": 8}, _ALL, _ANY, FBN, 4, 1.05),
    _steps("step, ResNet-50 8x224, fused", {"resnet50": 8}, _ALL, _ANY, FUSED_STEP, 4, 1.00),
    Target(
        "host, a small layer, forward + backward", "cuda", "host", ("FBN T=5", "FBN+ReLU fused"), 2, 1.10,
        where={**BOTH_PASSES, "depth": (1,)},
    ),
    Target(
        "host, a small layer, forward", "cuda", "host", ("FBN T=5", "FBN+ReLU fused"), 2, None,
        where={"pass": ("forward",), "depth": (1,)},
    ),
    Target(
        "host, twenty small layers, forward + backward", "cuda", "host", ("FBN T=5", "FBN+ReLU fused"), 2, None,
        where={**BOTH_PASSES, "depth": (20,)},
    ),
    Target(
        "device, FBN T = 5 and 2 / BN", "cuda", "layers", ("FBN T=5", "FBN T=2"), 54, 1.05, 0.70, where=BOTH_PASSES
    ),
    Target(
        "device, FBN + ReLU (and + residual) / BN, (add,) ReLU, T = 5 and 2", "cuda", "layers",
        ("FBN+ReLU fused", "FBN+ReLU fused T=2", "FBN+add+ReLU fused", "FBN+add+ReLU fused T=2"), 108, 0.90, 0.60,
        where=BOTH_PASSES,
    ),
    Target("device, FGN / GroupNorm", "cuda", "layers", ("FGN T=5", "FGN T=2"), 54, 1.05, 0.80, where=BOTH_PASSES),
    Target("device, FBN without filter (T = inf) / BN", "cuda", "layers", ("FBN T=inf",), 27, None, where=BOTH_PASSES),
    Target("compiled step, FBN / compiled BN", "cuda", "compiled", FBN, 2, 1.05),
    Target("compiled step, fused / compiled BN", "cuda", "compiled", FUSED_STEP, 2, None),
    Target(
        "first step of ResNet-50, cold cache, extra seconds", "cuda", "first_steps", ("cold",), 1, 10.0, value="seconds"
    ),
    Target(
        "first step of ResNet-50, warm cache, extra seconds", "cuda", "first_steps", ("warm",), 1, 0.5, value="seconds"
    ),
    Target(
        "peak memory, ResNet-50 64x224 (1.00 to two digits)", "cuda", "models", (*FBN, *FUSED_STEP), 8, 1.005,
        where={"model": ("resnet50",), "batch": (64,)}, value="peak",
    ),
    Target(
        "CPU, FBN T = 5 and 2 / BN, forward + backward", "cpu", "layers", ("FBN T=5", "FBN T=2"), 40, 1.00, 0.75,
        where=BOTH_PASSES,
    ),
    Target(
        "CPU, FGN T = 5 and 2 / GroupNorm, forward + backward", "cpu", "layers", ("FGN T=5", "FGN T=2"), 40, 1.00,
        where=BOTH_PASSES,
    ),
    Target("CPU, step of ResNet-50, VGG-16, Mask R-CNN R-50 FPN", "cpu", "models", FBN, 3, 1.00),
)  # fmt: skip


@dataclass(frozen=True)
class Judgement:
    """A target and the values that were found for it, each with its row in words."""

    target: Target
    values: tuple[tuple[float, str], ...]

    @property
    def verdict(self) -> str:
        """``"met"``, ``"missed"``, ``"no aim"`` or ``"not measured"``; with the rows that are missing, if any are."""
        if not self.values:
            return "not measured"
        numbers = [value for value, _ in self.values]
        aims = [
            (self.target.every, max(numbers)),
            (self.target.median, statistics.median(numbers)),
        ]
        aims = [(aim, value) for aim, value in aims if aim is not None]
        word = "no aim" if not aims else "met" if all(value <= aim for aim, value in aims) else "missed"
        missing = self.target.rows - len(numbers)
        return f"{word}, {counted(missing, 'row')} not measured" if missing > 0 else word


def _words(row: Mapping, peer: str) -> str:
    if "model" in row:
        size = "x".join(map(str, (row["batch"], *row["image"])))
        return " ".join(filter(None, (row["model"], size, row.get("layout"), row.get("dtype"), peer)))
    return " ".join(filter(None, ("x".join(map(str, row["shape"])), row.get("layout"), row["dtype"], peer)))


def _value(target: Target, row: Mapping, peer: str) -> float | None:
    if target.value == "seconds":
        return row["extra_seconds"].get(peer)
    own = row["peers"].get(peer)
    if own is None:
        return None
    if target.value == "peak":
        base = row["peers"][own["to"]]
        return own["peak_bytes"] / base["peak_bytes"] if "peak_bytes" in own else None
    return own["ratio"][1]


def _values(target: Target, results: Mapping) -> Iterator[tuple[float, str]]:
    if results["settings"]["device"] != target.device or results["settings"]["quick"]:
        return
    for row in results.get(target.kind, ()):
        if all(row.get(name) in accepted for name, accepted in target.where.items()):
            for peer in target.peers:
                value = _value(target, row, peer)
                if value is not None:
                    yield (value if math.isfinite(value) else math.inf), _words(row, peer)


def judge(files: Sequence[Mapping]) -> list[Judgement]:
    """Compare results, of one run or of several, to ``TARGETS``. A quick run counts as nothing measured."""
    return [
        Judgement(target, tuple(found for results in files for found in _values(target, results))) for target in TARGETS
    ]


def target_table(files: Sequence[Mapping]) -> list[list[str]]:
    """Rows of text, header first: each target with what was measured."""
    table = [["what", "rows", "median (min..max)", "target", "verdict", "highest row"]]
    for judgement in judge(files):
        target, values = judgement.target, judgement.values
        aims = [f"<= {target.every:g}"] if target.every is not None else []
        aims += [f"median <= {target.median:g}"] if target.median is not None else []
        cells = [target.what, f"{len(values)} of {target.rows}", "not measured", ", ".join(aims) or "-"]
        if values:
            numbers = [value for value, _ in values]
            cells[2] = f"{statistics.median(numbers):.2f} ({min(numbers):.2f}..{max(numbers):.2f})"
        table.append([*cells, judgement.verdict, max(values)[1] if len(values) > 1 else "-"])
    return table
