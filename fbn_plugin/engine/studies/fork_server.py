"""The process that a study's jobs are forked from: it imports what the tool needs, once, and does nothing else, so that
it has no thread and no state that a fork would share. Run as a module, with a socket's number, the tool, and the
modules to import.

Lines of JSON come by the socket: ``{"start": number, "arguments": [...], "environment": {...}, "log": path}`` and
``{"stop": number}``. It answers ``{"ready": threads}`` at first, and ``{"ended": number, "code": code}`` of each job.
When the other end is closed it asks its jobs to stop, and ends after them.
"""

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from typing import Any

from fbn_plugin.engine.studies.processes import end_with_parent

_PATIENCE = 0.05  # seconds after which an ended job is noticed


class _Server:
    """Of this process."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._text = b""
        self._numbers: dict[int, int] = {}  # process -> number

    def send(self, answer: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            self._connection.sendall(f"{json.dumps(answer)}\n".encode())

    def serve(self) -> dict[str, Any] | None:
        """Fork for each request. In the fork, the request; in this process None, at its end."""
        is_open = True
        while is_open or self._numbers:
            self._reap()
            if not is_open:
                select.select([], [], [], _PATIENCE)
                continue
            if not select.select([self._connection], [], [], _PATIENCE)[0]:
                continue
            data = self._connection.recv(2**16)
            if not data:
                is_open = False
                self._stop_all()
            *lines, self._text = (self._text + data).split(b"\n")
            for line in lines:
                request = json.loads(line)
                if "stop" in request:
                    self._stop(request["stop"])
                elif self._fork(request["start"]):
                    return request
        return None

    def _fork(self, number: int) -> bool:
        process = os.fork()
        if process == 0:
            self._connection.close()
            return True
        self._numbers[process] = number
        return False

    def _reap(self) -> None:
        while self._numbers:
            process, status = os.waitpid(-1, os.WNOHANG)
            if process == 0:
                return
            if (number := self._numbers.pop(process, None)) is not None:
                self.send({"ended": number, "code": os.waitstatus_to_exitcode(status)})

    def _stop(self, number: int) -> None:
        for process, each in self._numbers.items():
            if each == number:
                os.kill(process, signal.SIGTERM)  # it is not reaped, so that the number is still its own

    def _stop_all(self) -> None:
        for process in self._numbers:
            os.kill(process, signal.SIGTERM)


def _become(request: dict[str, Any], script: str) -> None:
    """Make of a fork what a process started anew would be."""
    os.setsid()
    end_with_parent()
    nowhere = os.open(os.devnull, os.O_RDONLY)
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for number, file in ((0, nowhere), (1, log), (2, log)):
        os.dup2(file, number)
    os.close(nowhere)
    os.close(log)
    os.environ.update(request["environment"])
    sys.argv = [script, *request["arguments"]]
    sys.path[0] = os.path.dirname(os.path.abspath(script))


def main(arguments: list[str]) -> None:
    """Import, then fork until the socket is closed."""
    number, script, *modules = arguments
    for module in modules:
        with contextlib.suppress(ImportError):  # the tool itself says what it lacks
            importlib.import_module(module)
    server = _Server(socket.socket(fileno=int(number)))
    server.send({"ready": len(os.listdir("/proc/self/task"))})
    request = server.serve()
    if request is None:
        os._exit(0)  # at once, as there is nothing to be tidied
    _become(request, script)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
