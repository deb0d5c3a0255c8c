"""The images of a folder whose classes stand in a file beside them, as Hugging Face's ``imagefolder`` has it
(https://huggingface.co/docs/datasets/image_dataset): ``metadata.csv`` or ``metadata.jsonl`` with the columns
``file_name`` and ``label``.
"""

from __future__ import annotations

import csv
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fbn_plugin.engine.data.coco_checks import check_file_name
from fbn_plugin.engine.data.image_files import FoundImages, checked_label, image_names, images_in_folder
from fbn_plugin.engine.files.json_files import parse_json
from fbn_plugin.engine.files.words import counted, shown, shown_path

__all__ = ["images_by_metadata"]

_NAMES = ("metadata.csv", "metadata.jsonl")
_LONGEST_LINE = 2**20


def images_by_metadata(folder: Path) -> FoundImages:
    """The images of a part of a set, with the classes that its metadata say, those of the whole set in the folder above
    it if it has none of its own, or without either, by class folders.

    Args:
        folder: such as ``my_data/train``.

    Raises:
        ValueError: metadata that are damaged, lack a column, or name what is no image file inside of the folder; see
            ``FoundImages.check`` and ``images_in_folder`` too.
    """
    path = _metadata_of(folder)
    if path is None:
        return images_in_folder(folder)
    found = FoundImages(folder, f"those that {shown_path(path)} names")
    listed: dict[str, str | int] = {}
    for place, entry in _rows(path):
        name = _name_inside(path, folder, place, entry)
        if name is None:  # of another part
            continue
        if name in listed:
            raise ValueError(f"{place} names {shown_path(name)} a second time")
        listed[name] = checked_label(entry["label"], place)
    if path.suffix == ".csv" and all(re.fullmatch(r"\d{1,9}", label) for label in listed.values()):
        listed = {name: int(label) for name, label in listed.items()}
    found.add_labelled((name, _regular(folder, name, path), label) for name, label in listed.items())
    if unlisted := [name for name in image_names(found, []) if name not in listed]:
        found.left_out[f"not in {path.name}"] = unlisted
    found.left_out.pop("not named as an image", None)  # the metadata themselves, and what is beside them
    found.check()
    return found


def _metadata_of(folder: Path) -> Path | None:
    for place in (folder, folder.parent):
        paths = [place / name for name in _NAMES if (place / name).exists()]
        if len(paths) > 1:
            raise ValueError(f"{shown_path(place)} has both {paths[0].name} and {paths[1].name}")
        if paths:
            return paths[0]
    return None


def _name_inside(path: Path, folder: Path, place: str, entry: dict[str, Any]) -> str | None:
    """The name of an entry's image within the folder; None if it is in another one."""
    name = os.path.normpath(check_file_name(place, entry["file_name"]))
    if path.parent == folder:
        return name
    first, _, rest = name.partition(os.sep)
    return rest if first == folder.name and rest else None


def _regular(folder: Path, name: str, path: Path) -> str:
    file = os.path.join(folder, name)
    try:
        mode = os.stat(file).st_mode
    except FileNotFoundError:
        raise ValueError(f"{shown_path(path)} names {shown_path(name)}, which is not there") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{shown_path(path)} names {shown_path(name)}, which is not a file")
    return file


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row stands, and its columns."""
    if not path.is_file():
        raise ValueError(f"{shown_path(path)} is not a file")
    read = _csv_rows if path.suffix == ".csv" else _jsonl_rows
    for line, row in read(path):
        place = f"{shown_path(path)}: line {line}"
        if missing := next((name for name in ("file_name", "label") if row.get(name) is None), None):
            columns = ", ".join(shown(name, 40) for name in list(row)[:8])
            raise ValueError(f"{place} has no {missing!r}; it has {columns or 'nothing'}")
        yield place, row


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), 1):
            place = f"{shown_path(path)}: line {number}"
            if len(line) == _LONGEST_LINE:
                raise ValueError(f"{place} has {_LONGEST_LINE:,} bytes or more")
            if line.strip():
                row = parse_json(line, place)
                if not isinstance(row, dict):
                    raise ValueError(f"{place} is no JSON object")
                yield number, row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            names = reader.fieldnames or []
            if len(set(names)) < len(names):
                raise ValueError(f"{shown_path(path)} has {counted(len(names), 'column')}, of which two have one name")
            for row in reader:
                if None in row:
                    raise ValueError(
                        f"{shown_path(path)}: line {reader.line_num} has more values than there are columns"
                    )
                yield reader.line_num, row
    except (csv.Error, UnicodeDecodeError) as error:
        reason = f"byte {error.start} is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise ValueError(f"{shown_path(path)} is no CSV file: {reason}") from None
