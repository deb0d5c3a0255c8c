"""Optimizers' arguments, schedules, and a rate that follows evaluations through an interruption."""

from pathlib import Path

import pytest
import torch
from timm.optim import get_optimizer_class
from torch import nn

from fbn_plugin.engine.classification import model as model_module
from fbn_plugin.engine.classification.config import check_config, classification_config
from fbn_plugin.engine.classification.optimization import PlateauSchedule, build_optimizer, build_scheduler
from fbn_plugin.engine.classification.trainer import ClassificationTrainer
from fbn_plugin.engine.run.checkpoint import load_file
from fbn_plugin.engine.run.config import load_config

CONFIGS = Path(__file__).parents[3] / "configs"


def settings(*overrides: str, **solver):
    cfg = load_config(classification_config(), overrides=overrides)
    cfg.defrost()
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    return cfg


def config(output_dir, **overrides):
    """A run on handwritten digits of 8 pixels."""
    values = {"OUTPUT_DIR": output_dir, "INPUT.SIZE": 8, "INPUT.PADDING": 1, "SOLVER.IMS_PER_BATCH": 700}
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    flat = [str(part) for pair in values.items() for part in pair]
    return load_config(classification_config(), CONFIGS / "Digits/test_resnet_FBN.yaml", flat)


def linear_model():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def model():
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def rates(iterations: int, iters_per_epoch: int = 4, **solver) -> list[float]:
    cfg = settings(BASE_LR=0.8, **solver)
    check_config(cfg)
    optimizer = build_optimizer(cfg, model())
    scheduler, seen = build_scheduler(cfg, optimizer, iters_per_epoch), []
    for iteration in range(iterations):
        scheduler.step_update(iteration)
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


# --- arguments of the optimizer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rmsprop", "rmsproptf"])
def test_the_decay_of_rmsprop(name):
    cfg = settings("SOLVER.OPTIMIZER", name, "SOLVER.OPT_ARGS.alpha", "0.999", "SOLVER.OPT_ARGS.eps", "1e-3")
    check_config(cfg)
    optimizer = build_optimizer(cfg, model())
    assert isinstance(optimizer, get_optimizer_class(name, bind_defaults=False))
    assert {(g["alpha"], g["eps"], g["momentum"]) for g in optimizer.param_groups} == {(0.999, 1e-3, 0.9)}


def test_arguments_of_other_kinds():
    cfg = settings("SOLVER.OPTIMIZER", "adamw", "SOLVER.OPT_ARGS", "{'betas': [0.9, 0.98], 'amsgrad': True}")
    check_config(cfg)
    assert build_optimizer(cfg, model()).defaults["betas"] == (0.9, 0.98)
    cfg = settings("SOLVER.OPTIMIZER", "sgd", "SOLVER.OPT_ARGS.nesterov", "False")
    check_config(cfg)
    assert build_optimizer(cfg, model()).defaults["nesterov"] is False


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("OPT_ARGS.decay", "0.9"), "must be arguments of rmsprop, got 'decay': accepted are alpha, eps, centered, "),
        (("OPT_ARGS.alpha", "high"), "OPT_ARGS.alpha must be a value such as 0.99, got 'high'"),
        (("OPT_ARGS.centered", "1"), "OPT_ARGS.centered must be a value such as False, got 1"),
        (("OPT_ARGS.momentum", "0.5"), "must be without momentum, for which there is SOLVER.MOMENTUM"),
        (("OPTIMIZER", "adamw", "SOLVER.OPT_ARGS.betas", "[0.9]"), r"betas must be a value such as \(0.9, 0.999\)"),
    ],
)
def test_arguments_that_it_does_not_take(overrides, sentence):
    with pytest.raises(ValueError, match=f"^SOLVER.*{sentence}"):
        check_config(settings("SOLVER.OPTIMIZER", "rmsprop", f"SOLVER.{overrides[0]}", *overrides[1:]))


def test_a_value_out_of_the_optimizers_range():
    cfg = settings("SOLVER.OPTIMIZER", "rmsprop", "SOLVER.OPT_ARGS.alpha", "-1.0")
    check_config(cfg)
    with pytest.raises(ValueError, match=r"^SOLVER.OPT_ARGS must be what rmsprop takes \(.+\), got {'alpha': -1.0}$"):
        build_optimizer(cfg, model())


# --- schedules -------------------------------------------------------------------------------------------------------


def test_step_and_exponential():
    step = rates(12, LR_SCHEDULER_NAME="step", GAMMA=0.5, DECAY_EPOCHS=1.5)
    assert step == pytest.approx([0.8] * 6 + [0.4] * 6)
    even = rates(12, LR_SCHEDULER_NAME="exponential", GAMMA=0.5, DECAY_EPOCHS=1.5)
    assert even == pytest.approx([0.8 * 0.5 ** (i / 6) for i in range(12)])


@pytest.mark.parametrize("name", ["cosine", "poly", "tanh", "constant"])
def test_rates_follow_from_the_iteration_alone(name):
    """Wherever a run goes on, with whatever groups and shares."""
    cfg = settings(LR_SCHEDULER_NAME=name, MAX_EPOCH=15, WARMUP_EPOCHS=2, LAYER_DECAY=0.7)
    optimizer = build_optimizer(cfg, model())
    scheduler = build_scheduler(cfg, optimizer, 10)
    timms = build_scheduler(cfg, (alone := build_optimizer(cfg, model())), 10)._timm
    for iteration in (0, 1, 2, 19, 20, 63, 64, 65, 130, 149, 70, 71):
        optimizer.load_state_dict(optimizer.state_dict())  # which makes new groups
        scheduler.step_update(iteration), timms.step_update(iteration)
        assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in alone.param_groups]


def test_warm_up_in_front_and_cooldown():
    how = {"MAX_EPOCH": 5, "WARMUP_EPOCHS": 1, "WARMUP_FACTOR": 0.5, "MIN_LR": 0.1}
    seen = rates(20, WARMUP_PREFIX=True, COOLDOWN_EPOCHS=2, **how)
    assert seen[:4] == pytest.approx([0.4, 0.5, 0.6, 0.7])
    assert seen[4] == pytest.approx(0.8)  # the whole schedule is behind the warm-up
    assert seen[11] > 0.1 and seen[12:] == pytest.approx([0.1] * 8)
    assert rates(20, **how)[4] < 0.8


@pytest.mark.parametrize("metric", ["top1", "loss"])
def test_plateau(metric):
    how = {"PLATEAU_METRIC": metric, "PLATEAU_PATIENCE": 1, "GAMMA": 0.5, "MIN_LR": 0.3, "SCALE_LR_DIVISOR": 2.0}
    cfg = settings(BASE_LR=0.8, LR_SCHEDULER_NAME="plateau", WARMUP_EPOCHS=1, WARMUP_FACTOR=0.5, **how)
    check_config(cfg)
    optimizer = build_optimizer(cfg, model())
    scheduler, seen = build_scheduler(cfg, optimizer, 2), []
    values = [5, 4, 3, 2, 1, 6, 6, 6, 6, 6]  # the first is of the warm-up
    values = [20 - value for value in values] if metric == "loss" else values
    for iteration in range(20):
        scheduler.step_update(iteration)
        seen.append(optimizer.param_groups[0]["lr"])
        if iteration % 2:
            for _ in range(2):  # once
                scheduler.evaluated(iteration + 1, {metric: values[iteration // 2]})
    assert seen == pytest.approx([0.4, 0.6] + [0.8] * 6 + [0.4] * 8 + [0.3] * 4)
    slow = [group["lr"] / group["lr_scale"] for group in optimizer.param_groups]
    assert slow == pytest.approx([0.3] * 3) and optimizer.param_groups[-1]["lr_scale"] == 0.5


def test_a_state_of_plateau_that_is_none():
    scheduler = build_scheduler(settings(LR_SCHEDULER_NAME="plateau"), build_optimizer(settings(), model()), 2)
    assert isinstance(scheduler, PlateauSchedule)
    state = scheduler.state_dict()
    scheduler.check_state_dict(state)
    for wrong in ({}, None, {**state, "best": "x"}, {**state, "num_bad_epochs": -1}):
        with pytest.raises(ValueError, match="must be|has no"):
            scheduler.check_state_dict(wrong)


@pytest.mark.parametrize(
    ("solver", "sentence"),
    [
        ({"LR_SCHEDULER_NAME": "plateau", "GAMMA": 2.0}, "SOLVER.GAMMA must be above 0 and below 1"),
        ({"LR_SCHEDULER_NAME": "plateau", "PLATEAU_METRIC": "ap"}, "SOLVER.PLATEAU_METRIC must be one of 'top1'"),
        (
            {"LR_SCHEDULER_NAME": "step", "COOLDOWN_EPOCHS": 1},
            "COOLDOWN_EPOCHS must be 0 but for LR_SCHEDULER_NAME cos",
        ),
        (
            {"MAX_EPOCH": 4, "WARMUP_EPOCHS": 2, "COOLDOWN_EPOCHS": 2},
            "COOLDOWN_EPOCHS must be from 0 to less than .* 2",
        ),
        ({"DECAY_EPOCHS": 0.0}, "SOLVER.DECAY_EPOCHS must be from 1e-06"),
        ({"LAYER_DECAY": 1.5}, "SOLVER.LAYER_DECAY must be 0, or above 0, and 1 or less, got 1.5"),
    ],
)
def test_schedules_that_are_refused(solver, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_config(settings(**solver))


def test_plateau_wants_evaluations_and_a_metric_of_the_data(tmp_path):
    cfg = config(tmp_path, SOLVER__LR_SCHEDULER_NAME="plateau", TEST__EVAL_PERIOD=0)
    with pytest.raises(ValueError, match="TEST.EVAL_PERIOD must be 1 or more"):
        ClassificationTrainer(cfg)


def test_a_plateau_goes_on_where_it_was(tmp_path, monkeypatch):
    """Bit for bit: after a stop behind an evaluation, in one, and with one that is made up for."""
    measured: dict[int, float] = {}  # the same for the same weights, and never better

    def measure(self):
        return {
            "top1": measured.setdefault(hash(tuple(self.model[1].bias.tolist())), 100.0 - len(measured)),
            "loss": 1.0,
        }

    monkeypatch.setattr(ClassificationTrainer, "evaluate", measure)
    monkeypatch.setattr(model_module, "_timm_model", lambda *args, **kwargs: linear_model())
    how = {"SOLVER__LR_SCHEDULER_NAME": "plateau", "SOLVER__PLATEAU_PATIENCE": 0, "SOLVER__GAMMA": 0.5}
    how |= {"MODEL__NORM": "", "SOLVER__MAX_EPOCH": 5, "SOLVER__WARMUP_EPOCHS": 1, "DATALOADER__NUM_WORKERS": 0}
    ClassificationTrainer(config(tmp_path / "whole", **how)).train()
    for last in (3, 6):  # of 2 iterations an epoch
        ClassificationTrainer(config(tmp_path / "parts", **how, SOLVER__MAX_ITER=last), resume=last > 3).train()
    rows = (tmp_path / "parts/metrics.json").read_text().splitlines(keepends=True)
    (tmp_path / "parts/metrics.json").write_text("".join(rows[:-1]))  # as if stopped in the evaluation
    state = torch.load(tmp_path / "parts/model_final.pth", weights_only=True)
    assert state["scheduler"]["evaluated"] == 6 and "val/top1" in rows[-1]
    ClassificationTrainer(config(tmp_path / "parts", **how), resume=True).train()
    whole, parts = (load_file(tmp_path / name / "model_final.pth") for name in ("whole", "parts"))
    assert whole["scheduler"] == parts["scheduler"] and whole["scheduler"]["last_epoch"] == 4
    one, other = (checkpoint["optimizer"]["param_groups"] for checkpoint in (whole, parts))
    assert one == other and one[0]["lr"] == 0.125 * config("").SOLVER.BASE_LR
    assert whole["model"].keys() == parts["model"].keys()
    assert all(torch.equal(value, parts["model"][name]) for name, value in whole["model"].items())
