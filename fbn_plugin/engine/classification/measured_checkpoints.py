"""Measures on training batches at the weights of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from fbn_plugin.analysis.landscape import Landscape
from fbn_plugin.analysis.moments import Distances
from fbn_plugin.engine.classification.augmentation import switch_mixup
from fbn_plugin.engine.classification.batch import BatchSizes, check_batch
from fbn_plugin.engine.classification.batch_measures import BatchMeasures
from fbn_plugin.engine.classification.data import build_train_loader
from fbn_plugin.engine.classification.datasets import build_data
from fbn_plugin.engine.classification.losses import build_loss
from fbn_plugin.engine.classification.measuring import check_measured
from fbn_plugin.engine.classification.model import build_model, check_image_size
from fbn_plugin.engine.classification.predictions import Checkpoint
from fbn_plugin.engine.classification.preparation import BatchPreparation
from fbn_plugin.engine.classification.step import place_model
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.checkpoint import AtomicCheckpointer

__all__ = ["Measured", "checkpoint_landscape", "checkpoint_moments"]

Found = TypeVar("Found")


@dataclass(frozen=True)
class Measured(Generic[Found]):
    """What was measured at a checkpoint.

    Args:
        checkpoint: the weights and their config.
        iteration: the last one, from 0, that the weights have behind them; None where they do not tell.
        title: of the set of images.
        batches: what was found on each batch.
    """

    checkpoint: Checkpoint
    iteration: int | None
    title: str
    batches: list[Found]


def checkpoint_landscape(checkpoint: Checkpoint, count: int) -> Measured[Landscape]:
    """The loss landscape on training batches, with MEASURE.LANDSCAPE.STEPS of the config: on those that follow on the
    weights in their own training, or, where these do not tell their iteration, on the first ones.

    Args:
        checkpoint: weights and config.
        count: how many batches.

    Raises:
        FileNotFoundError, ValueError: the weights are not of this model, or the images are not there.
    """
    steps = checkpoint.cfg.MEASURE.LANDSCAPE.STEPS
    return _on_batches(checkpoint, count, lambda on_batch, *batch: on_batch.landscape(*batch, steps))


def checkpoint_moments(checkpoint: Checkpoint, count: int) -> Measured[Distances]:
    """The distance of some images' moments from the whole batch's, with MEASURE.MOMENTS.SUBSET and NORMS of the config;
    arguments and errors as :func:`checkpoint_landscape`, and ValueError where there is nothing to measure."""
    moments = checkpoint.cfg.MEASURE.MOMENTS
    options = moments.SUBSET, moments.NORMS
    return _on_batches(checkpoint, count, lambda on_batch, *batch: on_batch.moments(*batch, *options))


def _on_batches(
    checkpoint: Checkpoint, count: int, measure: Callable[[BatchMeasures, int, Tensor, Tensor], Found]
) -> Measured[Found]:
    cfg = checkpoint.cfg
    data = build_data(cfg)
    device = distributed.init(cfg.MODEL.DEVICE)
    classes = len(data.classes)
    check_batch(cfg, data.train, classes)
    model = place_model(cfg, build_model(cfg, classes), device)
    check_image_size(cfg, model, device, BatchSizes.of(cfg))
    check_measured(cfg, model)
    iteration = AtomicCheckpointer(model).load(checkpoint.weights, checkpointables=[], strict=True).get("iteration")
    known = type(iteration) is int and iteration >= 0
    start = iteration + 1 if known else 0
    prepare = BatchPreparation(cfg, model, classes, device)
    on_batch = BatchMeasures(model.train(), prepare, build_loss(cfg, classes), cfg.SEED)
    batches, found = build_train_loader(cfg, data.train, device, start), []
    for place in range(start, start + count):
        switch_mixup(prepare.mixup, cfg, place // max(1, len(data.train) // cfg.SOLVER.IMS_PER_BATCH))
        found.append(measure(on_batch, place, *next(batches)))
        for _ in range(cfg.SOLVER.ACCUMULATION_STEPS - 1):
            next(batches)
    return Measured(checkpoint, iteration if known else None, data.title, found)
