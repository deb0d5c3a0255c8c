"""Detections in COCO's results format, checked against the set that they are on: on a mask whose code is damaged
pycocotools may never end, and it does not say which detection it cannot read."""

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from fbn_plugin.engine.data.annotation_checks import numbers, refuse_code
from fbn_plugin.engine.data.coco_checks import needed, refuse
from fbn_plugin.engine.data.coco_data import CocoDataset
from fbn_plugin.engine.data.rle import CodeError, check_codes, compressed, without_empty_runs
from fbn_plugin.engine.files.words import counted, shown

__all__ = ["check_detections"]

# Boxes may lie outside of the image by this many times its longer side: some detectors do not cut theirs off.
_FAR = 100

# Detections that are checked together: bounds the memory.
_AT_ONCE = 50_000

_FIELDS = ("image_id", "category_id", "score", "bbox")


def check_detections(source: str, given: Any, data: CocoDataset) -> list[dict[str, Any]]:
    """Check detections that pycocotools is to load.

    Args:
        source: the file that they are from.
        given: its content: a list in which all or none have a ``segmentation``, an RLE mask of compressed counts.
        data: the set.

    Returns:
        the detections.

    Raises:
        ValueError: one sentence with the number of the first wrong one, counted from 0.
    """
    if not isinstance(given, list):
        raise ValueError(f"{source} must hold a list of detections, got {shown(given)}")
    start = f"{source} holds no detections on {data.name}: number"
    masks = any(isinstance(each, dict) and "segmentation" in each for each in given)
    sizes = {image["id"]: (image["height"], image["width"]) for image in data.images}
    known = {"image_id": sizes, "category_id": dict.fromkeys(data.category_ids)}
    checked = []
    for first in range(0, len(given), _AT_ONCE):
        part = given[first : first + _AT_ONCE]
        for number, each in enumerate(part, first):
            _check_fields(f"{start} {number}", each, known, masks)
        _check_numbers(start, first, part, sizes)
        checked += _with_sound_codes(start, first, part, sizes) if masks else part
    return checked


def _check_fields(who: str, each: Any, known: dict[str, dict], masks: bool) -> None:
    """Check all but the values of numbers and codes."""
    if type(each) is not dict:
        raise ValueError(f"{who} must be an object with named fields, got {shown(each)}")
    for name in (*_FIELDS, "segmentation") if masks else _FIELDS:
        needed(who, each, name)
    for name, entries in known.items():
        value = each[name]
        if type(value) not in (int, str) or value not in entries:
            what = counted(len(entries), name.removesuffix("_id"))
            refuse(who, name, f"the id of one of its {what}, such as {shown(next(iter(entries)), 60)}", value)
    if type(each["bbox"]) is not list or len(each["bbox"]) != 4:
        refuse(who, "bbox", "a list of 4 numbers, left, top, width and height", each["bbox"])
    if masks:
        mask, size = each["segmentation"], list(known["image_id"][each["image_id"]])
        if type(mask) is not dict or not isinstance(mask.get("counts"), str) or not mask["counts"].isascii():
            refuse(who, "segmentation", "an RLE mask with compressed counts", mask)
        if mask.get("size") != size:
            refuse(who, "segmentation", f"an RLE mask of its image's size (height, width) {size}", mask.get("size"))


def _check_numbers(start: str, first: int, part: Sequence[dict[str, Any]], sizes: dict) -> None:
    def refuse_box(index: int, accepted: str) -> NoReturn:
        refuse(f"{start} {first + index}", "bbox", accepted, part[index]["bbox"])

    def refuse_score(index: int) -> NoReturn:
        refuse(f"{start} {first + index}", "score", "a finite number", part[index]["score"])

    numbers([each["score"] for each in part], refuse_score)
    flat = [value for each in part for value in each["bbox"]]
    values = numbers(flat, lambda place: refuse_box(place // 4, "4 finite numbers"))
    boxes = values.reshape(-1, 4)
    if (negative := (boxes[:, 2:] < 0).any(axis=1)).any():
        refuse_box(int(negative.argmax()), "of a width and height of 0 or more")
    most = _FAR * np.array([max(sizes[each["image_id"]]) for each in part])
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    if (far := (np.abs(corners) > most[:, None]).any(axis=1)).any():
        index = int(far.argmax())
        refuse_box(index, f"within {most[index]:,} pixels of the origin, {_FAR} times the longer side of the image")


def _with_sound_codes(start: str, first: int, part: Sequence[dict[str, Any]], sizes: dict) -> list[dict[str, Any]]:
    """The detections, whose masks are those of their images and have no empty runs."""
    codes = [each["segmentation"]["counts"].encode("ascii") for each in part]
    extents = [sizes[each["image_id"]] for each in part]
    try:
        broken = check_codes(codes, [height * width for height, width in extents])
    except CodeError as error:
        counts = part[error.index]["segmentation"]["counts"]
        refuse_code(f"{start} {first + error.index}", extents[error.index], error.reason, counts)
    found = list(part)
    for index in np.flatnonzero(broken):
        size = list(extents[index])
        counts = compressed(without_empty_runs(codes[index]), size)
        found[index] = {**part[index], "segmentation": {"size": size, "counts": counts}}
    return found
