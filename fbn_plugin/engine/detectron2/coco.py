"""COCO's evaluation in a detectron2 run: detectron2's evaluator on checked annotations, for which a model that detects
nothing has an AP of 0, and two categories of one name have two figures."""

import contextlib
import functools
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from pycocotools.cocoeval import COCOeval

from fbn_plugin.engine.data.coco_data import unique_names
from fbn_plugin.engine.data.coco_eval import no_detections
from fbn_plugin.engine.detectron2.data import checked, tasks
from fbn_plugin.engine.detectron2.registered import has_file
from fbn_plugin.engine.run import stopping

__all__ = ["CocoEvaluator"]

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def _empty_file(metadata: Metadata) -> Iterator[None]:
    """Show detectron2's evaluator a file without anything in it, where the annotations are not those of a file as it
    stands: of records of a Python function it would write one, and look for that one there at the next evaluation."""
    file = metadata.get("json_file")
    with tempfile.TemporaryDirectory() as folder:
        empty = os.path.join(folder, "empty.json")
        with open(empty, "w") as opened:
            json.dump({"images": [], "annotations": [], "categories": []}, opened)
        try:
            _set_file(metadata, empty)
            yield
        finally:
            _set_file(metadata, file)


def _set_file(metadata: Metadata, file: str | None) -> None:
    if metadata.get("json_file") is not None:
        del metadata.json_file  # it refuses to have another one
    if file is not None:
        metadata.json_file = file


class CocoEvaluator(COCOEvaluator):
    """detectron2's evaluator of boxes, masks and keypoints.

    Args:
        cfg: config.
        name: of a registered set.
        folder: for what the evaluator writes.
    """

    def __init__(self, cfg: CfgNode, name: str, folder: str):
        self.name = name
        options = {"max_dets_per_image": cfg.TEST.DETECTIONS_PER_IMAGE, "kpt_oks_sigmas": cfg.TEST.KEYPOINT_OKS_SIGMAS}
        if name in checked or not has_file(name):
            with _empty_file(MetadataCatalog.get(name)):
                super().__init__(name, tasks(cfg), output_dir=folder, **options)
        else:
            super().__init__(name, tasks(cfg), output_dir=folder, **options)
        if name in checked:
            self._coco_api = checked[name].coco_api(masks=cfg.MODEL.MASK_ON)
        self._coco_api.dataset.setdefault("info", {})  # pycocotools loads no results without
        annotations = self._coco_api.dataset.get("annotations", ())
        if any(each["id"] == 0 for each in annotations):  # which pycocotools takes for no match
            for number, each in enumerate(annotations, start=1):
                each["id"] = number
            self._coco_api.createIndex()

    def _eval_predictions(self, predictions: list[dict], img_ids: Sequence | None = None) -> None:
        score = functools.partial(super()._eval_predictions, predictions, img_ids=img_ids)
        if stopping.leavable(lambda: [score()]) is None:  # the process that has all detections scores, alone
            raise stopping.EvaluationLeft

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: Sequence[str] | None = None
    ) -> dict[str, float]:
        if coco_eval is None:
            logger.warning("%s", no_detections(self.name))
            coco_eval = self._without_detections(iou_type)
        if class_names:
            categories = self._coco_api.loadCats(sorted(self._coco_api.getCatIds()))
            class_names = unique_names([(each["name"], each["id"]) for each in categories])
        return super()._derive_coco_results(coco_eval, iou_type, class_names)

    def _without_detections(self, task: str) -> COCOeval:
        """The evaluation of a model that detects nothing."""
        nothing = type(self._coco_api)()
        nothing.dataset = {**self._coco_api.dataset, "annotations": []}
        nothing.createIndex()
        evaluation = COCOeval(self._coco_api, nothing, task)
        if task == "keypoints" and self._kpt_oks_sigmas:
            evaluation.params.kpt_oks_sigmas = np.array(self._kpt_oks_sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return evaluation
