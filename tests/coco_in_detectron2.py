"""A COCO-format set as detectron2's engine takes it: registered, checked, trained on and evaluated."""

import contextlib
import io
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from fbn_plugin.engine.detectron2.annotation_files import check_annotation_files
from fbn_plugin.engine.detectron2.coco import CocoEvaluator
from fbn_plugin.engine.detectron2.config import add_config
from fbn_plugin.engine.detectron2.data import TrainingData, checked, register_datasets

__all__ = ["check", "config", "forget", "use"]


def config(name: str, classes: int = 1, **changes: Any) -> CfgNode:
    """Of a small Mask R-CNN that is trained and evaluated on one set."""
    cfg = get_cfg()
    add_config(cfg)
    values = {"DATASETS.TRAIN": (name,), "DATASETS.TEST": (name,), "MODEL.MASK_ON": True, "MODEL.DEVICE": "cpu"}
    values |= {"MODEL.ROI_HEADS.NUM_CLASSES": classes, "INPUT.MASK_FORMAT": "bitmask", "INPUT.MIN_SIZE_TRAIN": (40,)}
    cfg.merge_from_list([each for pair in (values | changes).items() for each in pair])
    return cfg


def check(cfg: CfgNode) -> list[str]:
    """What ``train_net.py`` does before a model is built."""
    register_datasets(cfg, evaluate_only=False)
    return check_annotation_files(cfg, evaluate_only=False)


def use(cfg: CfgNode, name: str, folder: Path, size: tuple[int, int]) -> dict[str, dict[str, float]]:
    """All that a training and an evaluation do with a set; its own objects are its detections.

    Args:
        folder: for what the evaluator writes.
        size: height and width of the images, of which others are unlike their annotations.
    """
    if any(record["annotations"] for record in DatasetCatalog.get(name)):
        images = TrainingData(cfg)._images
        for number, record in enumerate(images._dataset):
            if (record["height"], record["width"]) == size:
                images[number]
    evaluator = CocoEvaluator(cfg, name, str(folder))
    evaluator.reset()
    api = evaluator._coco_api
    labels = {category: label for label, category in enumerate(sorted(api.getCatIds()))}
    evaluator._predictions = [
        {"image_id": image, "instances": [_detection(api, each, labels) for each in api.imgToAnns[image]]}
        for image in api.getImgIds()
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate()


def _detection(api, each: dict[str, Any], labels: dict) -> dict[str, Any]:
    rle = api.annToRLE(dict(each))
    counts = rle["counts"].decode() if isinstance(rle["counts"], bytes) else rle["counts"]
    found = {"image_id": each["image_id"], "category_id": labels[each["category_id"]], "bbox": each["bbox"]}
    return found | {"score": 1.0, "segmentation": {"size": list(rle["size"]), "counts": counts}}


def forget(name: str) -> None:
    """Take a set out of the catalogs."""
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)
    checked.pop(name, None)
