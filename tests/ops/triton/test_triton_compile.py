"""The Triton kernels compiled for real GPUs where there is none: what the interpreter does not see, such as a type that
the compiler refuses, registers that run out, or values that are read one by one."""

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from fbn_plugin.ops import triton
from fbn_plugin.ops.reference import Options, RunningStats

compiler = pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [
    pytest.mark.skipif(triton.missing() is not None, reason=f"no Triton here: {triton.missing()}"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py compiles the kernels on the GPU"),
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
        self.launches = []

    def __getattr__(self, name: str):
        kernel = getattr(self.module, name)

        class Launcher:
            def __getitem__(_, grid):
                def launch(*args, **options):
                    self.launches.append(name)
                    self.kernels[name] = kernel.warmup(*args, grid=grid, **options)

                return launch

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
    (90, torch.float32, (2, 64, 400, 608), True, 0, "identity", False, "exact", 16),
    (80, torch.bfloat16, (8, 64, 14, 14), False, 4, "identity", False, "exact", 8),
    (80, torch.float16, (2, 64, 400, 608), True, 4, "silu", True, "exact", 16),
    (75, torch.float16, (8, 24, 5, 7, 7), True, 4, "leaky_relu", False, "paper", 16),
    (75, torch.float32, (64, 3, 512, 512), False, 0, "relu", False, "paper", 16),
]
BIG = ("measure", "measure_kept", "normalize", "measure_gradient", "input_gradient")


def registers(kernel) -> tuple[int, int] | None:
    """Registers of a thread, and bytes of its stack, where what does not fit in registers goes; None if nothing here
    can tell."""
    tool = Path(compiler.backends.__file__).parent / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", out)[1]), int(re.search(r"STACK:(\d+)", out)[1])


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)).replace("torch.", ""))
def test_kernels_compile_and_read_wide(case, compiled):
    capability, dtype, shape, channels_last, num_groups, activation, add, mode, width = case
    compiler.runtime.driver.set_active(AbsentGPU(capability))
    x = torch.empty(shape, dtype=dtype, device="meta")
    if channels_last:
        x = x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    weight = None if num_groups and not channels_last else torch.empty(shape[1], device="meta")
    residual = torch.empty_like(x) if add else None
    statistics = torch.empty(shape[1], device="meta"), torch.empty(shape[1], device="meta")
    num_batches = torch.empty((), dtype=torch.int64, device="meta")
    running = None if num_groups else RunningStats(*statistics, 0.1 if add else None, num_batches)
    options = Options(num_groups, 5.0, 1e-5, False, mode, activation, 0.1)
    _, moments = triton.forward(x, weight, weight, residual, running, options)
    assert compiled.launches == ["measure", "measure_kept", "normalize"]
    triton.backward(torch.empty_like(x), x, weight, weight, residual, moments, options)
    assert compiled.launches[3:] == ["measure_gradient", "input_gradient"]
    if num_groups == 0:
        triton.update_running_stats(running, moments[0], moments[1], moments[4])
    for name, kernel in compiled.kernels.items():
        assert kernel.asm["cubin"], name
        assert kernel.metadata.shared <= 48 << 10, name
        assert ".local" not in kernel.asm["ptx"], f"{name} keeps an array in memory"
    for name in BIG:
        reads = re.findall(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", compiled.kernels[name].asm["ptx"])
        assert max(int(vector or 1) * int(bits) // 8 for vector, bits in reads) >= width, name
        if (used := registers(compiled.kernels[name])) is not None:
            # Up to twelve registers: ptxas takes that to keep a round number of registers, versions differ.
            assert used[1] <= 48, f"{name} spills {used[1]} bytes a thread"
            assert used[0] <= 128, f"two programs of 256 threads to a multiprocessor at least, {name} has {used[0]}"


@pytest.mark.parametrize("channels_last, num_groups", [(False, 0), (True, 0), (True, 4), (False, 4)])
def test_who_adds_up_has_seen_all_sums(channels_last, num_groups, compiled):
    """A program's arrival releases what it has stored, behind a barrier of its threads, and acquires what the others
    have."""
    compiler.runtime.driver.set_active(AbsentGPU(80))
    x = torch.empty((2, 64, 64, 64), device="meta")
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    options = Options(num_groups, 5.0, 1e-5, False, "exact")
    _, moments = triton.forward(x, None, None, None, None, options)
    triton.backward(x, x, None, None, None, moments, options)
    for name in ("measure", "measure_kept", "measure_gradient"):
        ptx = compiled.kernels[name].asm["ptx"]
        arrivals = list(re.finditer(r"atom\.[\w.]*acq_rel[\w.]*\.add", ptx))
        assert arrivals, name
        for arrival in arrivals:
            before = ptx[: arrival.start()]
            assert before.rindex("bar.sync") > before.rindex("st.global"), name
            after = ptx[arrival.end() :]
            assert after.index("bar.sync") < after.index("ld.global"), name
