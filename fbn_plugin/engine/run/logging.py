"""What a training run says: a progress bar (or a line now and then where there is no terminal), ``metrics.json`` with
detectron2's field names, what ``loggers.py`` makes of it, and the log file.
"""

import json
import logging
import math
import os
import statistics
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from fbn_plugin.engine.files.disk import AppendedFile, WriteError, atomic_write
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.loggers import open_loggers

__all__ = ["LogFile", "Timer", "TrainingLog", "forget_metrics", "is_figure", "read_metrics", "setup_logging"]

# No line of metrics.json is as long.
_LONGEST_LINE = 2**20


class _BarHandler(logging.StreamHandler):
    """Writes above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)


class LogFile(logging.Handler):
    """Adds to a log file. A line that cannot be written, as on a full disk, stops the run; one that tells of an error
    does not come before that error.

    Args:
        path: the file.
    """

    def __init__(self, path: str | os.PathLike):
        super().__init__()
        self._file = AppendedFile(path)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        handled = sys.exc_info()[1]
        try:
            self._file.write(f"{self.format(record)}\n".encode("utf-8", "backslashreplace"))
        except WriteError:
            if handled is None:
                raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def setup_logging(output_dir: str | os.PathLike | None = None) -> None:
    """Send the package's and fvcore's messages to stdout and, given a folder, to its ``log.txt``; rank 0 only."""
    handlers: list[logging.Handler] = []
    if distributed.is_main():
        handlers.append(_BarHandler())
        if output_dir:
            handlers.append(LogFile(os.path.join(output_dir, "log.txt")))
            handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("fbn_plugin", "fvcore"):
        logger = logging.getLogger(name)
        for old in logger.handlers[:]:
            logger.removeHandler(old)
            old.close()
        level = logging.INFO if name == "fbn_plugin" else logging.WARNING  # fvcore tells of every part that it loads
        logger.setLevel(level if handlers else logging.ERROR)
        logger.propagate = False
        for handler in handlers or [logging.NullHandler()]:
            logger.addHandler(handler)


def read_metrics(path: str | os.PathLike) -> list[dict[str, float | None]]:
    """The lines of a ``metrics.json``, each with its ``iteration``; empty where there is no such file.

    A line that was cut short is left out: a run that was stopped was writing it, and other tools go on behind it.

    Raises:
        ValueError: a line is damaged otherwise, or a value is no number; one sentence with the line's number.
    """
    return [row for row, _ in _rows(path)]


def forget_metrics(path: str | os.PathLike, start: int) -> None:
    """Take out of a ``metrics.json`` what an interrupted run wrote from iteration ``start`` on, which comes again, and
    a last line that was cut short; errors as :func:`read_metrics`."""
    atomic_write(path, b"".join(line.rstrip() + b"\n" for row, line in _rows(path) if row["iteration"] < start))


def _rows(path: str | os.PathLike) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The rows with the lines that they were read from."""
    if not os.path.exists(path):
        return
    if not os.path.isfile(path):  # a pipe would be waited for
        raise ValueError(f"{path} is not a file")
    with open(path, "rb") as file:
        number, line = 1, file.readline(_LONGEST_LINE)
        while line:
            following = file.readline(_LONGEST_LINE)
            try:
                row = json.loads(line.decode())
            except (ValueError, RecursionError):
                if len(line) == _LONGEST_LINE or (following and not _is_cut(line)):
                    raise ValueError(f"{path}: line {number} is damaged: it is no JSON") from None
            else:
                _check_row(row, f"{path}: line {number}")
                yield row, line
            number, line = number + 1, following


def _is_cut(line: bytes) -> bool:
    """Whether a line is the beginning of a row, which the next row may follow."""
    line = line.strip()
    return line.startswith(b"{") and (not line.endswith(b"}") or line.count(b"{") > 1) and line.isascii()


def _check_row(row: Any, place: str) -> None:
    if not isinstance(row, dict) or type(row.get("iteration")) is not int or not -1 <= row["iteration"] < 2**63:
        raise ValueError(f"{place} has no 'iteration' that is a whole number, -1 (before the first) or more")
    for key, value in row.items():
        if not is_figure(value):
            raise ValueError(f"{place}: {key} must be a number or null, got {value!r:.80}")


def is_figure(value: Any) -> bool:
    """Whether a value is what stands for a figure in the JSON files of a run: a number that a float holds, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        return False
    return not isinstance(value, int) or abs(value) < 2**1000


class TrainingLog:
    """Collects what each iteration reports and writes its mean every ``period`` iterations; silent on ranks but 0.

    Use as a context manager. On resume, what an interrupted run wrote at or after ``start`` is taken out of
    ``metrics.json``, so that every iteration stands there once.

    Args:
        output_dir: folder of ``metrics.json`` and of what the loggers write.
        max_iter: iterations of the whole run.
        start: first iteration of this run.
        period: iterations between two lines.
        window: of the run that is resumed, so that a line across the interruption has the mean of all its iterations.
        images: of an iteration, over all processes, to report ``images_per_second``.
        loggers: where the lines go besides ``metrics.json``, of ``loggers.LOGGERS``.
        config: the run's settings, for loggers that show them.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        max_iter: int,
        start: int = 0,
        period: int = 20,
        window: Mapping[str, list[float]] | None = None,
        images: int | None = None,
        loggers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
    ):
        self.max_iter = max_iter
        self.period = period
        self.images = images
        self.enabled = distributed.is_main()
        self._window: dict[str, list[float]] = defaultdict(list, window or {})
        self._seconds: deque[float] = deque(maxlen=100)
        self._reported: list[dict[str, float]] = []  # what is not in these two yet
        if not self.enabled:
            return
        path = os.path.join(output_dir, "metrics.json")
        forget_metrics(path, start)
        self._file = AppendedFile(path)
        self._loggers = open_loggers(loggers, output_dir, start, read_metrics(path), config or {})
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(total=max_iter, initial=start, dynamic_ncols=True, smoothing=0.05, disable=not self._terminal)
        self._logger = logging.getLogger(__name__)

    @property
    def window(self) -> dict[str, list[float]]:
        """What the iterations since the last line have reported, for the checkpoint."""
        self._collect()
        return {name: list(values) for name, values in self._window.items()}

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Finish the bar and the files."""
        if self.enabled:
            self._bar.close()
            for logger in self._loggers:
                logger.close()
            self._file.close()

    def step(self, iteration: int, **values: float) -> None:
        """Report one iteration (counted from 0): losses, ``lr``, and its ``time`` and ``data_time`` in seconds."""
        if not self.enabled:
            return
        self._reported.append(values)  # and no more: it is part of every iteration
        if self._terminal:
            if "total_loss" in values:
                self._bar.set_postfix_str(f"loss {values['total_loss']:.4g}", refresh=False)
            self._bar.update()
        if (iteration + 1) % self.period == 0 or iteration + 1 == self.max_iter:
            self._write_means(iteration, values.get("lr", math.nan))

    def _collect(self) -> None:
        for values in self._reported:
            for name, value in values.items():
                self._window[name].append(value)
            self._seconds.append(values["time"])
        self._reported.clear()

    def _write_means(self, iteration: int, lr: float) -> None:
        """Write the line of a period, whose last iteration had the rate ``lr``."""
        self._collect()
        means = {name: sum(window) / len(window) for name, window in self._window.items()}
        means["lr"] = lr
        # The median, as the first iterations and those with an evaluation are slower.
        means["eta_seconds"] = sorted(self._seconds)[len(self._seconds) // 2] * (self.max_iter - iteration - 1)
        # Of the computing alone: what a study of speed compares.
        waits = self._window.get("data_time") or [0.0] * len(self._window["time"])
        means["step_time"] = statistics.median(seconds - wait for seconds, wait in zip(self._window["time"], waits))
        if self.images is not None:
            means["images_per_second"] = self.images / max(means["time"], 1e-9)
        self._window.clear()
        self.write(iteration, means)
        if self._terminal:
            return
        losses = "  ".join(f"{name} {value:.4g}" for name, value in means.items() if "loss" in name)
        rate = "" if self.images is None else f"  images/s {means['images_per_second']:.4g}"
        self._logger.info(
            "iteration %d/%d  eta %s  %s  lr %.4g  time %.3f  data_time %.3f%s",
            iteration + 1,
            self.max_iter,
            tqdm.format_interval(means["eta_seconds"]),
            losses,
            means["lr"],
            means["time"],
            means.get("data_time", 0.0),
            rate,
        )

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """Write one line now, such as an evaluation's ``{"bbox/AP": 31.2}``; NaN becomes null, which JSON can carry."""
        if not self.enabled:
            return
        row = {"iteration": iteration, **{k: None if math.isnan(v) else v for k, v in values.items()}}
        self._file.write(f"{json.dumps(row)}\n".encode())
        for logger in self._loggers:
            logger.write(row)


class Timer:
    """Seconds since it was made or last asked."""

    def __init__(self):
        self._last = time.perf_counter()

    def __call__(self) -> float:
        now = time.perf_counter()
        self._last, elapsed = now, now - self._last
        return elapsed
