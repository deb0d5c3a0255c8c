"""What checkpoints say of a set of images: class probabilities, averaged over the views of an image, and over several
models (ensembles)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from fbn_plugin.engine.classification.config import check_config, classification_config
from fbn_plugin.engine.classification.crops import Views, normalized
from fbn_plugin.engine.classification.datasets import build_data
from fbn_plugin.engine.classification.evaluation import Evaluator, moments_of
from fbn_plugin.engine.classification.model import build_model, check_image_size
from fbn_plugin.engine.data.image_data import ImageData
from fbn_plugin.engine.data.loaders import data_loader
from fbn_plugin.engine.run import distributed, stopping
from fbn_plugin.engine.run.checkpoint import AtomicCheckpointer
from fbn_plugin.engine.run.config import CfgNode, load_config, with_value
from fbn_plugin.engine.run.output_dir import holds_run, last_checkpoint
from fbn_plugin.engine.run.rules import refusal
from fbn_plugin.engine.run.run_info import read_run_info
from fbn_plugin.training.evaluation_modes import evaluation_mode

__all__ = ["Checkpoint", "Predictions", "average", "find_checkpoint", "predict"]


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
    cfg = with_value(cfg, "MODEL.PRETRAINED", False)  # nothing of it would be left
    check_config(cfg)
    return Checkpoint(cfg, name or str(place))


def predict(checkpoint: Checkpoint, crops: int = 1, data: ImageData | None = None) -> Predictions:
    """Run a checkpoint's model over its validation set; DATASETS, TEST.MOMENTS and IMS_PER_BATCH are the config's.

    With moments of batches, each view's moments are those of the same view of the batch's images, and the same images
    are together in all views.

    Args:
        checkpoint: weights and config.
        crops: views of an image, see :class:`~fbn_plugin.engine.classification.crops.Views`.
        data: the images, if they are loaded already.

    Raises:
        FileNotFoundError, ValueError: the weights are not of this model, or the images are not there.
    """
    cfg = checkpoint.cfg
    data = data or build_data(cfg)
    device = distributed.init(cfg.MODEL.DEVICE)
    model = build_model(cfg, len(data.classes)).to(device)
    check_image_size(cfg, model, device)
    content = AtomicCheckpointer(model).load(checkpoint.weights, checkpointables=[], strict=True)
    iteration = content.get("iteration")
    plan = Evaluator(cfg, data.val, len(data.classes), device)
    plan.check(model)
    probabilities = _probabilities(model, plan, crops, device, checkpoint.name)
    labels = torch.tensor([int(label) for label in plan.targets])
    return Predictions(probabilities, labels, iteration if type(iteration) is int else None, plan.note, data.title)


@torch.no_grad()
def _probabilities(model: nn.Module, plan: Evaluator, crops: int, device: torch.device, name: str) -> Tensor:
    """(N, C) in float64, in the order of the set or of its part."""
    images = plan.images
    images.transform = Views(plan.cfg, crops)
    options = {"num_workers": plan.cfg.DATALOADER.NUM_WORKERS, "pin_memory": device.type == "cuda"}
    # As many images of all views as the model gets at a time, but for moments of a batch, which are of whole batches.
    batch_size = plan.cfg.TEST.IMS_PER_BATCH
    together = max(1, batch_size // crops) if plan.moments == "population" else batch_size
    loader: DataLoader = data_loader(images, batch_size=together, **options)
    found = []
    with evaluation_mode(model), moments_of(model, plan.moments):
        for pixels, _ in stopping.until_asked(tqdm(loader, name, leave=False, disable=None)):
            if plan.moments == "population":
                logits = model(normalized(pixels.to(device).flatten(0, 1), plan.cfg)).unflatten(0, pixels.shape[:2])
            else:
                each = (model(normalized(view.to(device), plan.cfg)) for view in pixels.unbind(1))
                logits = torch.stack(list(each), dim=1)
            found.append(logits.double().softmax(dim=2).mean(dim=1).cpu())
    return plan.in_order(torch.cat(found))


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
