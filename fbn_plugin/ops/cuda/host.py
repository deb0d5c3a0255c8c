"""The host's side of the kernels in C++ (``host.cpp``): built once for the PyTorch and the Python that are here, then
found by every process. Without it the same is done in Python, which takes several times as long as a launch, and in a
backward pass waits for Python's lock.

``python -m fbn_plugin.ops.cuda.host`` builds it, with the machine's C++ compiler and no CUDA toolkit. It is kept in the
folder of the kernels' cache (``compiler.py``), under a hash of all that it depends on. Nothing here is needed: where it
cannot be built, loaded or used, a sentence says why (``fbn_plugin.ops.explain``), and Python does the work.
"""

import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

import torch

from fbn_plugin.ops.cuda import compiler, plan
from fbn_plugin.ops.cuda.compiler import Unavailable

COMMAND = "python -m fbn_plugin.ops.cuda.host"
_SOURCE = Path(__file__).with_name("host.cpp")
_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-w")
_LIBRARIES = ("-ltorch_python", "-ltorch_cpu", "-lc10")
_FORMAT = b"fbn_plugin host 1\n"  # closes the file, before the SHA-256 of all before it: loaders do not read so far


@functools.cache
def _key() -> str:
    """A hash of what the library depends on."""
    made_from = (
        _SOURCE.read_text(),
        _FLAGS,
        torch.__version__,
        torch.version.git_version,
        torch.compiled_with_cxx11_abi(),
        sysconfig.get_config_var("SOABI"),
        platform.machine(),
    )
    return hashlib.sha256(repr(made_from).encode()).hexdigest()[:40]


def path() -> Path:
    """Where the library is kept. Raises ``Unavailable`` if the user has no such place."""
    folder = compiler.folder()
    if folder is None:
        raise Unavailable("there is no folder to keep it in: FBN_PLUGIN_CACHE_DIR may name one")
    return folder / f"host_{_key()}.so"


def build() -> Path:
    """Compile the library, in about a quarter of a minute, and keep it; a damaged one is replaced.

    Processes that have not launched a kernel yet will find it.

    Returns:
        Where it is.

    Raises:
        RuntimeError: it cannot be built here, and why.
    """
    place = path()
    given = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("c++") or ""]
    if os.name != "posix" or not shutil.which(given[0]):
        raise Unavailable("there is no C++ compiler: g++ 10 or later, or the one that CXX names")
    python = sysconfig.get_paths()["include"]
    if not (Path(python) / "Python.h").exists():
        raise Unavailable(f"Python's headers are not installed: there is no Python.h in {python}")
    installed = Path(torch.__file__).parent
    includes = [f"-isystem{folder}" for folder in (installed / "include", python)]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            made = Path(folder) / place.name
            command = [*given, *_FLAGS, abi, *includes, str(_SOURCE), "-o", str(made), f"-L{installed / 'lib'}"]
            done = subprocess.run([*command, *_LIBRARIES], capture_output=True, text=True)
            if done.returncode:
                raise Unavailable(f"{given[0]} does not compile {_SOURCE}:\n{done.stderr.strip()[:4000]}")
            content = made.read_bytes()
            made.write_bytes(content + _FORMAT + hashlib.sha256(content).digest())
            made.chmod(0o700)
            os.replace(made, place)
    except OSError as error:
        raise Unavailable(f"it cannot be written to {place.parent}: {error}") from error
    return place


def load() -> ModuleType:
    """The library's module. Raises ``Unavailable``, whose sentence says why there is none."""
    place = path()
    try:
        status = place.stat()
        content = place.read_bytes()
    except OSError:
        raise Unavailable(f"{COMMAND} builds the faster C++") from None
    end = len(content) - len(_FORMAT) - 32
    if end < 0 or content[end:] != _FORMAT + hashlib.sha256(content[:end]).digest():
        raise Unavailable(f"{place} is damaged: {COMMAND} builds it anew")
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        raise Unavailable(f"{place} may be written by others: it is not loaded")
    try:
        loader = ExtensionFileLoader("fbn_plugin.ops.cuda._host", str(place))
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
        loader.exec_module(module)
    except Exception as error:  # whatever a dynamic linker may say
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unavailable(f"{place} cannot be loaded: {first}") from error
    if tuple(head.format for head in (plan.FORWARD, plan.BACKWARD, plan.FINISH)) != module.FORMATS:
        raise Unavailable("host.cpp has other structures of arguments than plan.py")
    return module


def main() -> int:
    """Build the library, and say where it is or why not."""
    try:
        place = build()
        load()
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 1
    print(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
