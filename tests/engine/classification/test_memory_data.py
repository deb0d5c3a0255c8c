"""Small sets in memory: the same images as timm's transforms give, drawn by the batch from the seed and the place."""

import math
import random
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

from fbn_plugin.engine.classification import memory_data
from fbn_plugin.engine.classification.config import check_config, classification_config
from fbn_plugin.engine.classification.data import build_train_loader, build_train_transform, build_val_loader
from fbn_plugin.engine.classification.memory_data import ImagesInMemory, MemoryLoader, batch_augmentation
from fbn_plugin.engine.data.image_data import Images
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.config import load_config

CONFIGS = Path(__file__).parents[3] / "configs"
CPU = torch.device("cpu")


def config(mode="RGB", size=8, **overrides):
    """Digits' config; overrides such as INPUT__SIZE=3."""
    overrides = {"INPUT__FORMAT": mode, "INPUT__SIZE": size, "SOLVER__IMS_PER_BATCH": 4} | overrides
    if mode == "RGB":
        overrides |= {"MODEL__PIXEL_MEAN": "[123.7, 116.3, 103.5]", "MODEL__PIXEL_STD": "[58.4, 57.1, 57.4]"}
    flat = [x for key, value in overrides.items() for x in (key.replace("__", "."), str(value))]
    return load_config(classification_config(), CONFIGS / "Digits/test_resnet_BN.yaml", [*flat, "OUTPUT_DIR", "unused"])


def noise(count, mode="RGB", shape=(8, 8)):
    """Random images of a shape, or of one each."""
    rng = np.random.default_rng(0)
    shapes = shape if isinstance(shape, list) else [shape] * count
    channels = (3,) if mode == "RGB" else ()
    return Images([(rng.integers(0, 256, (*each, *channels), np.uint8), i) for i, each in enumerate(shapes)], mode)


def take(loader, number):
    return list(islice(loader, number))


def same(one, other):
    return all(torch.equal(*pair) for batches in zip(one, other, strict=True) for pair in zip(*batches, strict=True))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(("shape", "crop_pct"), [((8, 8), 1.0), ((9, 13), 0.8), ([(8, 8), (16, 5), (7, 7)], 0.9)])
def test_evaluation_sees_the_very_images_of_the_transforms(mode, shape, crop_pct):
    data = noise(3, mode, shape)
    loaders = [
        build_val_loader(config(mode, INPUT__CROP_PCT=crop_pct, DATALOADER__IN_MEMORY=where), data, CPU)
        for where in ("auto", "never")
    ]
    assert isinstance(loaders[0], MemoryLoader) and not isinstance(loaders[1], MemoryLoader)
    assert len(loaders[0]) == len(loaders[1])
    assert same(*map(list, loaders))


def test_an_image_is_decoded_once_for_all_evaluations(monkeypatch):
    data, decoded = noise(3), Counter()
    decode = Images.__getitem__
    monkeypatch.setattr(Images, "__getitem__", lambda self, i: decoded.update([i]) or decode(self, i))
    cfg = config()
    assert same(build_val_loader(cfg, data, CPU), build_val_loader(cfg, data, CPU))
    take(build_train_loader(cfg, data, CPU), 5)
    build_val_loader(config(INPUT__CROP_PCT=0.5), data, CPU)
    assert set(decoded.values()) == {3}
