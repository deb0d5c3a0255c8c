"""Hooks of the detectron2 run: population statistics, evaluation with the best checkpoint, and the metrics' files.

Each of them asks the trainer what is due after an iteration, so that they agree, and none of them draws from the
generators that training draws from.
"""

import contextlib
import json
import math
import os
import sys
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicCheckpointer
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    EventWriter,
    TensorboardXWriter,
    get_event_storage,
)

from fbn_plugin.engine.files.disk import AppendedFile, WriteError
from fbn_plugin.engine.run import distributed, stopping
from fbn_plugin.engine.run.best_checkpoint import BestCheckpoint
from fbn_plugin.engine.run.logging import forget_metrics, read_metrics
from fbn_plugin.engine.run.population import refresh_population_stats
from fbn_plugin.engine.run.resuming import is_saved_after, save_before_leaving
from fbn_plugin.engine.run.schedule import recorded_evaluation
from fbn_plugin.engine.run.seeding import seeded_rng
from fbn_plugin.training.population_statistics import forward_batch

__all__ = ["Evaluation", "MetricsWriter", "PopulationStatistics", "Saving"]


class PopulationStatistics(HookBase):
    """Before each evaluation, and at the end: running statistics computed anew, the same in every process.

    The batches are training batches, of a loader and an order of their own that follow from (seed, iteration).

    Args:
        num_iter: batches of each process.
    """

    def __init__(self, num_iter: int):
        self.num_iter = num_iter

    def before_train(self) -> None:
        if self.trainer.lacks_final or _missed_evaluation(self.trainer):
            self._update(self.trainer.start_iter)

    def after_step(self) -> None:
        finished = self.trainer.iter + 1
        due = self.trainer.is_evaluated_after(finished) or finished == self.trainer.max_iter
        if due and not stopping.agreed():
            with contextlib.suppress(stopping.EvaluationLeft):  # the run saves, and leaves
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


class Saving(PeriodicCheckpointer):
    """detectron2's hook, which saves before a run leaves, too."""

    def before_train(self) -> None:
        super().before_train()
        if self.trainer.lacks_final:
            self.trainer.iter -= 1  # as after the last iteration
            self.save("model_final", iteration=self.trainer.iter)
            self.trainer.iter += 1

    def after_step(self) -> None:
        if stopping.agreed():
            save_before_leaving(self, self.trainer.iter)
        else:
            super().after_step()

    def after_left_evaluation(self) -> None:
        """Save, if that has not been done."""
        if not is_saved_after(self, self.trainer.iter):
            save_before_leaving(self, self.trainer.iter)


def _without_postprocessing(model: GeneralizedRCNN, batch: list[dict], device: torch.device) -> None:
    model.inference(batch, do_postprocess=False)  # which would paste masks at the size of the images


class Evaluation(HookBase):
    """Evaluates when the trainer says so, and keeps the best model, see ``BestCheckpoint``.

    After a resumption, an evaluation that the interruption prevented is made up for. One that is left because the run
    is to stop is as none.

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
        if self.trainer.is_evaluated_after(self.trainer.iter + 1) and not stopping.agreed():
            try:
                self._evaluate(self.trainer.iter)
            except stopping.EvaluationLeft:
                self.trainer.saving.after_left_evaluation()

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
    resumption, what the interrupted run wrote for iterations that come again is taken out. Its state is what the next
    line is still to be made from, so that a resumed run writes the same lines.
    """

    def __init__(self, period: int):
        self.period = period
        self.writers: list[EventWriter] = []
        self._resumed: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Of each scalar the values of the last ``period`` iterations, and whether they are smoothed."""
        if not self.writers:  # not restored yet
            return self._resumed
        storage = self.trainer.storage
        first = storage.iter - self.period + 1
        values = {
            name: [(float(value), step) for value, step in history.values()[-self.period :] if step >= first]
            for name, history in storage.histories().items()
        }
        return {"values": values, "smoothing": dict(storage.smoothing_hints())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resumed = state

    def _restore(self, written: float) -> None:
        """Put back into the storage what a checkpoint has of it, and as if new what came after the last line."""
        storage = self.trainer.storage
        smoothing = self._resumed.get("smoothing", {})
        for name, values in self._resumed.get("values", {}).items():
            *earlier, (last, at) = values or [(0.0, -1)]
            for value, step in earlier if at > written else values:
                storage.histories()[name].update(value, step)
            if at > written:
                storage.put_scalar(name, last, smoothing_hint=smoothing[name], cur_iter=at)

    def before_train(self) -> None:
        start, folder = self.trainer.start_iter, self.trainer.cfg.OUTPUT_DIR
        path = os.path.join(folder, "metrics.json")
        forget_metrics(path, start)
        self.printer = CommonMetricPrinter(self.trainer.max_iter, window_size=self.period)
        from fbn_plugin.engine.run.board import Board  # slow to import, and of no use to the other ranks

        board = TensorboardXWriter(folder, window_size=self.period)
        board._writer = Board(folder, purge_step=start or None)
        self.writers = [_JsonWriter(path, self.period), board]
        made_up_for = bool(self.trainer.storage.latest())  # an evaluation
        written = max((row["iteration"] for row in read_metrics(path)), default=-1)
        # Its line has the losses, too. Else the next iterations put all anew, but for the time, which has a pause.
        self._restore(written if made_up_for else math.inf)
        if made_up_for:
            self._write()

    def after_step(self) -> None:
        finished = self.trainer.iter + 1
        trainer = self.trainer
        if stopping.agreed() and trainer.is_evaluated_after(finished):
            return  # the line wants the evaluation, too: the resumed run writes it
        in_period = finished % self.period == 0 or finished == trainer.max_iter
        if in_period:
            self.printer.write()
        if in_period or trainer.is_evaluated_after(finished) or trainer.is_measured_after(finished):
            self._write()

    def after_train(self) -> None:
        handled = sys.exc_info()[1]
        try:
            if not stopping.agreed():
                self._write()
        except WriteError:
            if handled is None:  # else there is an error already that ends the run
                raise
        for writer in self.writers:
            writer.close()

    def _write(self) -> None:
        for writer in self.writers:
            writer.write()
