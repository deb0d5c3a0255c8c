"""The Triton kernels compiled for real GPUs where there is none: what the interpreter does not see, such as a type that
the compiler refuses, registers that run out, or values that are read one by one."""

import re

import pytest
import torch

from fbn_plugin.ops import triton
from fbn_plugin.ops.reference import Options, RunningStats

compiler = pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [
    pytest.mark.skipif(triton.missing() is not None, reason=f"no Triton here: {triton.missing()}"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_triton_cuda.py compiles the kernels on the GPU"),
    pytest.mark.skipif(
        not hasattr(compiler.runtime.driver, "set_active") or not hasattr(compiler.runtime.JITFunction, "warmup"),
        reason=f"Triton {triton.version()} cannot compile for a GPU that is not there",
    ),
]


class AbsentGPU:
    """What Triton asks its driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # a cache of kernels for each

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        return compiler.backends.compiler.GPUTarget("cuda", self.capability, 32)


class Compiled:
    """The module of the kernels, which here are compiled as they would be for a launch, but not launched."""

    def __init__(self, module) -> None:
        self.module = module
        self.kernels = {}

    def __getattr__(self, name: str):
        kernel = getattr(self.module, name)

        class Launcher:
            def __getitem__(_, grid):
                return lambda *args, **options: self.kernels.update({name: kernel.warmup(*args, grid=grid, **options)})

        return Launcher()


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    module = Compiled(triton.load_kernels())
    monkeypatch.setattr(triton, "load_kernels", lambda: module)
    return module


# Compute capability, dtype, shape, channels-last, groups, activation, residual, gradient, bytes that a thread reads at
# once: 16 unless the rows are no multiple of that.
CASES = [
    (90, torch.bfloat16, (32, 64, 56, 56), True, 0, "relu", True, "exact", 16),
    (90, torch.float32, (32, 64, 14, 14), False, 0, "silu", True, "paper", 16),
    (80, torch.bfloat16, (8, 64, 14, 14), False, 4, "identity", False, "exact", 8),
    (75, torch.float16, (8, 24, 5, 7, 7), True, 4, "leaky_relu", False, "paper", 16),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)).replace("torch.", ""))
def test_kernels_compile_and_read_wide(case, compiled):
    capability, dtype, shape, channels_last, num_groups, activation, add, mode, width = case
    compiler.runtime.driver.set_active(AbsentGPU(capability))
    x = torch.empty(shape, dtype=dtype, device="meta")
    if channels_last:
        x = x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    weight = None if num_groups and not channels_last else torch.empty(shape[1], device="meta")
    residual = torch.empty_like(x) if add else None
    options = Options(num_groups, 5.0, 1e-5, False, mode, activation, 0.1)
    running = None if num_groups else RunningStats(weight, weight, 0.1, None)
    _, moments = triton.forward(x, weight, weight, residual, running, options)
    triton.backward(torch.empty_like(x), x, weight, weight, residual, moments, options)
    assert len(compiled.kernels) == (8 if num_groups else 9)
    for name, kernel in compiled.kernels.items():
        assert kernel.asm["cubin"], name
        assert kernel.metadata.shared <= 48 << 10, name
        assert ".local" not in kernel.asm["ptx"], f"{name} keeps an array in memory"
    for name in ("measure", "measure_kept", "normalize", "measure_gradient", "input_gradient"):
        reads = re.findall(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", compiled.kernels[name].asm["ptx"])
        assert max(int(vector or 1) * int(bits) // 8 for vector, bits in reads) >= width, name
