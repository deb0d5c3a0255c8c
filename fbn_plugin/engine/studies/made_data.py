"""Data sets that studies make for themselves, in seconds and without a network, so that their smallest scale runs
anywhere. Both are of real images, scikit-learn's: its two photographs and its handwritten digits.
"""

import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fbn_plugin.engine.files.disk import writing

__all__ = ["MADE", "MadeSet", "make_digits", "make_photographs"]

_CLASSES = 10
_SIDE = 64
_TRAIN, _VAL = 8, 4  # images of a class


@dataclass(frozen=True)
class MadeSet:
    """A data set that can be made.

    Attributes:
        what: it is.
        make: called with the folder that is to hold it.
    """

    what: str
    make: Callable[[Path], None]


def make_photographs(folder: Path) -> None:
    """Write ``train/CLASS/N.jpg`` and ``val/CLASS/N.jpg``, ImageNet's layout: 8 + 4 images of 64x64 pixels a class, of
    ten classes. A class is a fifth of one of the two photographs; training and validation share no pixel.

    Args:
        folder: must not be there; it is there when it is whole.

    Raises:
        WriteError: it cannot be written.
    """
    from PIL import Image
    from sklearn.datasets import load_sample_images

    def write(place: Path) -> None:
        generator = np.random.default_rng(0)
        for number in range(_CLASSES):
            photo = load_sample_images().images[number % 2]
            width = photo.shape[1] // (_CLASSES // 2)
            strip = photo[:, number // 2 * width :][:, :width]
            edge = photo.shape[0] * 7 // 10
            for split, part, count in (("train", strip[:edge], _TRAIN), ("val", strip[edge:], _VAL)):
                target = place / split / f"part{number}"
                target.mkdir(parents=True)
                for i in range(count):
                    top, left = (int(generator.integers(0, side - _SIDE + 1)) for side in part.shape[:2])
                    Image.fromarray(part[top : top + _SIDE, left : left + _SIDE]).save(target / f"{i}.jpg", quality=90)

    _write_whole(folder, write)


def make_digits(folder: Path) -> None:
    """Write 16 + 4 images of handwritten digits on photographs in COCO's layout, see ``demo_data.py``.

    Args:
        folder: must not be there; it is there when it is whole.

    Raises:
        WriteError: it cannot be written.
    """
    from fbn_plugin.engine.data.demo_data import make_digits_on_photos

    _write_whole(folder, lambda place: make_digits_on_photos(place, 16, 4))


def _write_whole(folder: Path, write: Callable[[Path], object]) -> None:
    """Write a folder under another name first, as two studies may make one at the same time."""
    folder = Path(folder)
    place = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}.tmp")
    try:
        with writing(folder):
            place.mkdir(parents=True)
            write(place)
            if not folder.exists():
                os.rename(place, folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)


MADE = {
    "photographs": MadeSet("parts of scikit-learn's two photographs, ten classes", make_photographs),
    "digits_on_photos": MadeSet("scikit-learn's digits on its photographs, with masks", make_digits),
}
