"""Sets that were registered in detectron2's catalogs, by detectron2 or by a module of the user's, as this project's
tools read a set: checked, and in COCO's form. The form of the records is detectron2's "standard dataset dicts"
(https://detectron2.readthedocs.io/tutorials/datasets.html)."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from pycocotools import mask as mask_utils

from fbn_plugin.engine.data.coco_data import CocoDataset, check_dataset, check_files, read_dataset
from fbn_plugin.engine.files.words import shown

__all__ = ["check_records", "has_file", "registered_dataset"]

_NEEDED = ("file_name", "image_id", "height", "width")

# Names that were registered for FOLDER:SPLIT: their folder is read, not the catalog.
own_names: set[str] = set()


def has_file(name: str) -> bool:
    """Whether a set of the catalog is an annotation file of COCO's, not a Python function."""
    return MetadataCatalog.get(name).get("json_file") is not None


def registered_dataset(name: str) -> CocoDataset | None:
    """A set of detectron2's ``DatasetCatalog``; None where that has no such name.

    Raises:
        OSError, ValueError: its files or its records are not what they should be; one sentence.
    """
    if name in own_names or name not in DatasetCatalog:
        return None
    metadata = MetadataCatalog.get(name)
    if has_file(name):
        file = PathManager.get_local_path(metadata.json_file)
        return read_dataset(name, Path(file), [Path(metadata.get("image_root") or "")])
    return _check(name, _records(name))


def check_records(name: str) -> list[dict[str, Any]]:
    """Check what a Python function gives that detectron2 reads itself: images, semantic and panoptic maps, objects.

    Returns:
        the objects, as annotations of COCO's.

    Raises:
        OSError, ValueError: as ``registered_dataset``.
    """
    given = _records(name, ("file_name",))
    for field in ("file_name", "sem_seg_file_name", "pan_seg_file_name"):
        check_files(Path(), [os.fspath(each[field]) for each in given if field in each])
    with_objects = [each for each in given if each.get("annotations")]
    return _check(name, _with(name, with_objects, _NEEDED)).annotations if with_objects else []


def _records(name: str, needed: Sequence[str] = _NEEDED) -> list[Mapping[str, Any]]:
    """What the function gives, if it is a list of records with the ``needed`` fields."""
    given = DatasetCatalog.get(name)
    if not isinstance(given, list | tuple):
        raise ValueError(f"dataset {name!r}: its function must give a list of records, got {shown(given)}")
    return _with(name, given, needed)


def _with(name: str, given: Sequence[Any], needed: Sequence[str]) -> list[Mapping[str, Any]]:
    for number, record in enumerate(given):
        if not isinstance(record, Mapping):
            raise ValueError(f"dataset {name!r}: image number {number} must be a dict, got {shown(record)}")
        if missing := [field for field in needed if field not in record]:
            raise ValueError(f"dataset {name!r}: image number {number} has no {missing[0]!r}")
        if not isinstance(record["file_name"], str | os.PathLike):
            shown_name = shown(record["file_name"])
            raise ValueError(
                f"dataset {name!r}: image number {number} must have a path as 'file_name', got {shown_name}"
            )
    return list(given)


def _check(name: str, records: Sequence[Mapping[str, Any]]) -> CocoDataset:
    classes = MetadataCatalog.get(name).get("thing_classes")
    if not classes:
        raise ValueError(f"dataset {name!r} has no classes: set thing_classes in detectron2's MetadataCatalog")
    data = check_dataset(name, _as_coco(name, records, classes), None, [Path()])
    sizes = {image["id"]: (image["height"], image["width"]) for image in data.images}
    for each in data.annotations:  # only now, as pycocotools takes what is sound
        if "segmentation" in each:
            each["area"] = _area(each["segmentation"], *sizes[each["image_id"]])
    return data


def _as_coco(name: str, records: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> dict[str, list]:
    """Records as the content of an annotation file."""
    ids = MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id")
    ids = {label: category for category, label in ids.items()} if ids else dict(enumerate(range(len(classes))))
    images, annotations = [], []
    for record in records:
        image = {key: _plain(record[key]) for key in ("height", "width")}
        image |= {"id": _plain(record["image_id"]), "file_name": os.fspath(record["file_name"])}
        images.append(image)
        for each in record.get("annotations") or ():
            try:
                annotations.append({**_annotation(each, ids), "image_id": image["id"]})
            except (KeyError, TypeError, ValueError, ArithmeticError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else error
                raise ValueError(f"dataset {name!r}: an object of {record['file_name']} has {reason}") from None
    categories = [{"id": ids[label], "name": each} for label, each in enumerate(classes)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _annotation(each: Mapping[str, Any], ids: Mapping[int, int]) -> dict[str, Any]:
    if not isinstance(each, Mapping):
        raise TypeError(f"a {type(each).__name__} for a dict among its 'annotations'")
    if each["category_id"] not in ids:
        raise ValueError(f"the category_id {shown(each['category_id'])}, and there are {len(ids)} thing_classes")
    if len(each["bbox"]) != 4:
        raise ValueError(f"a 'bbox' of {len(each['bbox'])} numbers, and rotated ones are not evaluated")
    box = BoxMode.convert(list(map(float, each["bbox"])), BoxMode(each["bbox_mode"]), BoxMode.XYWH_ABS)
    found = {"category_id": ids[each["category_id"]], "bbox": box, "iscrowd": _plain(each.get("iscrowd", 0))}
    mask = each.get("segmentation")
    if isinstance(mask, np.ndarray):
        if mask.ndim != 2:
            raise ValueError(f"a 'segmentation' of shape {mask.shape}; accepted is an array of height and width")
        rle = mask_utils.encode(np.asfortranarray(mask != 0, dtype=np.uint8))
        found["segmentation"] = {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}
    elif mask is not None and len(mask):
        found["segmentation"] = _plain(mask)
    if "keypoints" in each:
        # Points of the image's plane there, numbers of pixels in COCO's files.
        points = [float(value) - 0.5 * (place % 3 < 2) for place, value in enumerate(each["keypoints"])]
        found |= {"keypoints": points, "num_keypoints": sum(value > 0 for value in points[2::3])}
    return found


def _plain(value: Any) -> Any:
    """A value as a JSON file has it: numbers and lists of Python's for those of NumPy, text for bytes."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, bytes):
        return value.decode("ascii")
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return value


def _area(mask: list | dict, height: int, width: int) -> float:
    """The area that decides whether an object is a small, a medium or a large one."""
    if isinstance(mask, list):
        mask = mask_utils.merge(mask_utils.frPyObjects(mask, height, width))
    elif isinstance(mask["counts"], list):
        mask = mask_utils.frPyObjects(mask, height, width)
    return float(mask_utils.area(mask))
