"""Signals in this process: what asks, what stops at once, and whose they are. For runs, see the tools' tests."""

import os
import signal

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
