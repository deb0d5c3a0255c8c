"""COCO data: every usual layout is found, damage is one sentence, and masks, boxes and pixels stay together."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_utils

from fbn_plugin.engine.data.coco_data import Augmentation, CocoDetection, scaled_size
from fbn_plugin.engine.data.named_sets import resolve_dataset
from fbn_plugin.engine.data.sampling import SeededDataset
from fbn_plugin.engine.run.cli import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def copy(shapes, tmp_path):
    return Path(shutil.copytree(shapes, tmp_path / "set"))


def edit(folder, split, change):
    path = folder / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_annotations_are_numbered_from_one(shapes):
    assert [each["id"] for each in resolve_dataset(f"{shapes}:train").annotations][:2] == [1, 2]


def _first(field, value):
    return lambda content: content["annotations"][0].__setitem__(field, value)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c.pop("categories"), "no list 'categories'"),
        (lambda c: c["images"].clear(), "has no images"),
        (lambda c: c["images"][0].pop("height"), "'height'"),
        (lambda c: c["annotations"][0].pop("bbox"), "annotation 0 lacks 'bbox'"),
        (_first("image_id", 99), "annotation 0: 'image_id' must be the id of one of the file's 4 images"),
        (_first("category_id", 99), "'category_id' must be the id of one of the file's 2 categories"),
        (_first("bbox", [1, 2, 3]), "'bbox' must be a list of 4 numbers"),
        (_first("bbox", [1, 2, float("nan"), 3]), "'bbox' must be 4 finite numbers, got nan"),
        (_first("segmentation", {"size": [5, 5], "counts": "1"}), "size (height, width) [96, 80], got [5, 5]"),
        (_first("segmentation", [[1, 2, 3, 4, 5, 6, 7]]), "polygons of an even number of coordinates, not 7"),
        (lambda c: c["images"][1].__setitem__("file_name", "gone.png"), "gone.png is not there (1 of 4 missing)"),
        (lambda c: c["images"].append(c["images"][0]), "2 images have the id 0, which must be that of one"),
        (lambda c: c["categories"].append({"id": 3, "name": "x"}), "2 categories have the id 3"),
        (lambda c: [each.__setitem__("file_name", "a/b.png") for each in c["images"]], "'a/b.png'"),
    ],
)
def test_wrong_content_is_named(copy, change, words):
    edit(copy, "val", change)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        resolve_dataset(f"{copy}:val")
    assert words in str(error.value) and str(copy) in str(error.value) and "\n" not in str(error.value)


def test_categories_of_one_name_are_told_apart(copy, caplog):
    def change(content):
        content["categories"] += [{"id": 9, "name": "box"}]

    edit(copy, "train", change)
    assert resolve_dataset(f"{copy}:train").class_names == ("disc", "box (id 7)", "box (id 9)")
    assert (
        "instances_train.json: names that several categories have are told apart by the id: box (id 7)" in caplog.text
    )


def test_a_file_cut_short(copy):
    path = copy / "annotations/instances_val.json"
    path.write_text(path.read_text()[:300])
    with pytest.raises(ValueError, match=r"instances_val\.json is not valid JSON, perhaps cut short"):
        resolve_dataset(f"{copy}:val")


def test_targets_are_the_annotations(shapes):
    data = resolve_dataset(f"{shapes}:train")
    samples = CocoDetection([data])
    assert len(samples) == 8
    for index, image in enumerate(data.images):
        pixels, target = samples[index]
        own = [each for each in data.annotations if each["image_id"] == image["id"]]
        assert pixels.shape == (3, image["height"], image["width"]) and target["image_id"] == image["id"]
        assert torch.equal(
            (pixels * 255).byte(),
            torch.from_numpy(np.array(Image.open(data.image_root / image["file_name"]))).permute(2, 0, 1),
        )
        assert target["labels"].tolist() == [data.category_ids.index(each["category_id"]) + 1 for each in own]
        for box, mask, each in zip(target["boxes"].tolist(), target["masks"], own):
            x, y, w, h = each["bbox"]
            assert box == [x, y, x + w, y + h]
            assert mask.sum() == each["area"] and mask.dtype == torch.uint8
            assert mask_utils.toBbox(mask_utils.encode(np.asfortranarray(mask.numpy()))).tolist() == each["bbox"]
    assert samples[7][1]["boxes"].shape == (0, 4) and samples[7][1]["masks"].shape == (0, *samples[7][0].shape[1:])


def test_images_without_objects_and_crowds(copy):
    def crowd(content):
        for each in content["annotations"]:
            if each["image_id"] == 0:
                each["iscrowd"] = 1

    edit(copy, "train", crowd)
    data = resolve_dataset(f"{copy}:train")
    assert len(CocoDetection([data])) == 8
    assert CocoDetection([data])[0][1]["boxes"].shape == (0, 4)
    kept = CocoDetection([data], filter_empty=True)
    assert [kept[i][1]["image_id"] for i in range(len(kept))] == [1, 2, 3, 4, 5, 6]


def test_objects_without_a_mask(copy, caplog):
    edit(copy, "train", lambda c: [c["annotations"][0].pop("segmentation"), _first("segmentation", [[1, 2, 3, 4]])(c)])
    data = resolve_dataset(f"{copy}:train")
    data.say_left_out(masks=False)
    data.say_left_out(masks=True)
    with_masks, without = CocoDetection([data]), CocoDetection([data], masks=False)
    assert len(with_masks[0][1]["labels"]) == len(without[0][1]["labels"]) - 1
    assert "masks" not in without[0][1]
    assert [r.message for r in caplog.records] == [
        f"{copy / 'annotations/instances_train.json'} left out: polygons of fewer than 3 points (1)",
        f"{copy}:train: 1 of {len(data.annotations)} annotations without a mask, left out",
    ]


def test_uncompressed_rle_is_the_same_mask(copy):
    data = resolve_dataset(f"{copy}:train")
    number = next(i for i, each in enumerate(data.annotations) if isinstance(each["segmentation"], dict))
    rle = data.annotations[number]["segmentation"]
    flat = mask_utils.decode(rle).ravel(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    edit(copy, "train", lambda c: c["annotations"][number].__setitem__("segmentation", {**rle, "counts": counts}))
    plain = resolve_dataset(f"{copy}:train")
    for i in range(8):
        assert torch.equal(CocoDetection([plain])[i][1]["masks"], CocoDetection([data])[i][1]["masks"])


@pytest.mark.parametrize("flip", ["horizontal", "vertical", "none"])
@pytest.mark.parametrize("short", [40, 80, 200])
def test_augmentation_moves_pixels_boxes_and_masks_together(shapes, flip, short):
    data = resolve_dataset(f"{shapes}:train")
    samples = SeededDataset(CocoDetection([data], Augmentation((short,), 1000, flip=flip)), seed=0)
    plain = CocoDetection([data])
    flipped = 0
    for index in (0, 1, 2):
        for position in range(7):
            pixels, target = samples[index, position]
            assert min(pixels.shape[1:]) == short and target["masks"].shape[1:] == pixels.shape[1:]
            scale = pixels.shape[1] / plain[index][0].shape[1]
            for box, mask, whole in zip(target["boxes"], target["masks"], plain[index][1]["masks"]):
                ys, xs = mask.nonzero(as_tuple=True)
                tight = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
                assert (tight - box).abs().max() <= 1.01 * max(1, scale)
                assert mask.sum().item() == pytest.approx(whole.sum().item() * scale**2, rel=0.15)
                inside, around = pixels[:, mask > 0].mean(), pixels[:, (target["masks"] == 0).all(0)].mean()
                assert inside > around + 0.1  # shapes are brighter than the ground
            straight = torch.nn.functional.interpolate(
                plain[index][0][None], pixels.shape[1:], mode="bilinear", antialias=True
            )[0]
            turned = straight.flip(-1 if flip == "horizontal" else -2)
            distance = [(pixels - other).abs().mean() for other in (straight, turned)]
            assert min(distance) < 0.01
            flipped += int(distance[1] < distance[0])
    assert (flipped == 0) if flip == "none" else (3 < flipped < 18)


def test_sizes_are_drawn_from_position_alone(shapes):
    data = resolve_dataset(f"{shapes}:train")
    for sampling, allowed in (("choice", {48, 64}), ("range", set(range(48, 65)))):
        samples = SeededDataset(CocoDetection([data], Augmentation((48, 64), 1000, sampling)), seed=0)
        drawn = [min(samples[0, position][0].shape[1:]) for position in range(30)]
        assert set(drawn) <= allowed and len(set(drawn)) > 1
        assert drawn == [min(samples[0, position][0].shape[1:]) for position in range(30)]


@pytest.mark.parametrize(
    "size, short, longest, expected",
    [((480, 640), 800, 1333, (800, 1067)), ((300, 900), 800, 1333, (444, 1333)), ((427, 640), 128, 1000, (128, 192))],
)
def test_scaled_size(size, short, longest, expected):
    assert scaled_size(*size, short, longest) == expected
    assert scaled_size(*size[::-1], short, longest) == expected[::-1]


def test_images_that_cannot_be_used_are_named(copy):
    path = copy / "train/0.png"
    samples = CocoDetection([resolve_dataset(f"{copy}:train")])

    def fails(words):
        with pytest.raises(UserError) as error:
            samples[0]
        assert str(path) in str(error.value) and words in str(error.value)

    path.write_bytes(path.read_bytes()[:200])
    fails("cannot be read")
    path.write_bytes(b"no image")
    fails("cannot be read")
    Image.new("RGB", (10, 20)).save(path)
    fails("is 10x20, its annotation file says 80x96")
    path.unlink()
    fails("is not there")


@pytest.mark.parametrize(
    "name, split, images, usable, classes",
    [
        ("fruits_nuts", "train", 12, 12, 3),
        ("fruits_nuts", "trainval", 18, 18, 3),
        ("dsb2018_nuclei_small", "val", 108, 108, 1),
        ("coco2017_subset", "train", 192, 190, 80),
    ],
)
def test_real_sets(real_data, name, split, images, usable, classes):
    data = resolve_dataset(f"{real_data(name)}:{split}")
    assert (len(data.images), len(data.class_names)) == (images, classes)
    samples = SeededDataset(CocoDetection([data], Augmentation((128, 160), 256), filter_empty=True), seed=0)
    assert len(samples) == usable
    for index in range(0, usable, max(1, usable // 6)):
        pixels, target = samples[index, index]
        assert pixels.shape[0] == 3 and target["masks"].shape == (len(target["boxes"]), *pixels.shape[1:])
        assert target["labels"].min() >= 1 and target["labels"].max() <= classes
