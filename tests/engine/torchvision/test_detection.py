"""The detection engine: configs are checked, detectron2's solver rules hold, and interruptions leave no trace."""

import copy
import itertools
import json
import math
import pickle
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from fbn_plugin import SyncFilteredBatchNorm
from fbn_plugin.engine.data.sampling import repeat_factors
from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run import population
from fbn_plugin.engine.run.cli import UserError
from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.engine.run.detection_keys import detection_config
from fbn_plugin.engine.run.run_info import read_run_info
from fbn_plugin.engine.run.schedule import recorded_evaluation
from fbn_plugin.engine.torchvision import trainer as detection
from fbn_plugin.engine.torchvision.config import load_detection_config
from fbn_plugin.engine.torchvision.model import build_model, build_optimizer, build_scheduler
from fbn_plugin.engine.torchvision.trainer import DetectionTrainer

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {
    "MODEL.DEVICE": "cpu",
    "MODEL.MASK_ON": True,
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [128]],
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 30,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 10,
    "MODEL.ROI_HEADS.NUM_CLASSES": 2,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "INPUT.MIN_SIZE_TRAIN": (48, 64),
    "INPUT.MIN_SIZE_TEST": 64,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 0.005,
    "SOLVER.MAX_ITER": 6,
    "SOLVER.CHECKPOINT_PERIOD": 3,
    "SOLVER.WARMUP_ITERS": 2,
    "DATALOADER.NUM_WORKERS": 0,
    "SEED": 11,
}


@pytest.fixture
def config(shapes, tmp_path):
    def make(output="run", **changes) -> CfgNode:
        values = {
            **TINY,
            "DATASETS.TRAIN": (f"{shapes}:train",),
            "DATASETS.TEST": (f"{shapes}:val",),
            "OUTPUT_DIR": str(tmp_path / output),
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        return load_detection_config(None, [str(part) for pair in values.items() for part in pair])

    return make


class Interrupt(Exception):
    pass


def interrupt(trainer, iteration):
    """Let `trainer` die in the middle of an iteration."""
    step = trainer._step

    def dying(model, number, *batch):
        if number == iteration:
            raise Interrupt
        return step(model, number, *batch)

    trainer._step = dying


def metrics_of(cfg):
    with open(f"{cfg.OUTPUT_DIR}/metrics.json") as file:
        rows = [json.loads(line) for line in file]
    return [{k: v for k, v in row.items() if "time" not in k and "_second" not in k} for row in rows]


def assert_same_weights(one, other):
    one, other = one.model.state_dict(), other.model.state_dict()
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("workers, grouping", [(0, True), (2, False)])
def test_an_interrupted_run_ends_with_the_same_weights_and_log(config, workers, grouping):
    options = {"DATALOADER__NUM_WORKERS": workers, "DATALOADER__ASPECT_RATIO_GROUPING": grouping}
    options |= {"TEST__EVAL_PERIOD": 3, "MODEL__RESNETS__NORM": "FBN(t_sigma=3.0)", "MODEL__ROI_MASK_HEAD__NORM": "FBN"}
    whole = DetectionTrainer(config("whole", **options), log_period=1)
    expected = whole.train()

    stopped = DetectionTrainer(config("stopped", **options), log_period=1)
    interrupt(stopped, 4)
    with pytest.raises(Interrupt):
        stopped.train()
    torch.rand(7)  # a new process has other random states
    resumed = DetectionTrainer(config("stopped", **options), resume=True, log_period=1)
    assert resumed.start == 3
    assert resumed.train() == pytest.approx(expected, nan_ok=True)
    assert_same_weights(whole, resumed)
    assert metrics_of(resumed.cfg) == metrics_of(whole.cfg)
    assert [row["iteration"] for row in metrics_of(whole.cfg)] == [0, 1, 2, 2, 3, 4, 5, 5]


def test_an_evaluation_that_the_interruption_took_is_made_up_for(config, monkeypatch):
    cfg = config(TEST__EVAL_PERIOD=3, SOLVER__MAX_ITER=4)
    stopped = DetectionTrainer(cfg)
    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        patch.setattr(stopped, "evaluate", lambda: (_ for _ in ()).throw(Interrupt))
        stopped.train()
    DetectionTrainer(cfg, resume=True).train()
    assert [row["iteration"] for row in metrics_of(cfg) if "bbox/AP" in row] == [2, 3]
    finished = DetectionTrainer(cfg, resume=True)  # nothing left to do: the last figures once more
    monkeypatch.setattr(finished, "evaluate", pytest.fail)
    assert finished.train().keys() > {"bbox/AP", "segm/APl"}


def test_evaluations_do_not_change_the_training(config):
    with_them = DetectionTrainer(config("with", TEST__EVAL_PERIOD=1, SOLVER__MAX_ITER=3))
    with_them.train()
    without = DetectionTrainer(config("without", DATASETS__TEST=(), SOLVER__MAX_ITER=3))
    assert without.train() == {}
    assert_same_weights(with_them, without)


def test_the_seed_decides_the_run_and_without_one_it_is_remembered(config):
    one, other = (DetectionTrainer(config(name, SEED=seed)) for name, seed in (("a", 1), ("b", 2)))
    assert not torch.equal(one.model.backbone.body.conv1.weight, other.model.backbone.body.conv1.weight)
    drawn = DetectionTrainer(config("c", SEED=-1, SOLVER__MAX_ITER=1))
    drawn.train()
    assert DetectionTrainer(config("c", SEED=-1), resume=True).seed == drawn.seed


def test_training_lowers_the_loss(config):
    cfg = config(SOLVER__MAX_ITER=30, SOLVER__CHECKPOINT_PERIOD=30, DATASETS__TEST=())
    DetectionTrainer(cfg, log_period=1).train()
    losses = [row["total_loss"] for row in metrics_of(cfg)]
    assert sum(losses[-10:]) / 10 < 0.6 * losses[0]


def test_a_loss_that_is_not_finite_stops_the_run(config):
    trainer = DetectionTrainer(config(SOLVER__MAX_ITER=3))
    with torch.no_grad():
        trainer.model.roi_heads.box_predictor.cls_score.bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"not finite at iteration 0 \(total_loss nan, loss_cls nan"):
        trainer.train()


def test_a_damaged_image_is_named(config, shapes, tmp_path):
    folder = shutil.copytree(shapes, tmp_path / "set")
    for path in (folder / "train").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    trainer = DetectionTrainer(config(DATASETS__TRAIN=f"{folder}:train"))
    with pytest.raises(UserError, match=r"train/\d\.png cannot be read"):
        trainer.train()


def test_metrics_have_detectron2s_names(config):
    cfg = config(SOLVER__MAX_ITER=1)
    metrics = DetectionTrainer(cfg).train()
    losses = {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
    row, evaluation = metrics_of(cfg)
    assert row.keys() == {"iteration", "total_loss", "lr", *losses}
    assert row["total_loss"] == pytest.approx(sum(row[name] for name in losses))
    names = {f"{task}/{name}" for task in ("bbox", "segm") for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")}
    assert names < evaluation.keys() and metrics.keys() == evaluation.keys() - {"iteration"}


def test_two_test_sets_are_told_apart(config, shapes):
    cfg = config(SOLVER__MAX_ITER=1, DATASETS__TEST=(f"{shapes}:val", f"{shapes}:train"))
    metrics = DetectionTrainer(cfg).train()
    assert {f"{shapes}:val/bbox/AP", f"{shapes}:train/segm/AP"} < metrics.keys()


def test_boxes_alone_and_bfloat16(config):
    options = {"MODEL__RESNETS__NORM": "FBN(t_sigma=2.0)", "NORM_STATS_PERIOD": 2}
    cfg = config(SOLVER__MAX_ITER=2, MODEL__MASK_ON=False, SOLVER__AMP__ENABLED=True, **options)
    metrics = DetectionTrainer(cfg).train()
    assert not any(name.startswith("segm/") for name in metrics)
    losses, shares, _ = metrics_of(cfg)
    assert "loss_mask" not in losses and 0 < shares["filtered/mean"] < 0.25


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"MODEL.RESNETS.NORM": "FBM"},
            "MODEL.RESNETS.NORM must be the spec of a norm, got 'FBM': unknown norm 'FBM' (did you mean 'FBN'?)",
        ),
        ({"MODEL.FPN.NORM": "FBN(t_sigma=0.5)"}, "MODEL.FPN.NORM must be the spec of a norm, got 'FBN(t_sigma=0.5)': "),
        ({"MODEL.RESNETS.DEPTH": 20}, "MODEL.RESNETS.DEPTH must be one of 18, 34, 50, 101, 152, got 20"),
        ({"MODEL.META_ARCHITECTURE": "RetinaNet"}, "MODEL.META_ARCHITECTURE must be 'GeneralizedRCNN'"),
        ({"MODEL.BACKBONE.FREEZE_AT": 6}, "MODEL.BACKBONE.FREEZE_AT"),
        ({"MODEL.PIXEL_STD": [1.0]}, "MODEL.PIXEL_STD must be a list of 3"),
        (
            {"INPUT.RANDOM_FLIP": "both"},
            "INPUT.RANDOM_FLIP must be one of 'horizontal', 'vertical', 'none', got 'both'",
        ),
        ({"INPUT.MIN_SIZE_TRAIN": ()}, "INPUT.MIN_SIZE_TRAIN"),
        ({"SOLVER.LR_SCHEDULER_NAME": "Step"}, "WarmupMultiStepLR"),
        ({"SOLVER.STEPS": (5, 4)}, "SOLVER.STEPS must be increasing iterations, from 1 on, got (5, 4)"),
        ({"SOLVER.STEPS": (-1,)}, "SOLVER.STEPS must be increasing iterations, from 1 on, got (-1,)"),
        ({"SOLVER.MOMENTUM": -1.0}, "SOLVER.MOMENTUM must be from 0 to less than 1, got -1.0"),
        ({"SOLVER.MOMENTUM": 5}, "SOLVER.MOMENTUM must be from 0 to less than 1, got 5.0"),
        (
            {"SOLVER.MOMENTUM": 0, "SOLVER.NESTEROV": True},
            "SOLVER.MOMENTUM must be above 0, and less than 1, with",
        ),
        ({"SOLVER.GAMMA": 0}, "SOLVER.GAMMA must be above 0, and 1 or less, got 0.0"),
        ({"SOLVER.BASE_LR": 1e300}, "SOLVER.BASE_LR must be above 0, and 1e+30 or less, got 1e+300"),
        ({"SOLVER.BASE_LR_END": 1}, "SOLVER.BASE_LR_END must be from 0 to SOLVER.BASE_LR, 0.001, got 1.0"),
        ({"SOLVER.STEPS": (2**40,)}, "SOLVER.STEPS must be increasing iterations, from 1 on, got (1099511627776,)"),
        (
            {"MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.0]]},
            "each a list of 1 to 100 values, each from 0.01 to 100",
        ),
        ({"MODEL.ANCHOR_GENERATOR.SIZES": [[8]] * 2}, "MODEL.ANCHOR_GENERATOR.SIZES must be a list of one entry or of"),
        (
            {"MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (0, 1, 1, 1)},
            "BBOX_REG_WEIGHTS must be a list of 4, each from 1e-",
        ),
        ({"MODEL.ROI_HEADS.NUM_CLASSES": 10**9}, "MODEL.ROI_HEADS.NUM_CLASSES must be 1 or more, and 100000 or less"),
        (
            {"MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 256},
            "MODEL.ROI_BOX_HEAD.FC_DIM must be at most 128 with 256 channels and POOLER_RESOLUTION 256, got 1024",
        ),
        (
            {"INPUT.MIN_SIZE_TRAIN": (8,), "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range"},
            "INPUT.MIN_SIZE_TRAIN must be two sizes, the smaller first, with MIN_SIZE_TRAIN_SAMPLING 'range', got (8,)",
        ),
        ({"DATALOADER.NUM_WORKERS": 10**6}, "DATALOADER.NUM_WORKERS must be 0 or more, and 1024 or less, got 1000000"),
        ({"MODEL.RESNETS.NORM": "''"}, "MODEL.RESNETS.NORM must be the spec of a norm, such as 'FBN', 'BN' or"),
        ({"MODEL.ANCHOR_GENERATOR.SIZES": [[]]}, "MODEL.ANCHOR_GENERATOR.SIZES must be a list of one entry or of five"),
        ({"SOLVER.MAX_ITER": 0}, "SOLVER.MAX_ITER must be 1 or more, and 2147483647 or less, got 0"),
        ({"TEST.EVAL_PERIOD": -1}, "TEST.EVAL_PERIOD must be 0 or more"),
        ({"MODEL.RPN.CONV_DIMS": [64]}, "MODEL.RPN.CONV_DIMS"),
        ({"MODEL.DEVICE": "gpu"}, "MODEL.DEVICE must be 'cuda', 'cuda:0' and the like, or 'cpu', got 'gpu'"),
        ({"MODEL.DEVICE": "mps"}, "MODEL.DEVICE"),
        (
            {"MODEL.PIXEL_STD": [1.0, 0.0, 1.0]},
            "MODEL.PIXEL_STD must be a list of 3, each from 1e-06 to 1000000, got [1.0, 0.0, 1.0]",
        ),
        (
            {"MODEL.RPN.IOU_THRESHOLDS": [0.7, 0.3]},
            "MODEL.RPN.IOU_THRESHOLDS must be two thresholds, increasing from 0 to 1, got [0.7, 0.3]",
        ),
        ({"MODEL.ROI_HEADS.IOU_THRESHOLDS": [1.5]}, "MODEL.ROI_HEADS.IOU_THRESHOLDS"),
        ({"MODEL.RPN.NMS_THRESH": 1.5}, "MODEL.RPN.NMS_THRESH must be from 0 to 1, got 1.5"),
        (
            {"MODEL.RPN.POST_NMS_TOPK_TRAIN": 0},
            "POST_NMS_TOPK_TRAIN must be 1 or more, and 1000000 or less, got 0",
        ),
        ({"MODEL.ROI_BOX_HEAD.NUM_FC": -1}, "MODEL.ROI_BOX_HEAD.NUM_FC must be 0 or more"),
        (
            {"MODEL.RESNETS.WIDTH_PER_GROUP": 0},
            "WIDTH_PER_GROUP must be 1 or more, and 16384 or less, got 0",
        ),
        ({"SOLVER.WEIGHT_DECAY": -1}, "SOLVER.WEIGHT_DECAY must be 0 or more"),
        ({"SOLVER.WEIGHT_DECAY_BIAS": "much"}, "SOLVER.WEIGHT_DECAY_BIAS must be None, or a number"),
        ({"SOLVER.SCALE_LR_DIVISOR": -1}, "SOLVER.SCALE_LR_DIVISOR must be 0, or from 0.001 to 1000000, got -1"),
        (
            {"SOLVER.SCALE_LR_DIVISOR": 100, "SOLVER.WEIGHT_DECAY_NORM": 0.1},
            "SOLVER.WEIGHT_DECAY_NORM must be 0 with SCALE_LR_DIVISOR",
        ),
        ({"SOLVER.SCALE_LR_DIVISOR": 1, "SOLVER.BIAS_LR_FACTOR": 2}, "SOLVER.BIAS_LR_FACTOR must be 1 with"),
        ({"INPUT.NORM_GAMMA_INIT": 1.5}, "INPUT.NORM_GAMMA_INIT must be from 0 to 1, got 1.5"),
        ({"SOLVER.WARMUP_FACTOR": 2}, "SOLVER.WARMUP_FACTOR must be from 0 to 1"),
        ({"SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0}, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE must be above 0"),
        ({"SEED": 2**63}, "SEED must be below 2**63"),
        ({"TEST.PRECISE_BN.NUM_ITER": 0}, "TEST.PRECISE_BN.NUM_ITER must be 1 or more, and 2147483647 or less, got 0"),
        ({"MEASURE.ACTIVATIONS.PERIOD": -1}, "MEASURE.ACTIVATIONS.PERIOD must be 0 or more"),
        ({"NORM_STATS_PERIOD": -1}, "NORM_STATS_PERIOD must be 0 or more, and 2147483647 or less, got -1"),
        (
            {"TEST.EVAL_ITERATIONS": (6, 5)},
            "TEST.EVAL_ITERATIONS must be increasing numbers of iterations, from 1 on, got (6, 5)",
        ),
        ({"TEST.EVAL_ITERATIONS": (5, 5)}, "TEST.EVAL_ITERATIONS must be increasing"),
        ({"TEST.EVAL_ITERATIONS": (0, 5)}, "TEST.EVAL_ITERATIONS must be increasing"),
        ({"TEST.EVAL_ITERATIONS": ("half",)}, "TEST.EVAL_ITERATIONS must be increasing"),
        (
            {"SOLVER.REFERENCE_WORLD_SIZE": 3},
            "SOLVER.IMS_PER_BATCH must be a multiple of SOLVER.REFERENCE_WORLD_SIZE, 3, got 16",
        ),
        ({"MODEL.RESNETS.RES2_OUT_CHANNELS": 66}, "MODEL.RESNETS.RES2_OUT_CHANNELS must be a multiple of 4, got 66"),
        ({"MODEL.RESNETS.DEPTH": 18}, "MODEL.RESNETS.RES2_OUT_CHANNELS must be 64 at DEPTH 18, got 256"),
        ({"MODEL.RPN.BBOX_REG_WEIGHTS": (1, 1)}, "MODEL.RPN.BBOX_REG_WEIGHTS must be a list of 4"),
    ],
)
def test_wrong_settings_are_named(changes, words):
    with pytest.raises(ValueError) as error:
        load_detection_config(None, [str(part) for pair in changes.items() for part in pair])
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["RESNETS", "FPN", "ROI_MASK_HEAD"])
def test_a_norm_that_does_not_fit_its_place_is_named_with_its_key(config, key):
    cfg = config(**{f"MODEL__{key}__NORM": "GN(num_groups=7)"})
    with pytest.raises(ValueError, match=rf"^MODEL.{key}.NORM 'GN\(num_groups=7\)': .* 7 groups for \d+ channels$"):
        build_model(cfg)


def test_synchronized_batch_norm_that_trains_on_a_cpu(config):
    trainer = DetectionTrainer(config(MODEL__RESNETS__NORM="SyncFBN(t_sigma=inf)", MODEL__DEVICE="cpu"))
    assert any(isinstance(module, SyncFilteredBatchNorm) for module in trainer.model.modules())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"MODEL.ROI_HEADS.NUM_CLASSES": 3}, r"NUM_CLASSES must be 2, .* \(disc, box\), got 3"),
        ({"DATASETS.TRAIN": ()}, "DATASETS.TRAIN must be .*, got "),
        ({"DATASETS.TEST": "nowhere:val"}, "no folder nowhere"),
        ({"MODEL.WEIGHTS": "nowhere.pth"}, "nowhere.pth is not there"),
        ({"MODEL.WEIGHTS": "nowhere.pkl"}, "nowhere.pkl are not there"),
        ({"MODEL.RESNETS.NUM_GROUPS": 32}, "NUM_GROUPS must be 1 at DEPTH 18, got 32"),
        ({"SOLVER.BEST_CHECKPOINT_METRIC": "segm/APP"}, "METRIC must be .* got 'segm/APP'; did you mean 'segm/AP'\\?"),
        ({"SOLVER.BEST_CHECKPOINT_METRIC": "segm/AP", "MODEL.MASK_ON": False}, "METRIC must be .* got 'segm/AP'"),
        ({"SOLVER.BEST_CHECKPOINT_METRIC": "bbox/AP", "DATASETS.TEST": ()}, "DATASETS.TEST is empty, got 'bbox/AP'"),
        ({"MODEL.RESNETS.NORM": "GN(num_groups=7)"}, "must divide"),
    ],
)
def test_wrong_input_is_named_before_anything_is_written(config, tmp_path, changes, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        DetectionTrainer(config(**{key.replace(".", "__"): value for key, value in changes.items()}))
    assert list(tmp_path.iterdir()) == []


def test_sets_of_other_classes_are_refused(config, shapes, tmp_path):
    folder = shutil.copytree(shapes, tmp_path / "set")
    path = folder / "annotations/instances_val.json"
    path.write_text(path.read_text().replace('"disc"', '"ring"'))
    with pytest.raises(ValueError, match=r":train' and '.*:val' have different classes"):
        DetectionTrainer(config(DATASETS__TEST=f"{folder}:val"))


def test_synchronized_batch_norm_needs_gpus_only_where_processes_train(config, monkeypatch):
    cfg = config(MODEL__RESNETS__NORM="SyncBN", MODEL__DEVICE="cpu")
    DetectionTrainer(cfg)  # alone, it is plain batch norm
    monkeypatch.setattr(detection.distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="MODEL.RESNETS.NORM must be .*SyncFBN.* got 'SyncBN'"):
        DetectionTrainer(cfg)


def test_the_batch_is_shared_evenly(config, monkeypatch):
    monkeypatch.setattr(detection.distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"IMS_PER_BATCH must be .* number of processes \(2\), got 3"):
        DetectionTrainer(config(SOLVER__IMS_PER_BATCH=3))


def test_freezing_random_weights_is_remarked(config, caplog, monkeypatch):
    monkeypatch.setattr(detection.logging.getLogger("fbn_plugin"), "propagate", True)
    DetectionTrainer(config(MODEL__BACKBONE__FREEZE_AT=2))
    assert "FREEZE_AT 2 freezes random weights" in caplog.text


def test_a_run_is_not_written_over_and_not_resumed_with_another_model(config):
    cfg = config(SOLVER__MAX_ITER=1)
    DetectionTrainer(cfg).train()
    with pytest.raises(ValueError, match="holds a run; add --resume"):
        DetectionTrainer(cfg)
    with pytest.raises(ValueError, match="MODEL.FPN.OUT_CHANNELS must be 16 as in the run .*, got 8"):
        DetectionTrainer(config(MODEL__FPN__OUT_CHANNELS=8), resume=True)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        DetectionTrainer(config("other"), eval_only=True)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"MODEL.RESNETS.NORM": "FBN"}, "MODEL.RESNETS.NORM must be 'BN' as in the run that OUTPUT_DIR"),
        ({"DATASETS.TEST": ()}, "DATASETS.TEST must be "),
        ({"SEED": 12}, "SEED must be 11 as in .*, got 12"),
        ({"SOLVER.BASE_LR": 0.25}, "SOLVER.BASE_LR must be 0.005 .*, got 0.25"),
        ({"SOLVER.MAX_ITER": 1}, "SOLVER.MAX_ITER must be enough for the 2 iterations .*, got 1"),
    ],
)
def test_a_run_goes_on_as_it_began(config, changes, words):
    cfg = config(SOLVER__MAX_ITER=2, DATALOADER__NUM_WORKERS=0)
    DetectionTrainer(cfg).train()
    with open(f"{cfg.OUTPUT_DIR}/config.yaml") as file:
        before = file.read()
    changed = config(**{"SOLVER__MAX_ITER": 2, **{key.replace(".", "__"): value for key, value in changes.items()}})
    with pytest.raises(ValueError, match=words):
        DetectionTrainer(changed, resume=True)
    with open(f"{cfg.OUTPUT_DIR}/config.yaml") as file:
        assert file.read() == before
    longer = config(SOLVER__MAX_ITER=3, DATALOADER__NUM_WORKERS=1, TEST__EVAL_PERIOD=2, SOLVER__CHECKPOINT_PERIOD=7)
    assert DetectionTrainer(longer, resume=True).start == 2


def test_evaluation_of_a_checkpoint_gives_the_runs_figures(config):
    cfg = config(SOLVER__MAX_ITER=2)
    metrics = DetectionTrainer(cfg).train()
    weights = f"{cfg.OUTPUT_DIR}/model_final.pth"
    for trainer in (
        DetectionTrainer(cfg, resume=True, eval_only=True),
        DetectionTrainer(config("again", MODEL__WEIGHTS=weights), eval_only=True),
    ):
        assert trainer.evaluate() == pytest.approx(metrics, nan_ok=True)


def test_weights_of_a_classification_model_go_into_the_backbone(config, tmp_path, caplog):
    from torchvision.models import resnet18

    source = resnet18()
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    trainer = DetectionTrainer(config(MODEL__WEIGHTS=tmp_path / "resnet18.pth"))
    own = trainer.model.backbone.body.state_dict()
    assert all(torch.equal(own[name], value) for name, value in source.state_dict().items() if name in own)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="has no weight of this model"):
        DetectionTrainer(config("other", MODEL__WEIGHTS=tmp_path / "other.pth"))


@pytest.mark.parametrize("norm", ["BN", "FBN", "FrozenBN", "GN(num_groups=4)", "FGN(num_groups=4)"])
def test_a_backbone_of_detectron2s_goes_under_any_norm_and_says_so(config, tmp_path, norm):
    """By the name that it has there: the block's norms and convolutions, with a head's entry that is of no use."""
    blobs = {"pred_w": np.zeros(3, np.float32)}
    source = build_model(config()).backbone.body.state_dict()
    for name, value in source.items():
        if name.endswith("num_batches_tracked"):
            continue
        value += torch.rand(value.shape)
        *where, conv, entry = name.replace("downsample.", "downsample").split(".")
        last = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}[entry]
        kind = "w" if "conv" in conv or conv == "downsample0" else f"bn_{last}"
        branch = "1" if "downsample" in conv else f"2{'abc'[int(conv[-1]) - 1]}"
        block = f"res{int(where[0][-1]) + 1}_{where[1]}_branch{branch}" if where else ""
        blobs[f"{block}_{kind}" if block else "conv1_w" if kind == "w" else f"res_conv1_{kind}"] = value.numpy()
    (tmp_path / "R-18.pkl").write_bytes(pickle.dumps({"blobs": blobs}))
    cfg = config(MODEL__WEIGHTS=tmp_path / "R-18.pkl", MODEL__RESNETS__NORM=norm, MODEL__BACKBONE__FREEZE_AT=1)
    own = DetectionTrainer(cfg).model.backbone.body.state_dict()
    assert all(torch.equal(value, source[name]) for name, value in own.items() if "num_batches" not in name)
    lines = (Path(cfg.OUTPUT_DIR) / "log.txt").read_text()
    # The stem is frozen, and so are its statistics, unless the norm has none.
    has_none = "GN" in norm
    kinds = {"FrozenBatchNorm2d": 1} if not has_none else {}
    kind = type(build_model(config(MODEL__RESNETS__NORM=norm)).backbone.body.layer1[0].bn1).__name__
    kinds[kind] = 20 - sum(kinds.values()) if kind not in kinds else 20
    listed = ", ".join(f"{counted(count, 'norm')} ({name})" for name, count in kinds.items())
    assert f"scale and shift of {listed} loaded" in lines
    statistics = f"left out: {kind} has none" if has_none else f"running statistics of {listed} loaded"
    assert statistics in lines
    assert f"{'60 of 60' if has_none else '100 of 100'} tensors of the backbone loaded" in lines
    assert "not in the file, so at its initial values: fpn, rpn, roi_heads" in lines
    assert "1 entry of the file not used: pred_w" in lines


def test_the_model_sees_what_detectron2s_would(config):
    image = torch.rand(3, 20, 30)
    mean, std = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]
    for order in ("RGB", "BGR"):
        model = build_model(
            config(INPUT__FORMAT=order, MODEL__PIXEL_MEAN=mean, MODEL__PIXEL_STD=std, INPUT__MIN_SIZE_TEST=0)
        )
        model.eval()
        images, _ = model.transform([image])
        pixels = image * 255 if order == "RGB" else image.flip(0) * 255
        expected = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        assert images.image_sizes == [(20, 30)]
        torch.testing.assert_close(images.tensors[0, :, :20, :30], expected)
    model.transform.min_size, model.transform.max_size = (10,), 12
    assert model.transform([image])[0].image_sizes == [(8, 12)]


@pytest.mark.detectron2
@pytest.mark.parametrize("options", [[], ["MODEL.ROI_BOX_HEAD.NUM_CONV", "1", "MODEL.ROI_BOX_HEAD.NORM", "BN"]])
def test_training_starts_as_in_detectron2(options):
    """Every layer of a detector, from input to output, has weights and biases of the deviation that it has there."""
    model_zoo = pytest.importorskip("detectron2.model_zoo", reason="detectron2 is not installed")
    from detectron2.modeling import build_model as build_theirs

    values = {key: value for key, value in TINY.items() if key.startswith("MODEL.")}
    values |= {"MODEL.FPN.OUT_CHANNELS": 64, "MODEL.ROI_BOX_HEAD.FC_DIM": 256, "MODEL.ROI_MASK_HEAD.CONV_DIM": 64}
    settings = [*(str(part) for pair in values.items() for part in pair), *options]
    cfg = model_zoo.get_config("Base-RCNN-FPN.yaml")
    cfg.merge_from_list(settings)

    # What torchvision's last layers have for the background too.
    same = {(2, 64, 1, 1): (3, 64, 1, 1), (8, 256): (12, 256)}

    def deviations(model):
        found = {}
        for name, value in model.named_parameters():
            kind = "backbone" if name.startswith("backbone") else "rpn" if "rpn" in name else "heads"
            shape = same.get(tuple(value.shape), tuple(value.shape)) if value.dim() > 1 else "vector"
            found.setdefault((kind, shape), []).append(value.std(correction=0).item())
        return {key: sorted(values) for key, values in found.items()}

    torch.manual_seed(0)
    ours, theirs = deviations(build_model(load_detection_config(None, settings))), deviations(build_theirs(cfg))
    assert ours == {key: pytest.approx(values, rel=0.2, abs=1e-6) for key, values in theirs.items()}


def losses_of(model):
    torch.manual_seed(0)
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[:, 10:40, 10:40] = 1
    object_ = {"boxes": torch.tensor([[10.0, 10, 40, 40]]), "labels": torch.tensor([2]), "masks": mask}
    nothing = {name: value[:0] for name, value in object_.items()}
    return {name: loss.item() for name, loss in model.train()(images, [object_, nothing]).items()}


def test_losses_are_torchvisions_with_detectron2s_weights_and_point(config):
    """At torchvision's point, 1/9, its own; the rest follows from that: each weight multiplies, 0 is L1."""
    rpn, box = "MODEL__RPN__", "MODEL__ROI_BOX_HEAD__"
    at_its_point = {f"{rpn}SMOOTH_L1_BETA": 1 / 9, f"{box}SMOOTH_L1_BETA": 1 / 9}
    cfg = config(**at_its_point)
    torch.manual_seed(1)
    model = build_model(cfg)
    weights = model.state_dict()
    ours = losses_of(model)
    model.rpn.__class__, model.roi_heads.__class__ = RegionProposalNetwork, RoIHeads
    assert ours == pytest.approx(losses_of(model), rel=1e-4) and min(ours.values()) > 0

    factors = {f"{rpn}LOSS_WEIGHT": 2, f"{rpn}BBOX_REG_LOSS_WEIGHT": 3, f"{box}BBOX_REG_LOSS_WEIGHT": 5}
    model = build_model(config(**at_its_point, **factors))
    model.load_state_dict(weights)
    expected = {"loss_objectness": 2, "loss_rpn_box_reg": 6, "loss_box_reg": 5}
    weighted = losses_of(model)
    assert weighted == pytest.approx({name: expected.get(name, 1) * value for name, value in ours.items()}, rel=1e-4)

    model = build_model(config())
    model.load_state_dict(weights)
    absolute = losses_of(model)
    for name in ("loss_rpn_box_reg", "loss_box_reg"):  # |x| is above smooth L1, by half the point at most
        assert ours[name] < absolute[name]


def test_norms_reach_their_places(config):
    norms = {
        "RESNETS": "FBN(t_sigma=2.5)",
        "FPN": "GN(num_groups=4)",
        "ROI_BOX_HEAD": "BN",
        "ROI_MASK_HEAD": "FGN(num_groups=8)",
    }
    cfg = config(MODEL__ROI_BOX_HEAD__NUM_CONV=2, **{f"MODEL__{part}__NORM": norm for part, norm in norms.items()})
    model = build_model(cfg)
    parts = (model.backbone.body, model.backbone.fpn, model.roi_heads.box_head, model.roi_heads.mask_head)
    kinds = [
        {repr(m).partition("(")[0] for m in part.modules() if "Norm" in type(m).__name__ and not list(m.children())}
        for part in parts
    ]
    assert kinds == [{"FilteredBatchNorm2d"}, {"GroupNorm"}, {"BatchNorm2d"}, {"FilteredGroupNorm"}]
    assert model.backbone.body.bn1.t_sigma == 2.5


@pytest.mark.parametrize("bias", [{}, {"SOLVER__WEIGHT_DECAY_BIAS": 0.5, "SOLVER__BIAS_LR_FACTOR": 2.0}])
def test_decay_and_rate_of_each_parameter(config, bias):
    cfg = config(SOLVER__WEIGHT_DECAY=0.25, SOLVER__WEIGHT_DECAY_NORM=0.125, SOLVER__BASE_LR=1.0, **bias)
    model = build_model(cfg)
    groups = build_optimizer(cfg, model).param_groups
    given = {parameter: (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}
    assert len(given) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            decay = 0.125 if "Norm" in type(module).__name__ else 0.25
            expected = (2.0, 0.5) if bias and name == "bias" else (1.0, decay)
            assert given[parameter] == expected


def test_a_divisor_makes_the_scale_of_batch_norms_slow(config):
    """Through the schedule, and with the weight decay of the paper."""
    cfg = config(
        SOLVER__SCALE_LR_DIVISOR=50, SOLVER__BASE_LR=0.2, SOLVER__WEIGHT_DECAY=0.25, MODEL__ROI_MASK_HEAD__NORM="LN"
    )
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    scheduler = build_scheduler(cfg, optimizer)
    scales = {module.weight for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
    plain = {
        p for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)) for p in [m.weight]
    }
    assert scales and len(list(model.parameters())) == sum(len(group["params"]) for group in optimizer.param_groups)
    rates = set()
    for _ in range(4):
        base = optimizer.param_groups[0]["lr"]
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert group["lr"] == pytest.approx(base / 50 if parameter in scales else base)
                assert group["weight_decay"] == (0.25 if parameter in plain else 0)
        rates.add(base)
        optimizer.step()
        scheduler.step()
    assert len(rates) > 2


def test_an_input_norm_in_place_of_the_fixed_mean(config):
    options = {"INPUT__NORM_GAMMA_INIT": 0.5, "MODEL__RESNETS__NORM": "ScaledBN(gamma_init=0.5)"}
    trainer = DetectionTrainer(config(**options))
    norm, body = trainer.model.transform.input_norm, trainer.model.backbone.body
    assert torch.allclose(norm.weight, torch.tensor(0.29)) and trainer.model.transform.image_mean == [0.0] * 3
    assert all((m.weight == 0.5).all() for m in body.modules() if isinstance(m, nn.BatchNorm2d))
    metrics = trainer.train()
    assert norm.num_batches_tracked == 6 and not torch.allclose(norm.weight, torch.tensor(0.29))
    again = DetectionTrainer(config(**options), resume=True)
    assert_same_weights(trainer, again)
    assert again.evaluate() == pytest.approx(metrics, nan_ok=True)


def test_frozen_stages_are_not_in_the_optimizer(config):
    cfg = config(MODEL__BACKBONE__FREEZE_AT=2)
    model = build_model(cfg)
    count = sum(len(group["params"]) for group in build_optimizer(cfg, model).param_groups)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert count == len(trained)
    assert not any(
        name.startswith(("backbone.body.conv1", "backbone.body.bn1", "backbone.body.layer1")) for name in trained
    )


def rates(cfg, count):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], cfg.SOLVER.BASE_LR)
    scheduler = build_scheduler(cfg, optimizer)
    for _ in range(count):
        yield optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()


def with_solver(**solver):
    cfg = detection_config()
    cfg.SOLVER.update({"BASE_LR": 0.2, "MAX_ITER": 100, "WARMUP_ITERS": 10, "WARMUP_FACTOR": 0.1, **solver})
    return cfg


def test_multistep_rates():
    got = list(rates(with_solver(STEPS=(40, 80)), 100))
    for it, rate in enumerate(got):
        warmup = 0.1 + 0.9 * it / 10 if it < 10 else 1.0
        assert rate == pytest.approx(0.2 * warmup * 0.1 ** ((it >= 40) + (it >= 80)))


def test_cosine_rates():
    got = list(rates(with_solver(LR_SCHEDULER_NAME="WarmupCosineLR", BASE_LR_END=0.02, WARMUP_ITERS=0), 100))
    for it, rate in enumerate(got):
        assert rate == pytest.approx(0.02 + 0.18 * 0.5 * (1 + math.cos(math.pi * it / 100)))


@pytest.mark.parametrize("iterations, method", itertools.product([0, 1, 100, 1000], ["linear", "constant"]))
def test_any_warmup_length_has_rates(iterations, method):
    got = list(rates(with_solver(WARMUP_ITERS=iterations, WARMUP_METHOD=method), 100))
    assert got[0] == pytest.approx(0.2 * (0.1 if iterations else 1))
    assert len(got) == 100 and all(0 < rate <= 0.2 + 1e-9 for rate in got)
    if method == "constant":
        assert got[min(iterations, 100) - 1] == pytest.approx(0.02 if iterations else 0.2)


@pytest.mark.parametrize("kind, bound", [("value", 0.01), ("norm", 0.01)])
def test_gradients_are_clipped_one_parameter_at_a_time(config, kind, bound):
    changes = {"ENABLED": True, "CLIP_TYPE": kind, "CLIP_VALUE": bound}
    trainer = DetectionTrainer(config(**{f"SOLVER__CLIP_GRADIENTS__{key}": value for key, value in changes.items()}))
    parameters = list(trainer.model.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    trainer._clip_gradients()
    for parameter in parameters:
        size = parameter.grad.abs().max() if kind == "value" else parameter.grad.norm()
        assert size.item() == pytest.approx(bound, rel=0.01)


# What this library adds to detectron2's vocabulary.
OWN_KEYS = {
    "INPUT.NORM_GAMMA_INIT",
    "MEASURE.ACTIVATIONS.LAYERS",
    "MEASURE.ACTIVATIONS.PERIOD",
    "MEASURE.ACTIVATIONS.QUANTILES",
    "NORM_STATS_PERIOD",
    "SOLVER.BEST_CHECKPOINT_METRIC",
    "SOLVER.SCALE_LR_DIVISOR",
    "TEST.EVAL_ITERATIONS",
}


def flat(node, prefix=""):
    for key, value in node.items():
        if hasattr(value, "items"):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@pytest.mark.detectron2
def test_defaults_are_detectron2s():
    """The MODEL section against detectron2's Base-RCNN-FPN.yaml."""
    config = pytest.importorskip("detectron2.config", reason="detectron2 is not installed")
    model_zoo = pytest.importorskip("detectron2.model_zoo", reason="detectron2 is not installed")
    fpn = {key: value for key, value in flat(model_zoo.get_config("Base-RCNN-FPN.yaml")) if key.startswith("MODEL.")}
    theirs = {**dict(flat(config.get_cfg())), **fpn, "MODEL.WEIGHTS": ""}
    ours = {key: value for key, value in flat(detection_config()) if key not in OWN_KEYS}
    assert ours == {key: theirs.get(key) for key in ours}


@pytest.mark.detectron2
def test_every_key_of_detectron2s_is_known(tmp_path, caplog, monkeypatch):
    """A config that detectron2 has written is read: each key is used, has the one value there is, or is named."""
    config = pytest.importorskip("detectron2.config", reason="detectron2 is not installed")
    model_zoo = pytest.importorskip("detectron2.model_zoo", reason="detectron2 is not installed")
    (tmp_path / "dump.yaml").write_text(model_zoo.get_config("Base-RCNN-FPN.yaml").dump())
    with caplog.at_level("WARNING", "fbn_plugin"):
        cfg = load_detection_config(tmp_path / "dump.yaml")
    (line,) = caplog.messages
    known = {key for key, _ in flat(cfg)} | set(line.removeprefix("these keys are not used: ").split(", "))
    # After register() detectron2 has our keys, too.
    assert known - OWN_KEYS == {key for key, _ in flat(config.get_cfg())} - OWN_KEYS


@pytest.mark.parametrize(
    "yaml, sentence",
    {
        "RetinaNet": (
            "MODEL: {META_ARCHITECTURE: RetinaNet, BACKBONE: {NAME: build_retinanet_resnet_fpn_backbone}}",
            "MODEL.META_ARCHITECTURE must be 'GeneralizedRCNN' in this tool, got 'RetinaNet'",
        ),
        "Cascade": (
            "MODEL: {ROI_HEADS: {NAME: CascadeROIHeads}, ROI_BOX_HEAD: {CLS_AGNOSTIC_BBOX_REG: True}}",
            "MODEL.ROI_HEADS.NAME must be 'StandardROIHeads' in this tool, got 'CascadeROIHeads'",
        ),
        "Panoptic": (
            "MODEL: {META_ARCHITECTURE: PanopticFPN, SEM_SEG_HEAD: {LOSS_WEIGHT: 0.5}}",
            "MODEL.META_ARCHITECTURE must be 'GeneralizedRCNN' in this tool, got 'PanopticFPN'",
        ),
        "Keypoint": (
            "MODEL: {KEYPOINT_ON: True, ROI_HEADS: {NUM_CLASSES: 1}}",
            "MODEL.KEYPOINT_ON must be False in this tool, got True",
        ),
        "C4": (
            "MODEL: {ROI_HEADS: {NAME: Res5ROIHeads}, RPN: {POST_NMS_TOPK_TEST: 1000}}",
            "MODEL.ROI_HEADS.NAME must be 'StandardROIHeads' in this tool, got 'Res5ROIHeads'",
        ),
        "DC5": (
            "MODEL: {RESNETS: {OUT_FEATURES: [res5], RES5_DILATION: 2}}",
            "MODEL.RESNETS.OUT_FEATURES must be ['res2', 'res3', 'res4', 'res5'] in this tool, got ['res5']",
        ),
        "deformable": (
            "MODEL: {RESNETS: {DEFORM_ON_PER_STAGE: [False, True, True, True], DEFORM_MODULATED: False}}",
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE must be [False, False, False, False] in this tool, got [False, True,",
        ),
        "rotated": (
            "MODEL: {PROPOSAL_GENERATOR: {NAME: RRPN}, RPN: {BBOX_REG_WEIGHTS: [1, 1, 1, 1, 1]}}",
            "MODEL.PROPOSAL_GENERATOR.NAME must be 'RPN' in this tool, got 'RRPN'",
        ),
        "proposals": (
            "MODEL: {LOAD_PROPOSALS: True}\nDATASETS: {PROPOSAL_FILES_TRAIN: [a.pkl]}",
            "MODEL.LOAD_PROPOSALS must be False in this tool, got True",
        ),
        "generalized IoU": (
            "MODEL: {ROI_BOX_HEAD: {BBOX_REG_LOSS_TYPE: giou}}",
            "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE must be 'smooth_l1' in this tool, got 'giou'",
        ),
        "test-time augmentation": (
            "TEST: {AUG: {ENABLED: True, MIN_SIZES: [400]}}",
            "TEST.AUG.ENABLED must be False in this tool; tools/train_net.py has test-time augmentation, got True",
        ),
        "cropping": (
            "INPUT: {CROP: {ENABLED: True, SIZE: [0.5, 0.5]}}",
            "INPUT.CROP.ENABLED must be False in this tool, got True",
        ),
        "random subsets": (
            "DATALOADER: {SAMPLER_TRAIN: RandomSubsetTrainingSampler, RANDOM_SUBSET_RATIO: 0.5}",
            "DATALOADER.SAMPLER_TRAIN must be one of 'TrainingSampler', 'RepeatFactorTrainingSampler', got 'RandomSub",
        ),
        "another project": ("MODEL: {TRIDENT: {NUM_BRANCH: 3}}", "unknown config key 'MODEL.TRIDENT.NUM_BRANCH'"),
    }.values(),
)
def test_configs_of_detectron2s_other_models_are_refused(tmp_path, yaml, sentence):
    (tmp_path / "other.yaml").write_text(yaml)
    with pytest.raises(ValueError) as error:
        load_detection_config(tmp_path / "other.yaml")
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/COCO-InstanceSegmentation").glob("mask*.yaml")), ids=lambda p: p.stem
)
def test_configs_for_coco_build_the_network_that_they_name(path):
    cfg = load_detection_config(path)
    with torch.device("meta"):
        model = build_model(cfg)
    block = model.backbone.body.layer2[0]
    strides = ((2, 2), (1, 1)) if cfg.MODEL.RESNETS.STRIDE_IN_1X1 else ((1, 1), (2, 2))
    assert (block.conv1.stride, block.conv2.stride) == strides
    assert block.conv2.groups == cfg.MODEL.RESNETS.NUM_GROUPS


def test_evaluations_after_chosen_iterations(config):
    cfg = config(SOLVER__MAX_ITER=4, TEST__EVAL_ITERATIONS=(1, 3))
    DetectionTrainer(cfg).train()
    assert [row["iteration"] + 1 for row in metrics_of(cfg) if "bbox/AP" in row] == [1, 3, 4]
    saved = load_detection_config(f"{cfg.OUTPUT_DIR}/config.yaml")
    assert saved.TEST.EVAL_ITERATIONS == (1, 3) and saved == cfg


def test_precise_statistics_are_those_of_the_checkpoint_and_survive_an_interruption(config):
    """Without changing what is trained: the batches and random states of training stay as they are."""
    options = {"MODEL__RESNETS__NORM": "FBN(t_sigma=3.0)", "SOLVER__MAX_ITER": 4, "TEST__EVAL_PERIOD": 2}
    options |= {"SOLVER__CHECKPOINT_PERIOD": 2, "MODEL__ROI_MASK_HEAD__NORM": "FBN"}
    precise = {"TEST__PRECISE_BN__ENABLED": True, "TEST__PRECISE_BN__NUM_ITER": 2}
    whole = DetectionTrainer(config("whole", **options, **precise))
    expected = whole.train()
    plain = DetectionTrainer(config("plain", **options))
    plain.train()
    own, others = dict(whole.model.named_parameters()), dict(plain.model.named_parameters())
    assert [name for name in own if not torch.equal(own[name], others[name])] == []
    name = "backbone.body.layer2.0.bn1.running_mean"
    assert not torch.equal(whole.model.state_dict()[name], plain.model.state_dict()[name])

    stopped = DetectionTrainer(config("stopped", **options, **precise))
    interrupt(stopped, 3)
    with pytest.raises(Interrupt):
        stopped.train()
    resumed = DetectionTrainer(config("stopped", **options, **precise), resume=True)
    assert resumed.start == 2 and resumed.train() == pytest.approx(expected, nan_ok=True)
    assert_same_weights(whole, resumed)
    again = DetectionTrainer(
        config("again", MODEL__WEIGHTS=f"{whole.cfg.OUTPUT_DIR}/model_final.pth", **options), False, True
    )
    assert again.evaluate() == pytest.approx(expected, nan_ok=True)


def test_an_evaluation_that_is_wanted_only_when_a_run_goes_on_has_precise_statistics_too(config):
    options = {"SOLVER__MAX_ITER": 3, "SOLVER__CHECKPOINT_PERIOD": 2}
    options |= {"TEST__PRECISE_BN__ENABLED": True, "TEST__PRECISE_BN__NUM_ITER": 2}
    whole = DetectionTrainer(config("whole", **options, TEST__EVAL_ITERATIONS=(2,)))
    whole.train()
    stopped = DetectionTrainer(config("stopped", **options))
    interrupt(stopped, 2)
    with pytest.raises(Interrupt):
        stopped.train()
    resumed = DetectionTrainer(config("stopped", **options, TEST__EVAL_ITERATIONS=(2,)), resume=True)
    seen = []
    evaluate = resumed.evaluate
    resumed.evaluate = lambda: seen.append(copy.deepcopy(resumed.model.state_dict())) or evaluate()
    resumed.train()
    assert len(seen) == 2
    saved = torch.load(f"{whole.cfg.OUTPUT_DIR}/model_0000001.pth", weights_only=True)["model"]
    assert [name for name in saved if not torch.equal(saved[name], seen[0][name])] == []
    assert_same_weights(whole, resumed)


def test_precise_statistics_see_training_images_and_want_running_statistics(config, monkeypatch):
    precise = {"TEST__PRECISE_BN__ENABLED": True, "TEST__PRECISE_BN__NUM_ITER": 1, "INPUT__MIN_SIZE_TRAIN": 24}
    trainer = DetectionTrainer(config(**precise))
    seen = []
    trainer.model.backbone.body.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2:]))
    trainer.model.train()
    trainer.iteration = 0
    trainer._refresh_statistics()
    assert len(seen) == 1 and max(seen[0]) < 64  # 24 pixels and padding; MIN_SIZE_TEST would be 64
    assert trainer.model.training and trainer.model.transform.training
    without = DetectionTrainer(config("other", MODEL__RESNETS__NORM="GN(num_groups=4)", **precise))
    without.iteration = 0
    monkeypatch.setattr(population, "update_population_stats", pytest.fail)
    without._refresh_statistics()


def test_the_best_checkpoint_is_kept_over_an_interruption(config, monkeypatch):
    values = iter([5.0, 7.0, 6.0, math.nan])

    def evaluate(trainer):
        return {"bbox/AP": next(values)}

    monkeypatch.setattr(DetectionTrainer, "evaluate", evaluate)
    options = {"SOLVER__BEST_CHECKPOINT_METRIC": "bbox/AP", "TEST__EVAL_PERIOD": 1, "SOLVER__MAX_ITER": 4}
    options["SOLVER__CHECKPOINT_PERIOD"] = 1
    cfg = config(**options)
    stopped = DetectionTrainer(cfg)
    interrupt(stopped, 2)
    with pytest.raises(Interrupt):
        stopped.train()
    best = torch.load(f"{cfg.OUTPUT_DIR}/model_best.pth", weights_only=True)
    assert (best["iteration"], best["metric"], best["value"]) == (1, "bbox/AP", 7.0)
    DetectionTrainer(cfg, resume=True).train()
    assert torch.load(f"{cfg.OUTPUT_DIR}/model_best.pth", weights_only=True)["iteration"] == 1
    second = torch.load(f"{cfg.OUTPUT_DIR}/model_0000001.pth", weights_only=True)["model"]
    assert all(torch.equal(best["model"][name], second[name]) for name in second)


def test_shares_of_filtered_values_and_activations_are_logged(config):
    options = {"SOLVER__MAX_ITER": 4, "MODEL__RESNETS__NORM": "FBN(t_sigma=2.0)"}
    layers = ("backbone.body.layer1.0.bn1", "roi_heads.box_head.fc7[3]")
    activations = {"MEASURE__ACTIVATIONS__PERIOD": 3, "MEASURE__ACTIVATIONS__LAYERS": layers}
    measured = DetectionTrainer(config("measured", NORM_STATS_PERIOD=2, **activations, **options), log_period=4)
    measured.train()
    (found,) = [row for row in metrics_of(measured.cfg) if f"activations/{layers[0]}/q50" in row]
    assert found["iteration"] == 2 and found[f"activations/{layers[0]}/q100"] > 2
    assert found[f"activations/{layers[1]}/q0"] <= found[f"activations/{layers[1]}/q75"]
    rows = [row for row in metrics_of(measured.cfg) if "filtered/mean" in row]
    assert [row["iteration"] for row in rows] == [1, 3]
    assert {"filtered/backbone.body.bn1", "filtered/backbone.body.layer4.1.bn2"} < rows[0].keys()
    assert all(0 < value < 0.25 for key, value in rows[0].items() if key != "iteration")  # Chebyshev's bound at 2
    with pytest.raises(ValueError, match="LAYERS: the model has no layer 'bn1'; did you mean 'backbone.body.bn1'"):
        DetectionTrainer(config("none", MEASURE__ACTIVATIONS__LAYERS=("bn1",), **options))
    plain = DetectionTrainer(config("plain", **options))
    plain.train()
    assert_same_weights(measured, plain)
    # the last row is an evaluation, and what was measured is none
    assert not any(key.startswith("filtered/") for key in recorded_evaluation(measured.cfg.OUTPUT_DIR, 4))


def test_a_run_says_what_it_was_made_with(config, shapes):
    cfg = config(SOLVER__MAX_ITER=1)
    DetectionTrainer(cfg).train()
    info = read_run_info(cfg.OUTPUT_DIR)
    assert info["engine"] == "torchvision" and info["processes"] == 1 and info["images_per_batch"] == 2
    assert info["train_images"] == {f"{shapes}:train": 8} and info["test_images"] == {f"{shapes}:val": 4}


def test_images_of_rare_categories_are_repeated(config):
    """As often as their factors say, and in the same batches after an interruption."""
    options = {"DATALOADER__SAMPLER_TRAIN": "RepeatFactorTrainingSampler", "DATALOADER__REPEAT_THRESHOLD": 1.0}
    trainer = DetectionTrainer(config(**options))
    factors = repeat_factors(trainer.data._images.categories, 1.0)
    ids = [[target["image_id"] for target in batch[1]] for batch in islice(trainer.data.loader(0, 0), 100)]
    assert ids[90:] == [[target["image_id"] for target in batch[1]] for batch in islice(trainer.data.loader(0, 90), 10)]
    seen = np.bincount(np.concatenate(ids), minlength=len(factors))[: len(factors)]
    assert seen / seen.sum() == pytest.approx(factors / factors.sum(), abs=0.05) and factors.max() > 1


def test_a_scaled_run_is_resumed_on_as_many_processes(config, monkeypatch):
    options = {"SOLVER__REFERENCE_WORLD_SIZE": 2, "SOLVER__IMS_PER_BATCH": 4, "SOLVER__MAX_ITER": 1}
    trainer = DetectionTrainer(config(**options))
    assert (trainer.cfg.SOLVER.IMS_PER_BATCH, trainer.cfg.SOLVER.MAX_ITER) == (2, 2)
    trainer.train()
    assert DetectionTrainer(config(**options), resume=True).start == 2
    monkeypatch.setattr(detection.distributed, "world_size", lambda: 2)
    with pytest.raises(
        ValueError, match=r"run that OUTPUT_DIR .* holds was made by 1 process, got 2: resume it with as many"
    ):
        DetectionTrainer(config(**options), resume=True)
