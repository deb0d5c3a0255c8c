"""Small sets in memory: the same images as timm's transforms give, drawn by the batch from the seed and the place."""

import math
import random
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

from fbn_plugin.engine.classification import memory_data
from fbn_plugin.engine.classification.config import check_config, classification_config
from fbn_plugin.engine.classification.data import (
    build_train_loader,
    build_train_transform,
    build_val_loader,
    images_in_memory,
)
from fbn_plugin.engine.classification.memory_data import ImagesInMemory, MemoryLoader, batch_augmentation
from fbn_plugin.engine.classification.trainer import ClassificationTrainer
from fbn_plugin.engine.data.image_data import Images
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.checkpoint import load_file
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
    data, decoded = noise(3, shape=(9, 9)), Counter()
    decode = Images.__getitem__
    monkeypatch.setattr(Images, "__getitem__", lambda self, i: decoded.update([i]) or decode(self, i))
    cfg = config()
    assert same(build_val_loader(cfg, data, CPU), build_val_loader(cfg, data, CPU))
    take(build_train_loader(cfg, data, CPU), 5)
    build_val_loader(config(INPUT__CROP_PCT=0.5), data, CPU)
    assert set(decoded.values()) == {3}


def states():
    """Of the global generators."""
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


@pytest.mark.parametrize("crop", ["none", "padded", "random_resized"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_stream_that_the_seed_and_the_place_decide(crop, mode):
    cfg = config(mode, INPUT__TRAIN_CROP=crop, INPUT__HFLIP=0.5, INPUT__PADDING=2, SEED=7)
    whole = take(build_train_loader(cfg, noise(11, mode), CPU), 9)
    before = states()
    assert same(take(build_train_loader(cfg, noise(11, mode), CPU, start=4), 5), whole[4:])
    assert states() == before
    labels = torch.cat([labels for _, labels in whole]).tolist()
    assert sorted(labels[:11]) == sorted(labels[11:22]) == list(range(11)) and labels[:11] != labels[11:22]
    if crop != "none":
        cfg = config(mode, INPUT__TRAIN_CROP=crop, INPUT__HFLIP=0.5, INPUT__PADDING=2, SEED=8)
        assert not same(take(build_train_loader(cfg, noise(11, mode), CPU), 1), whole[:1])


@pytest.mark.parametrize("per_class", [0, 2])
def test_processes_share_one_stream(monkeypatch, per_class):
    data = noise(12)
    data.samples = [(image, label % 2) for image, label in data.samples]
    options = {"INPUT__TRAIN_CROP": "padded", "INPUT__PADDING": 2, "DATALOADER__IMAGES_PER_CLASS": per_class}

    def batches(rank, world, number):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: world)
        return take(build_train_loader(config(SOLVER__IMS_PER_BATCH=4 * world, **options), data, CPU), number)

    shares = [batches(rank, 2, 3) for rank in (0, 1)]
    if per_class:
        assert all(sorted(labels.tolist()) == [0, 0, 1, 1] for share in shares for _, labels in share)
    else:
        monkeypatch.setattr(distributed, "rank", lambda: 0)
        monkeypatch.setattr(distributed, "world_size", lambda: 1)
        whole = take(build_train_loader(config(SOLVER__IMS_PER_BATCH=8, **options), data, CPU), 3)
        dealt = [[torch.stack(pair, 1).flatten(0, 1) for pair in zip(*both)] for both in zip(*shares)]
        assert same(dealt, whole)


def windows(image, size, padding):
    """Every window of the padded image, plain and mirrored, by its bytes."""
    padded = np.pad(image, [(0, 0), (padding, padding), (padding, padding)])
    high, wide = (length - size + 1 for length in padded.shape[1:])
    plain = {(i, j): padded[:, i : i + size, j : j + size] for i in range(high) for j in range(wide)}
    both = {(place, flip): each[:, :, ::-1] if flip else each for place, each in plain.items() for flip in (0, 1)}
    return {each.tobytes(): place for place, each in both.items()}


@pytest.mark.parametrize("shape", [(4, 4), (4, 6)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_padded_crops_and_flips_are_uniform_and_those_of_the_transform(mode, shape):
    """Every place is taken as often as any other, within five standard deviations, by both ways."""
    cfg = config(mode, 4, INPUT__TRAIN_CROP="padded", INPUT__PADDING=1, INPUT__HFLIP=0.25)
    transform, data, number = build_train_transform(cfg, prefetch=True), noise(1, mode, shape), 6000
    images = ImagesInMemory(data, batch_augmentation(build_train_transform(cfg, prefetch=False)), seed=3)
    kept, _ = images[0]
    places = windows(kept, 4, 1)
    torch.manual_seed(0)
    image = data[0][0]
    by_batch = Counter(places[each.tobytes()] for each in images.batch([0] * number, range(number))[0].numpy())
    by_image = Counter(places[transform(image).numpy().tobytes()] for _ in range(number // 4))
    for seen in (by_batch, by_image):
        total = seen.total()
        assert set(seen) == set(places.values())
        for (place, flip), count in seen.items():
            share = (0.25 if flip else 0.75) * 2 / len(places)
            assert abs(count - total * share) < 5 * math.sqrt(total * share), (place, flip)


def test_padding_beyond_the_image_gives_black_ones_too():
    cfg = config("L", 2, INPUT__TRAIN_CROP="padded", INPUT__PADDING=5, INPUT__HFLIP=0.5)
    images = ImagesInMemory(noise(1, "L", (2, 2)), batch_augmentation(build_train_transform(cfg, False)))
    kept = images[0][0]
    seen = {each.tobytes() for each in images.batch([0] * 2000, range(2000))[0].numpy()}
    assert seen == set(windows(kept, 2, 5))


@pytest.mark.parametrize("shapes", [[(4, 4)] * 3, [(4, 4), (4, 6), (4, 4)]])
@pytest.mark.parametrize("most", [2**30, 0])
def test_a_batch_is_its_images_one_by_one_however_they_are_kept(monkeypatch, shapes, most):
    monkeypatch.setattr(memory_data, "_MOST_BYTES", most)
    cfg = config(size=4, INPUT__TRAIN_CROP="padded", INPUT__PADDING=1, INPUT__HFLIP=0.5)
    augmentation = batch_augmentation(build_train_transform(cfg, False))
    images = ImagesInMemory(noise(3, shape=shapes), augmentation)
    batch, labels = images.batch([2, 1, 1, 0], range(4))
    assert labels.tolist() == [2, 1, 1, 0]
    alone = ImagesInMemory(noise(3, shape=shapes), augmentation)
    for place, index in enumerate([2, 1, 1, 0]):
        assert torch.equal(alone.batch([index], [place])[0][0], batch[place])
    assert [image.shape[1:] for image, _ in map(images.__getitem__, range(3))] == shapes


class Replayed:
    """Python's ``random`` that gives a row of the table: areas and ratios, then the place."""

    def __init__(self, draws):
        self.attempts, self.place = iter(draws[4:]), iter(draws[:2])

    def uniform(self, low, high):
        return low + next(self.attempts) * (high - low)

    def randint(self, low, high):
        return low + int(next(self.place) * (high - low + 1))


@pytest.mark.parametrize(("scale", "ratio"), [((0.25, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (0.2, 0.3))])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_resized_crops_are_timms(monkeypatch, mode, scale, ratio):
    """timm's own class draws the same numbers, the centre that is taken after ten attempts included."""
    cfg = config(mode, 6, INPUT__TRAIN_CROP="random_resized", INPUT__SCALE=scale, INPUT__RATIO=ratio, INPUT__HFLIP=0)
    shapes = [(8, 8), (20, 9), (7, 30), (12, 13)]
    data = noise(4, mode, shapes)
    images = ImagesInMemory(data, batch_augmentation(build_train_transform(cfg, False)), seed=5)
    crop = RandomResizedCropAndInterpolation(6, scale, ratio, "bilinear")
    positions = range(0, 3000, 37)
    indices = [position % 4 for position in positions]
    batch, labels = images.batch(indices, positions)
    assert labels.tolist() == indices
    for index, out, draws in zip(indices, batch, images._draws.rows(positions).tolist()):
        monkeypatch.setattr("timm.data.transforms.random", Replayed(draws))
        expected = np.asarray(crop(data[index][0]))
        expected = expected.transpose(2, 0, 1) if mode == "RGB" else expected[None]
        np.testing.assert_array_equal(out.numpy(), expected)


def test_what_batches_cannot_have_is_left_to_the_workers():
    for overrides in ({"INPUT__COLOR_JITTER": 0.4}, {"INPUT__AUTO_AUGMENT": "rand-m9-mstd0.5"}):
        cfg = config(INPUT__TRAIN_CROP="random_resized", **overrides)
        assert batch_augmentation(build_train_transform(cfg, False)) is None
        assert images_in_memory(cfg, noise(8), build_train_transform(cfg, False)) is None
        with pytest.raises(ValueError, match=r"IN_MEMORY must be 'auto' or 'never' .*, got 'always'"):
            check_config(config(INPUT__TRAIN_CROP="random_resized", DATALOADER__IN_MEMORY="always", **overrides))


@pytest.mark.parametrize(
    "steps",
    [
        [transforms.RandomCrop(4, pad_if_needed=True)],
        [transforms.RandomCrop(4, 1, padding_mode="reflect")],
        [transforms.RandomCrop(4, (1, 2))],
        [transforms.RandomCrop(4, 1, fill=3)],
        [RandomResizedCropAndInterpolation(4, interpolation="random")],
        [transforms.Resize(4)],
        [transforms.CenterCrop(4), transforms.RandomHorizontalFlip(), transforms.RandomHorizontalFlip()],
        [transforms.RandomHorizontalFlip(), transforms.CenterCrop(4)],
        [transforms.CenterCrop(4), transforms.RandomErasing()],
        [],
    ],
)
def test_transforms_of_another_kind_are_told(steps):
    end = [transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))]
    assert batch_augmentation(transforms.Compose([*steps, *end])) is None
    assert batch_augmentation(transforms.Compose([transforms.CenterCrop(4), *end, *steps[:1], *end[:1]])) is None
    assert batch_augmentation(transforms.Compose([transforms.CenterCrop(4), *end])) is not None


def test_only_small_sets_are_kept(monkeypatch):
    monkeypatch.setattr(memory_data, "_MOST_BYTES", 8 * 8 * 3 * 10)

    def kept(data, **overrides):
        loader = build_val_loader(config(**overrides), data, CPU)
        return isinstance(loader, MemoryLoader)

    assert kept(noise(10)) and not kept(noise(11)) and kept(noise(11), DATALOADER__IN_MEMORY="always")
    cfg = config(INPUT__TRAIN_CROP="random_resized")
    augmentation = batch_augmentation(build_train_transform(cfg, False))
    assert memory_data.fits_memory(ImagesInMemory(noise(2, shape=(16, 16)), augmentation))
    assert not memory_data.fits_memory(ImagesInMemory(noise(2, shape=(24, 24)), augmentation))


def test_batches_that_are_made_together_are_those_made_alone(monkeypatch):
    cfg = config(INPUT__TRAIN_CROP="padded", INPUT__HFLIP=0.5)
    whole = take(build_train_loader(cfg, noise(11), CPU), 12)
    monkeypatch.setattr(memory_data, "_AT_ONCE", 3 * 4 * 8 * 8)
    assert same(take(build_train_loader(cfg, noise(11), CPU), 12), whole)
    monkeypatch.setattr(memory_data, "_AT_ONCE", 1)
    assert same(take(build_train_loader(cfg, noise(11), CPU), 12), whole)


def test_one_is_made_ahead_and_errors_come_through():
    made = []

    def items():
        for item in range(1, 4):
            made.append(item)
            yield item
        raise OSError("no more")

    ahead = memory_data._one_ahead(items())
    assert next(ahead) == 1
    assert next(ahead) == 2 and made[:2] == [1, 2]
    assert next(ahead) == 3
    with pytest.raises(OSError, match="no more"):
        next(ahead)
    assert list(memory_data._one_ahead(iter([5, 6]))) == [5, 6]


@pytest.mark.parametrize("crop", ["padded", "random_resized"])
def test_a_run_that_goes_on_ends_with_the_same_bits(tmp_path, crop):
    def run(folder, stop, resume=False):
        options = {"INPUT__TRAIN_CROP": crop, "INPUT__HFLIP": 0.5, "SOLVER__MAX_ITER": stop, "TEST__EVAL_PERIOD": 0}
        cfg = config("L", 32, SOLVER__IMS_PER_BATCH=16, **options)
        cfg.defrost()
        cfg.OUTPUT_DIR = str(tmp_path / folder)
        ClassificationTrainer(cfg, resume).train()
        return load_file(tmp_path / folder / "model_final.pth")["model"]

    whole = run("whole", 6)
    run("parts", 4)
    parts = run("parts", 6, resume=True)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
