"""The images of a classification set in folders or in a tar archive: each lies in a folder that is named as its class,
on whatever depth. Order and numbering of the classes are those of timm's readers, which this takes the place of: theirs
follow a link that leads back to its own folder until a path is too long, take hidden folders for classes, and read
through one open archive in all processes that a loader starts.
"""

from __future__ import annotations

import io
import logging
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

from fbn_plugin.engine.data.decoding import image_extensions
from fbn_plugin.engine.files.words import counted, shown_path
from fbn_plugin.engine.run.cli import error_sentence

__all__ = ["Archive", "FoundImages", "Member", "images_in_archive", "images_in_folder"]

logger = logging.getLogger(__name__)


def _seek_and_read(file: int, size: int, start: int) -> bytes:
    os.lseek(file, start, os.SEEK_SET)
    return os.read(file, size)


# Leaves the file's position alone, which forked processes share. Windows has neither.
_read_at = getattr(os, "pread", _seek_and_read)


class Archive:
    """A tar file, of which any number of processes may read at once."""

    def __init__(self, path: str | os.PathLike):
        self.path = path
        self._file: int | None = None

    def read(self, start: int, size: int) -> bytes:
        """Bytes from ``start`` on; fewer than ``size`` where the file ends."""
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        parts, end = [], start + size
        while start < end and (part := _read_at(self._file, end - start, start)):
            parts.append(part)
            start += len(part)
        return b"".join(parts)

    def __getstate__(self) -> dict:
        return {"path": self.path, "_file": None}

    def __del__(self):
        if self._file is not None:
            os.close(self._file)


class Member(NamedTuple):
    """A file in a tar archive, or in one within that: its name, and the bytes of the outer archive that it takes."""

    archive: Archive
    name: str
    start: int
    size: int

    def read(self) -> bytes:
        """The file's content."""
        return self.archive.read(self.start, self.size)

    def __str__(self) -> str:
        return f"{shown_path(self.name)} in {shown_path(self.archive.path)}"


class FoundImages:
    """What was found in a folder or an archive.

    Args:
        place: the folder or the archive.

    Attributes:
        images: name (relative to ``place``), class and file of each.
        empty: folders beside the classes that hold no image.
        left_out: why files are left out -> their names.
        folders: class -> names of the folders that it consists of.
    """

    def __init__(self, place: str | os.PathLike):
        self.place = place
        self.images: list[tuple[str, str, str | Member]] = []
        self.empty: list[str] = []
        self.left_out: defaultdict[str, list[str]] = defaultdict(list)
        self.folders: defaultdict[str, set[str]] = defaultdict(set)

    def add(self, name: str, file: str | Member, label: str | None = None) -> None:
        folder = os.path.dirname(name)
        label = os.path.basename(folder) if label is None else label
        self.images.append((name, label, file))
        self.folders[label].add(folder)

    @property
    def classes(self) -> list[str]:
        return sorted(self.folders, key=_in_order)

    def samples(self, classes: Sequence[str]) -> list[tuple[str | Member, int]]:
        """Files with their class indices, in the order of their names."""
        number = {name: index for index, name in enumerate(classes)}
        ordered = sorted(self.images, key=lambda image: _in_order(image[0]))
        return [(file, number[label]) for _, label, file in ordered]

    def check(self) -> None:
        """Refuse what cannot be classes; say what was left out, in one line.

        Raises:
            ValueError: no image, or one that is in no class; a class whose name is no text.
        """
        if not self.images:
            raise ValueError(f"no images found in {shown_path(self.place)}; expected are <class>/<image> below it")
        if "" in self.folders:
            first = next(name for name, label, _ in self.images if not label)
            raise ValueError(
                f"{shown_path(self.place)} has images outside of class folders, such as {shown_path(first)}; every "
                "image must lie in a folder named as its class"
            )
        if odd := [name for name in self.classes if not name.isprintable()]:
            raise ValueError(f"{shown_path(self.place)} has a class whose name is no text on one line: {odd[0]!r}")
        if self.left_out:
            total = counted(sum(map(len, self.left_out.values())), "entry")
            parts = (f"{len(names):,} {why} (such as {shown_path(min(names))})" for why, names in self.left_out.items())
            logger.warning("%s: %s left out: %s", shown_path(self.place), total, ", ".join(sorted(parts)))
        (label, folders), *others = self.folders.items()
        if len(folders) > 1 and not others:
            where = shown_path(self.place)
            logger.warning("%s: all %d folders with images are named %r and are one class", where, len(folders), label)


def images_in_folder(root: str | os.PathLike) -> FoundImages:
    """The image files below a folder, by their names. Hidden folders and files, as editors and other systems leave
    them, are none.

    Raises:
        ValueError: a link leads to a folder that is met a second time; a file with an image's name is none, such as a
            pipe; see ``FoundImages.check`` too.
        OSError: a folder cannot be read.
    """
    found, seen = FoundImages(root), {}
    todo = [""]
    while todo:
        folder = todo.pop()
        path = os.path.join(root, folder)
        status = os.stat(path)
        same = seen.setdefault((status.st_dev, status.st_ino), path)
        if same != path:
            raise ValueError(
                f"{shown_path(path)} and {shown_path(same)} are one folder, whose images would be there twice"
            )
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = os.path.join(folder, entry.name)
                if _is_hidden(entry.name):
                    found.left_out["hidden"].append(name)
                elif entry.is_dir():
                    todo.append(name)
                elif _is_image(name, found):
                    _check_file(entry)
                    found.add(name, os.path.join(root, name))
    with_images = {name.split(os.sep)[0] for name, _, _ in found.images}
    folders = (os.path.relpath(path, root) for path in seen.values())
    empty = (name for name in folders if name != "." and os.sep not in name and name not in with_images)
    found.empty = sorted(empty, key=_in_order)
    found.check()
    return found


def images_in_archive(path: str | os.PathLike) -> FoundImages:
    """The image files in a tar archive; those of one within it are of the class that the inner one is named as. Nothing
    is unpacked; of a member that comes again the last is taken, as ``tar`` does.

    Raises:
        ValueError: not a whole tar archive, a member's name leads out of it, or see ``FoundImages.check``.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{shown_path(path)} is not a file")
    found, members, archive = FoundImages(path), {}, Archive(path)
    with open(path, "rb") as file:
        for member in _members(file, path):
            if member.isreg() and member.name.lower().endswith(".tar") and not _is_apart(member, found):
                inner, _ = os.path.splitext(os.path.basename(member.name))
                part = _Part(file, member.offset_data, member.size)
                for each in _members(part, f"{path}/{member.name}"):
                    _enter(each, inner, member.offset_data, archive, members, found)
            else:
                _enter(member, "", 0, archive, members, found)
    for (inner, name), member in members.items():
        found.add(name, member, os.path.basename(os.path.dirname(name)) or inner)
    found.check()
    return found


def _enter(
    member: tarfile.TarInfo, inner: str, start: int, archive: Archive, members: dict, found: FoundImages
) -> None:
    """Add a member to those that are known by the name of the archive within that it is in, and its own."""
    if member.isdir() or _is_apart(member, found):
        return
    if not member.isreg() or member.issparse():
        found.left_out["no plain file"].append(member.name)
    elif _is_image(member.name, found):
        name = os.path.normpath(member.name)
        if (inner, name) in members:
            found.left_out["replaced by a later member"].append(member.name)
        members[inner, name] = Member(archive, os.path.join(inner, name), start + member.offset_data, member.size)


def _members(file: BinaryIO, name: str | os.PathLike) -> Iterator[tarfile.TarInfo]:
    try:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if not 0 <= member.size <= size - member.offset_data and member.isreg() and not member.issparse():
                    raise tarfile.ReadError(f"{shown_path(member.name)} is cut short")
                yield member
                archive.members.clear()  # millions of them would stay
            # tarfile takes a header that is cut or damaged for the end, which is a block of zeros.
            file.seek(archive.offset)
            if file.read(512) != bytes(512):
                raise tarfile.ReadError("it has no end, perhaps it is cut short")
    except Exception as error:  # whatever tarfile makes of bytes that are no archive
        reason = " ".join(error_sentence(error).split()) or type(error).__name__
        raise ValueError(f"no images found in {shown_path(name)}, which is not a whole tar archive: {reason}") from None


class _Part(io.RawIOBase):
    """A stretch of a file as a file."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self._whole, self._start, self._size, self._position = file, start, size, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._position)
        self._whole.seek(self._start + self._position)
        data = self._whole.read(left if size < 0 else min(size, left))
        self._position += len(data)
        return data


def _is_hidden(name: str) -> bool:
    return (name.startswith(".") and name not in (".", "..")) or name == "__MACOSX"


def _is_apart(member: tarfile.TarInfo, found: FoundImages) -> bool:
    """Whether a member is hidden; ValueError if its name leads out of the archive."""
    parts = member.name.split("/")
    if ".." in parts:
        raise ValueError(
            f"{shown_path(found.place)} has a member whose name leads out of it: {shown_path(member.name)}"
        )
    if hidden := any(map(_is_hidden, parts)):
        found.left_out["hidden"].append(member.name)
    return hidden


def _is_image(name: str, found: FoundImages) -> bool:
    by_name = os.path.splitext(name)[1].lower() in image_extensions()
    if not by_name:
        found.left_out["not named as an image"].append(name)
    return by_name


def _check_file(entry: os.DirEntry) -> None:
    if not entry.is_file():
        what = "a link to nothing" if entry.is_symlink() and not os.path.exists(entry) else "a pipe, socket or device"
        raise ValueError(f"image {shown_path(entry.path)} is {what}, not a file")


def _in_order(name: str) -> tuple:
    """Sort key: numbers in names by their value and without regard to case, as timm sorts, and then as they are."""
    parts = re.split(r"(\d{1,4000})", name.lower())  # int() takes so many
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name
