"""Detections of any tool's: what is wrong with one is said in a sentence that names it, and the rest is scored."""

import time

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from fbn_plugin.engine.data import detection_checks
from fbn_plugin.engine.data.coco_data import CocoDataset
from fbn_plugin.engine.data.detection_checks import check_detections

INF, NAN = float("inf"), float("nan")
CODE = mask_utils.encode(np.asfortranarray(np.tri(40, 50, dtype=np.uint8)))["counts"].decode()
SOUND = {"image_id": 1, "category_id": 3, "score": 0.5, "bbox": [5, 5, 20, 20.5]}
WITH_MASK = {**SOUND, "segmentation": {"size": [40, 50], "counts": CODE}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    images = [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 50} for i in (1, 2)]
    return CocoDataset("set", None, tmp_path_factory.mktemp("images"), images, [], [{"id": 3, "name": "x"}])


def mask(counts, size=(40, 50)):
    return {"segmentation": {"size": list(size) if isinstance(size, tuple) else size, "counts": counts}}


REFUSED = {
    "an image that is not there": (
        {"image_id": 9},
        "'image_id' must be the id of one of its 2 images, such as 1, got 9",
    ),
    "an image of text": ({"image_id": "1"}, "got '1'"),
    "an image that is true": ({"image_id": True}, "got True"),
    "an image of null": ({"image_id": None}, "got None"),
    "an image of a list": ({"image_id": [1]}, "got [1]"),
    "an image of NaN": ({"image_id": NAN}, "got nan"),
    "a category that is not there": ({"category_id": 1}, "'category_id' must be the id of one of its 1 category"),
    "a category of an object": ({"category_id": {}}, "got {}"),
    "a score of text": ({"score": "0.5"}, "'score' must be a finite number, got '0.5'"),
    "a score of NaN": ({"score": NAN}, "'score' must be a finite number, got nan"),
    "a score of infinity": ({"score": INF}, "got inf"),
    "a score of 400 digits": ({"score": 10**400}, "(401 characters)"),
    "a score that is true": ({"score": True}, "got True"),
    "a box of text": ({"bbox": "1234"}, "'bbox' must be a list of 4 numbers, left, top, width and height, got '1234'"),
    "a box of three": ({"bbox": [1, 2, 3]}, "got [1, 2, 3]"),
    "a box of texts": ({"bbox": ["1", 2, 3, 4]}, "'bbox' must be 4 finite numbers, got ['1', 2, 3, 4]"),
    "a box with NaN": ({"bbox": [1, 2, NAN, 4]}, "'bbox' must be 4 finite numbers, got [1, 2, nan, 4]"),
    "a box of 1e400": ({"bbox": [1, 2, 10**400, 4]}, "'bbox' must be 4 finite numbers"),
    "a box of negative height": ({"bbox": [1, 2, 3, -4]}, "a width and height of 0 or more, got [1, 2, 3, -4]"),
    "a box far away": ({"bbox": [1, 2, 1e9, 4]}, "within 5,000 pixels of the origin, 100 times the longer side"),
    "polygons": ({"segmentation": [[1, 1, 5, 1, 5, 5]]}, "'segmentation' must be an RLE mask with compressed counts"),
    "a mask of text": ({"segmentation": "abc"}, "an RLE mask with compressed counts, got 'abc'"),
    "a list of counts": (mask([0, 2000]), "an RLE mask with compressed counts"),
    "runs that end early": (
        mask("5"),
        "an RLE mask of 40 x 50 = 2,000 pixels, and its 'counts' have runs that add up to 5",
    ),
    "a code of junk": (mask("zzzz"), "a character that no code has, got 'zzzz'"),
    "a code beyond ASCII": (mask("\xff"), "an RLE mask with compressed counts"),
    "an empty code": (mask(""), "have no run, got ''"),
    "no size": ({"segmentation": {"counts": CODE}}, "its image's size (height, width) [40, 50], got None"),
    "a size turned": (mask(CODE, (50, 40)), "[40, 50], got [50, 40]"),
    "a size that is a number": (mask(CODE, 5), "[40, 50], got 5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(data, case, monkeypatch):
    changes, words = REFUSED[case]
    monkeypatch.setattr(detection_checks, "_AT_ONCE", 3)
    for wrong in (0, 4):
        given = [dict(WITH_MASK) for _ in range(5)]
        given[wrong] |= changes
        with pytest.raises(ValueError) as error:
            check_detections("file", given, data)
        sentence = str(error.value)
        assert sentence.startswith(f"file holds no detections on set: number {wrong}: ") and words in sentence, sentence
        assert "\n" not in sentence and len(sentence) < 500


@pytest.mark.parametrize("name", SOUND)
def test_a_field_that_is_missing(data, name):
    with pytest.raises(ValueError, match=f"number 1 lacks '{name}'"):
        check_detections("file", [SOUND, {key: value for key, value in SOUND.items() if key != name}], data)
    with pytest.raises(ValueError, match="number 0 lacks 'segmentation'"):
        check_detections("file", [SOUND, WITH_MASK], data)


@pytest.mark.parametrize("given", [None, "text", {"annotations": []}, 5])
def test_what_is_no_list(data, given):
    with pytest.raises(ValueError, match="file must hold a list of detections, got"):
        check_detections("file", given, data)
    for value in (given, [given]):
        if not isinstance(given, dict):
            with pytest.raises(ValueError, match="number 0 must be an object with named fields"):
                check_detections("file", [value], data)


def test_what_is_sound_is_left_as_it_is(data):
    for given in ([], [SOUND, {**SOUND, "score": -7, "extra": NAN, "bbox": [-900.5, 0, 0, 0]}], [WITH_MASK] * 3):
        assert check_detections("file", given, data) == given


def test_empty_runs_are_taken_out(data):
    code = mask_utils.frPyObjects({"size": [40, 50], "counts": [500, 0, 500, 1000]}, 40, 50)["counts"].decode()
    whole = mask_utils.frPyObjects({"size": [40, 50], "counts": [1000, 1000]}, 40, 50)["counts"].decode()
    first, second = check_detections("file", [WITH_MASK, {**WITH_MASK, **mask(code)}], data)
    assert first == WITH_MASK and second == {**WITH_MASK, **mask(whole)}


def test_many_are_checked_fast(data):
    """20,000 take 0.2 seconds; a test's machine may be slower."""
    given = [dict(WITH_MASK) for _ in range(20_000)]
    start = time.process_time()
    check_detections("file", given, data)
    assert time.process_time() - start < 3
