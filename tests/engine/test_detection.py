"""The detection engine: configs are checked, detectron2's solver rules hold, and interruptions leave no trace."""

import itertools
import json
import math

import pytest
import torch
from torch import nn

from fbn_plugin import SyncFilteredBatchNorm
from fbn_plugin.engine import detection
from fbn_plugin.engine.cli import UserError
from fbn_plugin.engine.config import CfgNode
from fbn_plugin.engine.detection import (
    DetectionTrainer,
    build_model,
    build_optimizer,
    build_scheduler,
    detection_config,
    load_detection_config,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {
    "MODEL.DEVICE": "cpu",
    "MODEL.MASK_ON": True,
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.DEPTH": 18,
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
    return [{k: v for k, v in row.items() if k not in ("time", "data_time", "eta_seconds")} for row in rows]


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
    import shutil

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
    cfg = config(SOLVER__MAX_ITER=2, MODEL__MASK_ON=False, SOLVER__AMP__ENABLED=True)
    metrics = DetectionTrainer(cfg).train()
    assert not any(name.startswith("segm/") for name in metrics)
    assert "loss_mask" not in metrics_of(cfg)[0]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"MODEL.RESNETS.NORM": "FBM"}, "MODEL.RESNETS.NORM: unknown norm 'FBM' (did you mean 'FBN'?)"),
        ({"MODEL.FPN.NORM": "FBN(t_sigma=0.5)"}, "MODEL.FPN.NORM: "),
        ({"MODEL.RESNETS.DEPTH": 20}, "MODEL.RESNETS.DEPTH must be one of 18, 34, 50, 101, 152, not 20"),
        ({"MODEL.META_ARCHITECTURE": "RetinaNet"}, "MODEL.META_ARCHITECTURE must be 'GeneralizedRCNN'"),
        ({"MODEL.BACKBONE.FREEZE_AT": 6}, "MODEL.BACKBONE.FREEZE_AT"),
        ({"MODEL.PIXEL_STD": [1.0]}, "MODEL.PIXEL_STD must be a list of 3"),
        (
            {"INPUT.RANDOM_FLIP": "both"},
            "INPUT.RANDOM_FLIP must be one of 'horizontal', 'vertical', 'none', not 'both'",
        ),
        ({"INPUT.MIN_SIZE_TRAIN": ()}, "INPUT.MIN_SIZE_TRAIN"),
        ({"SOLVER.LR_SCHEDULER_NAME": "Step"}, "WarmupMultiStepLR"),
        ({"SOLVER.STEPS": (5, 4)}, "SOLVER.STEPS must be increasing"),
        ({"SOLVER.MAX_ITER": 0}, "SOLVER.MAX_ITER must be above 0"),
        ({"TEST.EVAL_PERIOD": -1}, "TEST.EVAL_PERIOD must be 0 or more"),
        ({"MODEL.RPN.CONV_DIMS": [64]}, "MODEL.RPN.CONV_DIMS"),
        ({"MODEL.DEVICE": "gpu"}, "MODEL.DEVICE must be 'cuda', 'cuda:0' and the like, or 'cpu', not 'gpu'"),
        ({"MODEL.DEVICE": "mps"}, "MODEL.DEVICE"),
        ({"MODEL.PIXEL_STD": [1.0, 0.0, 1.0]}, "MODEL.PIXEL_STD must be above 0 for each channel"),
        ({"MODEL.RPN.IOU_THRESHOLDS": [0.7, 0.3]}, "MODEL.RPN.IOU_THRESHOLDS must be increasing from 0 to 1"),
        ({"MODEL.ROI_HEADS.IOU_THRESHOLDS": [1.5]}, "MODEL.ROI_HEADS.IOU_THRESHOLDS"),
        ({"MODEL.RPN.NMS_THRESH": 1.5}, "MODEL.RPN.NMS_THRESH must be from 0 to 1, not 1.5"),
        ({"MODEL.RPN.POST_NMS_TOPK_TRAIN": 0}, "MODEL.RPN.POST_NMS_TOPK_TRAIN must be above 0"),
        ({"MODEL.ROI_BOX_HEAD.NUM_FC": -1}, "MODEL.ROI_BOX_HEAD.NUM_FC must be 0 or more"),
        ({"MODEL.RESNETS.WIDTH_PER_GROUP": 0}, "MODEL.RESNETS.WIDTH_PER_GROUP must be above 0"),
        ({"SOLVER.WEIGHT_DECAY": -1}, "SOLVER.WEIGHT_DECAY must be 0 or more"),
        ({"SOLVER.WEIGHT_DECAY_BIAS": "much"}, "SOLVER.WEIGHT_DECAY_BIAS must be None, or a number"),
        ({"SOLVER.SCALE_LR_DIVISOR": -1}, "SOLVER.SCALE_LR_DIVISOR must be 0 or more, not -1"),
        (
            {"SOLVER.SCALE_LR_DIVISOR": 100, "SOLVER.WEIGHT_DECAY_NORM": 0.1},
            "SOLVER.WEIGHT_DECAY_NORM must be 0 with SCALE_LR_DIVISOR",
        ),
        ({"SOLVER.SCALE_LR_DIVISOR": 1, "SOLVER.BIAS_LR_FACTOR": 2}, "SOLVER.BIAS_LR_FACTOR must be 1 with"),
        ({"INPUT.NORM_GAMMA_INIT": 1.5}, "INPUT.NORM_GAMMA_INIT must be from 0 to 1, not 1.5"),
        ({"SOLVER.WARMUP_FACTOR": 2}, "SOLVER.WARMUP_FACTOR must be from 0 to 1"),
        ({"SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0}, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE must be above 0"),
        ({"SEED": 2**63}, "SEED must be below 2**63"),
        ({"TEST.PRECISE_BN.ENABLED": True}, "TEST.PRECISE_BN.ENABLED must be False"),
    ],
)
def test_wrong_settings_are_named(changes, words):
    with pytest.raises(ValueError) as error:
        load_detection_config(None, [str(part) for pair in changes.items() for part in pair])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_synchronized_batch_norm_that_trains_on_a_cpu(config):
    trainer = DetectionTrainer(config(MODEL__RESNETS__NORM="SyncFBN(t_sigma=inf)", MODEL__DEVICE="cpu"))
    assert any(isinstance(module, SyncFilteredBatchNorm) for module in trainer.model.modules())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"MODEL.ROI_HEADS.NUM_CLASSES": 3}, "NUM_CLASSES is 3, but dataset .* has 2: disc, box"),
        ({"DATASETS.TRAIN": ()}, "DATASETS.TRAIN is empty"),
        ({"DATASETS.TEST": "nowhere:val"}, "no folder nowhere"),
        ({"MODEL.WEIGHTS": "nowhere.pth"}, "nowhere.pth is not there"),
        ({"MODEL.WEIGHTS": "detectron2://ImageNetPretrained/MSRA/R-50.pkl"}, "is detectron2's"),
        ({"MODEL.RESNETS.NUM_GROUPS": 32}, "must be 1 and 64 at DEPTH 18"),
        ({"MODEL.RESNETS.NORM": "SyncBN"}, "SyncBN runs on GPUs only"),
        ({"MODEL.RESNETS.NORM": "GN(num_groups=7)"}, "divisible"),
    ],
)
def test_wrong_input_is_named_before_anything_is_written(config, tmp_path, changes, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        DetectionTrainer(config(**{key.replace(".", "__"): value for key, value in changes.items()}))
    assert list(tmp_path.iterdir()) == []


def test_the_batch_is_shared_evenly(config, monkeypatch):
    monkeypatch.setattr(detection.distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="IMS_PER_BATCH 3 must be a multiple of the number of processes, 2"):
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
    with pytest.raises(ValueError, match="MODEL.FPN.OUT_CHANNELS is 16 in the run that OUTPUT_DIR .* holds, not 8"):
        DetectionTrainer(config(MODEL__FPN__OUT_CHANNELS=8), resume=True)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        DetectionTrainer(config("other"), eval_only=True)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"MODEL.RESNETS.NORM": "FBN"}, "MODEL.RESNETS.NORM is 'BN' in the run that OUTPUT_DIR"),
        ({"DATASETS.TEST": ()}, "DATASETS.TEST is "),
        ({"SEED": 12}, "SEED is 11 in "),
        ({"SOLVER.BASE_LR": 0.25}, "SOLVER.BASE_LR is 0.005 in .*, not 0.25"),
        ({"SOLVER.MAX_ITER": 1}, "SOLVER.MAX_ITER 1 is too few: .* has 2 iterations"),
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
    with pytest.raises(ValueError, match="has no entry of this model"):
        DetectionTrainer(config("other", MODEL__WEIGHTS=tmp_path / "other.pth"))


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


def test_defaults_are_detectron2s():
    """Where detectron2 is installed, against its own; the MODEL section against its Base-RCNN-FPN.yaml."""
    config = pytest.importorskip("detectron2.config", reason="needs detectron2")
    model_zoo = pytest.importorskip("detectron2.model_zoo", reason="needs detectron2")
    theirs = config.get_cfg()
    fpn = model_zoo.get_config("Base-RCNN-FPN.yaml")
    theirs.MODEL = fpn.MODEL
    theirs.MODEL.WEIGHTS = ""

    def compare(ours, theirs, path):
        for key, value in ours.items():
            if isinstance(value, CfgNode):
                compare(value, theirs[key], (*path, key))
            else:
                assert value == theirs[key], ".".join((*path, key))

    compare(detection_config(), theirs, ())
