"""COCO AP: the same figures as pycocotools' own summary, and right where that has a limit of 100 objects."""

import contextlib
import io
import math

import numpy as np
import pytest
import torch
from pycocotools.cocoeval import COCOeval

from fbn_plugin.engine.data.coco_data import CocoDataset, CocoDetection
from fbn_plugin.engine.data.coco_eval import coco_results, evaluate_coco, metric_names
from fbn_plugin.engine.data.named_sets import resolve_dataset

pytestmark = pytest.mark.usefixtures("one_thread")


def ground_truth(data, jitter=0.0, seed=0):
    """The objects of a set as detections, their boxes and masks moved about by up to `jitter` pixels."""
    rng = np.random.default_rng(seed)
    samples = CocoDetection([data])
    results = []
    for index in range(len(samples)):
        _, target = samples[index]
        count = len(target["labels"])
        shift = rng.integers(-jitter, jitter + 1, 2).tolist() if jitter else [0, 0]
        masks = torch.roll(target["masks"], shift, dims=(-2, -1))[:, None].float()
        output = {
            "boxes": target["boxes"] + torch.tensor([shift[1], shift[0]] * 2),
            "labels": target["labels"],
            "scores": torch.from_numpy(rng.random(count)),
            "masks": masks,
        }
        results += coco_results(data, target["image_id"], output)
    return results


def test_the_truth_scores_100(shapes):
    data = resolve_dataset(f"{shapes}:train")
    metrics = evaluate_coco(data, ground_truth(data))
    for task in ("bbox", "segm"):
        assert all(
            metrics[f"{task}/{name}"] == pytest.approx(100) for name in ("AP", "AP50", "AP75", "AP-box", "AP-disc")
        )
        assert math.isnan(metrics[f"{task}/APl"])  # no object is that large


def test_no_detection_scores_0(shapes):
    metrics = evaluate_coco(resolve_dataset(f"{shapes}:train"), [])
    assert {metrics[f"{task}/{name}"] for task in ("bbox", "segm") for name in ("AP", "AP50", "AP75")} == {0.0}


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_figures_are_those_of_pycocotools(shapes, task):
    data = resolve_dataset(f"{shapes}:train")
    results = [each for seed in range(3) for each in ground_truth(data, jitter=4, seed=seed)]
    metrics = evaluate_coco(data, results)
    truth = data.coco_api(masks=True)
    with contextlib.redirect_stdout(io.StringIO()):
        plain = [{k: v for k, v in r.items() if k != ("segmentation" if task == "bbox" else "bbox")} for r in results]
        evaluation = COCOeval(truth, truth.loadRes(plain), task)
        evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    ours = [metrics[f"{task}/{name}"] for name in names]
    theirs = [100 * value if value > -1 else math.nan for value in evaluation.stats[:6]]
    assert ours == pytest.approx(theirs, nan_ok=True)
    assert 0 < ours[0] < 100


def test_more_than_100_objects_count(tmp_path):
    boxes = [[10 * (i % 20), 10 * (i // 20), 8, 8] for i in range(150)]
    annotations = [
        {"id": i + 1, "image_id": 0, "category_id": 1, "bbox": box, "area": 64, "iscrowd": 0}
        for i, box in enumerate(boxes)
    ]
    images = [{"id": 0, "file_name": "0.png", "width": 200, "height": 80}]
    data = CocoDataset("many", tmp_path, tmp_path, images, annotations, [{"id": 1, "name": "cell"}])
    results = [{"image_id": 0, "category_id": 1, "bbox": box, "score": 0.9} for box in boxes]
    assert evaluate_coco(data, results, masks=False, max_detections=100)["bbox/AP"] < 70
    metrics = evaluate_coco(data, results, masks=False, max_detections=200)
    assert metrics["bbox/AP"] == pytest.approx(100)
    assert "bbox/AP-cell" not in metrics and not any(name.startswith("segm/") for name in metrics)


def test_crowds_are_no_misses_and_detections_in_them_no_mistakes(shapes):
    data = resolve_dataset(f"{shapes}:train")
    results = ground_truth(data)
    for each in data.annotations:
        if each["image_id"] == 0:
            each["iscrowd"] = 1
    assert evaluate_coco(data, results)["bbox/AP"] == pytest.approx(100)
    assert evaluate_coco(data, [each for each in results if each["image_id"]])["segm/AP"] == pytest.approx(100)


def test_results_are_in_the_files_ids_and_boxes(shapes):
    data = resolve_dataset(f"{shapes}:val")
    mask = torch.zeros(1, 1, 96, 80)
    mask[0, 0, 5:25, 10:30] = 0.6
    output = {
        "boxes": torch.tensor([[10.0, 5.0, 30.0, 25.0]]),
        "labels": torch.tensor([2]),
        "scores": torch.tensor([0.5]),
        "masks": mask,
    }
    (result,) = coco_results(data, 3, output)
    assert (result["image_id"], result["category_id"], result["bbox"]) == (3, 7, [10.0, 5.0, 20.0, 20.0])
    assert result["segmentation"]["size"] == [96, 80] and isinstance(result["segmentation"]["counts"], str)


@pytest.mark.parametrize("masks", [True, False])
def test_the_names_of_the_metrics_are_known_in_advance(shapes, masks):
    data = resolve_dataset(f"{shapes}:val")
    assert metric_names(data, masks) == list(evaluate_coco(data, [], masks))
