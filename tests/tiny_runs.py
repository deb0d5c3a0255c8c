"""A run of seconds with each training tool, with a bit of everything that a run writes, and what is compared of two of
them: for tests of what an interruption leaves behind.
"""

import importlib
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_detector import TINY_DETECTOR

ROOT = Path(__file__).parents[1]
TOOLS = ("train_classification", "train_detection", pytest.param("train_net", marks=pytest.mark.detectron2))

_CLASSIFICATION = shlex.split("""
    MODEL.NAME test_byobnet INPUT.SIZE 16 SOLVER.IMS_PER_BATCH 480 SOLVER.MAX_EPOCH 3 SOLVER.CHECKPOINT_PERIOD 3
    TEST.EVAL_PERIOD 1 TEST.IMS_PER_BATCH 120 SOLVER.BEST_CHECKPOINT_METRIC top1
""")
_DETECTION = shlex.split("""
    SOLVER.MAX_ITER 6 SOLVER.CHECKPOINT_PERIOD 3 TEST.EVAL_PERIOD 2 TEST.PRECISE_BN.ENABLED True
    TEST.PRECISE_BN.NUM_ITER 2 NORM_STATS_PERIOD 5 SOLVER.BEST_CHECKPOINT_METRIC bbox/AP
""")


def tool(name: str) -> Callable:
    """A tool's ``main``; the test is skipped where detectron2 is missing."""
    if name == "train_net":
        pytest.importorskip("detectron2", reason="detectron2 is not installed")
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module(name).main
    finally:
        sys.path.remove(str(ROOT / "tools"))


def import_all(name: str) -> None:
    """What a tool imports on its way, so that forks have it."""

    part = {"train_classification": "classification", "train_detection": "torchvision", "train_net": "detectron2"}
    importlib.import_module(f"fbn_plugin.engine.{part[name]}.trainer")


def arguments(name: str, folder: Path, shapes: Path) -> list[str]:
    """The command line of the run; lines of ``metrics.json`` stand for four iterations.

    Args:
        name: of the tool.
        folder: OUTPUT_DIR, beside which the config is written.
        shapes: the tests' set of shapes.
    """
    if name == "train_classification":
        return [
            *("--log-period", "4", "--config-file", str(ROOT / "configs/Digits/test_resnet_FBN.yaml")),
            *(*_CLASSIFICATION, "OUTPUT_DIR", str(folder)),
        ]
    if name == "train_detection":
        config = folder.with_suffix(".yaml")
        config.write_text(f"{TINY_DETECTOR}DATASETS: {{TRAIN: ['{shapes}:train'], TEST: ['{shapes}:val']}}\n")
        start = ["--config-file", str(config)]
    else:
        from tiny_detectron2 import CONFIG, TINY, datasets

        start = ["--config-file", str(CONFIG), *TINY, *map(str, datasets(shapes, 2)), "SOLVER.IMS_PER_BATCH", "2"]
    return ["--log-period", "4", *start, *_DETECTION, "OUTPUT_DIR", str(folder)]


def results(folder: Path) -> dict[str, Any]:
    """All that two runs must have in common, but for times and the command line."""
    found: dict[str, Any] = {
        "metrics.json": [
            json.dumps({key: value for key, value in sorted(row.items()) if not _is_time(key)})
            for row in map(json.loads, (folder / "metrics.json").read_text().splitlines())
        ]
    }
    for name in ("model_final.pth", "model_best.pth"):
        content = torch.load(folder / name, weights_only=True)
        found |= {f"{name}: {key}": value.numpy().tobytes() for key, value in content["model"].items()}
        found[f"{name}: iteration"] = content["iteration"]
    for name in ("results.json", "inference/coco_instances_results.json"):
        if (folder / name).exists():
            content = json.loads((folder / name).read_text())
            if isinstance(content, dict):
                content = {key: value for key, value in content.items() if key != "command" and not _is_time(key)}
            found[name] = content
    return found


def _is_time(key: str) -> bool:
    return "time" in key or "_second" in key


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Compare two :func:`results`."""
    assert ours.keys() == theirs.keys()
    different = [name for name, value in ours.items() if value != theirs[name]]
    shown = [pair for pair in zip(ours["metrics.json"], theirs["metrics.json"]) if pair[0] != pair[1]]
    assert not different, (different, shown, len(ours["metrics.json"]), len(theirs["metrics.json"]))
