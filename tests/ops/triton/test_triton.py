"""Everything about the Triton backend that needs no GPU: its choice, its late import, and its kernels in Triton's
interpreter (``triton_in_interpreter.py``, ``accuracy_in_interpreter.py``)."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fbn_plugin import ops
from fbn_plugin.ops import triton

installed = pytest.mark.skipif(triton.missing() is not None, reason=f"no Triton here: {triton.missing()}")


def interpreter_lacks() -> str | None:
    """Why Triton's interpreter cannot run the kernels here, None if it can."""
    version = tuple(int(part) for part in (triton.version() or "0.0").split(".")[:2])
    if version < (3, 3):
        return "Triton 3.2's interpreter ignores the mask of a single value"
    if version < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return f"the interpreter of Triton {triton.version()} converts arrays to numbers, which NumPy 2.4 ended"
    return None


@installed
@pytest.mark.skipif(interpreter_lacks() is not None, reason=f"{interpreter_lacks()}")
@pytest.mark.parametrize("name", ["triton_in_interpreter.py", "accuracy_in_interpreter.py"])
def test_kernels_in_the_interpreter(name):
    file = Path(__file__).with_name(name)
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
    tiling, (rows, cols, tiles_a, tiles_b, block_stride, row_stride) = plan.tiling, plan.sizes
    assert plan.grid[0] >= 256, "two programs for each of a large card's multiprocessors"
    assert tiling["A"] * tiling["STEPS"] * tiles_a >= rows
    assert tiling["B"] * tiles_b >= cols
    numel = torch.Size(shape).numel()
    blocks = plan.grid[0] // (tiles_a * tiles_b)
    assert blocks * rows * cols == numel
    assert triton._workspace(torch.empty(shape, device="meta"), plan).numel() <= numel, "the workspace is small"
    last = (blocks - 1) * block_stride + (rows - 1) * row_stride + cols - 1
    assert last == numel - 1


@pytest.mark.parametrize("num_groups", [0, 1, 32])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(2, 64, 400, 608), (64, 32, 512, 512), (2, 2048, 25, 38), (8, 100000)], ids=str)
def test_no_program_adds_up_many_thousand_sums(shape, channels_last, num_groups):
    plan = triton._Plan(torch.Size(shape), channels_last or len(shape) == 2, num_groups, 2)
    for sums in (plan.moments, plan.gradients):
        in_chunk = sums.options["CHUNK"] * sums.lanes if sums.chunks else 0
        assert in_chunk <= 1 << 14
        # Of the group form the last program adds up one sum a channel, and few more.
        assert sums.at_last <= max(1 << 13, 4 * plan.units // plan.samples), sums.at_last


def test_counters_of_the_default_stream_are_shared(monkeypatch):
    """Zeroed once, as kernels leave them zero; on other streams, where a graph may be captured, each call's are new."""

    class X:
        device = torch.device("cuda", 0)

        def new_zeros(self, number, dtype):
            return torch.zeros(number, dtype=dtype)

    monkeypatch.setattr(triton, "_default_counters", {})
    monkeypatch.setattr(triton, "_raw_stream", lambda device: 0)
    first = triton._counters(X(), 10)
    assert triton._counters(X(), 20) is first and first.numel() >= 20
    more = triton._counters(X(), first.numel() + 1)
    assert more is not first and triton._counters(X(), 1) is more
    monkeypatch.setattr(triton, "_raw_stream", lambda device: 1234)
    assert triton._counters(X(), 10) is not more and triton._counters(X(), 10) is not triton._counters(X(), 10)
