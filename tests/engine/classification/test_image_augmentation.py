"""What training images go through: each augmentation does what its key says, and follows from seed and place alone."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader

from fbn_plugin.engine.classification.augmentation import ColorShift, build_mixup, switch_mixup
from fbn_plugin.engine.classification.config import check_config, classification_config
from fbn_plugin.engine.classification.crops import Views, normalized
from fbn_plugin.engine.classification.data import (
    build_train_loader,
    build_train_transform,
    build_val_loader,
    build_val_transform,
    pixel_statistics,
)
from fbn_plugin.engine.classification.memory_data import MemoryLoader
from fbn_plugin.engine.classification.trainer import ClassificationTrainer
from fbn_plugin.engine.data.image_data import Images
from fbn_plugin.engine.data.sampling import InfiniteSampler, SeededDataset
from fbn_plugin.engine.run.checkpoint import load_file
from fbn_plugin.engine.run.config import load_config

FILE = Path(__file__).parents[3] / "configs/Digits/test_resnet_FBN.yaml"
CPU = torch.device("cpu")
RGB = {"INPUT__FORMAT": "RGB", "MODEL__PIXEL_MEAN": "[120.0, 110.0, 100.0]", "MODEL__PIXEL_STD": "[60.0, 50.0, 40.0]"}
ERASING = {"INPUT__ERASING__PROB": 1.0, "INPUT__HFLIP": 0.0, "INPUT__TRAIN_CROP": "padded", "INPUT__PADDING": 0}


def config(output_dir="unused", **overrides):
    flat = [x for key, value in overrides.items() for x in (key.replace("__", "."), str(value))]
    return load_config(classification_config(), FILE, [*flat, "OUTPUT_DIR", str(output_dir)])


def noise(size: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


def transformed(cfg, image, prefetch=False) -> torch.Tensor:
    torch.manual_seed(0)
    return build_train_transform(cfg, prefetch)(image)


# --- single images ---------------------------------------------------------------------------------------------------


def test_vertical_flip():
    plain = {**RGB, "INPUT__TRAIN_CROP": "padded", "INPUT__PADDING": 0, "INPUT__HFLIP": 0.0}
    upright = transformed(config(**plain), noise())
    assert torch.equal(transformed(config(**plain, INPUT__VFLIP=1.0), noise()), upright.flip(1))


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing_on_the_way_to_a_gpu_is_timms_but_for_rounding(mode):
    """There images are bytes until the device normalizes them, so that noise is cut to 0..255."""
    cfg = config(**RGB, **ERASING, INPUT__ERASING__MODE=mode, INPUT__ERASING__COUNT=3)
    data, batches = Images([(np.asarray(noise(seed=i)), i) for i in range(4)]), []
    for prefetch in (False, True):
        data.transform = build_train_transform(cfg, prefetch)
        stream = {"batch_size": 4, "sampler": InfiniteSampler(4, seed=0)}
        loader = DataLoader(SeededDataset(data, 0), **stream, collate_fn=fast_collate if prefetch else None)
        if prefetch:
            loader = PrefetchLoader(loader, **pixel_statistics(cfg), device=CPU)
        batches.append(next(iter(loader))[0])
    untouched = config(**RGB, **ERASING | {"INPUT__ERASING__PROB": 0.0})
    data.transform = build_train_transform(untouched, False)
    original = next(iter(DataLoader(SeededDataset(data, 0), **stream)))[0]
    lowest, highest = (
        torch.tensor([(edge - mean) / std for mean, std in ((120, 60), (110, 50), (100, 40))]).view(3, 1, 1)
        for edge in (0, 255)
    )
    torch.testing.assert_close(batches[1], batches[0].clamp(lowest, highest), rtol=0, atol=0.5 / 40 + 1e-5)
    erased = (batches[0] != original).any(1)
    assert (erased.flatten(1).sum(1) > 10).all() and erased.float().mean() < 0.5
    assert torch.equal(batches[0][0][:, ~erased[0]], original[0][:, ~erased[0]])
    if mode == "const":
        assert (batches[0].transpose(0, 1)[:, erased] == 0).all()


def test_erasing_before_an_input_norm_is_in_the_scale_of_pixels():
    image = transformed(config(**RGB, **ERASING, INPUT__NORM_GAMMA_INIT=0.1), noise())
    mean = torch.tensor([120.0, 110.0, 100.0]).view(3, 1, 1) / 255
    erased = ((image - mean).abs() < 1e-6).all(0)
    assert erased.sum() > 10
    plain = transformed(config(**RGB, **ERASING | {"INPUT__ERASING__PROB": 0.0}, INPUT__NORM_GAMMA_INIT=0.1), noise())
    torch.testing.assert_close(image[:, ~erased], plain[:, ~erased])


def test_colour_shift_moves_all_pixels_by_one_vector_of_the_right_covariance():
    shift, grey = ColorShift(0.5), Image.new("RGB", (2, 2), (128, 128, 128))
    torch.manual_seed(0)
    moved = np.stack([np.asarray(shift(grey)).astype(float) for _ in range(3000)])
    assert (moved == moved[:, :1, :1]).all()
    directions = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    expected = directions @ np.diag((0.5 * 255 * np.array([0.2175, 0.0188, 0.0045])) ** 2) @ directions.T
    np.testing.assert_allclose(np.cov(moved[:, 0, 0].T), expected, rtol=0.1)
    assert np.asarray(ColorShift(5.0)(Image.new("RGB", (1, 1)))).dtype == np.uint8


def test_colour_shift_comes_before_the_normalization():
    cfg = config(**RGB, INPUT__COLOR_SHIFT=0.1, INPUT__TRAIN_CROP="padded", INPUT__PADDING=0, INPUT__HFLIP=0.0)
    grey = Image.new("RGB", (32, 32), (128, 128, 128))
    for prefetch in (False, True):
        steps = build_train_transform(cfg, prefetch).transforms
        assert [type(step) for step in steps].index(ColorShift) == len(steps) - (2 if not prefetch else 1) - 1
    bytes_, normalized = transformed(cfg, grey, True), transformed(cfg, grey)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ((120.0, 110.0, 100.0), (60.0, 50.0, 40.0)))
    torch.testing.assert_close((bytes_ - mean) / std, normalized)
    assert (bytes_ != 128).all()


@pytest.mark.parametrize("crop", ["scaled", "resized_center", "resized_random"])
def test_crops_of_a_resized_image(crop):
    """A ramp says by its slope how much it was enlarged, and by its first value where the crop begins."""
    scale = {"INPUT__SCALE": "(0.25, 1.0)", "INPUT__RATIO": "(1.0, 1.0)", "INPUT__SHORT_SIDE": "(32, 64)"}
    cfg = config(**RGB, **scale, INPUT__TRAIN_CROP=crop, INPUT__HFLIP=0.0)
    transform = build_train_transform(cfg, prefetch=True)
    ramp = Image.fromarray(np.tile(np.arange(48, dtype=np.uint8)[None, :, None] * 4, (32, 1, 3)))
    slopes, starts = [], []
    random.seed(0), torch.manual_seed(0)
    for _ in range(120):
        image = transform(ramp)
        assert image.shape == (3, 32, 32)
        row = image[0, 0].float()
        slopes.append((row[28] - row[4]).item() / 24 / 4)
        starts.append((row[4] - 4 * 4 * slopes[-1]).item() / 4)
    assert 0.45 < min(slopes) < 0.6 and 0.95 < max(slopes) < 1.05  # enlarged by up to two
    whole = [start for slope, start in zip(slopes, starts) if slope > 0.98]
    if crop == "resized_center":
        assert max(whole) - min(whole) < 1
    else:
        assert max(whole) - min(whole) > 8


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"INPUT__VFLIP": 2}, "INPUT.VFLIP must be from 0 to 1, got 2"),
        ({"INPUT__ERASING__PROB": 1.5}, "INPUT.ERASING.PROB must be from 0 to 1, got 1.5"),
        ({"INPUT__ERASING__MODE": "noise"}, "INPUT.ERASING.MODE must be one of 'const', 'rand', 'pixel', got 'noise'"),
        ({"INPUT__ERASING__COUNT": 0}, "INPUT.ERASING.COUNT must be 1 or more, and 100 or less, got 0"),
        ({"INPUT__COLOR_SHIFT": 0.1}, "INPUT.COLOR_SHIFT must be 0.0 with INPUT.FORMAT 'L', .* got 0.1"),
        ({"INPUT__TRAIN_CROP": "none", "INPUT__VFLIP": 0.5}, "INPUT.VFLIP must be 0.0 with INPUT.TRAIN_CROP 'none'"),
        (
            {"INPUT__TRAIN_CROP": "scaled", "INPUT__SHORT_SIDE": "(16, 40)"},
            r"INPUT.SHORT_SIDE must be two whole numbers from INPUT.SIZE, 32, to 8192, .* got \(16, 40\)",
        ),
        ({"INPUT__REPEATED_AUGMENTATIONS": 3}, "INPUT.REPEATED_AUGMENTATIONS must be a divisor of .*, 32, got 3"),
        (
            {"INPUT__REPEATED_AUGMENTATIONS": 2, "DATALOADER__IMAGES_PER_CLASS": 1},
            "DATALOADER.IMAGES_PER_CLASS must be 0 with INPUT.REPEATED_AUGMENTATIONS, .* got 1",
        ),
        ({"INPUT__MIXUP_PROB": -1}, "INPUT.MIXUP_PROB must be from 0 to 1, got -1"),
        ({"INPUT__MIXUP_MODE": "each"}, "INPUT.MIXUP_MODE must be one of 'batch', 'pair', 'elem', got 'each'"),
        ({"INPUT__MIXUP_OFF_EPOCH": -1}, "INPUT.MIXUP_OFF_EPOCH must be 0 or more, .* got -1"),
    ],
)
def test_values_that_are_refused(overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_config(config(**overrides))


# --- repeated augmentation -------------------------------------------------------------------------------------------


def taken(size: int, count: int, **options) -> list[int]:
    stream = iter(InfiniteSampler(size, 0, **options))
    return [next(stream)[0] for _ in range(count)]


def test_each_image_comes_so_often_in_a_row():
    indices = taken(7, 42, repeats=3)
    assert indices[::3] == indices[1::3] == indices[2::3] == taken(7, 14)
    assert taken(7, 10, repeats=3, start=5) == indices[5:15]
    shares = [taken(7, 21, repeats=3, rank=rank, world_size=2) for rank in (0, 1)]
    assert [index for pair in zip(*shares) for index in pair] == indices
    # timm's has the same rows, and as many positions in an epoch as there are images.
    theirs = list(RepeatAugSampler(range(7), 1, 0, shuffle=False, num_repeats=3, selected_round=0))
    assert theirs == taken(7, 7, repeats=3, shuffle=False)


@pytest.mark.parametrize("in_memory", ["auto", "never"])
def test_a_batch_has_each_of_its_images_in_several_forms(in_memory):
    cfg = config(INPUT__REPEATED_AUGMENTATIONS=4, SOLVER__IMS_PER_BATCH=8, DATALOADER__IN_MEMORY=in_memory)
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8)
    images, labels = next(build_train_loader(cfg, Images([(ramp + i, i) for i in range(6)], "L"), CPU))
    assert labels[:4].unique().numel() == labels[4:].unique().numel() == 1 and labels[0] != labels[4]
    assert len({image.numpy().tobytes() for image in images}) > 5


# --- mixup -----------------------------------------------------------------------------------------------------------


def test_mixup_has_the_configs_arguments_and_ends_with_its_epoch():
    assert build_mixup(config(), 10) is None
    keys = {"INPUT__MIXUP": 0.3, "INPUT__CUTMIX": 0.7, "INPUT__MIXUP_PROB": 0.6, "INPUT__MIXUP_SWITCH_PROB": 0.2}
    cfg = config(**keys, INPUT__MIXUP_MODE="pair", INPUT__MIXUP_OFF_EPOCH=2, SOLVER__LABEL_SMOOTHING=0.1)
    mixup = build_mixup(cfg, 10)
    theirs = Mixup(0.3, 0.7, prob=0.6, switch_prob=0.2, mode="pair", label_smoothing=0.1, num_classes=10)
    assert vars(mixup) == vars(theirs)
    images, labels = torch.rand(6, 1, 4, 4), torch.arange(6)
    for epoch, mixes in ((0, True), (1, True), (2, False), (3, False)):
        switch_mixup(mixup, cfg, epoch)
        np.random.seed(1)
        mixed, targets = mixup(images.clone(), labels)
        assert torch.equal(mixed, images) != mixes
        assert targets.sum(1).tolist() == pytest.approx([1] * 6) and targets.argmax(1).tolist()[0] in (0, 5)
    assert targets.max().item() == pytest.approx(0.91)  # still smoothed


# --- all of it -------------------------------------------------------------------------------------------------------


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    options = {
        **{"INPUT__VFLIP": 0.5, "INPUT__ERASING__PROB": 0.5, "INPUT__ERASING__MODE": "pixel", "INPUT__MIXUP": 0.4},
        **{"INPUT__REPEATED_AUGMENTATIONS": 2, "INPUT__TRAIN_CROP": "resized_random", "INPUT__MIXUP_OFF_EPOCH": 1},
        **{"INPUT__MIXUP_MODE": "elem", "INPUT__CUTMIX": 0.4, "INPUT__MIXUP_PROB": 0.8, "MODEL__NAME": "test_byobnet"},
        **{"DATASETS__TRAIN_IMAGES": 96, "SOLVER__MAX_EPOCH": 2, "SOLVER__WARMUP_EPOCHS": 0, "TEST__EVAL_PERIOD": 0},
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ClassificationTrainer(config(whole, **options, DATALOADER__NUM_WORKERS=0)).train()
    ClassificationTrainer(config(parts, **options, SOLVER__MAX_ITER=2, DATALOADER__NUM_WORKERS=0)).train()
    ClassificationTrainer(config(parts, **options, DATALOADER__NUM_WORKERS=2), resume=True).train()
    one, other = (load_file(folder / "model_final.pth")["model"] for folder in (whole, parts))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# --- what every image goes through -----------------------------------------------------------------------------------


def both(cfg, image) -> list[torch.Tensor]:
    """An image in evaluation as the model sees it: by timm's transform, as one of several views, and from memory."""
    single = build_val_transform(cfg, prefetch=False)(image)
    memory = build_val_loader(cfg, Images([(np.asarray(image), 0)], cfg.INPUT.FORMAT), CPU)
    assert isinstance(memory, MemoryLoader)
    return [single, normalized(Views(cfg)(image), cfg)[0], next(iter(memory))[0][0]]


def grey(size: int) -> Image.Image:
    return noise(size).convert("L")


def test_images_on_a_canvas():
    """CIFAR-10 in Hajaj and Gillies (2018): 32 pixels in the middle of 40, of which the model sees 36."""
    frame = {"INPUT__CANVAS": 40, "INPUT__SIZE": 36, "INPUT__CROP_PCT": 0.9, "MODEL__PIXEL_MEAN": (0,)}
    cfg = config(**frame, MODEL__PIXEL_STD=(255,))
    image = grey(32)
    expected = torch.zeros(1, 36, 36)
    expected[0, 2:34, 2:34] = torch.from_numpy(np.array(image))
    for found in both(cfg, image):
        torch.testing.assert_close(found * 255, expected)
    ten = normalized(Views(cfg, 10)(image), cfg)
    corner = torch.zeros(1, 36, 36)
    corner[0, 4:, 4:] = torch.from_numpy(np.array(image))
    torch.testing.assert_close(ten[0] * 255, corner)
    cfg = config(**frame, MODEL__PIXEL_STD=(255,), INPUT__TRAIN_CROP="scaled", INPUT__SHORT_SIDE="(36, 36)")
    assert transformed(cfg, image).shape == (1, 36, 36)  # resized as it is framed: a margin of 4 pixels of 40 is black
    assert not transformed(cfg, image)[0, :3].any() and transformed(cfg, image)[0, 5:30].any()


def test_images_are_stretched():
    image = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[:, None] * 4, (1, 128)))
    cfg = config(INPUT__STRETCH=40, INPUT__CROP_PCT=0.8, MODEL__PIXEL_MEAN=(0,), MODEL__PIXEL_STD=(255,))
    expected = np.asarray(image.resize((40, 40), Image.BILINEAR))[4:36, 4:36]
    for found in both(cfg, image):
        torch.testing.assert_close(found[0] * 255, torch.tensor(expected, dtype=torch.float32), atol=1.01, rtol=0)


def test_black_and_white_images():
    cfg = config(INPUT__BINARY_THRESHOLD=128, INPUT__CROP_PCT=1.0, MODEL__PIXEL_MEAN=(0,), MODEL__PIXEL_STD=(255,))
    image = grey(32)
    expected = torch.from_numpy(np.asarray(image) >= 128)[None].float()
    for found in both(cfg, image):
        assert torch.equal(found, expected)
    trained = transformed(cfg, grey(48))  # the crop is resized, its pixels are not in between
    assert trained.unique().tolist() == [0, 1]
    assert set(transformed(cfg, grey(48), prefetch=True).unique().tolist()) == {0, 255}
    in_memory = build_train_loader(cfg, Images([(np.asarray(image), 0)] * 40, "L"), CPU)
    assert next(in_memory)[0].unique().tolist() == [0, 1]
    with pytest.raises(ValueError, match="INPUT.ERASING.PROB must be 0.0 with INPUT.BINARY_THRESHOLD"):
        check_config(config(INPUT__BINARY_THRESHOLD=128, INPUT__ERASING__PROB=0.5))
    with pytest.raises(ValueError, match="INPUT.BINARY_THRESHOLD must be 0 or more, and 255 or less, got 256"):
        check_config(config(INPUT__BINARY_THRESHOLD=256))
