"""Hostile input in a process of its own, with a limit to its time and memory, so that a crash, a hang or a traceback is
an outcome that a test can name and not the end of the tests.
"""

import contextlib
import multiprocessing
import resource
import signal
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Outcome", "assert_sound", "outcomes"]


@dataclass(frozen=True)
class Outcome:
    """How one case ended.

    Attributes:
        kind: ``"done"``, ``"refused"`` (one of the expected errors, in one line), or a fault: ``"traceback"``,
            ``"signal"``, ``"time"``.
        text: what the function returned as text, the sentence, or what the fault was.
    """

    kind: str
    text: str

    @property
    def is_fault(self) -> bool:
        return self.kind not in ("done", "refused")


def outcomes(
    function: Callable[[Any], object],
    cases: Iterable[Any],
    refusals: tuple[type[Exception], ...] = (ValueError, OSError),
    seconds: float = 10,
    mebibytes: int = 500,
) -> list[Outcome]:
    """Call ``function(case)`` for each case, in a process that goes on to the next case until one ends it.

    Args:
        function: of a module's top level, as is what the cases are made of: both travel by pickle.
        cases: what it is called with.
        refusals: errors that refuse bad input; one must be a sentence on one line.
        seconds: for one case.
        mebibytes: of memory that one case may take beside what the process has when it starts on them.
    """
    cases = list(cases)
    ended: list[Outcome] = []
    while len(ended) < len(cases):
        ended += _until_a_fault(function, cases[len(ended) :], refusals, seconds, mebibytes)
    return ended


def assert_sound(ended: Sequence[Outcome], cases: Sequence[Any], name: Callable[[Any], str] = repr) -> None:
    """Fail with the first five faults, each with its case."""
    faults = [f"{name(case)[:300]}\n  {each.kind}: {each.text}" for each, case in zip(ended, cases) if each.is_fault]
    assert not faults, f"{len(faults)} of {len(cases)} cases:\n" + "\n".join(faults[:5])


def _until_a_fault(function, cases, refusals, seconds, mebibytes) -> list[Outcome]:
    """The outcomes up to the case that ended the process, or all of them."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, function, cases, refusals, mebibytes), daemon=True)
    process.start()
    theirs.close()
    ended: list[Outcome] = []
    try:
        assert ours.poll(120), "the process has not started"  # it imports what the function needs
        ours.recv()
        while len(ended) < len(cases):
            if not ours.poll(seconds):
                return [*ended, Outcome("time", f"no end after {seconds} s")]
            ended.append(Outcome(*ours.recv()))
        return ended
    except EOFError:
        process.join()
        code = process.exitcode
        text = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return [*ended, Outcome("signal", text)]
    finally:
        process.kill()
        process.join()
        ours.close()


def _work(pipe, function, cases, refusals, mebibytes) -> None:
    with contextlib.suppress(FileNotFoundError):  # of macOS, which keeps to no such limit
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + mebibytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send("started")
    for case in cases:
        pipe.send(_outcome(function, case, refusals))


def _outcome(function, case, refusals) -> tuple[str, str]:
    try:
        return "done", str(function(case))
    except refusals as error:
        sentence = str(error)
        if sentence.strip() and "\n" not in sentence:
            return "refused", sentence
        return "traceback", f"no sentence on one line: {sentence!r}"
    except BaseException:
        return "traceback", traceback.format_exc()[-2000:]
