"""Pretrained weights of batch norm with other norms: what is fitted before training, and what the accuracies say."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fbn_plugin.engine.classification.config import check_config, classification_config
from fbn_plugin.engine.classification.model import build_model
from fbn_plugin.engine.classification.trainer import ClassificationTrainer
from fbn_plugin.engine.run.checkpoint import load_file
from fbn_plugin.engine.run.config import load_config

CONFIGS = Path(__file__).parents[3] / "configs"


def config(output_dir="unused", **overrides):
    """LeNet-5 on handwritten digits."""
    values = {"OUTPUT_DIR": output_dir, "MODEL.NAME": "lenet5_convs", "MODEL.NORM": "", "INPUT.SIZE": 28}
    values |= {
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.TRAIN_CROP": "none",
        "SOLVER.BASE_LR": 0.1,
        "SOLVER.WARMUP_EPOCHS": 0,
        "TEST.EVAL_PERIOD": 0,
    }
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    flat = [str(part) for pair in values.items() for part in pair]
    return load_config(classification_config(), CONFIGS / "Digits/test_resnet_FBN.yaml", flat)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, float]:
    """Weights with batch norm, and their accuracy."""
    folder = tmp_path_factory.mktemp("trained")
    result = ClassificationTrainer(config(folder, SOLVER__MAX_ITER=88)).train()
    assert result["top1"] > 80
    return folder / "model_final.pth", result["top1"]


def recalibrated(folder, weights, norm, **overrides) -> dict:
    """What a run of one iteration, at next to no rate, says of the weights before it."""
    how = {"MODEL__NORM": norm, "MODEL__RECALIBRATE": 8, "SOLVER__MAX_ITER": 1, "SOLVER__BASE_LR": 1e-12}
    ClassificationTrainer(config(folder, MODEL__WEIGHTS=weights, **how, **overrides)).train()
    return json.loads((folder / "recalibration.json").read_text())


def test_into_fbn(tmp_path, trained):
    """Which evaluates as batch norm does, until it gets population statistics of its own."""
    weights, top1 = trained
    record = recalibrated(tmp_path, weights, "FBN(t_sigma=2)")
    assert record["own"]["top1"] == record["converted"]["top1"] == top1
    assert record["own"]["loss"] == pytest.approx(record["converted"]["loss"], rel=1e-5)
    assert record["recalibrated"]["loss"] != record["converted"]["loss"]
    assert record["fitted"] == "population statistics" and record["batches"] == 8
    before, after = load_file(weights)["model"], load_file(tmp_path / "model_final.pth")["model"]
    key = "features.conv1.norm.running_var"
    assert after[key].sum() < before[key].sum()  # without what lies beyond 2 sigma
    assert torch.allclose(after["features.conv1.norm.weight"], before["features.conv1.norm.weight"])
    log = (tmp_path / "log.txt").read_text()
    assert f"pretrained, its own norms: top-1 {top1:.2f} %" in log
    assert "pretrained, population statistics over 8 batches: top-1" in log


@pytest.mark.parametrize("norm", ["GN(num_groups=2)", "FGN(num_groups=2, t_sigma=3)"])
def test_into_group_norms(tmp_path, trained, norm):
    """Which have no statistics, and another scale and shift."""
    weights, top1 = trained
    record = recalibrated(tmp_path, weights, norm)
    assert record["own"]["top1"] == top1 and record["fitted"] == "scale and shift by least squares"
    assert record["recalibrated"]["loss"] < record["converted"]["loss"]
    assert record["recalibrated"]["top1"] >= record["converted"]["top1"]


def test_its_own_norms_and_a_new_classifier(tmp_path, trained):
    record = recalibrated(tmp_path, trained[0], "", MODEL__RESET_CLASSIFIER=True, SEED=5)
    assert record["own"] == record["converted"] and record["own"]["top1"] < 40


def test_a_resumed_run_does_not_do_it_again(tmp_path, trained):
    how = {"MODEL__WEIGHTS": trained[0], "MODEL__NORM": "FBN", "MODEL__RECALIBRATE": 2}
    ClassificationTrainer(config(tmp_path / "whole", **how, SOLVER__MAX_ITER=4)).train()
    ClassificationTrainer(config(tmp_path / "parts", **how, SOLVER__MAX_ITER=2)).train()
    (tmp_path / "parts/recalibration.json").unlink()
    ClassificationTrainer(config(tmp_path / "parts", **how, SOLVER__MAX_ITER=4), resume=True).train()
    assert not (tmp_path / "parts/recalibration.json").exists()
    whole, parts = (load_file(tmp_path / name / "model_final.pth")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({}, "MODEL.RECALIBRATE must be 0 without MODEL.PRETRAINED or WEIGHTS, .* got 8"),
        ({"MODEL__WEIGHTS": "a.pth", "MODEL__NORM": "FrozenBN"}, "MODEL.NORM must be another norm than FrozenBN"),
        (
            {"MODEL__PRETRAINED": True, "INPUT__NORM_GAMMA_INIT": 0.1},
            "NORM_GAMMA_INIT must be 0.0 with MODEL.RECALIBRATE",
        ),
        ({"MODEL__RECALIBRATE": -1}, "MODEL.RECALIBRATE must be 0 or more"),
    ],
)
def test_what_is_refused(overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_config(config(**{"MODEL__RECALIBRATE": 8, **overrides}))


def test_weights_without_running_statistics(tmp_path):
    group = build_model(config(MODEL__NORM="GN(num_groups=2)"), 10)
    assert isinstance(group.features.conv1.norm, nn.GroupNorm)
    torch.save(group.state_dict(), tmp_path / "gn.pth")
    with pytest.raises(
        ValueError, match=r"MODEL.RECALIBRATE must be 0 with MODEL.WEIGHTS .*gn.pth, which has no running"
    ):
        recalibrated(tmp_path / "out", tmp_path / "gn.pth", "FBN")
    assert not (tmp_path / "out").exists()
