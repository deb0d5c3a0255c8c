"""Training and evaluation of torchvision's Mask R-CNN and Faster R-CNN from a config in detectron2's vocabulary.

See ``config.py`` for the keys, ``data.py`` for the batches, ``weights.py`` for what a run starts from, and ``model.py``
for model, optimizer and schedule.
"""

import contextlib
import functools
import itertools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fbn_plugin.engine.data.coco_data import CocoDataset
from fbn_plugin.engine.data.coco_eval import coco_results, evaluate_coco, metric_names
from fbn_plugin.engine.files.disk import atomic_write, writing
from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run import distributed, stopping
from fbn_plugin.engine.run.backends import set_backends
from fbn_plugin.engine.run.best_checkpoint import BestCheckpoint, check_metric
from fbn_plugin.engine.run.checkpoint import AtomicCheckpointer, RandomState
from fbn_plugin.engine.run.config import CfgNode, save_config, saved_config
from fbn_plugin.engine.run.detection_keys import MAY_CHANGE, detection_config
from fbn_plugin.engine.run.evaluation_names import METRICS, inference_folder, metric_prefix
from fbn_plugin.engine.run.linear_rule import scale_to_processes
from fbn_plugin.engine.run.lock import hold, lets_go, open_output_dir
from fbn_plugin.engine.run.logging import Timer, TrainingLog, setup_logging
from fbn_plugin.engine.run.norm_stats import FilterMeter, log_norms
from fbn_plugin.engine.run.output_dir import holds_training
from fbn_plugin.engine.run.population import check_population_stats, refresh_population_stats
from fbn_plugin.engine.run.refusals import check_enough_iterations, check_finite, check_run, check_state
from fbn_plugin.engine.run.resuming import (
    PeriodicCheckpointer,
    checkpoint_to_resume,
    is_saved_after,
    lacks_final,
    save_before_leaving,
)
from fbn_plugin.engine.run.rules import named
from fbn_plugin.engine.run.run_info import hardware, write_evaluation, write_run_info
from fbn_plugin.engine.run.schedule import is_evaluated_after, recorded_evaluation
from fbn_plugin.engine.run.seeding import choose_seed, same_on_all_processes
from fbn_plugin.engine.torchvision.config import norms_of
from fbn_plugin.engine.torchvision.data import DetectionData
from fbn_plugin.engine.torchvision.model import build_model, build_optimizer, build_scheduler
from fbn_plugin.engine.torchvision.weights import StartingWeights

__all__ = ["DetectionTrainer"]

logger = logging.getLogger(__name__)

_LOSS_NAMES = {"loss_objectness": "loss_rpn_cls", "loss_rpn_box_reg": "loss_rpn_loc", "loss_classifier": "loss_cls"}


class DetectionTrainer:
    """One run: data, model, optimizer and checkpoints of a config.

    Everything that bad input can break happens in the constructor; the output folder is made only after it all fits.

    Args:
        cfg: from ``load_detection_config``.
        resume: continue from OUTPUT_DIR's last checkpoint, if there is one, with ``"auto"`` from the newest that is not
            damaged, with the settings it began with; only the device, the number of iterations or workers, and how
            often to save or evaluate may change. On the CPU the run then ends with the same bits as one that was never
            stopped; on a GPU some backward passes add in no fixed order.
        eval_only: only evaluate: MODEL.WEIGHTS, or with ``resume`` the last checkpoint.
        log_period: iterations between two lines of ``metrics.json``.

    Raises:
        FileNotFoundError, ValueError: bad data, weights or settings, in one sentence.
    """

    def __init__(self, cfg: CfgNode, resume: bool | str = False, eval_only: bool = False, log_period: int = 20):
        self.device = distributed.init(cfg.MODEL.DEVICE)
        processes = distributed.world_size()
        self.cfg = cfg = scale_to_processes(cfg, processes)
        self.log_period = log_period
        hold(cfg.OUTPUT_DIR)
        continues = check_run(
            *(cfg, norms_of(cfg), self.device, processes, resume, eval_only),
            lambda: saved_config(cfg.OUTPUT_DIR, detection_config()),
            MAY_CHANGE,
        )
        self.data = DetectionData(cfg, self.device, eval_only)
        if not eval_only and cfg.SOLVER.BEST_CHECKPOINT_METRIC:
            check_metric("SOLVER.BEST_CHECKPOINT_METRIC", cfg.SOLVER.BEST_CHECKPOINT_METRIC, self._metric_names())
        with named("MODEL.WEIGHTS"):
            weights = StartingWeights(cfg.MODEL.WEIGHTS) if cfg.MODEL.WEIGHTS and not continues else None
        if eval_only and weights and weights.is_backbone:
            raise ValueError(f"MODEL.WEIGHTS {weights.source} is a backbone; --eval-only wants a whole detector")
        set_backends(cfg, eval_only)
        self._build()
        if not eval_only:
            check_population_stats(cfg, self.model)
        report = self._load(weights, resume if continues else False, eval_only)
        self.best = BestCheckpoint(cfg.OUTPUT_DIR, cfg.SOLVER.BEST_CHECKPOINT_METRIC, resume=self.start > 0)
        open_output_dir(cfg.OUTPUT_DIR)
        if not (eval_only and holds_training(cfg.OUTPUT_DIR)):
            distributed.on_main(lambda: save_config(cfg, os.path.join(cfg.OUTPUT_DIR, "config.yaml")))
        setup_logging(cfg.OUTPUT_DIR)
        log_norms(self.model)
        if weights:
            weights.advise(cfg)
        for line in report:
            logger.info("%s", line)

    def _build(self) -> None:
        """Model, optimizer, schedule and scaler, with the seed that their first values follow from."""
        cfg = self.cfg
        self.seed = choose_seed(cfg.SEED)
        with same_on_all_processes(self.seed):
            self.model = build_model(cfg).to(self.device)
        self.optimizer = build_optimizer(cfg, self.model)
        self.scheduler = build_scheduler(cfg, self.optimizer)
        fp16 = cfg.SOLVER.AMP.ENABLED and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.checkpointer = AtomicCheckpointer(
            self.model,
            cfg.OUTPUT_DIR,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            scaler=self.scaler,
            random=RandomState(),
        )

    def _load(self, weights: StartingWeights | None, resume: bool | str, eval_only: bool) -> list[str]:
        """Load the last checkpoint or what the run starts from; lines for the log."""
        cfg = self.cfg
        self.start, self.log_window, self.lacks_final = 0, {}, False
        self.iteration: int | None = None  # the last one, from 0, that the weights have behind them
        self.weights = cfg.MODEL.WEIGHTS
        if resume:
            self.weights, notes = checkpoint_to_resume(cfg.OUTPUT_DIR, resume)
            state = self.checkpointer.load(self.weights, checkpointables=[] if eval_only else None, strict=True)
            check_state(self.weights, state, ("iteration", "seed"))
            self.iteration, self.seed = state["iteration"], state["seed"]
            self.start, self.log_window = self.iteration + 1, state.get("log_window", {})
            if not eval_only:
                last = cfg.SOLVER.MAX_ITER
                check_enough_iterations("SOLVER.MAX_ITER", last, last, self.start, cfg.OUTPUT_DIR)
                self.lacks_final = lacks_final(self.weights, self.start, last)
            return notes
        if weights:
            self.iteration = weights.iteration
            return weights.load(self.model, strict=eval_only)
        if cfg.MODEL.BACKBONE.FREEZE_AT > 0:
            logger.warning(
                "MODEL.BACKBONE.FREEZE_AT %d freezes random weights, as MODEL.WEIGHTS is empty; 0 trains all of them",
                cfg.MODEL.BACKBONE.FREEZE_AT,
            )
        return []

    @lets_go
    def train(self) -> dict[str, float]:
        """Train to SOLVER.MAX_ITER with checkpoints and evaluations on the way; return the last evaluation's metrics.

        Raises:
            FloatingPointError: the loss is not finite.
            WriteError: the disk is full.
        """
        with stopping.deferred():
            return self._train()

    def _train(self) -> dict[str, float]:
        cfg = self.cfg
        model = distributed.data_parallel(self.model, self.device)
        periodic = PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.MAX_ITER)
        processes = counted(distributed.world_size(), "process")
        logger.info(
            "training on %s, %s, iteration %d to %d, seed %d",
            *(self.device, processes, self.start + 1, cfg.SOLVER.MAX_ITER, self.seed),
        )
        self._write_run_info()
        meter = FilterMeter(self.model, cfg.NORM_STATS_PERIOD if distributed.is_main() else 0)
        period = self.log_period, self.log_window, cfg.SOLVER.IMS_PER_BATCH
        with TrainingLog(cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER, self.start, *period) as log:
            metrics = self._catch_up(periodic, log)
            loader = iter(self.data.loader(self.seed, self.start))
            model.train()
            timer = Timer()
            for iteration in range(self.start, cfg.SOLVER.MAX_ITER):
                timer()
                images, targets = next(loader)
                data_time = timer()
                lr = self.optimizer.param_groups[0]["lr"]
                with meter.measure(iteration) as shares:
                    losses = self._step(model, iteration, images, targets)
                self.iteration = iteration
                log.step(iteration, **losses, lr=lr, time=data_time + timer(), data_time=data_time)
                if shares:
                    log.write(iteration, shares)
                metrics = self._save_and_evaluate(periodic, log, iteration)
        return metrics

    def _save_and_evaluate(self, periodic: PeriodicCheckpointer, log: TrainingLog, iteration: int) -> dict[str, float]:
        """What is due after an iteration. A run that is asked to stop saves and leaves, without the evaluation, which a
        resumed one makes up for."""
        evaluates, metrics = self._is_evaluated_after(iteration + 1), {}
        state = {"seed": self.seed, "log_window": log.window}
        if evaluates and not stopping.agreed():
            # Before the checkpoint, which then has the statistics that are evaluated: a run resumed from it goes on as
            # this one does.
            with contextlib.suppress(stopping.EvaluationLeft):
                self._refresh_statistics()
        if stopping.agreed():
            save_before_leaving(periodic, iteration, **state)
            stopping.leave()
        periodic.step(iteration, **state)
        if evaluates:
            try:
                metrics = self._evaluate_and_log(log, iteration)
                self.model.train()
            except stopping.EvaluationLeft:
                if not is_saved_after(periodic, iteration):
                    save_before_leaving(periodic, iteration, **state)
                stopping.leave()
        return metrics

    def evaluate(self) -> dict[str, float]:
        """COCO AP in percent on every set of DATASETS.TEST: ``bbox/AP``, ``segm/AP50``, ..., the same on every process.

        With more than one set, each key has the set's name in front. The detections go to OUTPUT_DIR/inference. Draws
        no random numbers, so that training goes on as if there had been no evaluation.

        Raises:
            EvaluationLeft: a process is asked to stop.
        """
        distributed.broadcast_buffers(self.model)
        self.model.eval()
        metrics = {}
        for data in self.data.test:
            parts, stops = zip(*distributed.all_gather((self._detect(data), stopping.asked())))
            stopping.unless_asked(stops)
            score = functools.partial(self._score, data, list(itertools.chain.from_iterable(parts)))
            values = distributed.broadcast_object(stopping.leavable(score) if distributed.is_main() else None)
            stopping.unless_asked([values is None])
            prefix = metric_prefix(data.name, self.cfg.DATASETS.TEST)
            metrics.update({prefix + name: value for name, value in values.items()})
        return metrics

    @lets_go
    def write_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Write ``evaluation.json`` into OUTPUT_DIR: the metrics, of which weights, and of which iteration (from 0,
        as in ``metrics.json``; null where the weights do not tell)."""
        if distributed.is_main():
            if not holds_training(self.cfg.OUTPUT_DIR):
                self._write_run_info()
            path = os.path.join(self.cfg.OUTPUT_DIR, "evaluation.json")
            write_evaluation(path, self.iteration, self.weights, self.cfg.DATASETS.TEST, metrics, hardware(self.device))

    @torch.inference_mode()
    def _detect(self, data: CocoDataset) -> list[dict[str, Any]]:
        """This rank's share of the detections on a set."""
        loader = self.data.test_images(data)
        results = []
        bar = tqdm(loader, "evaluating", leave=False, disable=None if distributed.is_main() else True)
        for images, targets in stopping.until_asked(bar):
            (output,) = self.model([images[0].to(self.device)])
            results += coco_results(data, targets[0]["image_id"], output)
        return results

    def _score(self, data: CocoDataset, results: list[dict[str, Any]]) -> dict[str, float]:
        """AP of all detections on a set, which are written too."""
        cfg = self.cfg
        folder = inference_folder(cfg.OUTPUT_DIR, data.name, cfg.DATASETS.TEST)
        with writing(folder):
            os.makedirs(folder, exist_ok=True)
        atomic_write(os.path.join(folder, "coco_instances_results.json"), json.dumps(results).encode())
        values = evaluate_coco(data, results, cfg.MODEL.MASK_ON, max(100, cfg.TEST.DETECTIONS_PER_IMAGE))
        for task in ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",):
            line = "  ".join(f"{name} {values[f'{task}/{name}']:.2f}" for name in METRICS)
            logger.info("%s %s: %s", data.name, task, line)
        return values

    def _catch_up(self, periodic: PeriodicCheckpointer, log: TrainingLog) -> dict[str, float]:
        """What the run owes where it goes on: the evaluation, as ``metrics.json`` has it, or made up for, where an
        interruption after the checkpoint took it or it is newly wanted there; and ``model_final.pth``."""
        due = self._is_evaluated_after(self.start)
        metrics = recorded_evaluation(self.cfg.OUTPUT_DIR, self.start) if due else {}
        try:
            if due and not metrics:
                self.model.train()
                self._refresh_statistics()
            if self.lacks_final:
                periodic.save("model_final", iteration=self.iteration, seed=self.seed, log_window=log.window)
            return self._evaluate_and_log(log, self.start - 1) if due and not metrics else metrics
        except stopping.EvaluationLeft:
            stopping.leave()

    def _evaluate_and_log(self, log: TrainingLog, iteration: int) -> dict[str, float]:
        metrics = self.evaluate()
        self.best.update(self.model, iteration, metrics)  # first: an evaluation in the log is not done again
        log.write(iteration, metrics)
        return metrics

    def _is_evaluated_after(self, finished: int) -> bool:
        test, last = self.cfg.TEST, self.cfg.SOLVER.MAX_ITER
        return bool(self.data.test) and is_evaluated_after(finished, last, test.EVAL_PERIOD, test.EVAL_ITERATIONS)

    def _metric_names(self) -> list[str]:
        """What the evaluations give."""
        return [
            metric_prefix(data.name, self.cfg.DATASETS.TEST) + name
            for data in self.data.test
            for name in metric_names(data, self.cfg.MODEL.MASK_ON)
        ]

    def _refresh_statistics(self) -> None:
        """TEST.PRECISE_BN: running statistics from training batches of their own, which the iteration alone decides.

        Raises:
            EvaluationLeft: a process is asked to stop.
        """
        if self.cfg.TEST.PRECISE_BN.ENABLED:
            seed = self.seed + self.iteration + 1
            refresh_population_stats(
                self.model,
                lambda: self.data.loader(seed, 0),
                self.cfg.TEST.PRECISE_BN.NUM_ITER,
                self.iteration + 1,
                self._forward,
            )

    def _forward(self, model: nn.Module, batch: tuple[Sequence[Tensor], Any]) -> None:
        model.transform.training = True  # the images have the size that training gives them
        model([image.to(self.device, non_blocking=True) for image in batch[0]])

    def _write_run_info(self) -> None:
        if distributed.is_main():
            write_run_info(
                self.cfg.OUTPUT_DIR,
                "torchvision",
                self.device,
                distributed.world_size(),
                self.cfg.SOLVER.IMS_PER_BATCH,
                {data.name: len(data.images) for data in self.data.train},
                {data.name: len(data.images) for data in self.data.test},
            )

    def _step(
        self, model: nn.Module, iteration: int, images: Sequence[Tensor], targets: Sequence[dict]
    ) -> dict[str, float]:
        images = [image.to(self.device, non_blocking=True) for image in images]
        targets = [
            {name: value.to(self.device, non_blocking=True) for name, value in target.items() if name != "image_id"}
            for target in targets
        ]
        with torch.autocast(self.device.type, enabled=self.cfg.SOLVER.AMP.ENABLED):
            losses = model(images, targets)
            total = sum(losses.values())
        values = {_LOSS_NAMES.get(name, name): loss.item() for name, loss in losses.items()}
        values = distributed.reduce_mean({"total_loss": sum(values.values()), **values}, self.device)
        check_finite(values, iteration)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()
        self._clip_gradients()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        return values

    def _clip_gradients(self) -> None:
        clip = self.cfg.SOLVER.CLIP_GRADIENTS
        if clip.ENABLED:
            self.scaler.unscale_(self.optimizer)
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:  # each parameter by itself, as detectron2
                    if clip.CLIP_TYPE == "value":
                        nn.utils.clip_grad_value_(parameter, clip.CLIP_VALUE)
                    else:
                        nn.utils.clip_grad_norm_(parameter, clip.CLIP_VALUE, clip.NORM_TYPE)
