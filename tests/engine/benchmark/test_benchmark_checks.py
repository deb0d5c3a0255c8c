"""The checks that go before the timing, the compilation of kernels, and the first step; on the CPU, with fakes for what
needs a GPU."""

import math
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

from fbn_plugin.engine.benchmark import correctness, first_step, layers, models, prepare
from fbn_plugin.engine.benchmark.peers import TARGET_LAYER_PEERS, Peer
from fbn_plugin.engine.benchmark.settings import Settings
from fbn_plugin.engine.benchmark.timing import wall_timer
from fbn_plugin.layers import FilteredBatchNorm2d

SMALL = ((2, 16, 6, 6), (2, 16, 6, 6))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(correctness, "SHAPES", {"cpu": SMALL})


def test_the_layers_pass(small, one_thread):
    notes = []
    found = correctness.check("cpu", math.inf, notes)
    assert notes == [] and len(found) == 64 and all(row["passed"] for row in found)
    kinds = {row["check"] for row in found}
    assert {"FBN against float64", "FBN+add+ReLU, the same bits each time", "FGN, two at once"} <= kinds
    errors = found[0]["errors"]
    assert errors.keys() == {
        "output", "dx", "d_weight", "d_bias", "running_mean", "running_var", "num_batches_tracked",
    }  # fmt: skip


class _Wrong(FilteredBatchNorm2d):
    """In float32 off by a part in a thousand, and by more at each call."""

    calls = 0

    def forward(self, input):
        y = super().forward(input)
        if input.dtype == torch.float64:
            return y
        _Wrong.calls += 1
        return y * (1 + 1e-3 * _Wrong.calls)


def test_a_wrong_layer_is_caught(small, monkeypatch):
    monkeypatch.setattr(correctness, "LAYERS", {"wrong": (_Wrong, False)})
    monkeypatch.setattr(_Wrong, "calls", 0)
    monkeypatch.setattr(correctness, "FORMATS", correctness.FORMATS[:1])
    notes = []
    found = correctness.check("cpu", math.inf, notes)
    assert not any(row["passed"] for row in found) and len(notes) == 4
    assert notes[0].startswith("WRONG: wrong against float64, 2x16x6x6 contiguous float32: output 1.0e-03")
    assert notes[-1].endswith("other bits")


def test_running_statistics_are_checked(small, monkeypatch):
    class Forgetful(FilteredBatchNorm2d):
        def forward(self, input):
            before = self.running_mean.clone()
            y = super().forward(input)
            if input.dtype != torch.float64:
                self.running_mean.copy_(before)
            return y

    monkeypatch.setattr(correctness, "LAYERS", {"forgetful": (Forgetful, False)})
    row = correctness.check_accuracy("forgetful", SMALL[0], "contiguous", "float32", "cpu")
    assert not row["passed"] and row["errors"]["running_mean"] == 1 and row["errors"]["output"] < 1e-6


def test_a_check_that_raises_is_no_check_that_passed(small, monkeypatch):
    class Broken(FilteredBatchNorm2d):
        def forward(self, input):
            raise RuntimeError("out of order\nlong story")

    monkeypatch.setattr(correctness, "LAYERS", {"broken": (Broken, False)})
    found = correctness.check("cpu", math.inf, notes := [])
    assert {row["error"] for row in found} == {"out of order"} and not any(row["passed"] for row in found)
    assert len(notes) == len(set(notes)) + 4, "the two shapes are one here"


def test_checks_end_with_the_time(small):
    assert correctness.check("cpu", -math.inf, notes := []) == []
    assert notes == ["64 of 64 checks were left out: the time was over"]


def test_a_peer_that_fails_is_left_out_with_those_that_it_is_the_measure_of():
    class Broken(nn.BatchNorm2d):
        def forward(self, input):
            raise RuntimeError("no kernel")

    peers = [Peer("BN", "BN", nn.BatchNorm2d), Peer("bad", "bad", Broken), Peer("good", "bad", nn.BatchNorm2d)]
    x = layers.layer_input((2, 4, 3, 3), 0.0, "contiguous", "float32", "cpu")
    settings, notes = Settings(quick=True, seconds_per_row=1e-3), []
    row = layers.layer_row(settings, peers, x, "forward", math.inf, notes)
    assert row["peers"].keys() == {"BN"}
    assert notes == ["bad is left out: no kernel", "good is left out, as there is no bad"]
    with pytest.raises(RuntimeError, match="no kernel"):
        layers.layer_row(settings, peers[1:], x, "forward", math.inf, [])


def test_a_layer_that_cannot_be_captured_is_timed_between_events(monkeypatch):
    def captured(call):
        if call == "bad":
            raise RuntimeError("operation not permitted\nwhen capturing")
        return f"graph of {call}"

    monkeypatch.setattr(layers, "captured", captured)
    notes = []
    assert layers._replayed({"a": "good", "b": "bad"}, notes, " here") == {"a": "graph of good", "b": "bad"}
    assert notes == ["b was no CUDA graph here, its time is between two events: operation not permitted"]


def test_host_time_is_for_one_layer():
    settings = Settings(quick=True, seconds_per_row=1e-3)
    row = layers.measure_host(settings, 20, "forward+backward", math.inf, [])
    assert (row["depth"], row["pass"]) == (20, "forward+backward")
    assert row["peers"].keys() == {"BN", "FBN T=5", "BN, ReLU", "FBN+ReLU fused"}
    assert row["peers"]["FBN+ReLU fused"]["to"] == "BN, ReLU"


def test_shapes_of_a_models_norms():
    shapes = prepare.norm_shapes("resnet50", (2, 64, 64))
    assert (2, 64, 32, 32) in shapes and (2, 2048, 2, 2) in shapes and len(shapes) == len(set(shapes)) == 12


def test_kernels_are_compiled_by_the_backend(monkeypatch):
    asked = []
    module = types.ModuleType("fbn_plugin.ops.cuda")
    module.precompile = asked.extend
    monkeypatch.setitem(sys.modules, "fbn_plugin.ops.cuda", module)
    wanted = prepare.of_layer((2, 16, 5, 5), "channels_last", "bfloat16")
    row = prepare.compile_kernels([*wanted, *wanted], "cpu", notes := [])
    assert notes == [] and asked == wanted and row["kernels"] == 4 and row["by"] == "fbn_plugin.ops.cuda.precompile"
    shape = (2, 16, 5, 5)
    assert asked[2] == (shape, torch.bfloat16, True, 0, "relu", True)
    assert asked[3] == (shape, torch.bfloat16, True, 16, "identity", False)


def test_kernels_are_compiled_by_running_the_layers(monkeypatch):
    monkeypatch.setitem(sys.modules, "fbn_plugin.ops.cuda", types.ModuleType("fbn_plugin.ops.cuda"))
    seen = []
    call = layers.layer_call
    monkeypatch.setattr(prepare, "layer_call", lambda *args: seen.append(type(args[0]).__name__) or call(*args))
    wanted = prepare.of_layer((2, 16, 5, 5), "contiguous", "float32")
    broken = wanted[0]._replace(activation="none such")
    row = prepare.compile_kernels([*wanted, broken], "cpu", notes := [], workers=2)
    assert sorted(seen) == ["FilteredBatchNorm2d", *["FilteredBatchNormAct2d"] * 2, "FilteredGroupNorm"]
    assert row["by"].startswith("running each layer") and row["failed"] == 1 and "none such" in notes[0]


def test_first_steps_are_compared_to_the_mean_of_two(monkeypatch):
    times, seen = iter([2.0, 9.0, 3.5, 3.0]), []

    def process(norm, device, name, size, cache, timeout):
        seen.append((norm, cache))
        return next(times)

    monkeypatch.setattr(first_step, "_in_a_new_process", process)
    row = first_step.measure_first_step("cpu", "resnet50", (2, 64, 64), math.inf)
    assert row["extra_seconds"] == {"cold": 6.5, "warm": 1.0}
    assert [norm for norm, _ in seen] == ["BN", "FBN", "FBN", "BN"] and len({cache for _, cache in seen}) == 1


def test_a_first_step_in_a_process_of_its_own(tmp_path):
    assert 0 < first_step._in_a_new_process("FBN", "cpu", "resnet18", (2, 32, 32), str(tmp_path), 300) < 300


def test_a_first_step_that_fails_or_never_ends(monkeypatch):
    def process(command, timeout, env, **options):
        assert command[-4:] == ["FBN", "cpu", "resnet18", "2x32x32"]
        assert env["FBN_PLUGIN_CACHE_DIR"].startswith("folder") and env["TRITON_CACHE_DIR"].startswith("folder")
        if timeout < 10:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nRuntimeError: no kernel\n")

    monkeypatch.setattr(subprocess, "run", process)
    for timeout, sentence in ((30, "FBN failed: RuntimeError: no kernel"), (5, "FBN was not over after 5 s")):
        with pytest.raises(RuntimeError, match=sentence):
            first_step._in_a_new_process("FBN", "cpu", "resnet18", (2, 32, 32), "folder", timeout)


def test_compiled_steps_leave_out_the_fused_form_where_time_is_short(monkeypatch):
    block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    monkeypatch.setattr(models, "_built", lambda name: block)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    settings = Settings(quick=True, seconds_per_row=1e-3)
    arguments = (settings, "resnet18", (2, 8, 8), "contiguous", "float32")
    row = models.measure_compiled(*arguments, math.inf, notes := [])
    assert row["peers"].keys() == {"BN", "FBN T=5", "FBN T=5 fused"} and notes == []
    assert all(peer["compile_seconds"] > 0 for peer in row["peers"].values())
    row = models.measure_compiled(*arguments, 0.0, notes)
    assert row["peers"].keys() == {"BN", "FBN T=5"} and "the time was over" in notes[0]


def test_a_loss_that_is_not_finite_is_told(monkeypatch):
    class Spoilt(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((), math.nan))

        def forward(self, images):
            return images.flatten(1)[:, :5] * self.weight

    monkeypatch.setattr(models, "_built", lambda name: Spoilt())
    settings = Settings(quick=True, seconds_per_row=1e-3)
    models.measure_model(
        settings, {"BN": lambda m: m}, "resnet50", (2, 8, 8), "contiguous", "float32", math.inf, notes := []
    )
    assert notes == ["the loss of BN is not finite in a step of resnet50 2x8x8 contiguous float32"]


@pytest.fixture
def pretended_gpu(monkeypatch):
    """What asks for a GPU gets the CPU: the code around it runs."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(layers, "gpu_timer", lambda: wall_timer("cpu"))
    monkeypatch.setattr(layers, "captured", lambda call: call)
    monkeypatch.setattr(layers, "memory_of", lambda *_: {"saved_bytes": 1, "peak_bytes": 1})


def test_a_row_of_layers_as_on_a_gpu(pretended_gpu):
    settings = Settings(quick=True, seconds_per_row=1e-3)
    object.__setattr__(settings, "device", "cuda")
    x = layers.layer_input((2, 8, 4, 4), 0.0, "channels_last", "float32", "cpu")
    row = layers.layer_row(settings, TARGET_LAYER_PEERS, x, "forward+backward", math.inf, notes := [])
    assert notes == [] and row["peers"].keys() == {peer.name for peer in TARGET_LAYER_PEERS}
    assert row["roofline_ms"]["on chip"] == pytest.approx(row["roofline_ms"]["BN"] * 5 / 8)
    assert row["peers"]["FBN+add+ReLU fused"]["to"] == "BN, add, ReLU"


@pytest.mark.parametrize("replays", [True, False])
def test_a_graph_that_leaves_other_bits_is_caught(pretended_gpu, monkeypatch, replays):
    def captured(call):
        call()
        return call if replays else lambda: None

    monkeypatch.setattr(correctness, "captured", captured)
    assert correctness.graph_replays("FBN+add+ReLU", SMALL[0], "contiguous", "float32", "cpu") is replays
