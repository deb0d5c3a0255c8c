"""Evaluation on a part of the images, at chosen iterations, by moments of batches; what is written says so."""

import json

import numpy as np
import pytest
import torch
from tiny_classification import config, train
from torch import nn
from torch.nn import functional

from fbn_plugin import FilteredBatchNorm2d
from fbn_plugin.engine.classification.data import build_val_loader
from fbn_plugin.engine.classification.datasets import build_data
from fbn_plugin.engine.classification.evaluation import CONDITIONAL, Evaluator, evaluate, order_batches
from fbn_plugin.engine.classification.trainer import ClassificationTrainer
from fbn_plugin.engine.data.image_data import load_image_data
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.logging import read_metrics

CPU = torch.device("cpu")


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_random_batches_have_every_image_once_and_company(processes):
    order = order_batches([0] * 10 + [1] * 11, "batch", 4, processes=processes)
    assert order.batch_size == 4 and len(order.indices) % (4 * processes) == 0
    assert sorted(order.indices[order.counts]) == list(range(21))
    assert order.counts[:21].all() and len(order.indices) < 21 + 4 * processes
    assert order.indices[:21].tolist() != sorted(order.indices[:21])
    again, other = (order_batches([0] * 21, "batch", 4, processes=processes, epoch=epoch) for epoch in (0, 1))
    assert (again.indices == order.indices).all() and (other.indices != order.indices).any()
    # A batch is no larger than the images of a process.
    assert order_batches([0] * 10, "batch", 256, processes=processes).batch_size == -(-10 // processes)


@pytest.mark.parametrize("processes", [1, 2])
def test_balanced_batches_of_each_process(processes):
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 2])
    order = order_batches(labels, "balanced", 256, images_per_class=2, processes=processes)
    assert order.batch_size == 6 and sorted(order.indices[order.counts]) == list(range(8))
    for rank in range(processes):
        for batch in order.indices[rank::processes].reshape(-1, 6):
            assert sorted(labels[batch]) == [0, 0, 1, 1, 2, 2]


class Tiny(nn.Module):
    """Logits from the pixels of an 8-pixel image, by way of a filtered norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(1, 10, 4, stride=4), FilteredBatchNorm2d(10, t_sigma=1.5)

    def forward(self, x):
        return self.norm(self.conv(x)).amax((2, 3)) * 3


@pytest.mark.parametrize("moments", ["batch", "balanced"])
def test_figures_by_the_moments_of_batches(moments):
    """Against the model in training, batch by batch: there it has the batch's own moments, too."""
    cfg = config(
        TEST__MOMENTS=moments, TEST__IMS_PER_BATCH=30, DATALOADER__IMAGES_PER_CLASS=2, DATASETS__VAL_IMAGES=130
    )
    data, model = build_data(cfg).val, Tiny()
    evaluator = Evaluator(cfg, data, 10, CPU)
    result = evaluator(model.eval())
    assert not model.training and model.norm.num_batches_tracked == 0 and model.norm.running_mean.abs().max() == 0

    order, images = evaluator._order, evaluator.images
    x, labels = map(torch.cat, zip(*build_val_loader(cfg, images, CPU)))
    with torch.no_grad():
        logits = torch.cat([model.train()(part) for part in x.split(order.batch_size)])
    logits, labels = logits[order.counts], labels[order.counts]
    assert len(labels) == 130 and order.batch_size == (30 if moments == "batch" else 20)
    assert result["top1"] == pytest.approx((logits.argmax(1) == labels).double().mean().item() * 100)
    assert result["loss"] == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-4)
    assert result != Evaluator(config(), data, 10, CPU)(model)
    assert (CONDITIONAL in evaluator.note) is evaluator.conditional is (moments == "balanced")
    assert evaluator.note.startswith("130 validation images; moments of ")


def test_shares_of_processes_add_up(monkeypatch):
    """Each process's sums, put together by hand, are one process's figures; what timm's sampler repeats is left out."""
    images, model = load_image_data("digits", mode="L").val, Tiny()
    x, labels = map(torch.cat, zip(*build_val_loader(config(), images, CPU)))
    x, labels = x[:100], labels[:100]
    counts = np.arange(100) % 7 != 3
    whole = evaluate(model, _Loader(x, labels), CPU, counts=counts)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    found = []
    monkeypatch.setattr(distributed, "all_gather", lambda value: found.append(value) or [value])
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        mine = [*range(rank, 100, 3), *([0] if rank else [])]
        evaluate(model, _Loader(x[mine], labels[mine]), CPU, counts=counts)
    for name, value in whole.items():
        assert sum(sums[name] for sums, _ in found) / counts.sum() == pytest.approx(value, rel=1e-5)


class _Loader:
    """Images and labels, seven at a time."""

    def __init__(self, images, labels):
        self.batches = list(zip(images.split(7), labels.split(7)))

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def test_a_run_says_how_it_was_measured(tmp_path):
    options = {"TEST__MOMENTS": "balanced", "DATASETS__VAL_IMAGES": 50, "TEST__EVAL_ITERATIONS": (2, 3)}
    _, result = train(tmp_path, SOLVER__MAX_ITER=4, **options)
    rows = [row for row in read_metrics(tmp_path / "metrics.json") if "val/top1" in row]
    assert [(row["iteration"], row["val/conditional"]) for row in rows] == [(1, 1), (2, 1), (3, 1)]
    record = json.loads((tmp_path / "results.json").read_text())
    assert (record["val_images"], record["moments"], record["conditional"]) == (50, "balanced", True)
    assert (
        f"(50 validation images; moments of balanced batches of 10 images; {CONDITIONAL})"
        in (tmp_path / "log.txt").read_text()
    )
    # What is in metrics.json is not measured again, and a figure by another measure is not mixed in.
    _, again = train(tmp_path, True, SOLVER__MAX_ITER=4, **options)
    assert again == result
    with pytest.raises(ValueError, match="DATASETS.VAL_IMAGES must be 50"):
        ClassificationTrainer(
            config(tmp_path, SOLVER__MAX_ITER=4, **options | {"DATASETS__VAL_IMAGES": 60}), resume=True
        )

    weights = tmp_path / "model_final.pth"
    trainer = ClassificationTrainer(config(tmp_path / "new", MODEL__WEIGHTS=weights, **options), eval_only=True)
    assert not (tmp_path / "new").exists()
    trainer.write_evaluation(trainer.evaluate())
    written = json.loads((tmp_path / "new/evaluation.json").read_text())
    assert written["metrics"] == result and (written["iteration"], written["weights"]) == (3, str(weights))
    assert (written["val_images"], written["moments"], written["conditional"]) == (50, "balanced", True)
    assert (tmp_path / "new/config.yaml").is_file() and "- 2" in (tmp_path / "new/config.yaml").read_text()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"TEST__MOMENTS": "mean"}, "TEST.MOMENTS must be one of 'population', 'batch', 'balanced', got 'mean'"),
        (
            {"TEST__MOMENTS": "balanced", "DATASETS__VAL_IMAGES": 4},
            "TEST.MOMENTS: (class . has|4 labels)",
        ),
        ({"TEST__EVAL_ITERATIONS": (3, 2)}, "TEST.EVAL_ITERATIONS must be increasing"),
    ],
)
def test_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        ClassificationTrainer(config(**values))


def test_late_iterations_are_told(tmp_path):
    train(tmp_path, SOLVER__MAX_ITER=1, TEST__EVAL_ITERATIONS=(1, 9))
    assert "SOLVER.MAX_ITER is 1, so there is no evaluation after [9]" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(("norm", "notes"), [("GN(num_groups=2)", 1), ("BN", 0)])
def test_moments_that_no_norm_takes_are_noted(tmp_path, norm, notes):
    trainer = ClassificationTrainer(config(tmp_path, TEST__MOMENTS="balanced", MODEL__NORM=norm))
    assert sum("no norm of the model takes moments of several images" in note for note in trainer.notes) == notes
