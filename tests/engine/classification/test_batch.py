"""How many images are in an update, in a step and in a norm's moments: counted, said, recorded, and refused where they
are not those that the config asks for."""

import json

import pytest
import torch
from test_step import QUICK, config

from fbn_plugin.engine.classification.batch import BatchSizes, check_norm_batch
from fbn_plugin.engine.classification.config import classification_config
from fbn_plugin.engine.classification.model import create_model
from fbn_plugin.engine.classification.trainer import ClassificationTrainer
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.config import load_config, save_config


@pytest.mark.parametrize(
    ("norm", "images", "words"),
    [
        ("FBN", [4], "batch norms take the moments of 4 images"),
        ("RBN", [4], "batch norms take the moments of 4 images"),
        ("SyncFBN", [32], "batch norms take the moments of 32 images"),
        ("GN(num_groups=4)", [], "no norm takes moments of several images"),
        ("FrozenBN", [], "no norm takes moments of several images"),
        ("IN", [], "no norm takes moments of several images"),
    ],
)
def test_the_images_whose_moments_a_norm_takes(norm, images, words):
    network, sizes = create_model("test_resnet", norm, num_classes=10, in_chans=1), BatchSizes(64, 8, 2)
    assert sizes.norms(network) == images
    line = sizes.describe(network)
    assert line == f"64 images an update of the weights, 8 processes x 2 steps x 4 images; {words}"
    assert sizes.record(network) == {
        "images_per_batch": 64,
        "images_per_process_and_step": 4,
        "accumulation_steps": 2,
        "images_per_norm": images[0] if images else None,
    }


def test_norms_of_both_kinds():
    network = torch.nn.Sequential(*(create_model("test_resnet", norm) for norm in ("BN", "SyncFBN")))
    assert BatchSizes(8, 4).norms(network) == [2, 8] == BatchSizes(8, 4).record(network)["images_per_norm"]


@pytest.mark.parametrize(
    ("processes", "overrides", "sentence"),
    [
        (1, {"ACCUMULATION_STEPS": 3}, "IMS_PER_BATCH must be a multiple of 3, for 1 process and .*STEPS 3, got 32"),
        (8, {"ACCUMULATION_STEPS": 3}, "IMS_PER_BATCH must be a multiple of 24, for 8 processes and .*STEPS 3, got 32"),
        (1, {"REFERENCE_WORLD_SIZE": 3}, "IMS_PER_BATCH must be a multiple of SOLVER.REFERENCE_WORLD_SIZE, 3, got 32"),
        (64, {"REFERENCE_WORLD_SIZE": 1}, "IMS_PER_BATCH must be 1437, the number of training images, .* got 2048"),
        (1, {"IMS_PER_NORM": -1}, "SOLVER.IMS_PER_NORM must be 0 or more, .* got -1"),
    ],
)
def test_batches_that_cannot_be_shared_out(monkeypatch, tmp_path, processes, overrides, sentence):
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    with pytest.raises(ValueError, match=sentence):
        ClassificationTrainer(config(output_dir=tmp_path / "o", **{f"SOLVER__{k}": v for k, v in overrides.items()}))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("norm", "processes", "batch", "steps", "wanted", "would"),
    [
        ("FBN", 8, 32, 1, 32, "or 4, .*8 processes and ACCUMULATION_STEPS 1 .SOLVER.IMS_PER_BATCH 256 would give 32"),
        ("FBN", 1, 32, 2, 32, "or 16, .*SOLVER.IMS_PER_BATCH 64 or SOLVER.ACCUMULATION_STEPS 1 would give 32"),
        ("FBN", 2, 32, 1, 2, "or 16, .*SOLVER.IMS_PER_BATCH 4 or SOLVER.ACCUMULATION_STEPS 8 would give 2"),
        ("SyncFBN", 8, 32, 2, 32, "or 16, .*SOLVER.IMS_PER_BATCH 64 or SOLVER.ACCUMULATION_STEPS 1 would give 32"),
        ("SyncFBN", 8, 32, 1, 12, "or 32, .*.no batch of 8 processes would give 12"),
    ],
)
def test_a_number_of_images_that_a_norm_is_to_see(monkeypatch, norm, processes, batch, steps, wanted, would):
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    network = create_model("test_resnet", norm)
    keys = {"SOLVER__IMS_PER_BATCH": batch, "SOLVER__ACCUMULATION_STEPS": steps, "SOLVER__IMS_PER_NORM": wanted}
    with pytest.raises(ValueError, match=f"SOLVER.IMS_PER_NORM must be 0, {would}., got {wanted}$"):
        check_norm_batch(config(**keys), network)
    right = {"SOLVER__IMS_PER_NORM": BatchSizes(batch, processes, steps).norms(network)[0]}
    check_norm_batch(config(**keys | right), network)
    check_norm_batch(config(**keys), create_model("test_resnet", "GN(num_groups=4)"))  # by no batch


def test_mixup_pairs_the_images_of_a_step():
    with pytest.raises(ValueError, match="IMS_PER_BATCH must be a multiple of 4 with INPUT.MIXUP or CUTMIX, .* got 34"):
        ClassificationTrainer(config(INPUT__MIXUP=0.2, SOLVER__IMS_PER_BATCH=34, SOLVER__ACCUMULATION_STEPS=2))


def test_the_linear_rule_keeps_the_images_of_a_norm(monkeypatch, tmp_path):
    rule = {"SOLVER__REFERENCE_WORLD_SIZE": 2, "SOLVER__IMS_PER_BATCH": 32, "SOLVER__BASE_LR": 0.1}
    rule |= {"SOLVER__WARMUP_EPOCHS": 0}
    rule |= {"SOLVER__MIN_LR": 0.02, "SOLVER__MAX_ITER": 10, "SOLVER__IMS_PER_NORM": 16, "SOLVER__CHECKPOINT_PERIOD": 8}
    monkeypatch.setattr(distributed, "world_size", lambda: 8)
    trainer = ClassificationTrainer(config(**rule))
    solver = trainer.cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.MAX_ITER, solver.CHECKPOINT_PERIOD) == (128, 2, 2)
    assert (pytest.approx(0.4), pytest.approx(0.08), 8) == (solver.BASE_LR, solver.MIN_LR, solver.MAX_EPOCH)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.4)
    assert trainer.iters_per_epoch == 1437 // 128
    # What the run saves means the same again.
    save_config(trainer.cfg, tmp_path / "config.yaml")
    again = ClassificationTrainer(load_config(classification_config(), tmp_path / "config.yaml"))
    assert solver == again.cfg.SOLVER


def test_it_is_said_and_recorded(tmp_path):
    keys = {**QUICK, "SOLVER__ACCUMULATION_STEPS": 2, "SOLVER__REFERENCE_WORLD_SIZE": 4, "TEST__EVAL_PERIOD": 0}
    ClassificationTrainer(config(output_dir=tmp_path, **keys | {"SOLVER__MAX_ITER": 1})).train()
    log = (tmp_path / "log.txt").read_text()
    assert "SOLVER.REFERENCE_WORLD_SIZE 4, and 1 process: IMS_PER_BATCH 8, BASE_LR 0.005, MIN_LR 0, MAX_ITER 4" in log
    assert "8 images an update of the weights, 1 process x 2 steps x 4 images; batch norms take the moments of 4" in log
    for name in ("run_info.json", "results.json"):
        record = json.loads((tmp_path / name).read_text())
        assert [record[f"images_per_{what}"] for what in ("batch", "process_and_step", "norm")] == [8, 4, 4]
        assert record["accumulation_steps"] == 2
