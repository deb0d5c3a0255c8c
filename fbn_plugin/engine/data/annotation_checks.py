"""The annotations of a COCO file, checked field by field, see ``coco_checks``. pycocotools crashes on coordinates that
are no numbers or far away, and reads a code of the wrong length from memory that is not its own.

Numbers of many annotations are checked together as one array: one by one takes ten times as long.
"""

import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from fbn_plugin.engine.data.coco_checks import MOST_PIXELS, Findings, entry_name, needed, refuse, whole_number
from fbn_plugin.engine.data.rle import CodeError, check_codes, without_empty_runs
from fbn_plugin.engine.files.words import counted, shown

__all__ = ["DIFFICULT", "SHORT_POLYGONS", "check_annotations", "numbers", "refuse_code", "written_code"]

# Coordinates may lie outside of the image by this many times its longer side: boxes of other tools are cut off at the
# border, or are not. pycocotools would take those beyond its whole numbers for others, and crash.
_FAR = 10

# pycocotools goes along a polygon in steps of a fifth of a pixel, and takes 100 bytes for each pixel of its outline: it
# may be this many times as long as its image is high and wide, COCO's are up to 4, and 400 MB are enough for one. Many
# polygons together may have an outline at each pixel besides, up to a number that takes a second.
_OUTLINE, _LONGEST_OUTLINE, _MOST_OUTLINES = 100, 4_000_000, 16_000_000

SHORT_POLYGONS = "polygons of fewer than 3 points"
DIFFICULT = "'ignore' set, which changes nothing: 'iscrowd' does"

# Annotations that are checked together: bounds the memory.
_AT_ONCE = 20_000


def check_annotations(
    source: str,
    given: Sequence[Any],
    images: Sequence[Mapping[str, Any]],
    categories: Sequence[Mapping[str, Any]],
    findings: Findings,
) -> list[dict[str, Any]]:
    """The annotations of a file, as ``CocoDataset`` promises them.

    Args:
        source: what the sentences call the file.
        given: its list ``annotations``.
        images, categories: from ``check_images`` and ``check_categories``.
        findings: what is found is added to it.

    Raises:
        ValueError: one has a field that is missing or wrong.
    """
    sizes = {each["id"]: (each["id"], each["height"], each["width"]) for each in images}
    labels = {each["id"]: each["id"] for each in categories}
    checked = []
    for start in range(0, len(given), _AT_ONCE):
        batch = _Batch(source, start, sizes, labels, findings)
        for each in given[start : start + _AT_ONCE]:
            batch.add(each)
        checked += batch.finish()
    ids = [each.get("id") for each in given]
    findings.own_ids = all(type(number) is int and 0 <= number < 2**63 for number in ids) and len(set(ids)) == len(ids)
    return checked


def numbers(values: list[Any], refuse_number: Callable[[int], NoReturn]) -> np.ndarray:
    """Finite numbers as an array of float64.

    Args:
        values: what may be numbers: whole ones or others, no bool, no text.
        refuse_number: raises the error for the number at an index.
    """
    if set(map(type, values)) <= {int, float}:
        try:
            array = np.array(values, dtype=np.float64)
        except OverflowError:  # a whole number of hundreds of digits
            array = np.array([math.nan])
        if np.isfinite(array).all():
            return array
    refuse_number(next(i for i, value in enumerate(values) if not _is_finite(value)))


def _is_finite(value: Any) -> bool:
    # A comparison, as a whole number may be too large to be a float.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


class _Field:
    """Numbers of one field of many annotations.

    Attributes:
        flat: all of them.
        owners: the index of the annotation that each piece is of; one may have several.
        ends: where the pieces end.
    """

    def __init__(self, name: str):
        self.name = name
        self.flat: list[Any] = []
        self.owners: list[int] = []
        self.ends: list[int] = []

    def add(self, owner: int, values: Sequence[Any]) -> None:
        self.flat.extend(values)
        self.owners.append(owner)
        self.ends.append(len(self.flat))

    def owner(self, index: int) -> int:
        """Of the number at an index."""
        return self.owners[int(np.searchsorted(self.ends, index, "right"))]

    def lengths(self) -> np.ndarray:
        return np.diff(np.array(self.ends, np.int64), prepend=0)

    def array(self, batch: "_Batch", accepted: str) -> np.ndarray:
        """The numbers, which are finite."""

        def refuse_number(index: int) -> NoReturn:
            refuse(batch.who(self.owner(index)), self.name, accepted, self.flat[index])

        return numbers(self.flat, refuse_number)

    def check_distance(self, batch: "_Batch", values: np.ndarray, most: np.ndarray) -> None:
        """Refuse the first of the coordinates beyond ``most`` (N) of its annotation, in size."""
        wrong = np.abs(values) > np.repeat(most[np.array(self.owners, np.int64)], self.lengths())
        if wrong.any():
            index = int(wrong.argmax())
            owner = self.owner(index)
            accepted = f"within {most[owner]:,.0f} pixels of the origin, {_FAR} times the longer side of the image"
            value = batch.given[owner]["bbox"] if self.name == "bbox" else self.flat[index]
            refuse(batch.who(owner), self.name, accepted, value)


class _Batch:
    """Annotations that are checked together.

    Args:
        source: what the sentences call the file.
        first: how many annotations stand before them.
        sizes: id of each image -> the same id, height, width. The same in value: a file may have 1.0 for 1.
        labels: id of each category -> the same id.
        findings: what is found is added to it.
    """

    def __init__(self, source: str, first: int, sizes: Mapping, labels: Mapping, findings: Findings):
        self.source = source
        self.first = first
        self.sizes = sizes
        self.labels = labels
        self.findings = findings
        self.given: list[dict[str, Any]] = []
        self.found: list[dict[str, Any]] = []
        self.extents: list[tuple[int, int]] = []
        self.boxes, self.areas = _Field("bbox"), _Field("area")
        self.polygons, self.keypoints = _Field("segmentation"), _Field("keypoints")
        self.codes: list[bytes | list] = []
        self.coded: list[int] = []  # whose codes they are

    def who(self, index: int) -> str:
        return entry_name(self.source, "annotation", self.given[index], self.first + index + 1)

    def add(self, each: Any) -> None:
        """Check all but the values of an annotation's numbers, which are checked in ``finish``."""
        index = len(self.given)
        self.given.append(each)
        try:
            image_id, height, width = self.sizes[each["image_id"]]
            category_id = self.labels[each["category_id"]]
            box = each["bbox"]
            if type(each["image_id"]) is bool or type(each["category_id"]) is bool:
                raise TypeError
        except (KeyError, TypeError):
            self._refuse_ids(each)
        self.extents.append((height, width))
        if type(box) is not list or len(box) != 4:
            refuse(self.who(index), "bbox", "a list of 4 numbers, left, top, width and height", box)
        self.boxes.add(index, box)
        # Numbered from 1: COCOeval takes a match with id 0 for none, and files with an id twice exist.
        found = {**each, "image_id": image_id, "category_id": category_id, "id": self.first + index + 1}
        self.found.append(found)
        self._add_area(index, each)
        found["iscrowd"] = self._crowd(index, each)
        if each.get("ignore") not in (None, 0):
            # As other tools mark what is difficult, and none of COCO's reads it.
            self.findings.noted[DIFFICULT] += 1
        self._add_segmentation(index, found.pop("segmentation", None))
        if "keypoints" in each or "num_keypoints" in each:
            self._add_keypoints(index, found)

    def finish(self) -> list[dict[str, Any]]:
        """Check the numbers; the annotations."""
        if self.found:
            extents = np.array(self.extents, np.float64)
            most = _FAR * extents.max(axis=1)
            boxes = self._check_boxes(extents, most)
            self._check_areas(boxes)
            self._check_polygons(extents, most)
            self._check_codes()
            self._check_keypoints(most)
        return self.found

    def _refuse_ids(self, each: Any) -> NoReturn:
        who = self.who(len(self.given) - 1)
        for name, known in (("image_id", self.sizes), ("category_id", self.labels)):
            value = needed(who, each, name)
            if type(value) not in (int, float, str) or value not in known:
                entries = counted(len(known), name.removesuffix("_id"))
                accepted = f"the id of one of the file's {entries}, such as {shown(next(iter(known)), 60)}"
                refuse(who, name, accepted, value)
        needed(who, each, "bbox")
        raise AssertionError(who)

    def _add_area(self, index: int, each: Mapping[str, Any]) -> None:
        area = each.get("area")
        if area is not None:
            self.areas.add(index, (area,))
        elif "area" in each:
            self.findings.adapted["'area' null, that of the box"] += 1
        else:
            self.findings.complete = False

    def _crowd(self, index: int, each: Mapping[str, Any]) -> int:
        crowd = each.get("iscrowd")
        if crowd is None:
            if "iscrowd" in each:
                self.findings.adapted["'iscrowd' null, not a crowd"] += 1
            else:
                self.findings.complete = False
            return 0
        if crowd not in (0, 1):
            refuse(self.who(index), "iscrowd", "0 or 1", crowd)
        return int(crowd)

    def _add_segmentation(self, index: int, mask: Any) -> None:
        if mask is None:
            if "segmentation" in self.given[index]:
                self.findings.adapted["'segmentation' null, no mask"] += 1
        elif type(mask) is list:
            if kept := self._polygons(index, mask):
                self.found[index]["segmentation"] = kept
        elif type(mask) is dict:
            self._add_code(index, mask)
        else:
            refuse(self.who(index), "segmentation", "a list of polygons, or an RLE mask", mask)

    def _polygons(self, index: int, given: list[Any]) -> list[list[Any]]:
        """The polygons of three points and more."""
        if given and type(given[0]) is not list:
            self.findings.adapted["a polygon without the list around it"] += 1
            given = [given]
        elif len(given) >= 3 and len(given[0]) == 2 and all(type(each) is list and len(each) == 2 for each in given):
            given = [given]  # points, each a list
        kept = []
        for polygon in given:
            if type(polygon) is not list:
                refuse(self.who(index), "segmentation", "a list of polygons, each a list of coordinates", polygon)
            if polygon and type(polygon[0]) is list:
                polygon = self._points(index, polygon)
            # Fewer than three points enclose nothing, and pycocotools reads four numbers as a box.
            if len(polygon) < 6:
                numbers(polygon, functools.partial(self._refuse_coordinate, index, polygon))
                self.findings.left_out[SHORT_POLYGONS] += 1
            elif len(polygon) % 2:
                accepted = "polygons of an even number of coordinates"
                refuse(self.who(index), "segmentation", f"{accepted}, not {len(polygon)}", polygon)
            else:
                self.polygons.add(index, polygon)
                kept.append(polygon)
        return kept

    def _refuse_coordinate(self, index: int, polygon: list[Any], place: int) -> NoReturn:
        refuse(self.who(index), "segmentation", "polygons of finite numbers", polygon[place])

    def _points(self, index: int, points: list[Any]) -> list[Any]:
        """The coordinates of a polygon that is written as a list of points."""
        if not all(type(point) is list and len(point) == 2 for point in points):
            accepted = "polygons, each a list of coordinates or of points [x, y]"
            refuse(self.who(index), "segmentation", accepted, points)
        self.findings.adapted["a polygon as points [x, y]"] += 1
        return [value for point in points for value in point]

    def _add_code(self, index: int, mask: dict[str, Any]) -> None:
        size = list(self.extents[index])
        if type(mask.get("size")) is list and not all(type(length) is int for length in mask["size"]):
            self.findings.adapted["a size with a decimal point"] += 1
        if mask.get("size") != size:
            accepted = f"an RLE mask of its image's size (height, width) {size}"
            refuse(self.who(index), "segmentation", accepted, mask.get("size"))
        self.codes.append(written_code(self.who, index, mask.get("counts")))
        self.coded.append(index)
        self.found[index]["segmentation"] = {"size": size, "counts": mask["counts"]}

    def _add_keypoints(self, index: int, found: dict[str, Any]) -> None:
        for name in ("keypoints", "num_keypoints"):
            if name in found and found[name] is None:
                self.findings.adapted[f"{name!r} null, none"] += 1
                del found[name]
        points = found.get("keypoints", [])
        if type(points) is not list or len(points) % 3:
            refuse(self.who(index), "keypoints", "a list of numbers, x, y and visibility in turn", points)
        self.keypoints.add(index, points)
        if "keypoints" in found and "num_keypoints" not in found:
            self.findings.complete = False
        if "num_keypoints" in found:
            most = len(points) // 3 if "keypoints" in found else MOST_PIXELS
            found["num_keypoints"] = whole_number(self.who(index), "num_keypoints", found["num_keypoints"], 0, most)

    def _check_keypoints(self, most: np.ndarray) -> None:
        values = self.keypoints.array(self, "a list of finite numbers")
        self.keypoints.check_distance(self, values, most)
        for index in self.keypoints.owners:
            found = self.found[index]
            if "keypoints" in found and "num_keypoints" not in found:
                found["num_keypoints"] = sum(visible > 0 for visible in found["keypoints"][2::3])

    def _check_boxes(self, extents: np.ndarray, most: np.ndarray) -> np.ndarray:
        values = self.boxes.array(self, "4 finite numbers")
        boxes = values.reshape(-1, 4)
        negative = (boxes[:, 2:] < 0).any(axis=1)
        if negative.any():
            index = int(negative.argmax())
            refuse(self.who(index), "bbox", "of a width and height of 0 or more", self.given[index]["bbox"])
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        self.boxes.check_distance(self, corners.ravel(), most)
        shown_part = np.minimum(corners[:, 2:], extents[:, ::-1]) - np.maximum(corners[:, :2], 0)
        if empty := int((shown_part <= 0).any(axis=1).sum()):
            self.findings.left_out["by training, objects without extent inside of the image"] += empty
        for found, box in zip(self.found, boxes.tolist()):
            found["bbox"] = box
        return boxes

    def _check_areas(self, boxes: np.ndarray) -> None:
        areas = boxes[:, 2] * boxes[:, 3]
        values = self.areas.array(self, "a finite number")
        if (values < 0).any():
            index = self.areas.owners[int((values < 0).argmax())]
            refuse(self.who(index), "area", "0 or more", self.given[index]["area"])
        # As the file has them, whole or not.
        for index, area in enumerate(areas.tolist()):
            self.found[index]["area"] = area
        for index, area in zip(self.areas.owners, self.areas.flat):
            self.found[index]["area"] = area

    def _check_polygons(self, extents: np.ndarray, most: np.ndarray) -> None:
        values = self.polygons.array(self, "polygons of finite numbers")
        if not values.size:
            return
        self.polygons.check_distance(self, values, most)
        points, ends = values.reshape(-1, 2), np.array(self.polygons.ends) // 2
        starts = np.concatenate([[0], ends[:-1]])
        following = np.arange(1, len(points) + 1)
        following[ends - 1] = starts
        steps = np.abs(points[following] - points).max(axis=1)
        lengths = np.add.reduceat(steps, starts)
        owners = np.array(self.polygons.owners)
        sums = np.bincount(owners, lengths, minlength=len(extents))
        most_each = np.minimum(_OUTLINE * extents.sum(axis=1), _LONGEST_OUTLINE)
        most_all = most_each + np.minimum(extents.prod(axis=1), _MOST_OUTLINES)
        for outline, most_outline, what in (
            (lengths, most_each[owners], "polygons, each"),
            (sums[owners], most_all[owners], "polygons, together"),
        ):
            if (outline > most_outline).any():
                place = int((outline > most_outline).argmax())
                index = int(owners[place])
                accepted = f"{what} of {most_outline[place]:,.0f} pixels of outline at most, not {outline[place]:,.0f}"
                refuse(self.who(index), "segmentation", accepted, self.given[index]["segmentation"])

    def _check_codes(self) -> None:
        pixels = [self.extents[index][0] * self.extents[index][1] for index in self.coded]
        try:
            broken = check_codes(self.codes, pixels)
        except CodeError as error:
            index = self.coded[error.index]
            refuse_code(self.who(index), self.extents[index], error.reason, self.given[index]["segmentation"]["counts"])
        for number in np.flatnonzero(broken):
            self.findings.adapted["an RLE mask with an empty run"] += 1
            self.found[self.coded[number]]["segmentation"]["counts"] = without_empty_runs(self.codes[number])


def written_code(who: Callable[[int], str], index: int, counts: Any) -> bytes | list:
    """The ``counts`` of an RLE mask, for ``check_codes``."""
    if isinstance(counts, str) and counts.isascii():
        return counts.encode("ascii")
    if isinstance(counts, bytes | list):
        return counts
    refuse(who(index), "segmentation", "an RLE mask with 'counts' that are a list or a text", counts)


def refuse_code(who: str, size: Sequence[int], reason: str, counts: Any) -> NoReturn:
    """Raise the ValueError that refuses the code of a mask."""
    height, width = size
    accepted = f"an RLE mask of {height} x {width} = {height * width:,} pixels, and its 'counts' have {reason}"
    refuse(who, "segmentation", accepted, counts)
