"""The images of a classification set in folders or in a tar archive: each lies in a folder that is named as its class,
on whatever depth. Order and numbering of the classes are those of timm's readers, which this takes the place of: theirs
follow a link that leads back to its own folder until a path is too long, take hidden folders for classes, and read
through one open archive in all processes that a loader starts.
"""

from __future__ import annotations

import logging
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from fbn_plugin.engine.data.decoding import image_extensions
from fbn_plugin.engine.data.tar_files import Archive, Member, Part, read_members
from fbn_plugin.engine.files.words import counted, shown, shown_path

__all__ = [
    "FoundImages",
    "checked_label",
    "image_names",
    "images_in_archive",
    "images_in_folder",
    "in_order",
    "is_apart",
]

logger = logging.getLogger(__name__)


class FoundImages:
    """What was found in a folder or an archive.

    Args:
        place: the folder or the archive.
        layout: how images are expected to lie there.

    Attributes:
        images: name (relative to ``place``), class and file of each.
        empty: folders beside the classes that hold no image.
        left_out: why files are left out -> their names.
        folders: class -> names of the folders that it consists of.
        numbered: whether the classes are numbers that the set gives to its images, and not names.
    """

    def __init__(self, place: str | os.PathLike, layout: str = "<class>/<image> below it"):
        self.place, self.layout = place, layout
        self.numbered = False
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
        return sorted(self.folders, key=in_order)

    def add_labelled(self, images: Iterable[tuple[str, str | Member, int | str]]) -> None:
        """Add names and files of images with the classes that the set gives them, numbers or names.

        Raises:
            ValueError: numbers here and names there.
        """
        kinds: dict[type, str] = {}
        for name, file, label in images:
            kinds.setdefault(type(label), name)
            self.add(name, file, str(label))
        if len(kinds) > 1:
            raise ValueError(
                f"{shown_path(self.place)} has labels that are numbers and labels that are text: those of "
                f"{shown_path(kinds[int])} and {shown_path(kinds[str])}"
            )
        self.numbered = int in kinds

    def check_numbers(self) -> None:
        """Refuse classes that are numbers with one missing among them: those behind it would be numbered anew.

        Raises:
            ValueError: as said.
        """
        classes = self.classes
        if self.numbered and classes != list(map(str, range(len(classes)))):
            missing = next(number for number, name in enumerate(classes) if str(number) != name)
            raise ValueError(
                f"{shown_path(self.place)} has {counted(len(classes), 'label')} from {classes[0]} to {classes[-1]}, "
                f"and no image of label {missing}; they must be 0, 1, 2, ..."
            )

    def samples(self, classes: Sequence[str]) -> list[tuple[str | Member, int]]:
        """Files with their class indices, in the order of their names."""
        number = {name: index for index, name in enumerate(classes)}
        ordered = sorted(self.images, key=lambda image: in_order(image[0]))
        return [(file, number[label]) for _, label, file in ordered]

    def check(self) -> None:
        """Refuse what cannot be classes; say what was left out, in one line.

        Raises:
            ValueError: no image, or one that is in no class; a class whose name is no text.
        """
        if not self.images:
            raise ValueError(f"no images found in {shown_path(self.place)}; expected are {self.layout}")
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
    found, folders = FoundImages(root), []
    for name in image_names(found, folders):
        found.add(name, os.path.join(root, name))
    with_images = {name.split(os.sep)[0] for name, _, _ in found.images}
    empty = (name for name in folders if name != "." and os.sep not in name and name not in with_images)
    found.empty = sorted(empty, key=in_order)
    found.check()
    return found


def checked_label(value: object, who: str) -> int | str:
    """What a set gives as a class: a number from 0 on, or a text.

    Raises:
        ValueError: it is neither; ``who`` says where it stands.
    """
    number = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9
    if not number and not (isinstance(value, str) and value):
        raise ValueError(
            f"{who}: the label must be a number of a class, 0 or more, or its name, got {shown(value, 60)}"
        )
    return value


def image_names(found: FoundImages, folders: list[str]) -> Iterator[str]:
    """Names of the image files below ``found.place``; what is none is noted there, and the folders in ``folders``."""
    root, seen, todo = found.place, {}, [""]
    while todo:
        folder = todo.pop()
        path = os.path.join(root, folder)
        status = os.stat(path)
        same = seen.setdefault((status.st_dev, status.st_ino), path)
        if same != path:
            raise ValueError(
                f"{shown_path(path)} and {shown_path(same)} are one folder, whose images would be there twice"
            )
        folders.append(os.path.relpath(path, root))
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = os.path.join(folder, entry.name)
                if _is_hidden(entry.name):
                    found.left_out["hidden"].append(name)
                elif entry.is_dir():
                    todo.append(name)
                elif _is_image(name, found):
                    _check_file(entry)
                    yield name


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
        for member in read_members(file, path):
            if member.isreg() and member.name.lower().endswith(".tar") and not is_apart(member, found):
                inner, _ = os.path.splitext(os.path.basename(member.name))
                part = Part(file, member.offset_data, member.size)
                for each in read_members(part, f"{path}/{member.name}"):
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
    if member.isdir() or is_apart(member, found):
        return
    if not member.isreg() or member.issparse():
        found.left_out["no plain file"].append(member.name)
    elif _is_image(member.name, found):
        name = os.path.normpath(member.name)
        if (inner, name) in members:
            found.left_out["replaced by a later member"].append(member.name)
        members[inner, name] = Member(archive, os.path.join(inner, name), start + member.offset_data, member.size)


def _is_hidden(name: str) -> bool:
    return (name.startswith(".") and name not in (".", "..")) or name == "__MACOSX"


def is_apart(member: tarfile.TarInfo, found: FoundImages) -> bool:
    """Whether a member is hidden, which ``found`` is told; ValueError if its name leads out of the archive."""
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


def in_order(name: str) -> tuple:
    """Sort key: numbers in names by their value and without regard to case, as timm sorts, and then as they are."""
    parts = re.split(r"(\d{1,4000})", name.lower())  # int() takes so many
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name
