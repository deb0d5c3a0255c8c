"""Signals in this process: what asks, what stops at once, and whose they are. For runs, see the tools' tests."""

import os
import signal
import subprocess
import sys

import pytest

from fbn_plugin.engine.run import stopping


@pytest.fixture(autouse=True)
def as_in_a_shell():
    """The tests may run in the background, where some signals are ignored."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def send(*numbers):
    for number in numbers:
        signal.raise_signal(number)


def test_signals_stop_at_once_or_ask_in_a_deferred_block():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(stopping.Terminated), stopping.handled():
        send(signal.SIGTERM)
    with stopping.handled(), stopping.deferred():
        send(signal.SIGTERM, signal.SIGTERM, signal.SIGHUP)  # copies of one
        assert stopping.asked() and not stopping.agreed() and stopping.interrupted_by() is None
        assert list(stopping.until_asked([1, 2, 3])) == [1] and stopping.leavable(lambda: 1) is None
        with pytest.raises(stopping.EvaluationLeft):
            stopping.unless_asked([False, True])
        assert stopping.agreed()
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert stopping.interrupted_by() == signal.SIGINT
    assert not stopping.asked() and signal.getsignal(signal.SIGTERM) is before


def test_work_that_may_be_left_is_left_in_the_midst_of_it():
    with stopping.handled(), stopping.deferred():
        assert stopping.leavable(lambda: 7) == 7
        assert stopping.leavable(lambda: [send(signal.SIGTERM), pytest.fail("it goes on")]) is None


def test_a_signal_that_is_ignored_stays_so(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stopping.handled():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_fork_of_somebody_elses_dies_as_ever():
    with stopping.handled(), stopping.deferred():
        pid = os.fork()
        if not pid:
            send(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM and not stopping.asked()


def test_an_interrupt_that_a_destructor_swallows_comes_again():
    class Swallows:
        def __del__(self):
            send(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), stopping.handled():
        Swallows()
        signal.pause()


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    with stopping.handled():
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
        with stopping.handled():
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
