"""COCO average precision of boxes and masks with pycocotools, under detectron2's names."""

import contextlib
import io
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fbn_plugin.engine.data.coco_data import CocoDataset
from fbn_plugin.engine.run.evaluation_names import METRICS

__all__ = ["coco_results", "evaluate_coco", "metric_names", "no_detections"]

logger = logging.getLogger(__name__)

# (IoU threshold or None for all of 0.5:0.95, index of the area range in COCOeval: all, small, medium, large).
_METRICS = dict(zip(METRICS, ((None, 0), (0.5, 0), (0.75, 0), (None, 1), (None, 2), (None, 3))))


def coco_results(data: CocoDataset, image_id: int, output: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """One image's detections in COCO's results format.

    Args:
        data: the set that the image is of; label 1 is its first category.
        image_id: the image's id.
        output: torchvision's ``boxes`` (N, 4) xyxy pixels, ``scores`` (N), ``labels`` (N), and ``masks`` (N, 1, H, W)
            in 0..1 if there are any; masks are cut at 0.5.
    """
    boxes = output["boxes"].double().cpu()
    boxes[:, 2:] -= boxes[:, :2]
    results = [
        {"image_id": image_id, "category_id": data.category_ids[label - 1], "bbox": box, "score": score}
        for box, score, label in zip(boxes.tolist(), output["scores"].tolist(), output["labels"].tolist())
    ]
    for result, mask in zip(results, output.get("masks", ())):
        rle = mask_utils.encode(np.asfortranarray((mask[0] > 0.5).cpu().numpy().astype(np.uint8)))
        result["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
    return results


def metric_names(data: CocoDataset, masks: bool = True) -> list[str]:
    """The keys of what ``evaluate_coco`` returns."""
    classes = [f"AP-{name}" for name in data.class_names] if len(data.class_names) > 1 else []
    return [f"{task}/{name}" for task in (("bbox", "segm") if masks else ("bbox",)) for name in (*_METRICS, *classes)]


def no_detections(name: str) -> str:
    """The sentence on a model that detects nothing on a set."""
    return f"{name}: nothing was detected, so its average precisions are 0.00"


def evaluate_coco(
    data: CocoDataset, results: Sequence[dict[str, Any]], masks: bool = True, max_detections: int = 100
) -> dict[str, float]:
    """Average precision over all images of a set, in percent.

    Args:
        data: ground truth.
        results: detections in COCO's results format, see ``coco_results``.
        masks: evaluate masks besides boxes.
        max_detections: detections that count in an image; COCO's own limit is 100, and images may hold more objects.

    Returns:
        ``bbox/AP``, ``bbox/AP50``, ``bbox/AP75``, ``bbox/APs``, ``bbox/APm``, ``bbox/APl``, with more than one class
        ``bbox/AP-<class>``, and the same under ``segm/``. NaN where the set has no object that counts.
    """
    if not results:
        logger.warning("%s", no_detections(data.name))
    metrics = {}
    for task in ("bbox", "segm") if masks else ("bbox",):
        truth = data.coco_api(masks=task == "segm")
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(truth, _detections(data, truth, results, task), task)
            evaluation.params.maxDets = [1, 10, max_detections]
            evaluation.evaluate()
            evaluation.accumulate()
        precision = evaluation.eval["precision"]  # (IoU thresholds, recalls, classes, areas, detection limits)
        thresholds = evaluation.params.iouThrs
        for name, (threshold, area) in _METRICS.items():
            chosen = precision if threshold is None else precision[np.isclose(thresholds, threshold)]
            metrics[f"{task}/{name}"] = _mean(chosen[:, :, :, area, -1])
        if len(data.class_names) > 1:
            for index, name in enumerate(data.class_names):
                metrics[f"{task}/AP-{name}"] = _mean(precision[:, :, index, 0, -1])
    return metrics


def _detections(data: CocoDataset, truth: COCO, results: Sequence[dict[str, Any]], task: str) -> COCO:
    # A copy without boxes for masks: loadRes takes the area, which puts a result into small, medium or large, from the
    # box if there is one.
    fields = ("image_id", "category_id", "score", "bbox" if task == "bbox" else "segmentation")
    chosen = [{field: result[field] for field in fields} for result in results]
    if chosen:
        return truth.loadRes(chosen)
    empty = COCO()  # loadRes wants at least one
    empty.dataset = {"images": data.images, "annotations": [], "categories": data.categories}
    empty.createIndex()
    return empty


def _mean(precision: np.ndarray) -> float:
    valid = precision[precision > -1]  # -1: no ground truth
    return float(100 * valid.mean()) if valid.size else float("nan")
