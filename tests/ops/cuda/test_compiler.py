"""The run-time compiler: its cache, which is never an error, and why there may be no compiler."""

import errno
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

from fbn_plugin.ops.cuda import compiler

SOURCE, DEFINES, ARCH = 'extern "C" __global__ void f(int* p) { *p = VALUE; }', ("VALUE=1",), "sm_90"


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """An empty cache, and nothing known of the compiler."""
    monkeypatch.setenv("FBN_PLUGIN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "_unsaved", {})
    remembered = compiler.missing, compiler.supported
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


@pytest.fixture
def compiled(monkeypatch):
    """What was really compiled: (source, options) each time. No NVRTC is needed."""
    calls = []

    def fake(nvrtc, source, arguments):
        calls.append((source, arguments))
        return f"binary of {source} {arguments}".encode()

    monkeypatch.setattr(compiler, "_nvrtc", lambda: (None, (13, 0)))
    monkeypatch.setattr(compiler, "_compile", fake)
    return calls


def files():
    folder = compiler.folder()
    return sorted(folder.iterdir()) if folder.exists() else []


# --- the cache --------------------------------------------------------------------------------------------------------


def test_compiled_once(compiled):
    first = compiler.compile_cubin(SOURCE, DEFINES, ARCH)
    assert compiler.compile_cubin(SOURCE, DEFINES, ARCH) == first
    assert len(compiled) == 1 and len(files()) == 1
    assert compiled[0][1][-1] == "-DVALUE=1" and "--gpu-architecture=sm_90" in compiled[0][1]


def test_all_that_a_binary_depends_on(compiled, monkeypatch):
    compiler.compile_cubin(SOURCE, DEFINES, ARCH)
    compiler.compile_cubin(SOURCE + " ", DEFINES, ARCH)
    compiler.compile_cubin(SOURCE, ("VALUE=2",), ARCH)
    compiler.compile_cubin(SOURCE, DEFINES, "sm_80")
    monkeypatch.setattr(compiler, "_nvrtc", lambda: (None, (13, 1)))
    compiler.compile_cubin(SOURCE, DEFINES, ARCH)
    monkeypatch.setattr(compiler, "FORMAT", b"another format\n")
    compiler.compile_cubin(SOURCE, DEFINES, ARCH)
    assert len(compiled) == len(files()) == 6


@pytest.mark.parametrize("damage", ["a bit", "cut", "empty", "a folder"])
def test_damaged_file_is_compiled_anew(compiled, damage):
    first = compiler.compile_cubin(SOURCE, DEFINES, ARCH)
    (path,) = files()
    content = bytearray(path.read_bytes())
    if damage == "a folder":
        path.unlink()
        path.mkdir()
        (path / "file").write_text("not empty")
    else:
        content[-3] ^= 1
        path.write_bytes({"a bit": content, "cut": path.read_bytes()[:-5], "empty": b""}[damage])
    assert compiler.compile_cubin(SOURCE, DEFINES, ARCH) == first
    assert compiler.compile_cubin(SOURCE, DEFINES, ARCH) == first
    assert len(compiled) == 2  # the file is mended, or the binary kept in memory


def unwritable(monkeypatch, tmp_path, how):
    def fails(*arguments, **keywords):
        raise OSError(error, os.strerror(error))

    error = {"full": errno.ENOSPC, "read-only": errno.EROFS}.get(how, errno.EACCES)
    if how == "full":
        monkeypatch.setattr(os, "replace", fails)
    elif how == "read-only":
        monkeypatch.setattr(compiler.tempfile, "mkstemp", fails)
    elif how == "no folder":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("FBN_PLUGIN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    else:
        monkeypatch.delenv("FBN_PLUGIN_CACHE_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))


@pytest.mark.parametrize("how", ["full", "read-only", "no folder", "no home"])
def test_without_a_folder_to_write_binaries_stay_in_memory(compiled, monkeypatch, tmp_path, how):
    unwritable(monkeypatch, tmp_path, how)
    first = compiler.compile_cubin(SOURCE, DEFINES, ARCH)
    assert compiler.compile_cubin(SOURCE, DEFINES, ARCH) == first
    assert len(compiled) == 1
    left = list((tmp_path / "cache").iterdir()) if (tmp_path / "cache").exists() else []
    assert not left, "nothing half written stays"


def test_where_the_folder_is(monkeypatch, tmp_path):
    assert compiler.folder() == tmp_path / "cache"
    monkeypatch.delenv("FBN_PLUGIN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert compiler.folder() == Path("/xdg/fbn_plugin")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert compiler.folder() == Path("/home/somebody/.cache/fbn_plugin")


def test_the_folder_does_not_grow_without_end(compiled, monkeypatch):
    monkeypatch.setattr(compiler, "MOST_FILES", 8)
    for value in range(8):
        compiler.compile_cubin(SOURCE, (f"VALUE={value}",), ARCH)
        for path in files():  # as if an hour had gone by
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 3600))
    stale = compiler.folder() / "x.tmp"
    stale.write_text("")
    os.utime(stale, (0, 0))
    compiler.compile_cubin(SOURCE, ("VALUE=0",), ARCH)  # used again: the youngest
    assert len(compiled) == 8
    compiler.compile_cubin(SOURCE, ("VALUE=8",), ARCH)
    assert len(files()) == 9 - 8 // 4 and not stale.exists()
    compiler.compile_cubin(SOURCE, ("VALUE=0",), ARCH)
    assert len(compiled) == 9
    compiler.compile_cubin(SOURCE, ("VALUE=1",), ARCH)
    assert len(compiled) == 10, "the oldest was to go"


def test_threads_compile_a_binary_once(compiled, monkeypatch):
    barrier, results = threading.Barrier(8), []
    monkeypatch.setattr(compiler, "_write", lambda key, cubin: False)

    def work(value):
        barrier.wait()
        results.append(compiler.compile_cubin(SOURCE, (f"VALUE={value % 2}",), ARCH))

    threads = [threading.Thread(target=work, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 2 and len(set(results)) == 2 and len(results) == 8


def test_precompile(compiled):
    compiler.precompile(SOURCE, [((f"VALUE={value}",), arch) for value in range(3) for arch in ("sm_80", "sm_90")])
    assert len(compiled) == len(files()) == 6


WRITER = """
import sys
from fbn_plugin.ops.cuda import compiler
compiler._nvrtc = lambda: (None, (13, 0))
compiler._compile = lambda nvrtc, source, arguments: (source + str(arguments)).encode() * 10000
for round in range(50):
    for path in compiler.folder().glob("*.cubin"):
        path.unlink(missing_ok=True)
    for value in range(3):
        want = compiler._compile(None, "source", compiler.options((f"VALUE={value}",), "sm_90"))
        assert compiler.compile_cubin("source", (f"VALUE={value}",), "sm_90") == want
"""


def test_several_processes_at_once():
    compiler.folder().mkdir(parents=True)
    processes = [subprocess.Popen([sys.executable, "-c", WRITER], stderr=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error.decode()
    assert not [path for path in files() if path.suffix == ".tmp"]


# --- NVRTC ------------------------------------------------------------------------------------------------------------

real = pytest.mark.skipif(compiler.missing() is not None, reason=compiler.missing() or "")


@real
def test_nvrtc_compiles():
    cubin = compiler.compile_cubin(SOURCE, DEFINES, ARCH)
    assert cubin[:4] == b"\x7fELF" and compiler.compile_cubin(SOURCE, DEFINES, ARCH) == cubin
    assert compiler.describe().startswith("NVRTC ")


@real
def test_what_the_compiler_says_of_a_source_that_it_refuses():
    text = r'NVRTC refuses the kernels with .*-DVALUE=1(.|\n)*identifier "VALU" is undefined'
    with pytest.raises(RuntimeError, match=text):
        compiler.compile_cubin(SOURCE.replace("VALUE", "VALU"), DEFINES, ARCH)
    assert not files()


@real
def test_threads_really_compile_at_the_same_time():
    """NVRTC runs without Python's lock: another thread counts on meanwhile."""
    counted, done = 0, threading.Event()

    def count():
        nonlocal counted
        while not done.wait(0.001):
            counted += 1

    thread = threading.Thread(target=count)
    thread.start()
    body = "".join(f"p[{i}] = sinf(p[{i}]) + powf(p[{i + 1}], {i}.f);" for i in range(50))
    compiler.compile_cubin(f'extern "C" __global__ void f(float* p) {{ {body} }}', (), ARCH)
    done.set()
    thread.join()
    assert counted > 20


@pytest.mark.parametrize(
    "capability, arch",
    [((9, 0), "sm_90"), ((8, 0), "sm_80"), ((8, 9), "sm_86"), ((12, 1), "sm_120"), ((7, 5), "sm_75")],
)
def test_architectures(monkeypatch, capability, arch):
    """The card's own, or the nearest below it of the same major number."""
    monkeypatch.setattr(compiler, "supported", lambda: (70, 75, 80, 86, 90, 120))
    assert compiler.architecture(*capability) == arch


@pytest.mark.parametrize("capability", [(7, 0), (10, 0), (11, 0), (6, 1)])
def test_unsupported_architecture(monkeypatch, capability):
    monkeypatch.setattr(compiler, "supported", lambda: (70, 75, 80, 103))
    monkeypatch.setattr(compiler, "_nvrtc", lambda: (None, (12, 8)))
    name = "sm_{}{}".format(*capability)
    text = f"architecture {name} is not among those of NVRTC 12.8: sm_75, sm_80, sm_103"
    with pytest.raises(compiler.Unavailable, match=text):
        compiler.architecture(*capability)


def packages(monkeypatch, nvrtc):
    """``cuda.bindings`` with this module ``nvrtc``; None: not installed."""
    if nvrtc is None:
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        return
    module = types.ModuleType("cuda.bindings")
    module.nvrtc = nvrtc
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", module)
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", nvrtc)


def test_package_missing(monkeypatch):
    packages(monkeypatch, None)
    assert all(text in compiler.missing() for text in ("cuda-bindings", "is not installed", "12.8"))
    assert compiler.describe() == compiler.missing()
    with pytest.raises(compiler.Unavailable, match="cuda-bindings"):
        compiler.compile_cubin(SOURCE, DEFINES, ARCH)


def test_library_missing(monkeypatch):
    def nothing():
        raise RuntimeError("Failure finding libnvrtc.so.13\nand more lines")

    packages(monkeypatch, types.SimpleNamespace(nvrtcVersion=nothing))
    assert compiler.missing() == "NVRTC's library cannot be loaded: Failure finding libnvrtc.so.13"


def test_too_old(monkeypatch):
    packages(monkeypatch, types.SimpleNamespace(nvrtcVersion=lambda: (0, 11, 8)))
    assert compiler.missing() == "NVRTC 11.8 is too old; 12.0 or later is accepted"


def test_package_of_another_version(monkeypatch):
    """One whose functions are not those that we know: a sentence, not an AttributeError."""
    packages(monkeypatch, types.SimpleNamespace())
    assert compiler.missing().startswith("NVRTC's library cannot be loaded")


def test_rocm(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.3", raising=False)
    assert compiler.missing() == "this PyTorch is a ROCm build (6.3), and the CUDA kernels need an NVIDIA card"
