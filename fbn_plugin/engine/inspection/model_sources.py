"""Networks to look into, wherever they are from: a name in timm or torchvision, a config file, or a run's folder; each
with what makes its input of images."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import fbn_plugin
from fbn_plugin import internals
from fbn_plugin.engine.data.image_data import Images
from fbn_plugin.engine.run.checkpoint import AtomicCheckpointer
from fbn_plugin.training.evaluation_modes import device_of

__all__ = ["FoundModel", "ModelOptions", "find_model"]


@dataclass(frozen=True)
class ModelOptions:
    """What a command line says of a model besides its name.

    Args:
        weights: a file; "" for none, or of a run folder its last checkpoint.
        pretrained: the weights that timm or torchvision has, downloaded by it where they are not there.
        num_classes: of the classifier, of a name in timm or torchvision; 0: its default.
        image_size: pixels of a side that a classifier sees; 0: its default.
        overrides: ``["KEY", "VALUE", ...]``, of a config or run folder.
    """

    weights: str = ""
    pretrained: bool = False
    num_classes: int = 0
    image_size: int = 0
    overrides: Sequence[str] = ()


@dataclass
class FoundModel:
    """A network, and how it is called.

    Attributes:
        model: on the CPU.
        title: in words.
        weights: where they are from; None where the network is not trained.
        transform: an image to one entry of a batch.
        forward: ``forward(model, batch)`` with a list of entries for a detector; None where the model is called with
            the entries as one tensor.
        mode: PIL mode of the images that ``transform`` takes.
        images: of a run, those that it validates on.
        dataset: what these are called.
        notes: what else is to be said.
    """

    model: nn.Module
    title: str
    weights: str | None
    transform: Callable[[Image.Image], Any]
    forward: Callable[[nn.Module, list], Any] | None = None
    mode: str = "RGB"
    images: Images | None = None
    dataset: str = ""
    notes: list[str] = field(default_factory=list)


def find_model(source: str, options: ModelOptions, wants_images: bool = False) -> FoundModel:
    """Build a network with its weights.

    Args:
        source: ``timm:NAME``, ``torchvision:NAME``, a config file of a classifier or of detectron2, or a run folder.
        options: what else is said.
        wants_images: whether a run's own images are wanted, too.

    Raises:
        FileNotFoundError, ValueError: there is no such model, or the weights are of another; one sentence.
    """
    torch.manual_seed(0)  # an untrained network is the same one each time
    kind, _, name = source.partition(":")
    if kind in ("timm", "torchvision") and name:
        if options.overrides:
            raise ValueError(f"--opts are for config files and run folders, and {source} has no config")
        return (_timm if kind == "timm" else _torchvision)(name, options)
    for given, flag in ((options.pretrained, "--pretrained"), (options.num_classes, "--num-classes")):
        if given:
            raise ValueError(f"{flag} is for timm:NAME and torchvision:NAME, got --model {source}")
    path = Path(source)
    if path.is_dir():
        return _run(path, options, wants_images)
    if path.is_file():
        return _config(path, options, wants_images)
    raise FileNotFoundError(
        f"--model {source} is not there: name timm:NAME, torchvision:NAME, a config file or a run folder"
    )


def _load(model: nn.Module, weights: str, own_name: str | None) -> str | None:
    """Load a file of weights, if one is given; where the weights are from."""
    if not weights:
        return own_name
    AtomicCheckpointer(model).load(weights, checkpointables=[], strict=True)
    return weights


def _timm(name: str, options: ModelOptions) -> FoundModel:
    from timm.data import create_transform, resolve_model_data_config

    from fbn_plugin.engine.classification.model import create_model

    arguments = {"num_classes": options.num_classes} if options.num_classes else {}
    model = create_model(name, pretrained=options.pretrained, **arguments)
    weights = _load(model, options.weights, f"timm's own of {name}" if options.pretrained else None)
    data = resolve_model_data_config(model)
    if options.image_size:
        data["input_size"] = (data["input_size"][0], options.image_size, options.image_size)
    mode = {1: "L", 3: "RGB"}.get(data["input_size"][0])
    if mode is None:
        raise ValueError(f"timm:{name} takes {data['input_size'][0]} channels, and images have 1 or 3")
    transform = create_transform(**data, is_training=False)
    return FoundModel(model, f"timm's {name}", weights, transform, mode=mode)


def _torchvision(name: str, options: ModelOptions) -> FoundModel:
    from torchvision import models
    from torchvision.transforms.functional import pil_to_tensor

    known = models.list_models()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
        raise ValueError(f"torchvision has no model {name!r}{hint}")
    arguments: dict[str, Any] = {"num_classes": options.num_classes} if options.num_classes else {}
    if options.pretrained:
        arguments["weights"] = models.get_model_weights(name).DEFAULT
    elif _has_backbone(models.get_model_builder(name)):
        arguments["weights_backbone"] = None  # which would be downloaded
    model = models.get_model(name, **arguments)
    weights = _load(model, options.weights, f"torchvision's own of {name}" if options.pretrained else None)
    if type(model).__module__.startswith("torchvision.models.detection"):
        if options.image_size:
            raise ValueError(f"--image-size is for classifiers: torchvision:{name} resizes images by itself")
        return FoundModel(
            model, f"torchvision's {name}", weights, lambda image: pil_to_tensor(image).float() / 255, _call_with_list
        )
    preset = models.get_model_weights(name).DEFAULT.transforms()
    if type(preset).__name__ not in ("ImageClassification", "SemanticSegmentation"):  # but of videos, or pairs
        raise ValueError(f"torchvision:{name} does not take single images, and cannot be shown these")
    sizes = {"crop_size": [options.image_size], "resize_size": [round(options.image_size * 256 / 224)]}
    for key, size in sizes.items() if options.image_size else ():
        if hasattr(preset, key):
            setattr(preset, key, size)
    return FoundModel(model, f"torchvision's {name}", weights, preset)


def _has_backbone(builder: Callable) -> bool:
    return "weights_backbone" in inspect.signature(builder).parameters


def _call_with_list(model: nn.Module, entries: list[Tensor]) -> Any:
    device = device_of(model)
    return model([entry.to(device) for entry in entries])


def _config(path: Path, options: ModelOptions, wants_images: bool) -> FoundModel:
    from fbn_plugin.engine.run.config import read_config

    if "MODEL.NAME" in read_config(path):
        return _classifier(path, options, options.weights, wants_images)
    if internals.is_installed("detectron2"):
        found = _detectron2(path, options)
    else:
        found = _mask_rcnn(path, options, options.weights)
        found.notes.append(
            "detectron2 is not installed: the network is this package's Mask R-CNN on torchvision's parts"
        )
    if not options.weights:
        found.notes.append(f"MODEL.WEIGHTS of {path} is not looked at: --weights names a file")
    return found


def _run(folder: Path, options: ModelOptions, wants_images: bool) -> FoundModel:
    from fbn_plugin.engine.classification.predictions import find_checkpoint
    from fbn_plugin.engine.run.run_folder import is_classification, named_checkpoint, read_run

    config = folder / "config.yaml"
    if is_classification(folder):
        place = named_checkpoint(folder, options.weights) if options.weights else folder
        weights = find_checkpoint(place, config if options.weights else None, options.overrides).weights
        return _classifier(config, options, weights, wants_images)
    run = read_run(folder)
    weights = os.fspath(run.weights(options.weights or None))
    found = (_detectron2 if run.engine == "detectron2" else _mask_rcnn)(config, options, weights)
    found.title += f" of {folder.resolve().name}"
    if wants_images and run.test_sets:
        from fbn_plugin.engine.inspection.image_sources import find_images

        found.images, found.dataset = find_images(run.test_sets[0], found.mode)
    return found


def _classifier(config: Path, options: ModelOptions, weights: str, wants_images: bool) -> FoundModel:
    """The model of a classification config; its number of classes is the data set's, or that of the weights."""
    from timm.data import create_transform

    from fbn_plugin.engine.classification.config import check_config, classification_config
    from fbn_plugin.engine.classification.data import pixel_statistics
    from fbn_plugin.engine.classification.datasets import build_data
    from fbn_plugin.engine.classification.model import build_model
    from fbn_plugin.engine.run.checkpoint import load_file
    from fbn_plugin.engine.run.config import load_config, with_value

    cfg = load_config(classification_config(), config, list(options.overrides))
    if options.image_size:
        cfg = with_value(cfg, "INPUT.SIZE", options.image_size)
    check_config(cfg)
    own = f"timm's own of {cfg.MODEL.NAME}" if cfg.MODEL.PRETRAINED and not weights else None
    if weights:
        cfg = with_value(cfg, "MODEL.PRETRAINED", False)
    data = build_data(cfg) if wants_images else None
    if data is not None:
        classes = len(data.classes)
    else:
        classes = _classes_of(functools.partial(build_model, cfg), load_file(weights)["model"]) if weights else 1000
    model = build_model(cfg, classes)
    kind = f" with {cfg.MODEL.NORM}" if cfg.MODEL.NORM else ""
    transform = create_transform(
        cfg.INPUT.SIZE,
        is_training=False,
        crop_pct=cfg.INPUT.CROP_PCT,
        interpolation=cfg.INPUT.INTERPOLATION,
        **pixel_statistics(cfg),
    )
    return FoundModel(
        model,
        f"{cfg.MODEL.NAME}{kind}",
        _load(model, weights, own),
        transform,
        mode=cfg.INPUT.FORMAT,
        images=None if data is None else data.val,
        dataset="" if data is None else f"{data.title}, validation",
    )


def _classes_of(build: Callable[[int], nn.Module], weights: dict[str, Tensor]) -> int:
    """The number of classes that weights are for, by the last layer of the model that they are of."""
    model = build(2)
    head = model.get_classifier() if hasattr(model, "get_classifier") else None
    for name, module in model.named_modules():
        if module is head and isinstance(weights.get(f"{name}.weight"), Tensor):
            return len(weights[f"{name}.weight"])
    return 1000


def _mask_rcnn(config: Path, options: ModelOptions, weights: str) -> FoundModel:
    """The detector of this package's torchvision engine."""
    from torchvision.transforms.functional import pil_to_tensor

    from fbn_plugin.engine.torchvision.config import load_detection_config
    from fbn_plugin.engine.torchvision.model import build_model

    cfg = load_detection_config(os.fspath(config), list(options.overrides))
    model = build_model(cfg)
    title = f"{'Mask' if cfg.MODEL.MASK_ON else 'Faster'} R-CNN (torchvision) with {cfg.MODEL.RESNETS.NORM}"
    loaded = _load(model, weights, None)
    return FoundModel(model, title, loaded, lambda image: pil_to_tensor(image).float() / 255, _call_with_list)


def _detectron2(config: Path, options: ModelOptions, weights: str = "") -> FoundModel:
    """A model of detectron2's."""
    if not internals.is_installed("detectron2"):
        raise ValueError(f"{config} is for detectron2, which is not installed")
    from fbn_plugin.engine.detectron2.config import load_checked_config

    fbn_plugin.register()
    cfg = load_checked_config(os.fspath(config), list(options.overrides))
    cfg.MODEL.DEVICE = "cpu"
    from fbn_plugin.engine.detectron2.checkpoint import AtomicCheckpointer as Detectron2Checkpointer
    from fbn_plugin.engine.detectron2.model import build_model

    model = build_model(cfg)
    weights = weights or options.weights
    if weights:
        Detectron2Checkpointer(model).load(weights, checkpointables=[], strict=True)
    title = f"detectron2's {cfg.MODEL.META_ARCHITECTURE} of {config.name}"
    size = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    transform = functools.partial(_detectron2_entry, *size, cfg.INPUT.FORMAT == "BGR")
    return FoundModel(model, title, weights or None, transform, lambda model, entries: model(entries))


def _detectron2_entry(short: int, longest: int, bgr: bool, image: Image.Image) -> dict[str, Any]:
    """What detectron2's models take in evaluation."""
    import numpy as np
    from detectron2.data.transforms import ResizeShortestEdge

    pixels = np.asarray(image)
    pixels = pixels[:, :, ::-1] if bgr else pixels
    resized = (
        ResizeShortestEdge([short, short], longest).get_transform(pixels).apply_image(np.ascontiguousarray(pixels))
    )
    tensor = torch.as_tensor(np.ascontiguousarray(resized.transpose(2, 0, 1)).astype("float32"))
    return {"image": tensor, "height": image.height, "width": image.width}
