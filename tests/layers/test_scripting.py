"""TorchScript: a scripted norm computes what the norm computes, trains as it does, and needs this package no more."""

import copy
import io
import os
import subprocess
import sys

import pytest
import torch
from every_norm import CHANNELS, ONE_SIZE, OPTIONS, SPECS, data, layer, layers
from torch import nn

import fbn_plugin
from fbn_plugin import FilteredBatchNorm2d, FilteredBatchNormAct2d, FilteredGroupNorm, SyncFilteredBatchNorm

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")

OURS = [spec for spec in SPECS if spec not in ("SyncBN", *ONE_SIZE)]  # SyncBN, PyTorch's own, does not compile
# Of these TorchScript has the evaluation alone.
EVALUATE_ONLY = ("SyncFBN", "ConvNorm")
TRAINED = [spec for spec in OURS if spec not in EVALUATE_ONLY] + OPTIONS


def scripted(norm):
    """A copy of ``norm`` in TorchScript."""
    return torch.jit.script(copy.deepcopy(norm))


def check_same_step(norm, compiled, x, grad):
    """Outputs, all gradients and all buffers of one pass forward and back."""
    results = []
    for module in (norm, compiled):
        module.zero_grad()
        values = x.clone().requires_grad_()
        y = module(values)
        y.backward(grad)
        results.append((y, values.grad, [p.grad for p in module.parameters()], list(module.buffers())))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("spec", OURS + OPTIONS)
def test_evaluates_as_in_python(spec):
    for norm, x in layers(spec):
        compiled = scripted(norm.eval())
        check_same_step(norm, compiled, x, torch.randn_like(x))
        assert "fbn_plugin::" not in str(compiled.inlined_graph)


@pytest.mark.parametrize("spec", OURS)
def test_files_frozen_and_optimized_forms(spec):
    norm, x = layer(spec).eval(), data(2, 5, 4)
    file = io.BytesIO()
    torch.jit.save(scripted(norm), file)
    file.seek(0)
    forms = [torch.jit.load(file), torch.jit.freeze(scripted(norm)), torch.jit.optimize_for_inference(scripted(norm))]
    for form in forms:
        for _ in range(3):  # the optimizer of TorchScript starts at the second call
            torch.testing.assert_close(form(x), norm(x))
        torch.testing.assert_close(form(data(1, 7, 9)), norm(data(1, 7, 9)))


@pytest.mark.parametrize("spec", TRAINED)
def test_trains_as_in_python(spec):
    for norm, x in layers(spec):
        compiled = scripted(norm.train())
        for seed in range(3):
            torch.manual_seed(seed)
            check_same_step(norm, compiled, x + seed, torch.randn_like(x))
        torch.testing.assert_close(compiled.eval()(x), norm.eval()(x))


@pytest.mark.parametrize("spec", ["FBN(t_sigma=2)", "FGN(num_groups=2, t_sigma=2)", "FLN(t_sigma=1.5)"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_and_memory_formats(spec, dtype):
    norm, x = layer(spec), data(3, 6, 5).to(dtype).contiguous(memory_format=torch.channels_last)
    if dtype == torch.float64:
        norm.double()
    y = scripted(norm)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, norm(x))


@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("training", [False, True])
def test_norm_with_residual_and_activation(activation, training):
    torch.manual_seed(0)
    norm = FilteredBatchNormAct2d(CHANNELS, activation=activation, negative_slope=0.25, t_sigma=2).train(training)
    compiled, x, residual = scripted(norm), data(3, 5, 4), data(3, 5, 4, seed=1)
    check_same_step(norm, compiled, x, torch.randn_like(x))
    for shortcut in (residual, residual[:1]):
        torch.testing.assert_close(compiled(x, shortcut), norm(x, shortcut))
    shortcut = [residual.clone().requires_grad_() for _ in range(2)]
    for module, own in zip((norm, compiled), shortcut):
        module(x, residual=own).square().sum().backward()
    torch.testing.assert_close(shortcut[0].grad, shortcut[1].grad)


@pytest.mark.parametrize("spec", EVALUATE_ONLY)
def test_what_has_no_training_says_so(spec):
    compiled = scripted(layer(spec))
    with pytest.raises(torch.jit.Error, match=f"{spec} does not train in TorchScript"):
        compiled(data(2, 5, 4))
    compiled.eval()(data(2, 5, 4))


def test_a_process_group_does_not_hinder_evaluation():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        norm = SyncFilteredBatchNorm(CHANNELS, process_group=torch.distributed.group.WORLD).eval()
        torch.testing.assert_close(torch.jit.script(norm)(data(2, 3, 3)), norm(data(2, 3, 3)))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "norm, x, message",
    [
        (FilteredBatchNorm2d(4), torch.randn(2, 4, 3), "expected 4D input"),
        (FilteredBatchNorm2d(4), torch.randn(1, 4, 1, 1), "more than 1 value per channel"),
        (SyncFilteredBatchNorm(4).eval(), torch.randn(4), "expected at least 2D input"),
        (FilteredGroupNorm(2, 4, affine=False), torch.randn(2, 5, 3), "num_groups must divide"),
        (FilteredGroupNorm(2, 2), torch.randn(1, 2), "more than 1 value per group"),
        (fbn_plugin.FilteredInstanceNorm2d(4), torch.randn(2, 4, 1, 1), "more than 1 spatial element"),
        (fbn_plugin.FrozenBatchNorm2d(4), torch.randn(2, 4, 3), "expected 4D input"),
        (fbn_plugin.FilterResponseNorm2d(4), torch.randn(2, 5, 3, 3), "expected input of shape"),
        (fbn_plugin.LearnedStatsNorm2d(4), torch.randn(2, 4), "expected input of shape"),
    ],
)
def test_wrong_inputs_are_refused_as_in_python(norm, x, message):
    with pytest.raises(ValueError, match=message):
        norm(x)
    with pytest.raises(torch.jit.Error, match=message):
        torch.jit.script(norm)(x)


@pytest.mark.parametrize("spec", ["FBN", "FGN(num_groups=2)", "FLN", "FIN", "IN(affine=True)", "FFRN", "RBN"])
def test_a_batch_of_no_images(spec):
    for norm in (layer(spec), layer(spec).eval()):
        x = data(0, 5, 4)
        check_same_step(norm, scripted(norm), x, torch.empty_like(x))


# A scripted norm's file, and what it gave: read where nothing of this package can be.
ELSEWHERE = """
import sys
sys.modules["fbn_plugin"] = None
import torch
for path in sys.argv[1:]:
    x, steps, last = torch.load(path + ".results")
    norm = torch.jit.load(path)
    for expected in steps:
        y = norm.train()(x)
        torch.testing.assert_close(y, expected)
    torch.testing.assert_close(norm.eval()(x), last)
    norm.train()(x.requires_grad_()).sum().backward() if steps else None
print("read", len(sys.argv) - 1)
"""


def test_files_run_without_this_package(tmp_path):
    x, paths = data(3, 5, 4), []
    with torch.no_grad():
        for spec in OURS:
            norm, path = layer(spec), str(tmp_path / f"{len(paths)}.pt")
            torch.jit.save(scripted(norm), path)
            steps = [] if spec in EVALUATE_ONLY else [norm(x), norm(x)]
            torch.save((x, steps, norm.eval()(x)), f"{path}.results")
            paths.append(path)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *paths], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.stdout == f"read {len(OURS)}\n", done.stderr


def test_a_model_with_its_norms_fused():
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), FilteredBatchNorm2d(CHANNELS, t_sigma=2), nn.ReLU())
    fused = fbn_plugin.fuse_norm_act(copy.deepcopy(model))
    assert isinstance(fused[1], FilteredBatchNormAct2d)
    x = torch.randn(2, 3, 9, 9)
    for mode in (True, False):
        torch.testing.assert_close(torch.jit.script(fused.train(mode))(x), copy.deepcopy(model).train(mode)(x))
        model.load_state_dict(fused.state_dict())
