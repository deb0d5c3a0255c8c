"""The fixture that puts the CUDA backend on the CPU."""

import sys

import emulated as emulation
import pytest

from fbn_plugin.ops.cuda import driver as real
from fbn_plugin.ops.cuda import plan


@pytest.fixture
def emulated(monkeypatch):
    """An ``EmulatedDriver`` in the place of ``fbn_plugin.ops.cuda.driver``: the CUDA backend takes tensors of the CPU.

    Change its ``places``, ``seed``, ``stream`` and ``captures`` at will. ``emulated.replace(card=..., ...)`` puts
    another in its place and returns it. Plans take it that blocks and their waiting cost nothing, so that small sets are
    spread, too.
    """
    if emulation.COMPILER is None:
        pytest.skip("g++ is not installed: the CUDA kernels cannot be run on the CPU")

    for name in ("_START", "_STEP", "_WAIT"):
        monkeypatch.setattr(plan, name, 0.0)

    def install(**options):
        driver = emulation.EmulatedDriver(**options)
        for name, module in list(sys.modules.items()):
            if not name.startswith("fbn_plugin."):
                continue
            if isinstance(getattr(module, "driver", None), (type(real), emulation.EmulatedDriver)):
                monkeypatch.setattr(module, "driver", driver)
        backend = sys.modules["fbn_plugin.ops.cuda"]
        for name, value in list(vars(backend).items()):  # what it remembers of plans and streams belongs to a driver
            if isinstance(value, dict) and name.startswith("_") and name.islower() and not name.startswith("__"):
                monkeypatch.setattr(backend, name, {})
        monkeypatch.setattr(backend, "hosted", {})
        driver.replace = install
        return driver

    return install()
