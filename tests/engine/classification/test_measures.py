"""Figures of predictions: accuracies, loss, confusion, accuracy by class and calibration, by hand and by NumPy."""

import numpy as np
import pytest
import torch

from fbn_plugin.engine.classification.measures import measure, reliability


def test_figures_against_numpy():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 8)) * 2, rng.integers(0, 7, 200)  # class 7 has no image
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = measure(torch.from_numpy(probabilities), torch.from_numpy(labels))
    rank = (logits > logits[np.arange(200), labels][:, None]).sum(1)
    assert found.figures["top1"] == pytest.approx(100 * np.mean(rank < 1))
    assert found.figures["top5"] == pytest.approx(100 * np.mean(rank < 5))
    assert found.figures["loss"] == pytest.approx(-np.log(probabilities[np.arange(200), labels]).mean())
    predicted = logits.argmax(1)
    expected = np.zeros((8, 8), int)
    np.add.at(expected, (labels, predicted), 1)
    assert (found.confusion == expected).all()
    assert found.by_class[:7] == pytest.approx([100 * np.mean(predicted[labels == k] == k) for k in range(7)])
    assert found.by_class[7] is None

    confidence, right = probabilities.max(1), predicted == labels
    gaps = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            gaps += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert found.figures["ece"] == pytest.approx(100 * gaps)


def test_calibration_in_bins():
    bins = reliability(np.array([0.0, 0.5, 0.6, 0.9, 1.0]), np.array([False, True, False, True, True]), bins=2)
    assert bins.images.tolist() == [2, 3]
    assert bins.accuracy.tolist() == [0.5, 2 / 3] and bins.confidence == pytest.approx([0.25, 2.5 / 3])
    assert bins.error == pytest.approx((2 * 0.25 + 3 * abs(2 / 3 - 2.5 / 3)) / 5)
    empty = reliability(np.array([0.9]), np.array([True]), bins=2)
    assert empty.error == pytest.approx(0.1)
    assert empty.as_json()[0] == {"from": 0.0, "to": 0.5, "images": 0, "confidence": None, "accuracy": None}


def test_sure_and_wrong_has_a_finite_loss():
    found = measure(torch.tensor([[1.0, 0.0, 0.0]] * 3), torch.tensor([1, 1, 2]))
    assert 700 < found.figures["loss"] < 710 and "top5" not in found.figures
    assert found.mistakes(["a", "b", "c"]) == [("b", "a", 2), ("c", "a", 1)]
