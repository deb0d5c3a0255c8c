"""How a job becomes a process: started anew, or forked from one that has imported what takes seconds. Either way it has
its own session, so that Ctrl-C does not reach it, its own log, and is asked to stop when whoever started it dies.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from fbn_plugin.engine.run.cli import UserError
from fbn_plugin.engine.run.stopping import STOPPED

__all__ = ["Forks", "NewProcesses", "Process", "Start", "can_fork", "end_with_parent"]

_PR_SET_PDEATHSIG = 1  # of Linux' prctl
_PATIENCE = 5.0  # seconds in which a process without jobs ends


class Process(Protocol):
    """A job that runs."""

    def poll(self) -> int | None:
        """Its exit code, or of one that a signal ended minus its number; None while it runs."""

    def stop(self) -> None:
        """Ask it to save and leave."""


class Start(Protocol):
    """What starts jobs."""

    def __call__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Process:
        """Run the tool with arguments and variables of the environment; what it says is added to ``log``."""

    def close(self) -> None:
        """Let go of what is held."""


class NewProcesses:
    """Starts the tool anew for each job.

    Args:
        script: the tool.
        ignored: signals that it is to ignore.
    """

    def __init__(self, script: Path, ignored: Sequence[signal.Signals] = ()):
        self.script, self.ignored = script, ignored

    def __call__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> "_Popen":
        with open(log, "ab") as file:
            return _Popen(
                subprocess.Popen(
                    [sys.executable, str(self.script), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **environment},
                    start_new_session=True,
                    preexec_fn=self._prepare if os.name == "posix" else None,
                )
            )

    def _prepare(self) -> None:
        """In the new process."""
        for number in self.ignored:
            signal.signal(number, signal.SIG_IGN)
        if sys.platform == "linux":
            end_with_parent()

    def close(self) -> None:
        """Nothing is held."""


class _Popen:
    def __init__(self, process: subprocess.Popen):
        self._process = process

    def poll(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()


def end_with_parent() -> None:
    """Have Linux send this process SIGTERM when the one that started it dies."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def can_fork() -> bool:
    """Whether jobs may be forked here: on Linux, as elsewhere a fork does not have what the process before it had."""
    return sys.platform == "linux"


class Forks:
    """Forks each job from a process that has imported what the tool needs, see ``fork_server.py``.

    Args:
        script: the tool.
        modules: what to import once.
        environment: variables of the process, which all jobs share.

    Raises:
        RuntimeError: the process cannot be forked safely, as something in it has started threads, or it ended.
    """

    def __init__(self, script: Path, modules: Sequence[str], environment: Mapping[str, str]):
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, "-m", "fbn_plugin.engine.studies.fork_server", str(theirs.fileno()), str(script)]
        self._server = subprocess.Popen(
            [*command, *modules],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, **environment},
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        theirs.close()
        self._text = b""
        self._codes: dict[int, int] = {}
        self._next = 0
        self._is_gone = False
        answers: list[dict] = []
        while not answers and not self._is_gone:
            answers = self._answers()
        self._socket.setblocking(False)
        if answers != [{"ready": 1}]:
            self.close()
            threads = answers[0]["ready"] if answers else "no"
            raise RuntimeError(f"the process that jobs are to be forked from has {threads} threads")

    def _answers(self) -> list[dict]:
        """What has come since the last look."""
        try:
            data = self._socket.recv(2**16)
        except BlockingIOError:
            return []
        except ConnectionError:
            data = b""
        self._is_gone = not data
        *lines, self._text = (self._text + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def __call__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> "_Fork":
        self._next += 1
        request = {"start": self._next, "arguments": list(arguments), "environment": dict(environment), "log": str(log)}
        self._send(request)
        return _Fork(self, self._next)

    def _send(self, request: dict) -> None:
        self._socket.setblocking(True)
        try:
            self._socket.sendall(f"{json.dumps(request)}\n".encode())
        except ConnectionError:
            raise UserError("the process that jobs are forked from has ended; run again, or with --start new") from None
        finally:
            self._socket.setblocking(False)

    def code(self, number: int) -> int | None:
        """The exit code of a job, as ``Process.poll`` has it."""
        if number not in self._codes and not self._is_gone:
            self._codes.update({answer["ended"]: answer["code"] for answer in self._answers()})
        # With the process that forked it gone, the system has asked the job to stop.
        return self._codes.get(number, STOPPED if self._is_gone else None)

    def stop(self, number: int) -> None:
        """Ask a job to stop."""
        if not self._is_gone:
            self._send({"stop": number})

    def close(self) -> None:
        """Let the process end, and jobs that still run be asked to."""
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._server.wait(_PATIENCE)


class _Fork:
    def __init__(self, forks: Forks, number: int):
        self._forks, self._number = forks, number

    def poll(self) -> int | None:
        return self._forks.code(self._number)

    def stop(self) -> None:
        self._forks.stop(self._number)
