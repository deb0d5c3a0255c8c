"""Hooks of the detectron2 run: population statistics, evaluation with the best checkpoint, and the metrics' files.

Each of them asks the trainer what is due after an iteration, so that they agree, and none of them draws from the
generators that training draws from.
"""

import json
import logging
import math
import os

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.events import CommonMetricPrinter, EventStorage, EventWriter, JSONWriter, TensorboardXWriter
from torch.nn.modules.batchnorm import _BatchNorm

from fbn_plugin.engine.data.sampling import seeded_rng
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.checkpoint import atomic_write, load_file
from fbn_plugin.engine.run.cli import UserError
from fbn_plugin.engine.run.logging import read_metrics
from fbn_plugin.training.population_statistics import forward_batch, update_population_stats

__all__ = ["Evaluation", "MetricsWriter", "PopulationStatistics"]

logger = logging.getLogger(__name__)


class PopulationStatistics(HookBase):
    """Before each evaluation, and at the end: running statistics computed anew, the same in every process.

    The batches are training batches, of a loader and an order of their own that follow from (seed, iteration). Frozen
    norms keep their statistics; a model without batch norms in training is left as it is.

    Args:
        num_iter: batches of each process.
    """

    def __init__(self, num_iter: int):
        self.num_iter = num_iter

    def before_train(self) -> None:
        if _missed_evaluation(self.trainer):
            self._update(self.trainer.start_iter)

    def after_step(self) -> None:
        finished = self.trainer.iter + 1
        if self.trainer.is_evaluated_after(finished) or finished == self.trainer.max_iter:
            self._update(finished)

    def _update(self, finished: int) -> None:
        model = self.trainer.bare_model
        if not any(isinstance(m, _BatchNorm) and m.training and m.running_mean is not None for m in model.modules()):
            logger.info("TEST.PRECISE_BN: the model has no running statistics to compute")
            return
        logger.info("Population statistics over %d batches", self.num_iter)
        seed = int(np.random.SeedSequence([self.trainer.seed, finished]).generate_state(1)[0])
        forward = _without_postprocessing if isinstance(model, GeneralizedRCNN) else forward_batch
        try:
            with EventStorage(), seeded_rng(seed):
                update_population_stats(
                    model,
                    self.trainer.train_data.loader(seed),
                    self.num_iter,
                    forward=lambda model, batch: forward(model, batch, next(model.parameters()).device),
                )
        except ValueError as error:
            raise UserError(f"population statistics after {finished} iterations: {error}") from None


def _without_postprocessing(model: GeneralizedRCNN, batch: list[dict], device: torch.device) -> None:
    model.inference(batch, do_postprocess=False)  # which would paste masks at the size of the images


class Evaluation(HookBase):
    """Evaluates when the trainer says so, and keeps the best model.

    After a resumption, an evaluation that the interruption prevented is made up for.

    Args:
        metric: what the best model is best in; "" keeps none.

    ``model_best.pth`` holds the model with the metric that it was kept for. That file alone says what is to be beaten,
    so it survives any interruption.
    """

    def __init__(self, metric: str = ""):
        self.metric = metric
        self.best = -math.inf

    def before_train(self) -> None:
        start = self.trainer.start_iter
        folder = self.trainer.cfg.OUTPUT_DIR
        self.path = os.path.join(folder, "model_best.pth")
        if start and self.metric and distributed.is_main() and os.path.isfile(self.path):
            best = load_file(self.path)
            if best.get("metric") == self.metric:
                self.best = best["value"]
        if _missed_evaluation(self.trainer):
            self._evaluate(start - 1)

    def after_step(self) -> None:
        if self.trainer.is_evaluated_after(self.trainer.iter + 1):
            self._evaluate(self.trainer.iter)

    def _evaluate(self, iteration: int) -> None:
        model = self.trainer.bare_model
        distributed.broadcast_buffers(model)  # training keeps running statistics of its own in each process
        with seeded_rng(self.trainer.seed, iteration):
            metrics = self.trainer.metrics = self.trainer.evaluate(self.trainer.cfg, model)
        if distributed.is_main():
            self._keep_best(iteration, metrics)
            self.trainer.storage.put_scalars(cur_iter=iteration, smoothing_hint=False, **metrics)
        distributed.barrier()

    def _keep_best(self, iteration: int, metrics: dict[str, float]) -> None:
        if not self.metric:
            return
        if self.metric not in metrics:
            raise UserError(
                f"SOLVER.BEST_CHECKPOINT_METRIC is {self.metric!r}; this evaluation gives {', '.join(metrics)}"
            )
        value = metrics[self.metric]
        if value > self.best:
            self.best = value
            content = {
                "model": self.trainer.bare_model.state_dict(),
                "iteration": iteration,
                "metric": self.metric,
                "value": value,
            }
            atomic_write(self.path, write=lambda file: torch.save(content, file))
            logger.info("The best %s so far, %.3f: saved %s", self.metric, value, self.path)


def _missed_evaluation(trainer) -> bool:
    """Whether a resumed run begins where an evaluation is due that ``metrics.json`` does not have."""
    start = trainer.start_iter
    if not start or not trainer.is_evaluated_after(start):
        return False
    rows = read_metrics(os.path.join(trainer.cfg.OUTPUT_DIR, "metrics.json"))
    done = any(row["iteration"] == start - 1 and _is_evaluation(row) for row in rows)
    return not distributed.broadcast_object(done)


def _is_evaluation(row: dict[str, float]) -> bool:
    return any(name.rpartition("/")[2].startswith(("AP", "AR@", "mIoU", "PQ")) for name in row if "/" in name)


class MetricsWriter(HookBase):
    """``metrics.json``, TensorBoard and the terminal, rank 0 only.

    A line is written every ``period`` iterations, and for each evaluation and each measurement of the norms. After a
    resumption, what the interrupted run wrote for iterations that come again is taken out.
    """

    def __init__(self, period: int):
        self.period = period
        self.writers: list[EventWriter] = []

    def before_train(self) -> None:
        start, folder = self.trainer.start_iter, self.trainer.cfg.OUTPUT_DIR
        path = os.path.join(folder, "metrics.json")
        kept = [json.dumps(row) + "\n" for row in read_metrics(path) if row["iteration"] < start]
        atomic_write(path, "".join(kept).encode())
        self.printer = CommonMetricPrinter(self.trainer.max_iter, window_size=self.period)
        self.writers = [
            JSONWriter(path, window_size=self.period),
            TensorboardXWriter(folder, window_size=self.period, purge_step=start or None),
        ]
        self._write()  # an evaluation that was made up for

    def after_step(self) -> None:
        finished = self.trainer.iter + 1
        trainer = self.trainer
        in_period = finished % self.period == 0 or finished == trainer.max_iter
        if in_period:
            self.printer.write()
        if in_period or trainer.is_evaluated_after(finished) or trainer.is_measured_after(finished):
            self._write()

    def after_train(self) -> None:
        self._write()
        for writer in self.writers:
            writer.close()

    def _write(self) -> None:
        for writer in self.writers:
            writer.write()
