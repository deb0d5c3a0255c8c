"""The views of an image that a classifier's probabilities are averaged over: its centre; ten crops (Krizhevsky et al.,
"ImageNet Classification with Deep Convolutional Neural Networks", 2012, section 4.1); 144 crops (Szegedy et al., "Going
Deeper with Convolutions", 2014, section 7).
"""

from __future__ import annotations

import numpy as np
import torch
from fvcore.common.config import CfgNode
from PIL import Image
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision.transforms import functional

from fbn_plugin.engine.classification.augmentation import framing
from fbn_plugin.engine.classification.data import build_val_transform, pixel_statistics
from fbn_plugin.engine.run.rules import refusal

__all__ = ["CROPS", "Views", "normalized"]

CROPS = (1, 10, 144)

# Short sides that an image has, of which the model sees 224.
_SHORT_SIDES, _SEEN = (256, 288, 320, 352), 224


class Views:
    """A transform of a PIL image into its views, uint8 (``crops``, C, H, W).

    Args:
        cfg: INPUT says size, crop and interpolation.
        crops: 1, the evaluation's own: the centre of the image whose short side is INPUT.SIZE / CROP_PCT; 10: of that
            image the corners and the centre, then their mirror images; 144: of the image at 4 scales (the short side
            256, 288, 320, 352 where the model sees 224) the 3 squares side by side, of each the 4 corners, the centre
            and the whole, and the mirror images of all.
        only: the number of the one view that is wanted; None is all of them.

    Attributes:
        count: of the views that an image is made into.

    Raises:
        ValueError: for 10 crops, a CROP_PCT that leaves no room around the centre.
    """

    def __init__(self, cfg: CfgNode, crops: int = 1, only: int | None = None):
        self.crops, self.size, self.only = crops, cfg.INPUT.SIZE, only
        self.count = crops if only is None else 1
        self.interpolation = str_to_interp_mode(cfg.INPUT.INTERPOLATION)
        self.short = int(self.size / cfg.INPUT.CROP_PCT)  # as timm rounds it
        self.centre = build_val_transform(cfg, prefetch=True)
        self.first, self.threshold = framing(cfg), cfg.INPUT.BINARY_THRESHOLD
        if crops == 10 and self.short == self.size:
            what = f"less than 1 for 10 crops, so that an image is larger than INPUT.SIZE {self.size}"
            raise refusal("INPUT.CROP_PCT", what, cfg.INPUT.CROP_PCT)

    def __call__(self, image: Image.Image) -> Tensor:
        if self.crops == 1:
            return torch.as_tensor(self.centre(image))[None]
        for step in self.first:
            image = step(image)
        views = self._of_framed(image)
        views = views if self.only is None else views[self.only : self.only + 1]
        return views.ge(self.threshold).to(torch.uint8) * 255 if self.threshold else views

    def _of_framed(self, image: Image.Image) -> Tensor:
        if self.crops == 144:
            return _stack(_144_crops(image, self.size, self.interpolation))
        return _stack(functional.ten_crop(functional.resize(image, self.short, self.interpolation), self.size))


def _144_crops(image: Image.Image, size: int, interpolation: functional.InterpolationMode) -> list[Image.Image]:
    views = []
    for side in _SHORT_SIDES:
        short = round(size * side / _SEEN)
        scaled = functional.resize(image, short, interpolation)
        for place in (0, 0.5, 1):
            left, top = round(place * (scaled.width - short)), round(place * (scaled.height - short))
            square = scaled.crop((left, top, left + short, top + short))
            views += [*functional.five_crop(square, size), functional.resize(square, size, interpolation)]
    return [*views, *map(functional.hflip, views)]


def _stack(images: list[Image.Image]) -> Tensor:
    pixels = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2).copy())


def normalized(views: Tensor, cfg: CfgNode) -> Tensor:
    """Views in uint8 (..., C, H, W) as the model gets them, with the operations of ``ToTensor`` and ``Normalize``."""
    mean, std = (torch.tensor(each, device=views.device).view(-1, 1, 1) for each in pixel_statistics(cfg).values())
    return views.float().div_(255).sub_(mean).div_(std)
