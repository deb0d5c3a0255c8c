"""How many images are in what: an update of the weights, a step of one process, and the moments of a norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset

from fbn_plugin.engine.data.sampling import BalancedSampler
from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.engine.run.rules import refusal
from fbn_plugin.layers.description import describe

__all__ = ["BatchSizes", "check_batch", "check_norm_batch"]


@dataclass(frozen=True)
class BatchSizes:
    """Numbers of images.

    Args:
        update: SOLVER.IMS_PER_BATCH, the images of one update of the weights, over all processes and steps.
        processes: how many share them.
        steps: SOLVER.ACCUMULATION_STEPS, the forward and backward passes of each process before the update.

    Examples::

        >>> from fbn_plugin.engine.classification.batch import BatchSizes
        >>> BatchSizes(update=64, processes=8, steps=2).step
        4
    """

    update: int
    processes: int = 1
    steps: int = 1

    @classmethod
    def of(cls, cfg: CfgNode) -> BatchSizes:
        """Those of a run."""
        return cls(cfg.SOLVER.IMS_PER_BATCH, distributed.world_size(), cfg.SOLVER.ACCUMULATION_STEPS)

    @property
    def step(self) -> int:
        """Images of one process in one step."""
        return self.update // (self.processes * self.steps)

    def norms(self, model: nn.Module) -> list[int]:
        """Images whose moments the batch norms of ``model`` take in training: of one process, or of all where a norm is
        synchronized; increasing, each number once, and empty without batch norm."""
        norms = [(module, describe(module)) for module in model.modules()]
        norms = [(each, what) for each, what in norms if isinstance(each, _BatchNorm) or (what and what.family == "BN")]
        synchronized = {what is not None and what.synchronized for _, what in norms}
        return sorted(self.step * (self.processes if each else 1) for each in synchronized)

    def record(self, model: nn.Module) -> dict[str, Any]:
        """What ``run_info.json`` and ``results.json`` have of it; ``images_per_norm`` is null without batch norm, and a
        list where one is synchronized and another is not."""
        norms = self.norms(model)
        return {
            "images_per_batch": self.update,
            "images_per_process_and_step": self.step,
            "accumulation_steps": self.steps,
            "images_per_norm": norms[0] if len(norms) == 1 else norms or None,
        }

    def describe(self, model: nn.Module) -> str:
        """One line for the log."""
        shares = f"{counted(self.processes, 'process')} x {counted(self.steps, 'step')} x {counted(self.step, 'image')}"
        norms = " and of ".join(counted(images, "image") for images in self.norms(model))
        seen = f"batch norms take the moments of {norms}" if norms else "no norm takes moments of several images"
        return f"{counted(self.update, 'image')} an update of the weights, {shares}; {seen}"


def check_batch(cfg: CfgNode, data: Dataset, num_classes: int) -> None:
    """Refuse a batch that is not shared out evenly, that the training images cannot fill, or not in equal shares of the
    classes, or that mixup cannot pair.

    Raises:
        ValueError: one sentence.
    """
    key, sizes = "SOLVER.IMS_PER_BATCH", BatchSizes.of(cfg)
    parts, per_class = sizes.processes * sizes.steps, cfg.DATALOADER.IMAGES_PER_CLASS
    shares = counted(sizes.processes, "process")
    if sizes.steps > 1:
        shares += f" and SOLVER.ACCUMULATION_STEPS {sizes.steps}"
    if sizes.update % parts:
        raise refusal(key, f"a multiple of {parts}, for {shares}", sizes.update)
    if (cfg.INPUT.MIXUP or cfg.INPUT.CUTMIX) and sizes.step % 2:
        raise refusal(key, f"a multiple of {2 * parts} with INPUT.MIXUP or CUTMIX, for {shares}", sizes.update)
    if len(data) < sizes.update:
        raise refusal(key, f"{len(data)}, the number of training images, or less", sizes.update)
    if per_class:
        balanced = BalancedSampler(data, per_class, cfg.SEED).batch_size * parts
        if balanced != sizes.update:
            share = f"DATALOADER.IMAGES_PER_CLASS {per_class} of {counted(num_classes, 'class')} in {shares}"
            raise refusal(key, f"{balanced}, {share}", sizes.update)


def check_norm_batch(cfg: CfgNode, model: nn.Module) -> None:
    """Hold the images whose moments batch norms take against SOLVER.IMS_PER_NORM, if that is set.

    Raises:
        ValueError: there are more or fewer; the sentence says what would give that number.
    """
    wanted, sizes = cfg.SOLVER.IMS_PER_NORM, BatchSizes.of(cfg)
    norms = sizes.norms(model)
    if not wanted or all(norm == wanted for norm in norms):
        return
    if len(norms) > 1:
        what = f"0, as some batch norms of {cfg.MODEL.NAME} are synchronized and others are not"
        raise refusal("SOLVER.IMS_PER_NORM", what, wanted)
    each = sizes.processes // (norms[0] // sizes.step)  # how many batches have moments of their own in a step
    ways, steps = [f"SOLVER.IMS_PER_BATCH {wanted * each * sizes.steps}"], sizes.update // (wanted * each)
    if steps and sizes.update == wanted * each * steps:
        ways.append(f"SOLVER.ACCUMULATION_STEPS {steps}")
    if wanted * each % sizes.processes:  # of a synchronized norm
        ways = [f"no batch of {counted(sizes.processes, 'process')}"]
    given = f"SOLVER.IMS_PER_BATCH {sizes.update}, {counted(sizes.processes, 'process')} and ACCUMULATION_STEPS"
    what = f"0, or {norms[0]}, which follows from {given} {sizes.steps} ({' or '.join(ways)} would give {wanted})"
    raise refusal("SOLVER.IMS_PER_NORM", what, wanted)
