"""The optimizer's groups: by type and not by name or shape, every parameter once, and a ratio that schedules keep."""

import copy
import functools
import math

import pytest
import timm
import torch
from fvcore.common.param_scheduler import CosineParamScheduler
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

import fbn_plugin
from fbn_plugin import get_norm, param_groups
from fbn_plugin.frameworks.timm import param_groups as timm_param_groups
from fbn_plugin.layers.description import NormDescription, describe_class

LR, DECAY, DIVISOR = 0.4, 1e-3, 50.0


def settings(groups) -> dict[nn.Parameter, tuple[float, float]]:
    """Rate and decay of each parameter."""
    return {p: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def in_group(model, scale=(), no_decay=()) -> dict:
    """What is expected of a model's parameters, by full name."""
    given = settings(param_groups(model, LR, DECAY, DIVISOR))
    names = {name: given[p] for name, p in model.named_parameters()}
    assert {name for name, (lr, _) in names.items() if lr == LR / DIVISOR} == set(scale)
    assert {name for name, value in names.items() if value == (LR, 0.0)} == set(no_decay)
    assert all(value in ((LR, DECAY), (LR, 0.0), (LR / DIVISOR, 0.0)) for value in names.values())
    return given


@pytest.mark.parametrize("spec", ["BN", "SyncBN", "FBN", "FBN(t_sigma=3)", "SyncFBN"])
def test_the_scale_of_a_batch_norm_is_slow_and_its_shift_is_not(spec):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), get_norm(spec, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    in_group(model, scale=["1.weight"], no_decay=["0.bias", "1.bias", "4.bias"])


@pytest.mark.parametrize("spec", ["GN(num_groups=2)", "LN", "IN", "FGN(num_groups=2)", "FLN", "FIN"])
def test_other_norms_do_not_decay_and_are_not_slow(spec):
    in_group(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), get_norm(spec, 8)), no_decay=["1.weight", "1.bias"])


def test_types_decide_not_names_and_shapes():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn_weight = nn.Parameter(torch.ones(4))  # named as a norm's and 1-D, of no norm
            self.conv = nn.BatchNorm1d(4)  # named as a convolution
            self.norm = nn.Linear(4, 4, bias=False)
            self.attention = nn.MultiheadAttention(4, 1)

    no_decay = ["conv.bias", "attention.in_proj_bias", "attention.out_proj.bias"]
    in_group(Odd(), scale=["conv.weight"], no_decay=no_decay)


def test_shared_modules_and_parameters_are_there_once():
    norm, linear = nn.BatchNorm1d(4), nn.Linear(4, 4)
    tied = nn.Linear(4, 4)
    tied.weight = linear.weight
    model = nn.Sequential(linear, norm, tied, norm, nn.Sequential(linear, norm))
    groups = param_groups(model, LR, DECAY)
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == len(list(model.parameters())) == 5
    torch.optim.SGD(groups)  # refuses a parameter in two groups


def test_frozen_parameters_are_left_out_and_empty_groups_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight.requires_grad_(False)
    assert [[p.shape for p in group["params"]] for group in param_groups(model, LR, DECAY)] == [[(4, 4)], [(4,), (4,)]]
    assert param_groups(model.requires_grad_(False), LR, DECAY) == []


class Kernels(nn.Conv1d):
    def no_weight_decay(self):
        return {"weight"}


def test_what_modules_name_does_not_decay_wherever_they_stand():
    in_group(
        nn.Sequential(nn.Sequential(Kernels(2, 2, 1)), nn.Conv1d(2, 2, 1)),
        no_decay=["0.0.weight", "0.0.bias", "1.bias"],
    )


def test_what_timm_models_name_does_not_decay():
    model = nn.ModuleDict({"trunk": timm.create_model("test_vit", num_classes=2)})
    given = settings(param_groups(model, LR, DECAY))
    assert given[model["trunk"].pos_embed] == given[model["trunk"].cls_token] == (LR, 0.0)
    swin = timm.create_model("swinv2_tiny_window8_256", depths=(1, 1, 1, 1), embed_dim=12, num_heads=(1, 1, 1, 1))
    given = settings(param_groups(swin, LR, DECAY))
    named = [p for name, p in swin.named_parameters() if name in swin.no_weight_decay()]
    assert named and all(given[p] == (LR, 0.0) for p in named)


def test_norms_of_timm_are_known():
    for name in ("frn", "frntlu", "rmsnorm2d", "evonorms0"):
        norm = timm.layers.get_norm_act_layer(name)(32)
        in_group(norm, no_decay=[name for name, _ in norm.named_parameters()])
    act = timm.layers.BatchNormAct2d(8, act_layer=nn.PReLU)
    in_group(act, scale=["weight"], no_decay=["bias"])


def test_a_norm_of_ones_own():
    class MyNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.lam = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, 1))

    in_group(MyNorm())
    scaled = MyNorm()
    scaled.gamma_init = 0.1
    in_group(scaled, scale=["weight"])
    describe_class(NormDescription(), MyNorm)
    in_group(MyNorm(), no_decay=["weight", "lam"])
    describe_class(NormDescription(batch_scale=True), MyNorm)
    in_group(MyNorm(), scale=["weight"], no_decay=["lam"])


@given(lr=st.floats(1e-6, 10), divisor=st.floats(1e-3, 1e4), decay=st.floats(0, 1), depth=st.integers(0, 4))
def test_all_parameters_fall_into_three_groups(lr, divisor, decay, depth):
    model = nn.Sequential(*[nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.LayerNorm(2)) for _ in range(depth)])
    groups = param_groups(model, lr, decay, divisor)
    assert sum(len(group["params"]) for group in groups) == 6 * depth and len(groups) in (0, 3)
    if groups:
        assert [group["lr"] for group in groups] == [lr, lr, lr / divisor]
        assert [group["weight_decay"] for group in groups] == [decay, 0, 0]


@pytest.mark.parametrize(
    "name, value",
    [
        ("scale_lr_divisor", 0),
        ("scale_lr_divisor", -1.0),
        ("scale_lr_divisor", math.inf),
        ("scale_lr_divisor", math.nan),
        ("lr", 0.0),
        ("lr", math.nan),
        ("weight_decay", -0.1),
    ],
)
@pytest.mark.parametrize("function", [param_groups, timm_param_groups])
def test_values_out_of_range(function, name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*, got {value!r}$"):
        function(nn.BatchNorm1d(2), **{"lr": 0.1, "weight_decay": 0.1, name: value})


def small_model():
    return nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2))


def ratios(optimizer):
    """The slow group's rate against the first one's, which is also returned."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return rates[0], rates[-1] / rates[0]


@pytest.mark.parametrize("sched", ["cosine", "multistep", "poly", "tanh", "constant"])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_timms_schedules_keep_the_ratio(sched, optimizer):
    """With a warm-up from, and an end at, one absolute rate for all groups."""
    absolute = {"warmup_lr": 0.1, "warmup_epochs": 2, "min_lr": 0.05, "decay_milestones": [4, 6]}
    how = {**absolute, "step_on_epochs": False, "updates_per_epoch": 3, "num_epochs": 8, "sched": sched}
    divided = create_optimizer_v2(
        timm_param_groups(small_model(), LR, DECAY, DIVISOR), optimizer, lr=LR, weight_decay=1.0
    )
    plain = create_optimizer_v2(small_model(), optimizer, lr=LR)
    assert [group["weight_decay"] for group in divided.param_groups] == [DECAY, 0, 0]
    schedules = [create_scheduler_v2(each, **how)[0] for each in (divided, plain)]
    seen = set()
    for update in range(8 * 3 + 2):
        for schedule in schedules:
            schedule.step_update(update)
        rate, ratio = ratios(divided)
        assert rate == plain.param_groups[0]["lr"] and ratio == pytest.approx(1 / DIVISOR)
        seen.add(rate)
    assert min(seen) <= 0.1 and len(seen) > 2


def test_torchs_schedules_keep_the_ratio():
    for build in (
        functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=10),
        functools.partial(torch.optim.lr_scheduler.LinearLR, start_factor=0.01),
        functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda i: CosineParamScheduler(1, 0.1)(i / 20)),
    ):
        optimizer = torch.optim.SGD(param_groups(small_model(), LR, DECAY, DIVISOR))
        schedule = build(optimizer)
        for _ in range(9):
            assert ratios(optimizer)[1] == pytest.approx(1 / DIVISOR)
            optimizer.step()
            schedule.step()


def test_a_step_moves_the_scale_so_many_times_less():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    moved = {}
    for divisor in (1.0, 100.0):
        copied = copy.deepcopy(model)
        optimizer = torch.optim.SGD(param_groups(copied, LR, 0.0, divisor))
        copied(torch.arange(32.0).reshape(8, 4).sin()).square().mul(torch.arange(4.0)).mean().backward()
        optimizer.step()
        moved[divisor] = [new - old for new, old in zip(copied.parameters(), model.parameters())]
    assert moved[1.0][2].abs().sum() > 0
    torch.testing.assert_close(moved[100.0][2], moved[1.0][2] / 100, rtol=1e-3, atol=1e-7)
    for name in (0, 1, 3):
        torch.testing.assert_close(moved[100.0][name], moved[1.0][name])


def test_every_norm_of_the_registry_is_known():
    """A norm that is added and is not told apart from a convolution would decay."""
    for name, _ in fbn_plugin.NORMS:
        norm = get_norm(name, 64)
        given = settings(param_groups(norm, LR, DECAY, DIVISOR))
        assert all(given[p][1] == 0.0 for p in norm.parameters(recurse=False)), name
        if isinstance(norm, _BatchNorm):
            assert given[norm.weight] == (LR / DIVISOR, 0.0), name
        elif isinstance(norm, _NormBase):
            assert given[norm.weight] == (LR, 0.0), name
