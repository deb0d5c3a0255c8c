"""The set that the demo makes: exact masks, nothing shared between the splits, the same files from the same seed."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from fbn_plugin.engine.data.demo_data import IMAGE_SIZE, LEAST_VISIBLE, make_digits_on_photos
from fbn_plugin.engine.data.named_sets import resolve_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_digits_on_photos(tmp_path_factory.mktemp("demo") / "digits", num_train=6, num_val=3)


def test_it_is_a_coco_format_set(folder):
    train, val = (resolve_dataset(f"{folder}:{split}") for split in ("train", "val"))
    assert (len(train.images), len(val.images)) == (6, 3)
    assert train.class_names == val.class_names == tuple("0123456789")
    for data in (train, val):
        for image in data.images:
            assert Image.open(data.image_root / image["file_name"]).size == (IMAGE_SIZE, IMAGE_SIZE)
            assert 2 <= sum(each["image_id"] == image["id"] for each in data.annotations) <= 6


def test_masks_are_exact_and_do_not_overlap(folder):
    data = resolve_dataset(f"{folder}:train")
    for image in data.images:
        pixels = np.asarray(Image.open(data.image_root / image["file_name"]))
        objects = [each for each in data.annotations if each["image_id"] == image["id"]]
        masks = [coco_mask.decode(each["segmentation"]).astype(bool) for each in objects]
        assert np.sum(masks, axis=0).max() == 1
        for each, mask in zip(objects, masks):
            # a digit is drawn in one colour, so the pixels under its mask all have it
            assert len(np.unique(pixels[mask], axis=0)) == 1
            rows, columns = np.nonzero(mask)
            box = [columns.min(), rows.min(), columns.max() - columns.min() + 1, rows.max() - rows.min() + 1]
            assert each["bbox"] == box and each["area"] == mask.sum() > 50 * LEAST_VISIBLE


def test_the_seed_decides_everything(folder, tmp_path):
    again = make_digits_on_photos(tmp_path / "again", num_train=6, num_val=3)
    other = make_digits_on_photos(tmp_path / "other", num_train=6, num_val=3, seed=1)
    for name in ("annotations/instances_train.json", "train/00002.png", "val/00003.png"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
        assert (other / name).read_bytes() != (folder / name).read_bytes()
    assert json.loads((other / "annotations/instances_val.json").read_text())["info"]["seed"] == 1
