"""Where the lines of ``metrics.json`` go besides: TensorBoard's files, a CSV file, Weights & Biases."""

from __future__ import annotations

import csv
import io
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fbn_plugin import internals
from fbn_plugin.engine.files.disk import AppendedFile, atomic_write
from fbn_plugin.engine.run import stopping
from fbn_plugin.engine.run.cli import UserError
from fbn_plugin.engine.run.rules import refusal

__all__ = ["LOGGERS", "Logger", "check_loggers", "open_loggers"]

Row = Mapping[str, float | None]


class Logger(Protocol):
    """Takes the lines of ``metrics.json``, one by one."""

    def write(self, row: Row) -> None:
        """Take a line, which is in ``metrics.json`` already."""

    def close(self) -> None:
        """Finish."""


class _TensorBoard:
    """TensorBoard's event files."""

    def __init__(self, output_dir: str, start: int, rows: Sequence[Row], config: Mapping[str, Any]):
        from fbn_plugin.engine.run.board import Board  # slow to import

        self._board = Board(output_dir, purge_step=start if start else None)

    def write(self, row: Row) -> None:
        for name, value in row.items():
            if name != "iteration":
                self._board.add_scalar(name, float("nan") if value is None else value, row["iteration"])
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class _Csv:
    """``metrics.csv``: a line for each of ``metrics.json``, a column for each name in it.

    It is written anew from ``metrics.json`` when a run goes on, and when there is a new column; so a resumed run
    doubles no line, and one that is logged so from its middle on has all of them.
    """

    def __init__(self, output_dir: str, start: int, rows: Sequence[Row], config: Mapping[str, Any]):
        self._path, self._rows = os.path.join(output_dir, "metrics.csv"), list(rows)
        self._columns = list(dict.fromkeys(["iteration", *(name for row in rows for name in row)]))
        self._rewrite()

    def write(self, row: Row) -> None:
        self._rows.append(row)
        if new := [name for name in row if name not in self._columns]:
            self._columns += new
            self._file.close()
            self._rewrite()
        else:
            self._file.write(self._lines([row]))

    def _rewrite(self) -> None:
        header = {name: name for name in self._columns}
        atomic_write(self._path, self._lines([header, *self._rows]))
        self._file = AppendedFile(self._path)

    def _lines(self, rows: Sequence[Mapping[str, Any]]) -> bytes:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writerows(rows)
        return text.getvalue().encode()

    def close(self) -> None:
        self._file.close()


class _WandB:
    """Weights & Biases. Project, mode and the like are those of its environment variables; ``WANDB_MODE=offline`` needs
    no network. A resumed run goes on in the same run there, whose identity is in ``wandb_id``."""

    def __init__(self, output_dir: str, start: int, rows: Sequence[Row], config: Mapping[str, Any]):
        import wandb

        identity = Path(output_dir, "wandb_id")
        if not (start and identity.is_file()):
            atomic_write(identity, secrets.token_hex(8).encode())
        options = {"dir": output_dir, "id": identity.read_text(encoding="utf-8").strip(), "resume": "allow"}
        options["name"] = os.environ.get("WANDB_NAME") or os.path.basename(os.path.abspath(output_dir))
        try:
            with stopping.blocked():  # its process ends with this one, and not by a signal to the group
                self._run = wandb.init(config=dict(config), settings=wandb.Settings(console="off"), **options)
        except wandb.errors.Error as error:
            raise UserError(f"LOGGERS: wandb: {' '.join(str(error).split())}") from None

    def write(self, row: Row) -> None:
        values = {name: value for name, value in row.items() if name != "iteration" and value is not None}
        self._run.log(values, step=row["iteration"])

    def close(self) -> None:
        self._run.finish()


LOGGERS = {"csv": _Csv, "tensorboard": _TensorBoard, "wandb": _WandB}


def check_loggers(names: Sequence[str]) -> None:
    """Refuse loggers that there are not, or whose package is not installed.

    Raises:
        ValueError: with the key, LOGGERS.
    """
    if any(name not in LOGGERS for name in names) or len(set(names)) < len(names):
        raise refusal("LOGGERS", f"some of {', '.join(map(repr, LOGGERS))}, each once", names)
    if "wandb" in names and not internals.is_installed("wandb"):
        raise refusal("LOGGERS", "without 'wandb', whose package is not installed (pip install wandb)", names)


def open_loggers(
    names: Sequence[str], output_dir: str | os.PathLike, start: int, rows: Sequence[Row], config: Mapping[str, Any]
) -> list[Logger]:
    """Open the loggers of a run; rank 0 only.

    Args:
        names: of ``LOGGERS``.
        output_dir: OUTPUT_DIR.
        start: the first iteration of this session.
        rows: of ``metrics.json`` so far.
        config: the run's settings.

    Raises:
        WriteError: a file cannot be written.
        UserError: Weights & Biases refuses.
    """
    return [LOGGERS[name](os.fspath(output_dir), start, rows, config) for name in names]
