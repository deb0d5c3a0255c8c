"""One update of the weights: forward and backward passes of this process's images, in mixed precision and in several
steps where the config says so, and the optimizer's step. Gradient clipping and the average of the weights are timm's.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator

import torch
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from fbn_plugin.engine.classification.losses import build_loss
from fbn_plugin.engine.classification.optimization import IterationSchedule, PlateauSchedule
from fbn_plugin.engine.classification.preparation import BatchPreparation
from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.cli import UserError
from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.engine.run.logging import Timer
from fbn_plugin.engine.run.refusals import check_finite
from fbn_plugin.engine.run.rules import exactly, one_of, refusal

__all__ = ["TrainingStep", "build_average", "build_scaler", "check_precision", "place_model"]

_NO_COMPILER = re.compile(r"(No working C\+\+ compiler found|Failed to find C compiler).*")
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def check_precision(cfg: CfgNode, device: torch.device) -> None:
    """Refuse float16 on a CPU, which has no fast arithmetic for it, and whose loss nobody scales.

    Raises:
        ValueError: SOLVER.AMP.DTYPE is that.
    """
    if device.type == "cpu" and cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "float16":
        raise refusal("SOLVER.AMP.DTYPE", f"{one_of('', 'bfloat16').what} on a CPU", cfg.SOLVER.AMP.DTYPE)


def _amp_dtype(cfg: CfgNode, device: torch.device) -> torch.dtype:
    return _DTYPES[cfg.SOLVER.AMP.DTYPE or ("float16" if device.type == "cuda" else "bfloat16")]


def build_scaler(cfg: CfgNode, device: torch.device) -> torch.amp.GradScaler:
    """The scaler of the loss, which does nothing but with float16."""
    fp16 = cfg.SOLVER.AMP.ENABLED and _amp_dtype(cfg, device) == torch.float16
    return torch.amp.GradScaler(device.type, enabled=fp16 and device.type == "cuda")


def place_model(cfg: CfgNode, model: nn.Module, device: torch.device) -> nn.Module:
    """The model on its device, in the memory format of MODEL.CHANNELS_LAST, and with MODEL.GRAD_CHECKPOINTING set.

    Raises:
        ValueError: it cannot recompute its activations.
    """
    if cfg.MODEL.GRAD_CHECKPOINTING:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError, NotImplementedError):
            rule = exactly(False, f"with {cfg.MODEL.NAME}, which cannot recompute its activations")
            raise refusal("MODEL.GRAD_CHECKPOINTING", rule.what, True) from None
    return model.to(device, memory_format=torch.channels_last if cfg.MODEL.CHANNELS_LAST else torch.preserve_format)


def build_average(cfg: CfgNode, model: nn.Module) -> ModelEmaV3 | None:
    """timm's moving average of weights and buffers (MODEL.EMA), which starts as a copy of ``model``; None where it is
    off."""
    ema = cfg.MODEL.EMA
    return ModelEmaV3(model, decay=ema.DECAY, use_warmup=ema.WARMUP) if ema.ENABLED else None


class TrainingStep:
    """Updates the weights of a model, one iteration a call.

    Args:
        cfg: config.
        model: on ``device``, in training mode. With processes and MODEL.COMPILE it is wrapped here; its own state and
            names stay as they are.
        num_classes: of the model.
        optimizer, scheduler, scaler: of the model's weights.
        average: is updated with them, see :func:`build_average`.
        device: of this process.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        num_classes: int,
        optimizer: torch.optim.Optimizer,
        scheduler: IterationSchedule | PlateauSchedule,
        scaler: torch.amp.GradScaler,
        average: ModelEmaV3 | None,
        device: torch.device,
    ):
        self.model, self.device = model, device
        self.optimizer, self.scheduler, self.scaler, self.average = optimizer, scheduler, scaler, average
        self.prepare = BatchPreparation(cfg, model, num_classes, device)
        self.loss = build_loss(cfg, num_classes)
        self._parallel = distributed.data_parallel(model, device)
        self._forward_pass = torch.compile(self._parallel) if cfg.MODEL.COMPILE else self._parallel
        self._steps = cfg.SOLVER.ACCUMULATION_STEPS
        self._amp_dtype = _amp_dtype(cfg, device) if cfg.SOLVER.AMP.ENABLED else None
        self._clip = cfg.SOLVER.CLIP_GRADIENTS if cfg.SOLVER.CLIP_GRADIENTS.ENABLED else None
        self._buffers = [*model.buffers()] if cfg.MODEL.GRAD_CHECKPOINTING else []
        self._clipped = _clipped_parameters(cfg, model)

    def __call__(self, iteration: int, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[dict[str, float], float]:
        """One update.

        Args:
            iteration: from 0.
            batches: gives images (N, C, H, W) and class indices (N,) of one step.

        Returns:
            the loss, as the mean over steps and processes, and the seconds that batches were waited for.

        Raises:
            FloatingPointError: the loss is not finite. The weights are those before the update.
            UserError: a norm gets one value a channel, or MODEL.COMPILE finds no compiler.
        """
        steps = self._steps
        self.scheduler.step_update(iteration)
        self.optimizer.zero_grad()
        total, data_time, timer = None, 0.0, Timer()
        for number in range(steps):
            timer()
            batch = next(batches)
            data_time += timer()
            images, targets = self.prepare(iteration, number, *batch)
            if number + 1 < steps:
                with self._no_exchange():
                    loss = self._loss(images, targets) / steps
                    self._backward(loss)
            else:
                loss = self._loss(images, targets)
                loss = loss if steps == 1 else loss / steps
            total = loss.detach() if total is None else total + loss.detach()
        # Asked for before the backward pass, so that a GPU goes on while the value is waited for.
        mean = distributed.start_mean({"total_loss": total})
        self._backward(loss)
        values = mean()
        check_finite(values, iteration)
        self._update(iteration)
        return values, data_time

    def _no_exchange(self) -> contextlib.AbstractContextManager:
        """A block whose gradients stay in their process: they are exchanged with those of the last step."""
        return self._parallel.no_sync() if self._parallel is not self.model else contextlib.nullcontext()

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of the images of one step."""
        try:
            if self._amp_dtype is None:
                return self.loss(self._forward_pass(images), targets)
            with torch.autocast(self.device.type, self._amp_dtype):
                return self.loss(self._forward_pass(images), targets)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            images = counted(len(targets), "image")
            what = f"SOLVER.IMS_PER_BATCH must be more than {images} for each process and step"
            raise UserError(f"{what}: {error}") from None
        except RuntimeError as error:  # PyTorch's classes for it are not public
            if not (said := _NO_COMPILER.search(str(error))):
                raise
            raise UserError(f"MODEL.COMPILE must be False here: {said[0]}") from None

    def _backward(self, loss: Tensor) -> None:
        # With MODEL.GRAD_CHECKPOINTING the backward pass computes activations again, and batch norms would move their
        # running statistics a second time by the same images.
        before = [buffer.clone() for buffer in self._buffers]
        self.scaler.scale(loss).backward()
        for buffer, value in zip(self._buffers, before):
            buffer.copy_(value)

    def _update(self, iteration: int) -> None:
        if self._clip is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self._clipped, self._clip.CLIP_VALUE, self._clip.CLIP_TYPE, self._clip.NORM_TYPE)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.model, step=iteration + 1)


def _clipped_parameters(cfg: CfgNode, model: nn.Module) -> list[nn.Parameter]:
    """All parameters; for adaptive clipping without those of the classifier, as its authors have it."""
    head: Iterable[nn.Parameter] = ()
    if cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE == "agc" and isinstance(head_layer := model.get_classifier(), nn.Module):
        head = head_layer.parameters()
    left_out = set(map(id, head))
    return [parameter for parameter in model.parameters() if id(parameter) not in left_out]
