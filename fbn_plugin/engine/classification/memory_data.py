"""Small image sets in memory: every image is decoded once, and what is random of timm's transform, its crop and its
flips, is drawn by the batch.

A sample is augmented by numbers that follow from the seed and its position in the training stream alone, one row of
a table for each position. The random resized crop is that of Szegedy et al., "Going Deeper with Convolutions" (2014),
section 6, with the attempts of timm's ``RandomResizedCropAndInterpolation``.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import BatchSampler
from torchvision import transforms
from torchvision.transforms.functional import pil_modes_mapping

from fbn_plugin.engine.data.image_data import Images
from fbn_plugin.engine.run import distributed

__all__ = ["Augmentation", "ImagesInMemory", "MemoryLoader", "batch_augmentation", "fits_memory", "training_stream"]

# What "auto" keeps of one set at most, and how much larger than the model sees it an image may be.
_MOST_BYTES = 2**30
_MOST_ENLARGED = 4

_ATTEMPTS = 10  # of a random resized crop
_TOP, _LEFT, _HFLIP, _VFLIP, _FIRST_ATTEMPT = range(5)  # columns of the table; an attempt takes two
_ROWS = 1024  # positions that are drawn for at once
_AT_ONCE = 2**18  # pixels of batches that are made together

Crop = transforms.RandomCrop | RandomResizedCropAndInterpolation


@dataclass(frozen=True)
class Augmentation:
    """A transform of timm's, taken apart.

    Args:
        fixed: what comes first and does the same each time: PIL image to PIL image.
        size: (height, width) behind the crop.
        crop: the random one, if there is one.
        hflip, vflip: probabilities.
        mean, std: of the channels (C, 1, 1), in 0..1.
    """

    fixed: tuple[Callable[[Image.Image], Image.Image], ...]
    size: tuple[int, int]
    crop: Crop | None
    hflip: float
    vflip: float
    mean: Tensor
    std: Tensor

    @property
    def resizes(self) -> bool:
        """Whether the crop is enlarged or made smaller, which Pillow does image by image."""
        return isinstance(self.crop, RandomResizedCropAndInterpolation)

    @property
    def draws(self) -> int:
        """How many random numbers a sample takes."""
        return _FIRST_ATTEMPT + 2 * _ATTEMPTS * self.resizes

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images (N, C, H, W) as float32, with the very operations of ``ToTensor`` and ``Normalize``."""
        mean, std = (each if each.device == images.device else each.to(images.device) for each in (self.mean, self.std))
        return images.to(torch.float32).div_(255).sub_(mean).div_(std)


def batch_augmentation(transform: Callable) -> Augmentation | None:
    """A transform of timm's (without its prefetcher) as batches can have it; None where it has more than these:
    ``Resize`` and ``CenterCrop``, one random crop, flips, ``ToTensor`` and ``Normalize``, in this order.
    """
    steps = list(_flat(transform))
    if len(steps) < 3 or not isinstance(steps[-2], transforms.ToTensor) or type(steps[-1]) is not transforms.Normalize:
        return None
    *steps, _, normalize = steps
    fixed, crop = [], None
    while steps and type(steps[0]) in (transforms.Resize, transforms.CenterCrop):
        fixed.append(steps.pop(0))
    if steps and _is_known_crop(steps[0]):
        crop = steps.pop(0)
    flips = dict.fromkeys((transforms.RandomHorizontalFlip, transforms.RandomVerticalFlip), 0.0)
    while steps and flips.get(type(steps[0])) == 0:
        flip = steps.pop(0)
        flips[type(flip)] = flip.p
    last = crop or (fixed[-1] if fixed else None)
    if steps or last is None or type(last) is transforms.Resize:  # which leaves the longer side as it is
        return None
    hflip, vflip = flips.values()
    mean, std = (torch.as_tensor(each, dtype=torch.float32).view(-1, 1, 1) for each in (normalize.mean, normalize.std))
    return Augmentation(tuple(fixed), tuple(last.size), crop, hflip, vflip, mean, std)


def _flat(transform: Callable) -> Iterator[Callable]:
    if type(transform) is transforms.Compose:
        for each in transform.transforms:
            yield from _flat(each)
    else:
        yield transform


def _is_known_crop(step: Callable) -> bool:
    if type(step) is transforms.RandomCrop:
        plain = step.padding is None or isinstance(step.padding, int)
        return plain and not step.pad_if_needed and step.fill == 0 and step.padding_mode == "constant"
    return type(step) is RandomResizedCropAndInterpolation and not isinstance(step.interpolation, tuple | list)


class ImagesInMemory:
    """The images of a set, decoded when they are first wanted and kept.

    Args:
        dataset: of ``image_data``.
        augmentation: of the batches.
        seed: of what is random.
    """

    def __init__(self, dataset: Images, augmentation: Augmentation, seed: int = 0):
        self.augmentation = augmentation
        self._dataset = copy.copy(dataset)  # whose transform is this one's own
        self._dataset.transform = self._prepare
        self._samples: list[tuple[np.ndarray | Image.Image, int] | None] = [None] * len(dataset)
        self._draws = _Draws(seed, augmentation.draws)
        self._fill = _fill_resized if augmentation.resizes else _fill_window

    def _prepare(self, image: Image.Image) -> np.ndarray | Image.Image:
        for step in self.augmentation.fixed:
            image = step(image)
        return image if self.augmentation.resizes else _channels_first(np.asarray(image))

    def _load(self, index: int) -> tuple[np.ndarray | Image.Image, int]:
        if not self.augmentation.resizes:
            pixels, label = self._dataset.stored(index)
            if pixels is not None and all(_leaves(step, pixels.shape[:2]) for step in self.augmentation.fixed):
                return _channels_first(pixels), label  # without the way through Pillow, which changes nothing
        return self._dataset[index]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray | Image.Image, int]:
        """One image before its random crop, with its class: uint8 (C, H, W), or Pillow's where crops are resized."""
        sample = self._samples[index]
        if sample is None:
            sample = self._samples[index] = self._load(index)
        return sample

    def batch(self, indices: Sequence[int], positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) in uint8 and class indices (N,).

        Args:
            indices: of the images.
            positions: in the training stream, which with the seed decide on crops and flips.
        """
        samples = [self[index] for index in indices]
        images = np.zeros((len(samples), _channels(samples[0][0]), *self.augmentation.size), np.uint8)
        augmentation = self.augmentation
        for (image, _), out, position in zip(samples, images, positions):
            draws = self._draws.row(position)
            if draws[_HFLIP] < augmentation.hflip:
                out = out[:, :, ::-1]
            if draws[_VFLIP] < augmentation.vflip:
                out = out[:, ::-1]
            self._fill(out, image, augmentation.crop, draws)
        return torch.from_numpy(images), torch.tensor([label for _, label in samples])


class _Draws:
    """Uniform random numbers from 0 to below 1, the same for a seed and a position whatever was asked before.

    Args:
        seed: of all of them.
        columns: numbers for each position.
    """

    def __init__(self, seed: int, columns: int):
        self.seed, self.columns = seed, columns
        self._blocks: dict[int, list[list[float]]] = {}

    def row(self, position: int) -> list[float]:
        """The numbers for one position."""
        number, place = divmod(position, _ROWS)
        block = self._blocks.get(number)
        if block is None:
            if len(self._blocks) > 7:  # positions only grow, if not always in order
                del self._blocks[min(self._blocks)]
            sequence = np.random.SeedSequence(self.seed, spawn_key=(number,))
            drawn = np.random.default_rng(sequence).random((_ROWS, self.columns))
            block = self._blocks[number] = drawn.tolist()  # which are read faster, one by one
        return block[place]


def _leaves(step: transforms.Resize | transforms.CenterCrop, shape: tuple[int, ...]) -> bool:
    """Whether a step gives images of a shape, (height, width), as they are."""
    return min(shape) == step.size if isinstance(step.size, int) else shape == tuple(step.size)


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None])


def _fill_window(out: np.ndarray, image: np.ndarray, crop: transforms.RandomCrop | None, draws: list[float]) -> None:
    """Write a window of the padded image."""
    if crop is None:
        out[...] = image
        return
    padding = crop.padding or 0
    (_, height, width), (_, high, wide) = out.shape, image.shape
    y = int(draws[_TOP] * (high + 2 * padding - height + 1)) - padding  # of the window in the image
    x = int(draws[_LEFT] * (wide + 2 * padding - width + 1)) - padding
    top, left = max(y, 0), max(x, 0)
    bottom, right = max(top, min(y + height, high)), max(left, min(x + width, wide))
    out[:, top - y : bottom - y, left - x : right - x] = image[:, top:bottom, left:right]


def _fill_resized(
    out: np.ndarray, image: Image.Image, crop: RandomResizedCropAndInterpolation, draws: list[float]
) -> None:
    """Write a part of the image, resized."""
    top, left, height, width = _resized_crop(image.height, image.width, crop.scale, crop.ratio, draws)
    part = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(part.resize(out.shape[:0:-1], pil_modes_mapping[crop.interpolation]))
    out[...] = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels


def _resized_crop(
    height: int, width: int, scale: Sequence[float], ratio: Sequence[float], draws: Sequence[float]
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop whose share of the area is uniform in ``scale`` and whose ratio of width to
    height is so in ``ratio`` by its logarithm; the first of ten attempts that lies within the image, else its centre.
    """
    lowest, highest = math.log(ratio[0]), math.log(ratio[1])
    attempts = iter(draws[_FIRST_ATTEMPT:])
    for share, shape in zip(attempts, attempts):
        area = height * width * (scale[0] + share * (scale[1] - scale[0]))
        aspect = math.exp(lowest + shape * (highest - lowest))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w <= width and h <= height:
            return int(draws[_TOP] * (height - h + 1)), int(draws[_LEFT] * (width - w + 1)), h, w
    h = min(height, round(width / ratio[0]))
    w = min(width, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def fits_memory(images: ImagesInMemory) -> bool:
    """Whether the set is small: its images as the model sees them, and as some of them are kept, take no more than
    1 GiB, and these are not many times as large as those. All processes of a run say the same.
    """
    count, pixels = len(images), math.prod(images.augmentation.size)
    if count * pixels > _MOST_BYTES:
        return False
    kept = [images[index][0] for index in range(0, count, max(1, count // 8))]
    seen = _channels(kept[0]) * pixels
    mean = sum(_channels(image) * _pixels(image) for image in kept) / len(kept)
    return mean <= _MOST_ENLARGED * seen and count * max(mean, seen) <= _MOST_BYTES


def _channels(image: np.ndarray | Image.Image) -> int:
    return len(image) if isinstance(image, np.ndarray) else len(image.getbands())


def _pixels(image: np.ndarray | Image.Image) -> int:
    return math.prod(image.shape[1:] if isinstance(image, np.ndarray) else image.size)


def training_stream(
    images: ImagesInMemory, batches: Iterable[Sequence[tuple[int, int]]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalized images (N, C, H, W) and class indices (N,), on ``device``.

    Small batches are made several at a time: one by one, with the caches full of a model's weights and activations,
    they would take three times as long.

    Args:
        images: the training set.
        batches: lists of (index, position), see ``loaders.training_batches``.
        device: where images are normalized.
    """
    batches = iter(batches)
    while True:
        first = next(batches)
        some = max(1, _AT_ONCE // (len(first) * math.prod(images.augmentation.size)))
        together = [first, *itertools.islice(batches, some - 1)]
        made = _on_device(images, *zip(*itertools.chain(*together)), device)
        yield from zip(*(each.split([len(batch) for batch in together]) for each in made))


class MemoryLoader:
    """This process's share of a set to evaluate on, in order, like timm's loader: the last ones are repeated where
    processes would not get equally many.

    Args:
        images: the set; its augmentation has nothing random.
        batch_size: of this process.
        device: where images are normalized.
    """

    def __init__(self, images: ImagesInMemory, batch_size: int, device: torch.device):
        self.dataset, self.device = images, device
        sampler = OrderedDistributedSampler(images, distributed.world_size(), distributed.rank())
        self.batch_sampler = BatchSampler(sampler, batch_size, drop_last=False)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in self.batch_sampler:
            yield _on_device(self.dataset, indices, [0] * len(indices), self.device)


def _on_device(
    images: ImagesInMemory, indices: Sequence[int], positions: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    pixels, targets = images.batch(indices, positions)
    if device.type == "cuda":
        pixels, targets = (each.pin_memory().to(device, non_blocking=True) for each in (pixels, targets))
    return images.augmentation.normalize(pixels), targets
