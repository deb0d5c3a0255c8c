"""The lists of images and categories of a COCO annotation file, checked field by field before anything is built on
them, and the words in which all of the file is refused: the entry, the field, what is accepted and the value. What
another tool's file means without doubt is read as that, and counted. ``annotation_checks`` has the annotations.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from fbn_plugin.engine.files.words import counted, shown

__all__ = [
    "MOST_PIXELS",
    "Findings",
    "check_categories",
    "check_file_name",
    "check_images",
    "entry_name",
    "list_of",
    "needed",
    "refuse",
    "whole_number",
]

# What pycocotools computes a run-length code in holds as many; Pillow reads no larger image.
MOST_PIXELS = 2**28

# So that 10 times as far, in the fifths of a pixel that pycocotools takes, is a whole number of 32 bits.
_LONGEST_SIDE = 2**20

_BROKEN = re.compile("[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]")


@dataclass
class Findings:
    """What was found in a file that is sound.

    Attributes:
        noted: what is sound, and perhaps not meant -> how often.
        adapted: what was read otherwise than it stands -> how often.
        left_out: what was left out, or will be by a training -> how often.
        complete: whether every annotation has all fields that COCO's evaluation asks for.
        own_ids: whether every annotation has an id, a whole number, that no other one has.
    """

    noted: Counter[str] = field(default_factory=Counter)
    adapted: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    complete: bool = True
    own_ids: bool = True

    def __str__(self) -> str:
        """One line; empty where there is nothing to say."""
        parts = (("has", self.noted), ("read as what is meant", self.adapted), ("left out", self.left_out))
        return "; ".join(
            f"{words}: " + ", ".join(f"{what} ({count:,})" for what, count in found.items())
            for words, found in parts
            if found
        )


def refuse(who: str, name: str, accepted: str, value: Any) -> NoReturn:
    """Raise the ValueError that refuses the value of a field."""
    raise ValueError(f"{who}: {name!r} must be {accepted}, got {shown(value)}")


def list_of(source: str, content: Any, key: str) -> list[Any]:
    """One of the lists of a file's content; ValueError where that has none."""
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise ValueError(f"{source} is not a COCO annotation file: it has no list {key!r}")
    if key != "annotations" and not content[key]:
        raise ValueError(f"{source} has no {key}")
    return content[key]


def check_images(
    source: str, given: Sequence[Any], findings: Findings, named: bool = True, inside: bool = True
) -> list[dict[str, Any]]:
    """The images of a file.

    Args:
        source: what the sentences call the file.
        given: its list ``images``.
        findings: what is found is added to it.
        named: each must have a ``file_name``.
        inside: it must lie in the folder of the images.

    Raises:
        ValueError: one has a field that is missing or wrong, or an id that another one has.
    """
    images = []
    for number, each in enumerate(given, start=1):
        who = entry_name(source, "image", each, number)
        found = {**each, "id": _identity(who, each, findings)}
        for name in ("height", "width"):
            found[name] = whole_number(who, name, needed(who, each, name), 1, _LONGEST_SIDE)
            findings.adapted.update(["a size with a decimal point"] * isinstance(each[name], float))
        if found["height"] * found["width"] > MOST_PIXELS:
            accepted = f"such that the image has {MOST_PIXELS:,} pixels at most"
            refuse(who, "height", accepted + f" at the width of {found['width']}", found["height"])
        if named:
            check_file_name(who, needed(who, each, "file_name"), inside)
        images.append(found)
    _check_ids(source, "image", images)
    if named:
        times = Counter(os.path.normpath(each["file_name"]) for each in images)
        if same := sum(count - 1 for count in times.values()):
            findings.noted["an image file under a second id"] += same
    return images


def check_categories(source: str, given: Sequence[Any], findings: Findings) -> list[dict[str, Any]]:
    """The categories of a file, in the order of their ids; ValueError as ``check_images``."""
    categories = []
    for number, each in enumerate(given, start=1):
        who = entry_name(source, "category", each, number)
        name = needed(who, each, "name")
        if not isinstance(name, str) or _BROKEN.search(name):
            refuse(who, "name", "text on one line", name)
        categories.append({**each, "id": _identity(who, each, findings)})
    _check_ids(source, "category", categories)
    return sorted(categories, key=lambda category: category["id"])


def entry_name(source: str, what: str, each: Any, number: int) -> str:
    """How a sentence names an entry: by its id, or where it has none by its place from 1.

    Raises:
        ValueError: it is no object.
    """
    if not isinstance(each, dict):
        raise ValueError(f"{source}: {what} number {number} must be an object with named fields, got {shown(each)}")
    return f"{source}: {what} {shown(each['id'], 60)}" if "id" in each else f"{source}: {what} number {number}"


def needed(who: str, each: Mapping[str, Any], name: str) -> Any:
    """A field; ValueError where an entry lacks it."""
    if name not in each:
        raise ValueError(f"{who} lacks {name!r}")
    return each[name]


def _identity(who: str, each: Mapping[str, Any], findings: Findings) -> int | str:
    """The id of an image or a category."""
    value = needed(who, each, "id")
    if type(value) is str and not _BROKEN.search(value):
        return value
    found = whole_number(who, "id", value, -(2**63), 2**63 - 1, "a whole number of 64 bits, or text on one line")
    if type(value) is float:
        findings.adapted["an id with a decimal point"] += 1
    return found


def whole_number(who: str, name: str, value: Any, least: int, most: int, accepted: str = "") -> int:
    """The value of a field as a whole number, with or without a decimal point.

    Raises:
        ValueError: it is none, or not from ``least`` to ``most``.
    """
    sound = type(value) in (int, float) and least <= value <= most and (type(value) is int or value.is_integer())
    if not sound:
        refuse(who, name, accepted or f"a whole number from {least} to {most:,}", value)
    return int(value)


def check_file_name(who: str, name: Any, inside: bool = True) -> str:
    """The name of a file.

    Raises:
        ValueError: it is none; or it is absolute, or leads out of its folder, where it must lie ``inside`` of one.
    """
    try:
        # Bytes that are no UTF-8 are lone surrogates in the names that Python lists.
        sound = isinstance(name, str) and 0 < len(name) <= 4096 and bool(os.fsencode(name))
    except UnicodeEncodeError:
        sound = False
    if not sound or _BROKEN.search(name.encode(errors="ignore").decode()):
        refuse(who, "file_name", "the name of a file, text on one line", name)
    parts = os.path.normpath(name).split(os.sep)
    if inside and (os.path.isabs(name) or parts[0] == os.pardir):
        refuse(who, "file_name", "a path inside of the folder of the images", name)
    return name


def _check_ids(source: str, what: str, entries: Sequence[Mapping[str, Any]]) -> None:
    """Refuse ids of two types, and an id that two entries have."""
    kinds = {type(each["id"]): each["id"] for each in entries}
    if len(kinds) > 1:
        both = f"{kinds[int]} and {shown(kinds[str], 60)}"
        raise ValueError(f"{source}: the {what} ids must be all numbers or all text, got {both}")
    (number, count), *_ = Counter(each["id"] for each in entries).most_common(1)
    if count > 1:
        raise ValueError(f"{source}: {counted(count, what)} have the id {shown(number, 60)}, which must be that of one")
