"""``results.json`` of a classification run: what was trained, on what and by which command, how long it took over all
interruptions, and what came out."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fbn_plugin.engine.classification.batch import BatchSizes
from fbn_plugin.engine.classification.evaluation import Evaluator
from fbn_plugin.engine.data.image_data import ImageData
from fbn_plugin.engine.files.disk import atomic_write
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.best_checkpoint import is_better
from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.engine.run.logging import read_metrics
from fbn_plugin.engine.run.run_info import hardware, package_versions
from fbn_plugin.engine.run.source import source_commit
from fbn_plugin.surgery.norm_summary import summarize

__all__ = ["RESULTS_FILE", "best_evaluation", "durations", "write_results"]

RESULTS_FILE = "results.json"


def durations(rows: Sequence[Mapping[str, float | None]], images: int) -> dict[str, float | None]:
    """How long a run took, by the rows of its ``metrics.json``. What an interruption made a run do again stands there
    once, so these are the seconds that the final weights have behind them, over all sessions.

    Args:
        rows: in order.
        images: of an iteration.

    Returns:
        seconds of the iterations, with the waiting for images, of the evaluations, of both together, and images a
        second of the iterations; None where older rows do not tell.
    """
    training, finished = 0.0, 0
    for row in rows:
        if "time" in row:  # the mean of all iterations since the row before
            training += row["time"] * (row["iteration"] + 1 - finished)
            finished = row["iteration"] + 1
    evaluations = [row.get("evaluation_seconds") for row in rows if "val/loss" in row]
    evaluation = None if None in evaluations else sum(evaluations)
    return {
        "duration_seconds": None if evaluation is None else training + evaluation,
        "training_seconds": training,
        "evaluation_seconds": evaluation,
        "images_per_second": finished * images / training if training else None,
    }


def best_evaluation(
    rows: Sequence[Mapping[str, float | None]], metric: str, iters_per_epoch: int
) -> dict[str, Any] | None:
    """The best evaluation in the rows of ``metrics.json``, the first of several: its metric, value, finished iterations
    and epoch.

    Args:
        rows: in order.
        metric: such as ``"top1"``.
        iters_per_epoch: iterations of an epoch.

    Returns:
        None where there is no evaluation.
    """
    best = None
    for row in rows:
        value = row.get(f"val/{metric}")
        if value is not None and is_better(metric, value, best["value"] if best else math.nan):
            finished = row["iteration"] + 1
            best = {"metric": metric, "value": value, "iteration": finished, "epoch": finished / iters_per_epoch}
    return best


def write_results(
    cfg: CfgNode,
    data: ImageData,
    model: nn.Module,
    result: Mapping[str, float],
    evaluator: Evaluator,
    max_iter: int,
    iters_per_epoch: int,
    device: torch.device,
    command: Sequence[str] = (),
) -> None:
    """Write ``results.json`` into OUTPUT_DIR in one step.

    Args:
        cfg: the run's settings.
        data: what it was trained and evaluated on.
        model: as it is trained.
        result: the figures of the last evaluation.
        evaluator: which measured them.
        max_iter: iterations of the whole run.
        iters_per_epoch: iterations of an epoch.
        device: of one process.
        command: the command line of this session; empty where there was none.
    """
    solver, rows = cfg.SOLVER, read_metrics(os.path.join(cfg.OUTPUT_DIR, "metrics.json"))
    commit, dirty = source_commit() or (None, None)
    record = {
        "dataset": data.title,
        "train_images": len(data.train),
        **evaluator.details,
        **({} if data.test is None else {"test_images": len(data.test)}),
        "classes": len(data.classes),
        "model": cfg.MODEL.NAME,
        "model_options": dict(cfg.MODEL.OPTIONS),
        "norm": cfg.MODEL.NORM or "the model's own",
        "norm_layers": list(cfg.MODEL.NORM_LAYERS),
        "norms": dict(Counter(entry.label for entry in summarize(model).entries)),
        "parameters": sum(each.numel() for each in model.parameters()),
        "trained_parameters": sum(each.numel() for each in model.parameters() if each.requires_grad),
        "optimizer": solver.OPTIMIZER,
        "learning_rate": solver.BASE_LR,
        "weight_decay": solver.WEIGHT_DECAY,
        "schedule": solver.LR_SCHEDULER_NAME,
        "epochs": max_iter / iters_per_epoch,
        "iterations": max_iter,
        **BatchSizes.of(cfg).record(model),
        "processes": distributed.world_size(),
        "seed": cfg.SEED,
        **durations(rows, solver.IMS_PER_BATCH),
        "best": best_evaluation(rows, solver.BEST_CHECKPOINT_METRIC or "top1", iters_per_epoch),
        "command": shlex.join(command) or None,
        "commit": commit,
        "dirty": dirty,
        "hardware": f"{distributed.world_size()} x {hardware(device)}",
        "versions": package_versions(),
        **{name: None if math.isnan(value) else value for name, value in result.items()},
    }
    atomic_write(os.path.join(cfg.OUTPUT_DIR, RESULTS_FILE), (json.dumps(record, indent=2) + "\n").encode())
