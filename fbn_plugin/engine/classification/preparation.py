"""A batch as the model gets it in training: on its device, in its layout, mixed, with the generators seeded for what a
step draws."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fbn_plugin.engine.classification.augmentation import build_mixup
from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.engine.run.seeding import seed_iteration

__all__ = ["BatchPreparation"]

_PACKAGES = ("fbn_plugin", "timm", "torch", "torchvision")


class BatchPreparation:
    """Prepares the batches of a training, each by its place in it.

    Args:
        cfg: config.
        model: that gets them.
        num_classes: of the model.
        device: of this process.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, num_classes: int, device: torch.device):
        self.mixup = build_mixup(cfg, num_classes)
        self._device, self._seed = device, cfg.SEED
        self._layout = torch.channels_last if cfg.MODEL.CHANNELS_LAST else None
        self._seeds_numpy = self.mixup is not None or _has_foreign_layers(model)

    def __call__(self, iteration: int, number: int, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The images and targets of one step. Mixing writes into ``images``.

        Args:
            iteration: from 0.
            number: of the step in the iteration, from 0.
            images: (N, C, H, W).
            targets: class indices (N,).
        """
        seed_iteration(self._seed, iteration, number, self._seeds_numpy)
        images, targets = images.to(self._device), targets.to(self._device)
        if self._layout is not None:
            images = images.contiguous(memory_format=self._layout)
        return self.mixup(images, targets) if self.mixup else (images, targets)


def _has_foreign_layers(model: nn.Module) -> bool:
    """Whether a layer is of another package, and so may draw from NumPy's generator; those of these never do."""
    return any(type(layer).__module__.partition(".")[0] not in _PACKAGES for layer in model.modules())
