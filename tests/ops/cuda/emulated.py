"""The CUDA kernels on the CPU: their source compiled by g++ with ``cuda_on_cpu.h``, behind the face of
``fbn_plugin.ops.cuda.driver``.

``EmulatedDriver`` takes the place of that module (the fixture ``emulated`` in ``conftest.py`` sees to it), so that the
backend plans, allocates and launches as on a card, with tensors of the CPU. A launch runs at once; those made inside
``together()`` run side by side when it ends, as on several streams. What goes wrong in a kernel is an
``EmulationError``, which says where.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fbn_plugin.ops.cuda import driver as real
from fbn_plugin.ops.cuda.driver import Card, DriverError, Kernel

HEADER = Path(__file__).with_name("cuda_on_cpu.h")
COMPILER = shutil.which("g++")
SANITIZERS = {  # libraries that the test's own process must have been started with (LD_PRELOAD), and g++'s options
    "": ("", ()),
    "thread": ("libtsan.so", ("-fsanitize=thread", "-g1")),
    "address": ("libasan.so", ("-fsanitize=address", "--param=asan-stack=0", "-g1")),
    "undefined": ("", ("-fsanitize=undefined", "-fno-sanitize-recover=all", "-static-libubsan", "-g1")),
}

H100 = Card("sm_90", 132, 232448, 233472, 1024, 65536, 2048, 32)
# Small tensors fill it: groups of several blocks, of which not all are resident, and tiles that are kept in part.
TINY = Card("sm_90", 8, 24 << 10, 48 << 10, 1024, 65536, 2048, 32)

_one_runs = threading.Lock()  # threads may launch at the same time
_ENQUEUE = (ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int)


class EmulationError(RuntimeError):
    """A kernel does what it must not: deadlock, divergence, misaligned access, a write beyond its shared memory."""


def folder() -> Path:
    """Where libraries are kept, by the hash of all that they are made from."""
    given = os.environ.get("CUDA_ON_CPU_DIR")
    path = Path(given) if given else Path(tempfile.gettempdir()) / f"cuda_on_cpu_{os.getuid()}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


@functools.cache
def _fused() -> tuple[str, ...]:
    """Products and sums in one rounding, as NVRTC makes them, where the processor has that."""
    with contextlib.suppress(OSError):
        if " fma " in Path("/proc/cpuinfo").read_text():
            return "-mfma", "-ffp-contract=fast"
    return ()


def library(source: str, defines: tuple[str, ...] = (), sanitizer: str = "") -> Path:
    """The shared library of ``source`` with the macros ``defines``; compiled if it is not there yet."""
    flags = [
        "-std=c++17",
        "-O1",
        "-w",
        "-shared",
        "-fPIC",
        *_fused(),
        *SANITIZERS[sanitizer][1],
        *(f"-D{d}" for d in defines),
    ]
    made_from = "\0".join((source, HEADER.read_text(), *flags, COMPILER, str(os.stat(COMPILER).st_mtime_ns)))
    base = folder() / hashlib.sha256(made_from.encode()).hexdigest()[:24]
    path = base.with_suffix(".so")
    if path.exists():
        return path
    kernels, around = base.with_suffix(".cu"), base.with_suffix(".cpp")
    for file, text in (
        (kernels, source),
        (
            around,
            f'#include "{HEADER}"\nnamespace kernels {{\n#include "{kernels}"\n}}\n'
            + "".join(f"CUDA_ON_CPU_KERNEL({name})\n" for name in kernel_names(source, defines)),
        ),
    ):
        _replace(file, lambda temporary, text=text: Path(temporary).write_text(text))
    _replace(path, lambda temporary: _compile([COMPILER, *flags, str(around), "-o", temporary]))
    return path


@functools.cache
def kernel_names(source: str, defines: tuple[str, ...]) -> tuple[str, ...]:
    """The kernels of a variant: those that are left when the preprocessor has seen its macros."""
    command = [COMPILER, "-E", "-P", "-w", "-x", "c++", *(f"-D{define}" for define in defines), "-"]
    left = _compile(command, source)
    return tuple(real.kernel_names(left))


def _replace(path: Path, write: Callable[[str], object]) -> None:
    """Another process sees all of the file or none of it."""
    temporary = f"{path}.{os.getpid()}.{os.urandom(4).hex()}"
    write(temporary)
    os.replace(temporary, path)


def _compile(command: list[str], source: str | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # a sanitizer's
    done = subprocess.run(command, input=source, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"g++ refuses the kernels: {' '.join(command)}\n{done.stderr[:4000]}")
    return done.stdout


def build(
    source: str, variants: Iterable[tuple[str, ...]], sanitizer: str = "", workers: int | None = None
) -> list[Path]:
    """The libraries of several variants, compiled ``workers`` at a time (default: one a processor)."""
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda defines: library(source, defines, sanitizer), variants))


class _KeepAll(TorchDispatchMode):
    """Holds every tensor that is made, for launches that are still to run: a card's allocator orders that by
    streams.
    """

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        self.kept.append(result)
        return result


class EmulatedDriver:
    """What the backend asks of ``fbn_plugin.ops.cuda.driver``, on the CPU.

    Arguments:
        card: the card that it is to be.
        places: blocks that are resident at a time. None: as many as the card holds of the launch (of each launch, where
        several
            run together: of the one of which it holds fewest).
        seed: 0 runs threads in order; any other number is a random schedule.
        registers, static_shared: of every kernel, for plans that ask.
        source: the kernels; None: ``fbn_plugin/ops/cuda/kernels.cu``.
        sanitizer: "", "thread", "address" or "undefined"; None: what ``$CUDA_ON_CPU_SANITIZER`` says.
        hosted: whether ``host.cpp`` may launch, too.

    Attributes:
        stream: what ``current_stream`` gives. Launches of one stream run one after the other.
        captures: what ``capturing`` gives.
        launched: names of the kernels launched so far.
        from_cpp: how many of them ``host.cpp`` launched, each in a context of ``launched_in``, the last of
            ``contexts``.
        fails: codes that launches of ``host.cpp`` give instead of running, one each.
    """

    DEVICE_TYPE = "cpu"
    Card, Kernel, DriverError, Unavailable = Card, Kernel, DriverError, real.Unavailable

    def __init__(
        self,
        card: Card = TINY,
        places: int | None = None,
        seed: int = 0,
        registers: int = 64,
        static_shared: int = 0,
        source: str | None = None,
        sanitizer: str | None = None,
        hosted: bool = False,
    ):
        self._card, self.places, self.seed = card, places, seed
        self.registers, self.static_shared, self.stream = registers, static_shared, 0
        self.captures = False
        self.fails: list[int] = []
        self._source, self._hosted = source, hosted
        self._sanitizer = os.environ.get("CUDA_ON_CPU_SANITIZER", "") if sanitizer is None else sanitizer
        self._loaded: dict[tuple[str, ...], dict[str, Kernel]] = {}
        self._functions: list[tuple[ctypes.CDLL, Callable, Kernel]] = []  # a kernel's handle is its index here
        self._together: list[tuple[ctypes.CDLL, int]] | None = None  # libraries and places of the launches that wait
        self.launched: list[str] = []
        self.from_cpp, self.contexts, self.launched_in = 0, [], []

    # --- the face of the driver ---

    def source(self) -> str:
        return real.source() if self._source is None else self._source

    def describe(self) -> str:
        return f"emulated on the CPU: {self._card}"

    def reason(self, device: int, defines: tuple[str, ...] | None = None) -> str | None:
        if defines is not None:
            self.load(device, defines)
        return None

    def prepare(self, device: int, variants: list[tuple[str, ...]]) -> None:
        build(self.source(), [defines for defines in variants if defines not in self._loaded], self._sanitizer)

    def on(self, device: int) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def current_stream(self, device: int) -> int:
        return self.stream

    def capturing(self, device: int) -> bool:
        return self.captures

    def card(self, device: int) -> Card:
        return self._card

    def load(self, device: int, defines: tuple[str, ...]) -> dict[str, Kernel]:
        if defines in self._loaded:
            return self._loaded[defines]
        loaded = ctypes.CDLL(str(library(self.source(), defines, self._sanitizer)))
        loaded.cuda_on_cpu_run.restype = ctypes.c_char_p
        kernels = {}
        for name in kernel_names(self.source(), defines):
            enqueue = getattr(loaded, f"{name}_enqueue")
            enqueue.argtypes = _ENQUEUE
            enqueue.restype = None
            handle = len(self._functions)
            kernels[name] = Kernel(name, device, handle, self.registers, self.static_shared, 0)
            self._functions.append((loaded, enqueue, kernels[name]))
        self._loaded[defines] = kernels
        return kernels

    def launch(
        self,
        kernel: Kernel,
        grid: int,
        threads: int,
        dynamic_shared: int,
        params: int,
        stream: int,
        cooperative: bool = False,
    ) -> None:
        places = self._card.resident(kernel, threads, dynamic_shared)
        if not places:
            raise DriverError("cuLaunchKernel", "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")
        if self.places is not None:
            places = self.places
        if cooperative and grid > places:
            raise DriverError("cuLaunchCooperativeKernel", "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE")
        loaded, enqueue, _ = self._functions[kernel.handle]
        with _one_runs:
            enqueue(grid, threads, dynamic_shared, params, stream, cooperative)
            self.launched.append(kernel.name)
            if self._together is None:
                self._run(loaded, places)
            else:
                self._together.append((loaded, places))

    def context(self, device: int) -> int:
        return 1

    def addresses(self) -> tuple[int, ...]:
        if not self._hosted:
            raise real.Unavailable("the emulation has no functions with addresses")

        def launch(handle, gx, gy, gz, bx, by, bz, shared, stream, params, extra):
            if self.fails:
                return self.fails.pop(0)
            self.launched_in.append(self.contexts[-1] if self.contexts else None)
            self.from_cpp += 1
            try:
                self.launch(self._functions[handle or 0][2], gx, bx, shared, params, stream or 0)
            except Exception:
                traceback.print_exc()
                return 999
            return 0

        def get_context(where):
            where[0] = self.contexts[-1] if self.contexts else None
            return 0

        def set_context(context):
            self.contexts[-1:] = [context]
            return 0

        def pop_context(where):
            where[0] = self.contexts.pop()
            return 0

        def push_context(context):
            self.contexts.append(context)
            return 0

        pointer, places = ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
        kinds = {
            launch: (pointer, *(ctypes.c_uint,) * 7, pointer, pointer, pointer),
            get_context: (places,),
            set_context: (pointer,),
            push_context: (pointer,),
            pop_context: (places,),
        }
        self._entries = [ctypes.CFUNCTYPE(ctypes.c_int, *kind)(function) for function, kind in kinds.items()]
        return *(ctypes.cast(entry, pointer).value for entry in self._entries), 0

    # --- what only the emulation has ---

    def _run(self, loaded: ctypes.CDLL, places: int) -> None:
        message = loaded.cuda_on_cpu_run(places, self.seed)
        if message is not None:
            raise EmulationError(message.decode())

    @property
    def variants(self) -> list[tuple[str, ...]]:
        """The macros of the kernels loaded so far."""
        return list(self._loaded)

    @contextlib.contextmanager
    def together(self):
        """The launches made inside run side by side at the end: those of one stream (``stream``) in order, those of
        several at once.

        All must be of one variant (one library). Tensors made inside live until the launches have run.
        """
        self._together = waiting = []
        try:
            with _KeepAll():
                yield
                self._together = None
                if len({id(loaded) for loaded, _ in waiting}) > 1:
                    raise ValueError("launches of several variants cannot run together")
                if waiting:
                    self._run(waiting[0][0], min(places for _, places in waiting))
        finally:
            self._together = None
            for loaded, _ in waiting:
                loaded.cuda_on_cpu_forget()


def params(*values) -> tuple[int, list]:
    """An argument block from ctypes values and tensors: its address, and what must live until the launch."""
    cells = [ctypes.c_void_p(v.data_ptr()) if isinstance(v, torch.Tensor) else v for v in values]
    array = (ctypes.c_void_p * max(1, len(cells)))(*(ctypes.addressof(cell) for cell in cells))
    return ctypes.addressof(array), [array, cells, values]


def preloaded(sanitizer: str) -> bool:
    """Whether this process was started with the sanitizer's library."""
    name = SANITIZERS[sanitizer][0]
    return not name or name in Path("/proc/self/maps").read_text()


def sanitizer_environment(sanitizer: str, log: Path) -> dict[str, str] | None:
    """Variables for a Python process whose kernels run under ``sanitizer``; reports go to ``log`` + ".PID". None: no
    such library.
    """
    name = SANITIZERS[sanitizer][0]
    libraries = [_compile([COMPILER, f"-print-file-name={library}"]).strip() for library in (name, "libstdc++.so.6")]
    if not all(map(os.path.isabs, libraries)):
        return None
    options = f"halt_on_error=1:exitcode=66:log_path={log}"
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),  # of C++, so that the sanitizer sees its exceptions
        "CUDA_ON_CPU_SANITIZER": sanitizer,
        "OMP_NUM_THREADS": "1",  # PyTorch is not instrumented: its own threads would look like races
        "TSAN_OPTIONS": options,
        "ASAN_OPTIONS": options + ":detect_leaks=0:detect_stack_use_after_return=0",
    }
