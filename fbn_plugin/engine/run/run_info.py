"""What a run or an evaluation was made with, written beside its figures: ``run_info.json`` in a run's folder, so that a
table can say hardware and numbers of images, and ``evaluation.json``."""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fbn_plugin
from fbn_plugin.engine.files.disk import atomic_write
from fbn_plugin.engine.files.json_files import read_json
from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run.cli import imported

__all__ = [
    "ACTIVATIONS_FILE",
    "cpu_name",
    "hardware",
    "package_versions",
    "read_record",
    "read_run_info",
    "write_evaluation",
    "write_run_info",
]

_FILE = "run_info.json"
ACTIVATIONS_FILE = "activations.json"  # what was measured of a network's layers
# An evaluation of a thousand categories is a tenth of this.
_LARGEST_JSON = 10_000_000
_PACKAGES = ("torch", "torchvision", "timm", "detectron2", "pycocotools")


def cpu_name() -> str:
    """The processor's name, or its architecture where the system does not tell."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def hardware(device: str | torch.device | None = None) -> str:
    """What a process computes on, in words.

    Args:
        device: ``"cpu"``, ``"cuda"`` and the like; None takes a GPU if there is one.
    """
    kind = torch.device(device).type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        return torch.cuda.get_device_name(device)
    if kind == "cpu":
        return f"{cpu_name()}, {counted(torch.get_num_threads(), 'thread')}"
    return kind


def write_run_info(
    folder: str | os.PathLike,
    engine: str,
    device: str | torch.device,
    processes: int,
    images_per_batch: int,
    train_images: Mapping[str, int],
    test_images: Mapping[str, int],
    batch: Mapping[str, Any] | None = None,
) -> None:
    """Write ``run_info.json`` in one step, with what ``--import`` has imported.

    Args:
        folder: OUTPUT_DIR.
        engine: what trains: ``"detectron2"``, ``"torchvision"`` or ``"classification"``.
        device: of one process.
        processes: how many processes share a batch.
        images_per_batch: of all processes together, after any scaling.
        train_images, test_images: name of each set -> number of its images.
        batch: what else is to be said of the batch.
    """
    info = {
        "engine": engine,
        "hardware": hardware(device),
        "processes": processes,
        "images_per_batch": images_per_batch,
        **(batch or {}),
        "train_images": dict(train_images),
        "test_images": dict(test_images),
        "imports": imported(),
        "versions": package_versions(),
    }
    atomic_write(os.path.join(folder, _FILE), json.dumps(info, indent=2).encode())


def write_evaluation(
    path: str | os.PathLike,
    iteration: int | None,
    weights: str | os.PathLike | None,
    datasets: Sequence[str],
    metrics: Mapping[str, float | None],
    hardware: str | None = None,
    results: str | os.PathLike | None = None,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Write an evaluation as JSON in one step: each argument under its name, ``datasets`` under ``"dataset"``.

    Args:
        path: the file, such as ``evaluation.json`` in OUTPUT_DIR.
        iteration: the last one, from 0 as in ``metrics.json``, that the weights have behind them; None where unknown.
        weights: the checkpoint; None where no model was run.
        datasets: names of the sets.
        metrics: ``{"bbox/AP": 31.2, ...}`` in percent, with more than one set ``"<name of the set>/bbox/AP"``, as in
            ``metrics.json``; of a classifier ``{"top1": 76.1, ..., "loss": 0.96}``. NaN becomes null.
        hardware: what the model ran on, see :func:`hardware`.
        results: the file of detections that were scored, where no model was run.
        details: further entries, such as how it was measured.
    """
    content = {
        "iteration": iteration,
        "weights": None if weights is None else os.fspath(weights),
        "results": None if results is None else os.fspath(results),
        "hardware": hardware,
        "dataset": list(datasets),
        **(details or {}),
        "metrics": {name: None if value is None or math.isnan(value) else value for name, value in metrics.items()},
    }
    atomic_write(path, (json.dumps(content, indent=2) + "\n").encode())


def read_run_info(folder: str | os.PathLike) -> dict[str, Any]:
    """What :func:`write_run_info` wrote; empty for a folder without it.

    Raises:
        ValueError: the file is no JSON mapping.
    """
    path = Path(folder) / _FILE
    return read_record(path) if path.is_file() else {}


def read_record(path: Path) -> dict[str, Any]:
    """What is in one of the small JSON files of a run.

    Raises:
        ValueError: it is no JSON mapping, or larger than any such file.
    """
    content = read_json(path, _LARGEST_JSON)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a mapping")
    return content


def package_versions() -> dict[str, str]:
    """Name -> version of this package, Python, and what a run computes with, as far as it is installed."""
    found = {"fbn_plugin": fbn_plugin.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
