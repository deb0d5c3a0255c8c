"""The benchmark of the training loop: both loops run, with the same data, and it ends."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fbn_plugin.engine.benchmark import loop
from fbn_plugin.engine.classification.config import classification_config
from fbn_plugin.engine.classification.data import build_train_transform, images_in_memory
from fbn_plugin.engine.classification.datasets import build_data
from fbn_plugin.engine.run.config import load_config

CONFIGS = Path(__file__).parents[3] / "configs"
KEYS = [str(CONFIGS / "Digits/lenet5_convs_BN.yaml"), "MODEL.DEVICE", "cpu"]


@pytest.mark.parametrize(
    ("more", "baseline"), [([], "bare"), (["INPUT.TRAIN_CROP", "random_resized"], "bare, batches")]
)
def test_all_take_turns(capsys, monkeypatch, more, baseline):
    monkeypatch.setattr(loop, "_ROUND", 0.01)
    monkeypatch.setattr(loop, "_SECONDS", 0.0)
    loop.main([*KEYS, *more])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("CPU ms an iteration") and len(said) == (7 if baseline == "bare" else 6)
    assert said[-2].startswith(f"loop / {baseline}") and "in 5 rounds" in said[-2]
    assert 0.2 < float(said[-2].split(" | ")[1]) < 50


def test_the_bare_loops_batches_are_the_augmented_images():
    cfg = load_config(classification_config(), KEYS[0], [*KEYS[1:], "INPUT.HFLIP", "1.0"])
    images = images_in_memory(cfg, build_data(cfg).train, build_train_transform(cfg, prefetch=False))
    batch, targets = next(loop.bare_batches(images, 4, torch.device("cpu")))
    height, width = images.augmentation.size
    padding = images.augmentation.crop.padding
    everything = torch.from_numpy(np.stack([images[index][0] for index in range(len(images))]))
    everything = images.augmentation.normalize(torch.nn.functional.pad(everything, [padding] * 4)).flip(3)
    for image, target in zip(batch, targets):
        found = [
            (everything[:, :, top : top + height, left : left + width] == image).flatten(1).all(1).nonzero()
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
        ]
        assert int(target) in {images[int(index)][1] for index in torch.cat(found).flatten()}
