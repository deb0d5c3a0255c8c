"""AP of a finished run of this engine, for ``tools/evaluate.py``."""

import os
from collections.abc import Sequence
from pathlib import Path

from fbn_plugin.engine.run.lock import let_go
from fbn_plugin.engine.run.logging import setup_logging
from fbn_plugin.engine.run.run_folder import Run
from fbn_plugin.engine.torchvision.config import load_detection_config
from fbn_plugin.engine.torchvision.trainer import DetectionTrainer

__all__ = ["evaluate_run"]


def evaluate_run(run: Run, name: str, overrides: Sequence[str], folder: Path) -> dict[str, float]:
    """AP in percent on the one data set that ``overrides`` have as DATASETS.TEST, see ``evaluate_weights``.

    Raises:
        FileNotFoundError, ValueError: what ``DetectionTrainer`` refuses.
    """
    cfg = load_detection_config(os.fspath(run.folder / "config.yaml"), overrides)
    metrics = DetectionTrainer(cfg, eval_only=True).evaluate()
    setup_logging()  # lets go of the log file in OUTPUT_DIR
    let_go(cfg.OUTPUT_DIR)
    return metrics
