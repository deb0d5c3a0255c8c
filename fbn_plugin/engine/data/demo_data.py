"""A small instance-segmentation set that needs no download: scikit-learn's handwritten digits on its two photographs.

Digits are enlarged, tinted and put at random places on random crops of the photographs; a later digit hides what it
covers of an earlier one. The masks are those of the pixels that are drawn, so they are exact. Training and validation
share neither a digit nor a part of a photograph. The same seed gives the same files. Sources: the digits are from the
UCI "Optical Recognition of Handwritten Digits" test set, the photographs are scikit-learn's ``china.jpg`` and
``flower.jpg``.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from fbn_plugin.engine.files.disk import atomic_write, writing

IMAGE_SIZE = 128
DIGITS_PER_IMAGE = (2, 6)
DIGIT_SIZE = (28, 56)
LEAST_VISIBLE = 0.8  # a digit is put elsewhere if it would hide more than the rest of another


def _paste_digit(rng: np.random.Generator, canvas: np.ndarray, digit: np.ndarray) -> np.ndarray:
    """Draw one digit at a random size, place and tint into ``canvas`` ``(H, W, 3)``; return its mask ``(H, W)``."""
    size = int(rng.integers(*DIGIT_SIZE, endpoint=True))
    ink = np.asarray(
        Image.fromarray((digit * (255 / 16)).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    )
    drawn = ink > 127
    top, left = (int(rng.integers(0, side - size + 1)) for side in canvas.shape[:2])
    region = canvas[top : top + size, left : left + size]
    # dark on light or light on dark, whichever the background calls for, with a tint
    tint = rng.integers(0, 70, size=3)
    region[drawn] = tint if region[drawn].mean() > 127 else 255 - tint
    mask = np.zeros(canvas.shape[:2], dtype=bool)
    mask[top : top + size, left : left + size] = drawn
    return mask


def _part(photo: np.ndarray, split: str) -> np.ndarray:
    """The part of a photograph that belongs to a split: the left 70 % for training, the rest for validation."""
    edge = photo.shape[1] * 7 // 10
    return photo[:, :edge] if split == "train" else photo[:, edge:]


def _compose(rng: np.random.Generator, photo: np.ndarray, digits: np.ndarray, count: int) -> tuple[np.ndarray, list]:
    """One image and its ``(index of the digit, mask)`` pairs."""
    top, left = (int(rng.integers(0, side - IMAGE_SIZE + 1)) for side in photo.shape[:2])
    canvas = photo[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE].copy()
    instances: list[tuple[int, np.ndarray, int]] = []  # index, visible mask, area when drawn
    while len(instances) < count:
        trial = canvas.copy()
        index = int(rng.integers(len(digits)))
        mask = _paste_digit(rng, trial, digits[index])
        visible = [(i, m & ~mask, area) for i, m, area in instances]
        if all(m.sum() >= LEAST_VISIBLE * area for _, m, area in visible):
            canvas, instances = trial, [*visible, (index, mask, int(mask.sum()))]
    return canvas, [(index, mask) for index, mask, _ in instances]


def make_digits_on_photos(folder: str | Path, num_train: int = 400, num_val: int = 60, seed: int = 0) -> Path:
    """Write the set to ``folder`` in COCO layout: ``train/``, ``val/``, ``annotations/instances_{train,val}.json``.

    Args:
        folder: made if it is not there; the annotations are written last, so a folder that has them is complete.
        num_train, num_val: number of images, each 128 by 128 pixels with 2 to 6 digits.
        seed: decides everything.

    Returns:
        ``folder``.
    """
    from sklearn.datasets import load_digits, load_sample_images

    folder = Path(folder)
    digits, photos = load_digits(), load_sample_images().images
    order = np.random.default_rng(seed).permutation(len(digits.images))
    first_val = len(order) * 4 // 5
    for split, num_images, chosen in (("train", num_train, order[:first_val]), ("val", num_val, order[first_val:])):
        rng = np.random.default_rng([seed, len(split)])
        (folder / split).mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for image_id in range(1, num_images + 1):
            count = int(rng.integers(*DIGITS_PER_IMAGE, endpoint=True))
            canvas, instances = _compose(rng, _part(photos[image_id % 2], split), digits.images[chosen], count)
            name = f"{image_id:05d}.png"
            with writing(folder / split / name):
                Image.fromarray(canvas).save(folder / split / name)
            images.append({"id": image_id, "file_name": name, "width": IMAGE_SIZE, "height": IMAGE_SIZE})
            for index, mask in instances:
                rle = coco_mask.encode(np.asfortranarray(mask))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": int(digits.target[chosen[index]]) + 1,
                        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                        "bbox": coco_mask.toBbox(rle).tolist(),
                        "area": int(mask.sum()),
                        "iscrowd": 0,
                    }
                )
        info = {"description": "scikit-learn's handwritten digits on its photographs", "seed": seed}
        categories = [{"id": value + 1, "name": str(value)} for value in range(10)]
        content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
        target = folder / "annotations" / f"instances_{split}.json"
        target.parent.mkdir(exist_ok=True)
        atomic_write(target, json.dumps(content).encode())
    return folder
