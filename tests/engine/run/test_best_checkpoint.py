"""The checkpoint of the best evaluation: what it holds, and what beats it."""

import math

import pytest
import torch
from torch import nn

from fbn_plugin.engine.run.best_checkpoint import BestCheckpoint, check_metric
from fbn_plugin.engine.run.checkpoint import load_file
from fbn_plugin.engine.run.cli import UserError


def test_the_best_model_is_kept_over_an_interruption(tmp_path):
    model = nn.Linear(1, 1)
    best = BestCheckpoint(tmp_path, "bbox/AP")
    for iteration, value in enumerate((math.nan, 5.0, 7.0, 7.0, 6.0)):
        nn.init.constant_(model.weight, iteration)
        best.update(model, iteration, {"bbox/AP": value, "segm/AP": 99.0})
    saved = load_file(tmp_path / "model_best.pth")
    assert {name: saved[name] for name in ("iteration", "metric", "value")} == {
        "iteration": 2,
        "metric": "bbox/AP",
        "value": 7.0,
    }
    assert saved["model"]["weight"].item() == 2
    resumed = BestCheckpoint(tmp_path, "bbox/AP", resume=True)
    resumed.update(model, 8, {"bbox/AP": 6.5})
    assert load_file(tmp_path / "model_best.pth")["iteration"] == 2
    # Another metric starts anew, and so does another run.
    assert BestCheckpoint(tmp_path, "segm/AP", resume=True).value == -math.inf
    assert BestCheckpoint(tmp_path, "bbox/AP").value == -math.inf


def test_of_a_loss_the_lowest_is_the_best(tmp_path):
    best = BestCheckpoint(tmp_path, "loss")
    for iteration, value in enumerate((5.0, math.nan, 3.0, 4.0)):
        best.update(nn.Linear(1, 1), iteration, {"loss": value, "top1": 10.0 * iteration})
    assert load_file(tmp_path / "model_best.pth")["iteration"] == 2
    resumed = BestCheckpoint(tmp_path, "loss", resume=True)
    resumed.update(nn.Linear(1, 1), 8, {"loss": 3.5})
    assert load_file(tmp_path / "model_best.pth")["value"] == 3.0
    assert BestCheckpoint(tmp_path, "top1", resume=True).value == -math.inf  # another metric starts anew


def test_a_model_that_detects_nothing_is_the_best_before_there_is_another(tmp_path, caplog):
    """An AP of 0; one of no objects is no number, and there is no best by that."""
    BestCheckpoint(tmp_path, "bbox/APl").update(nn.Linear(1, 1), 0, {"bbox/AP": 0.0, "bbox/APl": math.nan})
    assert not (tmp_path / "model_best.pth").exists()
    assert "bbox/APl is no number, as the set has no such objects" in caplog.text
    BestCheckpoint(tmp_path, "bbox/AP").update(nn.Linear(1, 1), 0, {"bbox/AP": 0.0})
    assert load_file(tmp_path / "model_best.pth")["value"] == 0.0


def test_files_of_the_torchvision_engines_first_form(tmp_path):
    torch.save({"model": {}, "iteration": 3, "best": {"bbox/AP": 4.0}}, tmp_path / "model_best.pth")
    assert BestCheckpoint(tmp_path, "bbox/AP", resume=True).value == 4.0
    assert BestCheckpoint(tmp_path, "segm/AP", resume=True).value == -math.inf


def test_no_metric_and_one_that_is_not_there(tmp_path):
    BestCheckpoint(tmp_path, "").update(nn.Linear(1, 1), 0, {"bbox/AP": 1.0})
    assert not (tmp_path / "model_best.pth").exists()
    with pytest.raises(UserError, match="BEST_CHECKPOINT_METRIC must be one of bbox/AP, got 'segm/AP'"):
        BestCheckpoint(tmp_path, "segm/AP").update(nn.Linear(1, 1), 0, {"bbox/AP": 1.0})


def test_metrics_are_checked_before_a_run():
    check_metric("KEY", "sem_seg/mIoU", ["bbox/AP", "sem_seg/..."])
    with pytest.raises(
        ValueError, match="KEY must be one of bbox/AP, segm/AP, got 'segm/APP'; did you mean 'segm/AP'?"
    ):
        check_metric("KEY", "segm/APP", ["bbox/AP", "segm/AP"])
    with pytest.raises(ValueError, match="KEY must be '' where DATASETS.TEST is empty, got 'bbox/AP'"):
        check_metric("KEY", "bbox/AP", [])
