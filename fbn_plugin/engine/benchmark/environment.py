"""The machine and the versions that figures were measured with."""

import ctypes
import datetime
import importlib.metadata
import os
import platform

import torch

import fbn_plugin
from fbn_plugin import ops
from fbn_plugin.engine.run.run_info import cpu_name


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory, and say whether it does.

    Otherwise the pages of large tensors go back to the system when they are freed and are faulted in again when the
    next is made, at the expense of one peer or another as it happens.
    """
    trim_threshold, mmap_max, never = -1, -4, 2**31 - 1
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(trim_threshold, never) and mallopt(mmap_max, 0))


def machine() -> dict:
    """Hardware, versions, and how busy the machine was."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "fbn_plugin": fbn_plugin.__version__,
        "torch": torch.__version__,
        "backends": ops.backends(),
    }
    for package in ("torchvision", "triton"):
        facts[package] = version(package)
    if hasattr(os, "getloadavg"):
        facts["load_at_start"] = round(os.getloadavg()[0], 2)
    return facts
