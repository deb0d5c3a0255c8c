"""What training minimizes: the cross entropy, or timm's binary cross entropy of each class by itself."""

from timm.loss import BinaryCrossEntropy
from torch import nn

from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.engine.run.rules import refusal

__all__ = ["build_loss"]


def build_loss(cfg: CfgNode, num_classes: int) -> nn.Module:
    """The loss of a config, a module of logits (N, num_classes) and targets: class indices (N,), or what mixup makes of
    them, shares (N, num_classes).

    Labels are smoothed once: by timm's mixup where that is on, which knows the shares, otherwise by the loss.

    Args:
        cfg: config.
        num_classes: of the data.

    Raises:
        ValueError: a SOLVER.BCE.TARGET_THRESHOLD that no smoothed target, or each, is above.
    """
    solver = cfg.SOLVER
    mixes = bool(cfg.INPUT.MIXUP or cfg.INPUT.CUTMIX)
    smoothing = 0.0 if mixes else solver.LABEL_SMOOTHING
    if solver.LOSS == "cross_entropy":
        return nn.CrossEntropyLoss(label_smoothing=smoothing)
    threshold = solver.BCE.TARGET_THRESHOLD
    low = solver.LABEL_SMOOTHING / num_classes
    high = 1 - solver.LABEL_SMOOTHING + low
    if threshold and not low <= threshold < high:
        between = f"0, or from {low:g} to less than {high:g}, the targets of LABEL_SMOOTHING {solver.LABEL_SMOOTHING:g}"
        raise refusal("SOLVER.BCE.TARGET_THRESHOLD", f"{between} and {num_classes} classes", threshold)
    return BinaryCrossEntropy(smoothing, target_threshold=threshold or None, sum_classes=solver.BCE.SUM_CLASSES)
