"""The images of a WebDataset (https://github.com/webdataset/webdataset): tar archives, "shards", in which the members
of a sample lie under one key, KEY.jpg beside KEY.cls or KEY.json. The library streams through shards; here their
headers are read once, so that images can be had in any order, as a resumed training must have them.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from fbn_plugin.engine.data.decoding import image_extensions
from fbn_plugin.engine.data.image_files import FoundImages, checked_label, in_order, is_apart
from fbn_plugin.engine.data.tar_files import Archive, Member, read_members
from fbn_plugin.engine.files.json_files import parse_json
from fbn_plugin.engine.files.words import counted, shown, shown_path

__all__ = ["find_shards", "images_in_shards"]

_MOST_OPEN = 64  # shards
_MOST_BYTES = 2**20  # of the JSON of a sample
_NUMBER = re.compile(r"(.*?)(\d{1,9})(?:-of-(\d{1,9}))?(\D*)")


def find_shards(root: Path, names: Sequence[str]) -> list[Path]:
    """The shards of a part of a set: archives in a folder, or in its folder of the part's name, that have the part's
    name as a word of their own.

    Args:
        root: the set's folder.
        names: of the part, of which the first that shards have is taken, such as ``("val", "validation")``.

    Returns:
        paths, by their numbers.

    Raises:
        ValueError: a number is missing.
        FileNotFoundError: there are none.
    """
    for name in names:
        files = [path for path in root.glob("*.tar") if name in re.split(r"[^a-z]+", path.stem.lower())]
        if files := files or [*(root / name).glob("*.tar")]:
            files.sort(key=lambda path: in_order(path.name))
            _check_complete(files)
            return files
    hint = ""
    if compressed := next((path for path in root.rglob("*.tar.*")), None):
        hint = f"; {shown_path(compressed.name)} is compressed, and could be read from its beginning only: unpack it"
    expected = " or ".join(f"{name}-00000.tar" for name in names)
    raise FileNotFoundError(f"{shown_path(root)} has no shards such as {expected}{hint}")


def _check_complete(files: Sequence[Path]) -> None:
    """Refuse a series of numbered shards in which one is missing."""
    series = defaultdict(dict)
    for path in files:
        if match := _NUMBER.fullmatch(path.stem):
            before, number, total, behind = match.groups()
            series[before, total, behind][int(number)] = path.name
    for (_, total, _), names in series.items():
        first = min(names)
        end = first + int(total) if total and first in (0, 1) else max(names) + 1
        if missing := next((number for number in range(first, end) if number not in names), None):
            raise ValueError(
                f"{shown_path(files[0].parent)} has {counted(len(names), 'shard')} such as {shown_path(names[first])}, "
                f"and none of number {missing}"
            )


def images_in_shards(shards: Sequence[Path]) -> FoundImages:
    """The images of shards by their classes: what KEY.cls says, a number, or else the ``"label"`` in KEY.json, a number
    or a text. Nothing is unpacked.

    Args:
        shards: of one part of a set, in order.

    Raises:
        ValueError: an archive that is damaged; a sample without a class, or with two images; numbers here and text
            there; see ``FoundImages.check`` too.
    """
    numbered = _NUMBER.fullmatch(shards[0].stem) if len(shards) > 1 else None
    place = shards[0].with_name(f"{numbered[1]}*.tar") if numbered else shards[0]
    found = FoundImages(place, "KEY.jpg beside KEY.cls or KEY.json in its shards")
    stays_open = len(shards) <= _MOST_OPEN
    found.add_labelled(image for path in shards for image in _images(Archive(path, stays_open), found))
    found.check()
    return found


def _images(archive: Archive, found: FoundImages) -> Iterator[tuple[str, Member, int | str]]:
    path = archive.path
    for key, parts in _samples(archive, found).items():
        images = [name for name in parts if f".{name}" in image_extensions()]
        if len(images) > 1:
            raise ValueError(f"sample {_shown(key, path)} has two images, .{images[0]} and .{images[1]}")
        if images:
            yield f"{path.name}/{key}.{images[0]}", parts[images[0]], _label(key, parts, path)
        else:
            found.left_out["without an image"].append(key)


def _samples(archive: Archive, found: FoundImages) -> dict[str, dict[str, Member]]:
    """The members of a shard by their keys, and in each by what follows the first dot of their names."""
    samples, path = defaultdict(dict), archive.path
    if not path.is_file():
        raise ValueError(f"{shown_path(path)} is not a file")
    with open(path, "rb") as file:
        for member in read_members(file, path):
            if member.isdir() or is_apart(member, found):
                continue
            folder, name = os.path.split(os.path.normpath(member.name))
            stem, _, extension = name.partition(".")
            if not member.isreg() or member.issparse():
                found.left_out["no plain file"].append(member.name)
            elif not extension:
                found.left_out["without an extension"].append(member.name)
            else:
                parts = samples[os.path.join(folder, stem)]
                if parts.setdefault(extension.lower(), each := _member(archive, member)) is not each:
                    raise ValueError(f"{shown_path(path)} has two members {shown_path(member.name)}")
    return samples


def _member(archive: Archive, member) -> Member:
    return Member(archive, os.path.normpath(member.name), member.offset_data, member.size)


def _label(key: str, parts: dict[str, Member], path: Path) -> int | str:
    if "cls" in parts:
        text = parts["cls"].read() if parts["cls"].size < 100 else b""
        if not re.fullmatch(rb"\s*\d{1,9}\s*", text):
            raise ValueError(f"{parts['cls']} must hold the number of a class, 0 or more, got {shown(text, 40)}")
        return int(text)
    if "json" not in parts:
        raise ValueError(f"sample {_shown(key, path)} has no class: neither .cls nor .json with a label")
    if parts["json"].size > _MOST_BYTES:
        raise ValueError(f"{parts['json']} has {parts['json'].size:,} bytes, more than {_MOST_BYTES:,}")
    content = parse_json(parts["json"].read(), str(parts["json"]))
    if not isinstance(content, dict) or "label" not in content:
        names = f"; it has {', '.join(map(shown, list(content)[:8]))}" if isinstance(content, dict) else ""
        raise ValueError(f"{parts['json']} has no 'label'{names}")
    return checked_label(content["label"], str(parts["json"]))


def _shown(key: str, path: Path) -> str:
    return f"{shown_path(key)} in {shown_path(path)}"
