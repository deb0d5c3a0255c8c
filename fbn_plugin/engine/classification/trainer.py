"""Training and evaluation of image classifiers with timm: models, transforms, optimizers and schedulers are timm's, the
norm is a spec string.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from fbn_plugin.engine.classification.augmentation import switch_mixup
from fbn_plugin.engine.classification.batch import BatchSizes, check_batch, check_norm_batch
from fbn_plugin.engine.classification.checkpoint import ClassifierCheckpointer
from fbn_plugin.engine.classification.config import LINEAR_RULE, MAY_CHANGE, check_config, classification_config
from fbn_plugin.engine.classification.data import build_train_loader
from fbn_plugin.engine.classification.datasets import build_data, say_broken
from fbn_plugin.engine.classification.evaluation import Evaluator
from fbn_plugin.engine.classification.final_evaluation import (
    check_final_batches,
    final_figures,
    is_wanted,
    lent_population_stats,
)
from fbn_plugin.engine.classification.losses import build_loss
from fbn_plugin.engine.classification.measuring import Measuring, check_measured
from fbn_plugin.engine.classification.model import build_model, check_image_size, model_title
from fbn_plugin.engine.classification.optimization import PlateauSchedule, build_optimizer, build_scheduler
from fbn_plugin.engine.classification.recalibration import check_statistics, recalibrate
from fbn_plugin.engine.classification.results import write_results
from fbn_plugin.engine.classification.run_bands import RunBands
from fbn_plugin.engine.classification.step import (
    TrainingStep,
    build_average,
    build_scaler,
    check_precision,
    place_model,
)
from fbn_plugin.engine.files.disk import atomic_write
from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run import distributed, stopping
from fbn_plugin.engine.run.backends import set_backends
from fbn_plugin.engine.run.best_checkpoint import BestCheckpoint, best_weights, check_metric
from fbn_plugin.engine.run.config import CfgNode, save_config, saved_config, with_value
from fbn_plugin.engine.run.linear_rule import scale_to_processes
from fbn_plugin.engine.run.lock import hold, lets_go, open_output_dir
from fbn_plugin.engine.run.logging import Timer, TrainingLog, setup_logging
from fbn_plugin.engine.run.norm_stats import log_norms
from fbn_plugin.engine.run.output_dir import holds_training
from fbn_plugin.engine.run.refusals import check_enough_iterations, check_run, check_state
from fbn_plugin.engine.run.resuming import (
    PeriodicCheckpointer,
    checkpoint_to_resume,
    is_saved_after,
    lacks_final,
    save_before_leaving,
)
from fbn_plugin.engine.run.rules import named
from fbn_plugin.engine.run.run_info import hardware, write_evaluation, write_run_info
from fbn_plugin.engine.run.schedule import eval_iterations, is_evaluated_after, recorded_evaluation
from fbn_plugin.engine.run.seeding import same_on_all_processes
from fbn_plugin.engine.run.states import check_states

__all__ = ["ClassificationTrainer"]

logger = logging.getLogger(__name__)


class ClassificationTrainer:
    """Trains and evaluates what a config describes. Building it checks all input and writes nothing.

    Args:
        cfg: `classification_config` with a file merged in.
        resume: continue from the last checkpoint in OUTPUT_DIR, if there is one, with `"auto"` from the newest that is
            not damaged, with the settings it began with; only the device, the rates, the number of iterations or
            workers, and when to save and evaluate may change.
        eval_only: only evaluate: MODEL.WEIGHTS, which must fit the whole model, or with `resume` the last checkpoint.
        log_period: iterations between two lines of `metrics.json`.
        command: the command line, for `results.json`.

    Raises:
        ValueError, OSError: bad values in the config, missing or damaged files.
    """

    def __init__(
        self,
        cfg: CfgNode,
        resume: bool | str = False,
        eval_only: bool = False,
        log_period: int = 20,
        command: Sequence[str] = (),
    ):
        self.log_period, self.eval_only, self.command = log_period, eval_only, command
        self.device = distributed.init(cfg.MODEL.DEVICE)
        check_config(cfg)
        check_precision(cfg, self.device)
        self.said: list[str] = []  # for the log
        self.notes: list[str] = []  # warnings for it
        # As integers, which an empty default does not tell `load_config`.
        cfg = with_value(cfg, "TEST.EVAL_ITERATIONS", eval_iterations(cfg.TEST.EVAL_ITERATIONS, math.inf))
        self.cfg = cfg = scale_to_processes(cfg, distributed.world_size(), self.said.append, LINEAR_RULE)
        hold(cfg.OUTPUT_DIR)
        continues = check_run(
            *(cfg, {"MODEL.NORM": cfg.MODEL.NORM}, self.device, distributed.world_size(), resume, eval_only),
            lambda: saved_config(cfg.OUTPUT_DIR, classification_config()),
            MAY_CHANGE,
        )
        self._build_data()
        self._set_length()
        self._build_model()
        self._build_solver()
        self.start_iter, self.log_window, self.lacks_final = 0, {}, False
        self.weights, self.iteration = cfg.MODEL.WEIGHTS, None  # which, and the last one, from 0, behind them
        if continues:
            self._continue(resume, eval_only)
        else:
            with named("MODEL.WEIGHTS"):
                self._load_weights(cfg.MODEL.WEIGHTS, eval_only)
            if cfg.MODEL.RECALIBRATE and not eval_only:
                check_statistics(cfg)
        self.best = BestCheckpoint(cfg.OUTPUT_DIR, cfg.SOLVER.BEST_CHECKPOINT_METRIC, resume=self.start_iter > 0)

    def _build_data(self) -> None:
        """The images and what evaluates on them; what is trained and chosen by must fit them."""
        cfg, solver = self.cfg, self.cfg.SOLVER
        self.data = build_data(cfg)
        for note in self.data.notes if self.eval_only else ():  # a training logs them into its folder
            logger.warning("%s", note)
        num_classes = len(self.data.classes)
        self.evaluator = Evaluator(cfg, self.data.val, num_classes, self.device)
        self.tester = self.data.test and Evaluator(cfg, self.data.test, num_classes, self.device, "test image")
        also = ((each, with_value(cfg, "TEST.MOMENTS", each)) for each in cfg.TEST.ALSO)
        self.further = {each: Evaluator(given, self.data.val, num_classes, self.device) for each, given in also}
        if self.eval_only:
            return
        check_batch(cfg, self.data.train, num_classes)
        if solver.BEST_CHECKPOINT_METRIC:
            names = list(self.evaluator.names)
            names += [f"ema/{name}" for name in names] if cfg.MODEL.EMA.ENABLED else []
            check_metric("SOLVER.BEST_CHECKPOINT_METRIC", solver.BEST_CHECKPOINT_METRIC, names)
        if solver.LR_SCHEDULER_NAME == "plateau":
            check_metric("SOLVER.PLATEAU_METRIC", solver.PLATEAU_METRIC, self.evaluator.names)

    def _set_length(self) -> None:
        """Iterations: of an epoch, of the run, and those that an evaluation follows."""
        cfg, solver = self.cfg, self.cfg.SOLVER
        self.iters_per_epoch = max(1, len(self.data.train) // solver.IMS_PER_BATCH)
        self.max_iter = solver.MAX_EPOCH * self.iters_per_epoch
        if solver.MAX_ITER:
            self.max_iter = min(self.max_iter, solver.MAX_ITER)
        # Asked after every iteration, so they are not looked up in the config each time.
        self._eval_iterations = eval_iterations(cfg.TEST.EVAL_ITERATIONS, self.max_iter, self.notes.append)
        self._eval_period = cfg.TEST.EVAL_PERIOD * self.iters_per_epoch

    def _build_model(self) -> None:
        """The model on its device; images, batches and loss must fit it."""
        cfg, num_classes = self.cfg, len(self.data.classes)
        with same_on_all_processes(cfg.SEED):
            self.model = place_model(cfg, build_model(cfg, num_classes), self.device)
        check_image_size(cfg, self.model, self.device, None if self.eval_only else BatchSizes.of(cfg))
        for evaluator in (self.evaluator, *self.further.values()):
            evaluator.check(self.model)
        check_final_batches(cfg, self.model, self.data.test or self.data.val, num_classes, self.device)
        if cfg.TEST.MOMENTS != "population" and not BatchSizes.of(cfg).norms(self.model):
            self.notes.append(
                f'TEST.MOMENTS "{cfg.TEST.MOMENTS}" gives what "population" gives: no norm of the model takes moments '
                "of several images"
            )
        build_loss(cfg, num_classes)  # which refuses what does not fit, before anything is written
        if not self.eval_only:
            check_norm_batch(cfg, self.model)
            check_measured(cfg, self.model)
        set_backends(cfg, self.eval_only)

    def _build_solver(self) -> None:
        """What updates the model, and what saves all of it."""
        cfg = self.cfg
        self.optimizer = build_optimizer(cfg, self.model)
        self.scheduler = build_scheduler(cfg, self.optimizer, self.iters_per_epoch)
        self.scaler = build_scaler(cfg, self.device)
        self.average = build_average(cfg, self.model)
        states = {"optimizer": self.optimizer, "scaler": self.scaler}
        states |= {"ema": self.average.module} if self.average is not None else {}
        states |= {"scheduler": self.scheduler} if isinstance(self.scheduler, PlateauSchedule) else {}
        self.checkpointer = ClassifierCheckpointer(self.model, cfg.OUTPUT_DIR, cfg.MODEL.RESET_CLASSIFIER, **states)

    def _load_weights(self, path: str, eval_only: bool) -> None:
        """Load what a run starts from, or is evaluated: with MODEL.EMA the average too, where the file has one."""
        rest = self.checkpointer.load(path, checkpointables=[], strict=eval_only)
        given = rest.get("iteration")  # other trainings' files may have anything there
        self.iteration = given if type(given) is int and given >= 0 else None
        if self.average is None:
            return
        if eval_only and "ema" in rest:
            check_states(path, rest, {"ema": self.average.module})
            self.average.module.load_state_dict(rest["ema"])
        elif eval_only:
            self.average = None
        else:
            self.average.set(self.model)

    def _continue(self, resume: bool | str, eval_only: bool) -> None:
        """Load the last checkpoint."""
        last, notes = checkpoint_to_resume(self.cfg.OUTPUT_DIR, resume)
        self.notes += notes
        state = self.checkpointer.load(last)
        check_state(last, state)
        self.weights, self.iteration = last, state["iteration"]
        self.start_iter, self.log_window = state["iteration"] + 1, state.get("log_window", {})
        if not eval_only:
            solver = self.cfg.SOLVER
            key = "MAX_ITER" if self.max_iter == solver.MAX_ITER else "MAX_EPOCH"
            end = f"SOLVER.{key}", solver[key], self.max_iter
            check_enough_iterations(*end, self.start_iter, self.cfg.OUTPUT_DIR)
            self.lacks_final = lacks_final(last, self.start_iter, self.max_iter)

    def evaluate(self) -> dict[str, float]:
        """`top1`, with more than 5 classes `top5` (both in percent), and `loss` on the validation set, by TEST.MOMENTS;
        with MODEL.EMA those of the averaged weights too, as `ema/top1` and so on; by TEST.ALSO as `balanced/top1` and
        so on; with `eval_only` those of the test set too, if there is one, as `test/top1` and so on, and those of
        TEST.AT_END, as `final/...`."""
        result = self._evaluate_all(self.evaluator)
        for moments, evaluator in self.further.items():
            result |= {f"{moments}/{name}": value for name, value in self._evaluate_all(evaluator).items()}
            result |= {f"{moments}/conditional": 1.0} if evaluator.conditional else {}
        if self.eval_only and self.tester is not None:
            result |= {f"test/{name}": value for name, value in self._evaluate_all(self.tester).items()}
        if self.eval_only and is_wanted(self.cfg):
            result |= self._measure_final()
        return result

    def _evaluate_all(self, evaluator: Evaluator) -> dict[str, float]:
        """The figures of the weights, and of the averaged ones if there are any."""
        result = evaluator(self.model)
        if self.average is not None:
            result |= {f"ema/{name}": value for name, value in evaluator(self.average.module).items()}
        return result

    @lets_go
    def write_evaluation(self, result: dict[str, float]) -> None:
        """Write `evaluation.json` into OUTPUT_DIR: the figures, how they were measured, of which weights and of which
        iteration (from 0, as in `metrics.json`; null where the weights do not tell)."""
        cfg = self.cfg
        open_output_dir(cfg.OUTPUT_DIR)
        if not holds_training(cfg.OUTPUT_DIR):
            distributed.on_main(self._write_settings)
        path = os.path.join(cfg.OUTPUT_DIR, "evaluation.json")
        weights = self.weights or f"timm's own of {cfg.MODEL.NAME}"
        record = path, self.iteration, weights, [self.data.title], result, hardware(self.device)
        distributed.on_main(lambda: write_evaluation(*record, details=self.evaluator.details))

    def describe(self, result: dict[str, float]) -> str:
        """One line that says what `result` was measured with and on."""
        line = f"{model_title(self.cfg)} on {self.data.title}: {_figures(result)} ({self.evaluator.note})"
        if "test/top1" in result:
            kind = "averaged weights" if "test/averaged" in result else "weights"
            weights = f", {kind} of epoch {result['test/epoch']:.4g}" if "test/epoch" in result else ""
            line += f"; test {_figures(result, 'test/')} ({self.tester.note}{weights})"
        for moments, evaluator in self.further.items():
            line += f"; {moments} batches: {_figures(result, f'{moments}/')} ({evaluator.note})"
        if "ema/top1" in result:
            line += f"; averaged weights: {_figures(result, 'ema/')}"
        return line

    @lets_go
    def train(self) -> dict[str, float]:
        """Train from the start, or from where the checkpoint left off, to the end; return the final evaluation.

        Writes config.yaml, log.txt, metrics.json, TensorBoard files, checkpoints (with SOLVER.BEST_CHECKPOINT_METRIC
        model_best.pth, with MODEL.EMA model_ema.pth), run_info.json and results.json to OUTPUT_DIR. On the CPU a run
        that is interrupted and resumed ends with the same bits as one that is not; on a GPU some backward passes add in
        no fixed order.

        Raises:
            FloatingPointError: the loss is not finite.
            UserError: an image cannot be decoded.
            WriteError: the disk is full.
        """
        with stopping.deferred():
            result = self._train()
            if distributed.is_main():
                if self.average is not None:
                    weights = {"model": self.average.module.state_dict()}
                    path = os.path.join(self.cfg.OUTPUT_DIR, "model_ema.pth")
                    atomic_write(path, write=lambda file: torch.save(weights, file))
                length = self.max_iter, self.iters_per_epoch
                measured = result, self.evaluator, *length, self.device, self.command
                write_results(self.cfg, self.data, self.model, *measured)
        return result

    def _train(self) -> dict[str, float]:
        cfg, data = self.cfg, self.data
        self._open_output_dir()
        if cfg.MODEL.RECALIBRATE and not self.start_iter:
            self._recalibrate()
        saver = PeriodicCheckpointer(
            self.checkpointer,
            cfg.SOLVER.CHECKPOINT_PERIOD or self.iters_per_epoch,
            self.max_iter,
            max_to_keep=2,
        )
        period = self.log_period, self.log_window, cfg.SOLVER.IMS_PER_BATCH
        # Without training the figures are those before the first iteration, which a new start measures anew.
        first = self.start_iter if self.max_iter else -1
        with TrainingLog(cfg.OUTPUT_DIR, self.max_iter, first, *period, cfg.LOGGERS, cfg) as log:
            result = self._catch_up(saver, log)
            parts = self.optimizer, self.scheduler, self.scaler, self.average, self.device
            step = TrainingStep(cfg, self.model.train(), len(data.classes), *parts)
            bands = RunBands(cfg, self.model, data, self.device, log, self.max_iter)
            measuring = Measuring(cfg, step, log, bands)
            batches = build_train_loader(cfg, data.train, self.device, self.start_iter)
            timer = Timer()
            for iteration in range(self.start_iter, self.max_iter):
                timer()
                switch_mixup(step.prepare.mixup, cfg, iteration // self.iters_per_epoch)
                losses, data_time, measured = measuring(iteration, batches)
                lr = self.optimizer.param_groups[0]["lr"]
                log.step(iteration, **losses, lr=lr, time=timer() - measured, data_time=data_time)
                if self._is_evaluated_after(iteration + 1) and not stopping.agreed():
                    with contextlib.suppress(stopping.EvaluationLeft):  # a resumed run makes up for it
                        result = self._evaluate_and_log(log, iteration)
                if stopping.agreed():
                    save_before_leaving(saver, iteration, log_window=log.window)
                    stopping.leave()
                # After the evaluation, so that a run that is killed has not missed it.
                if is_saved_after(saver, iteration):
                    saver.step(iteration, log_window=log.window)
            say_broken(data.train)
            return result | measuring.end() | self._test(log) | self._final(log)

    def _recalibrate(self) -> None:
        """Fit the norms of pretrained weights to training images, before the first iteration."""
        batches = build_train_loader(self.cfg, self.data.train, self.device)
        try:
            recalibrate(self.cfg, self.model, len(self.data.classes), batches, self.evaluator)
        except stopping.EvaluationLeft:
            stopping.leave()
        if self.average is not None:
            self.average.set(self.model)

    def _is_evaluated_after(self, finished: int) -> bool:
        due = is_evaluated_after(finished, self.max_iter, self._eval_period, self._eval_iterations)
        return due or finished == self.max_iter == 0

    def _catch_up(self, saver: PeriodicCheckpointer, log: TrainingLog) -> dict[str, float]:
        """What the run owes where it goes on: the evaluation, as ``metrics.json`` has it, or made up for, where the run
        was asked to stop in it or it is newly wanted there; and ``model_final.pth``."""
        last, result = self.start_iter - 1, {}
        if self._is_evaluated_after(last + 1):
            recorded = recorded_evaluation(self.cfg.OUTPUT_DIR, last + 1, lambda name: name.startswith("val/"))
            recorded.pop("val/conditional", None)
            result = {name.removeprefix("val/"): value for name, value in recorded.items()}
            try:
                result = result or self._evaluate_and_log(log, last)
            except stopping.EvaluationLeft:
                stopping.leave()
            self._schedule_by(result, last + 1)
        if self.lacks_final:
            saver.save("model_final", iteration=last, log_window=log.window)
        return result

    def _test(self, log: TrainingLog) -> dict[str, float]:
        """The figures of the test set, once for a run, by the weights that were best in validation or else the last:
        ``test/top1`` and so on, ``test/epoch``, that of the weights, and ``test/averaged``, 1, where these were the
        averaged ones. Empty where there is no such set."""
        if self.tester is None:
            return {}
        recorded = recorded_evaluation(self.cfg.OUTPUT_DIR, self.max_iter, lambda name: name.startswith("test/"))
        if recorded:
            recorded.pop("test/conditional", None)
            return recorded
        try:
            with best_weights(self.model, self.best.path if self.best.metric else "") as iteration:
                result = self._evaluate_all(self.tester) if iteration is None else self.tester(self.model)
        except stopping.EvaluationLeft:
            stopping.leave()
        finished = self.max_iter if iteration is None else iteration + 1
        is_averaged = iteration is not None and self.best.metric.startswith("ema/")
        result = {"epoch": finished / self.iters_per_epoch, **({"averaged": 1.0} if is_averaged else {}), **result}
        result = {f"test/{name}": value for name, value in result.items()}
        log.write(self.max_iter - 1, result | self._marks("test"))
        return result

    def _final(self, log: TrainingLog) -> dict[str, float]:
        """What TEST.AT_END measures, once for a run, by the weights that :meth:`_test` takes where there is a test set,
        else by the last."""
        if not is_wanted(self.cfg):
            return {}
        recorded = recorded_evaluation(self.cfg.OUTPUT_DIR, self.max_iter, lambda name: name.startswith("final/"))
        if recorded:
            return recorded
        best = self.best.path if self.tester is not None and self.best.metric else ""
        try:
            with best_weights(self.model, best):
                result = self._measure_final()
        except stopping.EvaluationLeft:
            stopping.leave()
        if result:
            log.write(self.max_iter - 1, result)
            logger.info("at the end: %s", ", ".join(f"{name} {value:.4g}" for name, value in result.items()))
        return result

    def _measure_final(self) -> dict[str, float]:
        cfg, data = self.cfg, self.data
        count = self.iters_per_epoch * cfg.SOLVER.ACCUMULATION_STEPS
        stream = partial(build_train_loader, cfg, data.train, self.device)
        with lent_population_stats(cfg, self.model, stream, count, self.max_iter):
            return final_figures(cfg, self.model, data.test or data.val, len(data.classes), self.device)

    def _marks(self, group: str) -> dict[str, float]:
        """What stands beside figures that test labels have a part in."""
        return {f"{group}/conditional": 1} if self.evaluator.conditional else {}

    def _open_output_dir(self) -> None:
        """Make OUTPUT_DIR, and write there what is known before training."""
        cfg, data = self.cfg, self.data
        open_output_dir(cfg.OUTPUT_DIR)
        distributed.on_main(self._write_settings)
        setup_logging(cfg.OUTPUT_DIR)
        for note in (*data.notes, *self.notes):
            logger.warning("%s", note)
        for line in (*self.said, BatchSizes.of(cfg).describe(self.model)):
            logger.info("%s", line)
        log_norms(self.model)
        test = "" if data.test is None else f"{counted(len(data.test), 'test image')}, "
        logger.info(
            f"{data.title}: {counted(len(data.train), 'training image')}, "
            f"{counted(len(data.val), 'validation image')}, {test}{len(data.classes)} classes; "
            f"{counted(self.iters_per_epoch, 'iteration')} an epoch"
        )

    def _write_settings(self) -> None:
        cfg, data = self.cfg, self.data
        save_config(cfg, os.path.join(cfg.OUTPUT_DIR, "config.yaml"))
        write_run_info(
            cfg.OUTPUT_DIR,
            "classification",
            self.device,
            distributed.world_size(),
            cfg.SOLVER.IMS_PER_BATCH,
            {data.title: len(data.train)},
            {data.title: len(data.val)},
            BatchSizes.of(cfg).record(self.model),
        )

    def _evaluate_and_log(self, log: TrainingLog, iteration: int) -> dict[str, float]:
        timer = Timer()
        result = self.evaluate()
        seconds = timer()
        self._schedule_by(result, iteration + 1)
        averaged = self.cfg.SOLVER.BEST_CHECKPOINT_METRIC.startswith("ema/")
        best = self.average.module if averaged else self.model
        self.best.update(best, iteration, result)  # first: an evaluation in the log is not done again
        epoch = (iteration + 1) / self.iters_per_epoch
        figures = {f"val/{name}": value for name, value in result.items()} | self._marks("val")
        log.write(iteration, {"epoch": epoch, **figures, "evaluation_seconds": seconds})
        logger.info("epoch %.4g: %s", epoch, self.describe(result))
        return result

    def _schedule_by(self, result: dict[str, float], finished: int) -> None:
        """Let a schedule that follows evaluations take one into account, if it has not yet."""
        regular = finished % (self._eval_period or 1) == 0  # not one at MAX_ITER
        if isinstance(self.scheduler, PlateauSchedule) and regular:
            self.scheduler.evaluated(finished, result)


def _figures(result: Mapping[str, float], group: str = "") -> str:
    names = {"top1": "top-1 {:.2f} %", "top5": "top-5 {:.2f} %", "loss": "loss {:.4f}"}
    return ", ".join(text.format(result[group + name]) for name, text in names.items() if group + name in result)
