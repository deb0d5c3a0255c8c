"""The rows of a run, in the order in which they are measured: the most important ones first."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

from fbn_plugin.engine.benchmark import correctness, prepare
from fbn_plugin.engine.benchmark.first_step import measure_first_step
from fbn_plugin.engine.benchmark.layers import measure_host, measure_layer
from fbn_plugin.engine.benchmark.models import measure_compiled, measure_model
from fbn_plugin.engine.benchmark.peers import (
    COMPILED,
    LAYER_PEERS,
    MODEL_PEERS,
    TARGET_LAYER_PEERS,
    TARGET_MODEL_PEERS,
    Peer,
)
from fbn_plugin.engine.benchmark.settings import LAYOUTS, MODELS, OUTLIERS, PASSES, QUICK_SHAPES, Settings
from fbn_plugin.registry import norm_factory

# Of the layers that the targets name: Mask R-CNN's, ResNet-50's at 64 images, and a small one.
TARGET_SHAPES = (
    (2, 64, 400, 608), (2, 256, 200, 304), (2, 512, 100, 152), (2, 1024, 50, 76), (2, 2048, 25, 38),
    (64, 256, 56, 56), (64, 1024, 14, 14), (64, 2048, 7, 7), (16, 512, 7, 7),
)  # fmt: skip
TARGET_FORMATS = (("contiguous", "float32"), ("contiguous", "float16"), ("channels_last", "bfloat16"))
STEP_FORMATS = tuple((layout, dtype) for dtype in ("float32", "bfloat16") for layout in LAYOUTS)
DETECTORS = ("mask_rcnn_R_50_FPN", "mask_rcnn_X_101_32x8d_FPN")
HOST_BOUND, HOST_BOUND_QUICK = (8, 224, 224), (1, 64, 64)


@dataclass(frozen=True)
class Row:
    """One row, not measured yet.

    Args:
        kind: the list of the results that it goes to.
        name: for progress and notes.
        measure: ``measure(until, notes)`` gives the row, or a list of them; ``until`` is the ``time.perf_counter()`` by
            which it shall be done, ``notes`` a list for what the reader has to know.
        seconds: what it takes on an H100, roughly.
    """

    kind: str
    name: str
    measure: Callable[[float, list[str]], dict | list[dict]]
    seconds: float = 1.0


def plan(settings: Settings) -> list[Row]:
    """All rows that ``settings`` ask for."""
    return _target_rows(settings) if settings.targets else _layer_rows(settings) + _model_rows(settings)


def _text(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


def _layer_rows(settings: Settings) -> list[Row]:
    if not settings.layers:
        return []
    others = [Peer(str(factory.spec), "BN", factory) for factory in map(norm_factory, settings.norms)]
    peers = [*LAYER_PEERS, *others, *([COMPILED] if settings.compiled else [])]
    return [
        Row(
            "layers",
            f"{_text(shape)} outliers {outliers:g} {which} {layout} {dtype}",
            functools.partial(measure_layer, settings, peers, shape, layout, dtype, outliers, which),
        )
        for shape in settings.layer_shapes
        for layout in settings.layouts or LAYOUTS
        for dtype in settings.row_dtypes
        for outliers in OUTLIERS
        for which in PASSES
    ]


def _model_row(settings: Settings, peers: dict, name: str, size: tuple, layout: str, dtype: str, seconds=1.0) -> Row:
    measure = functools.partial(measure_model, settings, peers, name, size, layout, dtype)
    return Row("models", f"{name} {_text(size)} {layout} {dtype}", measure, seconds)


def _model_rows(settings: Settings) -> list[Row]:
    default = ("contiguous",) if settings.device == "cpu" else ("channels_last",)
    rows = []
    for name in settings.models:
        size = MODELS[name].size(settings.device, settings.quick)
        size = (settings.batch_size or size[0], *size[1:])
        for layout in settings.layouts or default:
            rows += [_model_row(settings, MODEL_PEERS, name, size, layout, dtype) for dtype in settings.row_dtypes]
    return rows


def _target_rows(settings: Settings) -> list[Row]:
    def size(name: str) -> tuple[int, int, int]:
        return MODELS[name].size(settings.device, settings.quick)

    shapes = QUICK_SHAPES if settings.quick else TARGET_SHAPES
    host_bound = HOST_BOUND_QUICK if settings.quick else HOST_BOUND
    rows = [
        Row("preparation", "kernels compiled", functools.partial(_compile_kernels, settings, shapes), 20),
        Row("checks", "checks", lambda until, notes: correctness.check(settings.device, until, notes), 20),
    ]
    step = functools.partial(_model_row, settings, TARGET_MODEL_PEERS)
    rows += [step("resnet50", size("resnet50"), *form, 8) for form in STEP_FORMATS]
    rows += [
        Row(
            "layers",
            f"{_text(shape)} {layout} {dtype}",
            functools.partial(
                measure_layer, settings, TARGET_LAYER_PEERS, shape, layout, dtype, OUTLIERS[0], "forward+backward"
            ),
            2,
        )
        for shape in shapes
        for layout, dtype in TARGET_FORMATS
    ]
    rows += [
        Row(
            "host",
            f"host, {depth} layers in a row, {which}",
            functools.partial(measure_host, settings, depth, which),
            2,
        )
        for depth, which in ((1, "forward+backward"), (1, "forward"), (20, "forward+backward"))
    ]
    rows += [step("resnet50", host_bound, *form, 6) for form in STEP_FORMATS]
    # Half precision as detectron2's AMP has it; a CPU computes float16 so slowly that it is no test.
    half = "float16" if settings.device == "cuda" else "bfloat16"
    rows += [step(DETECTORS[0], size(DETECTORS[0]), "contiguous", dtype, 11) for dtype in ("float32", half)]
    rows += [step("vgg16", size("vgg16"), *form, 7) for form in STEP_FORMATS]
    rows += [step(DETECTORS[1], size(DETECTORS[1]), "contiguous", dtype, 14) for dtype in ("float32", half)]
    for layout, dtype in (("channels_last", "bfloat16"), ("contiguous", "float32")):
        measure = functools.partial(_compiled, settings, layout, dtype)
        rows.append(Row("compiled", f"compiled ResNet {layout} {dtype}", measure, 80))
    first = size("resnet50")
    rows.append(
        Row(
            "first_steps",
            f"first step of resnet50 {_text(first)}",
            lambda until, notes: measure_first_step(settings.device, "resnet50", first, until),
            50,
        )
    )
    return rows


def _compiled(settings: Settings, layout: str, dtype: str, until: float, notes: list[str]) -> dict:
    # To compile BN's and FBN's ResNet-50 takes a minute or more, ResNet-18 a third of that.
    name = "resnet50" if until - time.perf_counter() > 75 and not settings.quick else "resnet18"
    size = MODELS["resnet50"].size(settings.device, settings.quick)
    return measure_compiled(settings, name, size, layout, dtype, until, notes)


def _compile_kernels(settings: Settings, shapes: tuple, until: float, notes: list[str]) -> dict:
    wanted = [each for shape in shapes for form in TARGET_FORMATS for each in prepare.of_layer(shape, *form)]
    sizes = [(name, MODELS[name].size(settings.device, settings.quick)) for name in ("resnet50", "vgg16")]
    sizes.append(("resnet50", HOST_BOUND_QUICK if settings.quick else HOST_BOUND))
    for name, size in sizes:
        for shape in prepare.norm_shapes(name, size):
            wanted += [each for form in STEP_FORMATS for each in prepare.of_layer(shape, *form, groups=False)]
    return prepare.compile_kernels(wanted, settings.device, notes)
