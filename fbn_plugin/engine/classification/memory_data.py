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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import BatchSampler
from torchvision import transforms
from torchvision.transforms.functional import pil_modes_mapping

from fbn_plugin.engine.classification.augmentation import Binarize
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

Item = TypeVar("Item")
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
        threshold: from which on a value of a pixel is 255 and below which 0; 0 leaves it.
    """

    fixed: tuple[Callable[[Image.Image], Image.Image], ...]
    size: tuple[int, int]
    crop: Crop | None
    hflip: float
    vflip: float
    mean: Tensor
    std: Tensor
    threshold: int = 0

    @property
    def resizes(self) -> bool:
        """Whether the crop is enlarged or made smaller, which Pillow does image by image."""
        return isinstance(self.crop, RandomResizedCropAndInterpolation)

    @property
    def draws(self) -> int:
        """How many random numbers a sample takes."""
        return _FIRST_ATTEMPT + 2 * _ATTEMPTS * self.resizes

    def prepare(self, image: Image.Image) -> np.ndarray | Image.Image:
        """An image before its random crop: uint8 (C, H, W), or Pillow's where crops are resized."""
        for step in self.fixed:
            image = step(image)
        return image if self.resizes else _channels_first(np.asarray(image))

    def leaves(self, shape: tuple[int, int]) -> bool:
        """Whether images of a shape, (height, width), are kept as arrays that have the same pixels."""
        sizes = (step.size for step in self.fixed)
        unchanged = (min(shape) == size if isinstance(size, int) else shape == tuple(size) for size in sizes)
        return not self.resizes and all(unchanged)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images (N, C, H, W) as float32, with the very operations of ``ToTensor`` and ``Normalize``."""
        mean, std = (each if each.device == images.device else each.to(images.device) for each in (self.mean, self.std))
        if self.threshold:
            return images.ge(self.threshold).to(torch.float32).sub_(mean).div_(std)
        return images.to(torch.float32).div_(255).sub_(mean).div_(std)


def batch_augmentation(transform: Callable) -> Augmentation | None:
    """A transform of timm's (without its prefetcher) as batches can have it; None where it has more than these:
    ``Resize`` and ``CenterCrop``, one random crop, flips, ``Binarize``, ``ToTensor`` and ``Normalize``, in this order.
    """
    steps = list(_flat(transform))
    if len(steps) < 3 or not isinstance(steps[-2], transforms.ToTensor) or type(steps[-1]) is not transforms.Normalize:
        return None
    *steps, _, normalize = steps
    threshold = steps.pop().threshold if steps and isinstance(steps[-1], Binarize) else 0
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
    return Augmentation(tuple(fixed), tuple(last.size), crop, hflip, vflip, mean, std, threshold)


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
    """The images of a set, decoded when they are first wanted and kept: those of one shape in one array, of which a
    batch is a copy; Pillow's and those of other shapes one by one.

    Args:
        dataset: of ``image_data``.
        augmentation: of the batches.
        seed: of what is random.
    """

    def __init__(self, dataset: Images, augmentation: Augmentation, seed: int = 0):
        self.augmentation = augmentation
        self._dataset = copy.copy(dataset)  # whose transform is this one's own
        self._dataset.transform = augmentation.prepare
        self._is_kept, self._labels = np.zeros(len(dataset), bool), np.zeros(len(dataset), np.int64)
        self._pixels: np.ndarray | None = None  # (images, C, H, W)
        self._others: dict[int, np.ndarray | Image.Image] = {}
        self._draws = _Draws(seed, augmentation.draws)
        self._left_alone: dict[tuple[int, int], bool] = {}

    def _load(self, index: int) -> tuple[np.ndarray | Image.Image, int]:
        pixels, label = self._dataset.stored(index)
        if pixels is not None:
            shape = pixels.shape[:2]
            if shape not in self._left_alone:
                self._left_alone[shape] = self.augmentation.leaves(shape)
            if self._left_alone[shape]:
                return _channels_first(pixels), label  # without the way through Pillow, which changes nothing
        return self._dataset[index]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray | Image.Image, int]:
        """One image, see ``Augmentation.prepare``, with its class."""
        if not self._is_kept[index]:
            self._keep(index)
        image = self._others.get(index)
        return self._pixels[index] if image is None else image, int(self._labels[index])

    def _keep(self, index: int) -> None:
        image, self._labels[index] = self._load(index)
        if self._pixels is None and not self.augmentation.resizes and len(self) * image.nbytes <= 4 * _MOST_BYTES:
            self._pixels = np.empty((len(self), *image.shape), np.uint8)  # takes memory where it is written to
        if self._pixels is not None and image.shape == self._pixels.shape[1:]:
            self._pixels[index] = image
        else:
            self._others[index] = image
        self._is_kept[index] = True

    def batch(self, indices: Sequence[int], positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) in uint8 and class indices (N,).

        Args:
            indices: of the images.
            positions: in the training stream, which with the seed decide on crops and flips.
        """
        chosen = np.asarray(indices)
        for index in chosen[~self._is_kept[chosen]].tolist():
            self[index]
        draws = self._draws.rows(positions)
        images = self._cropped(chosen, draws)
        for column, chance, axis in ((_HFLIP, self.augmentation.hflip, 3), (_VFLIP, self.augmentation.vflip, 2)):
            if chance:
                flipped = draws[:, column] < chance
                images[flipped] = np.flip(images[flipped], axis)
        return torch.from_numpy(images), torch.from_numpy(self._labels[chosen])

    def _cropped(self, chosen: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """uint8 (N, C, H, W)."""
        crop, size = self.augmentation.crop, self.augmentation.size
        if not self._others:
            return _windows(self._pixels[chosen], crop, size, draws)
        kept = [self[index][0] for index in chosen.tolist()]
        if self.augmentation.resizes:
            return np.stack([_resized_part(image, crop, size, row) for image, row in zip(kept, draws.tolist())])
        shapes = [image.shape for image in kept]
        images = np.empty((len(kept), len(kept[0]), *size), np.uint8)
        for shape in set(shapes):
            places = [place for place, each in enumerate(shapes) if each == shape]
            images[places] = _windows(np.stack([kept[place] for place in places]), crop, size, draws[places])
        return images


class _Draws:
    """Uniform random numbers from 0 to below 1, the same for a seed and a position whatever was asked before.

    Args:
        seed: of all of them.
        columns: numbers for each position.
    """

    def __init__(self, seed: int, columns: int):
        self.seed, self.columns = seed, columns
        self._blocks: dict[int, np.ndarray] = {}

    def rows(self, positions: Sequence[int]) -> np.ndarray:
        """The numbers (N, columns) for each of N positions."""
        numbers, places = np.divmod(positions, _ROWS)
        rows = np.empty((len(places), self.columns))
        for number in set(numbers.tolist()):
            own = numbers == number
            rows[own] = self._block(number)[places[own]]
        return rows

    def _block(self, number: int) -> np.ndarray:
        block = self._blocks.get(number)
        if block is None:
            if len(self._blocks) > 7:  # positions only grow, if not always in order
                del self._blocks[min(self._blocks)]
            sequence = np.random.SeedSequence(self.seed, spawn_key=(number,))
            block = self._blocks[number] = np.random.default_rng(sequence).random((_ROWS, self.columns))
        return block


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)) if pixels.ndim == 3 else pixels[None]


def _windows(
    whole: np.ndarray, crop: transforms.RandomCrop | None, size: tuple[int, int], draws: np.ndarray
) -> np.ndarray:
    """A window (C, H, W) of each padded image of (N, C, H, W)."""
    if crop is None:
        return whole
    height, width = whole.shape[2:]
    if padding := crop.padding or 0:
        height, width = height + 2 * padding, width + 2 * padding
        padded = np.zeros((*whole.shape[:2], height, width), np.uint8)
        padded[:, :, padding:-padding, padding:-padding] = whole
        whole = padded
    tops = (draws[:, _TOP] * (height - size[0] + 1)).astype(int)
    lefts = (draws[:, _LEFT] * (width - size[1] + 1)).astype(int)
    every = np.lib.stride_tricks.sliding_window_view(whole, size, (2, 3))
    return every[np.arange(len(whole)), :, tops, lefts]


def _resized_part(
    image: Image.Image, crop: RandomResizedCropAndInterpolation, size: tuple[int, int], draws: Sequence[float]
) -> np.ndarray:
    """A part of the image, resized, (C, H, W)."""
    top, left, height, width = _resized_crop(image.height, image.width, crop.scale, crop.ratio, draws)
    part = image.crop((left, top, left + width, top + height))
    return _channels_first(np.asarray(part.resize(size[::-1], pil_modes_mapping[crop.interpolation])))


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
    made = _made_together(images, batches)
    for (pixels, targets), sizes in made if device.type == "cpu" else _one_ahead(made):
        several = _on_device(images, pixels, targets, device)
        yield from zip(*(each.split(sizes) for each in several))


def _made_together(
    images: ImagesInMemory, batches: Iterable[Sequence[tuple[int, int]]]
) -> Iterator[tuple[tuple[Tensor, Tensor], list[int]]]:
    """Several batches as one, and their sizes."""
    batches = iter(batches)
    for first in batches:
        number = max(1, _AT_ONCE // (len(first) * math.prod(images.augmentation.size)))
        several = [first, *itertools.islice(batches, number - 1)]
        yield images.batch(*zip(*itertools.chain(*several))), [len(batch) for batch in several]


def _one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same, each made by a thread while the one before it is in use: a GPU leaves the CPU the time."""
    with ThreadPoolExecutor(1, "images") as pool:
        following = pool.submit(next, items, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield item


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
            yield _on_device(self.dataset, *self.dataset.batch(indices, [0] * len(indices)), self.device)


def _on_device(images: ImagesInMemory, pixels: Tensor, targets: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    if device.type == "cuda":
        pixels, targets = pixels.pin_memory(), targets.pin_memory()
    pixels, targets = (each.to(device, non_blocking=True) for each in (pixels, targets))
    return images.augmentation.normalize(pixels), targets
