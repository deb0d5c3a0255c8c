"""``results.json``: what a run was made of and by, and its seconds over interruptions."""

import json

import pytest
import torch
from tiny_classification import train

from fbn_plugin.engine.classification.results import best_evaluation, durations
from fbn_plugin.engine.run.logging import TrainingLog, read_metrics
from fbn_plugin.layers.filtered_batch_norm import FilteredBatchNormMixin


def test_what_a_run_was_made_of(tmp_path):
    trainer, result = train(tmp_path, SOLVER__MAX_ITER=3, command=["tools/train.py", "KEY", "a b"])
    record = json.loads((tmp_path / "results.json").read_text())
    assert {name: record[name] for name in result} == result
    norms = [module for module in trainer.model.modules() if isinstance(module, FilteredBatchNormMixin)]
    assert (record["norm"], record["norms"]) == ("FBN", {"FBN(t_sigma=5)": len(norms)})
    assert record["parameters"] == record["trained_parameters"] == sum(p.numel() for p in trainer.model.parameters())
    assert (record["images_per_batch"], record["images_per_process_and_step"], record["processes"]) == (16, 16, 1)
    assert (record["optimizer"], record["learning_rate"], record["schedule"]) == ("momentum", 0.01, "cosine")
    assert record["command"] == "tools/train.py KEY 'a b'" and record["versions"]["torch"] in torch.__version__
    assert record["best"] == {"metric": "top1", "value": result["top1"], "iteration": 3, "epoch": 3 / 89}
    assert record["training_seconds"] > 0 and record["evaluation_seconds"] > 0
    assert record["duration_seconds"] == record["training_seconds"] + record["evaluation_seconds"]


def test_seconds_add_up_over_an_interruption(tmp_path, monkeypatch):
    """Each iteration takes a second; what is done again counts once."""
    step = TrainingLog.step
    monkeypatch.setattr(TrainingLog, "step", lambda *args, **values: step(*args, **{**values, "time": 1.0}))
    train(tmp_path, SOLVER__MAX_ITER=3, SOLVER__CHECKPOINT_PERIOD=2)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    train(tmp_path, True, SOLVER__MAX_ITER=5, SOLVER__CHECKPOINT_PERIOD=2)
    record, rows = json.loads((tmp_path / "results.json").read_text()), read_metrics(tmp_path / "metrics.json")
    assert (record["training_seconds"], record["images_per_second"]) == (5, 16)
    assert [row["iteration"] for row in rows if "time" in row] == [1, 3, 4]
    evaluations = [row["evaluation_seconds"] for row in rows if "val/loss" in row]
    assert record["evaluation_seconds"] == sum(evaluations) > 0 and len(evaluations) == 1
    assert record["duration_seconds"] == 5 + sum(evaluations)


def test_seconds_of_rows():
    rows = [{"iteration": 9, "time": 0.5}, {"iteration": 9, "val/loss": 1.0, "evaluation_seconds": 2.0}]
    rows += [{"iteration": 14, "time": 1.0}]
    expected = {"duration_seconds": 12.0, "training_seconds": 10.0, "evaluation_seconds": 2.0, "images_per_second": 6.0}
    assert durations(rows, 4) == expected
    # An evaluation of an older version does not tell its seconds.
    older = durations([*rows, {"iteration": 14, "val/loss": 1.0}], 4)
    assert (older["duration_seconds"], older["evaluation_seconds"], older["training_seconds"]) == (None, None, 10.0)
    assert durations([], 4)["images_per_second"] is None


@pytest.mark.parametrize(("metric", "iteration"), [("top1", 20), ("loss", 10)])
def test_the_best_evaluation(metric, iteration):
    rows = [
        {"iteration": 9, "val/top1": 50.0, "val/loss": 0.5},
        {"iteration": 12, "loss": 0.1},
        {"iteration": 19, "val/top1": 60.0, "val/loss": 0.7},
        {"iteration": 29, "val/top1": 60.0, "val/loss": None},
    ]
    best = best_evaluation(rows, metric, 10)
    assert (best["iteration"], best["epoch"]) == (iteration, iteration / 10)
    assert best_evaluation(rows[1:2], metric, 10) is None
