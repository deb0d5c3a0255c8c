"""Sets that were registered in detectron2's catalogs, by detectron2 or by a module of the user's, as this project's
tools read a set: checked, and in COCO's form. The form of the records is detectron2's "standard dataset dicts"
(https://detectron2.readthedocs.io/tutorials/datasets.html)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from pycocotools import mask as mask_utils

from fbn_plugin.engine.data.coco_data import CocoDataset, check_dataset, read_dataset

__all__ = ["has_file", "registered_dataset"]

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
    classes = metadata.get("thing_classes")
    if not classes:
        raise ValueError(f"dataset {name!r} has no classes: set thing_classes in detectron2's MetadataCatalog")
    return check_dataset(name, _as_coco(name, DatasetCatalog.get(name), classes), None, [Path()])


def _as_coco(name: str, records: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> dict[str, list]:
    """Records as the content of an annotation file."""
    ids = MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id")
    ids = {label: category for category, label in ids.items()} if ids else dict(enumerate(range(len(classes))))
    images, annotations = [], []
    for number, record in enumerate(records):
        if missing := [field for field in _NEEDED if field not in record]:
            raise ValueError(f"dataset {name!r}: image number {number} has no {missing[0]!r}")
        images.append({"id": record["image_id"], **{key: record[key] for key in ("file_name", "height", "width")}})
        for each in record.get("annotations", ()):
            try:
                annotations.append({**_annotation(each, record, ids), "image_id": record["image_id"]})
            except (KeyError, TypeError, ValueError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else error
                raise ValueError(f"dataset {name!r}: an object of {record['file_name']} has {reason}") from None
    categories = [{"id": ids[label], "name": each} for label, each in enumerate(classes)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _annotation(each: Mapping[str, Any], record: Mapping[str, Any], ids: Mapping[int, int]) -> dict[str, Any]:
    """An object, with the area that decides whether it is a small, a medium or a large one."""
    if each["category_id"] not in ids:
        raise ValueError(f"the category_id {each['category_id']!r}, and there are {len(ids)} thing_classes")
    if len(each["bbox"]) != 4:
        raise ValueError(f"a 'bbox' of {len(each['bbox'])} numbers, and rotated ones are not evaluated")
    box = BoxMode.convert(list(map(float, each["bbox"])), BoxMode(each["bbox_mode"]), BoxMode.XYWH_ABS)
    found = {"category_id": ids[each["category_id"]], "bbox": box, "iscrowd": int(each.get("iscrowd", 0))}
    if (mask := each.get("segmentation")) is not None and len(mask):
        if isinstance(mask, list):
            mask = [list(map(float, polygon)) for polygon in mask if len(polygon) >= 6]  # fewer points enclose nothing
        rle = _as_rle(mask, record["height"], record["width"])
        found |= {"segmentation": mask if isinstance(mask, list) else rle, "area": float(mask_utils.area(rle))}
    if "keypoints" in each:
        # Points of the image's plane there, numbers of pixels in COCO's files.
        points = [value - 0.5 * (place % 3 < 2) for place, value in enumerate(each["keypoints"])]
        found |= {"keypoints": points, "num_keypoints": sum(value > 0 for value in points[2::3])}
    return found


def _as_rle(mask: Any, height: int, width: int) -> dict[str, Any]:
    """What detectron2 takes for a mask: polygons, an RLE of either kind, or an array."""
    if isinstance(mask, np.ndarray):
        rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
    elif isinstance(mask, list):
        rle = mask_utils.merge(mask_utils.frPyObjects(mask, height, width))
    elif isinstance(mask["counts"], list):
        rle = mask_utils.frPyObjects(mask, height, width)
    else:
        rle = mask
    counts = rle["counts"]
    return {"size": list(rle["size"]), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}
