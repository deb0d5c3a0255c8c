"""The evaluation of a classification run's weights, whether it is training or not: what ``tools/evaluate.py`` does."""

from __future__ import annotations

import os
from pathlib import Path

from fbn_plugin.engine.classification.measures import measure
from fbn_plugin.engine.classification.predictions import find_checkpoint, predict
from fbn_plugin.engine.run.run_folder import named_checkpoint
from fbn_plugin.engine.run.run_info import hardware, write_evaluation

__all__ = ["evaluate_run"]


def evaluate_run(
    folder: Path, weights: str | None = None, output: str | os.PathLike | None = None
) -> tuple[dict[str, float], str]:
    """Evaluate a run's weights as the run itself does, in one process; nothing else in its folder is touched.

    Args:
        folder: OUTPUT_DIR.
        weights: a checkpoint, as a path or a name in the folder; None is ``model_final.pth``, else the last one.
        output: file for the figures as JSON, see :func:`~fbn_plugin.engine.run.run_info.write_evaluation`.

    Returns:
        ``top1``, ``top5`` and ``loss``, and a line on what they were measured with and on.

    Raises:
        FileNotFoundError, ValueError: weights or images are not there, or do not fit.
    """
    place = folder if weights is None else named_checkpoint(folder, weights)
    checkpoint = find_checkpoint(place, None if place.is_dir() else folder / "config.yaml")
    cfg, found = checkpoint.cfg, predict(checkpoint)
    figures = measure(found.probabilities, found.labels).figures
    figures.pop("ece")
    if output:
        device = hardware("cpu" if cfg.MODEL.DEVICE == "cpu" else None)
        details = {"val_images": len(found.labels), "moments": cfg.TEST.MOMENTS}
        details["conditional"] = cfg.TEST.MOMENTS == "balanced"
        write_evaluation(output, found.iteration, checkpoint.weights, [found.title], figures, device, details=details)
    done = "" if found.iteration is None else f", {found.iteration + 1:,} iterations"
    return figures, f"{found.title} ({checkpoint.weights}{done}; {found.note})"
