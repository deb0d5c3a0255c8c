"""The emulation itself: kernels that are right run, broken ones are caught. A backend's tests are worth what this
is.
"""

import ctypes
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulated
import pytest
import torch

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="g++ is not installed")

# Groups of `members` blocks sum `values` numbers each, exchange the sums, and every block writes its group's total.
SOURCE = """
#ifdef __CUDACC__
#error "for the CPU"
#endif
inline void add_release(int* p, int v) { cuda_on_cpu::atomic<__ATOMIC_RELEASE>(p, [=](int old) { return old + v; }); }
inline int load_acquire(const int* p) { return cuda_on_cpu::poll(p); }

extern "C" __global__ void __launch_bounds__(THREADS, 2) group_sum(
    const float* __restrict__ x, float* out, float* partial, int* counters, int members, int groups) {
  extern __shared__ __align__(16) char smem[];
  float* keep = (float*)smem;
  __shared__ float of_warp[THREADS / 32], total;
  __shared__ int ticket, last;
  if (threadIdx.x == 0) ticket = atomicAdd(counters, 1);
  __syncthreads();
  int group = ticket / members, lane = threadIdx.x % 32;
  keep[threadIdx.x] = __ldcs(x + ticket * THREADS + threadIdx.x);
  float v = keep[threadIdx.x];
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  if (lane == 0) of_warp[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int w = 0; w < THREADS / 32; w++) sum += of_warp[w];
    partial[ticket] = sum;
    add_release(counters + 2 + group, 1);
    while (load_acquire(counters + 2 + group) < members) {}
    total = 0;
    for (int m = 0; m < members; m++) total += __ldcg(partial + group * members + m);
  }
  __syncthreads();
  __stcs(out + ticket * THREADS + threadIdx.x, keep[threadIdx.x] + total);
  __syncthreads();
  if (threadIdx.x == 0) { __threadfence(); last = atomicAdd(counters + 1, 1) == groups * members - 1; }
  __syncthreads();
  if (last) for (int i = threadIdx.x; i < 2 + groups; i += THREADS) counters[i] = 0;
}
"""
THREADS, GROUPS, MEMBERS = 64, 3, 4
DEFINES = (f"THREADS={THREADS}",)


class Sum:
    """Arguments and results of ``group_sum``."""

    def __init__(self, driver, groups=GROUPS, members=MEMBERS):
        self.driver, self.groups, self.members = driver, groups, members
        self.x = (
            torch.arange(groups * members * THREADS, dtype=torch.float32).remainder(7).view(groups, members, THREADS)
        )
        self.out = torch.full_like(self.x, torch.nan)
        self.partial, self.counters = (
            torch.full((groups * members,), torch.nan),
            torch.zeros(2 + groups, dtype=torch.int32),
        )

    def launch(self, cooperative=False, dynamic=THREADS * 4, grid=None):
        block, keep = emulated.params(
            *(self.x, self.out, self.partial, self.counters), ctypes.c_int(self.members), ctypes.c_int(self.groups)
        )
        kernel = self.driver.load(0, DEFINES)["group_sum"]
        grid = self.groups * self.members if grid is None else grid
        self.driver.launch(kernel, grid, THREADS, dynamic, block, self.driver.stream, cooperative)
        del keep  # the values were copied

    def check(self):
        assert torch.equal(self.out, self.x + self.x.sum((1, 2), keepdim=True))
        assert not self.counters.any()


def driver(source=SOURCE, **options):
    return emulated.EmulatedDriver(emulated.H100, source=source, sanitizer="", **options)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("places", [MEMBERS, MEMBERS + 1, GROUPS * MEMBERS])
def test_right_kernel(places, seed):
    case = Sum(driver(places=places, seed=seed))
    case.launch()
    case.check()


def test_too_few_places_are_a_deadlock():
    with pytest.raises(
        emulated.EmulationError, match=r"deadlock: nobody can go on; the 3 resident blocks:\n.*polling, value 3"
    ):
        Sum(driver(places=MEMBERS - 1)).launch()


@pytest.mark.parametrize("places, enough", [(2 * (MEMBERS - 1), False), (2 * (MEMBERS - 1) + 1, True)])
def test_two_launches_at_a_time(places, enough):
    """Each holds at most members - 1 places while it waits: one more lets somebody go on."""
    emulation = driver(places=places)
    cases = [Sum(emulation), Sum(emulation)]

    def together():
        with emulation.together():
            for emulation.stream, case in enumerate(cases):
                case.launch()

    if enough:
        together()
        for case in cases:
            case.check()
    else:
        with pytest.raises(emulated.EmulationError, match=r"deadlock(.|\n)*launch 0(.|\n)*launch 1"):
            together()


@pytest.mark.parametrize("seed", range(3))
def test_launches_of_one_stream_follow_each_other(seed):
    """The second reads what the first has written, and both have the same counters."""
    emulation = driver(places=50, seed=seed)
    first, second = Sum(emulation), Sum(emulation)
    with emulation.together():
        first.launch()
        second.x, second.counters, second.partial = first.out, first.counters, first.partial
        second.launch()
    first.check()
    second.check()


def test_cooperative_launches():
    """All or nothing: two that need seven places each end with ten, where plain ones would fill them and wait for
    ever.
    """
    emulation = driver(places=10)
    cases = [Sum(emulation, 1, 7), Sum(emulation, 1, 7)]
    with emulation.together():
        for emulation.stream, case in enumerate(cases):
            case.launch(cooperative=True)
    for case in cases:
        case.check()
    with pytest.raises(RuntimeError, match="COOPERATIVE_LAUNCH_TOO_LARGE"):
        Sum(emulation, 1, 11).launch(cooperative=True)
    plain = [Sum(emulation, 1, 7), Sum(emulation, 1, 7)]
    with pytest.raises(emulated.EmulationError, match="deadlock"), emulation.together():
        for emulation.stream, case in enumerate(plain):
            case.launch()


def test_tensors_live_until_launches_made_together_have_run():
    emulation = driver()
    with emulation.together():
        for _ in range(3):
            Sum(emulation).launch()
    assert emulation.launched == ["group_sum"] * 3


def test_a_launch_that_the_card_cannot_hold():
    with pytest.raises(RuntimeError, match="LAUNCH_OUT_OF_RESOURCES"):
        Sum(driver()).launch(dynamic=emulated.H100.shared_per_block + 1)


BROKEN = {  # what is replaced, by what, what is found in one of a few schedules
    "no barrier before the sums are read": (
        "of_warp[threadIdx.x / 32] = v;\n  __syncthreads();",
        "of_warp[threadIdx.x / 32] = v;",
        "wrong",
    ),
    "no barrier after the ticket": (
        "ticket = atomicAdd(counters, 1);\n  __syncthreads();",
        "ticket = atomicAdd(counters, 1);",
        "wrong|died",
    ),
    "waits for one too few": ("< members) {}", "< members - 1) {}", "wrong"),
    "waits for one too many": ("< members) {}", "< members + 1) {}", "deadlock"),
    "never arrives": ("    add_release(counters + 2 + group, 1);\n", "", "deadlock"),
    "barrier in a branch": (
        "  __syncthreads();\n  __stcs",
        "  if (lane < 16) __syncthreads();\n  __stcs",
        "divergence",
    ),
    "returns before a barrier": (
        "  __syncthreads();\n  __stcs",
        "  if (lane == 3) return;\n  __syncthreads();\n  __stcs",
        "divergence",
    ),
    "shuffle in a branch": ("v += __shfl", "if (lane < 16) v += __shfl", "divergence"),
    "mask without the source": ("__shfl_xor_sync(~0u", "__shfl_xor_sync(0xFFFFu", "not in the mask"),
    "beyond its shared memory": (
        "keep[threadIdx.x] = __ldcs",
        "keep[threadIdx.x + 1] = __ldcs",
        "write past the dynamic shared memory",
    ),
    "reads what nobody wrote": ("total = 0;", "", "wrong"),
    "misaligned load": (
        "__ldcs(x +",
        "__ldcs((const float*)((const char*)x + 2) +",
        "misaligned load, thread .*, line 17",
    ),
    "counters left behind": ("i < 2 + groups", "i < 1 + groups", "wrong"),
    "a loop that nobody can see": (
        "while (load_acquire(counters + 2 + group) < members) {}",
        "while (*(volatile int*)(counters + 2 + group) < members) {}",
        "does not end",
    ),
}


def outcome(source, seed):
    """What becomes of a kernel, in a process of its own: a broken one may write anywhere."""
    r, w = os.pipe()
    child = os.fork()
    if not child:
        try:
            case = Sum(driver(source, places=GROUPS * MEMBERS, seed=seed))
            case.launch()
            case.check()
            text = "right"
        except AssertionError:
            text = "wrong"
        except BaseException as error:
            text = str(error)
        os.write(w, text.encode())
        os._exit(0)
    os.close(w)
    with os.fdopen(r) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text or "died"


@pytest.fixture(scope="module")
def broken():
    """The broken sources by name, compiled several at a time."""
    sources = {name: SOURCE.replace(old, new) for name, (old, new, _) in BROKEN.items()}
    assert SOURCE not in sources.values(), "a change changes nothing"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source: emulated.library(source, DEFINES), sources.values()))
    return sources


@pytest.mark.parametrize("name", BROKEN)
def test_broken_kernel_is_caught(broken, name, monkeypatch):
    found = BROKEN[name][-1]
    if name == "a loop that nobody can see":
        monkeypatch.setitem(globals(), "DEFINES", (*DEFINES, "CUDA_ON_CPU_PATIENCE=1"))
    texts = []
    for seed in range(5):
        texts.append(outcome(broken[name], seed))
        if re.search(found, texts[-1]):
            return
        assert texts[-1] in ("right", "wrong", "died"), texts
    pytest.fail(f"not found: {texts}")


UNDER_SANITIZER = {  # what is replaced, by what; right on a CPU in every schedule, or nearly
    "thread": {
        "right": ("", ""),
        "arrives without release": (
            "    add_release(counters + 2 + group, 1);",
            "    atomicAdd(counters + 2 + group, 1);",
        ),
        "waits without acquire": ("load_acquire(counters", "cuda_on_cpu::poll<__ATOMIC_RELAXED>(counters"),
        "no fence before the last atomic": ("{ __threadfence(); last", "{ last"),
        "a count that is not atomic": (
            "last = atomicAdd(counters + 1, 1) == groups * members - 1",
            "last = ++counters[1] == groups * members",
        ),
        "no barrier before the sums are read": BROKEN["no barrier before the sums are read"][:2],
    },
    "address": {
        "right": ("", ""),
        "reads one value beyond": (
            "__ldcs(x + ticket * THREADS + threadIdx.x)",
            "__ldcs(x + ticket * THREADS + threadIdx.x + 1)",
        ),
        "writes before its sums": ("partial[ticket] = sum", "partial[ticket - 1] = sum"),
    },
}
CASE = Path(__file__).with_name("sanitized_case.py")


@pytest.mark.parametrize("sanitizer", UNDER_SANITIZER)
def test_sanitizers_find_what_schedules_cannot(sanitizer, tmp_path):
    if emulated.sanitizer_environment(sanitizer, tmp_path / "report") is None:
        pytest.skip(f"{emulated.SANITIZERS[sanitizer][0]} is not installed")
    sources = {
        name: SOURCE.replace(*change) if change[0] else SOURCE for name, change in UNDER_SANITIZER[sanitizer].items()
    }
    assert len(set(sources.values())) == len(sources), "a change changes nothing"

    def run(name):
        library = emulated.library(sources[name], DEFINES, sanitizer)
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        command = [sys.executable, "-S", "-E", str(CASE), str(library), str(GROUPS), str(MEMBERS), str(THREADS)]
        environment = emulated.sanitizer_environment(sanitizer, folder / "report")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        return done.returncode, "".join(file.read_text() for file in folder.iterdir()), done.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = dict(zip(sources, pool.map(run, sources)))
    kind = {"thread": "data race", "address": "heap-buffer-overflow"}[sanitizer]
    for name, (code, report, stderr) in outcomes.items():
        if name == "right":
            assert (code, report) == (0, ""), f"{name}: {code}\n{report}\n{stderr}"
        else:
            assert code == 66 and kind in report and ".cu:" in report, f"{name}: {code}\n{report}\n{stderr}"
