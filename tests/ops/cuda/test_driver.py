"""Cards, loading and launching, with a driver that is made up: what is asked of it, what becomes of its errors."""

import enum
import os
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
from cards import CARDS

from fbn_plugin.ops.cuda import compiler, driver

Result = enum.IntEnum(
    "CUresult",
    {
        "CUDA_SUCCESS": 0,
        "CUDA_ERROR_OUT_OF_MEMORY": 2,
        "CUDA_ERROR_NO_DEVICE": 100,
        "CUDA_ERROR_INVALID_IMAGE": 200,
        "CUDA_ERROR_INVALID_CONTEXT": 201,
        "CUDA_ERROR_NO_BINARY_FOR_GPU": 209,
        "CUDA_ERROR_NOT_FOUND": 500,
        "CUDA_ERROR_ILLEGAL_ADDRESS": 700,
        "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES": 701,
        "CUDA_ERROR_UNKNOWN": 999,
    },
)
H100 = {
    "COMPUTE_CAPABILITY_MAJOR": 9,
    "COMPUTE_CAPABILITY_MINOR": 0,
    "MULTIPROCESSOR_COUNT": 132,
    "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 232448,
    "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR": 233472,
    "RESERVED_SHARED_MEMORY_PER_BLOCK": 1024,
    "MAX_REGISTERS_PER_MULTIPROCESSOR": 65536,
    "MAX_THREADS_PER_MULTIPROCESSOR": 2048,
    "MAX_BLOCKS_PER_MULTIPROCESSOR": 32,
}
FUNCTION = {"SHARED_SIZE_BYTES": 1088, "NUM_REGS": 60, "LOCAL_SIZE_BYTES": 0}


class Names:
    """An enumeration whose members are their names' ends."""

    def __init__(self, prefix):
        self._prefix = prefix

    def __getattr__(self, name):
        return name.removeprefix(self._prefix)


class FakeDriver(types.SimpleNamespace):
    """``cuda.bindings.driver`` for one H100. ``fails`` maps a function to the error that it gives, once for each
    entry.
    """

    CUdevice_attribute = Names("CU_DEVICE_ATTRIBUTE_")
    CUfunction_attribute = Names("CU_FUNC_ATTRIBUTE_")
    CUstreamCaptureMode = Names("CU_STREAM_CAPTURE_MODE_")

    def __init__(self):
        super().__init__(version=13000, attributes=dict(H100), contexts=["the caller's"], fails={}, calls=[], set={})
        self.functions = ("forward", "backward")

    def __getattribute__(self, name):
        value = object.__getattribute__(self, name)
        if not name.startswith("cu") or not callable(value):
            return value

        def call(*arguments):
            self.calls.append((name, *arguments))
            if self.fails.get(name):
                return (self.fails[name].pop(0), *[0] * name.startswith(("cuModule", "cuDevice", "cuDriver")))
            return value(*arguments)

        call.__name__ = name
        return call

    def cuInit(self, flags):
        return (Result.CUDA_SUCCESS,)

    def cuDriverGetVersion(self):
        return Result.CUDA_SUCCESS, self.version

    def cuDeviceGet(self, index):
        return Result.CUDA_SUCCESS, 100 + index

    def cuDeviceGetAttribute(self, attribute, device):
        return Result.CUDA_SUCCESS, self.attributes[attribute]

    def cuDevicePrimaryCtxRetain(self, device):
        return Result.CUDA_SUCCESS, f"context of {device}"

    def cuCtxPushCurrent(self, context):
        self.contexts.append(context)
        return (Result.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self):
        return Result.CUDA_SUCCESS, self.contexts.pop()

    def cuThreadExchangeStreamCaptureMode(self, mode):
        return Result.CUDA_SUCCESS, "GLOBAL"

    def cuModuleLoadData(self, cubin):
        assert self.contexts[-1] == "context of 100"
        return Result.CUDA_SUCCESS, cubin

    def cuModuleGetFunction(self, module, name):
        if name.decode() not in self.functions:
            return Result.CUDA_ERROR_NOT_FOUND, 0
        return Result.CUDA_SUCCESS, 7000 + self.functions.index(name.decode())

    def cuFuncGetAttribute(self, attribute, function):
        return Result.CUDA_SUCCESS, FUNCTION[attribute]

    def cuFuncSetAttribute(self, function, attribute, value):
        self.set[function, attribute] = value
        return (Result.CUDA_SUCCESS,)

    def cuLaunchKernel(self, *arguments):
        return (Result.CUDA_SUCCESS,)

    def cuLaunchCooperativeKernel(self, *arguments):
        return (Result.CUDA_SUCCESS,)


SOURCE = """
extern "C" __global__ void __launch_bounds__(THREADS, (2048 / THREADS)) forward(const Forward a) {}
extern "C" __global__ void
backward(const Backward a) {}
extern "C" __launch_bounds__(THREADS) __global__ void not_a_kernel_of_ours();
extern "C" __global__ void of_another_variant(int* p) {}
extern "C" __global__ void forward(int* p) {}
"""
DEFINES = ("THREADS=512",)


@pytest.fixture
def fake(monkeypatch):
    """A made-up driver and compiler, nothing loaded yet."""
    made_up = FakeDriver()
    packages = types.ModuleType("cuda.bindings")
    packages.driver = made_up
    packages.nvrtc = types.SimpleNamespace(
        nvrtcVersion=lambda: (0, 13, 0), nvrtcGetSupportedArchs=lambda: (0, [75, 80, 86, 89, 90, 100, 120])
    )
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", packages)
    monkeypatch.setattr(driver, "_cu", None)
    monkeypatch.setattr(compiler.torch.version, "cuda", "13.0")
    for name in ("_cards", "_contexts", "_loaded", "_reasons"):
        monkeypatch.setattr(driver, name, {})
    monkeypatch.setattr(driver, "source", lambda: SOURCE)
    monkeypatch.setattr(compiler, "compile_cubin", lambda *arguments: repr(arguments).encode())
    remembered = compiler.missing, compiler.supported
    for function in remembered:
        function.cache_clear()
    yield made_up
    for function in remembered:
        function.cache_clear()
    assert made_up.contexts == ["the caller's"], "the caller's context is current again"


def test_kernel_names():
    assert driver.kernel_names(SOURCE) == ["forward", "backward", "of_another_variant"]


def test_card(fake):
    card = driver.card(0)
    assert card == CARDS["sm_90"]
    asked = len(fake.calls)
    assert driver.card(0) is card and len(fake.calls) == asked


@pytest.mark.parametrize(
    "arch, registers, static, threads, dynamic, each",
    [  # blocks of a multiprocessor
        ("sm_90", 32, 0, 512, 0, 4),  # threads
        ("sm_90", 40, 0, 512, 0, 3),  # registers: 16384 / 1280 = 12 warps in each of four parts
        ("sm_90", 64, 0, 512, 0, 2),
        ("sm_90", 65, 0, 512, 0, 1),  # as 72
        ("sm_90", 128, 0, 512, 0, 1),
        ("sm_90", 32, 0, 32, 0, 32),  # blocks of a multiprocessor
        ("sm_90", 78, 0, 64, 0, 12),  # 16384 / 2560 = 6 warps in each of four parts, of which a block takes two
        ("sm_90", 32, 1088, 512, 100_000, 2),  # shared memory
        ("sm_90", 32, 1088, 512, 115_712 - 1088, 2),  # to the byte: 2 (113 + 1) KB are 228 KB
        ("sm_90", 32, 1088, 512, 115_713 - 1088, 1),
        ("sm_90", 32, 0, 512, 232_448, 1),
        ("sm_90", 32, 1, 512, 232_448, 0),
        ("sm_75", 32, 0, 512, 32 << 10, 2),
        ("sm_75", 32, 0, 512, 0, 2),
        ("sm_86", 32, 0, 128, 0, 12),
    ],
)
def test_resident_blocks(arch, registers, static, threads, dynamic, each):
    kernel = driver.Kernel("f", 0, 1, registers, static, 0)
    assert CARDS[arch].resident(kernel, threads, dynamic) == CARDS[arch].multiprocessors * each


def test_load(fake):
    kernels = driver.load(0, DEFINES)
    assert kernels == {
        "forward": driver.Kernel("forward", 0, 7000, 60, 1088, 0),
        "backward": driver.Kernel("backward", 0, 7001, 60, 1088, 0),
    }
    assert fake.set[7000, "MAX_DYNAMIC_SHARED_SIZE_BYTES"] == 232448 - 1088
    assert driver.load(0, DEFINES) is kernels
    (loaded,) = (call for call in fake.calls if call[0] == "cuModuleLoadData")
    assert loaded[1] == repr((SOURCE, DEFINES, "sm_90")).encode()
    assert driver.load(0, ("THREADS=256",)) is not kernels
    captures = [call[1] for call in fake.calls if call[0] == "cuThreadExchangeStreamCaptureMode"]
    assert captures == ["RELAXED", "GLOBAL"] * 2, "a graph may be captured meanwhile"


def test_threads_load_once(fake):
    barrier, results = threading.Barrier(6), []

    def work():
        barrier.wait()
        results.append(driver.load(0, DEFINES))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6 and all(result is results[0] for result in results)
    assert sum(call[0] == "cuModuleLoadData" for call in fake.calls) == 1


def test_launch(fake):
    kernel = driver.load(0, DEFINES)["forward"]
    driver.launch(kernel, 1000, 512, 4096, 0xABC, 0xDEF)
    assert fake.calls[-1] == ("cuLaunchKernel", 7000, 1000, 1, 1, 512, 1, 1, 4096, 0xDEF, 0xABC, 0)


def test_launch_that_fails(fake):
    kernel = driver.load(0, DEFINES)["forward"]
    fake.fails["cuLaunchKernel"] = [Result.CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES]
    with pytest.raises(RuntimeError, match="cuLaunchKernel: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"):
        driver.launch(kernel, 1, 512, 0, 0, 0)


def test_launch_from_a_thread_without_a_context(fake):
    """PyTorch gives a thread a context when it first needs one; a kernel may come before."""
    kernel = driver.load(0, DEFINES)["forward"]
    fake.calls.clear()
    fake.fails["cuLaunchKernel"] = [Result.CUDA_ERROR_INVALID_CONTEXT]
    driver.launch(kernel, 1, 512, 0, 0, 0)
    names = [call[0] for call in fake.calls if "Launch" in call[0] or "Ctx" in call[0]]
    assert names == ["cuLaunchKernel", "cuCtxPushCurrent", "cuLaunchKernel", "cuCtxPopCurrent"]
    fake.fails["cuLaunchKernel"] = [Result.CUDA_ERROR_INVALID_CONTEXT] * 2
    with pytest.raises(RuntimeError, match="INVALID_CONTEXT"):
        driver.launch(kernel, 1, 512, 0, 0, 0)


# --- why not: a sentence, never an exception --------------------------------------------------------------------------


def test_all_is_well(fake):
    assert driver.reason(0) is None and driver.reason(0, DEFINES) is None
    assert driver.describe() == "NVRTC 13.0, a driver for CUDA 13.0"


def test_driver_missing(fake):
    def cuInit(flags):
        raise RuntimeError("Failure finding libcuda.so.1. Ensure this and that.\nlong story")

    fake.cuInit = cuInit
    sentence = "NVIDIA's driver is not installed or cannot be loaded: Failure finding libcuda.so.1"
    assert driver.reason(0) == driver.reason(0, DEFINES) == driver.describe() == sentence


def test_package_missing(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert driver.reason(0) == driver.describe()
    assert driver.reason(0).startswith("the package cuda-bindings is not installed: ") and "12.8" in driver.reason(0)


def test_pytorch_without_cuda(fake, monkeypatch):
    monkeypatch.setattr(compiler.torch.version, "cuda", None)
    assert driver.reason(0) == driver.describe() == "this PyTorch is built without CUDA"


def test_no_device(fake):
    fake.fails["cuInit"] = [Result.CUDA_ERROR_NO_DEVICE]
    assert driver.reason(0) == "NVIDIA's driver sees no GPU (CUDA_ERROR_NO_DEVICE)"


def test_driver_that_does_not_start(fake):
    fake.fails["cuInit"] = [Result.CUDA_ERROR_UNKNOWN]
    assert driver.reason(0) == "NVIDIA's driver does not start: CUDA_ERROR_UNKNOWN"


def test_driver_too_old(fake):
    fake.version = 12040
    assert driver.reason(0, DEFINES) == (
        "NVIDIA's driver is too old: it is for CUDA 12.4, and NVRTC 13.0 needs one for CUDA 13.0 or later"
    )


def test_unsupported_architecture(fake):
    fake.attributes.update(COMPUTE_CAPABILITY_MAJOR=7, COMPUTE_CAPABILITY_MINOR=0)
    assert driver.reason(0).startswith("the card's architecture sm_70 is not among those of NVRTC 13.0: sm_75, ")
    asked = len(fake.calls)
    assert driver.reason(0).startswith("the card's") and len(fake.calls) == asked, "it is remembered"


def test_full_card(fake):
    """It may have room later."""
    fake.fails["cuModuleLoadData"] = [Result.CUDA_ERROR_OUT_OF_MEMORY]
    assert driver.reason(0, DEFINES) == "the card cuda:0 is full: no room for the kernels"
    assert driver.reason(0, DEFINES) is None


def test_no_room_for_a_context(fake):
    fake.fails["cuDevicePrimaryCtxRetain"] = [Result.CUDA_ERROR_OUT_OF_MEMORY]
    assert driver.reason(0, DEFINES) == "the card cuda:0 is full: no room for the kernels"
    assert driver.reason(0, DEFINES) is None


@pytest.mark.parametrize("error", [Result.CUDA_ERROR_NO_BINARY_FOR_GPU, Result.CUDA_ERROR_INVALID_IMAGE])
def test_binary_that_the_driver_refuses(fake, error):
    fake.fails["cuModuleLoadData"] = [error]
    sentence = f"NVIDIA's driver does not take what NVRTC compiled for sm_90: {error.name}"
    assert driver.reason(0, DEFINES) == sentence and driver.reason(0, DEFINES) == sentence
    assert driver.reason(0, ("THREADS=256",)) is None, "another variant is another binary"


def test_other_errors_of_the_driver(fake):
    """An error that an earlier kernel has left, say; PyTorch will report it."""
    fake.fails["cuModuleLoadData"] = [Result.CUDA_ERROR_ILLEGAL_ADDRESS]
    assert driver.reason(0, DEFINES) == "NVIDIA's driver fails on cuda:0: cuModuleLoadData: CUDA_ERROR_ILLEGAL_ADDRESS"


def test_source_that_the_compiler_refuses(fake, monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("NVRTC refuses the kernels with -DX:\nkernels.cu(1): error")

    monkeypatch.setattr(compiler, "compile_cubin", refuse)
    assert driver.reason(0, DEFINES) == "NVRTC refuses the kernels with -DX:"


# --- NVIDIA's own package, with a library in the driver's place -------------------------------------------------------

CALLS = """
import ctypes
from fbn_plugin.ops.cuda import compiler, driver

compiler.torch.version.cuda = "13.0"
assert driver.reason(0) is None, driver.reason(0)
assert tuple(driver.card(0)) == tuple({card!r}), driver.card(0)
compiler.compile_cubin = lambda *arguments: b"\\x7fELF and the rest"
driver.source = lambda: {source!r}
kernels = driver.load(0, ("NT=512",))
assert kernels == {{"forward": driver.Kernel("forward", 0, 0x7FFFF0003000, 60, 1088, 0)}}, kernels
value = ctypes.c_int(77)
params = (ctypes.c_void_p * 1)(ctypes.addressof(value))
for stream in (0x4000, 0x7FFFF0005000):  # the first wants a context
    driver.launch(kernels["forward"], 2**31 - 1, 512, 4096, ctypes.addressof(params), stream)
try:
    driver.launch(kernels["forward"], 1, 512, 4096, ctypes.addressof(params), 0)
except driver.DriverError as error:
    assert error.name == "CUDA_ERROR_INVALID_VALUE", error
else:
    raise AssertionError
assert driver.context(0) == 0x1000
first, get, put, push, pop, name = driver.addresses()
integer, pointer = ctypes.c_int, ctypes.c_void_p
where, text = pointer(), ctypes.c_char_p()
for context in (0x1000, None):
    assert ctypes.CFUNCTYPE(integer, pointer)(put)(context) == 0
    assert ctypes.CFUNCTYPE(integer, pointer)(get)(ctypes.addressof(where)) == 0 and where.value == context
assert ctypes.CFUNCTYPE(integer, pointer)(push)(0x1000) == 0
launch = ctypes.CFUNCTYPE(integer, pointer, *[ctypes.c_uint] * 7, pointer, pointer, pointer)(first)
block = ctypes.addressof(params)
assert launch(0x7FFFF0003000, 2**31 - 1, 1, 1, 512, 1, 1, 4096, 0x4000, block, None) == 0
assert ctypes.CFUNCTYPE(integer, pointer)(pop)(ctypes.addressof(where)) == 0 and where.value == 0x1000
assert ctypes.CFUNCTYPE(integer, integer, pointer)(name)(201, ctypes.addressof(text)) == 0
assert text.value == b"CUDA_ERROR_INVALID_CONTEXT"
assert driver.reason(1, ("NT=512",)) == "NVIDIA's driver fails on cuda:1: cuDeviceGet: CUDA_ERROR_INVALID_DEVICE"
compiler.compile_cubin = lambda *arguments: b"no ELF"
assert driver.reason(0, ("NT=64",)).endswith("CUDA_ERROR_INVALID_IMAGE"), driver.reason(0, ("NT=64",))
"""


@pytest.mark.skipif(compiler.missing() is not None, reason=compiler.missing() or "")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_what_reaches_the_driver(tmp_path):
    """Through the installed cuda-bindings: types, order of arguments, numbers of attributes."""
    source = Path(__file__).with_name("stub_driver.c")
    command = ["gcc", "-shared", "-fPIC", "-w", f"-DVERSION={compiler.version()[0] * 1000}", str(source)]
    subprocess.run([*command, "-Wl,-soname,libcuda.so.1", "-o", str(tmp_path / "libcuda.so.1")], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    script = CALLS.format(card=tuple(CARDS["sm_90"]), source=SOURCE)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
