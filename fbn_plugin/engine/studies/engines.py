"""What a study knows of the tools that train: their script, how they check a config, what their evaluations give."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.engine.run.evaluation_names import METRICS
from fbn_plugin.engine.run.linear_rule import scale_to_processes
from fbn_plugin.engine.studies.outcomes import Metric

__all__ = ["ENGINES", "Engine"]

_TASKS = ("bbox", "segm", "keypoints")


@dataclass(frozen=True)
class Engine:
    """One of the tools.

    Attributes:
        script: its file's name in ``tools/``.
        modules: what a run imports, which takes seconds.
        load: a config file and ``KEY VALUE`` overrides -> the checked config; ValueError or OSError in one sentence.
        metrics: metrics of its evaluations that are known, with what they are. Others may be named in full.
        prefix: of the known metrics in the rows of ``metrics.json``, but for those of a test set (``test/...``) and of
            what is measured at the end alone (``final/...``).
        last: the key that says after how many iterations a run ends, whatever a row of ``metrics.json`` has; "" where
            these are always right.
    """

    script: str
    modules: tuple[str, ...]
    load: Callable[[str, Sequence[str]], CfgNode]
    metrics: Mapping[str, Metric]
    prefix: str = ""
    last: str = ""

    def row_key(self, name: str) -> str:
        """The key of a metric in the rows of ``metrics.json``: that of a known one has its prefix, and any other stands
        there as it is named, such as ``total_loss`` and ``time``."""
        stands_alone = name not in self.metrics or name.startswith(("test/", "final/"))
        return name if stands_alone else self.prefix + name

    def metric(self, name: str) -> Metric | None:
        """What a metric is, where that is known; ``"my_set/bbox/AP"`` is as ``"bbox/AP"``."""
        known = self.metrics.get(name) or self.metrics.get("/".join(name.split("/")[-2:]))
        return known and dataclasses.replace(known, label=known.label or name)


def _classification(config_file: str, overrides: Sequence[str]) -> CfgNode:
    from fbn_plugin.engine.classification.config import check_config, classification_config
    from fbn_plugin.engine.run.config import load_config

    cfg = load_config(classification_config(), config_file, overrides)
    check_config(cfg)
    return cfg


def _torchvision(config_file: str, overrides: Sequence[str]) -> CfgNode:
    from fbn_plugin.engine.torchvision.config import load_detection_config

    logging.disable()  # each job says itself which keys are not used
    try:
        return _for_one_process(load_detection_config(config_file, overrides))
    finally:
        logging.disable(logging.NOTSET)


def _detectron2(config_file: str, overrides: Sequence[str]) -> CfgNode:
    try:
        from fbn_plugin.engine.detectron2.config import load_checked_config
    except ImportError as error:
        raise ValueError(f"TOOL detectron2 needs the package detectron2, which cannot be imported ({error})") from None
    return _for_one_process(load_checked_config(config_file, list(overrides)))


def _for_one_process(cfg: CfgNode) -> CfgNode:
    """What the linear rule makes of a config, as the run saves it."""
    return scale_to_processes(cfg, 1, say=lambda sentence: None)


_ACCURACIES = {
    "top1": Metric(higher_is_better=True, unit="%", label="top-1 accuracy"),
    "top5": Metric(higher_is_better=True, unit="%", label="top-5 accuracy"),
    "loss": Metric(higher_is_better=False, label="validation loss"),
}
# What stands before these, see MODEL.EMA and DATASETS.VAL_SHARE.
_OTHERS = {"ema/": ("", " of averaged weights"), "test/": ("test ", ""), "test/ema/": ("test ", " of averaged weights")}
_ACCURACIES |= {
    group + name: dataclasses.replace(metric, label=before + metric.label.removeprefix("validation ") + behind)
    for group, (before, behind) in _OTHERS.items()
    for name, metric in _ACCURACIES.items()
}

# By which moments, see TEST.ALSO and TEST.AT_END.MOMENTS.
_BY_MOMENTS = {
    "population": "",
    "batch": ", moments of the batch",
    "balanced": ", balanced batches (conditional)",
    "spread": ", balanced batches, views apart (conditional)",
}
_ACCURACIES |= {
    f"{group}{moments}/{name}": dataclasses.replace(_ACCURACIES[name], label=_ACCURACIES[name].label + behind)
    for group in ("", "final/")
    for moments, behind in _BY_MOMENTS.items()
    for name in ("top1", "top5", "loss")
}

_AVERAGE_PRECISIONS = {f"{task}/{name}": Metric(higher_is_better=True, unit="%") for task in _TASKS for name in METRICS}

ENGINES = {
    "classification": Engine(
        script="train_classification.py",
        modules=(
            "fbn_plugin.engine.classification.trainer",
            "fbn_plugin.engine.run.board",
            "sklearn.datasets",
        ),
        load=_classification,
        metrics=_ACCURACIES,
        prefix="val/",
    ),
    "torchvision": Engine(
        script="train_detection.py",
        modules=("fbn_plugin.engine.torchvision.trainer", "fbn_plugin.engine.run.board"),
        load=_torchvision,
        metrics=_AVERAGE_PRECISIONS,
        last="SOLVER.MAX_ITER",
    ),
    "detectron2": Engine(
        script="train_net.py",
        modules=("detectron2.engine", "fbn_plugin.engine.detectron2.trainer"),
        load=_detectron2,
        metrics=_AVERAGE_PRECISIONS,
        last="SOLVER.MAX_ITER",
    ),
}
