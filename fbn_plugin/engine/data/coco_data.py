"""COCO-format data: reading and checking a set, and giving out its images with boxes, labels and masks.

Class labels are contiguous in the order of the category ids, as in detectron2, shifted by one for torchvision, where 0
is the background.
"""

import contextlib
import io
import logging
import os
import pickle
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from fbn_plugin.engine.data.annotation_checks import check_annotations
from fbn_plugin.engine.data.coco_checks import Findings, check_categories, check_images, list_of
from fbn_plugin.engine.data.decoding import enough_memory, read_image
from fbn_plugin.engine.files.json_files import read_json
from fbn_plugin.engine.files.words import counted, shown, shown_path
from fbn_plugin.engine.run.cli import UserError

__all__ = [
    "Augmentation",
    "CocoDataset",
    "CocoDetection",
    "check_dataset",
    "check_files",
    "read_dataset",
    "unique_names",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CocoDataset:
    """A COCO-format set that was found, read and checked.

    Attributes:
        name: as given to ``named_sets.resolve_dataset``.
        json_file, image_root: where it lies; None for annotations that a Python function of the user's gives.
        images, annotations, categories: the file's lists; categories in the order of their ids. Annotations are
            numbered from 1, have ``iscrowd`` and ``area``, and a ``segmentation`` only where it is a usable one.
        findings: what in them was read otherwise than it stands, or is left out.
    """

    name: str
    json_file: Path | None
    image_root: Path
    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    findings: Findings = field(default_factory=Findings)

    @property
    def class_names(self) -> tuple[str, ...]:
        """One for each category, none twice: where two categories have one name, their ids tell them apart."""
        return unique_names([(category["name"], category["id"]) for category in self.categories])

    @property
    def category_ids(self) -> tuple[int, ...]:
        return tuple(category["id"] for category in self.categories)

    def usable_annotations(self, masks: bool) -> list[dict[str, Any]]:
        """The annotations, without those that lack a mask where ``masks`` are wanted."""
        return [each for each in self.annotations if "segmentation" in each or not masks]

    def say_left_out(self, masks: bool) -> None:
        """Log how many annotations lack a mask where ``masks`` are wanted: neither trained on nor evaluated."""
        if missing := len(self.annotations) - len(self.usable_annotations(masks)):
            of = counted(len(self.annotations), "annotation")
            logger.warning("%s: %s of %s without a mask, left out", self.name, f"{missing:,}", of)

    def coco_api(self, masks: bool) -> COCO:
        """The ground truth as pycocotools wants it."""
        api = COCO()
        annotations = [dict(each) for each in self.usable_annotations(masks)]  # COCOeval writes into them
        api.dataset = {
            "info": {},
            "images": self.images,
            "annotations": annotations,
            "categories": self.categories,
        }
        with contextlib.redirect_stdout(io.StringIO()):
            api.createIndex()
        return api


def unique_names(categories: Sequence[tuple[str, Any]]) -> tuple[str, ...]:
    """Names of categories, those that occur more than once with the id: ``"person (id 3)"``.

    Args:
        categories: name and id of each.
    """
    count = Counter(name for name, _ in categories)
    return tuple(name if count[name] == 1 else f"{name} (id {number})" for name, number in categories)


def read_dataset(name: str, json_file: Path, roots: Sequence[Path]) -> CocoDataset:
    """Read and check an annotation file.

    Args:
        name: of the set.
        json_file: in COCO's format.
        roots: folders to look for the images in.

    Raises:
        FileNotFoundError, ValueError: one sentence with the path or the entry that is wrong.
    """
    return check_dataset(name, read_json(json_file), json_file, roots)


def check_dataset(name: str, content: Any, json_file: Path | None, roots: Sequence[Path]) -> CocoDataset:
    """A set from the content of an annotation file, see ``read_dataset``.

    Args:
        json_file: where the content is from; None for one that no file holds.
    """
    source = f"dataset {name!r}" if json_file is None else str(json_file)
    given = {key: list_of(source, content, key) for key in ("images", "annotations", "categories")}
    findings = Findings()
    # Without a folder of their own, images are named as the system names them.
    images = check_images(source, given["images"], findings, inside=list(roots) != [Path()])
    categories = check_categories(source, given["categories"], findings)
    annotations = check_annotations(source, given["annotations"], images, categories, findings)
    names = [image["file_name"] for image in images]
    image_root = next((r for r in roots if any(os.path.isfile(r / n) for n in names[:20])), None)
    if image_root is None:
        looked = ", ".join(str(r) for r in dict.fromkeys(roots) if r.is_dir()) or str(roots[0])
        raise FileNotFoundError(f"dataset {name!r}: image {shown(names[0])} of {source} is not in {looked}")
    check_files(image_root, names)
    data = CocoDataset(name, json_file, image_root, images, annotations, categories, findings)
    _say(source, data)
    return data


def check_files(root: Path, names: Sequence[str]) -> None:
    """Refuse images that are not there, or are no files; FileNotFoundError."""
    folders = defaultdict(set)
    for name in names:
        folder, _, base = name.rpartition("/")
        folders[folder].add(base)
    missing = {}
    for folder, wanted in folders.items():  # one listing a folder: a look at each file takes long on a network disk
        try:
            there = {entry.name: _is_file(entry) for entry in os.scandir(root / folder) if entry.name in wanted}
        except OSError:
            there = {}
        missing |= {root / folder / base: base in there for base in sorted(wanted) if not there.get(base)}
    if missing:
        path, is_there = next(iter(missing.items()))
        what = "is no file" if is_there else "is not there"
        raise FileNotFoundError(f"image {path} {what} ({len(missing)} of {len(names)} missing)")


def _is_file(entry: os.DirEntry) -> bool:
    return os.path.isfile(entry) if entry.is_symlink() else entry.is_file()  # a link may lead to itself


def _say(source: str, data: CocoDataset) -> None:
    """Log what was found in a set that is sound, and how two categories of one name are told apart."""
    if same := [name for name, each in zip(data.class_names, data.categories) if name != each["name"]]:
        logger.warning("%s: names that several categories have are told apart by the id: %s", source, ", ".join(same))
    if line := str(data.findings):
        logger.warning("%s %s", source, line)


@dataclass(frozen=True)
class Augmentation:
    """Resize the short side and flip at random; draws from Python's global generator.

    Args:
        min_sizes: short sides in pixels: values to choose from, or with ``sampling="range"`` the lowest and the
            highest.
        max_size: bound on the long side, which wins over the short one.
        sampling: ``"choice"`` or ``"range"``.
        flip: ``"horizontal"``, ``"vertical"`` or ``"none"``; done with probability 1/2.
    """

    min_sizes: tuple[int, ...]
    max_size: int
    sampling: str = "choice"
    flip: str = "horizontal"

    def draw(self, height: int, width: int) -> tuple[int, int, str]:
        """New height, new width, and the flip to do."""
        if self.sampling == "range":
            short = random.randint(min(self.min_sizes), max(self.min_sizes))
        else:
            short = random.choice(self.min_sizes)
        flip = self.flip if random.random() < 0.5 else "none"
        return *scaled_size(height, width, short, self.max_size), flip


def scaled_size(height: int, width: int, short: int, longest: int) -> tuple[int, int]:
    """Height and width with the short side at ``short``, or less where the long side would exceed ``longest``."""
    scale = min(short / min(height, width), longest / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


class CocoDetection(Dataset):
    """Images and targets in torchvision's form.

    An item is ``(image, target)``: image (3, H, W) float RGB in 0..1; target with ``boxes`` (N, 4) xyxy pixels,
    ``labels`` (N) from 1, ``masks`` (N, H, W) uint8 where asked for, and ``image_id``. Crowds and objects without
    extent are left out.

    Args:
        datasets: sets with the same categories, one after another.
        augmentation: None gives images as they are, for evaluation.
        masks: give masks, and leave out objects that have none.
        filter_empty: leave out images without objects.

    Attributes:
        categories: labels of each image's objects, crowds among them.
        is_portrait: whether each image is higher than wide.
    """

    def __init__(
        self,
        datasets: Sequence[CocoDataset],
        augmentation: Augmentation | None = None,
        masks: bool = True,
        filter_empty: bool = False,
    ):
        self.augmentation = augmentation
        self.masks = masks
        self.categories: list[set[int]] = []
        records = []
        for data in datasets:
            labels = {category: label for label, category in enumerate(data.category_ids, start=1)}
            objects, categories = defaultdict(list), defaultdict(set)
            for each in data.usable_annotations(masks):
                categories[each["image_id"]].add(labels[each["category_id"]])
                if not each["iscrowd"]:
                    objects[each["image_id"]].append(
                        (each["bbox"], labels[each["category_id"]], each.get("segmentation") if masks else None)
                    )
            for image in data.images:
                if objects[image["id"]] or not filter_empty:
                    path = os.fspath(data.image_root / image["file_name"])
                    records.append((path, image["id"], image["height"], image["width"], objects[image["id"]]))
                    self.categories.append(categories[image["id"]])
        self.is_portrait = [height > width for _, _, height, width, _ in records]
        # One array of bytes: reading Python objects in a worker would copy their memory page by page.
        packed = [np.frombuffer(pickle.dumps(record), dtype=np.uint8) for record in records]
        self._ends = np.cumsum([0, *(len(each) for each in packed)])
        self._bytes = np.concatenate(packed) if packed else np.empty(0, np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        record = pickle.loads(self._bytes[self._ends[index] : self._ends[index + 1]])
        with enough_memory(record[0]):
            return self._item(*record)

    def _item(self, path: str, image_id: Any, height: int, width: int, objects: Sequence) -> tuple[Tensor, dict]:
        image = read_image(path)
        if image.size != (width, height):
            size = f"{image.width}x{image.height}"
            raise UserError(f"image {shown_path(path)} is {size}, its annotation file says {width}x{height}")
        new_height, new_width, flip = height, width, "none"
        if self.augmentation is not None:
            new_height, new_width, flip = self.augmentation.draw(height, width)
            image = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
        scale = np.array([new_width / width, new_height / height] * 2, dtype=np.float64)
        boxes = np.array([box for box, _, _ in objects], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes = torch.from_numpy((boxes * scale).clip(0, [new_width, new_height] * 2)).float()
        target = {"boxes": boxes, "labels": torch.tensor([label for _, label, _ in objects], dtype=torch.int64)}
        keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        if self.masks:
            masks = [_rasterize(mask, (height, width), (new_height, new_width)) for _, _, mask in objects]
            target["masks"] = (
                torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, new_height, new_width).byte()
            )
            keep &= (target["masks"].flatten(1) > 0).any(dim=1)
        target = {name: value[keep] for name, value in target.items()}
        if flip != "none":
            pixels, target = _flip(pixels, target, horizontal=flip == "horizontal")
        return pixels, {**target, "image_id": image_id}


def _rasterize(segmentation: list | dict, size: tuple[int, int], new_size: tuple[int, int]) -> np.ndarray:
    """The mask (H', W') uint8 of a polygon or RLE segmentation of an image (H, W), scaled to the new size."""
    if isinstance(segmentation, list):
        scale = np.array([new_size[1] / size[1], new_size[0] / size[0]])
        polygons = [(np.reshape(polygon, (-1, 2)) * scale).ravel().tolist() for polygon in segmentation]
        return mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(polygons, *new_size)))
    if isinstance(segmentation["counts"], list):
        segmentation = mask_utils.frPyObjects(segmentation, *size)
    rows, columns = (((np.arange(new) + 0.5) * old / new).astype(int) for old, new in zip(size, new_size))
    return mask_utils.decode(segmentation)[rows[:, None], columns]


def _flip(image: Tensor, target: dict[str, Tensor], horizontal: bool) -> tuple[Tensor, dict[str, Tensor]]:
    axis = -1 if horizontal else -2
    start, stop = (0, 2) if horizontal else (1, 3)
    boxes = target["boxes"].clone()
    boxes[:, start], boxes[:, stop] = (
        image.shape[axis] - target["boxes"][:, stop],
        image.shape[axis] - target["boxes"][:, start],
    )
    flipped = {**target, "boxes": boxes}
    if "masks" in target:
        flipped["masks"] = target["masks"].flip(axis)
    return image.flip(axis), flipped
