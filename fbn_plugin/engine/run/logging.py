"""What a training run says: a progress bar (or a line now and then where there is no terminal), ``metrics.json`` with
detectron2's field names, TensorBoard, and the log file.
"""

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Mapping

from tqdm import tqdm

from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.checkpoint import atomic_write

__all__ = ["Timer", "TrainingLog", "forget_metrics", "read_metrics", "setup_logging"]


class _BarHandler(logging.StreamHandler):
    """Writes above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)


def setup_logging(output_dir: str | os.PathLike | None = None) -> None:
    """Send the package's and fvcore's messages to stdout and, given a folder, to its ``log.txt``; rank 0 only."""
    handlers: list[logging.Handler] = []
    if distributed.is_main():
        handlers.append(_BarHandler())
        if output_dir:
            handlers.append(logging.FileHandler(os.path.join(output_dir, "log.txt"), encoding="utf-8"))
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


def read_metrics(path: str | os.PathLike) -> list[dict[str, float]]:
    """The lines of a ``metrics.json``; a line cut short by a crash is left out."""
    rows = []
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            for line in file:
                with contextlib.suppress(json.JSONDecodeError):  # a resumed run may have gone on behind it
                    rows.append(json.loads(line))
    return rows


def forget_metrics(path: str | os.PathLike, start: int) -> None:
    """Take out of a ``metrics.json`` what an interrupted run wrote from iteration ``start`` on, which comes again."""
    kept = [json.dumps(row) + "\n" for row in read_metrics(path) if row["iteration"] < start]
    atomic_write(path, "".join(kept).encode())


class TrainingLog:
    """Collects what each iteration reports and writes its mean every ``period`` iterations; silent on ranks but 0.

    Use as a context manager. On resume, what an interrupted run wrote at or after ``start`` is taken out of
    ``metrics.json``, so that every iteration stands there once.

    Args:
        output_dir: folder of ``metrics.json`` and the TensorBoard files.
        max_iter: iterations of the whole run.
        start: first iteration of this run.
        period: iterations between two lines.
        window: of the run that is resumed, so that a line across the interruption has the mean of all its iterations.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        max_iter: int,
        start: int = 0,
        period: int = 20,
        window: Mapping[str, list[float]] | None = None,
    ):
        self.max_iter = max_iter
        self.period = period
        self.enabled = distributed.is_main()
        self._window: dict[str, list[float]] = defaultdict(list, window or {})
        self._seconds: list[float] = []
        if not self.enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and of no use to the other ranks

        path = os.path.join(output_dir, "metrics.json")
        forget_metrics(path, start)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed in close()
        self._board = SummaryWriter(os.fspath(output_dir), purge_step=start if start else None)
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(total=max_iter, initial=start, dynamic_ncols=True, smoothing=0.05, disable=not self._terminal)
        self._logger = logging.getLogger(__name__)

    @property
    def window(self) -> dict[str, list[float]]:
        """What the iterations since the last line have reported, for the checkpoint."""
        return {name: list(values) for name, values in self._window.items()}

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Finish the bar and the files."""
        if self.enabled:
            self._bar.close()
            self._board.close()
            self._file.close()

    def step(self, iteration: int, **values: float) -> None:
        """Report one iteration (counted from 0): losses, ``lr``, and its ``time`` and ``data_time`` in seconds."""
        if not self.enabled:
            return
        for name, value in values.items():
            self._window[name].append(value)
        self._seconds = [*self._seconds[-99:], values["time"]]
        if "total_loss" in values:
            self._bar.set_postfix_str(f"loss {values['total_loss']:.4g}", refresh=False)
        self._bar.update()
        if (iteration + 1) % self.period == 0 or iteration + 1 == self.max_iter:
            means = {name: sum(window) / len(window) for name, window in self._window.items()}
            means["lr"] = values.get("lr", math.nan)
            # The median, as the first iterations and those with an evaluation are slower.
            means["eta_seconds"] = sorted(self._seconds)[len(self._seconds) // 2] * (self.max_iter - iteration - 1)
            self._window.clear()
            self.write(iteration, means)
            if not self._terminal:
                losses = "  ".join(f"{name} {value:.4g}" for name, value in means.items() if "loss" in name)
                self._logger.info(
                    "iteration %d/%d  eta %s  %s  lr %.4g  time %.3f  data_time %.3f",
                    iteration + 1,
                    self.max_iter,
                    tqdm.format_interval(means["eta_seconds"]),
                    losses,
                    means["lr"],
                    means["time"],
                    means.get("data_time", 0.0),
                )

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """Write one line now, such as an evaluation's ``{"bbox/AP": 31.2}``; NaN becomes null, which JSON can carry."""
        if not self.enabled:
            return
        row = {"iteration": iteration, **{k: None if math.isnan(v) else v for k, v in values.items()}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, iteration)
        self._board.flush()


class Timer:
    """Seconds since it was made or last asked."""

    def __init__(self):
        self._last = time.perf_counter()

    def __call__(self) -> float:
        now = time.perf_counter()
        self._last, elapsed = now, now - self._last
        return elapsed
