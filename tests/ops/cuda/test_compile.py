"""The CUDA kernels compiled for every architecture, without a card: what they occupy is what the plans count with.

All plans of many shapes are made; of the variants that they ask for, so many are compiled that each pair of macros'
values that occurs together is among them for one architecture, and each value for the others. All of them:
FBN_PLUGIN_ALL_VARIANTS=1.
"""

import functools
import itertools
import os
import re
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cards import CARDS
from cubin import Resources, resources

from fbn_plugin.ops.cuda import compiler, driver, plan

pytestmark = pytest.mark.skipif(compiler.missing() is not None, reason=compiler.missing() or "")
if compiler.missing() is None and (left_out := [arch for arch in CARDS if int(arch[3:]) not in compiler.supported()]):
    CARDS = {arch: card for arch, card in CARDS.items() if arch not in left_out}

PAIRS = "sm_90"  # the architecture for which pairs of values are covered
SHAPES = (  # layers of the detectors and classifiers, and shapes whose rows allow no wide loads
    (2, 64, 400, 608),
    (2, 256, 200, 304),
    (2, 512, 100, 152),
    (2, 1024, 50, 76),
    (2, 2048, 25, 38),
    (64, 64, 112, 112),
    (64, 256, 56, 56),
    (64, 1024, 14, 14),
    (64, 2048, 7, 7),
    (16, 512, 7, 7),
    (2, 64, 8, 8),
    (2, 48, 33, 35),
    (128, 512, 1, 1),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAUNCHES = 4  # at a time
STEPS = (plan.FIRST, plan.FILTERED, plan.APPLY)


@functools.cache
def cuts(arch: str) -> dict[plan.Variant, list[plan.Cut]]:
    """What plans for a card ask for: the launches of each variant."""
    asked: dict[plan.Variant, list[plan.Cut]] = {}
    options = [(0, activation, plan.ALL) for activation in (0, 1, 2)]
    options += [(0, 0, phases) for phases in STEPS] + [(32, 0, plan.ALL), (1, 0, plan.ALL)]
    for (n, c, h, w), dtype, last, (groups, activation, phases) in itertools.product(
        SHAPES, DTYPES, (False, True), options
    ):
        if groups and c % groups:
            continue
        shape = plan.Shape(n, c, h * w, dtype, last, groups, 16)
        if plan.refuses(shape):
            continue
        made = plan.make(shape, CARDS[arch], LAUNCHES, activation, phases)
        for cut in made[:3]:
            if cut is not None:
                asked.setdefault(cut.variant, []).append(cut)
    return asked


def covering(variants: Iterable[plan.Variant], together: int) -> list[plan.Variant]:
    """Few variants that have every combination of ``together`` macros' values that occurs."""

    def combinations(variant):
        return set(itertools.combinations(enumerate(variant), together))

    left = {variant: combinations(variant) for variant in sorted(variants)}
    wanted, chosen = set().union(*left.values()), []
    while wanted:
        best = max(left, key=lambda variant: len(left[variant] & wanted))
        wanted -= left.pop(best)
        chosen.append(best)
    return chosen


def chosen(arch: str) -> list[plan.Variant]:
    if os.environ.get("FBN_PLUGIN_ALL_VARIANTS"):
        return sorted(cuts(arch))
    return covering(cuts(arch), 2 if arch == PAIRS else 1)


@pytest.fixture(scope="module")
def compiled():
    """The kernels' resources by architecture and variant. Binaries are kept beside those of other runs."""
    before = os.environ.get("FBN_PLUGIN_CACHE_DIR")
    os.environ["FBN_PLUGIN_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"fbn_plugin_cubins_{os.getuid()}")
    source = driver.source()

    def compile_one(what: tuple[str, plan.Variant]) -> dict[str, Resources]:
        arch, variant = what
        return resources(compiler.compile_cubin(source, variant.defines(), arch))

    wanted = [(arch, variant) for arch in CARDS for variant in chosen(arch)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield dict(zip(wanted, pool.map(compile_one, wanted)))
    if before is None:
        del os.environ["FBN_PLUGIN_CACHE_DIR"]
    else:
        os.environ["FBN_PLUGIN_CACHE_DIR"] = before


def each(compiled, arch):
    """Kernels of an architecture: (variant, name, resources)."""
    for (of, variant), kernels in compiled.items():
        if of == arch:
            assert kernels
            for name, found in kernels.items():
                yield variant, name, found


@pytest.mark.parametrize("arch", CARDS)
def test_no_spills(compiled, arch):
    """Every register that does not suffice is memory traffic, which is what the kernels are to save. (A few numbers that
    are put aside once, for the end, are none.)"""
    spilled = [f"{' '.join(v.defines())} {name}: {r}" for v, name, r in each(compiled, arch) if r.local > 16]
    assert not spilled, "\n".join(spilled)


@pytest.mark.parametrize("arch", CARDS)
def test_static_shared_memory(compiled, arch):
    more = [
        f"{' '.join(v.defines())} {name}: {r}, planned {v.static_shared}"
        for v, name, r in each(compiled, arch)
        if r.static_shared > v.static_shared
    ]
    assert not more, "\n".join(more)


@pytest.mark.parametrize("arch", CARDS)
def test_the_card_holds_what_plans_count_with(compiled, arch):
    """One member of a group can always start: the others of each launch, which wait, leave it a place. A variant of
    which the card holds fewer blocks than its plans count with is refused when it is loaded."""
    card, wrong = CARDS[arch], []
    for variant, name, r in each(compiled, arch):
        if name == "finish_backward":
            continue
        kernel = driver.Kernel(name, 0, 0, r.registers, r.static_shared, r.local)
        room = plan.room_for(card, variant)
        if (places := card.resident(kernel, variant.threads, room.shared)) < room.places:
            wrong.append(f"{' '.join(variant.defines())} {name}: {r}, {places} places, refused")
        for cut in cuts(arch)[variant]:
            waiting = cut.members - 1 if variant.phases != plan.APPLY else 0
            places = card.resident(kernel, variant.threads, cut.dynamic_shared)
            if places <= LAUNCHES * waiting:
                wrong.append(f"{' '.join(variant.defines())} {name}: {r}, {places} places, {cut._replace(packed=b'')}")
    assert not wrong, "\n".join(wrong)


def test_variants_are_covered():
    variants = cuts(PAIRS)
    few = covering(variants, 2)
    assert len(few) < len(variants) / 2
    for a, b in itertools.combinations(range(len(plan.Variant._fields)), 2):
        assert {(v[a], v[b]) for v in few} == {(v[a], v[b]) for v in variants}


# --- reading binaries -------------------------------------------------------------------------------------------------

KNOWN = """
extern "C" __global__ void plain(int* p) { *p = 1; }
extern "C" __global__ void shared(int* p) {
  __shared__ int a[1000];
  a[threadIdx.x] = p[threadIdx.x];
  __syncthreads();
  p[threadIdx.x] = a[999 - threadIdx.x];
}
extern "C" __global__ void __launch_bounds__(1024) spills(float* p) {
  float a[128];
#pragma unroll
  for (int i = 0; i < 128; i++) a[i] = p[i * threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 128; i++) p[threadIdx.x + i * 7] = a[i] * a[(i * 7) % 128];
}
"""


@pytest.mark.parametrize("arch", CARDS)
def test_what_is_read_from_a_binary_is_what_the_assembler_says(arch):
    nvrtc, _ = compiler._nvrtc()
    _, program = nvrtc.nvrtcCreateProgram(KNOWN.encode(), b"known.cu", 0, [], [])
    arguments = [option.encode() for option in (*compiler.options((), arch), "--ptxas-options=-v")]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(arguments), arguments)
    assert not int(error)
    log = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
    nvrtc.nvrtcGetProgramLog(program, log)
    cubin = bytearray(nvrtc.nvrtcGetCUBINSize(program)[1])
    nvrtc.nvrtcGetCUBIN(program, cubin)
    said = {}
    for part in log.decode().split("Compiling entry function ")[1:]:
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        shared = re.search(r"(\d+) bytes smem", part)
        stack = re.search(r"(\d+) bytes stack frame", part)
        said[part.split("'")[1]] = Resources(registers, int(shared[1]) if shared else 0, int(stack[1]))
    assert set(said) == {"plain", "shared", "spills"} and said["spills"].local and said["shared"].static_shared == 4000
    assert resources(bytes(cubin)) == said
