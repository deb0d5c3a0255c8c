"""Annotation files, of which every wrong field is refused when the file is read, and every odd one goes through a
training and an evaluation; and that many are read fast."""

import logging
import time

import numpy as np
import pytest
from coco_cases import ODD_FILES, READ, REFUSED, SQUARE, content, write_case
from pycocotools import mask as mask_utils

from fbn_plugin.engine.data import annotation_checks
from fbn_plugin.engine.data.annotation_checks import check_annotations
from fbn_plugin.engine.data.coco_checks import Findings, check_categories, check_images
from fbn_plugin.engine.data.coco_data import Augmentation, CocoDetection, read_dataset
from fbn_plugin.engine.data.coco_eval import evaluate_coco

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("set")


def read(folder, text):
    file = write_case(folder, text)
    return read_dataset("case", file, [folder])


def assert_refused(folder, text, words):
    with pytest.raises((ValueError, OSError)) as error:
        read(folder, text)
    sentence = str(error.value)
    assert words in sentence and str(folder) in sentence and "\n" not in sentence and len(sentence) < 700, sentence


@pytest.mark.parametrize("case", REFUSED)
def test_refused(folder, case):
    change, words = REFUSED[case]
    assert_refused(folder, content(change), words)


@pytest.mark.parametrize("case", READ)
def test_read(folder, case):
    """What is read is trained on and evaluated; its own objects are its detections."""
    change, masks = READ[case]
    data = read(folder, content(change))
    assert len(data.usable_annotations(masks=True)) == masks and len(data.annotations) == 2
    samples = CocoDetection([data], Augmentation((30, 60), 80))
    for index in range(2):
        pixels, target = samples[index]
        assert target["masks"].shape[1:] == pixels.shape[1:]
    for with_masks in (True, False):
        api = data.coco_api(with_masks)
        fields = ("image_id", "category_id", "bbox")
        found = [
            {**{field: each[field] for field in fields}, "score": 1}
            | ({"segmentation": api.annToRLE(each)} if with_masks else {})
            for each in api.dataset["annotations"]
        ]
        assert evaluate_coco(data, found, with_masks)["bbox/AP"] > 20  # an object without mask or extent is missed


@pytest.mark.parametrize("case", ODD_FILES)
def test_files(folder, case):
    text, words = ODD_FILES[case]
    if words is None:
        assert len(read(folder, text).annotations) == 2
    else:
        assert_refused(folder, text, words)


def test_what_is_no_file(tmp_path):
    file = write_case(tmp_path / "set", content(lambda coco: None))
    for name in ("folder", "pipe", "device"):
        with pytest.raises(OSError, match=f"{file.parent / name} is not a file"):
            read_dataset("case", file.parent / name, [file.parent])


@pytest.mark.parametrize(
    "case, expected",
    [
        ("a flat polygon", [SQUARE]),
        ("four points in lists", [SQUARE]),
        ("points without a list around", [SQUARE]),
        ("a polygon and one of a point", [SQUARE]),
        ("a code with an empty run", {"size": [40, 50], "counts": [1000, 1000]}),
        ("a code of a size with points", {"size": [40, 50], "counts": [1000, 1000]}),
    ],
)
def test_other_forms_of_a_mask(folder, case, expected):
    assert read(folder, content(READ[case][0])).annotations[0]["segmentation"] == expected


def test_other_forms_of_ids_and_sizes(folder):
    data = read(folder, content(READ["an image id with a point"][0]))
    assert [type(each["image_id"]) for each in data.annotations] == [int, int]
    assert type(read(folder, content(READ["a size with a point"][0])).images[0]["height"]) is int
    areas = [each["area"] for each in read(folder, content(READ["an area of null"][0])).annotations]
    assert areas == [400.0, 400]


def test_all_that_is_read_otherwise_or_left_out_is_counted(folder, caplog):
    def change(coco):
        first, second = coco["annotations"]
        first.update(area=None, segmentation=[[[5, 5], [25, 5], [25, 25]], [1, 2]], bbox=[90, 0, 5, 5])
        second.update(area=None, iscrowd=None, segmentation=SQUARE)
        coco["images"][1]["file_name"] = "1.png"

    with caplog.at_level(logging.WARNING, "fbn_plugin"):
        read(folder, content(change))
    (record,) = caplog.records
    assert record.message.split("; ") == [
        f"{folder / 'train.json'} has: an image file under a second id (1)",
        "read as what is meant: 'area' null, that of the box (2), a polygon as points [x, y] (1), 'iscrowd' null, "
        "not a crowd (1), a polygon without the list around it (1)",
        "left out: polygons of fewer than 3 points (1), by training, objects without extent inside of the image (1)",
    ]
    caplog.clear()
    read(folder, content(lambda coco: None))
    assert not caplog.records


def test_the_wrong_one_of_many_is_named(monkeypatch):
    """Annotations are checked in parts."""
    monkeypatch.setattr(annotation_checks, "_AT_ONCE", 10)
    images = check_images("file", [{"id": 1, "height": 40, "width": 50}], Findings(), named=False)
    categories = check_categories("file", [{"id": 1, "name": "x"}], Findings())
    code, cut = ({"size": [40, 50], "counts": [1000, length]} for length in (1000, 999))
    changes = {"bbox": [1, 2, 3, "4"]}, {"area": "x"}, {"segmentation": [[1, 2, 3, 4, 5, None]]}, {"iscrowd": 2}
    for wrong in (0, 9, 10, 15, 24):
        for change in (*changes, {"segmentation": cut}, {"keypoints": [1, 2, "x"]}):
            given = [
                {"id": i + 7, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "keypoints": [1, 2, 3] * (i % 3)}
                | {"segmentation": [SQUARE] * (i % 4) if i % 2 else code}
                for i in range(25)
            ]
            given[wrong] |= change
            with pytest.raises(ValueError, match=f"file: annotation {wrong + 7}: '{next(iter(change))}' must be"):
                check_annotations("file", given, images, categories, Findings())


def test_many_annotations_are_checked_fast():
    """25,000 of them take 0.3 seconds, 3 with a look at each coordinate; a test's machine may be slower."""
    rng = np.random.default_rng(0)
    pixels = np.zeros((480, 640), np.uint8)
    pixels[40:400] = rng.random((1, 640)) > 0.7
    code = mask_utils.encode(np.asfortranarray(pixels))["counts"].decode()
    assert len(code) > 300
    images = check_images("file", [{"id": 1, "height": 480, "width": 640}], Findings(), named=False)
    categories = check_categories("file", [{"id": 1, "name": "x"}], Findings())
    polygons = rng.uniform(0, 480, (25_000, 30)).tolist()
    given = [
        {
            "id": i,
            "image_id": 1,
            "category_id": 1,
            "bbox": [1.5, 2.5, 30.5, 40.5],
            "area": 50.5,
            "iscrowd": 0,
            "segmentation": {"size": [480, 640], "counts": code} if i % 50 == 0 else [polygon],
        }
        for i, polygon in enumerate(polygons)
    ]
    start = time.process_time()
    assert len(check_annotations("file", given, images, categories, Findings())) == 25_000
    assert time.process_time() - start < 3
