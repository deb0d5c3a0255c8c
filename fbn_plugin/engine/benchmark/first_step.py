"""How long the first training step of a process takes: with kernels that are still to be compiled, and with a cache of
them on disk.

    python -m fbn_plugin.engine.benchmark.first_step NORM DEVICE MODEL BATCHxHEIGHTxWIDTH

prints the seconds of one step, the model already on its device.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import fbn_plugin

# Where kernels compiled at run time are kept.
CACHES = ("FBN_PLUGIN_CACHE_DIR", "TRITON_CACHE_DIR")


def time_first_step(norm: str, device: str, name: str, size: tuple[int, int, int]) -> float:
    """Seconds of the first step with a model's batch norms replaced by ``norm``."""
    from fbn_plugin.engine.benchmark import models
    from fbn_plugin.engine.benchmark.timing import wall_timer

    model = models.build_model(name)
    if norm != "BN":
        model = fbn_plugin.convert_norm(model, norm)
    step = models.training_step(model, *models.training_data(name, size, device), "contiguous", "float32", device)
    return wall_timer(device)(step)


def _in_a_new_process(
    norm: str, device: str, name: str, size: tuple[int, int, int], cache: str, timeout: float
) -> float:
    """:func:`time_first_step` in a process of its own.

    Raises:
        RuntimeError: it failed, or took longer than ``timeout`` seconds.
    """
    package = str(Path(fbn_plugin.__file__).parents[1])
    environment = {name: os.path.join(cache, name.lower()) for name in CACHES}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", __spec__.name, norm, device, name, "x".join(map(str, size))]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment}
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the first step with {norm} was not over after {timeout:.0f} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"the first step with {norm} failed: {lines[-1]}")
    return float(done.stdout.split()[-1])


def measure_first_step(device: str, name: str, size: tuple[int, int, int], until: float) -> dict:
    """Time first steps, each in a process of its own: BN, FBN with an empty cache, FBN with the cache that this left,
    BN again.

    Returns:
        ``model``, ``batch``, ``image``; ``seconds``, of each; ``extra_seconds``, what FBN's steps take above the mean
        of BN's.

    Raises:
        RuntimeError: one failed, or the time did not suffice.
    """
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as cache:
        for kind, norm in (("BN", "BN"), ("cold", "FBN"), ("warm", "FBN"), ("BN", "BN")):
            timeout = max(30.0, until - time.perf_counter())
            seconds.setdefault(kind, []).append(_in_a_new_process(norm, device, name, size, cache, timeout))
    extra = {kind: seconds[kind][0] - statistics.mean(seconds["BN"]) for kind in ("cold", "warm")}
    return {
        "model": name, "batch": size[0], "image": list(size[1:]), "seconds": seconds, "extra_seconds": extra,
    }  # fmt: skip


def main(argv: Sequence[str]) -> None:
    norm, device, name, size = argv
    print(time_first_step(norm, device, name, tuple(map(int, size.split("x")))))


if __name__ == "__main__":
    main(sys.argv[1:])
