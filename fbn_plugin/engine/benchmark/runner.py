"""Measure the rows of a plan, one after the other: an error in one is a note in the results, and all share the time.

The rows of the targets are measured in a process of their own. A GPU on which one kernel has failed answers no more to
the process that ran it, and one that never ends answers to nobody: the process is then replaced by another, which goes
on with the next row.
"""

import contextlib
import gc
import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

from fbn_plugin.engine.benchmark.environment import keep_freed_memory, machine
from fbn_plugin.engine.benchmark.layers import first_line
from fbn_plugin.engine.benchmark.rows import Row, plan
from fbn_plugin.engine.benchmark.settings import Settings
from fbn_plugin.engine.files.json_files import read_json

FORMAT = "fbn_plugin benchmark 1"
KINDS = ("layers", "models", "host", "compiled", "first_steps", "checks", "preparation")

Plan = Callable[[Settings], Sequence[Row]]


class Measured(NamedTuple):
    """What became of one row of the plan."""

    rows: list[dict]
    notes: list[str]
    seconds: float


class _Fresh(NamedTuple):
    """The first message of a process: what it measures with."""

    environment: dict


class _Spoilt(NamedTuple):
    """The last message of a process whose GPU answers no more."""


def _measure(row: Row, left: float, later: float, device: str) -> Measured:
    """Measure one row.

    Args:
        row: the row.
        left: seconds that are left for it and all later ones.
        later: what the later ones take, by their plan.
        device: of the settings.
    """
    if left < row.seconds / 2:
        return Measured([], [f"{row.name}: skipped, the time was over"], 0.0)
    notes: list[str] = []
    start = time.perf_counter()
    try:
        made = row.measure(start + (left * row.seconds / (row.seconds + later) if left < math.inf else left), notes)
    except Exception as error:  # whatever it is, the other rows may go well
        made = []
        notes.append(f"{row.name}: not measured: {first_line(error)}")
    gc.collect()
    with contextlib.suppress(Exception):
        if device == "cuda":
            torch.cuda.empty_cache()
    return Measured(made if isinstance(made, list) else [made], notes, time.perf_counter() - start)


def _facts() -> dict:
    return machine() | {"keeps_freed_memory": keep_freed_memory()}


def _here(settings: Settings, planner: Plan, start: int, deadline: float) -> Iterator[_Fresh | Measured | _Spoilt]:
    """Measure rows in this process, from number ``start`` of the plan on; ``deadline`` is a ``time.time()``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads or threads)
    try:
        yield _Fresh(_facts())
        rows = planner(settings)
        for index in range(start, len(rows)):
            later = sum(row.seconds for row in rows[index + 1 :])
            yield _measure(rows[index], deadline - time.time(), later, settings.device)
            if settings.device == "cuda":
                try:
                    torch.cuda.synchronize()
                except Exception:
                    yield _Spoilt()
    finally:
        torch.set_num_threads(threads)


def _work(settings: Settings, planner: Plan, start: int, deadline: float, results: Connection) -> None:
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # what it starts ends with it
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        for message in _here(settings, planner, start, deadline):
            results.send(message)
            if isinstance(message, _Spoilt):
                os._exit(0)


def _end(process: multiprocessing.process.BaseProcess) -> None:
    """End a process, and what it has started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _patience(row: Row, deadline: float, least: float) -> float | None:
    """Seconds to wait for a row before its process is given up."""
    if deadline == math.inf:
        return None
    return min(max(least, 3 * row.seconds), max(least / 3, deadline + least / 4 - time.time()))


def _isolated(
    settings: Settings, planner: Plan, rows: Sequence[Row], deadline: float, least: float
) -> Iterator[_Fresh | Measured]:
    """Measure rows in another process, and in a new one after each that ends, or is silent for long.

    Args:
        settings, planner, deadline: as in :func:`_here`; the planner must be importable by its name.
        rows: what the planner gives.
        least: seconds after which a process may be given up, at the earliest.

    Raises:
        RuntimeError: not one row can be begun.
    """
    context = multiprocessing.get_context("spawn")
    index = 0
    while index < len(rows):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(settings, planner, index, deadline, sender))
        process.start()
        sender.close()
        begun = False
        try:
            while index < len(rows):
                if not receiver.poll(_patience(rows[index], deadline, least) if begun else 300):
                    reason = "its process gave no answer and was ended"
                    break
                try:
                    message = receiver.recv()
                except EOFError:
                    process.join(10)
                    reason = f"its process ended with code {process.exitcode}"
                    break
                if isinstance(message, _Spoilt):
                    reason = None
                    break
                begun = True
                index += isinstance(message, Measured)
                yield message
            else:
                process.join(30)
                return
        finally:
            _end(process)
            receiver.close()
        if not begun:
            raise RuntimeError(f"the process that measures does not start: {reason}")
        if reason is not None:
            yield Measured([], [f"{rows[index].name}: not measured: {reason}"], 0.0)
            index += 1


def run(
    settings: Settings,
    on_row: Callable[[dict, str, Measured], None] | None = None,
    planner: Plan = plan,
    isolated: bool | None = None,
) -> dict:
    """Measure all that ``settings`` ask for.

    Args:
        settings: what to measure.
        on_row: called after each row of the plan with all results so far, the row's name and what it gave.
        planner: gives the rows.
        isolated: measure in another process; None is for the targets alone.

    Returns:
        ``format``, ``environment``, ``settings``, a list for each of ``KINDS`` (see :mod:`.layers`, :mod:`.models`,
        :mod:`.first_step`, :mod:`.correctness`, :mod:`.prepare`), ``notes``, and ``durations``, the name and the
        seconds of each row of the plan. Plain JSON types.
    """
    start = time.time()
    deadline = math.inf if settings.minutes is None else start + 60 * settings.minutes
    rows = planner(settings)
    results: dict = {"format": FORMAT, "environment": {}, "settings": json.loads(json.dumps(asdict(settings)))}
    results |= {kind: [] for kind in KINDS} | {"notes": [], "durations": []}
    isolated = settings.targets if isolated is None else isolated
    patience = 60.0 if settings.device == "cuda" else 600.0
    messages = (
        _isolated(settings, planner, rows, deadline, patience) if isolated else _here(settings, planner, 0, deadline)
    )
    remaining = iter(rows)
    with contextlib.closing(messages):
        for message in messages:
            if isinstance(message, _Fresh):
                results["environment"] = results["environment"] or message.environment
            elif isinstance(message, Measured):
                row = next(remaining)
                results[row.kind] += message.rows
                results["notes"] += [note for note in message.notes if note not in results["notes"]]
                results["durations"].append({"row": row.name, "seconds": round(message.seconds, 2)})
                if on_row is not None:
                    on_row(results, row.name, message)
    return results


def load(path: str | os.PathLike) -> dict:
    """Read results that were written as JSON.

    Raises:
        OSError: the file cannot be read.
        ValueError: it does not hold a benchmark's results.
    """
    path = os.fspath(path)
    results = read_json(path)
    keys = ("environment", "settings", "layers", "models", "notes")
    if not isinstance(results, dict) or results.get("format") != FORMAT or any(key not in results for key in keys):
        raise ValueError(f"{path} does not hold results of this benchmark ({FORMAT!r})")
    return {kind: [] for kind in KINDS} | results
