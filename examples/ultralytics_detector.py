"""Train a YOLO with filtered batch normalization.

The images are bright squares on noise, made on the spot; put the YAML of your data set in place of ``write_squares``.
Nothing is downloaded, so the weights are random ones: for a real run take ``YOLO("yolo11n.pt")``, more epochs and
larger images. Run: python examples/ultralytics_detector.py
"""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from ultralytics import YOLO

from fbn_plugin.frameworks.ultralytics import norm_trainer


def write_squares(folder: Path, count: int = 16) -> Path:
    """Images of 64x64 pixels with a square each, in Ultralytics' format; returns the data set's YAML file."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        left, top, side = random.integers(8, 30, 3)
        image = random.integers(0, 128, (64, 64, 3), dtype=np.uint8)
        image[top : top + side, left : left + side] += 127
        Image.fromarray(image).save(folder / "images" / f"{number}.png")
        box = np.array([left + side / 2, top + side / 2, side, side]) / 64
        (folder / "labels" / f"{number}.txt").write_text(f"0 {' '.join(map(str, box))}\n")
    content = f"path: {folder}\ntrain: images\nval: images\nnames: {{0: square}}\n"
    (folder / "data.yaml").write_text(content)
    return folder / "data.yaml"


def main(output: str, epochs: int = 2) -> YOLO:
    data = write_squares(Path(output).absolute() / "squares")
    model = YOLO("yolo11n.yaml")
    small = {"imgsz": 64, "batch": 8, "device": "cpu", "workers": 0, "plots": False, "amp": False}
    trainer = norm_trainer(model, "FBN(t_sigma=5)")
    model.train(trainer=trainer, data=str(data), epochs=epochs, project=output, **small)
    norms = {type(module).__name__ for module in model.model.modules() if "Norm" in type(module).__name__}
    print(f"norms of the trained model: {', '.join(norms)}")
    print(f"exported: {model.export(format='torchscript', imgsz=64)}")
    return model


if __name__ == "__main__":
    main(tempfile.mkdtemp())
