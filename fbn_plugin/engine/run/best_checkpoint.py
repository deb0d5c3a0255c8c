"""The checkpoint of the best evaluation so far, ``model_best.pth``: the model with the metric that it was kept for."""

import contextlib
import difflib
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from fbn_plugin.engine.files.disk import atomic_write
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.checkpoint import load_file
from fbn_plugin.engine.run.cli import UserError
from fbn_plugin.engine.run.rules import refusal

__all__ = ["BestCheckpoint", "best_weights", "check_metric", "is_better", "is_given"]

logger = logging.getLogger(__name__)


def is_better(metric: str, value: float, other: float) -> bool:
    """Whether a value of a metric is better than another: of a loss the lower one, of all else the higher one. NaN is
    better than nothing, and anything else is better than NaN.

    Examples::

        >>> is_better("top1", 80.0, 70.0), is_better("loss", 0.8, 0.7)
        (True, False)
    """
    if math.isnan(value) or math.isnan(other):
        return not math.isnan(value)
    return value < other if _is_loss(metric) else value > other


def _is_loss(metric: str) -> bool:
    return metric.rpartition("/")[2] == "loss"


def is_given(metric: str, names: Sequence[str]) -> bool:
    """Whether evaluations that give ``names`` give a metric; ``"sem_seg/..."`` stands for all of a group."""
    groups = tuple(name.removesuffix("...") for name in names if name.endswith("..."))
    return metric in names or metric.startswith(groups)


def check_metric(key: str, metric: str, names: Sequence[str]) -> None:
    """Refuse a metric that the run's evaluations do not give.

    Args:
        key: the key that names it.
        metric: such as ``"segm/AP"``.
        names: what the evaluations give, see :func:`is_given`.

    Raises:
        ValueError: it is none of them.
    """
    if is_given(metric, names):
        return
    if not names:
        raise refusal(key, "'' where DATASETS.TEST is empty", metric)
    nearest = difflib.get_close_matches(metric, names, n=1, cutoff=0.0)[0]
    raise ValueError(f"{key} must be one of {', '.join(names)}, got {metric!r}; did you mean {nearest!r}?")


class BestCheckpoint:
    """Keeps the best model of a run.

    The file alone says what is to be beaten, so that it survives any interruption: it holds ``model``, the last
    ``iteration`` (from 0) behind it, ``metric`` and its ``value``.

    Args:
        output_dir: OUTPUT_DIR.
        metric: what the best model is best in; "" keeps none.
        resume: whether a file that is there already is to be beaten; rank 0 reads it, while the others wait.

    Raises:
        ValueError: that file cannot be read, or does not say what is to be beaten.
    """

    def __init__(self, output_dir: str | os.PathLike, metric: str, resume: bool = False):
        self.path = os.path.join(output_dir, "model_best.pth")
        self.metric = metric
        self.value = self._worst = math.inf if _is_loss(metric) else -math.inf
        if resume and metric:
            distributed.on_main(self._read)

    def _read(self) -> None:
        """What is to be beaten."""
        if not os.path.isfile(self.path):
            return
        content = load_file(self.path)
        kept = [(content.get("metric"), content.get("value"))]
        if isinstance(content.get("best"), Mapping):  # the torchvision engine used to write {"best": {metric: value}}
            kept = list(content["best"].items())
        for name, value in kept:
            if not isinstance(name, str) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"{self.path} is no best checkpoint of a run: it has no metric with a value of it")
        self.value = dict(kept).get(self.metric, self._worst)

    def update(self, model: nn.Module, iteration: int, metrics: Mapping[str, float]) -> None:
        """Write the model if the metric is the best so far; NaN is not. Rank 0 decides and writes, the others wait.

        Raises:
            OSError, UserError: it cannot be written; the evaluation gave no such metric.
        """
        if self.metric:
            distributed.on_main(lambda: self._update(model, iteration, metrics))

    def _update(self, model: nn.Module, iteration: int, metrics: Mapping[str, float]) -> None:
        if self.metric not in metrics:
            raise UserError(f"SOLVER.BEST_CHECKPOINT_METRIC must be one of {', '.join(metrics)}, got {self.metric!r}")
        value = metrics[self.metric]
        if math.isnan(value):
            logger.warning("%s is no number, as the set has no such objects: no best model by it", self.metric)
        if not is_better(self.metric, value, self.value):
            return
        self.value = value
        content = {"model": model.state_dict(), "iteration": iteration, "metric": self.metric, "value": value}
        atomic_write(self.path, write=lambda file: torch.save(content, file))
        logger.info("saved %s: %s %.3f, the best so far", self.path, self.metric, value)


@contextlib.contextmanager
def best_weights(model: nn.Module, path: str | os.PathLike) -> Iterator[int | None]:
    """Lend a model the weights of ``model_best.pth`` for the length of a block.

    Args:
        model: on every process; it has its own weights back behind the block.
        path: of the file, which rank 0 reads; where there is none, the model is left as it is.

    Yields:
        the last iteration (from 0) behind the weights; None of the model's own.

    Raises:
        ValueError: the file cannot be read.
    """
    content: dict = {}
    distributed.on_main(lambda: content.update(load_file(path) if os.path.isfile(path) else {}))
    content = distributed.broadcast_object(content)
    if not content:
        yield None
        return
    own = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(content["model"])
    try:
        yield content["iteration"]
    finally:
        model.load_state_dict(own)
