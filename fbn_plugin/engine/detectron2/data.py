"""Data of a detectron2 run: datasets by name or as ``FOLDER:SPLIT``, checked before anything is built, and training
batches whose order and augmentation are functions of (seed, position) alone.
"""

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    detection_utils,
    get_detection_dataset_dicts,
)
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import DatasetFromList, MapDataset
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from pycocotools import mask as mask_utils
from torch.utils.data import DataLoader

from fbn_plugin import internals
from fbn_plugin.engine.data.coco_data import CocoDataset
from fbn_plugin.engine.data.dataset_checks import check_named_sets, check_number_of_classes, check_same_classes
from fbn_plugin.engine.data.decoding import enough_memory, read_image, read_label_map
from fbn_plugin.engine.data.loaders import training_batches, training_loader
from fbn_plugin.engine.data.named_sets import resolve_dataset
from fbn_plugin.engine.data.sampling import repeat_factors
from fbn_plugin.engine.detectron2.registered import check_records, has_file, own_names, registered_dataset
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.cli import UserError, error_sentence
from fbn_plugin.engine.run.evaluation_names import METRICS, metric_prefix
from fbn_plugin.engine.run.rules import named, refusal

__all__ = [
    "CLASSES_KEYS",
    "NamingMapper",
    "TrainingData",
    "checked",
    "has_panoptic_api",
    "has_polygons",
    "has_rle",
    "metric_names",
    "records",
    "refuse_rle",
    "register_datasets",
    "tasks",
]

# Where a meta architecture has its number of classes.
CLASSES_KEYS = {
    "GeneralizedRCNN": "ROI_HEADS",
    "PanopticFPN": "ROI_HEADS",
    "RetinaNet": "RETINANET",
    "FCOS": "RETINANET",
}

# What a meta architecture's datasets are evaluated by, in detectron2's words and in plain ones.
_EVALUATED = {
    "PanopticFPN": ("coco_panoptic_seg", "COCO's box and mask AP, IoU of semantic classes, and PQ"),
    "SemanticSegmentor": ("sem_seg", "IoU of semantic classes"),
}
_BY_AP = ("coco", "COCO's box, mask and keypoint AP")

# COCO has no small people with keypoints.
_METRICS = {"bbox": METRICS, "segm": METRICS, "keypoints": tuple(name for name in METRICS if name != "APs")}

# The sets whose annotations this project has read itself: folders, and what a Python function gives.
checked: dict[str, CocoDataset] = {}

# Those of Python functions that detectron2 reads itself, and that were found sound in this process.
_sound: set[str] = set()


def register_datasets(cfg: CfgNode, evaluate_only: bool) -> None:
    """Make detectron2 know the datasets that the run needs: its own ones, and folders.

    Raises:
        ValueError, OSError: there is no such dataset, its files are missing or wrong, or it does not fit the model.
    """
    needed = ["TEST"] if evaluate_only else ["TRAIN", "TEST"]
    check_named_sets(cfg, evaluate_only)
    names: dict[str, str] = {}
    for key in needed:
        names |= {name: key for name in cfg.DATASETS[key] if name not in names}
    for name, key in names.items():
        with named(f"DATASETS.{key}"):
            if name not in DatasetCatalog:
                _register_folder(name, cfg)
            elif name not in checked and not has_file(name):
                _check_function(name, cfg)
        _check_dataset(name, cfg)
        if name not in checked and not has_file(name) and name not in _sound:
            with named(f"DATASETS.{key}"):
                _check_records(name, cfg, key == "TRAIN")
    classes = {name: MetadataCatalog.get(name).get("thing_classes") for name in names}
    check_same_classes({name: known for name, known in classes.items() if known is not None})


def _register_folder(name: str, cfg: CfgNode) -> None:
    data = checked[name] = resolve_dataset(name)
    data.say_left_out(cfg.MODEL.MASK_ON)
    own_names.add(name)
    DatasetCatalog.register(name, lambda: records(data, masks=cfg.MODEL.MASK_ON))
    MetadataCatalog.get(name).set(
        json_file=str(data.json_file),
        image_root=str(data.image_root),
        evaluator_type="coco",
        thing_classes=list(data.class_names),
        thing_dataset_id_to_contiguous_id={category: label for label, category in enumerate(data.category_ids)},
    )


def _check_function(name: str, cfg: CfgNode) -> None:
    """Read the objects that a Python function of the user's gives. Where nothing else than COCO's evaluation is meant
    for them, detectron2 gets them as they are read here."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type", "coco") == "coco" and metadata.get("stuff_classes") is None:
        data = checked[name] = registered_dataset(name)
        data.say_left_out(cfg.MODEL.MASK_ON)
        metadata.evaluator_type = "coco"


def _check_records(name: str, cfg: CfgNode, train: bool) -> None:
    """Check what a Python function gives beside objects, or with them; those of Cityscapes and the like are read by
    detectron2's own functions."""
    if MetadataCatalog.get(name).get("evaluator_type", "coco") in ("coco", "sem_seg", "coco_panoptic_seg"):
        objects = check_records(name)
        if train:
            refuse_rle(name, objects, cfg)
    _sound.add(name)


def _check_dataset(name: str, cfg: CfgNode) -> None:
    metadata = MetadataCatalog.get(name)
    architecture = cfg.MODEL.META_ARCHITECTURE
    kind, words = _EVALUATED.get(architecture, _BY_AP)
    if name in cfg.DATASETS.TEST and metadata.get("evaluator_type") != kind:
        raise ValueError(f"dataset {name!r} is not evaluated by {words}, as this tool evaluates a {architecture}")
    for key in ("json_file", "panoptic_json", "sem_seg_root", "panoptic_root"):
        path = metadata.get(key)
        if path is not None and not PathManager.exists(path):
            raise FileNotFoundError(f"dataset {name!r} wants {path}, which is not there; set DETECTRON2_DATASETS")
    group = CLASSES_KEYS.get(architecture)
    if group:
        classes = metadata.get("thing_classes")
        if classes:
            check_number_of_classes(f"MODEL.{group}.NUM_CLASSES", cfg.MODEL[group].NUM_CLASSES, name, classes)
    if architecture in _EVALUATED:
        stuff = metadata.get("stuff_classes")
        if stuff is None:
            raise ValueError(f"MODEL.META_ARCHITECTURE {architecture}: dataset {name!r} has no semantic classes")
        check_number_of_classes("MODEL.SEM_SEG_HEAD.NUM_CLASSES", cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, name, stuff)
    if cfg.MODEL.KEYPOINT_ON:
        if name in own_names:
            raise ValueError(f"dataset {name!r}: keypoints are read from detectron2's own datasets only")
        points, sigmas = metadata.get("keypoint_names"), cfg.TEST.KEYPOINT_OKS_SIGMAS
        if points is None:
            raise ValueError(f"MODEL.KEYPOINT_ON: dataset {name!r} has no keypoints")
        number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        if len(points) != number:
            what = f"{len(points)}, the number of keypoints of dataset {name!r}"
            raise refusal("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", what, number)
        if len(sigmas) != len(points) and (sigmas or len(points) != 17):
            raise refusal("TEST.KEYPOINT_OKS_SIGMAS", f"a list of {len(points)}", sigmas)


def records(data: CocoDataset, masks: bool, keypoints: bool = False) -> list[dict]:
    """A set's images and objects as detectron2's dataset dicts."""
    labels = {category: label for label, category in enumerate(data.category_ids)}
    objects = defaultdict(list)
    for each in data.usable_annotations(masks):
        instance = {
            "bbox": each["bbox"],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": labels[each["category_id"]],
            "iscrowd": each["iscrowd"],
        }
        if masks:
            mask = each["segmentation"]
            if isinstance(mask, dict) and isinstance(mask["counts"], list):
                mask = mask_utils.frPyObjects(mask, *mask["size"])
            instance["segmentation"] = mask
        if keypoints:  # numbers of pixels, there points of the image's plane
            instance["keypoints"] = [
                value + 0.5 * (place % 3 < 2) for place, value in enumerate(each.get("keypoints", ()))
            ]
        objects[each["image_id"]].append(instance)
    return [
        {
            "file_name": os.path.join(data.image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": objects[image["id"]],
        }
        for image in data.images
    ]


def has_rle(data: CocoDataset) -> bool:
    """Whether an object, crowds aside, has a mask that is no polygon."""
    return any(
        isinstance(each["segmentation"], dict) for each in data.usable_annotations(masks=True) if not each["iscrowd"]
    )


def refuse_rle(name: str, objects: Iterable[dict], cfg: CfgNode) -> None:
    """Refuse masks of a training set that detectron2's mapper does not take for polygons; ValueError."""
    wants_polygons = cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon"
    if wants_polygons and any(
        isinstance(each.get("segmentation"), dict) and not each.get("iscrowd") for each in objects
    ):
        raise refusal("INPUT.MASK_FORMAT", f"'bitmask', as dataset {name!r} has RLE masks", "polygon")


def has_polygons(data: CocoDataset) -> bool:
    """Whether an object, crowds among them, has a mask of polygons."""
    return any(isinstance(each["segmentation"], list) for each in data.usable_annotations(masks=True))


def has_panoptic_api() -> bool:
    """Whether the package that computes PQ is installed."""
    return internals.is_installed("panopticapi")


def tasks(cfg: CfgNode) -> tuple[str, ...]:
    """What COCO's evaluation is to compute for the model's instances."""
    regions = cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "PanopticFPN")
    return (
        "bbox",
        *(("segm",) if cfg.MODEL.MASK_ON and regions else ()),
        *(("keypoints",) if cfg.MODEL.KEYPOINT_ON and regions else ()),
    )


def metric_names(cfg: CfgNode, suffix: str = "") -> list[str]:
    """What the run's evaluations give, such as ``"bbox/AP50"``; ``"sem_seg/..."`` stands for all of a group.

    Args:
        suffix: of the tasks of COCO's evaluation.
    """
    names = []
    for data in cfg.DATASETS.TEST:
        prefix = metric_prefix(data, cfg.DATASETS.TEST)
        kind, classes = MetadataCatalog.get(data).evaluator_type, MetadataCatalog.get(data).get("thing_classes")
        if kind != "sem_seg":
            for task in tasks(cfg):
                names += [f"{prefix}{task}{suffix}/{figure}" for figure in _METRICS[task]]
                if classes and len(classes) > 1 and task != "keypoints":
                    names.append(f"{prefix}{task}{suffix}/AP-...")
            if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
                names.append(f"{prefix}box_proposals/...")
        if kind in ("sem_seg", "coco_panoptic_seg"):
            names.append(f"{prefix}sem_seg/...")
        if kind == "coco_panoptic_seg" and has_panoptic_api():
            names.append(f"{prefix}panoptic_seg/...")
    return names


class NamingMapper(DatasetMapper):
    """detectron2's mapper with this project's reader of images. An error names the image that cannot be read, is unlike
    its annotation, or takes more memory than there is."""

    def __call__(self, dataset_dict: dict) -> dict:
        name = dataset_dict["file_name"]

        def read(path: str, format: str | None = None) -> np.ndarray:
            return _read(path, format) if path == name else np.asarray(read_label_map(_local(path)))[:, :, None]

        try:
            with enough_memory(name), _reader(read):
                return super().__call__(dataset_dict)
        except detection_utils.SizeMismatchError as error:
            raise UserError(" ".join(str(error).split())) from None


@contextlib.contextmanager
def _reader(read: Callable[..., np.ndarray]) -> Iterator[None]:
    """Have detectron2's mapper read by another function, which it looks up there. For one thread in a process."""
    theirs = detection_utils.read_image
    detection_utils.read_image = read
    try:
        yield
    finally:
        detection_utils.read_image = theirs


def _read(path: str, format: str | None) -> np.ndarray:
    """An image (H, W, C) in one of detectron2's formats."""
    mode = "RGB" if format in (None, "BGR", "YUV-BT.601") else format  # the second and third are made of RGB
    return detection_utils.convert_PIL_to_numpy(read_image(_local(path), mode), format)


def _local(path: str) -> str:
    """The file itself, also of a place that only PathManager knows."""
    return path if os.path.lexists(path) else PathManager.get_local_path(path)


class TrainingData:
    """The training images of a run, which any number of loaders may read.

    Attributes:
        images: name of each set -> number of its images, without those that the config filters out.

    Raises:
        UserError: no image is left, or an annotation names a class that is not there.
    """

    def __init__(self, cfg: CfgNode):
        self.cfg = cfg
        self.images: dict[str, int] = {}
        data = []
        keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
        for number, name in enumerate(cfg.DATASETS.TRAIN):
            proposals = [cfg.DATASETS.PROPOSAL_FILES_TRAIN[number]] if cfg.MODEL.LOAD_PROPOSALS else None
            try:
                found = get_detection_dataset_dicts(
                    [name], cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS, keypoints, proposals
                )
            except AssertionError as error:
                raise UserError(f"dataset {name!r}: {error}") from None
            except ModuleNotFoundError as error:
                raise UserError(f"dataset {name!r}: {error_sentence(error)}") from None
            self.images[name] = len(found)
            data += found
        self._groups = [int(image["width"] > image["height"]) for image in data]
        self._factors = None
        if cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
            categories = [{each["category_id"] for each in image.get("annotations", ())} for image in data]
            self._factors = repeat_factors(categories, cfg.DATALOADER.REPEAT_THRESHOLD, cfg.DATALOADER.REPEAT_SQRT)
        self._images = MapDataset(DatasetFromList(data, copy=False), NamingMapper(cfg, is_train=True))

    def loader(self, seed: int, start: int = 0) -> DataLoader:
        """Batches of this process, from batch ``start`` on, without end, see ``training_loader``."""
        size = self.cfg.SOLVER.IMS_PER_BATCH // distributed.world_size()
        groups = self._groups if self.cfg.DATALOADER.ASPECT_RATIO_GROUPING else None
        return training_loader(
            self._images,
            seed,
            training_batches(self._images, seed, size, start, groups, factors=self._factors),
            num_workers=self.cfg.DATALOADER.NUM_WORKERS,
            collate_fn=trivial_batch_collator,
        )
