"""What INPUT asks of images beside timm's transform: of all of them another size or frame, and black and white pixels;
of training images crops that timm has not, the colour shift of Krizhevsky et al., "ImageNet Classification with Deep
Convolutional Neural Networks" (2012), section 4.1, and timm's random erasing for images that are not normalized yet.
What is random draws from the global generators of Python and PyTorch on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from fvcore.common.config import CfgNode
from PIL import Image
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, RandomCrop, Resize
from torchvision.transforms.v2 import RandomShortestSize

from fbn_plugin.engine.run.rules import Rule, at_least, between, exactly, one_of

__all__ = [
    "RULES",
    "TIMMS_CROPS",
    "Binarize",
    "ColorShift",
    "PixelErasing",
    "augmentation_rules",
    "build_mixup",
    "complete",
    "frame",
    "framing",
    "switch_mixup",
]

# INPUT.TRAIN_CROP -> timm's train_crop_mode.
TIMMS_CROPS = {"random_resized": "rrc", "resized_center": "rkrc", "resized_random": "rkrr"}

# Standard deviations and directions of the colours of ImageNet's pixels (RGB, 0..1), as fb.resnet.torch gives them
# (https://github.com/facebookarchive/fb.resnet.torch, datasets/imagenet.lua).
_COLOR_DEVIATIONS = (0.2175, 0.0188, 0.0045)
_COLOR_DIRECTIONS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))

_LONGEST = 2**13  # side of an image

RULES = {
    "INPUT.BINARY_THRESHOLD": at_least(0, 255),
    "INPUT.CANVAS": at_least(0, _LONGEST),
    "INPUT.COLOR_SHIFT": at_least(0, 10),
    "INPUT.ERASING.COUNT": at_least(1, 100),
    "INPUT.ERASING.MODE": one_of("const", "rand", "pixel"),
    "INPUT.ERASING.PROB": between(0, 1),
    "INPUT.MIXUP_MODE": one_of("batch", "pair", "elem"),
    "INPUT.MIXUP_OFF_EPOCH": at_least(0, 10**6),
    "INPUT.MIXUP_PROB": between(0, 1),
    "INPUT.MIXUP_SWITCH_PROB": between(0, 1),
    "INPUT.REPEATED_AUGMENTATIONS": at_least(1, 1024),
    "INPUT.STRETCH": at_least(0, _LONGEST),
    "INPUT.TRAIN_CROP": one_of("none", "padded", "scaled", *TIMMS_CROPS),
    "INPUT.VFLIP": between(0, 1),
}


def augmentation_rules(cfg: CfgNode) -> dict[str, Rule]:
    """Rules of INPUT that follow from other values of the config."""
    given, rules = cfg.INPUT, {}
    if given.TRAIN_CROP == "none":
        reason = "with INPUT.TRAIN_CROP 'none', which augments nothing"
        rules |= {f"INPUT.{key}": exactly(0.0, reason) for key in ("COLOR_SHIFT", "ERASING.PROB", "VFLIP")}
    elif given.FORMAT != "RGB":
        rules["INPUT.COLOR_SHIFT"] = exactly(0.0, f"with INPUT.FORMAT {given.FORMAT!r}, which has no colours")
    if given.BINARY_THRESHOLD:
        rules["INPUT.ERASING.PROB"] = exactly(0.0, "with INPUT.BINARY_THRESHOLD, which leaves two values of a pixel")
    if given.TRAIN_CROP == "scaled":
        rules["INPUT.SHORT_SIDE"] = Rule(
            f"two whole numbers from INPUT.SIZE, {given.SIZE}, to {_LONGEST}, the smaller first",
            lambda sides: len(sides) == 2 and given.SIZE <= sides[0] <= sides[1] <= _LONGEST,
        )
    if given.REPEATED_AUGMENTATIONS > 1:
        images = cfg.SOLVER.IMS_PER_BATCH
        rules["INPUT.REPEATED_AUGMENTATIONS"] = Rule(
            f"a divisor of SOLVER.IMS_PER_BATCH, {images}", lambda times: images % times == 0
        )
        reason = "with INPUT.REPEATED_AUGMENTATIONS, which fills batches otherwise"
        rules["DATALOADER.IMAGES_PER_CLASS"] = exactly(0, reason)
    return rules


def complete(steps: list[Callable], cfg: CfgNode, prefetch: bool) -> None:
    """Add to the steps of timm's training transform what timm has not.

    Args:
        steps: which begin with a random crop and end with the tensor and, without ``prefetch``, its normalization.
        cfg: config.
        prefetch: whether the normalization is left to timm's PrefetchLoader.
    """
    given = cfg.INPUT
    interpolation = str_to_interp_mode(given.INTERPOLATION)
    if given.TRAIN_CROP == "padded":
        resize = Resize(given.SIZE, interpolation)
        steps[0] = Compose([resize, RandomCrop(given.SIZE, given.PADDING)])
    elif given.TRAIN_CROP == "scaled":
        shortest, longest = given.SHORT_SIDE
        resize = RandomShortestSize(range(shortest, longest + 1), interpolation=interpolation)
        steps[0] = Compose([resize, RandomCrop(given.SIZE)])
    if given.COLOR_SHIFT:
        steps.insert(len(steps) - (1 if prefetch else 2), ColorShift(given.COLOR_SHIFT))
    if given.ERASING.PROB:
        erase = RandomErasing(given.ERASING.PROB, mode=given.ERASING.MODE, max_count=given.ERASING.COUNT, device="cpu")
        normalized = not (prefetch or given.NORM_GAMMA_INIT)
        statistics = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
        steps.append(erase if normalized else PixelErasing(erase, *statistics))


def framing(cfg: CfgNode) -> list[Callable[[Image.Image], Image.Image]]:
    """What every image goes through first: INPUT.STRETCH and INPUT.CANVAS."""
    given, steps = cfg.INPUT, []
    if given.STRETCH:
        steps.append(Resize((given.STRETCH, given.STRETCH), str_to_interp_mode(given.INTERPOLATION)))
    if given.CANVAS:
        steps.append(CenterCrop(given.CANVAS))  # which fills up with zeros
    return steps


def frame(steps: list[Callable], cfg: CfgNode, prefetch: bool, erases: bool = False) -> None:
    """Add to the steps of a transform of timm's, of training or evaluation, what INPUT asks of every image.

    Args:
        steps: which end with the tensor, without ``prefetch`` its normalization, and with ``erases`` the erasing.
        cfg: config.
        prefetch: whether the normalization is left to timm's PrefetchLoader.
        erases: whether they do.
    """
    if cfg.INPUT.BINARY_THRESHOLD:
        steps.insert(len(steps) - (1 if prefetch else 2) - erases, Binarize(cfg.INPUT.BINARY_THRESHOLD))
    steps[:0] = framing(cfg)


class Binarize:
    """Makes the values of an image's pixels 255, from a threshold on, or 0.

    Args:
        threshold: from 1 to 255.

    Examples::

        >>> list(Binarize(128)(Image.new("L", (1, 1), 127)).getdata())
        [0]
    """

    def __init__(self, threshold: int):
        self.threshold = threshold

    def __call__(self, image: Image.Image) -> Image.Image:
        """An image of 8 bits a channel."""
        return image.point([255 * (value >= self.threshold) for value in range(256)] * len(image.getbands()))

    def __repr__(self) -> str:
        return f"Binarize({self.threshold})"


class ColorShift:
    """Moves all pixels of an image along the main directions of ImageNet's colours, in each by its standard deviation
    times a number from a normal distribution ("PCA colour augmentation", "lighting").

    Args:
        deviation: of that distribution; Krizhevsky et al. have 0.1.

    Examples::

        >>> ColorShift(0.1)(Image.new("RGB", (4, 3)))
        <PIL.Image.Image image mode=RGB size=4x3 at ...>
    """

    def __init__(self, deviation: float):
        self.deviation = deviation

    def __call__(self, image: Image.Image) -> Image.Image:
        """An RGB image of 8 bits, shifted; what leaves 0..255 is cut."""
        drawn = self.deviation * torch.randn(3).double().numpy()
        shift = 255 * (np.array(_COLOR_DIRECTIONS) @ (drawn * _COLOR_DEVIATIONS))
        pixels = np.asarray(image, np.float32) + shift.astype(np.float32)
        return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))

    def __repr__(self) -> str:
        return f"ColorShift({self.deviation})"


class PixelErasing:
    """timm's random erasing of an image that is not normalized: by what it would put there behind the normalization,
    the mean or noise of standard deviation 1, in the image's own scale. What timm's prefetcher erases on a GPU follows
    from no image's place in the training stream.

    Args:
        erase: timm's, of normalized images.
        mean, std: of the channels, in 0..255.
    """

    def __init__(self, erase: RandomErasing, mean: tuple[float, ...], std: tuple[float, ...]):
        self.erase = erase
        self.mean, self.std = (torch.tensor(each, dtype=torch.float32).view(-1, 1, 1) for each in (mean, std))

    def __call__(self, image: Tensor) -> Tensor:
        """An image (C, H, W), in uint8 or as floating-point numbers in 0..1; bytes are cut to 0..255."""
        is_bytes = image.dtype == torch.uint8
        unit = 1 if is_bytes else 255
        erased = self.erase((image * unit - self.mean) / self.std) * self.std + self.mean
        return erased.round_().clamp_(0, 255).to(torch.uint8) if is_bytes else erased / unit

    def __repr__(self) -> str:
        return f"PixelErasing({self.erase})"


def build_mixup(cfg: CfgNode, num_classes: int) -> Mixup | None:
    """timm's mixup and CutMix, which smooth the labels too, or None where neither is on."""
    given = cfg.INPUT
    if not (given.MIXUP or given.CUTMIX):
        return None
    return Mixup(
        given.MIXUP,
        given.CUTMIX,
        prob=given.MIXUP_PROB,
        switch_prob=given.MIXUP_SWITCH_PROB,
        mode=given.MIXUP_MODE,
        label_smoothing=cfg.SOLVER.LABEL_SMOOTHING,
        num_classes=num_classes,
    )


def switch_mixup(mixup: Mixup | None, cfg: CfgNode, epoch: int) -> None:
    """Turn mixing off from epoch INPUT.MIXUP_OFF_EPOCH on, counted from 0, as timm does; labels are smoothed still."""
    if mixup is not None and cfg.INPUT.MIXUP_OFF_EPOCH:
        mixup.mixup_enabled = epoch < cfg.INPUT.MIXUP_OFF_EPOCH
