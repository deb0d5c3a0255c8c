"""detectron2's trainer as ``tools/train_net.py`` runs it: evaluations at chosen iterations, on statistics that all
processes share; runs that resume to the same bits; measured filters; files that are whole or not there.

What detectron2 does well is taken from it: model, optimizer, schedule, the training step and the evaluators.
"""

import argparse
import contextlib
import logging
import os
import shutil
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer, TrainerBase, hooks
from detectron2.evaluation import (
    COCOPanopticEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
    verify_results,
)
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.events import EventStorage, get_event_storage
from detectron2.utils.logger import setup_logger
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fbn_plugin
from fbn_plugin.engine.data.loaders import shield_workers
from fbn_plugin.engine.detectron2.annotation_files import read_in_its_place
from fbn_plugin.engine.detectron2.augmentation import SUFFIX, augmented
from fbn_plugin.engine.detectron2.checkpoint import AtomicCheckpointer, LossNormalizer
from fbn_plugin.engine.detectron2.coco import CocoEvaluator
from fbn_plugin.engine.detectron2.data import (
    NamingMapper,
    TrainingData,
    has_panoptic_api,
    register_datasets,
)
from fbn_plugin.engine.detectron2.hooks import Evaluation, MetricsWriter, PopulationStatistics, Saving
from fbn_plugin.engine.detectron2.model import build_model, build_optimizer
from fbn_plugin.engine.files.disk import writing
from fbn_plugin.engine.run import distributed, stopping
from fbn_plugin.engine.run.activation_meter import build_activation_meter
from fbn_plugin.engine.run.backends import set_backends
from fbn_plugin.engine.run.checkpoint import RandomState
from fbn_plugin.engine.run.cli import RUN_ERRORS, UserError, error_sentence, import_modules, user_errors
from fbn_plugin.engine.run.config import save_config
from fbn_plugin.engine.run.evaluation_names import inference_folder
from fbn_plugin.engine.run.lock import hold, let_go, open_output_dir
from fbn_plugin.engine.run.logging import LogFile
from fbn_plugin.engine.run.norm_stats import FilterMeter, log_norms
from fbn_plugin.engine.run.output_dir import check_output_dir, holds_training
from fbn_plugin.engine.run.refusals import check_finite
from fbn_plugin.engine.run.resuming import checkpoint_to_resume, lacks_final
from fbn_plugin.engine.run.run_info import hardware, write_evaluation, write_run_info
from fbn_plugin.engine.run.schedule import is_evaluated_after
from fbn_plugin.engine.run.seeding import choose_seed, same_on_all_processes
from fbn_plugin.engine.run.states import check_like, check_optimizer

__all__ = ["Trainer", "run"]

logger = logging.getLogger(__name__)

_LOGGERS = ("detectron2", "fvcore", "fbn_plugin")


class _StopWithMetrics:
    """What detectron2's training steps get before them in a class's bases: with the losses, which all processes
    exchange anyway, goes whether one was asked to stop, so that every process knows it after the same iteration."""

    def _write_metrics(self, loss_dict: Mapping[str, Tensor], data_time: float, *_, **__) -> None:
        losses = {name: loss.detach().cpu().item() for name, loss in loss_dict.items()}
        everyones = comm.all_gather((losses, data_time, stopping.asked()))
        stopping.agree(any(asked for _, _, asked in everyones))
        storage = get_event_storage()
        storage.put_scalar("rank_data_time", data_time, cur_iter=self.iter)
        if not distributed.is_main():
            return
        storage.put_scalar("data_time", max(seconds for _, seconds, _ in everyones), cur_iter=self.iter)
        means = {name: float(np.mean([theirs[name] for theirs, _, _ in everyones])) for name in losses}
        means = {"total_loss": sum(means.values()), **means}
        check_finite(means, self.iter)
        storage.put_scalars(cur_iter=self.iter, **means)


class _Step(_StopWithMetrics, SimpleTrainer):
    """A step in float32."""


class _AMPStep(_StopWithMetrics, AMPTrainer):
    """A step in mixed precision."""


class _TestLoader:
    """A test loader that ends early if this process is asked to stop."""

    def __init__(self, loader: DataLoader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[dict]]:
        return stopping.until_asked(self.loader)


class _Evaluators(DatasetEvaluators):
    """Evaluators that score nothing if a process was asked to stop while it detected, or is while they score."""

    def evaluate(self) -> dict[str, Any]:
        """The results of all of them, empty on ranks but 0.

        Raises:
            EvaluationLeft: a process was asked to stop.
        """
        stopping.unless_asked(distributed.all_gather(stopping.asked()))
        results = None
        with contextlib.suppress(stopping.EvaluationLeft):  # of the process that scores
            results = super().evaluate()
        stopping.unless_asked(distributed.all_gather(results is None))
        return results


class Trainer(DefaultTrainer):
    """detectron2's trainer for a config of :func:`fbn_plugin.engine.detectron2.config.prepare`.

    Args:
        cfg: config.
        log_period: iterations between two lines of ``metrics.json``; losses are medians over so many iterations.

    Attributes:
        seed: of the weights, of the order of the data and of their augmentation: SEED, or drawn once for the run.
        metrics: of the last evaluation; empty on ranks but 0.
    """

    def __init__(self, cfg: CfgNode, log_period: int = 20):
        # Not DefaultTrainer's: that one builds the loader before it is known where the run starts, asks for a GPU where
        # several processes train on the CPU, and leaves random states out of the checkpoint.
        TrainerBase.__init__(self)
        self.cfg = cfg
        self.log_period = log_period
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.lacks_final = False  # a resumed run with nothing left to train, and no model_final.pth yet
        self.metrics: dict[str, float] = {}
        self.seed = choose_seed(cfg.SEED)
        self.train_data = TrainingData(cfg)
        with same_on_all_processes(self.seed):
            model = self.build_model(cfg)
        optimizer = build_optimizer(cfg, model)
        self.meter = FilterMeter(model, cfg.NORM_STATS_PERIOD if distributed.is_main() else 0)
        self.activations = build_activation_meter(cfg, model)
        with warnings.catch_warnings():  # a name that newer releases of PyTorch want otherwise
            warnings.simplefilter("ignore", FutureWarning)
            model = distributed.data_parallel(model, next(model.parameters()).device, broadcast_buffers=False)
        self._trainer = (_AMPStep if cfg.SOLVER.AMP.ENABLED else _Step)(model, None, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = AtomicCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self), random=RandomState())
        self.checkpointer.add_checkpointable("loss_normalizer", LossNormalizer(self.bare_model))
        self.register_hooks(self.build_hooks())

    @property
    def bare_model(self) -> nn.Module:
        """The model, out of ``DistributedDataParallel``."""
        return self.checkpointer.model

    def build_hooks(self) -> list[HookBase]:
        cfg = self.cfg
        built = [hooks.IterationTimer(), hooks.LRScheduler()]
        if cfg.TEST.PRECISE_BN.ENABLED:  # before the checkpointer, which saves them
            built.append(PopulationStatistics(cfg.TEST.PRECISE_BN.NUM_ITER))
        # In every process, as each one's random states are saved.
        self.saving = Saving(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD)
        built.append(self.saving)
        if cfg.DATASETS.TEST:
            built.append(Evaluation(cfg.SOLVER.BEST_CHECKPOINT_METRIC))
        if distributed.is_main():
            built.append(MetricsWriter(self.log_period))
        return built

    def resume_or_load(self, resume: bool | str = True) -> None:
        """Load OUTPUT_DIR's last checkpoint with all states (with ``"auto"`` the newest that is not damaged), or
        MODEL.WEIGHTS."""
        if resume and self.checkpointer.has_checkpoint():
            path, notes = checkpoint_to_resume(self.cfg.OUTPUT_DIR, resume)
            for note in notes:
                logger.warning("%s", note)
            self.checkpointer.load(path)
            self.start_iter = self.iter + 1
            self.lacks_final = lacks_final(path, self.start_iter, self.max_iter)
        else:
            self.checkpointer.load(self.cfg.MODEL.WEIGHTS, checkpointables=[])

    def train(self) -> None:
        """Train to SOLVER.MAX_ITER."""
        self.data_loader = self.train_data.loader(self.seed, self.start_iter)
        # The focal loss is TorchScript, whose first calls in a process are interpreted and later ones compiled, to
        # other bits. On the CPU, where nothing is gained by it and all else repeats, it stays interpreted.
        with torch.jit.optimized_execution(self.cfg.MODEL.DEVICE != "cpu"), stopping.deferred():
            self._train()

    def _train(self) -> None:
        # TrainerBase's logs a traceback of everything, bad input among it, and knows no stop.
        logger.info("starting at iteration %d", self.start_iter)
        self.iter = self.start_iter
        with EventStorage(self.start_iter) as self.storage:
            try:
                self.before_train()
                while self.iter < self.max_iter:
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    if stopping.agreed():
                        stopping.leave()
                    self.iter += 1
            finally:
                self.after_train()

    def before_train(self) -> None:
        try:
            super().before_train()
        except stopping.EvaluationLeft:  # of the checkpoint that the run goes on from
            stopping.leave()

    def run_step(self) -> None:
        self._trainer.iter = self.iter
        with self.meter.measure(self.iter) as shares, self.activations.measure(self.iter) as activations:
            self._trainer.run_step()
        self.storage.put_scalars(smoothing_hint=False, **shares, **activations)

    def is_evaluated_after(self, iterations: int) -> bool:
        """Whether there is an evaluation when so many iterations are finished."""
        test = self.cfg.TEST
        due = is_evaluated_after(iterations, self.max_iter, test.EVAL_PERIOD, test.EVAL_ITERATIONS)
        return due and bool(self.cfg.DATASETS.TEST)

    def is_measured_after(self, iterations: int) -> bool:
        """Whether norms or activations were measured in the last of so many iterations."""
        periods = self.cfg.NORM_STATS_PERIOD, self.cfg.MEASURE.ACTIVATIONS.PERIOD
        return any(period > 0 and iterations % period == 0 for period in periods)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "seed": self.seed}

    def check_state_dict(self, state: Any) -> None:
        """ValueError for a state that is none of this run."""
        own = self.state_dict()
        hooks_of_run = own.pop("hooks", {})
        del own["_trainer"]["optimizer"]
        check_like(own, state)
        check_like({"optimizer": {}}, state["_trainer"], "the trainer")
        check_optimizer(self.optimizer, state["_trainer"]["optimizer"])
        check_like({"hooks": hooks_of_run}, state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.seed = state_dict["seed"]

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = build_model(cfg)
        logger.info("Model:\n%s", model)
        log_norms(model)
        return model

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict]]:
        loader = build_detection_test_loader(cfg, dataset_name, mapper=NamingMapper(cfg, is_train=False))
        return _TestLoader(shield_workers(loader))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluators:
        kind = MetadataCatalog.get(dataset_name).evaluator_type
        folder = inference_folder(cfg.OUTPUT_DIR, dataset_name, cfg.DATASETS.TEST, "inference.tmp")
        evaluators = []
        if kind in ("sem_seg", "coco_panoptic_seg"):
            evaluators.append(SemSegEvaluator(dataset_name, output_dir=folder))
        if kind in ("coco", "coco_panoptic_seg"):
            evaluators.append(CocoEvaluator(cfg, dataset_name, folder))
        if kind == "coco_panoptic_seg":
            if has_panoptic_api():
                evaluators.append(COCOPanopticEvaluator(dataset_name, folder))
            else:
                logger.warning("PQ of %s is not computed: the package panopticapi is not installed", dataset_name)
        return _Evaluators(evaluators)

    @classmethod
    def evaluate(cls, cfg: CfgNode, model: nn.Module, augmentation: bool = True) -> dict[str, float]:
        """Metrics in percent on every set of DATASETS.TEST, by name: ``bbox/AP``, ...; empty on ranks but 0.

        With more than one set, each name has the set's in front. The detections go to OUTPUT_DIR/inference. Figures of
        boxes and masks count TEST.DETECTIONS_PER_IMAGE detections of an image.

        Args:
            augmentation: with TEST.AUG.ENABLED, evaluate with that too: ``bbox_TTA/AP``, ..., and the detections in
                OUTPUT_DIR/inference_TTA.

        Raises:
            EvaluationLeft: a process is asked to stop.
        """
        metrics = cls._evaluate(cfg, model)
        if augmentation and cfg.TEST.AUG.ENABLED:
            logger.info("evaluation with test-time augmentation")
            metrics |= cls._evaluate(cfg, augmented(cfg, model), SUFFIX)
        return metrics

    @classmethod
    def _evaluate(cls, cfg: CfgNode, model: nn.Module, suffix: str = "") -> dict[str, float]:
        """One evaluation, with a suffix behind the names of its tasks and of its folder."""
        sets = cfg.DATASETS.TEST
        with _new_folder(cfg) as made:
            with writing(made, only_full=True):
                results = cls.test(cfg, model)
            if not distributed.is_main():
                return {}
            with writing(made):
                for name in sets:
                    target = Path(inference_folder(cfg.OUTPUT_DIR, name, sets, f"inference{suffix}"))
                    target.mkdir(parents=True, exist_ok=True)
                    for file in Path(inference_folder(cfg.OUTPUT_DIR, name, sets, made.name)).iterdir():
                        if file.is_file():
                            os.replace(file, target / file.name)
        of_sets = {"": results} if len(sets) == 1 else results
        named = {
            (f"{name}/" if name else "") + task + suffix: figures
            for name, found in of_sets.items()
            for task, figures in found.items()
        }
        return {name: float(value) for name, value in flatten_results_dict(named).items()}


@contextlib.contextmanager
def _new_folder(cfg: CfgNode) -> Iterator[Path]:
    """``inference.tmp`` of a run, with a folder for each of DATASETS.TEST in it, for the length of an evaluation."""
    folder = Path(cfg.OUTPUT_DIR, "inference.tmp")
    try:
        distributed.on_main(lambda: _make_folders(cfg, folder))
        yield folder
    finally:
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)


def _make_folders(cfg: CfgNode, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with writing(folder):
        for name in cfg.DATASETS.TEST:
            os.makedirs(inference_folder(cfg.OUTPUT_DIR, name, cfg.DATASETS.TEST, folder.name), exist_ok=True)


def run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """What one process does: train and evaluate, or evaluate only.

    What may still turn up on the way (a diverged loss, an image that cannot be read or is unlike its annotation) ends
    the process with one sentence and exit code 2.
    """
    with user_errors(*RUN_ERRORS):
        import_modules(args.imports)  # with several processes, this is a new one
        fbn_plugin.register()
        register_datasets(cfg, args.eval_only)
        read_in_its_place(getattr(args, "read_in_its_place", ()), cfg)
        try:
            _run(cfg, args)
        finally:
            _close_logs()
            let_go(cfg.OUTPUT_DIR)


def _run(cfg: CfgNode, args: argparse.Namespace) -> None:
    with user_errors():
        hold(cfg.OUTPUT_DIR)
        # Once more: with several processes, nobody held it when the config was prepared.
        distributed.on_main(lambda: check_output_dir(cfg.OUTPUT_DIR, args.resume, args.eval_only))
        open_output_dir(cfg.OUTPUT_DIR)
    _set_up(cfg, args)
    if args.eval_only:
        _evaluate_only(cfg, args.resume)
        return
    trainer = Trainer(cfg, args.log_period)
    trainer.resume_or_load(args.resume)
    distributed.on_main(lambda: _write_settings(cfg, trainer.train_data.images))
    starts = distributed.all_gather(trainer.start_iter)
    if len(set(starts)) > 1:
        raise UserError(f"the processes start at iterations {starts}: OUTPUT_DIR must be shared by all machines")
    trainer.train()
    _verify(cfg, trainer.metrics)


def _write_settings(cfg: CfgNode, train_images: dict[str, int]) -> None:
    save_config(cfg, os.path.join(cfg.OUTPUT_DIR, "config.yaml"))
    _write_run_info(cfg, train_images)


def _write_run_info(cfg: CfgNode, train_images: dict[str, int]) -> None:
    write_run_info(
        cfg.OUTPUT_DIR,
        "detectron2",
        cfg.MODEL.DEVICE,
        distributed.world_size(),
        cfg.SOLVER.IMS_PER_BATCH,
        train_images,
        {name: len(DatasetCatalog.get(name)) for name in cfg.DATASETS.TEST},
    )


def _verify(cfg: CfgNode, metrics: dict[str, float]) -> None:
    """Hold the last evaluation, on ranks but 0 an empty one, against TEST.EXPECTED_RESULTS, as detectron2 does."""
    results = defaultdict(dict)
    for name, value in metrics.items():
        task, _, metric = name.rpartition("/")
        results[task][metric] = value
    if results:
        verify_results(cfg, results)


def _set_up(cfg: CfgNode, args: argparse.Namespace) -> None:
    rank = distributed.rank()
    file = LogFile(os.path.join(cfg.OUTPUT_DIR, "log.txt" + (f".rank{rank}" if rank else "")))
    file.setFormatter(logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", datefmt="%m/%d %H:%M:%S"))
    for name in _LOGGERS:
        setup_logger(distributed_rank=rank, name=name).addHandler(file)
    logger.info("Process %d of %d", distributed.rank(), distributed.world_size())
    logger.info("Environment:\n%s", collect_env_info())
    logger.info("Command line: %s", args)
    logger.info("Config:\n%s", cfg.dump())
    logging.getLogger("detectron2.engine.train_loop").addFilter(_without_traceback)
    set_backends(cfg, args.eval_only)


def _close_logs() -> None:
    """Take back what ``_set_up`` did, for another run in this process."""
    setup_logger.cache_clear()  # by which a second call does nothing
    for name in _LOGGERS:
        for handler in logging.getLogger(name).handlers[:]:
            logging.getLogger(name).removeHandler(handler)
            handler.close()


def _without_traceback(record: logging.LogRecord) -> bool:
    """detectron2 logs every error in training with its traceback; of bad input or a full disk a sentence is enough."""
    if record.exc_info and isinstance(record.exc_info[1], RUN_ERRORS):
        record.msg, record.args = "The run ends: %s", (error_sentence(record.exc_info[1]),)
        record.exc_info = None
    return True


def _evaluate_only(cfg: CfgNode, resume: bool | str) -> None:
    """Evaluate MODEL.WEIGHTS, or the last checkpoint, and write ``evaluation.json``."""
    model = Trainer.build_model(cfg)
    checkpointer = AtomicCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    path = cfg.MODEL.WEIGHTS
    if resume and checkpointer.has_checkpoint():
        path, notes = checkpoint_to_resume(cfg.OUTPUT_DIR, resume)
        for note in notes:
            logger.warning("%s", note)
    state = checkpointer.load(path, checkpointables=[], strict=True)
    metrics = Trainer.evaluate(cfg, model)
    if distributed.is_main():
        if not holds_training(cfg.OUTPUT_DIR):
            _write_settings(cfg, {})
        file = os.path.join(cfg.OUTPUT_DIR, "evaluation.json")
        write_evaluation(file, state.get("iteration"), path, cfg.DATASETS.TEST, metrics, hardware(cfg.MODEL.DEVICE))
    _verify(cfg, metrics)
