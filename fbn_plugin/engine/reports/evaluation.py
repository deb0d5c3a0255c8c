"""COCO AP of a run that is there already: of its weights, by the engine that trained them, or of a file of detections,
whoever made it. The figures come from ``coco_eval`` in every case."""

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fbn_plugin.engine.data.coco_data import CocoDataset
from fbn_plugin.engine.data.coco_eval import evaluate_coco
from fbn_plugin.engine.data.detection_checks import check_detections
from fbn_plugin.engine.files.json_files import read_json
from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run.checkpoint import load_file
from fbn_plugin.engine.run.evaluation_names import METRICS, metric_prefix
from fbn_plugin.engine.run.run_folder import Run
from fbn_plugin.engine.run.states import checked_iteration

__all__ = [
    "averages_note",
    "evaluate_weights",
    "flat_metrics",
    "metric_rows",
    "read_detections",
    "score_detections",
]


def evaluate_weights(
    run: Run,
    weights: Path,
    datasets: Sequence[str],
    evaluate: Callable[[Run, str, Sequence[str], Path], dict[str, float]],
) -> tuple[dict[str, dict[str, float]], int | None]:
    """Detect with a run's model and score it; nothing is written into the run's folder.

    Args:
        run: whose ``config.yaml`` describes the model.
        weights: a checkpoint of that model.
        datasets: names, see ``named_sets.resolve_dataset``.
        evaluate: the run's engine: given the run, a data set's name, overrides of the run's config and a folder for
            what it writes, it returns the AP.

    Returns:
        name of each set -> its AP in percent, see ``evaluate_coco``; and the last iteration, from 0, that the weights
        have behind them, None where they do not tell.

    Raises:
        FileNotFoundError, ValueError: the weights are not of this model, or a set is not there or has other classes.
    """
    iteration = _iteration(weights, load_file(weights))
    metrics = {}
    for name in datasets:
        with tempfile.TemporaryDirectory() as folder:
            overrides = ["OUTPUT_DIR", folder, "MODEL.WEIGHTS", os.path.abspath(weights)]
            overrides += ["DATASETS.TEST", repr((name,))]
            metrics[name] = evaluate(run, name, overrides, Path(folder))
    return metrics, iteration


def _iteration(weights: Path, content: Mapping[str, Any]) -> int | None:
    """The last iteration, from 0, that a checkpoint says it has behind it; None where it does not."""
    return checked_iteration(os.fspath(weights), content) if "iteration" in content else None


def averages_note(run: Run, weights: Path) -> str | None:
    """What to say where a run's own evaluations use population statistics and a checkpoint has moving averages.

    TEST.PRECISE_BN measures the statistics right before an evaluation; a checkpoint between two has those of training.

    Returns:
        a sentence, or None where the checkpoint has population statistics, has no norm that keeps any, or does not tell
        its iteration.

    Raises:
        ValueError: the checkpoint or ``metrics.json`` cannot be read.
    """
    if not run.config.get("TEST.PRECISE_BN.ENABLED"):
        return None
    content = load_file(weights)
    iteration = _iteration(weights, content)
    # A frozen norm has no such counter.
    if iteration is None or not any(name.endswith("num_batches_tracked") for name in content["model"]):
        return None
    has_metrics = (run.folder / "metrics.json").is_file()
    if has_metrics and any(iteration + 1 in run.evaluations(name) for name in run.test_sets):
        return None
    return (
        f"metrics.json has no evaluation after {counted(iteration + 1, 'iteration')}, so these weights hold the "
        "running averages of training, not the population statistics that the run's own evaluations use "
        "(TEST.PRECISE_BN)."
    )


def read_detections(path: str | os.PathLike, data: CocoDataset) -> list[dict[str, Any]]:
    """A file of detections in COCO's results format, checked against the set that they are on.

    Either all of them have a ``segmentation`` (RLE with compressed ``counts``) or none.

    Raises:
        FileNotFoundError, ValueError: one sentence that says what is wrong, and in which entry.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"detections {path} are not there")
    return check_detections(os.fspath(path), read_json(path), data)


def score_detections(
    data: CocoDataset, detections: Sequence[dict[str, Any]], run: Run | None = None
) -> dict[str, float]:
    """``evaluate_coco`` of what ``read_detections`` read: masks too if there are any.

    Args:
        data: ground truth.
        detections: of all of its images.
        run: says how many detections of an image count (100 without it), and whether masks were looked for at all where
            nothing was detected.

    Raises:
        ValueError: the run's TEST.DETECTIONS_PER_IMAGE is no number.
    """
    config = run.config if run else {}
    masks = "segmentation" in detections[0] if detections else config.get("MODEL.MASK_ON", True)
    limit = config.get("TEST.DETECTIONS_PER_IMAGE", 100)
    if not isinstance(limit, int):
        raise ValueError(f"{run.folder / 'config.yaml'}: TEST.DETECTIONS_PER_IMAGE must be an integer, got {limit!r}")
    data.say_left_out(masks)
    return evaluate_coco(data, detections, masks, max(100, limit))


def metric_rows(metrics: Mapping[str, float]) -> list[list[str]]:
    """Rows of text, header first: box and mask AP in percent; ``-`` where COCO has no such objects."""
    tasks = [task for task in ("bbox", "segm", "bbox_TTA", "segm_TTA") if f"{task}/AP" in metrics]
    values = [[metrics[f"{task}/{name}"] for name in METRICS] for task in tasks]
    body = [["-" if math.isnan(value) else f"{value:.2f}" for value in row] for row in values]
    return [["task", *METRICS], *([task, *row] for task, row in zip(tasks, body))]


def flat_metrics(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Figures of each set -> all of them under the names of ``metrics.json``: with more than one set, its name is in
    front."""
    return {
        metric_prefix(name, metrics) + key: value for name, figures in metrics.items() for key, value in figures.items()
    }
