"""Test-time augmentation of a detectron2 run, TEST.AUG: detectron2's ``GeneralizedRCNNWithTTA``, which detects on each
image at several sizes, and mirrored, and merges what it finds."""

import torch
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNNWithTTA
from torch import nn

from fbn_plugin.engine.run.rules import Rule, at_least, check_values, each, exactly

__all__ = ["SUFFIX", "augmented", "check_augmentation"]

# What detectron2 puts behind the names of tasks and folders.
SUFFIX = "_TTA"

_REASON = "with TEST.AUG.ENABLED"
_RULES = {
    # PanopticFPN's and the dense detectors' inference takes no boxes to find masks in.
    "MODEL.META_ARCHITECTURE": exactly("GeneralizedRCNN", _REASON),
    "MODEL.KEYPOINT_ON": exactly(False, _REASON),
    "MODEL.LOAD_PROPOSALS": exactly(False, _REASON),
    "MODEL.ROI_HEADS.NAME": Rule(f"the name of heads of upright boxes {_REASON}", lambda given: given != "RROIHeads"),
    "TEST.AUG.MIN_SIZES": each(at_least(1)),
    "TEST.AUG.MAX_SIZE": at_least(1),
}


def check_augmentation(cfg: CfgNode) -> None:
    """Refuse TEST.AUG for a model that detectron2 has none for.

    Raises:
        ValueError: in one sentence.
    """
    if cfg.TEST.AUG.ENABLED:
        check_values(cfg, _RULES)


def augmented(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """The model with TEST.AUG, in the mode that it is in."""
    with torch.no_grad():
        return GeneralizedRCNNWithTTA(cfg, model).train(model.training)
