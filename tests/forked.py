"""Command lines in forks of the tests' process, which has PyTorch imported: a start costs milliseconds, and signals and
exit codes are those of a process of its own.
"""

import multiprocessing.process
import multiprocessing.util
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

__all__ = ["Forked"]


class Forked:
    """A process group that runs ``main(argv)``.

    Args:
        main: a tool's.
        argv: its command line.
        folder: for what it prints.
        before: called first, in the fork, such as for patches.
    """

    def __init__(self, main: Callable, argv: Sequence, folder: Path, before: Callable[[], object] = lambda: None):
        self.files = folder / "stdout", folder / "stderr"
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            self._run(main, [str(each) for each in argv], before)

    def _run(self, main: Callable, argv: list[str], before: Callable[[], object]) -> None:
        code = 1
        try:
            for number, file in enumerate(self.files, 1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            os.environ["PYTHONWARNINGS"] = "ignore"  # of processes that this one starts
            multiprocessing.process._children.clear()  # the tests' own, which cannot be joined here
            # As in a shell: the tests may run in the background, where these are ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            torch.set_num_threads(1)
            before()
            main(argv)
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            multiprocessing.util._exit_function()  # as at Python's own end: no worker is left
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def signal(self, number: int) -> None:
        """Signal the whole group."""
        os.killpg(self.pid, number)

    def wait(self, seconds: float = 120) -> int:
        """Its exit code, a signal's number below 0; the test fails if it has not ended by then."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        self.signal(signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"no end after {seconds} s: {self.error}")

    @property
    def output(self) -> str:
        return self.files[0].read_text()

    @property
    def error(self) -> str:
        """Without what PyTorch logs there about itself."""
        lines = self.files[1].read_text().splitlines(keepends=True)
        return "".join(line for line in lines if not re.match(r"(\[rank\d\]:)?[WI]\d{4} ", line))
