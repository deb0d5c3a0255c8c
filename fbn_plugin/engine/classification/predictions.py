"""What checkpoints say of a set of images: class probabilities, averaged over the views of an image, and over several
models (ensembles)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fbn_plugin.engine.classification.config import check_config, classification_config
from fbn_plugin.engine.classification.datasets import build_data
from fbn_plugin.engine.classification.inference import class_probabilities
from fbn_plugin.engine.classification.model import build_model, check_image_size
from fbn_plugin.engine.data.image_data import ImageData
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.checkpoint import AtomicCheckpointer
from fbn_plugin.engine.run.config import CfgNode, load_config, with_value
from fbn_plugin.engine.run.output_dir import holds_run, last_checkpoint
from fbn_plugin.engine.run.rules import refusal
from fbn_plugin.engine.run.run_info import read_run_info
from fbn_plugin.training.evaluation_modes import device_of

__all__ = [
    "Checkpoint",
    "Predictions",
    "average",
    "find_checkpoint",
    "load_model",
    "predict",
]


@dataclass(frozen=True)
class Checkpoint:
    """Weights, and the config that their model is built by.

    Args:
        cfg: of the run, with MODEL.WEIGHTS the path of the weights.
        name: short, for tables.
    """

    cfg: CfgNode
    name: str

    @property
    def weights(self) -> str:
        """The path."""
        return self.cfg.MODEL.WEIGHTS


@dataclass(frozen=True)
class Predictions:
    """What a model says of each image of a set, in the set's order.

    Args:
        probabilities: of the classes (N, C), float64, averaged over views.
        labels: the true classes (N).
        iteration: the last one, from 0, that the weights have behind them; None where they do not tell.
        note: how many images, and by which moments.
        title: of the set.
    """

    probabilities: Tensor
    labels: Tensor
    iteration: int | None = None
    note: str = ""
    title: str = ""


def find_checkpoint(
    place: Path, config_file: Path | None = None, overrides: Sequence[str] = (), name: str | None = None
) -> Checkpoint:
    """The weights that a path means, with their config.

    Args:
        place: a run's OUTPUT_DIR: its ``model_final.pth``, else the last checkpoint; or a file of weights.
        config_file: YAML file; without, the ``config.yaml`` beside the weights.
        overrides: ``["KEY", "VALUE", ...]``.
        name: short; without, the path.

    Raises:
        FileNotFoundError, ValueError: there are none, or the config is not one of a classification run.
    """
    weights = place
    if place.is_dir():
        if config_file:
            raise ValueError(f"{place} is a run folder with a config of its own: --config-file is of weights alone")
        weights = place / "model_final.pth"
        if not weights.is_file():
            if not holds_run(place):
                raise FileNotFoundError(f"{place} has no checkpoint: neither model_final.pth nor a last_checkpoint")
            weights = Path(last_checkpoint(place))
    elif not place.is_file():
        raise FileNotFoundError(f"{place} is not there: neither a run folder nor a file of weights")
    config = config_file or weights.with_name("config.yaml")
    if not config.is_file():
        hint = "" if config_file else "; --config-file names the config of weights that lie alone"
        raise FileNotFoundError(f"config file {config} is not there{hint}")
    engine = read_run_info(weights.parent).get("engine", "classification")
    if config_file is None and engine != "classification":
        raise ValueError(f"{weights.parent} is no run of a classifier: by its run_info.json it is one of {engine}")
    cfg = load_config(classification_config(), config, [*overrides, "MODEL.WEIGHTS", str(weights)])
    for key, value in (("MODEL.PRETRAINED", False), ("MODEL.PRETRAINED_PATH", "")):  # nothing of it would be left
        cfg = with_value(cfg, key, value)
    check_config(cfg)
    return Checkpoint(cfg, name or str(place))


def load_model(checkpoint: Checkpoint, data: ImageData) -> tuple[nn.Module, int | None]:
    """A checkpoint's model on its device, and the last iteration, from 0, that the weights have behind them; None where
    they do not tell.

    Args:
        checkpoint: weights and config.
        data: what it is evaluated on.

    Raises:
        FileNotFoundError, ValueError: the weights are not of this model, or it does not take the images.
    """
    cfg = checkpoint.cfg
    device = distributed.init(cfg.MODEL.DEVICE)
    model = build_model(cfg, len(data.classes)).to(device)
    check_image_size(cfg, model, device)
    content = AtomicCheckpointer(model).load(checkpoint.weights, checkpointables=[], strict=True)
    iteration = content.get("iteration")
    return model, iteration if type(iteration) is int else None


def predict(
    checkpoint: Checkpoint,
    crops: int = 1,
    data: ImageData | None = None,
    spread: bool = False,
    loaded: tuple[nn.Module, int | None] | None = None,
) -> Predictions:
    """Run a checkpoint's model over its validation set; DATASETS, TEST.MOMENTS and IMS_PER_BATCH are the config's.

    With moments of batches, each view's moments are those of the same view of the batch's images.

    Args:
        checkpoint: weights and config.
        crops: views of an image, see :class:`~fbn_plugin.engine.classification.crops.Views`.
        data: the images, if they are loaded already.
        spread: each view of an image has other company (Hajaj and Gillies 2018, table 5); without, the same images are
            together in all views.
        loaded: what :func:`load_model` gives, if that is there already.

    Raises:
        FileNotFoundError, ValueError: the weights are not of this model, or the images are not there.
    """
    cfg = checkpoint.cfg
    data = data or build_data(cfg)
    model, iteration = loaded or load_model(checkpoint, data)
    classes, device = len(data.classes), device_of(model)
    probabilities, plan = class_probabilities(cfg, model, data.val, classes, device, crops, spread, checkpoint.name)
    labels = torch.tensor([int(label) for label in plan.targets])
    note = plan.note + ("; other company for each view" if spread else "")
    return Predictions(probabilities, labels, iteration, note, data.title)


def average(members: Sequence[Predictions], names: Sequence[str]) -> Predictions:
    """An ensemble: the mean of the members' class probabilities.

    Args:
        members: on the same images and classes.
        names: of the members, for the sentence.

    Raises:
        ValueError: they are on other images or classes.
    """
    first = members[0]
    for other, name in zip(members, names):
        same = other.probabilities.shape == first.probabilities.shape and torch.equal(other.labels, first.labels)
        if not same or other.note != first.note:
            raise refusal("--ensemble", f"of runs on the same images, as {names[0]} is", name)
    total = sum(member.probabilities for member in members)
    return Predictions(total / len(members), first.labels, None, first.note, first.title)
