"""What the tests share: a small COCO-format set of rectangles and ellipses, the way to real data, and a clean slate for
log and threads."""

import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as mask_utils
from tiny_detector import TINY_DETECTOR

# A script finds it in its own folder, which is not on the path of the tests that load a tool from its file.
_spec = importlib.util.spec_from_file_location("interruption", Path(__file__).parents[1] / "tools/interruption.py")
sys.modules["interruption"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["interruption"])

CLASSES = ((7, "box"), (3, "disc"))  # ids neither ordered nor from 1


def write_shapes(folder, count: int, seed: int, split: str) -> None:
    """Images 96x80 and 80x96 with one to three shapes; boxes as polygons, discs as RLE; the last image is empty."""
    rng = np.random.default_rng(seed)
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / split).mkdir()
    content = {"images": [], "annotations": [], "categories": [{"id": i, "name": name} for i, name in CLASSES]}
    for number in range(count):
        width, height = (96, 80) if number % 3 else (80, 96)
        image = Image.fromarray(rng.integers(0, 90, (height, width, 3), dtype=np.uint8))
        draw = ImageDraw.Draw(image)
        for _ in range(0 if number == count - 1 else rng.integers(1, 4)):
            x, y = rng.integers(0, (width - 40, height - 40))
            w, h = rng.integers(20, 40, 2)
            category, name = CLASSES[rng.integers(2)]
            color = tuple(int(value) for value in rng.integers(120, 256, 3))
            if name == "box":
                draw.rectangle((x, y, x + w - 1, y + h - 1), fill=color)
                segmentation = [[int(v) for v in (x, y, x + w, y, x + w, y + h, x, y + h)]]
                box, area = [int(x), int(y), int(w), int(h)], int(w * h)
            else:
                draw.ellipse((x, y, x + w - 1, y + h - 1), fill=color)
                mask = Image.new("L", (width, height))
                ImageDraw.Draw(mask).ellipse((x, y, x + w - 1, y + h - 1), fill=1)
                rle = mask_utils.encode(np.asfortranarray(np.asarray(mask)))
                box, area = mask_utils.toBbox(rle).tolist(), int(mask_utils.area(rle))
                segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
            content["annotations"].append(
                {
                    "id": len(content["annotations"]),
                    "image_id": number,
                    "category_id": category,
                    "bbox": box,
                    "area": area,
                    "iscrowd": 0,
                    "segmentation": segmentation,
                }
            )
        image.save(folder / split / f"{number}.png")
        content["images"].append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


@pytest.fixture(scope="session", autouse=True)
def quiet_ultralytics(tmp_path_factory):
    """It reads these when it is imported: no network, no installing, its settings in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("settings")))
        for name, value in (("OFFLINE", "1"), ("AUTOINSTALL", "false"), ("VERBOSE", "false")):
            patch.setenv(f"YOLO_{name}", value)
        yield


@pytest.fixture(scope="module", autouse=True)
def without_ultralytics_patches():
    """Ultralytics, once imported, has functions of its own in the place of these two, for all tests that follow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "open", Image.open)
        patch.setattr(torch, "save", torch.save)
        yield


@pytest.fixture(autouse=True)
def fresh_logging():
    """Take back what ``setup_logging`` did, so that no test hears or misses another's messages."""
    yield
    for name in ("fbn_plugin", "fvcore", "detectron2"):
        logger = logging.getLogger(name)
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
            handler.close()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def fresh_imports(monkeypatch):
    """What ``--import`` brought in for a test is not written down as the next one's."""
    monkeypatch.setattr("fbn_plugin.engine.run.cli._imported", [])


@pytest.fixture
def one_thread():
    """For tests of many small tensor operations, which more threads slow down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """The folder of a real data set, by its name in the folder that FBN_PLUGIN_DATA says; the test is skipped where it
    is not."""

    def folder(name: str) -> Path:
        path = Path(os.environ.get("FBN_PLUGIN_DATA", "")).absolute() / name
        if not os.environ.get("FBN_PLUGIN_DATA") or not path.is_dir():
            pytest.skip(f"FBN_PLUGIN_DATA names no folder with {name} in it")
        return path

    return folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder with splits train (8 images) and val (4 images), no `info`, an annotation with id 0."""
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, 8, 0, "train")
    write_shapes(folder, 4, 1, "val")
    return folder


@pytest.fixture(scope="session")
def trained_run(shapes, tmp_path_factory):
    """The OUTPUT_DIR of a tiny detector of torchvision's, trained on ``shapes`` and evaluated after 2 and 4 iterations.
    Read only: copy it to write into it."""
    from fbn_plugin.engine.torchvision.config import load_detection_config
    from fbn_plugin.engine.torchvision.trainer import DetectionTrainer

    folder = tmp_path_factory.mktemp("trained")
    config = folder / "given.yaml"
    data = f"DATASETS: {{TRAIN: ['{shapes}:train'], TEST: ['{shapes}:val']}}"
    config.write_text(f"{TINY_DETECTOR}{data}\nOUTPUT_DIR: {folder / 'run'}\n")
    DetectionTrainer(load_detection_config(str(config))).train()
    return folder / "run"
