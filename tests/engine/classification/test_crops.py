"""The views of an image: the evaluation's own one, ten crops and 144, against slices of Pillow's images."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from tiny_classification import config
from torchvision.transforms import TenCrop

from fbn_plugin.engine.classification.crops import Views, normalized
from fbn_plugin.engine.classification.data import pixel_statistics


def picture(width: int, height: int, mode: str) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def small(mode: str, size: int = 28, **values):
    channels = {"INPUT__FORMAT": mode, "MODEL__PIXEL_MEAN": (70,) * len(mode), "MODEL__PIXEL_STD": (100,) * len(mode)}
    return config(INPUT__SIZE=size, **channels, **values)


def scaled(image: Image.Image, short: int) -> Image.Image:
    width, height = image.size
    ratio = max(width, height) / min(width, height)
    size = (short, int(short * ratio)) if width <= height else (int(short * ratio), short)
    return image.resize(size, Image.Resampling.BILINEAR)


def corners_and_centre(pixels: np.ndarray, size: int) -> list[np.ndarray]:
    height, width = pixels.shape[:2]
    y, x = round((height - size) / 2), round((width - size) / 2)
    places = [(0, 0), (0, width - size), (height - size, 0), (height - size, width - size), (y, x)]
    return [pixels[top : top + size, left : left + size] for top, left in places]


def channels_first(pixels: np.ndarray) -> np.ndarray:
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def reference_144(image: Image.Image, size: int) -> np.ndarray:
    """Szegedy et al. (2014), section 7, in Pillow and NumPy: 4 scales x 3 squares x 6 crops x 2."""
    views = []
    for side in (256, 288, 320, 352):
        short = round(size * side / 224)
        whole = np.asarray(scaled(image, short))
        rest = max(whole.shape[:2]) - short
        for start in (0, round(rest / 2), rest):
            wide = whole.shape[1] > whole.shape[0]
            square = whole[:, start : start + short] if wide else whole[start : start + short]
            resized = Image.fromarray(square).resize((size, size), Image.Resampling.BILINEAR)
            views += [*corners_and_centre(square, size), np.asarray(resized)]
    views += [view[:, ::-1] for view in views]
    return np.stack([channels_first(view) for view in views])


@pytest.mark.parametrize(("width", "height", "mode"), [(50, 37, "RGB"), (30, 61, "RGB"), (40, 40, "L")])
def test_views_against_slices(width, height, mode):
    image, size = picture(width, height, mode), 28
    views = Views(small(mode), 144)(image)
    assert views.shape == (144, len(mode), size, size) and views.dtype == torch.uint8
    np.testing.assert_array_equal(views.numpy(), reference_144(image, size))
    assert len({view.tobytes() for view in views.numpy()}) == (144 if width != height else 48)

    cfg = small(mode, INPUT__CROP_PCT=0.875)
    larger = scaled(image, 32)
    pixels = np.asarray(larger)
    ten = [*corners_and_centre(pixels, size), *corners_and_centre(pixels[:, ::-1], size)]
    views = Views(cfg, 10)(image)
    np.testing.assert_array_equal(views.numpy(), np.stack([*map(channels_first, ten)]))
    np.testing.assert_array_equal(
        views.numpy(), np.stack([channels_first(np.asarray(each)) for each in TenCrop(size)(larger)])
    )

    expected = create_transform(size, crop_pct=0.875, interpolation="bilinear", **pixel_statistics(cfg))(image)
    assert torch.equal(normalized(Views(cfg)(image), cfg)[0], expected)


def test_no_room_for_ten_crops():
    with pytest.raises(ValueError, match=r"INPUT.CROP_PCT must be less than 1 for 10 crops, .*SIZE 28, got 1.0"):
        Views(small("L"), 10)
