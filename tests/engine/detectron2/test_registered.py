"""Sets of detectron2's catalogs as the tools read them: files, and records that a Python function gives."""

import json

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from fbn_plugin.engine.data.named_sets import resolve_dataset

pytest.importorskip("detectron2", reason="detectron2 is not installed")
pytestmark = [pytest.mark.detectron2, pytest.mark.usefixtures("forgotten")]


@pytest.fixture
def forgotten():
    """What a test registers is gone afterwards."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name)


def register(name, records, **metadata):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(**metadata)


def records_of(shapes, split="val"):
    from fbn_plugin.engine.detectron2.data import records

    return records(resolve_dataset(f"{shapes}:{split}"), masks=True)


def test_records_are_the_same_set_as_their_file(shapes):
    """There and back: boxes, masks of both kinds, ids and areas."""
    register("mine", records_of(shapes), thing_classes=["disc", "box"], thing_dataset_id_to_contiguous_id={3: 0, 7: 1})
    file, mine = resolve_dataset(f"{shapes}:val"), resolve_dataset("mine")
    assert mine.categories == file.categories and mine.json_file is None
    assert [image["id"] for image in mine.images] == [image["id"] for image in file.images]
    key = "image_id", "category_id", "bbox", "iscrowd", "segmentation"
    ours, theirs = ([[each[k] for k in key] for each in data.annotations] for data in (mine, file))
    theirs = json.loads(json.dumps(theirs), parse_int=float)
    assert sorted(map(repr, json.loads(json.dumps(ours), parse_int=float))) == sorted(map(repr, theirs))
    areas = [sorted(each["area"] for each in data.annotations) for data in (mine, file)]
    assert areas[0] == pytest.approx(areas[1], rel=0.05)


def test_other_forms_of_boxes_and_masks(shapes):
    from detectron2.structures import BoxMode

    record = dict(records_of(shapes)[0])
    mask = np.zeros((record["height"], record["width"]), np.uint8)
    mask[4:14, 10:30] = 1
    polygons = [[10, 4, 30, 4, 30, 14, 10, 14], [1, 1, 2, 2]]  # the second one encloses nothing
    rle = mask_utils.encode(np.asfortranarray(mask))
    same = {"bbox": np.array([10, 4, 30, 14]), "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1}
    masks = [mask, polygons, rle, {"size": list(mask.shape), "counts": [0, mask.size]}, None]
    record["annotations"] = [{**same, "segmentation": each} for each in masks]
    register("forms", [record], thing_classes=["a", "b"])
    found = resolve_dataset("forms").annotations
    assert [each["bbox"] for each in found] == [[10.0, 4.0, 20.0, 10.0]] * 5
    assert [each["area"] for each in found] == [200.0, 200.0, 200.0, mask.size, 200.0]
    assert [each["category_id"] for each in found] == [1] * 5 and "segmentation" not in found[-1]
    assert found[1]["segmentation"] == [polygons[0]]


def test_a_registered_file(shapes):
    from detectron2.data.datasets import register_coco_instances

    file = resolve_dataset(f"{shapes}:val")
    register_coco_instances("filed", {}, str(file.json_file), str(file.image_root))
    filed = resolve_dataset("filed")
    assert (filed.annotations, filed.categories, filed.images) == (file.annotations, file.categories, file.images)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"image_id": None}, "dataset 'bad': image number 0 has no 'image_id'"),
        ({"annotations": [{"category_id": 2, "bbox": [0, 0, 1, 1], "bbox_mode": 1}]}, "category_id 2, and there are 2"),
        ({"annotations": [{"category_id": 1, "bbox": [0, 0, 1, 1]}]}, "has no 'bbox_mode'"),
        ({"annotations": [{"category_id": 1, "bbox": [0, 0, 1, 1, 30], "bbox_mode": 4}]}, "5 numbers, and rotated"),
        ({"file_name": "nowhere.png"}, "nowhere.png"),
    ],
)
def test_wrong_records_are_named(shapes, change, words):
    record = {**records_of(shapes)[0], **change}
    record = {key: value for key, value in record.items() if value is not None}
    register("bad", [record], thing_classes=["a", "b"])
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        resolve_dataset("bad")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_classes_are_needed():
    register("none", [])
    with pytest.raises(ValueError, match="dataset 'none' has no classes: set thing_classes in"):
        resolve_dataset("none")
