"""The card as the kernels' plans see it, loading kernels on it, and launching them: NVIDIA's driver API through
``cuda-bindings``.

What is here is what ``tests/ops/cuda/emulated.py`` has as well, so that the rest of the backend runs on a machine
without a card: ``DEVICE_TYPE``, ``on``, ``current_stream``,
``capturing``, ``card``, ``load``, ``launch``, ``reason``, ``describe``, ``addresses``, ``context``.

Everything happens in the primary context of a device, which is the one that PyTorch uses; the calling thread's own
current context is left as it was.
"""

import contextlib
import ctypes
import functools
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from fbn_plugin.ops.cuda import compiler
from fbn_plugin.ops.cuda.compiler import Unavailable

DEVICE_TYPE = "cuda"  # of the tensors whose addresses a launch takes
_FULL = "CUDA_ERROR_OUT_OF_MEMORY"
_REFUSED = (  # what a driver says of a binary that it cannot take; no later call will go better
    "CUDA_ERROR_NO_BINARY_FOR_GPU",
    "CUDA_ERROR_INVALID_IMAGE",
    "CUDA_ERROR_INVALID_SOURCE",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
    "CUDA_ERROR_NOT_SUPPORTED",
)
_ELSEWHERE = (  # what a launch says where the kernel's context is not the calling thread's
    "CUDA_ERROR_INVALID_CONTEXT",
    "CUDA_ERROR_INVALID_HANDLE",
    "CUDA_ERROR_CONTEXT_IS_DESTROYED",
)


class DriverError(RuntimeError):
    """An error code of the driver's; ``name`` is its name, ``CUDA_ERROR_OUT_OF_MEMORY`` say."""

    def __init__(self, call: str, name: str):
        super().__init__(f"{call}: {name}")
        self.name = name


class Kernel(NamedTuple):
    """A kernel that is loaded on a card, and what a thread and a block of it occupy."""

    name: str
    device: int
    handle: int  # CUfunction
    registers: int  # of a thread
    static_shared: int  # bytes of a block, besides the dynamic ones
    local: int  # bytes of a thread in memory for want of registers: 0, or something is wrong


class Card(NamedTuple):
    """What a plan must know of a card. Shared memory in bytes."""

    arch: str  # what is compiled for it: "sm_90"
    multiprocessors: int
    shared_per_block: int  # the most that a block can have: static, dynamic
    shared_per_multiprocessor: int
    shared_reserved: int  # that each block takes besides its own
    registers_per_multiprocessor: int
    threads_per_multiprocessor: int
    blocks_per_multiprocessor: int

    def resident(self, kernel: Kernel, threads: int, dynamic_shared: int) -> int:
        """How many blocks of ``threads`` threads the whole card holds at a time: never too many, for groups wait for
        their members.

        Registers are given out 256 at a time to each warp, in four parts of a multiprocessor over which warps are
        spread evenly; shared memory by 128 bytes. (NVIDIA's ``cuda_occupancy.h`` counts in the same way.)
        """
        warps = -(-threads // 32)
        per_warp = -(-kernel.registers * 32 // 256) * 256
        by_registers = self.registers_per_multiprocessor // 4 // per_warp * 4 // warps
        shared = kernel.static_shared + dynamic_shared
        if shared > self.shared_per_block:
            return 0
        by_shared = self.shared_per_multiprocessor // (-(-(shared + self.shared_reserved) // 128) * 128 or 1)
        by_threads = self.threads_per_multiprocessor // (warps * 32)
        return self.multiprocessors * min(by_registers, by_shared, by_threads, self.blocks_per_multiprocessor)


# --- the driver -------------------------------------------------------------------------------------------------------

_lock = threading.RLock()
_cu = None  # the module cuda.bindings.driver, once it is needed
_cards: dict[int, Card] = {}
_contexts: dict[int, object] = {}
_loaded: dict[tuple[int, tuple[str, ...]], dict[str, Kernel]] = {}
_reasons: dict[tuple, str] = {}  # why not, where no later call will go better


def _api():
    """``cuda.bindings.driver`` with the driver initialized. Raises ``Unavailable``."""
    global _cu
    if _cu is not None:
        return _cu
    if sentence := compiler.missing():
        raise Unavailable(sentence)
    if torch.version.cuda is None:
        raise Unavailable("this PyTorch is built without CUDA")
    try:
        from cuda.bindings import driver
    except Exception as error:
        raise Unavailable(f"cuda.bindings.driver cannot be imported: {type(error).__name__}: {error}") from error
    try:
        (error,) = driver.cuInit(0)
        got, version = driver.cuDriverGetVersion() if not int(error) else (error, 0)
    except Exception as error:  # libcuda.so.1 is not there, or lacks a function
        first = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise Unavailable(f"NVIDIA's driver is not installed or cannot be loaded: {first}") from error
    if int(error) and error.name == "CUDA_ERROR_NO_DEVICE":
        raise Unavailable("NVIDIA's driver sees no GPU (CUDA_ERROR_NO_DEVICE)")
    if int(error) or int(got):
        raise Unavailable(f"NVIDIA's driver does not start: {(error if int(error) else got).name}")
    needed = compiler.version()
    if version // 1000 < needed[0]:
        raise Unavailable(
            f"NVIDIA's driver is too old: it is for CUDA {version // 1000}.{version % 1000 // 10}, and NVRTC "
            f"{needed[0]}.{needed[1]} needs one for CUDA {needed[0]}.0 or later"
        )
    _cu = driver
    return driver


def _call(name: str, *arguments):
    """The driver's function ``name``; what it gives besides its error code. Raises ``DriverError``."""
    error, *values = getattr(_api(), name)(*arguments)
    if int(error):
        raise DriverError(name, error.name)
    return values[0] if values else None


@contextlib.contextmanager
def _context(device: int):
    """Inside, the device's primary context is the calling thread's, and what is loaded does not disturb a graph's
    capture.
    """
    with _lock:
        if device not in _contexts:
            _contexts[device] = _call("cuDevicePrimaryCtxRetain", _call("cuDeviceGet", device))
    _call("cuCtxPushCurrent", _contexts[device])
    try:
        relaxed = _cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        before = _call("cuThreadExchangeStreamCaptureMode", relaxed)
        try:
            yield
        finally:
            _call("cuThreadExchangeStreamCaptureMode", before)
    finally:
        _call("cuCtxPopCurrent")


def card(device: int) -> Card:
    """The card ``device`` (PyTorch's index). Raises ``Unavailable`` or ``DriverError``."""
    if (known := _cards.get(device)) is not None:
        return known
    cu, handle = _api(), _call("cuDeviceGet", device)

    def ask(name):
        attribute = getattr(cu.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(_call("cuDeviceGetAttribute", attribute, handle))

    arch = compiler.architecture(ask("COMPUTE_CAPABILITY_MAJOR"), ask("COMPUTE_CAPABILITY_MINOR"))
    names = (
        "MULTIPROCESSOR_COUNT",
        "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN",
        "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR",
        "RESERVED_SHARED_MEMORY_PER_BLOCK",
        "MAX_REGISTERS_PER_MULTIPROCESSOR",
        "MAX_THREADS_PER_MULTIPROCESSOR",
        "MAX_BLOCKS_PER_MULTIPROCESSOR",
    )
    _cards[device] = Card(arch, *map(ask, names))
    return _cards[device]


_here = contextlib.nullcontext()


def on(device: int) -> contextlib.AbstractContextManager:
    """Inside, ``device`` is PyTorch's current device, as the default stream of another takes no kernels for it."""
    return _here if torch.cuda.current_device() == device else torch.cuda.device(device)


def current_stream(device: int) -> int:
    """The handle of PyTorch's current stream of ``device``, 0 for the default one."""
    return _stream_of(device)


def _public_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


_stream_of: Callable[[int], int] = _public_stream


def use_for_current_stream(stream_of: Callable[[int], int] | None) -> None:
    """A quicker way than the public one, which takes longer than a launch: ``ops/eager.py`` has it. None takes it
    back."""
    global _stream_of
    _stream_of = stream_of or _public_stream


def capturing(device: int) -> bool:
    """Whether the current stream of ``device``, the current device, records a graph."""
    return torch.cuda.is_current_stream_capturing()


@functools.cache
def source() -> str:
    """The kernels."""
    return (Path(__file__).parent / "kernels.cu").read_text()


def kernel_names(text: str) -> list[str]:
    """The kernels that a source may define: each ``extern "C" __global__ void [__launch_bounds__(...)] name(``, in
    order.
    """
    bounds = r"(?:\s+__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\))?"
    return list(dict.fromkeys(re.findall(rf'extern\s+"C"\s+__global__{bounds}\s+void{bounds}\s+(\w+)\s*\(', text)))


def load(device: int, defines: tuple[str, ...]) -> dict[str, Kernel]:
    """The kernels compiled with the macros ``defines`` (``"NT=256"``), by name, on card ``device``; compiled and loaded
    once.

    Raises ``Unavailable`` where that cannot be had here, ``DriverError`` where the card is full, ``RuntimeError`` with
    the compiler's log for a source that it refuses.
    """
    key = device, defines
    if (kernels := _loaded.get(key)) is not None:
        return kernels
    arch = card(device).arch
    cubin = compiler.compile_cubin(source(), defines, arch)
    with _lock, _context(device):
        if key not in _loaded:
            try:
                module = _call("cuModuleLoadData", cubin)
            except DriverError as error:
                if error.name not in _REFUSED:
                    raise
                raise Unavailable(
                    f"NVIDIA's driver does not take what NVRTC compiled for {arch}: {error.name}"
                ) from error
            _loaded[key] = {
                name: kernel for name in kernel_names(source()) if (kernel := _kernel(device, module, name))
            }
    return _loaded[key]


def _kernel(device: int, module, name: str) -> Kernel | None:
    """A kernel of ``module``, ready to be launched with all the shared memory that there is; None if it is not in this
    variant.
    """
    try:
        function = _call("cuModuleGetFunction", module, name.encode())
    except DriverError as error:
        if error.name == "CUDA_ERROR_NOT_FOUND":
            return None
        raise
    attributes = _cu.CUfunction_attribute

    def ask(what):
        return int(_call("cuFuncGetAttribute", getattr(attributes, f"CU_FUNC_ATTRIBUTE_{what}"), function))

    static = ask("SHARED_SIZE_BYTES")
    most = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _call("cuFuncSetAttribute", function, most, card(device).shared_per_block - static)
    # Card.resident counts on all of a multiprocessor's shared memory, of which the driver might leave a part to the L1
    # cache.
    _call("cuFuncSetAttribute", function, attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100)
    return Kernel(name, device, int(function), ask("NUM_REGS"), static, ask("LOCAL_SIZE_BYTES"))


def launch(
    kernel: Kernel,
    grid: int,
    threads: int,
    dynamic_shared: int,
    params: int,
    stream: int,
) -> None:
    """Queue ``grid`` blocks of ``threads`` threads on ``stream``. Raises ``DriverError``.

    Arguments:
        params: address of an array of pointers, one to each argument of the kernel. The driver reads them during the
            call, in which Python's lock is free: another thread must not write there meanwhile.
    """
    arguments = kernel.handle, grid, 1, 1, threads, 1, 1, dynamic_shared, stream, params, 0
    (error,) = _cu.cuLaunchKernel(*arguments)
    if error:
        if error.name not in _ELSEWHERE:
            raise DriverError("cuLaunchKernel", error.name)
        # A thread that PyTorch has not yet given a context, or one whose current device is another.
        with _context(kernel.device):
            _call("cuLaunchKernel", *arguments)


def addresses() -> tuple[int, ...]:
    """Where the driver's functions are that ``host.cpp`` calls, in its order. Raises ``Unavailable``."""
    names = "cuLaunchKernel", "cuCtxGetCurrent", "cuCtxSetCurrent", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"
    try:
        library = ctypes.CDLL("libcuda.so.1")
        functions = [getattr(library, name) for name in (*names, "cuGetErrorName")]
    except (OSError, AttributeError) as error:
        raise Unavailable(f"libcuda.so.1 does not give away its functions: {error}") from error
    return tuple(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)


def context(device: int) -> int:
    """The handle of the context that the kernels of ``device`` are loaded in, which is there once one is."""
    return int(_contexts[device])


def prepare(device: int, variants: list[tuple[str, ...]]) -> None:
    """Compile what :func:`load` will want, side by side. What goes wrong is for :func:`reason` to say."""
    missing = [defines for defines in variants if (device, defines) not in _loaded]
    if len(missing) > 1:
        with contextlib.suppress(Exception):
            arch = card(device).arch
            compiler.precompile(source(), [(defines, arch) for defines in missing])


def reason(device: int, defines: tuple[str, ...] | None = None) -> str | None:
    """Why the kernels of ``defines`` (None: any kernels) cannot be launched on ``device``: one sentence. None if they
    can.

    Never raises. A sentence is remembered unless it may change: a card that is full may have room later.
    """
    key = device, defines
    if key in _loaded:
        return None
    if key in _reasons:
        return _reasons[key]
    try:
        if defines is None:
            card(device)
        else:
            load(device, defines)
        return None
    except DriverError as error:
        if error.name == _FULL:
            return f"the card cuda:{device} is full: no room for the kernels"
        return f"NVIDIA's driver fails on cuda:{device}: {error}"
    except Exception as error:
        _reasons[key] = (str(error).strip() or type(error).__name__).splitlines()[0]
        return _reasons[key]


def describe() -> str:
    """One line: compiler and driver, or why there are none."""
    try:
        version = int(_call("cuDriverGetVersion"))
    except (Unavailable, DriverError) as error:
        return str(error)
    return f"{compiler.describe()}, a driver for CUDA {version // 1000}.{version % 1000 // 10}"
