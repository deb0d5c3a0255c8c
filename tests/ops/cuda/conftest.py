"""The fixture that puts the CUDA backend on the CPU."""

import sys

import emulated as emulation
import pytest

from fbn_plugin.ops.cuda import driver as real


@pytest.fixture
def emulated(monkeypatch):
    """An ``EmulatedDriver`` in the place of ``fbn_plugin.ops.cuda.driver``: tensors of the CPU go through the CUDA
    backend.

    Change its ``places``, ``seed`` and ``stream`` at will. For another card: ``emulated = emulated.replace(card=...)``.
    """
    if emulation.COMPILER is None:
        pytest.skip("g++ is not installed: the CUDA kernels cannot be run on the CPU")

    def install(**options):
        driver = emulation.EmulatedDriver(**options)
        for name, module in list(sys.modules.items()):
            if name.startswith("fbn_plugin.") and isinstance(
                getattr(module, "driver", None), (type(real), emulation.EmulatedDriver)
            ):
                monkeypatch.setattr(module, "driver", driver)
        forget()
        driver.replace = install
        return driver

    def forget():  # plans hold kernels of the driver before
        backend = sys.modules["fbn_plugin.ops.cuda"]
        if hasattr(backend, "forget"):
            backend.forget()

    yield install()
    forget()
