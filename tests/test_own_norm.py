"""A norm of one's own, registered by one line, works wherever ours do: a class that derives from a batch norm and says
what it is, one that derives from none, and a function."""

import copy
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from small_mask_rcnn import batch, small
from torch import nn

import fbn_plugin
from fbn_plugin import NORMS, NormReport, convert_norm, convert_sync, fold_norms, get_norm, norm_factory, param_groups
from fbn_plugin.layers import description
from fbn_plugin.layers.description import NormDescription, affine_terms

ROOT = Path(__file__).parents[1]


class DoubledNorm(nn.BatchNorm2d):
    """Batch normalization with twice its scale."""

    description = NormDescription("BN", "channel", affine_terms=lambda norm: (2 * norm.weight, norm.bias))

    def forward(self, input):
        shift = self.bias.view(-1, 1, 1)
        return 2 * super().forward(input) - shift


class MaxNorm(nn.Module):
    """Division by the largest value of an image, and a scale."""

    def __init__(self, num_features, eps=1e-5, *, power=1.0, device=None, dtype=None):
        super().__init__()
        self.num_features, self.eps, self.power = num_features, eps, power
        self.weight = nn.Parameter(torch.ones(num_features, 1, 1, device=device, dtype=dtype))

    def forward(self, input):
        largest = input.abs().amax((1, 2, 3), keepdim=True) if input.numel() else 1.0
        return input / (largest + self.eps) ** self.power * self.weight


class Secret(nn.BatchNorm2d):
    """A batch norm with a forward of its own that says nothing about it."""

    def forward(self, input):
        return super().forward(input).tanh()


class Telling(Secret):
    """The same, that tells its moments: those of one half of the batch."""

    def batch_statistics(self, input):
        half = input[: len(input) // 2]
        var, mean = torch.var_mean(half, (0, 2, 3), correction=0)
        return mean, var, torch.full_like(mean, half.numel() // half.shape[1])

    def forward(self, input):
        return super().forward(input).tanh()


class Silent(Telling):
    """A forward that what its base tells need not hold for."""

    def forward(self, input):
        return super().forward(input[:1].expand_as(input))


def AnyNorm(num_channels, eps=1e-5, *, dims=2, device=None, dtype=None):
    return MaxNorm(num_channels, eps, device=device, dtype=dtype)


NAMES = ["DoubledNorm", "MaxNorm", "Secret", "AnyNorm"]
UNKNOWN = "Silent|Secret) has a forward of its own, .*`batch_statistics.input.`, or a `description`"


@pytest.fixture(autouse=True)
def registered():
    fbn_plugin.register()
    known = dict(description._DESCRIPTIONS)
    for norm in (DoubledNorm, MaxNorm, Secret, AnyNorm):
        NORMS.register(norm)
    yield
    fbn_plugin.unregister()
    for name in NAMES:
        NORMS._obj_map.pop(name)
    description._DESCRIPTIONS.clear()
    description._DESCRIPTIONS.update(known)


def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))


def kinds(model):
    return [type(module).__name__ for module in model.modules()]


def test_a_spec_builds_it_with_its_options():
    norm = get_norm("MaxNorm(power=0.5)", 8)
    assert isinstance(norm, MaxNorm) and norm.power == 0.5
    assert norm_factory("MaxNorm")(8, 1e-3).eps == 1e-3 == norm_factory("AnyNorm")(8, 1e-3).eps
    with pytest.raises(ValueError, match="unknown option of MaxNorm 'pover'.*'power'"):
        get_norm("MaxNorm(pover=1)", 8)


@pytest.mark.parametrize("name", NAMES)
def test_a_built_model_gets_it(name):
    model = convert_norm(network(), name)
    assert sum(kind in (name, "MaxNorm") for kind in kinds(model)) == 2
    assert model(torch.randn(2, 3, 9, 9)).isfinite().all()


def test_and_gives_it_up_again():
    model = convert_norm(network(), "MaxNorm")
    with torch.no_grad():
        model[1].weight.fill_(3.0)
    report = NormReport()
    convert_norm(model, "FBN", sources="MaxNorm", report=report)
    assert kinds(model).count("FilteredBatchNorm2d") == 2 and "not carried over: weight" in str(report)

    model = convert_norm(network(), "DoubledNorm")
    for _ in range(3):
        model(torch.randn(4, 3, 9, 9))
    images = torch.randn(2, 3, 9, 9)
    before = model.eval()(images)
    torch.testing.assert_close(convert_norm(model, "FBN")(images), before, rtol=1e-4, atol=1e-4)

    with pytest.warns(UserWarning, match="2 norms are left .* such as Secret .*give the class a `description`"):
        convert_norm(convert_norm(network(), "Secret"), "FBN")


def test_folding_is_right_or_refused():
    images = torch.randn(2, 3, 9, 9)
    for name, folded in (("DoubledNorm", 2), ("MaxNorm", 0), ("Secret", 0)):
        model = convert_norm(network(), name)
        model(torch.randn(4, 3, 9, 9))
        before, report = model.eval()(images), NormReport()
        after = fold_norms(model, report=report)(images)
        assert (len(report.changed), len(report.left)) == (folded, 2 - folded), name
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["DoubledNorm", "Secret"])
def test_a_batch_norm_without_a_synchronized_form_is_left_with_a_warning(name):
    with pytest.warns(UserWarning, match=f"2 batch norms are left unsynchronized, such as {name}"):
        convert_sync(convert_norm(network(), name))


def test_its_parameters_do_not_decay():
    for name in NAMES:
        model = convert_norm(network(), name)
        groups = param_groups(model, 0.1, 1e-4, 10.0)
        decayed = [id(p) for group in groups if group["weight_decay"] for p in group["params"]]
        assert decayed == [id(model[0].weight), id(model[3].weight)]


@pytest.mark.parametrize("name", NAMES)
def test_timms_models_hold_their_activation_in_it(name):
    model = timm.create_model("test_efficientnet", norm_layer=name.lower(), num_classes=4)
    norms = [module for module in model.modules() if isinstance(module, DoubledNorm | MaxNorm | Secret)]
    assert norms and any(isinstance(norm.act, nn.SiLU) for norm in norms)
    keys = timm.create_model("test_efficientnet", num_classes=4).state_dict().keys()
    assert model.state_dict().keys() <= keys
    images = torch.randn(2, 3, 64, 64)
    before = model.eval()(images)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(images), before)

    built = convert_norm(timm.create_model("test_efficientnet", num_classes=4), name).eval()
    built.load_state_dict(model.state_dict())
    torch.testing.assert_close(built(images), before)


def test_timm_does_not_freeze_what_would_lose_its_activation():
    model = timm.create_model("test_efficientnet", norm_layer="secret")
    with pytest.raises(ValueError, match="Secret is no batch norm that timm knows.*convert_norm.model, .FrozenBN"):
        timm.layers.freeze_batch_norm_2d(model)


@pytest.mark.parametrize("name", ["DoubledNorm", "MaxNorm"])
def test_torchvisions_detector_trains_with_it(name):
    model = small(norm=name, norm_fpn=name, norm_mask_head=name)
    assert kinds(model).count(name) > 20
    images, targets = batch()
    sum(model.train()(images, targets).values()).backward()
    state = io.BytesIO()
    torch.save(model.state_dict(), state)
    state.seek(0)
    model.load_state_dict(torch.load(state))


RUN = """
import sys
sys.path[:0] = ["{root}/tools", "{root}/tests"]
import test_own_norm, {tool}
from fbn_plugin import NORMS
NORMS.register(test_own_norm.MaxNorm)
{tool}.main(sys.argv[1:])
"""


def test_a_training_tool_takes_it(tmp_path):
    """Its own process, as a script of one's own would do it: register, then the tool's main."""
    options = ["MODEL.NORM", "MaxNorm(power=0.5)", "MODEL.NAME", "test_byobnet", "SOLVER.MAX_ITER", "2"]
    command = [sys.executable, "-c", RUN.format(root=ROOT, tool="train_classification")]
    command += [
        "--config-file",
        str(ROOT / "configs/Digits/test_resnet_FBN.yaml"),
        *options,
        "OUTPUT_DIR",
        str(tmp_path),
    ]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0 and "test_byobnet with MaxNorm(power=0.5)" in run.stdout, run.stdout + run.stderr
    assert any("total_loss" in json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines())


def test_terms_of_a_described_norm():
    norm = DoubledNorm(3)
    assert affine_terms(norm)[0].eq(2).all() and affine_terms(nn.BatchNorm2d(3))[0].eq(1).all()


@pytest.mark.parametrize("cls", [Secret, Silent])
@pytest.mark.parametrize("exact", [False, True])
def test_moments_that_are_not_known_are_not_measured(cls, exact):
    data = [torch.randn(4, 3, 9, 9)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), cls(8)).train()
    with pytest.raises(ValueError, match=f"({UNKNOWN}"):
        fbn_plugin.update_population_stats(model, data, exact=exact)
    with pytest.raises(ValueError, match=f"({UNKNOWN}"), fbn_plugin.batch_moments(model):
        pass
    assert all(norm.running_mean.eq(0).all() and norm.running_var.eq(1).all() for norm in model[1:])

    model[2].eval()  # neither measured nor in the way of what is
    fbn_plugin.update_population_stats(model, data, exact=exact)
    assert model[1].running_mean.ne(0).all() and model[2].running_mean.eq(0).all()


def test_a_conversion_that_cannot_be_recalibrated_leaves_the_model():
    model = network()
    with pytest.raises(ValueError, match=f"({UNKNOWN}"):
        convert_norm(model, "Secret", recalibrate=[torch.randn(4, 3, 9, 9)])
    assert kinds(model).count("BatchNorm2d") == 2


@pytest.mark.parametrize("act", [False, True])
def test_moments_that_are_told_are_measured(act):
    """Also where timm holds an activation in the same module."""
    norm, x = Telling(8), 3 + torch.randn(6, 8, 5, 5)
    if act:
        from fbn_plugin.frameworks.timm import act_class

        norm = act_class(Telling)(8)
    fbn_plugin.update_population_stats(norm.train(), [x])
    torch.testing.assert_close(norm.running_mean, x[:3].mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, x[:3].var((0, 2, 3)))
    with fbn_plugin.batch_moments(norm.eval()):
        torch.testing.assert_close(norm(x + 7), norm(x), rtol=1e-3, atol=1e-3)


def test_moments_of_a_described_norm_and_of_pytorchs_own_are_plain():
    for norm in (DoubledNorm(8), nn.SyncBatchNorm(8), nn.BatchNorm2d(8)):
        x = 3 + torch.randn(4, 8, 5, 5)
        fbn_plugin.update_population_stats(norm.train(), [x])
        torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))


def test_a_norm_for_images_is_refused_elsewhere():
    class Anywhere(DoubledNorm):
        def _check_input_dim(self, input):
            pass

    NORMS.register(Anywhere)
    try:
        for dims in (1, 3):
            for name in ("DoubledNorm", "Secret"):
                with pytest.raises(ValueError, match=f"{name} is for 2 spatial dimensions, not for {dims}"):
                    get_norm(name, 8, dims=dims)
            assert type(get_norm("Anywhere", 8, dims=dims)) is Anywhere
            assert type(get_norm("AnyNorm", 8, dims=dims)) is MaxNorm
    finally:
        NORMS._obj_map.pop("Anywhere")
    model = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm1d(8))
    with pytest.raises(ValueError, match="cannot convert '1' to Secret: Secret is for 2 spatial dimensions, not for 1"):
        convert_norm(model, "Secret")
    assert kinds(model)[1:] == ["BatchNorm2d", "BatchNorm1d"]


class NoDevice(nn.Module):
    def __init__(self, num_features):
        super().__init__()


class Demanding(nn.Module):
    def __init__(self, num_features, power, device=None, dtype=None):
        super().__init__()


class NoChannels(nn.Module):
    pass


class AnyOptions(nn.BatchNorm2d):
    """What a spec may set, and a conversion has to hand on, would not be known."""

    def __init__(self, num_features, **kwargs):
        super().__init__(num_features, **kwargs)


def no_dims(num_channels, device=None, dtype=None):
    return nn.BatchNorm2d(num_channels, device=device, dtype=dtype)


@pytest.mark.parametrize(
    ("norm", "sentence"),
    [
        (NoDevice, "NoDevice must take 'device'"),
        (AnyOptions, "AnyOptions must take 'device'.*kwargs does not say"),
        (Demanding, "Demanding: its option 'power' must have a default"),
        (NoChannels, "NoChannels must take the number of channels"),
        (no_dims, "no_dims must take 'dims'"),
    ],
)
def test_what_cannot_be_called_as_a_norm_is_not_registered(norm, sentence):
    with pytest.raises(ValueError, match=sentence):
        NORMS.register(norm)
    assert norm.__name__ not in NORMS


def test_a_name_is_taken_once_and_a_cell_may_run_again():
    old = type("Secret", (nn.BatchNorm2d,), {})
    old.__module__, old.__qualname__ = "somewhere.else", "Secret"
    with pytest.raises(ValueError, match=r"somewhere\.else\.Secret cannot be registered: the name 'Secret' is taken"):
        NORMS.register(old)
    with pytest.raises(ValueError, match="the name 'FBN' is taken"):
        NORMS.register(type("FBN", (nn.BatchNorm2d,), {}))
    again = type("Secret", (nn.BatchNorm2d,), {"__module__": Secret.__module__})
    assert again.__qualname__ == Secret.__qualname__ and again is not Secret
    NORMS.register(again)
    assert type(get_norm("Secret", 8)) is again
