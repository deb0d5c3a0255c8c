"""What class probabilities are worth: accuracies, loss, confusion matrix, accuracy by class, and calibration (Guo et
al., "On Calibration of Modern Neural Networks", 2017, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import confusion_matrix
from torch import Tensor

__all__ = ["Measures", "Reliability", "measure", "reliability"]

_BINS = 15  # Guo et al. (2017)


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy, in bins of equal width from 0 to 1.

    Args:
        images: in each bin (B).
        confidence: mean probability of the predicted class (B), from 0 to 1; NaN in an empty bin.
        accuracy: share of right ones (B); NaN in an empty bin.
    """

    images: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error, from 0 to 1: the mean distance of accuracy and confidence over the images."""
        gaps = np.nan_to_num(np.abs(self.accuracy - self.confidence))
        return float(np.sum(self.images * gaps) / np.sum(self.images))

    def as_json(self) -> list[dict[str, Any]]:
        """A mapping for each bin; null where there is no image."""
        edges = np.linspace(0, 1, len(self.images) + 1)
        columns = zip(edges[:-1], edges[1:], self.images, self.confidence, self.accuracy)
        return [
            {
                "from": float(low),
                "to": float(high),
                "images": int(images),
                "confidence": float(confidence) if images else None,
                "accuracy": float(accuracy) if images else None,
            }
            for low, high, images, confidence, accuracy in columns
        ]


@dataclass(frozen=True)
class Measures:
    """All figures of predictions.

    Args:
        figures: ``top1``, ``top5`` (of more than 5 classes) and ``ece`` in percent, ``loss``, the mean cross entropy.
        confusion: number of images by true class (rows) and predicted class (C, C).
        reliability: of the predicted classes.
    """

    figures: dict[str, float]
    confusion: np.ndarray
    reliability: Reliability

    @property
    def by_class(self) -> list[float | None]:
        """Accuracy of each class in percent; None of one without images."""
        images = self.confusion.sum(axis=1)
        right = self.confusion.diagonal()
        return [100 * float(right[k] / images[k]) if images[k] else None for k in range(len(images))]

    def mistakes(self, classes: Sequence[str], most: int = 15) -> list[tuple[str, str, int]]:
        """The most frequent confusions: true class, predicted class, number of images."""
        wrong = self.confusion.copy()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")[:most]
        places = zip(*np.unravel_index(order, wrong.shape))
        return [
            (classes[row], classes[column], int(wrong[row, column])) for row, column in places if wrong[row, column]
        ]


def measure(probabilities: Tensor, labels: Tensor) -> Measures:
    """Measure predictions.

    Args:
        probabilities: of the classes (N, C), rows that sum to 1.
        labels: the true classes (N).

    Examples::

        >>> found = measure(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1]))
        >>> found.figures["top1"], found.confusion.tolist()
        (50.0, [[1, 0], [1, 0]])
    """
    probabilities = probabilities.double()
    count, classes = probabilities.shape
    figures = {}
    for k in (1, 5) if classes > 5 else (1,):
        right = (probabilities.topk(k, dim=1).indices == labels[:, None]).any(dim=1)
        figures[f"top{k}"] = 100 * right.double().mean().item()
    likelihood = probabilities[torch.arange(count), labels].clamp_min(torch.finfo(torch.float64).tiny)
    figures["loss"] = -likelihood.log().mean().item()
    confidence, predicted = probabilities.max(dim=1)
    bins = reliability(confidence.numpy(), (predicted == labels).numpy())
    figures["ece"] = 100 * bins.error
    confusion = confusion_matrix(labels.numpy(), predicted.numpy(), labels=np.arange(classes))
    return Measures(figures, confusion, bins)


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = _BINS) -> Reliability:
    """Put predictions into bins by their confidence.

    Args:
        confidence: probability of the predicted class (N), from 0 to 1; a bin has its upper edge in it.
        right: whether the prediction is right (N).
        bins: how many.
    """
    number = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    images = np.bincount(number, minlength=bins)
    sums = [np.bincount(number, weights=values, minlength=bins) for values in (confidence, right)]
    with np.errstate(invalid="ignore"):
        return Reliability(images, *(each / images for each in sums))
