"""Training and evaluation of torchvision's Mask R-CNN and Faster R-CNN from a config in detectron2's vocabulary.

See ``config.py`` for the keys and ``model.py`` for model, optimizer and schedule.
"""

import difflib
import json
import logging
import math
import os
import random
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from fbn_plugin.engine.data.coco_data import Augmentation, CocoDataset, CocoDetection, resolve_dataset
from fbn_plugin.engine.data.coco_eval import coco_results, evaluate_coco, metric_names
from fbn_plugin.engine.data.sampling import GroupedBatchSampler, InfiniteSampler, SeededDataset
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.checkpoint import (
    AtomicCheckpointer,
    PeriodicCheckpointer,
    RandomState,
    atomic_write,
    load_file,
)
from fbn_plugin.engine.run.cli import UserError
from fbn_plugin.engine.run.config import CfgNode, check_resume, save_config
from fbn_plugin.engine.run.detection_keys import MAY_CHANGE, detection_config
from fbn_plugin.engine.run.logging import Timer, TrainingLog, read_metrics, setup_logging
from fbn_plugin.engine.run.norm_stats import FilterMeter
from fbn_plugin.engine.run.run_info import hardware, write_evaluation, write_run_info
from fbn_plugin.engine.run.weights import loading_report, refuse_foreign, refuse_misfit
from fbn_plugin.engine.torchvision import detectron2_weights
from fbn_plugin.engine.torchvision.config import scale_to_processes
from fbn_plugin.engine.torchvision.model import build_model, build_optimizer, build_scheduler
from fbn_plugin.models.mask_rcnn import load_backbone
from fbn_plugin.registry import parse_spec
from fbn_plugin.training.population_statistics import update_population_stats

__all__ = ["DetectionTrainer"]

logger = logging.getLogger(__name__)

_BEST = "model_best.pth"

_LOSS_NAMES = {"loss_objectness": "loss_rpn_cls", "loss_rpn_box_reg": "loss_rpn_loc", "loss_classifier": "loss_cls"}


def _collate(batch: list[tuple[Tensor, dict[str, Any]]]) -> tuple[tuple, tuple]:
    return tuple(zip(*batch))


class _Weights:
    """The file that MODEL.WEIGHTS names, read before anything is built.

    Args:
        source: a path or an address; a checkpoint of this tool, torchvision's ResNet, or a backbone of detectron2's.

    Raises:
        OSError, ValueError: it is not there, cannot be downloaded, or is not what it should be; one sentence.
    """

    def __init__(self, source: str):
        self.source = source
        path = detectron2_weights.local_path(source)
        self.unused: list[str] = []
        self.iteration: int | None = None
        if detectron2_weights.is_detectron2_file(source):
            self.is_backbone = True
            self._weights, self.unused = detectron2_weights.read_backbone(path)
        else:
            content = load_file(path)
            self._weights = {name.removeprefix("module."): value for name, value in content["model"].items()}
            self.iteration = content.get("iteration")
            self.is_backbone = "conv1.weight" in self._weights

    def load(self, model: nn.Module, strict: bool) -> list[str]:
        """Load into a detector; the lines that say what was loaded. ``strict``: nothing may be missing or left."""
        file = f"MODEL.WEIGHTS {self.source}"
        if self.is_backbone:
            body = model.backbone.body
            with warnings.catch_warnings():  # the report tells it
                warnings.simplefilter("ignore")
                loaded = load_backbone(body, self._weights, file)
            left = [name for name in self._weights if name not in loaded and not name.endswith("num_batches_tracked")]
            loaded = {f"backbone.body.{name}" for name in loaded}
        else:
            own = {name: value.shape for name, value in model.state_dict().items()}
            given = {n: v for n, v in self._weights.items() if n in own and own[n] == getattr(v, "shape", None)}
            left = [name for name in self._weights if name not in given]
            missing = [name for name in own if name not in given]
            refuse_foreign(file, given, left)
            shapes = [(n, self._weights[n].shape, own[n]) for n in missing if hasattr(self._weights.get(n), "shape")]
            if strict:
                refuse_misfit(file, missing, shapes, left)
            # Another number of classes, or another norm, is no other network; another convolution of the backbone is.
            convolutions = [n for n in missing if n.startswith("backbone.body.") and len(own[n]) == 4]
            refuse_misfit(file, convolutions, [each for each in shapes if each[0] in convolutions])
            model.load_state_dict(given, strict=False)
            loaded = given.keys()
        return loading_report(file, model, loaded, [*left, *self.unused])

    def advise(self, cfg: CfgNode) -> None:
        """Say what torchvision's ImageNet weights want, where the config has it otherwise."""
        if self.is_backbone and (not self.source.endswith(".pkl") or "torchvision" in self.source):
            wanted = {
                "INPUT.FORMAT": (cfg.INPUT.FORMAT, "RGB"),
                "MODEL.PIXEL_MEAN": (cfg.MODEL.PIXEL_MEAN, [123.675, 116.28, 103.53]),
                "MODEL.PIXEL_STD": (cfg.MODEL.PIXEL_STD, [58.395, 57.12, 57.375]),
            }
            if cfg.MODEL.RESNETS.DEPTH >= 50:
                wanted["MODEL.RESNETS.STRIDE_IN_1X1"] = (cfg.MODEL.RESNETS.STRIDE_IN_1X1, False)
            if wrong := [f"{key} {value}" for key, (own, value) in wanted.items() if own != value]:
                logger.warning("torchvision's ImageNet weights want %s", ", ".join(wrong))


class DetectionTrainer:
    """One run: data, model, optimizer and checkpoints of a config.

    Everything that bad input can break happens in the constructor; the output folder is made only after it all fits.

    Args:
        cfg: from ``load_detection_config``.
        resume: continue from OUTPUT_DIR's last checkpoint, if there is one, with the settings it began with;
            only the device, the number of iterations or workers, and how often to save or evaluate may change. On the
            CPU the run then ends with the same bits as one that was never stopped; on a GPU some backward passes add in
            no fixed order.
        eval_only: only evaluate: MODEL.WEIGHTS, or with ``resume`` the last checkpoint.
        log_period: iterations between two lines of ``metrics.json``.

    Raises:
        FileNotFoundError, ValueError: bad data, weights or settings, in one sentence.
    """

    def __init__(self, cfg: CfgNode, resume: bool = False, eval_only: bool = False, log_period: int = 20):
        self.device = distributed.init(cfg.MODEL.DEVICE)
        self.cfg = cfg = scale_to_processes(cfg, distributed.world_size())
        self.log_period = log_period
        images, world = cfg.SOLVER.IMS_PER_BATCH, distributed.world_size()
        self.batch_size, rest = divmod(images, world)
        if rest:
            raise ValueError(f"SOLVER.IMS_PER_BATCH {images} must be a multiple of the number of processes, {world}")
        norms = [cfg.MODEL[part].NORM for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")]
        if self.device.type == "cpu" and any(norm and parse_spec(norm).name == "SyncBN" for norm in norms):
            raise ValueError(
                "SyncBN runs on GPUs only; use BN or, over several processes, SyncFBN(t_sigma=inf) on the CPU"
            )
        previous = os.path.exists(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
        if eval_only and not (cfg.MODEL.WEIGHTS or (resume and previous)):
            raise ValueError("nothing to evaluate: set MODEL.WEIGHTS, or --resume with a checkpoint in OUTPUT_DIR")
        if os.path.exists(cfg.OUTPUT_DIR) and not os.path.isdir(cfg.OUTPUT_DIR):
            raise ValueError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} is a file, not a folder")
        if previous and not (resume or eval_only):
            raise ValueError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} holds a run; add --resume to continue it, or choose another")
        if previous and resume and not eval_only:
            check_resume(cfg, detection_config(), MAY_CHANGE)
        self.test_sets = [self._dataset(name) for name in cfg.DATASETS.TEST]
        if eval_only and not self.test_sets:
            raise ValueError("DATASETS.TEST is empty; set it to a dataset such as 'my_data:val'")
        if not eval_only:
            self._check_best_metric()
            self.train_sets, self.train_set = self._training_data()
        weights = _Weights(cfg.MODEL.WEIGHTS) if cfg.MODEL.WEIGHTS and not (resume and previous) else None
        if eval_only and weights and weights.is_backbone:
            raise ValueError(f"MODEL.WEIGHTS {weights.source} is a backbone; --eval-only wants a whole detector")
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
        if cfg.FLOAT32_PRECISION:
            torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)

        seed = cfg.SEED if cfg.SEED >= 0 else int.from_bytes(os.urandom(4), "little")
        self.seed = distributed.broadcast_object(seed)
        self._seed_generators(self.seed)  # the same weights on every rank
        self.model = build_model(cfg).to(self.device)
        self._seed_generators(self.seed + distributed.rank())
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
        self.start = 0
        self.iteration: int | None = None  # the last one, from 0, that the weights have behind them
        self.weights = cfg.MODEL.WEIGHTS
        if resume and previous:
            self.weights = self.checkpointer.get_checkpoint_file()
            state = self.checkpointer.load(self.weights, checkpointables=[] if eval_only else None, strict=True)
            if not {"iteration", "seed"} <= state.keys():
                raise ValueError(f"checkpoint {self.weights} is not of a run of this tool: it has no iteration")
            self.iteration, self.seed = state["iteration"], state["seed"]
            self.start = self.iteration + 1
            if self.start > cfg.SOLVER.MAX_ITER and not eval_only:
                raise ValueError(
                    f"SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER} is too few: the run that OUTPUT_DIR {cfg.OUTPUT_DIR} holds "
                    f"has {self.start} iterations"
                )
        elif weights:
            report = weights.load(self.model, strict=eval_only)
            self.iteration = weights.iteration
        elif cfg.MODEL.BACKBONE.FREEZE_AT > 0:
            logger.warning(
                "MODEL.BACKBONE.FREEZE_AT %d freezes random weights, as MODEL.WEIGHTS is empty; 0 trains all of them",
                cfg.MODEL.BACKBONE.FREEZE_AT,
            )
        self._best = self._read_best() if self.start else None
        if distributed.is_main():
            try:
                os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
            except OSError as error:
                raise OSError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be made: {error.strerror}") from None
            if not eval_only:
                save_config(cfg, os.path.join(cfg.OUTPUT_DIR, "config.yaml"))
        distributed.barrier()
        setup_logging(cfg.OUTPUT_DIR)
        if weights:
            weights.advise(cfg)
            for line in report:
                logger.info("%s", line)

    def train(self) -> dict[str, float]:
        """Train to SOLVER.MAX_ITER with checkpoints and evaluations on the way; return the last evaluation's metrics.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        cfg = self.cfg
        model = self.model
        if distributed.world_size() > 1:
            model = DistributedDataParallel(model, [self.device] if self.device.type == "cuda" else None)
        periodic = PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.MAX_ITER)
        path = os.path.join(cfg.OUTPUT_DIR, "metrics.json")
        logger.info(
            "training on %s, %d process(es), iteration %d to %d, seed %d",
            self.device,
            distributed.world_size(),
            self.start + 1,
            cfg.SOLVER.MAX_ITER,
            self.seed,
        )
        self._write_run_info()
        meter = FilterMeter(self.model, cfg.NORM_STATS_PERIOD if distributed.is_main() else 0)
        with TrainingLog(cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER, self.start, self.log_period) as log:
            # An interruption after a checkpoint and before its evaluation, or one that is newly wanted there.
            metrics = self._recorded(path) if self._evaluates_after(self.start) else {}
            if self._evaluates_after(self.start) and not metrics:
                model.train()
                self._update_population_stats()
                metrics = self._evaluate_and_log(log, self.start - 1)
            loader = iter(self._loader(self.seed, self.start))
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
                if self._evaluates_after(iteration + 1):
                    # Before the checkpoint, which then has the statistics that are evaluated: a run resumed from it
                    # goes on as this one does.
                    self._update_population_stats()
                periodic.step(iteration, seed=self.seed)
                if self._evaluates_after(iteration + 1):
                    metrics = self._evaluate_and_log(log, iteration)
                    model.train()
        return metrics

    def evaluate(self) -> dict[str, float]:
        """COCO AP in percent on every set of DATASETS.TEST: ``bbox/AP``, ``segm/AP50``, ..., the same on every process.

        With more than one set, each key has the set's name in front. The detections go to OUTPUT_DIR/inference. Draws
        no random numbers, so that training goes on as if there had been no evaluation.
        """
        distributed.broadcast_buffers(self.model)
        self.model.eval()
        metrics = {}
        for data in self.test_sets:
            results = [each for part in distributed.all_gather(self._detect(data)) for each in part]
            values = None
            if distributed.is_main():
                name = re.sub(r"\W+", "_", data.name) if len(self.test_sets) > 1 else ""
                folder = os.path.join(self.cfg.OUTPUT_DIR, "inference", name)
                os.makedirs(folder, exist_ok=True)
                atomic_write(os.path.join(folder, "coco_instances_results.json"), json.dumps(results).encode())
                limit = max(100, self.cfg.TEST.DETECTIONS_PER_IMAGE)
                values = evaluate_coco(data, results, self.cfg.MODEL.MASK_ON, limit)
                for task in ("bbox", "segm") if self.cfg.MODEL.MASK_ON else ("bbox",):
                    line = "  ".join(
                        f"{n} {values[f'{task}/{n}']:.2f}" for n in ("AP", "AP50", "AP75", "APs", "APm", "APl")
                    )
                    logger.info("%s %s: %s", data.name, task, line)
            values = distributed.broadcast_object(values)
            metrics.update({self._metric_prefix(data) + name: value for name, value in values.items()})
        return metrics

    def write_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Write ``evaluation.json`` into OUTPUT_DIR: the metrics, of which weights, and of which iteration (from 0,
        as in ``metrics.json``; null where the weights do not tell)."""
        if distributed.is_main():
            path = os.path.join(self.cfg.OUTPUT_DIR, "evaluation.json")
            write_evaluation(path, self.iteration, self.weights, self.cfg.DATASETS.TEST, metrics, hardware(self.device))

    def _evaluate_and_log(self, log: TrainingLog, iteration: int) -> dict[str, float]:
        metrics = self.evaluate()
        self._keep_best(iteration, metrics)  # first: an evaluation in the log is not done again
        log.write(iteration, metrics)
        return metrics

    def _check_best_metric(self) -> None:
        metric = self.cfg.SOLVER.BEST_CHECKPOINT_METRIC
        if not metric:
            return
        if not self.test_sets:
            raise ValueError(f"SOLVER.BEST_CHECKPOINT_METRIC {metric!r} wants DATASETS.TEST, which is empty")
        known = [
            self._metric_prefix(data) + name
            for data in self.test_sets
            for name in metric_names(data, self.cfg.MODEL.MASK_ON)
        ]
        if metric not in known:
            nearest = difflib.get_close_matches(metric, known, n=1, cutoff=0.0)[0]
            masks = "" if self.cfg.MODEL.MASK_ON else "; with MODEL.MASK_ON False there is no segm/AP"
            raise ValueError(
                f"SOLVER.BEST_CHECKPOINT_METRIC {metric!r} is nothing that an evaluation gives; did you mean "
                f"{nearest!r}?{masks}"
            )

    def _keep_best(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Write model_best.pth if the chosen metric is the best so far."""
        name = self.cfg.SOLVER.BEST_CHECKPOINT_METRIC
        value = metrics.get(name, math.nan)
        if math.isnan(value) or (self._best is not None and value <= self._best):
            return
        self._best = value
        if distributed.is_main():
            path = os.path.join(self.cfg.OUTPUT_DIR, _BEST)
            data = {"model": self.model.state_dict(), "iteration": iteration, "best": {name: value}}
            atomic_write(path, write=lambda file: torch.save(data, file))
            logger.info("saved %s: %s %.2f", path, name, value)

    def _read_best(self) -> float | None:
        """The metric's value that model_best.pth was written for, on every process."""
        path, name, best = os.path.join(self.cfg.OUTPUT_DIR, _BEST), self.cfg.SOLVER.BEST_CHECKPOINT_METRIC, None
        if name and distributed.is_main() and os.path.isfile(path):
            best = load_file(path).get("best", {}).get(name)
        return distributed.broadcast_object(best)

    def _update_population_stats(self) -> None:
        """TEST.PRECISE_BN: running statistics from training batches of their own, which the iteration alone decides."""
        if not self.cfg.TEST.PRECISE_BN.ENABLED:
            return
        norms = (module for module in self.model.modules() if isinstance(module, _BatchNorm) and module.training)
        if all(norm.running_mean is None for norm in norms):
            return
        loader = self._loader(self.seed + self.iteration + 1, 0)
        try:
            update_population_stats(self.model, loader, self.cfg.TEST.PRECISE_BN.NUM_ITER, forward=self._forward)
        except ValueError as error:
            raise UserError(f"TEST.PRECISE_BN at iteration {self.iteration}: {error}") from None

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
                {data.name: len(data.images) for data in self.train_sets},
                {data.name: len(data.images) for data in self.test_sets},
            )

    def _metric_prefix(self, data: CocoDataset) -> str:
        return f"{data.name}/" if len(self.test_sets) > 1 else ""

    def _dataset(self, name: str) -> CocoDataset:
        data = resolve_dataset(name)
        count, classes = len(data.class_names), self.cfg.MODEL.ROI_HEADS.NUM_CLASSES
        if count != classes:
            listed = ", ".join(data.class_names[:5]) + (", ..." if count > 5 else "")
            raise ValueError(f"MODEL.ROI_HEADS.NUM_CLASSES is {classes}, but dataset {name!r} has {count}: {listed}")
        return data

    def _training_data(self) -> tuple[list[CocoDataset], CocoDetection]:
        cfg = self.cfg
        if not cfg.DATASETS.TRAIN:
            raise ValueError("DATASETS.TRAIN is empty; set it to a dataset such as 'my_data:train'")
        sets = [self._dataset(name) for name in cfg.DATASETS.TRAIN]
        for other in [*sets[1:], *self.test_sets]:
            if other.class_names != sets[0].class_names:
                raise ValueError(f"datasets {sets[0].name!r} and {other.name!r} have different classes")
        augmentation = Augmentation(
            cfg.INPUT.MIN_SIZE_TRAIN,
            cfg.INPUT.MAX_SIZE_TRAIN,
            cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING,
            cfg.INPUT.RANDOM_FLIP,
        )
        data = CocoDetection(sets, augmentation, cfg.MODEL.MASK_ON, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
        if not len(data):
            raise ValueError(f"no image of {', '.join(cfg.DATASETS.TRAIN)} has an object to train on")
        return sets, data

    def _loader(self, seed: int, start: int) -> DataLoader:
        """Training batches of this rank in the order of a seed, from the ``start``-th on."""
        rank, world = distributed.rank(), distributed.world_size()
        if self.cfg.DATALOADER.ASPECT_RATIO_GROUPING:
            stream = InfiniteSampler(len(self.train_set), seed, rank, world)
            batches = GroupedBatchSampler(stream, self.train_set.is_portrait, self.batch_size, skip=start)
            how = {"batch_sampler": batches}
        else:
            first = start * self.batch_size
            how = {"sampler": InfiniteSampler(len(self.train_set), seed, rank, world, first)}
            how["batch_size"] = self.batch_size
        return self._data_loader(SeededDataset(self.train_set, seed), **how)

    def _data_loader(self, dataset, **how) -> DataLoader:
        # A generator of its own: the loader's draw would move the global one, and a run resumed here would differ.
        return DataLoader(
            dataset,
            num_workers=self.cfg.DATALOADER.NUM_WORKERS,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
            **how,
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
        if not np.isfinite(values["total_loss"]):
            listed = ", ".join(f"{name} {value:g}" for name, value in values.items())
            raise FloatingPointError(
                f"the loss is not finite at iteration {iteration} ({listed}); lower SOLVER.BASE_LR, or clip gradients"
            )
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

    @torch.inference_mode()
    def _detect(self, data: CocoDataset) -> list[dict[str, Any]]:
        """This rank's share of the detections on a set."""
        dataset = CocoDetection([data], masks=False)
        share = range(distributed.rank(), len(dataset), distributed.world_size())
        loader = self._data_loader(Subset(dataset, share), batch_size=1)
        results = []
        for images, targets in tqdm(loader, "evaluating", leave=False, disable=None if distributed.is_main() else True):
            (output,) = self.model([images[0].to(self.device)])
            results += coco_results(data, targets[0]["image_id"], output)
        return results

    def _evaluates_after(self, iterations: int) -> bool:
        period = self.cfg.TEST.EVAL_PERIOD
        due = iterations in (self.cfg.SOLVER.MAX_ITER, *self.cfg.TEST.EVAL_ITERATIONS)
        due = due or (period > 0 and iterations % period == 0)
        return bool(self.test_sets) and iterations > 0 and due

    def _recorded(self, path: str) -> dict[str, float]:
        """The evaluation that ``metrics.json`` holds for the iteration before this run's first, on every process."""
        rows = [row for row in read_metrics(path) if row["iteration"] == self.start - 1]
        names = ("bbox/", "segm/")
        found = {
            key: math.nan if value is None else value
            for row in rows
            for key, value in row.items()
            if any(name in key for name in names)
        }
        return distributed.broadcast_object(found)

    @staticmethod
    def _seed_generators(seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
