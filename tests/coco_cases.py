"""Small COCO-format sets with one thing wrong or odd, and what becomes of each: the words that refuse it, or None where
it is read. Both detection engines are held to this table."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

__all__ = ["ODD_FILES", "READ", "REFUSED", "content", "write_case"]

INF, NAN = float("inf"), float("nan")
HUGE = 10**400
SQUARE = [5, 5, 25, 5, 25, 25, 5, 25]
BOX = {"bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0, "segmentation": [SQUARE]}
SOUND = {
    "images": [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 50} for i in (1, 2)],
    "annotations": [{"id": i, "image_id": i, "category_id": 1, **BOX} for i in (1, 2)],
    "categories": [{"id": 1, "name": "x"}],
}

CODE = mask_utils.encode(np.asfortranarray(np.tri(40, 50, dtype=np.uint8)))["counts"].decode()

Change = Callable[[dict[str, Any]], Any]


def annotation(**changes: Any) -> Change:
    return lambda coco: coco["annotations"][0].update(changes)


def image(**changes: Any) -> Change:
    return lambda coco: coco["images"][0].update(changes)


def category(**changes: Any) -> Change:
    return lambda coco: coco["categories"][0].update(changes)


def without(part: str, name: str) -> Change:
    return lambda coco: coco[part][0].pop(name)


def entry(part: str, value: Any) -> Change:
    return lambda coco: coco[part].__setitem__(0, value)


def mask(value: Any) -> Change:
    return annotation(segmentation=value)


def rle(counts: Any, size: Any = (40, 50)) -> Change:
    return mask({"size": list(size) if isinstance(size, tuple) else size, "counts": counts})


def ids_are_text(coco: dict[str, Any]) -> None:
    for each in coco["images"]:
        each["id"] = f"image {each['id']}"
    for each in coco["annotations"]:
        each["image_id"] = f"image {each['image_id']}"


def categories_are_text(coco: dict[str, Any]) -> None:
    for each in coco["annotations"]:
        each["category_id"] = "x"
    coco["categories"][0]["id"] = "x"


def ids_are_large(coco: dict[str, Any]) -> None:
    for each in coco["images"]:
        each["id"] += 2**62
    for each in coco["annotations"]:
        each["image_id"] += 2**62


# Name -> the change, words of the sentence.
REFUSED: dict[str, tuple[Change, str]] = {
    # polygons
    "a polygon with NaN": (
        mask([[NAN, 1, 2, 2, 3, 1]]),
        "annotation 1: 'segmentation' must be polygons of finite numbers",
    ),
    "a polygon with infinity": (mask([[1, 1, INF, 2, 3, 1]]), "got inf"),
    "a polygon with a huge number": (mask([[1, 1, HUGE, 2, 3, 1]]), "(401 characters)"),
    "a polygon with null": (mask([[1, 1, None, 2, 3, 1]]), "got None"),
    "a polygon with a bool": (mask([[1, 1, True, 2, 3, 1]]), "got True"),
    "a polygon far right": (mask([[0, 0, 1e8, 0, 1e8, 1e8]]), "within 500 pixels of the origin, 10 times"),
    "a polygon far left": (mask([[-1e9, 0, 5, -1e9, 5, 5]]), "got -1000000000.0"),
    "a polygon of text": (mask([["1", "2", "3", "4", "5", "6"]]), "got '1'"),
    "a flat polygon of text": (mask(["5", "5", "25", "5", "25", "25"]), "got '5'"),
    "a short polygon of text": (mask(["a", "b"]), "got 'a'"),
    "a polygon of objects": (mask([{"x": 1, "y": 2}] * 3), "got {'x': 1, 'y': 2}"),
    "a polygon nested twice": (mask([[[[1, 1], [2, 2], [3, 1]]]]), "a list of coordinates or of points [x, y]"),
    "points of three numbers": (mask([[[1, 1, 0], [2, 2, 0], [3, 1, 0]]]), "or of points [x, y]"),
    "points and numbers": (mask([[[1, 1], 2, 2, 3, 1, 4]]), "or of points [x, y]"),
    "a polygon and a number": (mask([SQUARE, 5]), "each a list of coordinates, got 5"),
    "a polygon and a text": (mask([SQUARE, "5"]), "each a list of coordinates, got '5'"),
    "an odd number of coordinates": (mask([[*SQUARE, 5]]), "an even number of coordinates, not 9"),
    "an outline without end": (mask([[0, 0, 400, 400] * 60]), "9,000 pixels of outline at most, not 48,000"),
    "outlines without end": (
        mask([[0, 0, 400, 400] * 10] * 5),
        "together of 11,000 pixels of outline at most, not 40,000",
    ),
    "a mask that is a text": (mask("abc"), "'segmentation' must be a list of polygons, or an RLE mask, got 'abc'"),
    "a mask that is a number": (mask(5), "or an RLE mask, got 5"),
    "a mask that is true": (mask(True), "or an RLE mask, got True"),
    # run-length codes
    "runs that end early": (
        rle([0, 10]),
        "an RLE mask of 40 x 50 = 2,000 pixels, and its 'counts' have runs that add up to 10",
    ),
    "runs that go on": (rle([0, 10, 10**6]), "a run longer than that"),
    "runs that go on a little": (rle([1000, 1001]), "runs that add up to 2001"),
    "a negative run": (rle([-5, 10, 1995]), "a run of negative length, -5"),
    "a run of half a pixel": (rle([0.5, 1999.5]), "a run whose length is no whole number"),
    "a run of text": (rle(["2000"]), "a run whose length is no whole number"),
    "a run that is true": (rle([True, 1999]), "a run whose length is no whole number"),
    "a huge run": (rle([HUGE]), "a run whose length is no whole number"),
    "no run": (rle([]), "have no run, got []"),
    "a code of junk": (rle("zzzzzzzzzzzzzzzzzzzzzz"), "a character that no code has"),
    "an empty code": (rle(""), "have no run, got ''"),
    "a code with a NUL": (rle("0\x000"), "a character that no code has"),
    "a code that ends early": (rle("5"), "runs that add up to 5"),
    "a code cut in a run": (rle("P"), "an end in the middle of a run"),
    "a code of 35 bits": (rle("PPPPPP0"), "a run of more than 30 bits"),
    "a code beyond ASCII": (rle("\xff"), "'counts' that are a list or a text"),
    "counts that are null": (rle(None), "'counts' that are a list or a text, got None"),
    "counts that are a number": (rle(2000), "'counts' that are a list or a text, got 2000"),
    "no counts": (mask({"size": [40, 50]}), "'counts' that are a list or a text"),
    "a size that is a number": (rle([2000], 5), "its image's size (height, width) [40, 50], got 5"),
    "a size that is a text": (rle([2000], "40x50"), "got '40x50'"),
    "a size turned": (rle([2000], (50, 40)), "got [50, 40]"),
    "a size of three": (rle([2000], (40, 50, 1)), "got [40, 50, 1]"),
    "no size": (mask({"counts": [2000]}), "got None"),
    # boxes
    "a box of text": (
        annotation(bbox="1234"),
        "annotation 1: 'bbox' must be a list of 4 numbers, left, top, width and height",
    ),
    "a box of texts": (annotation(bbox=["1", "2", "3", "4"]), "'bbox' must be 4 finite numbers, got '1'"),
    "a box of 1e400": (annotation(bbox=[0, 0, HUGE, 1]), "'bbox' must be 4 finite numbers"),
    "a box with NaN": (annotation(bbox=[0, 0, NAN, 1]), "got nan"),
    "a box with null": (annotation(bbox=[0, 0, None, 1]), "got None"),
    "a box of three": (annotation(bbox=[0, 0, 5]), "got [0, 0, 5]"),
    "a box of null": (annotation(bbox=None), "got None"),
    "a box of an object": (annotation(bbox={"x": 0}), "got {'x': 0}"),
    "a box of negative width": (annotation(bbox=[9, 9, -5, 5]), "a width and height of 0 or more, got [9, 9, -5, 5]"),
    "a box far away": (annotation(bbox=[0, 0, 600, 5]), "within 500 pixels of the origin"),
    "no box": (without("annotations", "bbox"), "annotation 1 lacks 'bbox'"),
    # other fields of annotations
    "an area of text": (annotation(area="400"), "'area' must be a finite number, got '400'"),
    "an area of infinity": (annotation(area=INF), "'area' must be a finite number, got inf"),
    "a negative area": (annotation(area=-1), "'area' must be 0 or more, got -1"),
    "an area of a list": (annotation(area=[400]), "got [400]"),
    "a crowd of text": (annotation(iscrowd="0"), "'iscrowd' must be 0 or 1, got '0'"),
    "a crowd of 2": (annotation(iscrowd=2), "'iscrowd' must be 0 or 1, got 2"),
    "a crowd of a list": (annotation(iscrowd=[0]), "'iscrowd' must be 0 or 1, got [0]"),
    "an unknown image": (annotation(image_id=9), "the id of one of the file's 2 images, such as 1, got 9"),
    "an image of text": (annotation(image_id="1"), "such as 1, got '1'"),
    "an image of null": (annotation(image_id=None), "got None"),
    "an image of a list": (annotation(image_id=[1]), "got [1]"),
    "an image that is true": (annotation(image_id=True), "got True"),
    "an image of infinity": (annotation(image_id=INF), "got inf"),
    "no image": (without("annotations", "image_id"), "annotation 1 lacks 'image_id'"),
    "an unknown category": (annotation(category_id=9), "the id of one of the file's 1 category, such as 1, got 9"),
    "no category": (without("annotations", "category_id"), "lacks 'category_id'"),
    "keypoints of text": (annotation(keypoints="abc"), "'keypoints' must be a list of numbers, x, y and visibility"),
    "keypoints of texts": (
        annotation(keypoints=["a", "b", "c"]),
        "'keypoints' must be a list of finite numbers, got 'a'",
    ),
    "keypoints of four numbers": (annotation(keypoints=[1, 2, 2, 4]), "x, y and visibility in turn, got [1, 2, 2, 4]"),
    "keypoints far away": (annotation(keypoints=[1, 1e9, 2]), "within 500 pixels"),
    "more keypoints than there are": (
        annotation(keypoints=[1, 2, 2], num_keypoints=2),
        "a whole number from 0 to 1, got 2",
    ),
    "a text for an annotation": (
        entry("annotations", "x"),
        "annotation number 1 must be an object with named fields, got 'x'",
    ),
    "null for an annotation": (entry("annotations", None), "annotation number 1 must be an object"),
    "a list for an annotation": (entry("annotations", [1]), "annotation number 1 must be an object"),
    # images
    "ids of two types": (image(id="1"), "the image ids must be all numbers or all text, got 2 and '1'"),
    "one id for two images": (image(id=2), "2 images have the id 2, which must be that of one"),
    "an id of null": (image(id=None), "'id' must be a whole number of 64 bits, or text on one line, got None"),
    "an id that is true": (image(id=True), "got True"),
    "an id of half": (image(id=0.5), "got 0.5"),
    "an id of 70 bits": (image(id=2**70), "image 1180591620717411303424: 'id' must be"),
    "an id of a list": (image(id=[1]), "got [1]"),
    "no id": (without("images", "id"), "image number 1 lacks 'id'"),
    "an infinite height": (
        image(height=INF),
        "image 1: 'height' must be a whole number from 1 to 1,048,576, got inf",
    ),
    "a height of text": (image(height="40"), "'height' must be a whole number from 1 to 1,048,576, got '40'"),
    "a height of 0": (image(height=0), "got 0"),
    "a height of half": (image(height=40.5), "got 40.5"),
    "a width of null": (image(width=None), "got None"),
    "a width of 400 digits": (image(width=HUGE), "(401 characters)"),
    "too many pixels": (
        image(height=2**15, width=2**14),
        "268,435,456 pixels at most at the width of 16384, got 32768",
    ),
    "a width of 2 million": (image(width=2_000_000), "from 1 to 1,048,576, got 2000000"),
    "no width": (without("images", "width"), "image 1 lacks 'width'"),
    "a file name that is a number": (image(file_name=5), "image 1: 'file_name' must be the name of a file"),
    "a file name outside": (image(file_name="../../set/1.png"), "a path inside of the folder of the images"),
    "a file name outside by a way round": (
        image(file_name="a/../../1.png"),
        "a path inside of the folder of the images",
    ),
    "an absolute file name": (image(file_name="/etc/passwd"), "a path inside of the folder of the images"),
    "a file name with a NUL": (image(file_name="1\0.png"), "the name of a file, text on one line"),
    "a file name of two lines": (image(file_name="1\n.png"), "the name of a file, text on one line"),
    "an empty file name": (image(file_name=""), "the name of a file, text on one line, got ''"),
    "a file name of half a letter": (image(file_name="\ud800.png"), "the name of a file, text on one line"),
    "a file name of 5000 letters": (image(file_name="x" * 5000), "(5,002 characters)"),
    "a file name of 300 letters": (image(file_name="x" * 300), "is not there (1 of 2 missing)"),
    "a file that is not there": (image(file_name="3.png"), "3.png is not there (1 of 2 missing)"),
    "a folder for a file": (image(file_name="folder"), "folder is no file (1 of 2 missing)"),
    "a pipe for a file": (image(file_name="pipe"), "pipe is no file (1 of 2 missing)"),
    "a link to itself for a file": (image(file_name="loop"), "loop is no file (1 of 2 missing)"),
    "a link to a device for a file": (image(file_name="device"), "device is no file (1 of 2 missing)"),
    "no file name": (without("images", "file_name"), "image 1 lacks 'file_name'"),
    "a text for an image": (entry("images", "x"), "image number 1 must be an object"),
    # categories
    "a category twice": (lambda c: c["categories"].append({"id": 1, "name": "y"}), "2 categories have the id 1"),
    "a category of null": (category(id=None), "'id' must be a whole number of 64 bits"),
    "categories of two types": (
        lambda c: c["categories"].append({"id": "2", "name": "y"}),
        "the category ids must be all",
    ),
    "a name that is a number": (category(name=5), "category 1: 'name' must be text on one line, got 5"),
    "a name of null": (category(name=None), "got None"),
    "a name of two lines": (category(name="x\ny"), r"got 'x\ny'"),
    "no name": (without("categories", "name"), "category 1 lacks 'name'"),
    "null for a category": (entry("categories", None), "category number 1 must be an object"),
    # the lists
    "no images": (lambda c: c.pop("images"), "is not a COCO annotation file: it has no list 'images'"),
    "no image at all": (lambda c: c["images"].clear(), "has no images"),
    "images in an object": (lambda c: c.update(images={"1": SOUND["images"][0]}), "it has no list 'images'"),
    "annotations of null": (lambda c: c.update(annotations=None), "it has no list 'annotations'"),
    "no category list": (lambda c: c.pop("categories"), "it has no list 'categories'"),
}

# Name -> the change; how many annotations have a mask.
READ: dict[str, tuple[Change, int]] = {
    "sound": (lambda coco: None, 2),
    "an area of null": (annotation(area=None), 2),
    "a crowd of null": (annotation(iscrowd=None), 2),
    "a crowd that is true": (annotation(iscrowd=True), 2),
    "no area": (without("annotations", "area"), 2),
    "no crowd": (without("annotations", "iscrowd"), 2),
    "no annotation id": (without("annotations", "id"), 2),
    "an annotation id twice": (annotation(id=2), 2),
    "an annotation id of text": (annotation(id="a"), 2),
    "a mask of null": (annotation(segmentation=None), 1),
    "no mask": (without("annotations", "segmentation"), 1),
    "an empty mask": (mask([]), 1),
    "an empty polygon": (mask([[]]), 1),
    "a polygon of two points": (mask([[5, 5, 25, 25]]), 1),
    "a flat polygon": (mask(SQUARE), 2),
    "four points in lists": (mask([[[5, 5], [25, 5], [25, 25], [5, 25]]]), 2),
    "six points in lists": (mask([[[1, 1], [2, 2], [3, 1], [4, 4], [5, 5], [6, 6]]]), 2),
    "points without a list around": (mask([[5, 5], [25, 5], [25, 25], [5, 25]]), 2),
    "a polygon behind one of two points": (mask([[1, 1, 9, 9], SQUARE]), 2),
    "a polygon and one of a point": (mask([SQUARE, [1, 1]]), 2),
    "a polygon that leaves the image": (mask([[-9, -9, 70.5, 5, 25, 99]]), 2),
    "a code": (rle([0, 1000, 1000]), 2),
    "a code with an empty run": (rle([500, 0, 500, 1000]), 2),
    "a code of a size with points": (rle([1000, 1000], (40.0, 50.0)), 2),
    "a compressed code": (rle(CODE), 2),
    "a box outside": (annotation(bbox=[90, 90, 5, 5]), 2),
    "a box without width": (annotation(bbox=[9, 9, 0, 5]), 2),
    "image ids of text": (ids_are_text, 2),
    "category ids of text": (categories_are_text, 2),
    "ids beyond 32 bits": (ids_are_large, 2),
    "an image id with a point": (annotation(image_id=1.0), 2),
    "a size with a point": (image(height=40.0), 2),
    "a file for two ids": (image(file_name="./2.png"), 2),
    "two categories of one name": (lambda c: c["categories"].append({"id": 3, "name": "x"}), 2),
    "keypoints of null": (annotation(keypoints=None, num_keypoints=None), 2),
    "nothing to ignore": (annotation(ignore=0), 2),
    "what other tools call difficult": (annotation(ignore=1), 2),
    "a field of another tool": (annotation(attributes={"occluded": False}, score=NAN), 2),
}

# Name -> the bytes of the file; words of the sentence, None where it is read.
ODD_FILES: dict[str, tuple[bytes, str | None]] = {
    "a byte-order mark": (b"\xef\xbb\xbf" + json.dumps(SOUND).encode(), None),
    "UTF-16": (json.dumps(SOUND).encode("utf-16"), "is not valid JSON: it is text in UTF-16"),
    "UTF-32": (json.dumps(SOUND).encode("utf-32"), "is not valid JSON: it is text in UTF-32"),
    "Latin-1": (b'{"info": "\xe9"}', "byte 10 is not UTF-8"),
    "nested deeply": (b"[" * 100_000 + b"]" * 100_000, "its lists or objects are nested too deeply"),
    "a number of 5000 digits": (b'{"images": ' + b"9" * 5000 + b"}", "is not valid JSON: Exceeds the limit"),
    "a key twice": (b'{"annotations": [{"id": 7, "bbox": [], "bbox": []}]}', "of id 7 has the key 'bbox' twice"),
    "empty": (b"", "is not valid JSON, perhaps cut short"),
    "cut short": (json.dumps(SOUND).encode()[:300], "is not valid JSON, perhaps cut short"),
    "a list": (b"[]", "is not a COCO annotation file: it has no list 'images'"),
    "null": (b"null", "it has no list 'images'"),
}


def content(change: Change) -> bytes:
    """The annotation file of a case."""
    coco = copy.deepcopy(SOUND)
    change(coco)
    return json.dumps(coco).encode()


def write_case(folder: Path, text: bytes) -> Path:
    """Write a set, and beside its images what is no image; the path of its annotation file, ``train.json``."""
    folder.mkdir(exist_ok=True)
    file = folder / "train.json"
    file.write_bytes(text)
    if not (folder / "1.png").is_file():
        for number in (1, 2):
            Image.new("RGB", (50, 40), (90 * number, 0, 0)).save(folder / f"{number}.png")
        (folder / "folder").mkdir()
        os.mkfifo(folder / "pipe")
        (folder / "loop").symlink_to("loop")
        (folder / "device").symlink_to("/dev/zero")
    return file
