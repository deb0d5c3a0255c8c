"""Reading back what a classification run left in its OUTPUT_DIR: settings and evaluations."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from fbn_plugin.engine.classification.config import classification_config
from fbn_plugin.engine.run.config import flatten, read_config
from fbn_plugin.engine.run.logging import is_figure, read_metrics
from fbn_plugin.engine.run.run_folder import INFO_KINDS, RunFolder, check_kinds, norm_label
from fbn_plugin.engine.run.run_info import read_record, read_run_info

__all__ = ["ClassificationRun", "read_classification_run"]

_NEEDED = {
    "MODEL.NAME": str,
    "MODEL.NORM": str,
    "DATASETS.NAME": str,
    "SOLVER.IMS_PER_BATCH": int,
    "SEED": int,
}


class ClassificationRun(RunFolder):
    """A classification run's folder."""

    @property
    def norm(self) -> str:
        """The norm without options that are the default, or "the model's own"."""
        return norm_label(self.config["MODEL.NORM"]) if self.config["MODEL.NORM"] else "the model's own"

    @property
    def seed(self) -> int:
        """SEED."""
        return self.config["SEED"]

    @property
    def title(self) -> str:
        """What it was trained and evaluated on."""
        titles = list(self.info.get("test_images", {}))
        return titles[0] if titles else f"{self.config['DATASETS.NAME']} {self.config.get('DATASETS.ROOT', '')}".strip()

    @property
    def conditional(self) -> bool:
        """Whether test labels have a part in its figures."""
        return self.config.get("TEST.MOMENTS") == "balanced"

    def last_evaluation(self) -> tuple[int | None, dict[str, float]]:
        """Finished iterations (None where the weights do not tell them) and figures of the last evaluation: ``top1``,
        ``top5`` and ``loss``, and where they were measured ``ema/...`` of averaged weights,
        ``balanced/...`` and the like of TEST.ALSO, ``test/...`` and ``final/...``.

        A folder of ``--eval-only`` has those of ``evaluation.json``.

        Raises:
            FileNotFoundError, ValueError: there is none, or a file is not what it should be.
        """
        if self.is_evaluation:
            return self._from_evaluation()
        finished, figures = None, {}
        for row in read_metrics(self.metrics_file):
            if "val/loss" in row or "val/top1" in row:
                finished, figures = row["iteration"] + 1, {}
            if finished == row["iteration"] + 1:
                figures |= {
                    name.removeprefix("val/"): value
                    for name, value in row.items()
                    if name.startswith(("val/", "test/", "final/")) and value is not None and not math.isnan(value)
                }
        if finished is None:
            raise ValueError(f"{self.folder} has no evaluation yet: there is none in its metrics.json")
        return finished, _without_marks(figures)

    def _from_evaluation(self) -> tuple[int | None, dict[str, float]]:
        path = self.folder / "evaluation.json"
        content = read_record(path)
        metrics, iteration = content.get("metrics"), content.get("iteration")
        if not isinstance(metrics, dict) or not (iteration is None or (type(iteration) is int and iteration >= 0)):
            raise ValueError(f"{path} is no evaluation: it has no 'metrics' or 'iteration' of the right type")
        if wrong := [name for name, value in metrics.items() if not is_figure(value)]:
            raise ValueError(f"{path}: {wrong[0]} must be a number or null, got {metrics[wrong[0]]!r:.80}")
        figures = {name: float(value) for name, value in metrics.items() if value is not None}
        return None if iteration is None else iteration + 1, _without_marks(figures)


def _without_marks(figures: Mapping[str, float]) -> dict[str, float]:
    marks = ("test/epoch", "test/averaged")
    is_mark = {name: name in marks or name.rpartition("/")[2] == "conditional" for name in figures}
    return {name: float(value) for name, value in figures.items() if not is_mark[name]}


def read_classification_run(folder: str | os.PathLike) -> ClassificationRun:
    """Read a run folder's settings.

    Raises:
        FileNotFoundError, ValueError: it is not there, or lacks what a classification run writes; one sentence.
    """
    folder = Path(folder)
    path = folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no run folder: it has no config.yaml")
    defaults = {
        key: list(value) if isinstance(value, tuple) else value for key, value in flatten(classification_config())
    }
    config, info = {**defaults, **read_config(path)}, read_run_info(folder)
    check_kinds(path, config, _NEEDED)  # all have defaults
    check_kinds(folder / "run_info.json", info, INFO_KINDS)
    return ClassificationRun(folder, config, info)
