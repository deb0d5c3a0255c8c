"""Signals, as a scheduler, a terminal and ``torchrun`` send them: what stops a tool at once, and what asks a training
to save and leave at its next safe point.

State and handlers only. ``cli.stoppable`` puts them in force and says the sentences; a program that calls the trainers
itself keeps its own handlers.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from types import FrameType
from typing import NoReturn, TypeVar

__all__ = [
    "STOPPED",
    "EvaluationLeft",
    "Terminated",
    "agree",
    "agreed",
    "asked",
    "blocked",
    "deferred",
    "end",
    "end_with_parent",
    "exit_code",
    "handled",
    "interrupted_by",
    "leavable",
    "leave",
    "unblock",
    "unless_asked",
    "until_asked",
]

# The exit code of a run that one of these signals stopped: what a shell makes of SIGTERM.
STOPPED = 128 + signal.SIGTERM

# Slurm's and Kubernetes' signal before SIGKILL; that of a terminal that is closed; and one that `sbatch --signal` may
# be told to send.
_TERMINATING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))

# Seconds in which a signal is the first one's copy: Slurm signals torchrun and its processes, and torchrun these again.
_SAME = 5.0

Value = TypeVar("Value")


class Terminated(KeyboardInterrupt):
    """SIGTERM and its like, where they stop a tool at once."""


class EvaluationLeft(Exception):
    """An evaluation was broken off in every process, as the run is to stop; the next one makes up for it."""


@dataclass
class _State:
    owner: int = 0  # the process that the handlers are for, and not for forks of it
    asked: signal.Signals | None = None
    asked_at: float = 0.0
    agreed: bool = False
    interrupted: signal.Signals | None = None
    interrupted_at: float = 0.0
    deferring: bool = False
    leavable: bool = False


_state = _State()


def asked() -> bool:
    """Whether this process has been asked to save and leave."""
    return _state.asked is not None


def agree(stop: bool) -> None:
    """Note what an exchange told of all processes: whether one of them was asked, see :func:`agreed`."""
    _state.agreed = _state.agreed or stop


def agreed() -> bool:
    """Whether the run is to stop here: every process answers alike after an exchange, see ``distributed.reduce_mean``;
    one alone says whether it was asked."""
    return _state.agreed


def interrupted_by() -> signal.Signals | None:
    """The signal that stops this tool at once, if there was one: whatever is raised after it is its doing."""
    return _state.interrupted


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Put the handlers in force for a block: SIGINT raises KeyboardInterrupt, SIGTERM and its like
    :class:`Terminated`, or in a :func:`deferred` block they ask for a stop.

    A signal that the process was started to ignore, as by ``nohup``, stays ignored. Outside of the main thread, where
    Python gets no signals, nothing changes.
    """
    global _state
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    state_before, _state = _state, _State(owner=os.getpid())
    heard = [each for each in (signal.SIGINT, *_TERMINATING) if signal.getsignal(each) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _on_signal) for number in heard}
    hook, sys.unraisablehook = sys.unraisablehook, _repeat_lost_interrupt
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            # A tool's own for its imports says that nothing has begun; None is one that is not Python's.
            gone = handler is None or hasattr(handler, "until_it_begins")
            signal.signal(number, signal.SIG_DFL if gone else handler)
        _state = state_before


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let SIGTERM and its like in a block only ask for a stop, once: a second one, five seconds or more after the
    first, stops at once, as Ctrl-C always does."""
    before, _state.deferring = _state.deferring, True
    try:
        yield
    finally:
        _state.deferring = before


@contextlib.contextmanager
def blocked(method: str | None = None) -> Iterator[None]:
    """Hold all of these signals back for a block. A process that is started in it does not get them either, until it
    calls :func:`unblock`, or :func:`end_with_parent` in a thread of its own.

    Args:
        method: by which processes are started; None is Python's own.
    """
    if not hasattr(signal, "sigwaitinfo"):  # not on macOS or Windows
        yield
        return
    if (method or multiprocessing.get_start_method()) != "fork":
        resource_tracker.ensure_running()  # whose start would let the signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, *_TERMINATING))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock() -> None:
    """Let signals through in a process that was started in a :func:`blocked` block."""
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, *_TERMINATING))


def end_with_parent() -> None:
    """In a process that was started in a :func:`blocked` block, wait for the SIGTERM of its parent, and end."""
    if hasattr(signal, "sigwaitinfo"):
        parent = multiprocessing.parent_process().pid  # not getppid, which may be that of a server of forks
        while True:
            got = signal.sigwaitinfo((signal.SIGINT, *_TERMINATING))
            if got.si_signo == signal.SIGTERM and got.si_pid == parent:
                os._exit(0)


def until_asked(batches: Iterable[Value]) -> Iterator[Value]:
    """The batches, the first one at least, as long as this process has not been asked to stop."""
    for batch in batches:
        yield batch
        if asked():
            return


def leavable(work: Callable[[], Value]) -> Value | None:
    """What ``work`` gives, or None if this process is asked to stop before that is there, however long a step takes.

    Args:
        work: of this process alone: it exchanges nothing with others, and may be broken off anywhere.
    """
    try:
        try:
            _state.leavable = True
            return None if asked() else work()
        finally:
            _state.leavable = False
    except EvaluationLeft:  # raised by the handler, if late in the line above
        return None


def unless_asked(stops: Iterable[bool]) -> None:
    """Leave the evaluation if one of the processes was asked to stop in it.

    Args:
        stops: of every process, the same everywhere.

    Raises:
        EvaluationLeft: one was.
    """
    if any(stops):
        agree(True)
        raise EvaluationLeft


def _on_signal(number: int, frame: FrameType | None) -> None:
    now, this = time.monotonic(), signal.Signals(number)
    if os.getpid() != _state.owner:  # a fork that somebody else made
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    elif _state.interrupted is not None:
        if now - _state.interrupted_at > _SAME:  # cleaning up takes too long
            end(exit_code(_state.interrupted))
    elif _state.deferring and number != signal.SIGINT and (not asked() or now - _state.asked_at < _SAME):
        if not asked():
            _state.asked, _state.asked_at = this, now
        if _state.leavable:
            raise EvaluationLeft
    else:
        _state.interrupted, _state.interrupted_at = this, now
        raise (KeyboardInterrupt if number == signal.SIGINT else Terminated)


def leave() -> NoReturn:
    """Stop the tool, now that all that is to be saved is.

    Raises:
        Terminated: as if the signal that asked had just come.
    """
    _state.interrupted, _state.interrupted_at = _state.asked or signal.SIGTERM, time.monotonic()
    raise Terminated


def exit_code(number: signal.Signals) -> int:
    """130 for Ctrl-C, as a shell has it; all others have that of SIGTERM."""
    return 130 if number == signal.SIGINT else STOPPED


def end(code: int) -> NoReturn:
    """End this process and those that it has started, without waiting for anything."""
    for process in multiprocessing.active_children():
        process.kill()
    with contextlib.suppress(OSError, RuntimeError):
        sys.stdout.flush()
    os._exit(code)


def _repeat_lost_interrupt(unraisable: "sys.UnraisableHookArgs") -> None:
    """Send a signal again whose exception a destructor or a callback swallowed; such is Python's way."""
    number = _state.interrupted
    if number is None or not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    _state.interrupted = None
    threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
