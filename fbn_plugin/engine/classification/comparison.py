"""Checkpoints of classifiers evaluated side by side, and as an ensemble; their figures as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fbn_plugin.engine.classification.datasets import build_data
from fbn_plugin.engine.classification.evaluation import CONDITIONAL
from fbn_plugin.engine.classification.final_evaluation import Conditional, conditional_studies
from fbn_plugin.engine.classification.measures import Measures, measure
from fbn_plugin.engine.classification.model import model_title
from fbn_plugin.engine.classification.predictions import Checkpoint, Predictions, average, load_model, predict
from fbn_plugin.engine.files.disk import atomic_write, remove_numbered, writing
from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run.run_info import hardware, package_versions
from fbn_plugin.engine.run.source import source_commit
from fbn_plugin.training.evaluation_modes import device_of

__all__ = ["Comparison", "check_same_set", "evaluate_checkpoints", "write_comparison"]


@dataclass(frozen=True)
class Comparison:
    """What was evaluated, and what came out.

    Args:
        dataset: the set's title.
        classes: their names.
        checkpoints: in order.
        entries: name of each checkpoint, and ``"ensemble of N"`` -> its measures.
        predictions: of each checkpoint, in order.
        crops: views of an image.
        spread: each view of an image has other company.
        shown: what balanced batches show of each checkpoint, in order.
    """

    dataset: str
    classes: tuple[str, ...]
    checkpoints: Sequence[Checkpoint]
    entries: dict[str, Measures]
    predictions: Sequence[Predictions]
    crops: int
    spread: bool = False
    shown: Sequence[Conditional] = ()

    @property
    def moments(self) -> str:
        """Which moments the norms had."""
        return self.checkpoints[0].cfg.TEST.MOMENTS

    @property
    def title(self) -> str:
        """What the page is headed by."""
        return f"Classifiers on {self.dataset}"

    @property
    def facts(self) -> list[str]:
        """Sentences on what was evaluated and how."""
        views = {1: "One crop", 10: "Ten crops", 144: "144 crops"}[self.crops]
        mean = "" if self.crops == 1 else ", whose class probabilities are averaged"
        told = [f"{views} of an image{mean}; {self.predictions[0].note}."]
        if len(self.entries) > len(self.checkpoints):
            told.append("The ensemble is the mean of the class probabilities of all checkpoints.")
        for checkpoint, found in zip(self.checkpoints, self.predictions):
            cfg = checkpoint.cfg
            done = "" if found.iteration is None else f" after {found.iteration + 1:,} iterations"
            told.append(f"{checkpoint.name}: {model_title(cfg)}, {checkpoint.weights}{done}.")
        for checkpoint, shown in zip(self.checkpoints, self.shown):
            told += [f"{checkpoint.name}: {sentence}" for sentence in _sentences(shown)]
        return told


def _sentences(shown: Conditional) -> list[str]:
    """What balanced batches show of one model."""
    told = []
    if shown.relabel:
        first, last, rounds = shown.relabel[0], shown.relabel[-1], counted(len(shown.relabel) - 1, "round")
        told.append(
            f"{rounds} of balancing the batches by predictions: error {100 - first:.2f} % by standard inference, "
            f"{100 - last:.2f} % at the end (test labels measure it and nothing else)."
        )
    words = {
        "weak_missing": "a weak image takes the missing class",
        "pair_missing": "two weak images take the missing classes",
        "strong_own": "a strong image keeps its own",
        "company_kept": "the others keep theirs",
    }
    shares = [f"{text} in {shown.walks[name]:.1f} %" for name, text in words.items() if name in shown.walks]
    if shares:
        told.append(f"walking through a confident balanced batch, {', '.join(shares)} ({CONDITIONAL}).")
    return told


def check_same_set(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse checkpoints that are not all of one set of images, evaluated by the same moments.

    Raises:
        ValueError: the first that differs.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        for group, keys in (("DATASETS", first.cfg.DATASETS), ("TEST", ("MOMENTS",))):
            for key in keys:
                own, expected = other.cfg[group][key], first.cfg[group][key]
                if own != expected:
                    raise ValueError(
                        f"{group}.{key} must be the same in all that is compared, got {expected!r} in {first.name} and "
                        f"{own!r} in {other.name}"
                    )


def evaluate_checkpoints(
    checkpoints: Sequence[Checkpoint], crops: int = 1, ensemble: bool = False, spread: bool = False
) -> Comparison:
    """Evaluate checkpoints of one set of images, see :func:`~fbn_plugin.engine.classification.predictions.predict`;
    what TEST.AT_END says of balanced batches is done, too.

    Args:
        checkpoints: see :func:`check_same_set`.
        crops: views of an image.
        ensemble: add the mean of all of their probabilities.
        spread: each view of an image has other company; for TEST.MOMENTS of batches and several crops.

    Raises:
        FileNotFoundError, ValueError: weights that do not fit, images that are not there.
    """
    if spread and (crops == 1 or checkpoints[0].cfg.TEST.MOMENTS == "population"):
        raise ValueError("--spread-crops must be with --crops 10 or 144 and --moments balanced or batch")
    sets: dict[str, Any] = {}
    found, shown, classes = [], [], None
    for each in checkpoints:
        cfg = each.cfg
        if cfg.INPUT.FORMAT not in sets:
            sets[cfg.INPUT.FORMAT] = build_data(cfg)
        data = sets[cfg.INPUT.FORMAT]
        loaded = load_model(each, data)
        found.append(predict(each, crops, data, spread, loaded))
        classes = data.classes
        shown.append(conditional_studies(cfg, loaded[0], data.val, len(classes), device_of(loaded[0])))
    names = [each.name for each in checkpoints]
    entries = {name: measure(each.probabilities, each.labels) for name, each in zip(names, found)}
    if ensemble:
        joined = average(found, names)
        entries[f"ensemble of {len(found)}"] = measure(joined.probabilities, joined.labels)
    return Comparison(data.title, classes, checkpoints, entries, found, crops, spread, shown)


def write_comparison(folder: Path, comparison: Comparison, command: str) -> None:
    """Write ``evaluation.json`` and ``confusion_1.json``, ...

    Args:
        folder: is made where it is not there.
        comparison: what to write.
        command: the command line.

    Raises:
        OSError: it cannot be written.
    """
    folder = Path(folder)
    with writing(folder):
        os.makedirs(folder, exist_ok=True)
    atomic_write(folder / "evaluation.json", _as_bytes(_record(comparison, command)))
    for number, (name, measures) in enumerate(comparison.entries.items(), start=1):
        matrix = {"name": name, "classes": list(comparison.classes), "rows": "true", "columns": "predicted"}
        content = _as_bytes({**matrix, "images": measures.confusion.tolist()}, indent=None)
        atomic_write(folder / f"confusion_{number}.json", content)
    remove_numbered(folder, "confusion_{}.json", len(comparison.entries))


def _as_bytes(content: dict[str, Any], indent: int | None = 2) -> bytes:
    return (json.dumps(content, indent=indent) + "\n").encode()


def _record(comparison: Comparison, command: str) -> dict[str, Any]:
    commit, dirty = source_commit() or (None, None)
    first = comparison.checkpoints[0]
    return {
        "dataset": [comparison.dataset],
        "val_images": len(comparison.predictions[0].labels),
        "crops": comparison.crops,
        "spread_crops": comparison.spread,
        "moments": comparison.moments,
        "conditional": comparison.moments == "balanced",
        "note": comparison.predictions[0].note,
        "entries": [
            {"name": name, **_source(comparison, number), **_figures(comparison.classes, measures)}
            for number, (name, measures) in enumerate(comparison.entries.items())
        ],
        "command": command,
        "commit": commit,
        "dirty": dirty,
        "hardware": hardware(first.cfg.MODEL.DEVICE if first.cfg.MODEL.DEVICE == "cpu" else None),
        "versions": package_versions(),
    }


def _source(comparison: Comparison, number: int) -> dict[str, Any]:
    """Of which weights an entry is; an ensemble of those of all."""
    if number == len(comparison.checkpoints):
        return {"members": [each.name for each in comparison.checkpoints]}
    checkpoint = comparison.checkpoints[number]
    return {
        "weights": checkpoint.weights,
        "iteration": comparison.predictions[number].iteration,
        "model": checkpoint.cfg.MODEL.NAME,
        "norm": checkpoint.cfg.MODEL.NORM or "the model's own",
        "seed": checkpoint.cfg.SEED,
        **comparison.shown[number].as_json(),
    }


def _figures(classes: Sequence[str], measures: Measures) -> dict[str, Any]:
    images = measures.confusion.sum(axis=1).tolist()
    return {
        "metrics": measures.figures,
        "reliability": measures.reliability.as_json(),
        "by_class": [
            {"class": name, "images": count, "top1": accuracy}
            for name, count, accuracy in zip(classes, images, measures.by_class)
        ],
    }
