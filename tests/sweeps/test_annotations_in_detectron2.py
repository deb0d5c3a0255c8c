"""Annotation files that are damaged at random, and that detectron2 reads itself: what is not refused goes through all
that a training and an evaluation do with it."""

import json
import tempfile
from pathlib import Path

import pytest
from coco_mutations import HEIGHT, WIDTH, read, sound, sweep

pytest.importorskip("detectron2", reason="detectron2 is not installed")
from coco_in_detectron2 import check, config, forget, use
from detectron2.data.datasets import register_coco_instances

pytestmark = pytest.mark.detectron2


def detectron2_case(text: bytes) -> str:
    """A file that detectron2 reads itself, where it can."""
    with tempfile.TemporaryDirectory() as folder:
        data = read(text, Path(folder))  # which refuses what is refused there, see test_annotation_files.py
        register_coco_instances("mutated", {}, str(data.json_file), folder)
        cfg = config("mutated", len(data.categories))
        try:
            check(cfg)
            use(cfg, "mutated", Path(folder), (HEIGHT, WIDTH))
        except (ValueError, OSError) as error:
            raise RuntimeError(f"after reading: {type(error).__name__} {error}") from error
        finally:
            forget("mutated")
    return f"{len(data.annotations)} annotations"


def test_annotation_files_in_detectron2(seed: int = 0, count: int = 150):
    assert detectron2_case(json.dumps(sound()).encode()) == "5 annotations"
    sweep(detectron2_case, sound, count, seed)
