"""Image sets of Hugging Face's ``datasets``, as its ``save_to_disk`` writes them, or as the Parquet files of a
repository that was downloaded. The package reads the tables; images are decoded here, as all others are.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fbn_plugin import internals
from fbn_plugin.engine.data.decoding import BrokenImageError
from fbn_plugin.engine.files.words import counted, shown, shown_path
from fbn_plugin.engine.run.cli import error_sentence

__all__ = ["SPLITS", "SavedImage", "SavedPart", "common_classes", "load_saved_set"]

logger = logging.getLogger(__name__)

# What the parts of a set are called.
SPLITS = {
    "train": ("train", "training"),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
_LABELS = ("label", "labels", "fine_label")


class SavedImage(NamedTuple):
    """An image in a column of a table, as its row."""

    rows: Any  # a ``datasets.Dataset`` of that column
    index: int
    place: str

    def read(self) -> bytes:
        """The image file's content.

        Raises:
            BrokenImageError: the row holds none, or the path of a file elsewhere, which is not followed.
        """
        (content,) = self.rows[self.index].values()
        if not isinstance(content, dict) or not isinstance(content.get("bytes"), bytes):
            raise BrokenImageError(f"{self} has no bytes of an image; embed the files when the set is saved")
        return content["bytes"]

    def __str__(self) -> str:
        return f"row {self.index} of {self.place}"


@dataclass(frozen=True)
class SavedPart:
    """A part of a set.

    Args:
        place: what errors call it.
        images: in the order of the table.
        labels: class index of each.
        classes: their names; None where labels are plain numbers.
    """

    place: str
    images: list[SavedImage]
    labels: list[int]
    classes: tuple[str, ...] | None


def load_saved_set(root: Path) -> dict[str, SavedPart]:
    """The parts of a saved set by the keys of ``SPLITS``; those that it has not are left out, and a test set without
    labels.

    Args:
        root: folder with ``dataset_dict.json``, or with Parquet files whose names have that of their part as a word, in
            itself or in its folder ``data``.

    Raises:
        ValueError: ``datasets`` is not installed, the files are damaged, or no column has images or their classes.
        FileNotFoundError: there is no such file.
    """
    if not internals.is_installed("datasets"):
        raise ValueError(
            "DATASETS.NAME 'hf_datasets' needs the package datasets, which is not installed: pip install datasets"
        )
    import datasets

    try:
        if (root / "dataset_dict.json").is_file():
            tables = dict(datasets.load_from_disk(str(root)))
        else:
            tables = {
                name: datasets.Dataset.from_parquet([str(path) for path in files])
                for name, files in _parquet_files(root).items()
            }
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever datasets and pyarrow make of files that are none of theirs
        reason = " ".join(error_sentence(error).split())[:300] or type(error).__name__
        raise ValueError(f"{shown_path(root)} cannot be read as a set of Hugging Face's datasets: {reason}") from None
    parts = {}
    for part, names in SPLITS.items():
        if name := next((name for name in names if name in tables), None):
            parts[part] = _part(tables[name], f"{name} in {shown_path(root)}", datasets)
    if "test" in parts and "val" in parts and set(parts["test"].labels) == {-1}:
        logger.warning("%s has no labels, and is left out", parts.pop("test").place)
    for part in parts.values():
        _check_labels(part)
    return parts


def _parquet_files(root: Path) -> dict[str, list[Path]]:
    files = sorted([*root.glob("*.parquet"), *root.glob("data/*.parquet")])
    found = {
        name: [path for path in files if name in re.split(r"[^a-z]+", path.stem.lower())]
        for names in SPLITS.values()
        for name in names
    }
    found = {name: paths for name, paths in found.items() if paths}
    if not found:
        expected = "dataset_dict.json, nor Parquet files such as train-00000-of-00001.parquet"
        raise FileNotFoundError(f"{shown_path(root)} has neither {expected}, in itself or in data")
    return found


def _part(table: Any, place: str, datasets: Any) -> SavedPart:
    """The column of images, which stay encoded, and that of their classes."""
    features = table.features
    image = next((name for name, kind in features.items() if isinstance(kind, datasets.Image)), None)
    named = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    numbers = [name for name, kind in features.items() if re.match("u?int", getattr(kind, "dtype", None) or "")]
    label = named[0] if len(named) == 1 else next((name for name in _LABELS if name in named or name in numbers), None)
    if image is None or label is None:
        what = "images" if image is None else f"classes, such as {_LABELS[0]}"
        raise ValueError(f"{place} has no column of {what}; it has {', '.join(map(shown, list(features)[:12]))}")
    rows = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    images = [SavedImage(rows, index, place) for index in range(len(table))]
    classes = tuple(features[label].names) if label in named else None
    return SavedPart(place, images, list(table[label]), classes)


def _check_labels(part: SavedPart) -> None:
    if not part.images:
        raise ValueError(f"{part.place} has no images")
    most = None if part.classes is None else len(part.classes)
    wrong = [label for label in part.labels if label is None or label < 0 or (most is not None and label >= most)]
    if wrong:
        count = counted(len(wrong), "image")
        raise ValueError(f"{part.place} has {count} without a class: the label must be 0 or more, got {wrong[0]}")


def common_classes(parts: Sequence[SavedPart]) -> tuple[str, ...]:
    """The names of the classes that all parts have in one order.

    Raises:
        ValueError: their names differ, or a number of no training image is missing among them.
    """
    first, *others = parts
    for part in others:
        if part.classes != first.classes:
            raise ValueError(f"{part.place} has other classes than {first.place}, or in another order")
    if first.classes is not None:
        return first.classes
    numbers = sorted({label for part in parts for label in part.labels})
    known = sorted(set(first.labels))
    if numbers != known or known != list(range(len(known))):
        missing = next(number for number in range(len(numbers) + 1) if number not in known)
        raise ValueError(f"{first.place} has labels up to {known[-1]}, and no image of label {missing}")
    return tuple(map(str, known))
