"""The classification files of configs/: each is built at its full size, without memory, with the norms that it names,
and trained for two steps on tiny real images, by a narrow form of its network. Those of the digits' LeNet-5 learn in
``test_configs.py``. And the study files beside them, which are read as ``tools/study.py`` reads them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from test_configs import CLASSIFIERS, CONFIGS, FILES, STUDIES, is_detector, split

import fbn_plugin
from fbn_plugin.engine.classification.batch import BatchSizes
from fbn_plugin.engine.classification.config import check_config, classification_config
from fbn_plugin.engine.classification.model import build_model
from fbn_plugin.engine.classification.trainer import ClassificationTrainer
from fbn_plugin.engine.run import checkpoint
from fbn_plugin.engine.run.config import CfgNode, load_config
from fbn_plugin.engine.run.logging import read_metrics
from fbn_plugin.engine.studies.study_file import read_study
from fbn_plugin.layers.description import describe

PATHS = [path for path in FILES if not is_detector(path)]
TRAINED = [path for path in PATHS if split(path)[0] != CLASSIFIERS.name]
CLASSES = {"cifar10": 10, "cifar100": 100, "digits": 10, "image_folder": 1000, "mnist": 10, "tar": 20}

SIX = ["BN", "FBN", "GN", "FGN", "ConvNorm", "ScaledBN"]
EIGHT = [*SIX, "FBN-T2", "FBN-T5"]
FOUR = ["BN", "FBN", "GN", "FGN"]
BATCHES = (16, 8, 4, 2)
NORMS = {
    **{f"ImageNet/{name}": EIGHT for name in ("resnet18", "resnet50", "resnet101", "resnext50_32x4d", "vgg16")},
    **{f"ImageNet/resnet50_batch{images}": FOUR for images in BATCHES},
    **{f"ImageNet/resnet50_{recipe}": ["BN", "FBN"] for recipe in ("A2", "A3")},
    **{f"{name}": SIX for name in ("CIFAR10/resnet18", "CIFAR100/resnet34", "TinyImageNet20/resnet18")},
    "MNIST/lenet5": [*FOUR, "FBN-T4", "FBN-T5"],
    "MNIST/lenet5_all": FOUR,
    "TinyImageNet20/vgg16": ["BN", "FBN", "FBN-T2"],
}

# Networks with fewer channels, of as many layers.
NARROW = {
    "resnet": {"channels": [8, 16, 32, 64]},
    "resnext": {"channels": [16, 32, 64, 128]},
    "vgg16_all": {"map_size": 1, "dense_size": 64},
    "vgg16_bn": {"mlp_ratio": 0.01},
}


def file_id(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def read(path: Path, overrides=()) -> CfgNode:
    return load_config(classification_config(), path, [str(each) for each in overrides])


@pytest.mark.parametrize("network", NORMS)
def test_every_network_has_its_norms(network):
    folder, name = network.split("/")
    found = [norm for path in PATHS for given, norm in [split(path)] if path.parent.name == folder and given == name]
    assert sorted(found) == sorted(NORMS[network])


@pytest.mark.parametrize("path", [path for path in PATHS if "-T" in path.stem], ids=file_id)
def test_a_file_has_the_threshold_of_its_name(path):
    threshold = path.stem.rpartition("-T")[2]
    norm = read(path).MODEL.NORM
    assert norm == f"FBN(t_sigma={threshold})"


def test_the_batches_of_figure_12_are_those_that_a_norm_sees():
    for images in (32, *BATCHES):
        for norm in FOUR:
            cfg = read(CONFIGS / "ImageNet" / f"resnet50{'' if images == 32 else f'_batch{images}'}_{norm}.yaml")
            solver, model = cfg.SOLVER, torch.nn.BatchNorm2d(3)
            assert solver.IMS_PER_BATCH == solver.IMS_PER_NORM == images and solver.REFERENCE_WORLD_SIZE == 1
            assert BatchSizes(images).norms(model) == BatchSizes(8 * images, processes=8).norms(model) == [images]
            assert math.isclose(solver.BASE_LR, 0.1 * images / 256)


def test_four_million_iterations_of_vgg_16():
    solver = read(CONFIGS / "ImageNet" / "vgg16_FBN.yaml").SOLVER
    assert round(solver.MAX_EPOCH * 1_281_167 / solver.IMS_PER_BATCH / 1e6, 1) == 4.0


def name_of(module: torch.nn.Module) -> str:
    """Of its class, without the dimensions."""
    return type(module).__name__.removesuffix("1d").removesuffix("2d")


@pytest.mark.parametrize("path", PATHS, ids=file_id)
def test_a_config_is_accepted_and_builds_its_network_with_its_norm(path):
    cfg = read(path)
    check_config(cfg)
    with torch.device("meta"):
        model = build_model(cfg, CLASSES[cfg.DATASETS.NAME])
    if cfg.MODEL.NORM:
        norm = fbn_plugin.get_norm(cfg.MODEL.NORM, 64)
        found = {name_of(module) for module in model.modules() if describe(module) is not None}
        assert found - {"InputNorm"} == {name_of(norm)}
    assert model.num_classes == CLASSES[cfg.DATASETS.NAME]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Parts of scikit-learn's two photographs, a class each."""
    folder, generator = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    photos = load_sample_images()
    for image, name in zip(photos.images, photos.filenames):
        for part, count in (("train", 6), ("val", 1)):
            place = folder / part / Path(name).stem
            place.mkdir(parents=True)
            for number in range(count):
                top, left = generator.integers(0, 300), generator.integers(0, 500)
                Image.fromarray(image[top : top + 64, left : left + 64]).save(place / f"{number}.jpg", quality=90)
    return folder


def reduced(cfg: CfgNode, photographs: Path) -> dict:
    """What makes a training of a config tiny: its images, their size and number, and the width of its network."""
    images = 2 * max(1, cfg.INPUT.REPEATED_AUGMENTATIONS)
    data = {"NAME": "image_folder", "ROOT": photographs} if cfg.INPUT.FORMAT == "RGB" else {"TRAIN_IMAGES": 10}
    keys = {
        **{f"DATASETS.{key}": value for key, value in data.items()},
        **{"SOLVER.IMS_PER_BATCH": images, "SOLVER.IMS_PER_NORM": images, "SOLVER.MAX_ITER": 2},
        **{"TEST.EVAL_PERIOD": 0, "TEST.IMS_PER_BATCH": 2, "DATALOADER.NUM_WORKERS": 0, "MODEL.DEVICE": "cpu"},
    }
    if cfg.INPUT.FORMAT == "L":
        keys |= {"DATASETS.NAME": "digits", "DATASETS.VAL_IMAGES": 2}
    else:
        keys |= {"DATASETS.TRAIN_IMAGES": 0, "DATASETS.VAL_IMAGES": 0, "INPUT.SIZE": 32}
        narrow = [options for name, options in NARROW.items() if cfg.MODEL.NAME.startswith(name)]
        keys["MODEL.OPTIONS"] = {**cfg.MODEL.OPTIONS, **(narrow[0] if narrow else {})}
    return keys


@pytest.mark.parametrize("path", TRAINED, ids=file_id)
def test_a_config_trains_two_steps(path, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.AtomicCheckpointer, "save", lambda *args, **kwargs: None)
    keys = {**reduced(read(path), photographs), "OUTPUT_DIR": tmp_path / "run"}
    trainer = ClassificationTrainer(read(path, [each for pair in keys.items() for each in pair]), log_period=1)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    result = trainer.train()
    losses = [row["total_loss"] for row in read_metrics(tmp_path / "run" / "metrics.json") if "total_loss" in row]
    assert len(losses) == 2 and all(map(math.isfinite, losses)) and math.isfinite(result["loss"])
    moved = [name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])]
    assert len(moved) > 0.5 * len(before)


@pytest.mark.parametrize("path", [path for path in STUDIES if "\nSCALES:" not in path.read_text()], ids=file_id)
def test_a_study_file_is_read(path):
    study = read_study(path).study
    assert len(study.variants) > 1 and len(study.seeds) > 1 and study.comparisons
