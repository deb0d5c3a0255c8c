"""Labelled image sets for classification, each as a training and a validation set of PIL images: folders and tar
archives (``image_files.py``), MNIST's IDX format (http://yann.lecun.com/exdb/mnist, "FILE FORMATS"), an .npz of JPEG
bytes; CIFAR-10's original batches go through torchvision's reader and handwritten digits through scikit-learn's.
"""

from __future__ import annotations

import functools
import gzip
import io
import logging
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from fbn_plugin.engine.data.decoding import BrokenImageError, decode_image, enough_memory, read_image
from fbn_plugin.engine.data.huggingface_sets import SPLITS, common_classes, load_saved_set
from fbn_plugin.engine.data.image_files import FoundImages, images_in_archive, images_in_folder
from fbn_plugin.engine.data.locations import places
from fbn_plugin.engine.data.metadata_files import images_by_metadata
from fbn_plugin.engine.data.webdataset_files import find_shards, images_in_shards
from fbn_plugin.engine.files.words import counted, shown_path
from fbn_plugin.engine.run.cli import UserError, error_sentence
from fbn_plugin.engine.run.rules import refusal

logger = logging.getLogger(__name__)

CIFAR10_JPEG_FILE = "cifar10_jpeg.npz"

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class ImageData:
    """A training and a validation set over the same classes, and a test set where there is a third.

    Args:
        title: what results on this data are to be labelled with, e.g. "CIFAR-10 (JPEG)".
        train, val: map-style datasets of (PIL image, class index) with a `transform` attribute, as timm's loaders want;
            `val` is None where a set without one was asked for.
        classes: name of each class; its position is the class index.
        test: what a run is measured by once, at its end, if `val` is what it is chosen by; None where `val` is both.
        notes: sentences for the log on what was left out.
    """

    title: str
    train: Images
    val: Images | None
    classes: tuple[str, ...]
    test: Images | None = None
    notes: tuple[str, ...] = ()


class Images(Dataset):
    """Images given out as (PIL image, class index), or through `transform` once timm's loader has set one.

    Args:
        samples: sequence of (image, class index), where an image is a uint8 array of shape (H, W) or (H, W, 3), the
            path of an image file, the bytes of one, or what has a `read` that gives them: a member of a tar archive.
        mode: PIL mode that every image is converted to, "RGB" or "L".
        name: what errors call images that are bytes, before their number.
        numbers: the number of each, of a part of a set; without, they are counted.

    Attributes:
        broken: flags of the images that were found broken and are replaced, see `replace_broken`, in memory that the
            processes which load images share; None where a broken image is an error.

    Raises:
        UserError: on access, an image that cannot be read. (timm's own dataset would take the next one instead.)
    """

    def __init__(
        self,
        samples: Sequence[tuple[Any, int]],
        mode: str = "RGB",
        name: str = "number",
        numbers: Sequence[int] | None = None,
    ):
        self.samples, self.mode, self.name, self.numbers = samples, mode, name, numbers
        self.transform: Callable | None = None
        self.broken: torch.Tensor | None = None
        self._members: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def targets(self) -> Sequence[int]:
        """The class index of each image; none is decoded."""
        return [label for _, label in self.samples]

    def stored(self, index: int) -> tuple[np.ndarray | None, int]:
        """The pixels of an image, where they are an array of the mode asked for, and its class index."""
        image, label = self.samples[index]
        is_of_mode = isinstance(image, np.ndarray) and (image.ndim == 2) == (self.mode == "L")
        return image if is_of_mode else None, int(label)

    def __getitem__(self, index: int):
        image, label, name = self._read(index)
        if self.transform is not None:
            with enough_memory(name):
                image = self.transform(image)
        return image, label

    def name_of(self, index: int) -> str:
        """What an image is called in a sentence."""
        image = self.samples[index][0]
        if isinstance(image, str):
            return shown_path(image)
        number = index if self.numbers is None else self.numbers[index]
        return f"{self.name} {number}" if isinstance(image, bytes | np.ndarray) else str(image)

    def size_of(self, index: int) -> int:
        """Bytes of an image as it is stored; 1 where only reading it tells.

        Raises:
            OSError: its file is not there any more.
        """
        image = self.samples[index][0]
        if isinstance(image, str):
            return os.stat(image).st_size
        return len(image) if isinstance(image, bytes) else getattr(image, "size", 1)

    def part(self, indices: Sequence[int]) -> Images:
        """The images of these numbers alone, called as they are here."""
        numbers = [index if self.numbers is None else self.numbers[index] for index in indices]
        return Images([self.samples[index] for index in indices], self.mode, self.name, numbers)

    def replace_broken(self) -> None:
        """From now on, let the place of an image whose file is damaged be taken by the next one of its class that is
        not: the same one whichever process reads it, and however often. Each is named in the log, once."""
        labels = np.asarray(self.targets)
        self._members = {label: np.flatnonzero(labels == label) for label in np.unique(labels).tolist()}
        self.broken = torch.zeros(len(self), dtype=torch.uint8).share_memory_()

    def _read(self, index: int) -> tuple[Image.Image, int, str]:
        """An image without the transform, its class, and what it is called."""
        label = int(self.samples[index][1])
        if self.broken is None:
            return self._decode(index), label, self.name_of(index)
        members = self._members[label]
        place = np.searchsorted(members, index)
        for other in (*members[place:].tolist(), *members[:place].tolist()):
            if not self.broken[other]:
                try:
                    return self._decode(other), label, self.name_of(other)
                except BrokenImageError as error:
                    self.broken[other] = 1
                    logger.warning("%s; the next image of its class takes its place", error)
        raise UserError(f"no image of the class of {self.name_of(index)} can be read, and none can take its place")

    def _decode(self, index: int) -> Image.Image:
        image = self.samples[index][0]
        if isinstance(image, np.ndarray):
            return Image.fromarray(image).convert(self.mode)
        if isinstance(image, str):
            return read_image(image, self.mode)
        data = image if isinstance(image, bytes) else image.read()
        return decode_image(io.BytesIO(data), self.name_of(index), self.mode)


def read_idx(path: str | os.PathLike, ndim: int | None = None) -> np.ndarray:
    """Read unsigned bytes in MNIST's IDX format.

    Args:
        path: the file, or, where it is not there, `path`.gz.
        ndim: number of dimensions that it must have; up to 3 without.

    Raises:
        ValueError: the file is damaged, or not of these dimensions.
        FileNotFoundError: there is none.
    """
    path = Path(path)
    compressed = path.with_name(path.name + ".gz")
    if not path.exists() and compressed.exists():
        path = compressed
    elif not path.exists():
        raise FileNotFoundError(f"neither {path} nor {compressed.name} exists")
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    # What the file can hold at most: deflate writes 1032 bytes for one.
    most = path.stat().st_size * (1032 if path is compressed else 1)
    try:
        with gzip.open(path) if path is compressed else open(path, "rb") as file:
            shape = _read_idx_header(file, path, ndim)
            size = math.prod(shape)
            data = file.read(size + 1) if size <= most else b""
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None
    if len(data) != size:
        what = "more" if len(data) > size else "fewer"
        raise ValueError(f"{path} is damaged: it has {what} bytes than its shape {shape} says, {size:,}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read_idx_header(file: BinaryIO, path: Path, ndim: int | None) -> tuple[int, ...]:
    start = file.read(4)
    if start[:3] != b"\0\0\x08" or len(start) < 4:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes: it starts with {start!r}")
    found = start[3]
    if found != ndim if ndim else not 1 <= found <= 3:
        raise ValueError(f"{path} must have {ndim or '1 to 3'} dimensions, got {found}")
    sizes = file.read(4 * found)
    if len(sizes) < 4 * found:
        raise ValueError(f"{path} is damaged: it ends within its header")
    return struct.unpack(f">{found}I", sizes)


def find_root(root: str) -> Path:
    """`root` as given, or else below $DETECTRON2_DATASETS (default "datasets"); FileNotFoundError if in neither."""
    if not root:
        raise FileNotFoundError("DATASETS.ROOT is empty; it must name the folder with the images")
    looked = places(root)
    for place in looked:
        if place.exists():
            return place
    where = f", neither as {looked[0]} nor as {looked[1]}" if looked[0] != looked[1] else ""
    raise FileNotFoundError(f"DATASETS.ROOT '{root}' does not exist{where}")


def _of_classes(
    title: str, train: FoundImages, val: FoundImages | None, mode: str, test: FoundImages | None = None
) -> ImageData:
    """The sets that are there, with the classes of the first."""
    classes = train.classes
    if train.empty:
        raise ValueError(
            f"{shown_path(train.place)} has folders without images, {_listed(train.empty)}: each folder there is a "
            "class"
        )
    train.check_numbers()
    for part in (val, test):
        if part is not None:
            _check_classes(train, part)
    parts = [part and Images(part.samples(classes), mode) for part in (train, val, test)]
    return ImageData(title, parts[0], parts[1], tuple(classes), parts[2])


def _check_classes(train: FoundImages, part: FoundImages) -> None:
    """Refuse classes that the training set lacks, and say which of its own a set lacks."""
    place, classes = shown_path(part.place), train.classes
    if unknown := [name for name in part.classes if name not in train.folders]:
        raise ValueError(
            f"{place} has classes that {shown_path(train.place)} lacks: {_listed(unknown)}; every image must be of a "
            "class that is there"
        )
    if missing := [name for name in classes if name not in part.folders]:
        count = counted(len(missing), "class")
        logger.warning("%s has no image of %s of %s: %s", place, count, f"{len(classes):,}", _listed(missing))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def _pick(root: Path, names: Sequence[str], what: str) -> Path:
    for name in names:
        if (root / name).exists():
            return root / name
    raise FileNotFoundError(f"{root} has no {what} ({' or '.join(names)})")


def _or_none(needed: bool, find: Callable[..., _Found], *args) -> _Found | None:
    """What is found; None instead of its FileNotFoundError where it need not be there."""
    try:
        return find(*args)
    except FileNotFoundError:
        if needed:
            raise
    return None


def _image_folder(root: str, mode: str, needs_val: bool = True) -> ImageData:
    root = find_root(root)
    train = _pick(root, ["train"], "training folder")
    val = _or_none(needs_val, _pick, root, ["val", "validation"], "validation folder")
    return _of_classes(root.resolve().name, images_in_folder(train), val and images_in_folder(val), mode)


def _tar(root: str, mode: str, needs_val: bool = True) -> ImageData:
    root = find_root(root)
    train = _pick(root, ["train.tar"], "train archive")
    val = _or_none(needs_val, _pick, root, ["val.tar"], "val archive")
    return _of_classes(root.resolve().name, images_in_archive(train), val and images_in_archive(val), mode)


def _webdataset(root: str, mode: str, needs_val: bool = True) -> ImageData:
    root = find_root(root)
    train = find_shards(root, ("train",))
    val = _or_none(needs_val, find_shards, root, ("val", "validation", "test"))
    return _of_classes(root.resolve().name, images_in_shards(train), val and images_in_shards(val), mode)


def _hf_folder(root: str, mode: str, needs_val: bool = True) -> ImageData:
    root = find_root(root)
    there = {part: [name for name in names if (root / name).exists()] for part, names in SPLITS.items()}
    train, val = (there.pop(part) for part in ("train", "val"))
    if not train or (needs_val and not val + there["test"]):
        wanted = SPLITS["val"] + SPLITS["test"] if train else SPLITS["train"]
        raise FileNotFoundError(f"{root} has no {'validation' if train else 'training'} folder ({', '.join(wanted)})")
    folders = train[:1] + val[:1] + there["test"][:1]
    train, *others = (images_by_metadata(root / name) for name in folders)
    return _of_classes(root.resolve().name, train, others[0] if others else None, mode, *others[1:])


def _hf_datasets(root: str, mode: str, needs_val: bool = True) -> ImageData:
    root = find_root(root)
    saved = load_saved_set(root)
    parts = [saved[name] for name in SPLITS if name in saved]
    if "train" not in saved or (needs_val and len(parts) < 2):
        raise ValueError(f"{shown_path(root)} must have a train part, and a validation or test part")
    classes = common_classes(parts)
    train, *others = (Images(list(zip(part.images, part.labels)), mode) for part in parts)
    return ImageData(root.resolve().name, train, others[0] if others else None, classes, *others[1:])


def _mnist(root: str, mode: str) -> ImageData:
    root = find_root(root)
    # torchvision keeps the files in MNIST/raw.
    root = next((folder for folder in (root, root / "MNIST/raw") if any(folder.glob("train-images-idx3-ubyte*"))), root)
    classes, parts, sizes = tuple("0123456789"), [], []
    for split in ("train", "t10k"):
        places = [root / f"{split}-images-idx3-ubyte", root / f"{split}-labels-idx1-ubyte"]
        images, labels = read_idx(places[0], 3), read_idx(places[1], 1)
        if len(images) != len(labels):
            raise ValueError(f"{root} has {counted(len(images), f'{split} image')} but {counted(len(labels), 'label')}")
        if not images.size:
            raise ValueError(f"{places[0]} has no pixels: its shape is {images.shape}")
        if labels.max() >= len(classes):
            raise ValueError(f"{places[1]} must hold labels from 0 to 9, got {labels.max()}")
        sizes.append(images.shape[1:])
        parts.append(Images(list(zip(images, labels)), mode))
    if sizes[0] != sizes[1]:
        raise ValueError(f"{root} has training images of {sizes[0]} pixels and others of {sizes[1]} to validate on")
    return ImageData("MNIST", *parts, classes)


def _cifar(title: str, root: str, mode: str) -> ImageData:
    from torchvision import datasets

    root, kind = find_root(root), getattr(datasets, title.replace("-", ""))
    root = root.parent if root.name == kind.base_folder else root
    try:
        train, val = (kind(root, train=train) for train in (True, False))
    except RuntimeError:
        raise FileNotFoundError(
            f"{root / kind.base_folder} is missing, incomplete or damaged; expected are the original python batches."
        ) from None
    parts = [Images(list(zip(part.data, part.targets)), mode) for part in (train, val)]
    return ImageData(title, *parts, tuple(train.classes))


def _cifar10_jpeg(root: str, mode: str) -> ImageData:
    root = find_root(root)
    path = root if root.is_file() else _pick(root, [CIFAR10_JPEG_FILE], "archive of JPEG bytes")
    names = [f"{split}_{kind}" for split in ("train", "test") for kind in ("jpeg", "offsets", "labels")]
    arrays = _read_arrays(path, [*names, "class_names"])
    classes = arrays["class_names"]
    if classes.ndim != 1 or classes.dtype.kind != "U" or not len(classes):
        raise _not_of_jpegs(path, f"class_names must be a list of text, got {_kind(classes)}")
    parts = []
    for split in ("train", "test"):
        data, offsets, labels = (arrays[f"{split}_{kind}"] for kind in ("jpeg", "offsets", "labels"))
        _check_jpegs(path, split, data, offsets, labels, len(classes))
        images = [data[start:stop].tobytes() for start, stop in pairwise(offsets.tolist())]
        parts.append(Images(list(zip(images, labels.tolist())), mode, f"{split} image of {shown_path(path)}, number"))
    # The pixels are not the original ones: results must not pass for results on CIFAR-10.
    return ImageData("CIFAR-10 (JPEG)", *parts, tuple(map(str, classes)))


def _read_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays of an .npz, whose sizes are looked at before anything is read."""
    if not path.is_file():
        raise ValueError(f"{shown_path(path)} is not a file")
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {each.filename: each.file_size for each in archive.infolist()}
            missing = [name for name in names if f"{name}.npy" not in sizes]
            # JPEG bytes do not become fewer by compression, and the rest is small beside them.
            most = 20 * path.stat().st_size + 2**24
            if missing or sum(sizes[f"{name}.npy"] for name in names) > most:
                raise ValueError(f"it lacks {missing[0]!r}" if missing else f"its arrays have more than {most:,} bytes")
            return {name: _read_array(archive, f"{name}.npy", sizes[f"{name}.npy"]) for name in names}
    except Exception as error:  # whatever zipfile and NumPy make of bytes that are neither
        raise _not_of_jpegs(path, error_sentence(error) or type(error).__name__) from None


def _read_array(archive: zipfile.ZipFile, name: str, size: int) -> np.ndarray:
    """One array, of which no more memory is taken than its bytes have."""
    with archive.open(name) as file:
        data = file.read(size)
    content = io.BytesIO(data)
    version = np.lib.format.read_magic(content)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(content)
    if dtype.hasobject or not dtype.itemsize or math.prod(shape) * dtype.itemsize != len(data) - content.tell():
        raise ValueError(f"{name} must hold numbers or text of its shape {shape}, got other bytes of type {dtype}")
    content.seek(0)
    return np.lib.format.read_array(content, allow_pickle=False)


def _check_jpegs(
    path: Path, split: str, data: np.ndarray, offsets: np.ndarray, labels: np.ndarray, classes: int
) -> None:
    """Refuse arrays that are not those of a set of JPEG images."""
    if data.dtype != np.uint8 or data.ndim != 1:
        raise _not_of_jpegs(path, f"{split}_jpeg must be a list of unsigned bytes, got {_kind(data)}")
    for name, array in (("offsets", offsets), ("labels", labels)):
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise _not_of_jpegs(path, f"{split}_{name} must be a list of whole numbers, got {_kind(array)}")
    if len(offsets) != len(labels) + 1 or not len(labels):
        raise _not_of_jpegs(path, f"it has {len(labels)} {split}_labels and {len(offsets)}, not one more, of offsets")
    bounds = offsets.tolist()
    if bounds[0] < 0 or bounds[-1] > len(data) or any(stop <= start for start, stop in pairwise(bounds)):
        raise _not_of_jpegs(path, f"{split}_offsets must increase from 0 or more to {len(data)} or less")
    if not 0 <= labels.min() <= labels.max() < classes:
        highest = f"from 0 to {classes - 1}, got {labels.min()} to {labels.max()}"
        raise _not_of_jpegs(path, f"{split}_labels must be numbers of class_names {highest}")


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype} of shape {array.shape}"


def _not_of_jpegs(path: Path, what: str) -> ValueError:
    what = " ".join(what.split())
    return ValueError(f"{shown_path(path)} is not an archive of JPEG bytes as load_image_data describes it: {what}")


def _digits(root: str, mode: str) -> ImageData:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    train_x, val_x, train_y, val_y = train_test_split(
        images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    classes = tuple(str(name) for name in digits.target_names)
    parts = [Images(list(zip(*part)), mode) for part in ((train_x, train_y), (val_x, val_y))]
    return ImageData("handwritten digits (scikit-learn)", *parts, classes)


IMAGE_DATA: dict[str, Callable[..., ImageData]] = {
    "image_folder": _image_folder,
    "tar": _tar,
    "webdataset": _webdataset,
    "hf_folder": _hf_folder,
    "hf_datasets": _hf_datasets,
    "mnist": _mnist,
    "cifar10": functools.partial(_cifar, "CIFAR-10"),
    "cifar100": functools.partial(_cifar, "CIFAR-100"),
    "cifar10_jpeg": _cifar10_jpeg,
    "digits": _digits,
}


# Of these a user's own may be the training images alone.
_MAY_LACK_VAL = ("image_folder", "tar", "webdataset", "hf_folder", "hf_datasets")


def load_image_data(name: str, root: str = "", mode: str = "RGB", needs_val: bool = True) -> ImageData:
    """Load the image set `name` from `root`.

    Args:
        name: how the set is stored:
            "image_folder": `root`/train/<class>/<image> and `root`/val/<class>/<image> (ImageNet's layout);
            "tar": `root`/train.tar and `root`/val.tar with members <class>/<image>;
            "webdataset": shards `root`/train-00000.tar, ... and `root`/val-00000.tar, ... with members KEY.jpg and
                KEY.cls, or KEY.json with a "label";
            "hf_folder": `root`/train, `root`/validation, `root`/test with class folders, or with metadata.csv or
                metadata.jsonl (Hugging Face's imagefolder); with only one of the last two, it is validated on;
            "hf_datasets": what Hugging Face's datasets saved with save_to_disk, or Parquet files of theirs;
            "mnist": the four IDX files, gzipped or not;
            "cifar10", "cifar100": cifar-10-batches-py or cifar-100-python, the original python batches; of CIFAR-100
                the 100 fine classes;
            "cifar10_jpeg": CIFAR-10 as JPEG bytes in cifar10_jpeg.npz, arrays {train,test}_{jpeg,offsets,labels} and
                class_names; image i is jpeg[offsets[i]:offsets[i + 1]];
            "digits": 1797 8x8 images that come with scikit-learn, a fixed stratified 1437 + 360 split; needs no `root`.
        root: folder of the set; a path, or a folder below $DETECTRON2_DATASETS.
        mode: PIL mode of the images, "RGB" or "L" (grey).
        needs_val: whether a set of training images alone is an error; if not, its `val` is None.

    Raises:
        ValueError: unknown name or mode, damaged files, or validation classes that the training set lacks.
        FileNotFoundError: files are missing.
    """
    for key, value, known in (("DATASETS.NAME", name, IMAGE_DATA), ("INPUT.FORMAT", mode, ("RGB", "L"))):
        if value not in known:
            raise refusal(key, f"one of {', '.join(map(repr, known))}", value)
    return IMAGE_DATA[name](root, mode, *([needs_val] if name in _MAY_LACK_VAL else []))
