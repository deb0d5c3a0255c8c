"""What a trained classifier is measured by: accuracies and loss over a set of images, on any number of processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.data.loader import PrefetchLoader
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from fbn_plugin.engine.run import distributed, stopping

__all__ = ["evaluate"]


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

    Raises:
        EvaluationLeft: a process is asked to stop.
    """
    size = len(loader.dataset)
    left = len(range(distributed.rank(), size, distributed.world_size()))
    sums = dict.fromkeys(["loss", *(f"top{k}" for k in top_k)], 0.0)
    training = model.training
    model.eval()
    bar = tqdm(loader, "evaluating", leave=False, disable=None if distributed.is_main() else True)
    for images, targets in stopping.until_asked(bar):
        images, targets = images[:left].to(device), targets[:left].to(device)
        if left == 0:
            break
        left -= len(targets)
        logits = model(images).float()
        sums["loss"] += nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        for k in top_k:
            sums[f"top{k}"] += 100 * (logits.topk(k).indices == targets[:, None]).sum().item()
    model.train(training)
    everyones, stops = zip(*distributed.all_gather((sums, stopping.asked())))
    stopping.unless_asked(stops)
    return {name: sum(each[name] for each in everyones) / size for name in sums}
