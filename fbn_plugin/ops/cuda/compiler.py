"""CUDA C++ to binaries for a card, at run time, and the cache of these binaries on disk.

The compiler is NVIDIA's NVRTC, reached through NVIDIA's package ``cuda-bindings``, which newer releases of PyTorch for
Linux bring along. Neither needs a card, a driver or another compiler. Both are imported when the first kernel is asked
for, not before.

A binary is kept under a hash of all that it depends on: the source, the options, NVRTC's version and the format of the
file. The folder is ``$FBN_PLUGIN_CACHE_DIR``, else ``fbn_plugin`` in ``$XDG_CACHE_HOME``, else ``~/.cache/fbn_plugin``.
The cache is only ever an economy: a folder that cannot be read, written or made, a full disk and a damaged file cost a
compilation, never an error.
"""

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

OLDEST_NVRTC = (12, 0)  # the first that knows every architecture from sm_75 to sm_90
FORMAT = b"fbn_plugin cubin 1\n"  # opens each file; followed by the SHA-256 of the rest
MOST_FILES = 1024  # binaries that the folder keeps, of 30 to 100 KB each; beyond it the oldest quarter goes

_locks: dict[str, threading.Lock] = {}  # one a binary, so that two threads do not compile the same
_locks_lock = threading.Lock()
_unsaved: dict[str, bytes] = {}  # binaries that the disk did not take


class Unavailable(RuntimeError):
    """CUDA kernels cannot be had here; the message is one sentence that says why."""


def _nvrtc():
    """``cuda.bindings.nvrtc`` and NVRTC's version. Raises ``Unavailable``."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        if getattr(error, "name", None) in ("cuda", "cuda.bindings"):
            raise Unavailable(
                "the package cuda-bindings is not installed: pip install 'cuda-bindings>=12.8' (newer releases of "
                "PyTorch for Linux bring it)"
            ) from error
        raise Unavailable(
            f"the package cuda-bindings, 12.8 or later, is not installed or has no cuda.bindings.nvrtc: {error}"
        ) from error
    except Exception as error:  # a broken installation: whatever its import raises
        raise Unavailable(f"the package cuda-bindings cannot be imported: {type(error).__name__}: {error}") from error
    try:
        error, *version = nvrtc.nvrtcVersion()
    except Exception as error:  # the library is not found (RuntimeError, or an error of cuda-pathfinder's own)
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unavailable(f"NVRTC's library cannot be loaded: {first}") from error
    if int(error):
        raise Unavailable(f"NVRTC does not tell its version: {error}")
    version = tuple(version)
    if version < OLDEST_NVRTC:
        text, oldest = (".".join(map(str, v)) for v in (version, OLDEST_NVRTC))
        raise Unavailable(f"NVRTC {text} is too old; {oldest} or later is accepted")
    return nvrtc, version


@functools.cache
def missing() -> str | None:
    """Why no CUDA kernel can be compiled here: one sentence. None if it can. Found out once."""
    if torch.version.hip is not None:
        return f"this PyTorch is a ROCm build ({torch.version.hip}), and the CUDA kernels need an NVIDIA card"
    try:
        _nvrtc()
    except Unavailable as reason:
        return str(reason)
    return None


def version() -> tuple[int, int]:
    """NVRTC's (major, minor). Raises ``Unavailable``."""
    return _nvrtc()[1]


def describe() -> str:
    """One line: which compiler there is, or why there is none."""
    return missing() or "NVRTC " + ".".join(map(str, version()))


@functools.cache
def supported() -> tuple[int, ...]:
    """The architectures that NVRTC compiles for, as 75 for sm_75, ascending. Raises ``Unavailable``."""
    error, *rest = _nvrtc()[0].nvrtcGetSupportedArchs()
    if int(error):
        raise Unavailable(f"NVRTC does not tell its architectures: {error}")
    return tuple(sorted(rest[0]))


def architecture(major: int, minor: int) -> str:
    """What to compile for on a card of compute capability ``major.minor``: ``"sm_90"``, say.

    The card's own architecture if NVRTC knows it, else the nearest below it of the same major number, whose binaries it
    runs. Raises ``Unavailable`` where there is none.
    """
    fitting = [arch for arch in supported() if arch // 10 == major and arch % 10 <= minor]
    if not fitting or (major, minor) < (7, 5):
        known = ", ".join(f"sm_{arch}" for arch in supported() if arch >= 75)
        text = ".".join(map(str, version()))
        raise Unavailable(f"the card's architecture sm_{major}{minor} is not among those of NVRTC {text}: {known}")
    return f"sm_{fitting[-1]}"


def options(defines: Iterable[str], arch: str) -> tuple[str, ...]:
    """NVRTC's options for the macros ``defines`` (``"NT=256"``) and ``arch`` (``"sm_90"``)."""
    return ("-std=c++17", f"--gpu-architecture={arch}", "-default-device", *(f"-D{define}" for define in defines))


def compile_cubin(source: str, defines: tuple[str, ...], arch: str) -> bytes:
    """The binary of ``source`` for ``arch`` (``"sm_90"``), from the cache or from NVRTC. Any number of threads and
    processes at once.

    Raises ``Unavailable`` where there is no compiler, ``RuntimeError`` with the compiler's log where it refuses the
    source.
    """
    nvrtc, nvrtc_version = _nvrtc()
    arguments = options(defines, arch)
    what = json.dumps([FORMAT.decode(), nvrtc_version, arguments, source])
    key = hashlib.sha256(what.encode()).hexdigest()[:40]
    with _locks_lock:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        cubin = _unsaved.get(key) or _read(key)
        if cubin is None:
            cubin = _compile(nvrtc, source, arguments)
            if not _write(key, cubin):
                _unsaved[key] = cubin
    return cubin


def precompile(source: str, variants: Iterable[tuple[tuple[str, ...], str]], workers: int | None = None) -> None:
    """Fill the cache with ``variants``, pairs of (defines, arch), in ``workers`` threads (default: one a processor).

    NVRTC runs without Python's lock, so that threads do work at the same time.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(lambda variant: compile_cubin(source, *variant), variants):
            pass


def _compile(nvrtc, source: str, arguments: tuple[str, ...]) -> bytes:
    def check(error, *values):
        if int(error):
            raise RuntimeError(f"NVRTC: {error}")
        return values[0] if values else None

    program = check(*nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], []))
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(arguments), [argument.encode() for argument in arguments])
        if int(error):
            log = bytearray(check(*nvrtc.nvrtcGetProgramLogSize(program)))
            check(*nvrtc.nvrtcGetProgramLog(program, log))
            text = log.rstrip(b"\0").decode(errors="replace").strip()
            raise RuntimeError(f"NVRTC refuses the kernels with {' '.join(arguments)} ({error}):\n{text}")
        cubin = bytearray(check(*nvrtc.nvrtcGetCUBINSize(program)))
        check(*nvrtc.nvrtcGetCUBIN(program, cubin))
        return bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


# --- the cache --------------------------------------------------------------------------------------------------------


def folder() -> Path | None:
    """Where binaries are kept; None where the user has no home."""
    if given := os.environ.get("FBN_PLUGIN_CACHE_DIR"):
        return Path(given)
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "fbn_plugin"
    try:
        return Path.home() / ".cache" / "fbn_plugin"
    except RuntimeError:
        return None


def _read(key: str) -> bytes | None:
    """The binary kept as ``key``; None if it is missing or damaged."""
    place = folder()
    if place is None:
        return None
    path = place / f"{key}.cubin"
    try:
        content = path.read_bytes()
    except OSError:
        return None
    start = len(FORMAT) + 32
    cubin = content[start:]
    if content[:start] != FORMAT + hashlib.sha256(cubin).digest():
        return None  # and is written anew
    with contextlib.suppress(OSError):
        os.utime(path)  # the oldest are those that were not used for longest
    return cubin


def _write(key: str, cubin: bytes) -> bool:
    """Keep a binary; whether that worked. A reader sees all of the file or none of it."""
    place, temporary = folder(), None
    if place is None:
        return False
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=place, prefix=key, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(FORMAT + hashlib.sha256(cubin).digest() + cubin)
        os.replace(temporary, place / f"{key}.cubin")
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        return False
    with contextlib.suppress(OSError):
        _tidy(place)
    return True


def _tidy(place: Path) -> None:
    """Remove the binaries that were not used for longest, if there are too many, and what a process that died has
    left.
    """
    files = [
        (entry.stat().st_mtime, entry.path) for entry in os.scandir(place) if entry.name.endswith((".cubin", ".tmp"))
    ]
    kept = sorted(file for file in files if file[1].endswith(".cubin"))
    gone = [path for _, path in kept[: MOST_FILES // 4]] if len(kept) > MOST_FILES else []
    gone += [path for modified, path in files if path.endswith(".tmp") and modified < time.time() - 86400]
    for path in gone:
        with contextlib.suppress(OSError):
            os.unlink(path)
