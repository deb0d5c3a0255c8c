"""What TEST.AT_END measures of a trained classifier: by many views of an image, by population statistics of the whole
training set, and in balanced batches, as Hajaj and Gillies, "Batch Normalization and the impact of batch structure on
the behavior of deep convolution networks" (2018) do for their tables and figures. Figures for which test labels put the
batches together are conditional, and are marked so.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fbn_plugin.analysis.batch_structure import WalkStudy, choose_cast, study_walks
from fbn_plugin.engine.classification.crops import CROPS, Views, normalized
from fbn_plugin.engine.classification.evaluation import CONDITIONAL, MOMENTS, Evaluator
from fbn_plugin.engine.classification.inference import class_probabilities
from fbn_plugin.engine.classification.measures import measure
from fbn_plugin.engine.data.image_data import Images
from fbn_plugin.engine.files.disk import atomic_write
from fbn_plugin.engine.run import distributed, stopping
from fbn_plugin.engine.run.config import CfgNode, with_value
from fbn_plugin.engine.run.population import refresh_population_stats
from fbn_plugin.engine.run.rules import Rule, at_least, named, one_of, refusal
from fbn_plugin.training.balanced_batches import self_label
from fbn_plugin.training.population_statistics import norms_to_update

logger = logging.getLogger(__name__)

__all__ = [
    "FILE",
    "RULES",
    "Conditional",
    "check_final",
    "check_final_batches",
    "conditional_studies",
    "final_figures",
    "is_wanted",
    "lent_population_stats",
]

FILE = "conditional.json"
_FINAL = (*MOMENTS, "spread")
_MOST_BYTES = 2**30  # of images as the model sees them that are kept

RULES = {
    "TEST.ALSO": Rule(f"some of {', '.join(map(repr, MOMENTS))}", lambda given: all(each in MOMENTS for each in given)),
    "TEST.AT_END.CROPS": one_of(*CROPS),
    "TEST.AT_END.MOMENTS": Rule(
        f"some of {', '.join(map(repr, _FINAL))}", lambda given: all(each in _FINAL for each in given)
    ),
    "TEST.AT_END.RELABEL": at_least(0, 10**4),
    "TEST.AT_END.WALKS": at_least(0, 10**4),
}


def check_final(cfg: CfgNode) -> None:
    """Refuse what TEST.AT_END or TEST.ALSO cannot do.

    Raises:
        ValueError: the first key, with what is accepted.
    """
    wanted = cfg.TEST.AT_END
    if cfg.TEST.MOMENTS in cfg.TEST.ALSO:
        raise refusal("TEST.ALSO", f"without {cfg.TEST.MOMENTS!r}, which TEST.MOMENTS is", cfg.TEST.ALSO)
    if wanted.CROPS == 1 and "spread" in wanted.MOMENTS:
        raise refusal("TEST.AT_END.CROPS", "10 or 144 with MOMENTS 'spread', which is of several views", 1)
    if wanted.POPULATION and not is_wanted(cfg):
        raise refusal("TEST.AT_END.POPULATION", "False without MOMENTS, RELABEL or WALKS", True)
    if wanted.CROPS > 1:
        with named("TEST.AT_END.CROPS"):
            Views(cfg, wanted.CROPS)


def check_final_batches(cfg: CfgNode, model: nn.Module, images: Images, num_classes: int, device: torch.device) -> None:
    """Refuse moments of TEST.AT_END that do not go with the images or the model, before a run begins.

    Raises:
        ValueError: a class has no image, or a norm's moments of a batch are not known.
    """
    wanted = cfg.TEST.AT_END
    needed = {"balanced" if each == "spread" else each for each in wanted.MOMENTS}
    needed |= {"balanced"} if wanted.RELABEL or wanted.WALKS else set()
    for moments in sorted(needed - {"population"}):
        Evaluator(with_value(cfg, "TEST.MOMENTS", moments), images, num_classes, device, processes=1).check(model)


def is_wanted(cfg: CfgNode) -> bool:
    """Whether something is measured at the end."""
    wanted = cfg.TEST.AT_END
    return bool(wanted.MOMENTS or wanted.RELABEL or wanted.WALKS)


@contextlib.contextmanager
def lent_population_stats(
    cfg: CfgNode, model: nn.Module, batches: Callable[[], Iterable[Any]], count: int, iterations: int
) -> Iterator[None]:
    """With TEST.AT_END.POPULATION, population statistics for the length of a block; every process calls it.

    Args:
        cfg: config.
        model: whose running statistics are its own again behind the block.
        batches: gives training batches of this process.
        count: how many.
        iterations: finished ones, for the messages.

    Raises:
        EvaluationLeft: a process is asked to stop.
    """
    if not cfg.TEST.AT_END.POPULATION:
        yield
        return
    training = model.training
    norms = norms_to_update(model.train())
    before = [(norm, norm.running_mean.clone(), norm.running_var.clone()) for norm in norms.values()]
    device = next(model.parameters()).device
    try:
        refresh_population_stats(model, batches, count, iterations, lambda model, batch: model(batch[0].to(device)))
        yield
    finally:
        for norm, mean, var in before:
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
        model.train(training)


@dataclass(frozen=True)
class Conditional:
    """What balanced batches show of a model.

    Args:
        relabel: top-1 accuracy in percent: by standard inference, and after each round of balancing the batches by the
            predictions before; not conditional, as labels only measure it.
        walks: figures of :class:`~fbn_plugin.analysis.batch_structure.WalkStudy`, conditional.
        grids: all walks, for figure 4.
    """

    relabel: tuple[float, ...] = ()
    walks: dict[str, float] = field(default_factory=dict)
    grids: dict[str, list] = field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """``relabel/top1`` of the last round, ``relabel/gain`` over standard inference, and ``walks/...``."""
        found = {}
        if self.relabel:
            found = {"relabel/top1": self.relabel[-1], "relabel/gain": self.relabel[-1] - self.relabel[0]}
        return found | {f"walks/{name}": value for name, value in self.walks.items()}

    def as_json(self) -> dict[str, Any]:
        """With what test labels were used for."""
        found = {}
        if self.relabel:
            used = "the test labels measure the accuracy and nothing else"
            found["relabel"] = {"top1": list(self.relabel), "conditional": False, "note": used}
        if self.walks:
            found["walks"] = {"figures": self.walks, "conditional": True, "note": CONDITIONAL, **self.grids}
        return found


def conditional_studies(
    cfg: CfgNode, model: nn.Module, images: Images, num_classes: int, device: torch.device
) -> Conditional:
    """Figures 4 and 6 of Hajaj and Gillies, as far as TEST.AT_END wants them; by this process alone.

    Args:
        cfg: config.
        model: on ``device``; left as it was.
        images: a set.
        num_classes: of the model.
        device: of the model.

    Raises:
        EvaluationLeft: the process is asked to stop.
    """
    labels, given = [int(label) for label in images.targets], (cfg, model, images, num_classes, device)
    relabel, walks, grids = (), {}, {}
    if cfg.TEST.AT_END.WALKS:
        with _told("TEST.AT_END.WALKS: no image walks"):
            study = _walks(*given, labels)
            walks, grids = study.figures(), study.as_json()
    if cfg.TEST.AT_END.RELABEL:
        with _told("TEST.AT_END.RELABEL: the batches are not balanced by predictions"):
            relabel = _relabelled(*given, labels)
    return Conditional(relabel, walks, grids)


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Log what a model that has not learned makes impossible: a trained one is not to be lost for it."""
    try:
        yield
    except ValueError as error:
        logger.warning("%s: %s", what, error)


def _walks(
    cfg: CfgNode, model: nn.Module, images: Images, num_classes: int, device: torch.device, labels: list[int]
) -> WalkStudy:
    standard = with_value(cfg, "TEST.MOMENTS", "population")
    probabilities, _ = class_probabilities(standard, model, images, num_classes, device)
    cast = choose_cast(probabilities, labels, cfg.TEST.AT_END.WALKS)
    return study_walks(model, _Seen(cfg, images).batch, cast, labels)


def _relabelled(
    cfg: CfgNode, model: nn.Module, images: Images, num_classes: int, device: torch.device, labels: list[int]
) -> tuple[float, ...]:
    wanted, standard = cfg.TEST.AT_END, with_value(cfg, "TEST.MOMENTS", "population")
    probabilities, _ = class_probabilities(standard, model, images, num_classes, device, wanted.CROPS)
    first = probabilities.argmax(dim=1)
    views = [_Seen(cfg, images, wanted.CROPS, number) for number in range(wanted.CROPS)]
    k = cfg.DATALOADER.IMAGES_PER_CLASS or 1
    rounds = self_label(model, views, first, wanted.RELABEL, labels, images_per_class=k)
    start = 100 * (first == torch.tensor(labels)).double().mean().item()
    return (start, *(each.accuracy for each in rounds))


class _Seen(Dataset):
    """One view of each image of a set, as the model gets it; a small set is made once."""

    def __init__(self, cfg: CfgNode, images: Images, crops: int = 1, number: int = 0):
        self._cfg, self._images = cfg, images.part(range(len(images)))
        self._images.transform = Views(cfg, crops, None if crops == 1 else number)
        size = len(cfg.INPUT.FORMAT) * cfg.INPUT.SIZE**2 * len(images) * crops
        self._kept: dict[int, Tensor] | None = {} if size <= _MOST_BYTES else None

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        pixels = None if self._kept is None else self._kept.get(index)
        if pixels is None:
            pixels = self._images[index][0][0]
            if self._kept is not None:
                self._kept[index] = pixels
        return normalized(pixels, self._cfg)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Several (M, C, H, W)."""
        return torch.stack([self[index] for index in indices])


def final_figures(
    cfg: CfgNode, model: nn.Module, images: Images, num_classes: int, device: torch.device
) -> dict[str, float]:
    """All that TEST.AT_END measures, on every process: ``final/population/top1`` and so on, and beside figures that
    test labels have a part in ``final/balanced/conditional``, 1. Rank 0 measures, and writes what is no number into
    ``conditional.json`` in OUTPUT_DIR, if that is there. What a model that has learned nothing makes impossible, as
    walks without an image of each class that is recognized, is left out, which the log says.

    Args:
        cfg: config.
        model: with the weights, on ``device``.
        images: of the evaluation.
        num_classes: of the model.
        device: of the model.

    Raises:
        ValueError: what is wanted does not go with the images or the model.
        EvaluationLeft: the run is to stop.
    """
    found: dict[str, float] | None = None

    def work() -> None:
        nonlocal found
        found = stopping.leavable(lambda: _measured(cfg, model, images, num_classes, device))

    distributed.broadcast_buffers(model)
    distributed.on_main(work)
    found = distributed.broadcast_object(found)
    if found is None:
        raise stopping.EvaluationLeft
    return {f"final/{name}": value for name, value in found.items()}


def _measured(
    cfg: CfgNode, model: nn.Module, images: Images, num_classes: int, device: torch.device
) -> dict[str, float]:
    wanted, figures = cfg.TEST.AT_END, {}
    labels = torch.tensor([int(label) for label in images.targets])
    for moments in wanted.MOMENTS:
        spread = moments == "spread"
        given = with_value(cfg, "TEST.MOMENTS", "balanced" if spread else moments)
        probabilities, plan = class_probabilities(given, model, images, num_classes, device, wanted.CROPS, spread)
        measured = measure(probabilities, labels).figures
        figures |= {f"{moments}/{name}": measured[name] for name in plan.names}
        figures |= {f"{moments}/conditional": 1.0} if plan.conditional else {}
    shown = conditional_studies(cfg, model, images, num_classes, device)
    figures |= shown.figures()
    if shown.walks:
        figures["walks/conditional"] = 1.0
    if (content := shown.as_json()) and Path(cfg.OUTPUT_DIR).is_dir():
        record = {"images": len(images), "crops": wanted.CROPS, **content}
        atomic_write(os.path.join(cfg.OUTPUT_DIR, FILE), (json.dumps(record, indent=2) + "\n").encode())
    return figures
