"""Annotation files and files of detections that are damaged at random: each is refused when it is read, or goes through
all that a training and an evaluation do with it."""

import json
import tempfile
from pathlib import Path
from typing import Any

from coco_mutations import HEIGHT, WIDTH, detections, read, sound, sweep

from fbn_plugin.engine.data.coco_data import Augmentation, CocoDataset, CocoDetection
from fbn_plugin.engine.data.coco_eval import evaluate_coco
from fbn_plugin.engine.reports.evaluation import read_detections, score_detections


def use(data: CocoDataset) -> str:
    """All that a training and an evaluation do with a set; an error that refuses something now is a fault."""
    try:
        for masks in (True, False):
            for augmentation in (None, Augmentation((9, 30), 40)):
                samples = CocoDetection([data], augmentation, masks)
                for index, image in enumerate(data.images):
                    if (image["height"], image["width"]) == (HEIGHT, WIDTH):  # else it is unlike its file
                        samples[index]
            api = data.coco_api(masks)
            truth = [
                {
                    **{key: each[key] for key in ("image_id", "category_id", "bbox")},
                    "score": 1.0,
                    **({"segmentation": code_of(api, each)} if masks else {}),
                }
                for each in api.dataset["annotations"]
            ]
            metrics = evaluate_coco(data, truth, masks)
            assert all(not 0 <= value < 0 for value in metrics.values())
    except (ValueError, OSError) as error:
        raise RuntimeError(f"after reading: {type(error).__name__} {error}") from error
    return f"{len(data.annotations)} annotations"


def code_of(api, each: dict[str, Any]) -> dict[str, Any]:
    code = api.annToRLE(each)
    counts = code["counts"]
    return {"size": code["size"], "counts": counts.decode() if isinstance(counts, bytes) else counts}


def annotations_case(text: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return use(read(text, Path(folder)))


def detections_case(text: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        data = read(json.dumps(sound()).encode(), Path(folder))
        path = Path(folder, "detections.json")
        path.write_bytes(text)
        found = read_detections(path, data)
        try:
            score_detections(data, found)
        except (ValueError, OSError) as error:
            raise RuntimeError(f"after reading: {type(error).__name__} {error}") from error
    return f"{len(found)} detections"


def test_annotation_files(seed: int = 0, count: int = 600):
    assert annotations_case(json.dumps(sound()).encode()) == "5 annotations"
    sweep(annotations_case, sound, count, seed)


def test_files_of_detections(seed: int = 0, count: int = 250):
    assert detections_case(json.dumps(detections()).encode()) == "4 detections"
    sweep(detections_case, detections, count, seed)
