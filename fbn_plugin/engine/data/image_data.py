"""Labelled image sets for classification, each as a training and a validation set of PIL images. Folders and tar
archives go through timm's readers, CIFAR-10's original batches through torchvision's, handwritten digits through
scikit-learn's; what is left is MNIST's IDX format (http://yann.lecun.com/exdb/mnist, "FILE FORMATS") and an .npz of
JPEG bytes.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data.readers import create_reader
from torch.utils.data import Dataset

from fbn_plugin.engine.data.decoding import UNREADABLE
from fbn_plugin.engine.run.cli import UserError, error_sentence
from fbn_plugin.engine.run.rules import refusal
from fbn_plugin.engine.run.words import counted

CIFAR10_JPEG_FILE = "cifar10_jpeg.npz"


@dataclass(frozen=True)
class ImageData:
    """A training and a validation set over the same classes.

    Args:
        title: what results on this data are to be labelled with, e.g. "CIFAR-10 (JPEG)".
        train, val: map-style datasets of (PIL image, class index) with a `transform` attribute, as timm's loaders want.
        classes: name of each class; its position is the class index.
    """

    title: str
    train: Dataset
    val: Dataset
    classes: tuple[str, ...]


class Images(Dataset):
    """Images given out as (PIL image, class index), or through `transform` once timm's loader has set one.

    Args:
        samples: sequence of (image, class index), where an image is a uint8 array of shape (H, W) or (H, W, 3), the
            bytes of an image file, or an open one. A timm reader is such a sequence.
        mode: PIL mode that every image is converted to, "RGB" or "L".

    Raises:
        UserError: on access, an image that cannot be decoded. (timm's own dataset would take the next one instead.)
    """

    def __init__(self, samples: Sequence[tuple[Any, int]], mode: str = "RGB"):
        self.samples, self.mode = samples, mode
        self.transform: Callable | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def targets(self) -> Sequence[int]:
        """The class index of each image; none is decoded."""
        if hasattr(self.samples, "targets"):  # timm's reader of tar files
            return self.samples.targets
        return [sample[1] for sample in getattr(self.samples, "samples", self.samples)]

    def __getitem__(self, index: int):
        image, label = self.samples[index]
        try:
            if isinstance(image, np.ndarray):
                image = Image.fromarray(image)
            else:
                image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
            image = image.convert(self.mode)
        except UNREADABLE as error:
            name = self.samples.filename(index) if hasattr(self.samples, "filename") else f"number {index}"
            raise UserError(f"image {name} cannot be decoded: {error_sentence(error)}") from None
        return (image if self.transform is None else self.transform(image)), int(label)


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """Read unsigned bytes in MNIST's IDX format from `path` or `path`.gz; ValueError where they are damaged."""
    path = Path(path)
    if path.exists():
        data = path.read_bytes()
    elif (compressed := path.with_name(path.name + ".gz")).exists():
        try:
            data = gzip.decompress(compressed.read_bytes())
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{compressed} is not a whole gzip file: {error}") from None
    else:
        raise FileNotFoundError(f"neither {path} nor {path.name}.gz exists")
    if data[:3] != b"\0\0\x08" or len(data) < 4:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes: it starts with {data[:4]!r}")
    ndim = data[3]
    shape = np.frombuffer(data, ">u4", ndim, offset=4) if len(data) >= 4 + 4 * ndim else ()
    values = np.frombuffer(data, np.uint8, offset=min(4 + 4 * ndim, len(data)))
    if len(shape) != ndim or values.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path} is cut short or damaged: {values.size} bytes for shape {tuple(map(int, shape))}")
    return values.reshape(shape)


def find_root(root: str) -> Path:
    """`root` as given, or else below $DETECTRON2_DATASETS (default "datasets"); FileNotFoundError if in neither."""
    if not root:
        raise FileNotFoundError("DATASETS.ROOT is empty; it must name the folder with the images")
    places = [Path(root).expanduser(), Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser() / root]
    for place in places:
        if place.exists():
            return place
    raise FileNotFoundError(f"DATASETS.ROOT '{root}' does not exist, neither as {places[0]} nor as {places[1]}")


def _from_timm(title: str, train_root: Path, val_root: Path, mode: str) -> ImageData:
    def read(path: Path, class_map: dict | None = None):
        try:
            reader = create_reader("", root=str(path), class_map=class_map)
        except (RuntimeError, ValueError, tarfile.ReadError):  # how timm's readers fail where no image is found
            raise ValueError(f"no images found in {path}; expected are <class>/<image> below it") from None
        # Folder and tar readers name the same mapping differently.
        return reader, reader.class_to_idx if hasattr(reader, "class_to_idx") else reader.class_name_to_idx

    train, class_to_idx = read(train_root)
    val, val_classes = read(val_root)
    if unknown := sorted(set(val_classes) - set(class_to_idx)):
        what = (
            "images outside of class folders" if unknown == [""] else f"classes that {train_root} lacks: {unknown[:5]}"
        )
        raise ValueError(f"{val_root} has {what}; every image must lie in a folder named as its class in {train_root}")
    if val_classes != class_to_idx:
        # timm numbers the classes of each folder on its own; a class without validation images would shift the others.
        val, _ = read(val_root, class_to_idx)
    return ImageData(title, Images(train, mode), Images(val, mode), tuple(sorted(class_to_idx, key=class_to_idx.get)))


def _pick(root: Path, names: Sequence[str], what: str) -> Path:
    for name in names:
        if (root / name).exists():
            return root / name
    raise FileNotFoundError(f"{root} has no {what} ({' or '.join(names)})")


def _image_folder(root: str, mode: str) -> ImageData:
    root = find_root(root)
    train = _pick(root, ["train"], "training folder")
    val = _pick(root, ["val", "validation"], "validation folder")
    return _from_timm(root.resolve().name, train, val, mode)


def _tar(root: str, mode: str) -> ImageData:
    root = find_root(root)
    train, val = (_pick(root, [f"{split}.tar"], f"{split} archive") for split in ("train", "val"))
    return _from_timm(root.resolve().name, train, val, mode)


def _mnist(root: str, mode: str) -> ImageData:
    root = find_root(root)
    # torchvision keeps the files in MNIST/raw.
    root = next((folder for folder in (root, root / "MNIST/raw") if any(folder.glob("train-images-idx3-ubyte*"))), root)
    parts = []
    for split in ("train", "t10k"):
        images, labels = read_idx(root / f"{split}-images-idx3-ubyte"), read_idx(root / f"{split}-labels-idx1-ubyte")
        if len(images) != len(labels):
            raise ValueError(f"{root} has {counted(len(images), f'{split} image')} but {counted(len(labels), 'label')}")
        parts.append(Images(list(zip(images, labels)), mode))
    return ImageData("MNIST", *parts, tuple("0123456789"))


def _cifar10(root: str, mode: str) -> ImageData:
    from torchvision.datasets import CIFAR10

    root = find_root(root)
    root = root.parent if root.name == CIFAR10.base_folder else root
    try:
        train, val = (CIFAR10(root, train=train) for train in (True, False))
    except RuntimeError:
        raise FileNotFoundError(
            f"{root / CIFAR10.base_folder} is missing, incomplete or damaged; expected are the original python batches."
        ) from None
    parts = [Images(list(zip(part.data, part.targets)), mode) for part in (train, val)]
    return ImageData("CIFAR-10", *parts, tuple(train.classes))


def _cifar10_jpeg(root: str, mode: str) -> ImageData:
    root = find_root(root)
    path = root if root.is_file() else _pick(root, [CIFAR10_JPEG_FILE], "archive of JPEG bytes")
    try:
        with np.load(path) as archive:
            arrays = dict(archive)
        parts = []
        for split in ("train", "test"):
            data, offsets = arrays[f"{split}_jpeg"], arrays[f"{split}_offsets"]
            images = [data[start:stop].tobytes() for start, stop in pairwise(offsets)]
            parts.append(Images(list(zip(images, arrays[f"{split}_labels"], strict=True)), mode))
        classes = tuple(map(str, arrays["class_names"]))
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an archive of JPEG bytes as load_image_data describes it: {error}") from None
    # The pixels are not the original ones: results must not pass for results on CIFAR-10.
    return ImageData("CIFAR-10 (JPEG)", *parts, classes)


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


IMAGE_DATA: dict[str, Callable[[str, str], ImageData]] = {
    "image_folder": _image_folder,
    "tar": _tar,
    "mnist": _mnist,
    "cifar10": _cifar10,
    "cifar10_jpeg": _cifar10_jpeg,
    "digits": _digits,
}


def load_image_data(name: str, root: str = "", mode: str = "RGB") -> ImageData:
    """Load the image set `name` from `root`.

    Args:
        name: how the set is stored:
            "image_folder": `root`/train/<class>/<image> and `root`/val/<class>/<image> (ImageNet's layout);
            "tar": `root`/train.tar and `root`/val.tar with members <class>/<image>;
            "mnist": the four IDX files, gzipped or not;
            "cifar10": cifar-10-batches-py, the original python batches;
            "cifar10_jpeg": CIFAR-10 as JPEG bytes in cifar10_jpeg.npz, arrays {train,test}_{jpeg,offsets,labels} and
                class_names; image i is jpeg[offsets[i]:offsets[i + 1]];
            "digits": 1797 8x8 images that come with scikit-learn, a fixed stratified 1437 + 360 split; needs no `root`.
        root: folder of the set; a path, or a folder below $DETECTRON2_DATASETS.
        mode: PIL mode of the images, "RGB" or "L" (grey).

    Raises:
        ValueError: unknown name or mode, damaged files, or validation classes that the training set lacks.
        FileNotFoundError: files are missing.
    """
    for key, value, known in (("DATASETS.NAME", name, IMAGE_DATA), ("INPUT.FORMAT", mode, ("RGB", "L"))):
        if value not in known:
            raise refusal(key, f"one of {', '.join(map(repr, known))}", value)
    return IMAGE_DATA[name](root, mode)
