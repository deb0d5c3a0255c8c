"""Pretrained weights with other norms: fitted to training images before training starts, with the accuracy of each
step on the way.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch.distributed as dist
from torch import nn

from fbn_plugin import convert_norm, update_population_stats
from fbn_plugin.engine.classification.checkpoint import ClassifierCheckpointer
from fbn_plugin.engine.classification.model import build_model
from fbn_plugin.engine.files.disk import atomic_write
from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.checkpoint import load_file
from fbn_plugin.engine.run.cli import UserError
from fbn_plugin.engine.run.config import CfgNode, with_value
from fbn_plugin.engine.run.rules import refusal
from fbn_plugin.layers.description import family

__all__ = ["check_statistics", "recalibrate"]

logger = logging.getLogger(__name__)


def check_statistics(cfg: CfgNode) -> None:
    """Refuse MODEL.RECALIBRATE with a file of weights that has no running statistics.

    Raises:
        ValueError: with the file.
    """
    path = cfg.MODEL.WEIGHTS
    if path and os.path.isfile(path) and not any(name.endswith("running_mean") for name in load_file(path)["model"]):
        what = f"0 with MODEL.WEIGHTS {path}, which has no running statistics of batch norms"
        raise refusal("MODEL.RECALIBRATE", what, cfg.MODEL.RECALIBRATE)


def recalibrate(
    cfg: CfgNode,
    model: nn.Module,
    num_classes: int,
    batches: Iterable[Any],
    measure: Callable[[nn.Module], dict[str, float]],
) -> dict[str, dict[str, float]]:
    """Fit the norms of a model that starts from pretrained weights to MODEL.RECALIBRATE batches of training images.

    Norms of the BN family get population statistics, see :func:`fbn_plugin.update_population_stats`. All others have no
    running statistics to take: their scale and shift are fitted by least squares to what the batch norms of the
    pretrained model give, see :func:`fbn_plugin.convert_norm`.

    Writes ``recalibration.json`` to OUTPUT_DIR, and a line for each step to the log.

    Args:
        cfg: config.
        model: with the weights, on its device; its norms change in place.
        num_classes: of the data.
        batches: of this process, images (N, C, H, W) and targets.
        measure: evaluates a model, on all processes.

    Returns:
        the metrics of ``"own"``, the pretrained model with its own batch norms, of ``"converted"``, ``model`` as it was
        given, and of ``"recalibrated"``.

    Raises:
        UserError: the fit is not finite, or no value reaches a norm.
    """
    source = _with_own_norms(cfg, model, num_classes)
    results = {"own": measure(source), "converted": measure(model)}
    count = cfg.MODEL.RECALIBRATE
    try:
        if cfg.MODEL.NORM:
            layers = cfg.MODEL.NORM_LAYERS or None
            source = convert_norm(source, cfg.MODEL.NORM, include=layers, recalibrate=islice(batches, count))
        else:
            update_population_stats(source.train(), batches, count)
    except ValueError as error:
        raise UserError(f"MODEL.RECALIBRATE: {error}") from None
    model.load_state_dict(source.state_dict())
    if distributed.world_size() > 1:  # least squares are of a process's own images
        for value in model.state_dict().values():
            dist.broadcast(value, 0)
    results["recalibrated"] = measure(model)
    _tell(cfg, model, results)
    return results


def _with_own_norms(cfg: CfgNode, model: nn.Module, num_classes: int) -> nn.Module:
    """The pretrained model before its norms were converted, on the device of ``model``."""
    source = build_model(with_value(cfg, "MODEL.NORM", ""), num_classes)
    if cfg.MODEL.WEIGHTS:
        ClassifierCheckpointer(source, "", cfg.MODEL.RESET_CLASSIFIER).load(cfg.MODEL.WEIGHTS, [], strict=False)
    entries = source.state_dict()  # a new classifier is the model's
    given = {name: value for name, value in model.state_dict().items() if name in entries}
    source.load_state_dict({name: v for name, v in given.items() if v.shape == entries[name].shape}, strict=False)
    return source.to(next(model.parameters()).device)


def _tell(cfg: CfgNode, model: nn.Module, results: dict[str, dict[str, float]]) -> None:
    by_statistics = any(family(module) == "BN" for module in model.modules())
    what = "population statistics" if by_statistics else "scale and shift by least squares"
    batches = f"{what} over {counted(cfg.MODEL.RECALIBRATE, 'batch')}"
    names = {"own": "its own norms", "converted": cfg.MODEL.NORM or "its own norms", "recalibrated": batches}
    for step, metrics in results.items():
        logger.info("pretrained, %s: top-1 %.2f %%, loss %.4f", names[step], metrics["top1"], metrics["loss"])
    if distributed.is_main():
        record = {"norm": cfg.MODEL.NORM, "batches": cfg.MODEL.RECALIBRATE, "fitted": what, **results}
        atomic_write(os.path.join(cfg.OUTPUT_DIR, "recalibration.json"), json.dumps(record, indent=2).encode())
