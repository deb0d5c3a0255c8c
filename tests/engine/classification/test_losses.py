"""What training minimizes, against PyTorch's functions and as timm's train.py has it with mixup and smoothing."""

import pytest
import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch.nn import functional as F

from fbn_plugin.engine.classification.config import check_config, classification_config
from fbn_plugin.engine.classification.losses import build_loss

CLASSES = 5
LOGITS = torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(8) % CLASSES


def settings(loss="bce", smoothing=0.0, threshold=0.0, sums=False, mixup=0.0):
    cfg = classification_config()
    cfg.SOLVER.LOSS, cfg.SOLVER.LABEL_SMOOTHING, cfg.INPUT.MIXUP = loss, smoothing, mixup
    cfg.SOLVER.BCE.TARGET_THRESHOLD, cfg.SOLVER.BCE.SUM_CLASSES = threshold, sums
    check_config(cfg)
    return cfg


def mixed(smoothing: float) -> torch.Tensor:
    torch.manual_seed(0)
    mixup = Mixup(0.5, label_smoothing=smoothing, num_classes=CLASSES)
    return mixup(torch.zeros(8, 3, 4, 4), TARGETS)[1]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing):
    given = build_loss(settings("cross_entropy", smoothing), CLASSES)(LOGITS, TARGETS)
    torch.testing.assert_close(given, LabelSmoothingCrossEntropy(smoothing)(LOGITS, TARGETS))
    shares = mixed(smoothing)  # smoothed already
    given = build_loss(settings("cross_entropy", smoothing, mixup=0.5), CLASSES)(LOGITS, shares)
    torch.testing.assert_close(given, SoftTargetCrossEntropy()(LOGITS, shares))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy(smoothing):
    smoothed = torch.full((8, CLASSES), smoothing / CLASSES)
    smoothed[torch.arange(8), TARGETS] = 1 - smoothing + smoothing / CLASSES
    expected = F.binary_cross_entropy_with_logits(LOGITS, smoothed)
    torch.testing.assert_close(build_loss(settings(smoothing=smoothing), CLASSES)(LOGITS, TARGETS), expected)
    sums = build_loss(settings(smoothing=smoothing, sums=True), CLASSES)
    torch.testing.assert_close(sums(LOGITS, TARGETS), expected * CLASSES)


def test_binary_cross_entropy_with_mixup_and_a_threshold():
    shares = mixed(0.1)
    loss = build_loss(settings(smoothing=0.1, threshold=0.2, mixup=0.5), CLASSES)
    torch.testing.assert_close(
        loss(LOGITS, shares), F.binary_cross_entropy_with_logits(LOGITS, (shares > 0.2).to(shares.dtype))
    )
    torch.testing.assert_close(
        build_loss(settings(smoothing=0.1, mixup=0.5), CLASSES)(LOGITS, shares), BinaryCrossEntropy()(LOGITS, shares)
    )


@pytest.mark.parametrize("threshold", [0.01, 0.95])
def test_a_threshold_that_leaves_no_target_or_all(threshold):
    with pytest.raises(ValueError, match=r"TARGET_THRESHOLD must be 0, or from 0.02 to less than 0.92, the targets of"):
        build_loss(settings(smoothing=0.1, threshold=threshold), CLASSES)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [("LOSS", "focal", "one of 'cross_entropy', 'bce'"), ("BCE.TARGET_THRESHOLD", 1.0, "from 0 to less than 1")],
)
def test_losses_that_there_are_not(key, value, sentence):
    cfg = classification_config()
    cfg.merge_from_list([f"SOLVER.{key}", value])
    with pytest.raises(ValueError, match=f"SOLVER.{key} must be {sentence}, got"):
        check_config(cfg)
