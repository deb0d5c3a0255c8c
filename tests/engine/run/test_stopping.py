"""Handlers are put back as they were; processes of a loader end with the one that wanted them. For all else, see
``tests/tools/test_signals.py``."""

import signal
import subprocess
import sys

import pytest

from fbn_plugin.engine.run.stopping import handled


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    with handled():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert (signal.getsignal(signal.SIGTERM), sys.unraisablehook) == before


def test_a_handler_that_is_not_pythons(monkeypatch):
    """As a library in C puts one, which Python sees as None and cannot put back."""
    put = signal.signal
    given = []

    def first_gives_none(number, handler):
        before = put(number, handler)
        if number != signal.SIGTERM:
            return before
        given.append(handler)
        return None if len(given) == 1 else before

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(signal, "signal", first_gives_none)
    try:
        with handled():
            pass
        assert given[-1] is signal.SIG_DFL
    finally:
        put(signal.SIGTERM, before)


_SERVER_OF_FORKS = """
import multiprocessing, sys
from fbn_plugin.engine.run.stopping import blocked, end_with_parent

with blocked("forkserver"):
    process = multiprocessing.get_context("forkserver").Process(target=end_with_parent, daemon=True)
    process.start()
process.terminate()
process.join(40)
print(process.exitcode)
process.kill()
"""


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="this system has no sigwaitinfo")
def test_a_process_of_a_server_of_forks_ends_with_its_parent():
    done = subprocess.run([sys.executable, "-c", _SERVER_OF_FORKS], capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr
