"""Training and evaluation of image classifiers with timm: models, transforms, optimizers and schedulers are timm's, the
norm is a spec string.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
import timm
import torch
from fvcore.common.config import CfgNode
from timm.data import Mixup
from timm.data.loader import PrefetchLoader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from fbn_plugin import prepend_input_norm, revised_init
from fbn_plugin.engine.classification.config import MAY_CHANGE, check_config, classification_config
from fbn_plugin.engine.classification.data import build_train_loader, build_val_loader
from fbn_plugin.engine.classification.model import create_model
from fbn_plugin.engine.data.image_data import load_image_data
from fbn_plugin.engine.data.sampling import BalancedSampler
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.checkpoint import AtomicCheckpointer, PeriodicCheckpointer, atomic_write
from fbn_plugin.engine.run.config import check_resume, save_config
from fbn_plugin.engine.run.logging import Timer, TrainingLog, setup_logging
from fbn_plugin.frameworks.timm import param_groups

__all__ = ["ClassificationTrainer", "evaluate"]

logger = logging.getLogger(__name__)


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DataLoader | PrefetchLoader, device: torch.device, top_k: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Top-k accuracies in percent, `top1`, `top5`, and the mean cross entropy `loss`, over all processes.

    Args:
        model: gives logits (N, classes); it is evaluated in evaluation mode and left in the mode it was in.
        loader: timm's evaluation loader. What its sampler repeats to give every process equally many samples is not
            counted.
        top_k: each at most the number of classes.
    """
    size = len(loader.dataset)
    left = len(range(distributed.rank(), size, distributed.world_size()))
    sums = dict.fromkeys(["loss", *(f"top{k}" for k in top_k)], 0.0)
    training = model.training
    model.eval()
    for images, targets in tqdm(loader, "evaluating", leave=False, disable=None if distributed.is_main() else True):
        images, targets = images[:left].to(device), targets[:left].to(device)
        if left == 0:
            break
        left -= len(targets)
        logits = model(images).float()
        sums["loss"] += nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        for k in top_k:
            sums[f"top{k}"] += 100 * (logits.topk(k).indices == targets[:, None]).sum().item()
    model.train(training)
    everyones = distributed.all_gather(sums)
    return {name: sum(each[name] for each in everyones) / size for name in sums}


class ClassificationTrainer:
    """Trains and evaluates what a config describes. Building it checks all input and writes nothing.

    Args:
        cfg: `classification_config` with a file merged in.
        resume: continue from the last checkpoint in OUTPUT_DIR, if there is one, with the settings it began with;
            only the device, the rates, the number of iterations or workers, and when to save and evaluate may change.
        eval_only: only evaluate: MODEL.WEIGHTS, which must fit the whole model, or with `resume` the last checkpoint.

    Raises:
        ValueError, OSError: bad values in the config, missing or damaged files.
    """

    def __init__(self, cfg: CfgNode, resume: bool = False, eval_only: bool = False):
        self.cfg, solver = cfg, cfg.SOLVER
        self.device = distributed.init(cfg.MODEL.DEVICE)
        check_config(cfg)
        if self.device.type == "cpu" and cfg.MODEL.NORM.startswith("SyncBN"):
            raise ValueError(
                "SyncBN runs on GPUs only; use BN or, over several processes, SyncFBN(t_sigma=inf) on the CPU"
            )
        previous = os.path.exists(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
        if eval_only and not (cfg.MODEL.WEIGHTS or cfg.MODEL.PRETRAINED or (resume and previous)):
            raise ValueError(
                "nothing to evaluate: set MODEL.WEIGHTS, MODEL.PRETRAINED, or --resume with a checkpoint in OUTPUT_DIR"
            )
        if os.path.exists(cfg.OUTPUT_DIR) and not os.path.isdir(cfg.OUTPUT_DIR):
            raise ValueError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} is a file, not a folder")
        if previous and not (resume or eval_only):
            raise ValueError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} holds a run; add --resume to continue it, or choose another")
        if previous and resume and not eval_only:
            check_resume(cfg, classification_config(), MAY_CHANGE)
        self.data = load_image_data(cfg.DATASETS.NAME, cfg.DATASETS.ROOT, cfg.INPUT.FORMAT)
        if not eval_only and len(self.data.train) < solver.IMS_PER_BATCH:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} is more than the {len(self.data.train)} training images"
            )
        per_class, world_size = cfg.DATALOADER.IMAGES_PER_CLASS, distributed.world_size()
        if per_class and not eval_only:
            balanced = BalancedSampler(self.data.train, per_class, cfg.SEED).batch_size
            if balanced * world_size != solver.IMS_PER_BATCH:
                raise ValueError(
                    f"DATALOADER.IMAGES_PER_CLASS {per_class} of {len(self.data.classes)} classes in {world_size} "
                    f"processes need SOLVER.IMS_PER_BATCH {balanced * world_size}, got {solver.IMS_PER_BATCH}"
                )
        self.iters_per_epoch = max(1, len(self.data.train) // solver.IMS_PER_BATCH)
        self.max_iter = solver.MAX_EPOCH * self.iters_per_epoch
        if solver.MAX_ITER:
            self.max_iter = min(self.max_iter, solver.MAX_ITER)
        torch.manual_seed(cfg.SEED)
        self.model = create_model(
            cfg.MODEL.NAME,
            cfg.MODEL.NORM,
            num_classes=len(self.data.classes),
            in_chans=len(cfg.INPUT.FORMAT),
            pretrained=cfg.MODEL.PRETRAINED,
            drop_rate=cfg.MODEL.DROP_RATE,
        )
        if cfg.MODEL.REVISED_INIT:
            revised_init(self.model)
        if cfg.INPUT.NORM_GAMMA_INIT:
            prepend_input_norm(self.model, cfg.INPUT.NORM_GAMMA_INIT)
        self.model.to(self.device)
        parameters = self.model
        if solver.SCALE_LR_DIVISOR:
            parameters = param_groups(self.model, solver.BASE_LR, solver.WEIGHT_DECAY, solver.SCALE_LR_DIVISOR)
        self.optimizer = create_optimizer_v2(
            parameters,
            solver.OPTIMIZER,
            lr=solver.BASE_LR,
            weight_decay=solver.WEIGHT_DECAY,
            momentum=solver.MOMENTUM,
            filter_bias_and_bn=solver.FILTER_BIAS_AND_BN,
        )
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            solver.LR_SCHEDULER_NAME,
            num_epochs=solver.MAX_EPOCH,
            decay_milestones=solver.STEPS,
            decay_rate=solver.GAMMA,
            min_lr=solver.MIN_LR,
            warmup_epochs=solver.WARMUP_EPOCHS,
            warmup_lr=solver.WARMUP_FACTOR * solver.BASE_LR,
            step_on_epochs=False,
            updates_per_epoch=self.iters_per_epoch,
        )
        self.scaler = torch.amp.GradScaler(enabled=solver.AMP.ENABLED and self.device.type == "cuda")
        self.checkpointer = AtomicCheckpointer(self.model, cfg.OUTPUT_DIR, optimizer=self.optimizer, scaler=self.scaler)
        self.start_iter = 0
        if resume and previous:
            last = self.checkpointer.get_checkpoint_file()
            state = self.checkpointer.load(last)
            if "iteration" not in state:
                raise ValueError(f"checkpoint {last} is not of a run of this tool: it has no iteration")
            self.start_iter = state["iteration"] + 1
            if self.start_iter > self.max_iter and not eval_only:
                key = "MAX_ITER" if self.max_iter == solver.MAX_ITER else "MAX_EPOCH"
                raise ValueError(
                    f"SOLVER.{key} {solver[key]} ends the training after {self.max_iter} iterations, but the run that "
                    f"OUTPUT_DIR {cfg.OUTPUT_DIR} holds has {self.start_iter}"
                )
        else:
            self.checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[], strict=eval_only)

    def evaluate(self) -> dict[str, float]:
        """`top1`, with more than 5 classes `top5` (both in percent), and `loss` on the validation set."""
        distributed.broadcast_buffers(self.model)
        loader = build_val_loader(self.cfg, self.data.val, self.device)
        return evaluate(self.model, loader, self.device, (1, 5) if len(self.data.classes) > 5 else (1,))

    def describe(self, result: dict[str, float]) -> str:
        """One line that says what `result` was measured with and on."""
        cfg = self.cfg
        model = cfg.MODEL.NAME + (f" with {cfg.MODEL.NORM}" if cfg.MODEL.NORM else "")
        top5 = f", top-5 {result['top5']:.2f} %" if "top5" in result else ""
        images = f"{len(self.data.val)} validation images"
        return f"{model} on {self.data.title}: top-1 {result['top1']:.2f} %{top5}, loss {result['loss']:.4f} ({images})"

    def train(self) -> dict[str, float]:
        """Train from the start, or from where the checkpoint left off, to the end; return the final evaluation.

        Writes config.yaml, log.txt, metrics.json, TensorBoard files, checkpoints and results.json to OUTPUT_DIR.
        On the CPU a run that is interrupted and resumed ends with the same bits as one that is not; on a GPU some
        backward passes add in no fixed order.

        Raises:
            FloatingPointError: the loss is not finite.
            UserError: an image cannot be decoded.
        """
        cfg, solver, data = self.cfg, self.cfg.SOLVER, self.data
        if distributed.is_main():
            os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
            save_config(cfg, os.path.join(cfg.OUTPUT_DIR, "config.yaml"))
        distributed.barrier()
        setup_logging(cfg.OUTPUT_DIR)
        logger.info(
            f"{data.title}: {len(data.train)} training images, {len(data.val)} validation images, "
            f"{len(data.classes)} classes; {self.iters_per_epoch} iterations an epoch"
        )
        saver = PeriodicCheckpointer(
            self.checkpointer,
            solver.CHECKPOINT_PERIOD or self.iters_per_epoch,
            self.max_iter,
            max_to_keep=2 if distributed.is_main() else None,  # only one process may delete the older ones
        )
        model: nn.Module = self.model.train()
        if distributed.world_size() > 1:
            model = DistributedDataParallel(model, [self.device] if self.device.type == "cuda" else None)
        mixup = None
        if cfg.INPUT.MIXUP or cfg.INPUT.CUTMIX:
            mixup = Mixup(
                cfg.INPUT.MIXUP,
                cfg.INPUT.CUTMIX,
                label_smoothing=solver.LABEL_SMOOTHING,
                num_classes=len(data.classes),
            )
        criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else solver.LABEL_SMOOTHING)
        amp_dtype = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        batches = build_train_loader(cfg, data.train, self.device, self.start_iter)
        result = None
        with TrainingLog(cfg.OUTPUT_DIR, self.max_iter, self.start_iter) as log:
            timer = Timer()
            for iteration in range(self.start_iter, self.max_iter):
                timer()
                images, targets = (tensor.to(self.device) for tensor in next(batches))
                data_time = timer()
                _seed(cfg.SEED, iteration)
                if mixup:
                    images, targets = mixup(images, targets)
                self.scheduler.step_update(iteration)
                with torch.autocast(self.device.type, amp_dtype, enabled=solver.AMP.ENABLED):
                    loss = criterion(model(images), targets)
                self.optimizer.zero_grad()
                self.scaler.scale(loss).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()

                losses = distributed.reduce_mean({"total_loss": loss.item()}, self.device)
                if not math.isfinite(losses["total_loss"]):
                    raise FloatingPointError(
                        f"the loss is {losses['total_loss']} at iteration {iteration}; lower SOLVER.BASE_LR"
                    )
                lr = self.optimizer.param_groups[0]["lr"]
                log.step(iteration, **losses, lr=lr, time=data_time + timer(), data_time=data_time)

                epoch, rest = divmod(iteration + 1, self.iters_per_epoch)
                due = rest == 0 and cfg.TEST.EVAL_PERIOD and epoch % cfg.TEST.EVAL_PERIOD == 0
                if due or iteration + 1 == self.max_iter:
                    result = self.evaluate()
                    values = {f"val/{name}": value for name, value in result.items()}
                    log.write(iteration, {"epoch": (iteration + 1) / self.iters_per_epoch, **values})
                    logger.info("epoch %.4g: %s", (iteration + 1) / self.iters_per_epoch, self.describe(result))
                saver.step(iteration)  # after the evaluation, so that a resumed run has not missed it
        if result is None:  # there was nothing left to train
            result = self.evaluate()
        if distributed.is_main():
            record = json.dumps({**self._provenance(), **result}, indent=2)
            atomic_write(os.path.join(cfg.OUTPUT_DIR, "results.json"), record.encode())
        return result

    def _provenance(self) -> dict[str, Any]:
        cfg, cuda = self.cfg, self.device.type == "cuda"
        device = torch.cuda.get_device_name(self.device) if cuda else f"{platform.machine()} CPU"
        return {
            "dataset": self.data.title,
            "train_images": len(self.data.train),
            "val_images": len(self.data.val),
            "model": cfg.MODEL.NAME,
            "norm": cfg.MODEL.NORM or "the model's own",
            "epochs": self.max_iter / self.iters_per_epoch,
            "iterations": self.max_iter,
            "images_per_batch": cfg.SOLVER.IMS_PER_BATCH,
            "seed": cfg.SEED,
            "hardware": f"{distributed.world_size()} x {device}"
            + (f", {torch.get_num_threads()} threads" * (not cuda)),
            "versions": {"torch": torch.__version__, "timm": timm.__version__},
        }


def _seed(seed: int, iteration: int) -> None:
    """Seed what training draws (dropout, mixup) for one iteration, so that no state has to outlive an interruption."""
    for_torch, for_numpy = np.random.SeedSequence([seed, iteration, distributed.rank()]).generate_state(2)
    torch.manual_seed(int(for_torch))
    np.random.seed(for_numpy)
