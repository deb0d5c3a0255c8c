"""One update of the weights: forward and backward pass of this process's images, in mixed precision where the config
says so, and the optimizer's step. Mixup is timm's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from fbn_plugin.engine.classification.losses import build_loss
from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.cli import UserError
from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.engine.run.logging import Timer
from fbn_plugin.engine.run.refusals import check_finite
from fbn_plugin.engine.run.seeding import seed_iteration

__all__ = ["TrainingStep", "build_scaler"]


def build_scaler(cfg: CfgNode, device: torch.device) -> torch.amp.GradScaler:
    """The scaler of the loss, which does nothing but with float16."""
    return torch.amp.GradScaler(enabled=cfg.SOLVER.AMP.ENABLED and device.type == "cuda")


class TrainingStep:
    """Updates the weights of a model, one iteration a call.

    Args:
        cfg: config.
        model: on ``device``, in ``DistributedDataParallel`` where there are processes.
        num_classes: of the model.
        optimizer, scheduler, scaler: of the model's weights.
        device: of this process.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        num_classes: int,
        optimizer: torch.optim.Optimizer,
        scheduler: Scheduler,
        scaler: torch.amp.GradScaler,
        device: torch.device,
    ):
        self.cfg, self.model, self.device = cfg, model, device
        self.optimizer, self.scheduler, self.scaler = optimizer, scheduler, scaler
        self.mixup = _build_mixup(cfg, num_classes)
        self.loss = build_loss(cfg, num_classes)

    def __call__(self, iteration: int, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[dict[str, float], float]:
        """One update.

        Args:
            iteration: from 0.
            batches: gives images (N, C, H, W) and class indices (N,).

        Returns:
            the loss, as the mean over processes, and the seconds that the batch was waited for.

        Raises:
            FloatingPointError: the loss is not finite.
            UserError: a norm gets one value a channel.
        """
        timer = Timer()
        images, targets = (tensor.to(self.device) for tensor in next(batches))
        data_time = timer()
        seed_iteration(self.cfg.SEED, iteration)
        if self.mixup:
            images, targets = self.mixup(images, targets)
        self.scheduler.step_update(iteration)
        loss = self._forward(images, targets)
        losses = distributed.reduce_mean({"total_loss": loss.item()}, self.device)
        check_finite(losses, iteration)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return losses, data_time

    def _forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch."""
        amp_dtype = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        try:
            with torch.autocast(self.device.type, amp_dtype, enabled=self.cfg.SOLVER.AMP.ENABLED):
                return self.loss(self.model(images), targets)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            images = counted(len(targets), "image")
            raise UserError(f"SOLVER.IMS_PER_BATCH must be more than {images} for each process: {error}") from None


def _build_mixup(cfg: CfgNode, num_classes: int) -> Mixup | None:
    """timm's mixup and CutMix, which smooth the labels too, or None where neither is on."""
    if not (cfg.INPUT.MIXUP or cfg.INPUT.CUTMIX):
        return None
    smoothing = cfg.SOLVER.LABEL_SMOOTHING
    return Mixup(cfg.INPUT.MIXUP, cfg.INPUT.CUTMIX, label_smoothing=smoothing, num_classes=num_classes)
