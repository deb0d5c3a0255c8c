"""Training and evaluation of image classifiers with timm: models, transforms, optimizers and schedulers are timm's, the
norm is a spec string.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence

import torch
from timm.data import Mixup
from torch import Tensor, nn

from fbn_plugin.engine.classification.config import MAY_CHANGE, check_config, classification_config
from fbn_plugin.engine.classification.data import build_train_loader
from fbn_plugin.engine.classification.evaluation import Evaluator
from fbn_plugin.engine.classification.model import build_model, check_image_size
from fbn_plugin.engine.classification.optimization import build_optimizer, build_scheduler
from fbn_plugin.engine.classification.results import write_results
from fbn_plugin.engine.data.image_data import ImageData, load_image_data
from fbn_plugin.engine.data.sampling import BalancedSampler
from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run import distributed, stopping
from fbn_plugin.engine.run.best_checkpoint import BestCheckpoint, check_metric
from fbn_plugin.engine.run.checkpoint import AtomicCheckpointer
from fbn_plugin.engine.run.cli import UserError
from fbn_plugin.engine.run.config import CfgNode, save_config, saved_config, with_value
from fbn_plugin.engine.run.lock import hold, lets_go, open_output_dir
from fbn_plugin.engine.run.logging import Timer, TrainingLog, setup_logging
from fbn_plugin.engine.run.norm_stats import log_norms
from fbn_plugin.engine.run.output_dir import holds_training
from fbn_plugin.engine.run.refusals import check_enough_iterations, check_finite, check_run, check_state
from fbn_plugin.engine.run.resuming import PeriodicCheckpointer, checkpoint_to_resume, lacks_final, save_before_leaving
from fbn_plugin.engine.run.rules import named, refusal
from fbn_plugin.engine.run.run_info import hardware, write_evaluation, write_run_info
from fbn_plugin.engine.run.schedule import eval_iterations, is_evaluated_after, recorded_evaluation
from fbn_plugin.engine.run.seeding import same_on_all_processes, seed_iteration

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
        self.cfg, solver = cfg, cfg.SOLVER
        self.log_period, self.command = log_period, command
        self.device = distributed.init(cfg.MODEL.DEVICE)
        check_config(cfg)
        hold(cfg.OUTPUT_DIR)
        continues = check_run(
            *(cfg, {"MODEL.NORM": cfg.MODEL.NORM}, self.device, distributed.world_size(), resume, eval_only),
            lambda: saved_config(cfg.OUTPUT_DIR, classification_config()),
            MAY_CHANGE,
        )
        self.data = load_image_data(cfg.DATASETS.NAME, cfg.DATASETS.ROOT, cfg.INPUT.FORMAT)
        self.evaluator = Evaluator(cfg, self.data.val, len(self.data.classes), self.device)
        if not eval_only:
            _check_batch(cfg, self.data)
            if solver.BEST_CHECKPOINT_METRIC:
                check_metric("SOLVER.BEST_CHECKPOINT_METRIC", solver.BEST_CHECKPOINT_METRIC, self.evaluator.names)
        self.iters_per_epoch = max(1, len(self.data.train) // solver.IMS_PER_BATCH)
        self.max_iter = solver.MAX_EPOCH * self.iters_per_epoch
        if solver.MAX_ITER:
            self.max_iter = min(self.max_iter, solver.MAX_ITER)
        self.notes: list[str] = []  # for the log
        chosen = eval_iterations(cfg.TEST.EVAL_ITERATIONS, self.max_iter, self.notes.append)
        self.cfg = cfg = with_value(cfg, "TEST.EVAL_ITERATIONS", chosen)
        with same_on_all_processes(cfg.SEED):
            self.model = build_model(cfg, len(self.data.classes)).to(self.device)
        check_image_size(cfg, self.model, self.device)
        self.evaluator.check(self.model)
        self.optimizer = build_optimizer(cfg, self.model)
        self.scheduler = build_scheduler(cfg, self.optimizer, self.iters_per_epoch)
        self.scaler = torch.amp.GradScaler(enabled=solver.AMP.ENABLED and self.device.type == "cuda")
        self.checkpointer = AtomicCheckpointer(self.model, cfg.OUTPUT_DIR, optimizer=self.optimizer, scaler=self.scaler)
        self.start_iter, self.log_window, self.lacks_final = 0, {}, False
        self.weights, self.iteration = cfg.MODEL.WEIGHTS, None  # which, and the last one, from 0, behind them
        if continues:
            self._continue(resume, eval_only)
        else:
            with named("MODEL.WEIGHTS"):
                content = self.checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[], strict=eval_only)
            given = content.get("iteration")  # other trainings' files may have anything there
            self.iteration = given if type(given) is int and given >= 0 else None
        self.best = BestCheckpoint(cfg.OUTPUT_DIR, solver.BEST_CHECKPOINT_METRIC, resume=self.start_iter > 0)

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
        """`top1`, with more than 5 classes `top5` (both in percent), and `loss` on the validation set, as TEST says."""
        return self.evaluator(self.model)

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
        cfg = self.cfg
        model = cfg.MODEL.NAME + (f" with {cfg.MODEL.NORM}" if cfg.MODEL.NORM else "")
        top5 = f", top-5 {result['top5']:.2f} %" if "top5" in result else ""
        figures = f"top-1 {result['top1']:.2f} %{top5}, loss {result['loss']:.4f}"
        return f"{model} on {self.data.title}: {figures} ({self.evaluator.note})"

    @lets_go
    def train(self) -> dict[str, float]:
        """Train from the start, or from where the checkpoint left off, to the end; return the final evaluation.

        Writes config.yaml, log.txt, metrics.json, TensorBoard files, checkpoints (with SOLVER.BEST_CHECKPOINT_METRIC
        model_best.pth), run_info.json and results.json to OUTPUT_DIR. On the CPU a run that is interrupted and resumed
        ends with the same bits as one that is not; on a GPU some backward passes add in no fixed order.

        Raises:
            FloatingPointError: the loss is not finite.
            UserError: an image cannot be decoded.
            WriteError: the disk is full.
        """
        with stopping.deferred():
            return self._train()

    def _train(self) -> dict[str, float]:
        cfg, data = self.cfg, self.data
        self._open_output_dir()
        saver = PeriodicCheckpointer(
            self.checkpointer,
            cfg.SOLVER.CHECKPOINT_PERIOD or self.iters_per_epoch,
            self.max_iter,
            max_to_keep=2,
        )
        with TrainingLog(cfg.OUTPUT_DIR, self.max_iter, self.start_iter, self.log_period, self.log_window) as log:
            result = self._catch_up(saver, log)
            model = distributed.data_parallel(self.model.train(), self.device)
            mixup = _build_mixup(cfg, len(data.classes))
            batches = build_train_loader(cfg, data.train, self.device, self.start_iter)
            timer = Timer()
            for iteration in range(self.start_iter, self.max_iter):
                timer()
                images, targets = (tensor.to(self.device) for tensor in next(batches))
                data_time = timer()
                seed_iteration(cfg.SEED, iteration)
                losses = self._step(model, iteration, *(mixup(images, targets) if mixup else (images, targets)))
                lr = self.optimizer.param_groups[0]["lr"]
                log.step(iteration, **losses, lr=lr, time=data_time + timer(), data_time=data_time)
                if self._is_evaluated_after(iteration + 1) and not stopping.agreed():
                    with contextlib.suppress(stopping.EvaluationLeft):  # a resumed run makes up for it
                        result = self._evaluate_and_log(log, iteration)
                if stopping.agreed():
                    save_before_leaving(saver, iteration, log_window=log.window)
                    stopping.leave()
                # After the evaluation, so that a run that is killed has not missed it.
                saver.step(iteration, log_window=log.window)
        if distributed.is_main():
            length = self.max_iter, self.iters_per_epoch
            write_results(cfg, data, self.model, result, self.evaluator, *length, self.device, self.command)
        return result

    def _is_evaluated_after(self, finished: int) -> bool:
        period = self.cfg.TEST.EVAL_PERIOD * self.iters_per_epoch
        return is_evaluated_after(finished, self.max_iter, period, self.cfg.TEST.EVAL_ITERATIONS)

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
        if self.lacks_final:
            saver.save("model_final", iteration=last, log_window=log.window)
        return result

    def _open_output_dir(self) -> None:
        """Make OUTPUT_DIR, and write there what is known before training."""
        cfg, data = self.cfg, self.data
        open_output_dir(cfg.OUTPUT_DIR)
        distributed.on_main(self._write_settings)
        setup_logging(cfg.OUTPUT_DIR)
        for note in self.notes:
            logger.warning("%s", note)
        log_norms(self.model)
        logger.info(
            f"{data.title}: {counted(len(data.train), 'training image')}, "
            f"{counted(len(data.val), 'validation image')}, {len(data.classes)} classes; "
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
            {data.title: self.evaluator.size},
        )

    def _step(self, model: nn.Module, iteration: int, images: Tensor, targets: Tensor) -> dict[str, float]:
        """One update of the weights; the loss, as the mean over processes."""
        self.scheduler.step_update(iteration)
        amp_dtype = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        smoothing = 0.0 if targets.is_floating_point() else self.cfg.SOLVER.LABEL_SMOOTHING  # mixup has smoothed them
        try:
            with torch.autocast(self.device.type, amp_dtype, enabled=self.cfg.SOLVER.AMP.ENABLED):
                loss = nn.functional.cross_entropy(model(images), targets, label_smoothing=smoothing)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            images = counted(len(targets), "image")
            raise UserError(f"SOLVER.IMS_PER_BATCH must be more than {images} for each process: {error}") from None
        losses = distributed.reduce_mean({"total_loss": loss.item()}, self.device)
        check_finite(losses, iteration)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return losses

    def _evaluate_and_log(self, log: TrainingLog, iteration: int) -> dict[str, float]:
        timer = Timer()
        result = self.evaluate()
        seconds = timer()
        self.best.update(self.model, iteration, result)  # first: an evaluation in the log is not done again
        epoch = (iteration + 1) / self.iters_per_epoch
        figures = {f"val/{name}": value for name, value in result.items()}
        if self.evaluator.conditional:
            figures["val/conditional"] = 1
        log.write(iteration, {"epoch": epoch, **figures, "evaluation_seconds": seconds})
        logger.info("epoch %.4g: %s", epoch, self.describe(result))
        return result


def _check_batch(cfg: CfgNode, data: ImageData) -> None:
    """Refuse a batch that the training images cannot fill, or not in equal shares of the classes."""
    images, per_class, processes = cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.IMAGES_PER_CLASS, distributed.world_size()
    if len(data.train) < images:
        raise refusal("SOLVER.IMS_PER_BATCH", f"{len(data.train)}, the number of training images, or less", images)
    if per_class:
        balanced = BalancedSampler(data.train, per_class, cfg.SEED).batch_size * processes
        if balanced != images:
            share = f"DATALOADER.IMAGES_PER_CLASS {per_class} of {len(data.classes)} classes"
            raise refusal("SOLVER.IMS_PER_BATCH", f"{balanced}, {share} in {counted(processes, 'process')}", images)


def _build_mixup(cfg: CfgNode, num_classes: int) -> Mixup | None:
    """timm's mixup and CutMix, which smooth the labels too, or None where neither is on."""
    if not (cfg.INPUT.MIXUP or cfg.INPUT.CUTMIX):
        return None
    smoothing = cfg.SOLVER.LABEL_SMOOTHING
    return Mixup(cfg.INPUT.MIXUP, cfg.INPUT.CUTMIX, label_smoothing=smoothing, num_classes=num_classes)
