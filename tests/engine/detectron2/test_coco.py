"""COCO's evaluation in a detectron2 run: what a model that detects nothing gets, and categories of one name."""

import json
import logging
import math
import shutil

import pytest
import torch

from fbn_plugin.engine.data.coco_eval import evaluate_coco
from fbn_plugin.engine.data.named_sets import resolve_dataset

pytest.importorskip("detectron2", reason="detectron2 is not installed")
pytestmark = pytest.mark.detectron2


@pytest.fixture
def evaluator(tmp_path):
    """Makes one for a set."""
    from detectron2.config import get_cfg

    from fbn_plugin.engine.detectron2.coco import CocoEvaluator
    from fbn_plugin.engine.detectron2.config import add_config
    from fbn_plugin.engine.detectron2.data import register_datasets

    def make(name):
        cfg = get_cfg()
        add_config(cfg)
        cfg.merge_from_list(["DATASETS.TEST", (name,), "MODEL.MASK_ON", True, "MODEL.ROI_HEADS.NUM_CLASSES", 2])
        register_datasets(cfg, evaluate_only=True)
        return CocoEvaluator(cfg, name, str(tmp_path))

    return make


def detections(record, boxes, classes):
    from detectron2.structures import Boxes, Instances

    found = Instances((record["height"], record["width"]))
    found.pred_boxes, found.scores = Boxes(torch.tensor(boxes).reshape(-1, 4)), torch.ones(len(boxes))
    found.pred_classes = torch.tensor(classes, dtype=torch.int64)
    found.pred_masks = torch.zeros(len(boxes), *found.image_size, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(found.pred_masks, boxes):
        mask[int(top) : int(bottom), int(left) : int(right)] = True
    return {"instances": found}


def evaluate(evaluator, data, boxes=(), classes=()):
    evaluator.reset()
    for number, image in enumerate(data.images):
        record = {**image, "image_id": image["id"]}
        here = (boxes, classes) if number == 0 else ((), ())
        evaluator.process([record], [detections(record, *here)])
    return {f"{task}/{k}": value for task, figures in evaluator.evaluate().items() for k, value in figures.items()}


def test_no_detection_is_what_the_other_tools_make_of_it(evaluator, shapes, caplog):
    data = resolve_dataset(f"{shapes}:val")
    with caplog.at_level(logging.WARNING, "fbn_plugin"):
        metrics = evaluate(evaluator(data.name), data)
    assert metrics == pytest.approx(evaluate_coco(data, []), nan_ok=True)
    assert metrics["bbox/AP"] == metrics["segm/AP50"] == metrics["bbox/AP-disc"] == 0
    assert math.isnan(metrics["segm/APl"])  # of which the set has none
    assert f"{data.name}: nothing was detected, so its average precisions are 0.00" in caplog.text


def test_two_categories_of_one_name(evaluator, shapes, tmp_path, caplog):
    folder = shutil.copytree(shapes, tmp_path / "twins")
    file = folder / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    for category in content["categories"]:
        category["name"] = "shape"
    file.write_text(json.dumps(content))
    data = resolve_dataset(f"{folder}:val")
    assert "told apart by the id: shape (id 3), shape (id 7)" in caplog.text
    first = [each for each in data.annotations if each["image_id"] == data.images[0]["id"]]
    boxes = [[x, y, x + w, y + h] for x, y, w, h in (each["bbox"] for each in first)]
    metrics = evaluate(evaluator(data.name), data, boxes, [(3, 7).index(each["category_id"]) for each in first])
    names = [f"{task}/AP-shape (id {number})" for task in ("bbox", "segm") for number in (3, 7)]
    assert set(names) <= set(metrics) and "bbox/AP-shape" not in metrics
    assert metrics[names[0]] != metrics[names[1]]
    assert metrics["bbox/AP"] == pytest.approx((metrics[names[0]] + metrics[names[1]]) / 2)


def test_an_object_with_the_id_0_counts(evaluator, shapes, tmp_path):
    """In a file that detectron2 reads itself."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances

    data = resolve_dataset(f"{shapes}:val")
    first = [each for each in data.annotations if each["image_id"] == data.images[0]["id"]]
    assert json.loads(data.json_file.read_text())["annotations"][0]["id"] == 0
    boxes = [[x, y, x + w, y + h] for x, y, w, h in (each["bbox"] for each in first)]
    labels = [(3, 7).index(each["category_id"]) for each in first]
    register_coco_instances("id 0", {}, str(data.json_file), str(data.image_root))
    try:
        DatasetCatalog.get("id 0")  # as the loader does, by which the catalog learns the categories' ids
        metrics = evaluate(evaluator("id 0"), data, boxes, labels)
    finally:
        DatasetCatalog.remove("id 0")
        MetadataCatalog.pop("id 0")
    assert metrics["bbox/AP"] == pytest.approx(evaluate(evaluator(data.name), data, boxes, labels)["bbox/AP"])


def test_a_python_function_is_evaluated_more_than_once(evaluator, shapes):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from fbn_plugin.engine.detectron2.data import checked, records

    data = resolve_dataset(f"{shapes}:val")
    DatasetCatalog.register("by function", lambda: records(data, masks=True))
    MetadataCatalog.get("by function").thing_classes = ["disc", "box"]
    try:
        for _ in range(2):
            assert evaluate(evaluator("by function"), data)["bbox/AP"] == 0
        assert MetadataCatalog.get("by function").get("json_file") is None
        assert MetadataCatalog.get("by function").evaluator_type == "coco"
    finally:
        DatasetCatalog.remove("by function")
        MetadataCatalog.pop("by function")
        checked.pop("by function")
