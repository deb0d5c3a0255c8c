"""AP of a finished run of detectron2's, for ``tools/evaluate.py``; alone of its folder it imports no detectron2."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fbn_plugin.engine.data.coco_data import CocoDataset
from fbn_plugin.engine.data.named_sets import resolve_dataset
from fbn_plugin.engine.files.disk import WriteError
from fbn_plugin.engine.reports.evaluation import read_detections, score_detections
from fbn_plugin.engine.run.run_folder import Run

__all__ = ["evaluate_run"]


def evaluate_run(
    run: Run, name: str, overrides: Sequence[str], folder: Path, train_net: Path, imports: Sequence[str] = ()
) -> dict[str, float]:
    """AP in percent on the data set ``name``, see ``evaluate_weights``; of a run with TEST.AUG.ENABLED with it, too.

    Args:
        train_net: ``tools/train_net.py``, which detects in a process of its own.
        imports: what that imports first.

    Raises:
        FileNotFoundError, ValueError: what ``train_net`` refuses in one sentence, detectron2's absence too.
        WriteError: the disk is full.
        RuntimeError: it failed otherwise.
    """
    data = resolve_dataset(name)
    command = [sys.executable, os.fspath(train_net), "--config-file", os.fspath(run.folder / "config.yaml")]
    command += [part for module in imports for part in ("--import", module)]
    done = subprocess.run([*command, "--eval-only", *overrides], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sentence = re.search(r"^error: (.*)", done.stderr, re.MULTILINE)
        if done.returncode in (1, 2) and sentence:
            raise (ValueError if done.returncode == 2 else WriteError)(sentence[1])
        raise RuntimeError(f"{train_net} ended with code {done.returncode}:\n{done.stderr}")
    metrics = _score(data, folder / "inference", run)
    if (augmented := folder / "inference_TTA").is_dir():  # TEST.AUG, under detectron2's names
        figures = _score(data, augmented, run)
        metrics |= {name.replace("/", "_TTA/", 1): value for name, value in figures.items()}
    return metrics


def _score(data: CocoDataset, folder: Path, run: Run) -> dict[str, float]:
    return score_detections(data, read_detections(folder / "coco_instances_results.json", data), run)
