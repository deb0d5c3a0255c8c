"""Hooks of the detectron2 run: population statistics, evaluation with the best checkpoint, and the metrics' files.

Each of them asks the trainer what is due after an iteration, so that they agree, and none of them draws from the
generators that training draws from.
"""

import json
import os
import sys
from collections import defaultdict

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    EventWriter,
    TensorboardXWriter,
    get_event_storage,
)

from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.best_checkpoint import BestCheckpoint
from fbn_plugin.engine.run.disk import AppendedFile, WriteError
from fbn_plugin.engine.run.logging import forget_metrics
from fbn_plugin.engine.run.population import refresh_population_stats
from fbn_plugin.engine.run.schedule import recorded_evaluation
from fbn_plugin.engine.run.seeding import seeded_rng
from fbn_plugin.training.population_statistics import forward_batch

__all__ = ["Evaluation", "MetricsWriter", "PopulationStatistics"]


class PopulationStatistics(HookBase):
    """Before each evaluation, and at the end: running statistics computed anew, the same in every process.

    The batches are training batches, of a loader and an order of their own that follow from (seed, iteration).

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
        model, trainer = self.trainer.bare_model, self.trainer
        seed = int(np.random.SeedSequence([trainer.seed, finished]).generate_state(1)[0])
        forward = _without_postprocessing if isinstance(model, GeneralizedRCNN) else forward_batch
        with EventStorage(), seeded_rng(seed):
            refresh_population_stats(
                model,
                lambda: trainer.train_data.loader(seed),
                self.num_iter,
                finished,
                lambda model, batch: forward(model, batch, next(model.parameters()).device),
            )


def _without_postprocessing(model: GeneralizedRCNN, batch: list[dict], device: torch.device) -> None:
    model.inference(batch, do_postprocess=False)  # which would paste masks at the size of the images


class Evaluation(HookBase):
    """Evaluates when the trainer says so, and keeps the best model, see ``BestCheckpoint``.

    After a resumption, an evaluation that the interruption prevented is made up for.

    Args:
        metric: what the best model is best in; "" keeps none.
    """

    def __init__(self, metric: str = ""):
        self.metric = metric

    def before_train(self) -> None:
        start = self.trainer.start_iter
        self.best = BestCheckpoint(self.trainer.cfg.OUTPUT_DIR, self.metric, resume=start > 0)
        if _missed_evaluation(self.trainer):
            self._evaluate(start - 1)

    def after_step(self) -> None:
        if self.trainer.is_evaluated_after(self.trainer.iter + 1):
            self._evaluate(self.trainer.iter)

    def _evaluate(self, iteration: int) -> None:
        model = self.trainer.bare_model
        distributed.broadcast_buffers(model)  # training keeps running statistics of its own in each process
        with seeded_rng(self.trainer.seed, iteration):
            at_end = iteration + 1 == self.trainer.max_iter
            metrics = self.trainer.metrics = self.trainer.evaluate(self.trainer.cfg, model, augmentation=at_end)
        self.best.update(model, iteration, metrics)
        if distributed.is_main():
            self.trainer.storage.put_scalars(cur_iter=iteration, smoothing_hint=False, **metrics)
        distributed.barrier()


def _missed_evaluation(trainer) -> bool:
    """Whether a resumed run begins where an evaluation is due that ``metrics.json`` does not have."""
    start = trainer.start_iter
    return trainer.is_evaluated_after(start) and not recorded_evaluation(trainer.cfg.OUTPUT_DIR, start)


class _JsonWriter(EventWriter):
    """detectron2's ``JSONWriter``, whose lines are in the file as a whole or not at all where the disk is full."""

    def __init__(self, path: str, window: int):
        self._file = AppendedFile(path)
        self._window = window
        self._last = -1

    def write(self) -> None:
        rows: dict[int, dict] = defaultdict(dict)
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(self._window).items():
            if iteration > self._last:
                rows[iteration][name] = value
        for iteration in sorted(rows):
            row = {**rows[iteration], "iteration": iteration}
            self._file.write(f"{json.dumps(row, sort_keys=True)}\n".encode())
            self._last = iteration

    def close(self) -> None:
        self._file.close()


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
        forget_metrics(path, start)
        self.printer = CommonMetricPrinter(self.trainer.max_iter, window_size=self.period)
        from fbn_plugin.engine.run.board import Board  # slow to import, and of no use to the other ranks

        board = TensorboardXWriter(folder, window_size=self.period)
        board._writer = Board(folder, purge_step=start or None)
        self.writers = [_JsonWriter(path, self.period), board]
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
        handled = sys.exc_info()[1]
        try:
            self._write()
        except WriteError:
            if handled is None:  # else there is an error already that ends the run
                raise
        for writer in self.writers:
            writer.close()

    def _write(self) -> None:
        for writer in self.writers:
            writer.write()
