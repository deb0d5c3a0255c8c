"""The annotation files of sets that detectron2 reads itself, checked as this project checks those that it reads:
detectron2 answers a bad one with a bare error, late, or with a crash. Where one is sound and says something in a way
that detectron2 does not know, this project reads it in detectron2's place.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager

from fbn_plugin.engine.data.annotation_checks import DIFFICULT, SHORT_POLYGONS, check_annotations
from fbn_plugin.engine.data.coco_checks import (
    Findings,
    check_categories,
    check_file_name,
    check_images,
    entry_name,
    list_of,
    needed,
    refuse,
    whole_number,
)
from fbn_plugin.engine.data.coco_data import check_files
from fbn_plugin.engine.data.dataset_checks import check_number_of_classes
from fbn_plugin.engine.detectron2.data import CLASSES_KEYS, checked, records, refuse_rle
from fbn_plugin.engine.detectron2.registered import has_file, own_names, registered_dataset
from fbn_plugin.engine.files.json_files import has_mark, read_json
from fbn_plugin.engine.files.words import counted

__all__ = ["check_annotation_files", "read_in_its_place"]

# Sets of other kinds have fields of their own instead of some of COCO's.
_COCO = ("coco", "coco_panoptic_seg")


def check_annotation_files(cfg: CfgNode, evaluate_only: bool) -> list[str]:
    """Check the annotation files of the sets that detectron2 reads itself.

    Returns:
        the sets that this project now reads in its place, for ``read_in_its_place`` in other processes.

    Raises:
        OSError, ValueError: a file is not what it should be, its categories are not those that detectron2 knows the set
            by, its masks are not of the config's format, or an image is not there.
    """
    names = cfg.DATASETS.TEST if evaluate_only else (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    found = []
    for name in dict.fromkeys(names):
        metadata = MetadataCatalog.get(name)
        if metadata.get("panoptic_json") is not None:
            _check_panoptic_file(metadata, name in cfg.DATASETS.TEST)
        if name in own_names or not has_file(name):
            continue
        if name not in checked:
            differences = _check_file(name, metadata, cfg, not evaluate_only and name in cfg.DATASETS.TRAIN)
            is_own_loader = DatasetCatalog[name].__module__ == register_coco_instances.__module__
            if not differences or (not is_own_loader and name not in cfg.DATASETS.TEST):
                continue  # of a loader of the user's, detectron2 takes the file for the evaluation alone
            if not is_own_loader or metadata.get("evaluator_type") != "coco":
                raise ValueError(f"{metadata.json_file} has what detectron2 does not read: {', '.join(differences)}")
            read_in_its_place([name], cfg)
        found.append(name)
    return found


def read_in_its_place(names: list[str], cfg: CfgNode) -> None:
    """Have this project read sets whose files detectron2 does not read as they are meant."""
    for name in names:
        if name in checked:
            continue
        data = registered_dataset(name)
        # In detectron2's order, by which a run goes on as it was before.
        data = checked[name] = replace(data, images=sorted(data.images, key=lambda image: image["id"]))
        data.say_left_out(cfg.MODEL.MASK_ON)
        DatasetCatalog.remove(name)
        DatasetCatalog.register(
            name, lambda data=data: records(data, masks=cfg.MODEL.MASK_ON, keypoints=cfg.MODEL.KEYPOINT_ON)
        )
        metadata = MetadataCatalog.get(name)
        if metadata.get("thing_classes") is None:
            metadata.thing_classes = list(data.class_names)
        if metadata.get("thing_dataset_id_to_contiguous_id") is None:
            metadata.thing_dataset_id_to_contiguous_id = {
                category: label for label, category in enumerate(data.category_ids)
            }


def _check_file(name: str, metadata: Metadata, cfg: CfgNode, train: bool) -> list[str]:
    """Check a file; what detectron2 would not read in it as it is meant."""
    file = metadata.json_file
    local, is_coco, findings = PathManager.get_local_path(file), metadata.get("evaluator_type") in _COCO, Findings()
    content = read_json(local)
    root = metadata.get("image_root")  # without one, a function of the user's knows where the images are
    given_images, given_categories = (list_of(file, content, key) for key in ("images", "categories"))
    categories = check_categories(file, given_categories, findings)
    _check_classes(name, metadata, cfg, [category["name"] for category in categories])
    images = check_images(file, given_images, findings, is_coco, bool(root))
    # Test images that are published without annotations have none.
    given = list_of(file, content, "annotations") if "annotations" in content else []
    annotations = check_annotations(file, given, images, categories, findings)
    if is_coco and root is not None:
        check_files(Path(PathManager.get_local_path(root)), [each["file_name"] for each in images])
    if train:
        refuse_rle(name, annotations, cfg)
    if cfg.MODEL.KEYPOINT_ON:
        _check_keypoints(file, annotations, given, len(metadata.keypoint_names))
    return list(_differences(local, findings, annotations, cfg)) if is_coco else []


def _check_classes(name: str, metadata: Metadata, cfg: CfgNode, found: list[str]) -> None:
    known = metadata.get("thing_classes")
    group = CLASSES_KEYS.get(cfg.MODEL.META_ARCHITECTURE)
    if known is None and group:  # registered without, so that only the file tells
        check_number_of_classes(f"MODEL.{group}.NUM_CLASSES", cfg.MODEL[group].NUM_CLASSES, name, found)
    if known is not None and found != list(known):
        different = [each for each in found if each not in known] or [each for each in known if each not in found]
        raise ValueError(
            f"dataset {name!r} has {counted(len(known), 'category')} in detectron2, "
            f"and its file {metadata.json_file} has {len(found)}"
            + (f", which differ in {different[0]!r}" if different else " in another order")
            + "; name the data as FOLDER:SPLIT to take the file's"
        )


def _check_keypoints(file: str, annotations: list[dict[str, Any]], given: list[Any], number: int) -> None:
    """Refuse an object without all keypoints, where a model learns them."""
    for place, (each, raw) in enumerate(zip(annotations, given), start=1):
        if len(each.get("keypoints", ())) != 3 * number:
            who = entry_name(file, "annotation", raw, place)
            accepted = f"a list of {3 * number} numbers, x, y and visibility of {counted(number, 'keypoint')}"
            refuse(who, "keypoints", accepted, needed(who, raw, "keypoints"))


def _differences(local: str, findings: Findings, annotations: list[dict[str, Any]], cfg: CfgNode) -> Iterator[str]:
    """What detectron2 would not read as it is meant."""
    if has_mark(local):
        yield "a byte-order mark"
    yield from findings.adapted
    if findings.left_out[SHORT_POLYGONS]:  # its evaluation takes them for boxes
        yield SHORT_POLYGONS
    if findings.noted[DIFFICULT]:
        yield "objects with 'ignore' set"
    if not findings.complete:
        yield "annotations that lack a field of COCO's"
    if not findings.own_ids and "minival" not in local:  # whose ids detectron2 knows to be wrong
        yield "annotations without ids of their own"
    if cfg.MODEL.MASK_ON and any("segmentation" not in each for each in annotations):
        yield "annotations without a mask"


def _check_panoptic_file(metadata: Metadata, evaluated: bool) -> None:
    """Check a file of COCO's panoptic format: an image's annotation is a map and what its segments are."""
    file = metadata.panoptic_json
    local = PathManager.get_local_path(file)
    content = read_json(local)
    if has_mark(local):
        raise ValueError(f"{file} has what detectron2 does not read: a byte-order mark")
    known = {
        category
        for kind in ("thing", "stuff")
        for category in metadata.get(f"{kind}_dataset_id_to_contiguous_id") or ()
    }
    names = []
    for number, each in enumerate(list_of(file, content, "annotations"), start=1):
        who = entry_name(file, "annotation", each, number)
        image = needed(who, each, "image_id")
        if type(image) is not int and not (type(image) is str and image.isdecimal()):
            refuse(who, "image_id", "a whole number", image)
        names.append(check_file_name(who, needed(who, each, "file_name")))
        segments = needed(who, each, "segments_info")
        if type(segments) is not list:
            refuse(who, "segments_info", "a list of objects with 'id' and 'category_id'", segments)
        for place, segment in enumerate(segments, start=1):
            _check_segment(entry_name(f"{who}: 'segments_info'", "segment", segment, place), segment, known, evaluated)
    if evaluated:
        for number, each in enumerate(list_of(file, content, "categories"), start=1):
            who = entry_name(file, "category", each, number)
            whole_number(who, "id", needed(who, each, "id"), 0, 2**63 - 1)
            whole_number(who, "isthing", needed(who, each, "isthing"), 0, 1)
    check_files(Path(PathManager.get_local_path(metadata.panoptic_root)), names)


def _check_segment(who: str, segment: dict[str, Any], known: set[int], evaluated: bool) -> None:
    whole_number(who, "id", needed(who, segment, "id"), 0, 2**24 - 1)  # three bytes of a pixel
    category = needed(who, segment, "category_id")
    if type(category) is not int or category not in known:
        refuse(who, "category_id", f"one of the set's {counted(len(known), 'category')}", category)
    if evaluated or "iscrowd" in segment:
        whole_number(who, "iscrowd", needed(who, segment, "iscrowd"), 0, 1)
