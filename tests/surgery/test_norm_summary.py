"""The summary of a model's norms: what it says, and that its specs rebuild them."""

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fbn_plugin
from fbn_plugin import convert_norm, get_norm, norm_factory, summarize
from fbn_plugin.registry import NormSpec, norm_options
from fbn_plugin.surgery.norm_summary import join_names


def test_a_resnet_is_readable():
    summary = summarize(torchvision.models.resnet50(norm_layer=norm_factory("FBN(t_sigma=4)")))
    assert summary.line == "53 FBN(t_sigma=4), 0 BN" and summary.counts == {"FBN": 53}
    assert str(summary).splitlines() == [
        "53 norms: 53 FBN(t_sigma=4), 0 BN",
        "53 x FBN(t_sigma=4) (FilteredBatchNorm2d), trains",
        "    64 channels: bn1, layer1.0-2.bn1-2",
        "    256 channels: layer1.0-2.bn3, layer1.0.downsample.1, layer3.0-5.bn1-2",
        "    128 channels: layer2.0-3.bn1-2",
        "    512 channels: layer2.0-3.bn3, layer2.0.downsample.1, layer4.0-2.bn1-2",
        "    1024 channels: layer3.0-5.bn3, layer3.0.downsample.1",
        "    2048 channels: layer4.0-2.bn3, layer4.0.downsample.1",
    ]
    entry = summary.entries[0]
    assert (entry.name, entry.kind, entry.spec, entry.channels, entry.frozen) == (
        "bn1",
        "FBN",
        "FBN(t_sigma=4)",
        64,
        False,
    )


def test_what_is_frozen_counts_apart_and_says_why():
    layers = [nn.Conv2d(3, 8, 1), get_norm("FBN", 8), nn.Conv2d(8, 8, 1), get_norm("FrozenBN", 8), get_norm("BN", 8)]
    model = nn.Sequential(
        nn.Sequential(*layers), nn.Sequential(nn.Conv2d(8, 8, 1), torchvision.ops.FrozenBatchNorm2d(8))
    )
    model[0][4].requires_grad_(False)
    model[1].requires_grad_(False)
    summary = summarize(model)
    assert summary.line == "2 FrozenBN, 1 FBN(t_sigma=5), 1 BN with frozen weights"
    assert [entry.frozen for entry in summary.entries] == [False, True, True, True]
    assert str(summary).splitlines()[1:] == [
        "1 x FBN(t_sigma=5) (FilteredBatchNorm2d), trains",
        "    8 channels: 0.1",
        "1 x FrozenBN (FrozenBatchNorm2d), frozen",
        "    8 channels: 0.3",
        "1 x BN with frozen weights (BatchNorm2d), frozen: its statistics move in training",
        "    8 channels: 0.4",
        "1 x FrozenBN (FrozenBatchNorm2d), frozen: the Conv2d beside it is frozen too",
        "    8 channels: 1.1",
    ]


def test_shared_lazy_and_unknown_norms():
    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.register_buffer("running_mean", torch.zeros(4))
            self.register_buffer("running_var", torch.ones(4))

    class Loud(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    norm = nn.BatchNorm2d(4)
    summary = summarize(
        nn.ModuleDict({"a": norm, "b": norm, "lazy": nn.LazyBatchNorm2d(), "c": Unknown(), "d": Loud(4)})
    )
    assert [(entry.name, entry.kind, entry.shared, entry.channels) for entry in summary.entries] == [
        ("a", "BN", ("b",), 4), ("lazy", "BN", (), None), ("c", "Unknown", (), 4), ("d", "Loud", (), 4)
    ]  # fmt: skip
    notes = [entry.note for entry in summary.entries]
    assert notes[0] == "" and "run the model once" in notes[1] and "class is not known" in notes[2]
    assert "its own forward" in notes[3] and "4 channels: a (also b)" in str(summary)
    assert str(summarize(nn.BatchNorm2d(3))).endswith("3 channels: the model")
    assert summarize(nn.Linear(2, 2)).line == "0 BN"


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_norms():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    entry = summarize(scripted).entries[0]
    assert (entry.kind, entry.class_name, entry.channels) == ("BatchNorm2d", "BatchNorm2d", 4)
    with pytest.warns(UserWarning, match="convert before scripting"):
        convert_norm(scripted, "FBN")


@pytest.mark.parametrize(
    "build, line",
    [
        (lambda: timm.layers.BatchNormAct2d(8), "1 BN"),
        (lambda: timm.layers.GroupNormAct(8, 2), "1 GN(num_groups=2), 0 BN"),
        (lambda: convert_norm(timm.layers.BatchNormAct2d(8), "FBN(t_sigma=3)"), "1 FBN(t_sigma=3), 0 BN"),
        (lambda: timm.create_model("convnext_atto"), "17 LN, 0 BN"),
        (lambda: fbn_plugin.FilteredBatchNormAct2d(8), "1 FBN(t_sigma=5), 0 BN"),
        (lambda: nn.SyncBatchNorm(8), "1 SyncBN, 0 BN"),
        (lambda: fbn_plugin.get_norm("IEBN-", 8), "1 IEBN-, 0 BN"),
        (lambda: fbn_plugin.get_norm("RBN-(eps=0.1)", 8), "1 RBN-(eps=0.1), 0 BN"),
        (lambda: fbn_plugin.GatedBatchNorm2d(8, gate_init=0.5), "1 RBN-(gate_init=0.5), 0 BN"),
        (lambda: convert_norm(fbn_plugin.get_norm("IEBN-", 8), "RBN-"), "1 RBN-, 0 BN"),
        (lambda: nn.RMSNorm(8), "1 RMSNorm, 0 BN"),
        (lambda: nn.InstanceNorm1d(8, affine=True), "1 IN, 0 BN"),
        (
            lambda: fbn_plugin.FilteredBatchNorm2d(8, t_sigma=float("inf"), eps=1e-3),
            "1 FBN(eps=0.001, t_sigma=inf), 0 BN",
        ),
    ],
)
def test_norms_of_the_frameworks(build, line):
    assert summarize(build()).line == line


VALUES = {
    "eps": st.floats(1e-8, 0.5), "momentum": st.none() | st.floats(0.01, 0.99),
    "affine": st.booleans(), "bias": st.booleans(),
    "t_sigma": st.floats(1.1, 50) | st.just(float("inf")), "gamma_init": st.floats(0.01, 1),
    "num_groups": st.sampled_from([1, 2, 4, 32]), "gaussian_correction": st.booleans(), "tlu": st.booleans(),
    "grad_mode": st.sampled_from(["exact", "paper"]), "track_running_stats": st.booleans(),
    "gate_init": st.sampled_from([-1.0, 0.5]), "weighted_std": st.booleans(),
}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([name for name, _ in fbn_plugin.NORMS]), st.data())
def test_the_spec_of_a_norm_rebuilds_it(name, data):
    known = [key for key in norm_options(name) if key in VALUES]
    options = data.draw(st.fixed_dictionaries({}, optional={key: VALUES[key] for key in known}))
    norm = get_norm(NormSpec(name, options), 32)
    again = get_norm(summarize(norm).entries[0].spec, 32)
    assert type(again) is type(norm) and repr(again) == repr(norm)
    assert all(
        getattr(again, key) == getattr(norm, key) for key in ("eps", "t_sigma", "momentum") if hasattr(norm, key)
    )
    assert again.state_dict().keys() == norm.state_dict().keys()


@settings(max_examples=100, deadline=None)
@given(
    st.sets(st.tuples(st.integers(0, 3), st.integers(0, 12), st.sampled_from(["bn1", "bn2", "norm", "3"])), min_size=1)
)
def test_joined_names_stand_for_exactly_the_names(parts):
    names = [f"stage{a}.{b}.{c}" for a, b, c in parts]

    def numbers(text):
        ends = [[int(end) for end in run.split("-")] for run in text.split(",")]
        return [number for run in ends for number in range(run[0], run[-1] + 1)]

    spread = []
    for joined in join_names(names):
        stage, block, last = joined.removeprefix("stage").split(".")
        lasts = [f"bn{n}" for n in numbers(last[2:])] if last.startswith("bn") else ["norm" if last == "norm" else "3"]
        spread += [f"stage{a}.{b}.{c}" for a in numbers(stage) for b in numbers(block) for c in lasts]
    assert sorted(spread) == sorted(names)
