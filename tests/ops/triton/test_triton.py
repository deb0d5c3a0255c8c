"""Everything about the Triton backend that needs no GPU: its choice, its late import, and its kernels in Triton's
interpreter (``triton_in_interpreter.py``)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fbn_plugin import ops
from fbn_plugin.ops import triton

installed = pytest.mark.skipif(triton.missing() is not None, reason=f"no Triton here: {triton.missing()}")


@installed
def test_kernels_in_the_interpreter():
    file = Path(__file__).with_name("triton_in_interpreter.py")
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-x", "-p", "no:cacheprovider"]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


def test_triton_is_not_imported_before_a_gpu_asks_for_it():
    code = (
        "import sys, torch, fbn_plugin; from fbn_plugin import ops; ops.backends(); ops.explain(torch.ones(2, 2));"
        "print(any(m.split('.')[0] == 'triton' for m in sys.modules));"
        "ops.filtered_batch_norm(torch.randn(4, 2), training=True);"  # PyTorch itself may import it here
        "print('fbn_plugin.ops.triton.kernels' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]


def test_what_is_refused_on_the_cpu(monkeypatch):
    x = torch.randn(2, 4, 3, 3)
    assert triton.refuses(x) == "the tensor is on cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton.refuses(x.double()) == "torch.float64 is not float32, float16 or bfloat16"
    assert triton.refuses(x[:, ::2]) == "the tensor is neither contiguous nor channels-last"
    monkeypatch.setattr(triton, "missing", lambda: "Triton is not installed")
    assert triton.refuses(x) == ops.backends()["triton"] == "Triton is not installed"


@pytest.mark.parametrize("version, reason", [(None, "not installed"), ("3.1.0", "3.1.0 is older than 3.2")])
def test_missing_or_old(version, reason, monkeypatch):
    monkeypatch.setattr(triton, "version", lambda: version)
    assert reason in triton.missing.__wrapped__()


@pytest.mark.parametrize("num_groups", [0, 4])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "shape", [(16, 64, 112, 112), (16, 512, 7, 7), (2, 2048, 25, 38), (256, 64, 112, 112)], ids=str
)
def test_plan_fills_a_card_and_covers_the_input(shape, channels_last, num_groups):
    plan = triton._Plan(torch.Size(shape), channels_last, num_groups, 2)
    tiling = plan.tiling
    assert plan.grid[0] >= 256, "two programs for each of a large card's multiprocessors"
    assert tiling["A"] * tiling["STEPS"] * tiling["tiles_a"] >= tiling["rows"]
    assert tiling["B"] * tiling["tiles_b"] >= tiling["cols"]
    numel = torch.Size(shape).numel()
    blocks = plan.grid[0] // (tiling["tiles_a"] * tiling["tiles_b"])
    assert blocks * tiling["rows"] * tiling["cols"] == plan.sets * plan.set_size == numel
    assert 4 * 5 * plan.slots <= 4 * numel, "the workspace is small"
    last = (blocks - 1) * tiling["block_stride"] + (tiling["rows"] - 1) * tiling["row_stride"] + tiling["cols"] - 1
    assert last == numel - 1
