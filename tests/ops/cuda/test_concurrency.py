"""Launches of the CUDA kernels that run at the same time, in any schedule, and under sanitizers."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import emulated as emulation
import pytest
import torch

from fbn_plugin.ops import cuda
from fbn_plugin.ops.cuda import plan

pytestmark = pytest.mark.skipif(emulation.COMPILER is None, reason="g++ is not installed")

ROWS = (4, 32, 32, 32)
CASES = {  # shape, dtype, channels-last, groups, activation, residual; sets of several blocks but for the last two
    "planes": ((8, 2, 32, 64), torch.float32, False, 0, "relu", True),
    "planes of bfloat16": ((8, 2, 64, 64), torch.bfloat16, False, 0, "silu", True),
    "rows": (ROWS, torch.bfloat16, True, 0, "leaky_relu", True),
    "rows of float": (ROWS, torch.float32, True, 0, "identity", False),
    "group form": ((2, 4, 64, 64), torch.float32, False, 1, "identity", False),
    "group form, rows": ((1, 16, 64, 64), torch.float16, True, 2, "identity", False),
    "bundles": ((4, 64, 7, 7), torch.float16, False, 0, "relu", True),
    "lines": ((6, 32), torch.float32, False, 4, "identity", False),
}
UNDER_SANITIZERS = ("planes", "rows", "bundles", "lines")


def tensors(case, seed=0):
    """x, weight, bias, residual or None, gradient, options; sizes that fill their memory to the last byte."""
    shape, dtype, last, num_groups, activation, residual = CASES[case]
    generator = torch.Generator().manual_seed(seed)

    def tensor():
        t = (torch.randn(shape, generator=generator) * 2 + 3).to(dtype)
        return t.to(memory_format=torch.channels_last) if last else t

    weight, bias = torch.rand(2, shape[1], generator=generator)
    options = (num_groups, 2.0, 1e-5, False, "exact", activation, 0.1)
    return tensor(), weight.clone(), bias.clone(), tensor() if residual else None, tensor(), options


def forward(case, seed=0):
    x, weight, bias, residual, _, options = tensors(case, seed)
    return cuda.forward(x, weight, bias, residual, None, options)


def both(case, seed=0):
    """All results of a forward and a backward pass."""
    x, weight, bias, residual, grad, options = tensors(case, seed)
    y, moments = cuda.forward(x, weight, bias, residual, None, options)
    other = None if residual is None else residual if options[5] == "silu" else y
    return [y, moments, *cuda.backward(grad, x, weight, bias, other, moments, options)]


def same(a, b):
    return all((s is None and t is None) or torch.equal(s, t) for s, t in zip(a, b))


def planned(case, emulated):
    shape, dtype, last, num_groups, activation, _ = CASES[case]
    n, c, *spatial = shape
    cut = plan.Shape(n, c, torch.Size(spatial).numel(), dtype, last, num_groups, 16)
    return plan.make(cut, emulated.card(0), 4, cuda._ACTIVATIONS[activation])


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("lines", "bundles")])
def test_the_cases_have_groups_of_several_blocks(emulated, case):
    made = planned(case, emulated)
    assert made.forward.members > 1 and (made.backward.members > 1 or case == "group form")


def test_the_cases_have_every_layout(emulated):
    layouts = {planned(case, emulated).forward.variant.layout for case in CASES}
    assert layouts == {plan.PLANES, plan.ROWS, plan.LINES, plan.BUNDLES}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_any_schedule_gives_the_same_bits(emulated, case, seed):
    want = both(case)
    assert not any(t is not None and t.isnan().any() for t in want)
    emulated.seed = seed
    assert same(both(case), want)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", ["planes", "rows", "group form"])
def test_launches_on_several_streams_at_a_time(emulated, case, seed):
    """Four launches share the places of one: nobody waits for ever, nobody takes another's sums."""
    want = [forward(case, seed=number) for number in range(4)]
    emulated.seed = seed
    with emulated.together():
        got = []
        for emulated.stream in range(4):
            got.append(forward(case, seed=emulated.stream))
    assert all(same(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("case", ["planes", "rows"])
def test_the_argument_holds_for_groups_as_large_as_plans_make_them(emulated, case):
    """The sum over four launches of members - 1, and one place more, are enough; the members are really several."""
    members = planned(case, emulated).forward.members
    want = forward(case)
    emulated.places = 4 * (members - 1) + 1
    for emulated.seed in range(3):
        with emulated.together():
            got = []
            for emulated.stream in range(4):
                got.append(forward(case))
        assert all(same(result, want) for result in got)
    emulated.places = members - 1
    with pytest.raises(emulation.EmulationError, match="deadlock"):
        forward(case)


def test_launches_of_a_stream_share_their_workspace(emulated):
    want = forward("planes")
    with emulated.together():
        got = [forward("planes") for _ in range(3)]
    assert all(same(result, want) for result in got)


def test_threads_have_arguments_of_their_own(emulated):
    """PyTorch calls backward passes from other threads."""
    want = [both("planes", seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda seed: both("planes", seed), range(4)))
    assert all(same(a, b) for a, b in zip(got, want))


# --- sanitizers: every case once, in a process that runs under one ----------------------------------------------------


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_no_sanitizer_finds_anything(emulated, sanitizer, tmp_path):
    environment = emulation.sanitizer_environment(sanitizer, tmp_path / "report")
    if environment is None:
        pytest.skip(f"{emulation.SANITIZERS[sanitizer][0]} is not installed")
    emulated = emulated.replace(card=emulation.TINY._replace(multiprocessors=4))
    for case in UNDER_SANITIZERS:
        both(case)
    emulation.build(emulated.source(), emulated.variants, sanitizer)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600)
    report = "".join(file.read_text() for file in tmp_path.iterdir())
    assert done.returncode == 0 and not report and done.stdout.split() == ["clean"], f"{report}\n{done.stderr}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    cuda.driver = emulation.EmulatedDriver(emulation.TINY._replace(multiprocessors=4), seed=1)  # 8128 fibers at most
    assert os.environ["CUDA_ON_CPU_SANITIZER"]
    for name in UNDER_SANITIZERS:
        both(name)
    for name in ("planes",):
        with cuda.driver.together():
            for cuda.driver.stream in range(2):
                forward(name)
    print("clean")
