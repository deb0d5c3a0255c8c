"""Batches with equally many images of every class, and inference in them with a batch's own moments.

A network that was trained on balanced batches learns to expect one image of each class, and in inference with the
batch's own moments rules out the classes that other images have taken. Source: Hajaj and Gillies, "Batch Normalization
and the impact of batch structure on the behavior of deep convolution networks" (2018). Who balances test batches by the
test labels gets *conditional* results: they say what the network can do that knows the batch's structure, not what it
can do with unlabelled images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from fbn_plugin.training.evaluation_modes import batch_moments, device_of, evaluation_mode

_CHUNK = 1 << 16  # indices that are made at a time


def _labels_of(source: Dataset | Sequence[int]) -> np.ndarray:
    """The labels of a dataset that has them as an attribute, or ``source`` itself."""
    if isinstance(source, Subset):
        return _labels_of(source.dataset)[np.asarray(source.indices, dtype=np.int64)]
    for name in ("targets", "labels"):
        if isinstance(source, Dataset) and hasattr(source, name):
            labels = _labels_of(getattr(source, name))
            if len(labels) != len(source):
                raise ValueError(f"the dataset has {len(source)} images, but {len(labels)} {name}")
            return labels
    if isinstance(source, Dataset):
        raise ValueError(f"{type(source).__name__} has neither 'targets' nor 'labels': pass its labels instead")
    return source.cpu().numpy() if isinstance(source, Tensor) else np.asarray(source)


def _check_labels(labels: np.ndarray, num_classes: int | None) -> np.ndarray:
    """The labels in the narrowest type, which NumPy sorts fastest."""
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"labels must be one class index for each image, got an array of shape {labels.shape}")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0:
        raise ValueError(f"labels must not be negative, got {lowest} at position {int(labels.argmin())}")
    if num_classes is not None and highest >= num_classes:
        raise ValueError(f"labels must be below num_classes {num_classes}, got {highest}")
    if highest >= len(labels):  # before an array of this length is made
        raise ValueError(f"{len(labels)} labels cannot have an image of every class up to {highest}")
    return labels.astype(np.min_scalar_type(highest), copy=False)


class BalancedBatchSampler(Sampler[list[int]]):
    """Batches of ``images_per_class`` images of every class, in random order (Hajaj and Gillies 2018, section 2.2).

    For ``DataLoader(dataset, batch_sampler=...)``. Call :meth:`set_epoch` before each epoch: order and companions are a
    pure function of seed and epoch, the same in every process.

    Args:
        labels: class index of each image, from 0, as a sequence, array or tensor; or a dataset with ``targets`` or
            ``labels``, or a ``Subset`` of one.
        images_per_class: k; the paper has 1.
        uneven: what to do if the classes have unequally many images. ``"drop"`` ends the epoch where the smallest class
            has no k images left, so no image comes twice and some, others in each epoch, do not come at all.
            ``"cycle"`` ends where the largest class is through, so every image comes at least once, and smaller classes
            start over (an image comes twice in a batch only if its class has fewer than k).
        shuffle: False gives the images of a class in the dataset's order, and the classes of a batch in theirs.
        seed: of the order, at least 0.
        num_replicas, rank: processes, and this one's number; by default those of ``torch.distributed``, if it is
            initialized. Every process has the same number of batches, each of them balanced; ``"drop"`` rounds that
            number down and ``"cycle"`` up.
        num_classes: if given, every class below it must have an image; by default every class up to the highest label.

    Raises:
        ValueError: labels that are none, a class without an image, with ``"drop"`` a class with too few images for one
            batch of each process, or an option out of range.

    Examples::

        >>> labels = [0, 0, 1, 1, 2, 2]
        >>> batches = list(fbn_plugin.BalancedBatchSampler(labels))
        >>> [sorted(labels[i] for i in batch) for batch in batches]
        [[0, 1, 2], [0, 1, 2]]
    """

    def __init__(
        self,
        labels: Dataset | Sequence[int],
        images_per_class: int = 1,
        uneven: str = "drop",
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self.num_replicas = num_replicas if num_replicas is not None else dist.get_world_size() if joined else 1
        self.rank = rank if rank is not None else dist.get_rank() if joined else 0
        for name, value, least in (
            ("images_per_class", images_per_class, 1),
            ("seed", seed, 0),
            ("num_replicas", self.num_replicas, 1),
            ("rank", self.rank, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.rank >= self.num_replicas:
            raise ValueError(f"rank must be below num_replicas {self.num_replicas}, got {self.rank}")
        if uneven not in ("drop", "cycle"):
            raise ValueError(f"uneven must be 'drop' or 'cycle', got {uneven!r}")

        self.labels = _check_labels(_labels_of(labels), num_classes)
        self.counts = np.bincount(self.labels, minlength=num_classes or 0)
        least = int(self.counts.argmin())
        if self.counts[least] == 0:
            raise ValueError(f"class {least} has no image: a balanced batch needs {images_per_class} of each class")
        step = images_per_class * self.num_replicas  # images of a class that all processes take together
        if uneven == "drop":
            self.num_batches = int(self.counts[least]) // step
        else:
            self.num_batches = -(-int(self.counts.max()) // step)
        if self.num_batches == 0:
            raise ValueError(
                f"class {least} has {self.counts[least]} images, but {self.num_replicas} balanced batches need {step}; "
                "lower images_per_class or let short classes 'cycle'"
            )
        self.images_per_class, self.shuffle, self.seed, self.epoch = images_per_class, shuffle, seed, 0
        self.batch_size = images_per_class * len(self.counts)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.shuffle:
            order = rng.permutation(len(self.labels))
            order = order[np.argsort(self.labels[order], kind="stable")]
        else:
            order = np.argsort(self.labels, kind="stable")
        # Class c is order[start : start + count]; batch b takes k places of it from (b * num_replicas + rank) * k on.
        start = (np.cumsum(self.counts) - self.counts)[:, None]
        places = np.arange(self.images_per_class)
        chunk = max(1, _CHUNK // self.batch_size)
        for first in range(0, self.num_batches, chunk):
            batches = np.arange(first, min(first + chunk, self.num_batches))
            taken = (batches * self.num_replicas + self.rank)[:, None, None] * self.images_per_class + places
            indices = order[start + taken % self.counts[:, None]].reshape(len(batches), -1)
            if self.shuffle:
                indices = rng.permuted(indices, axis=1)
            yield from indices.tolist()


@dataclass(frozen=True)
class BalancedResult:
    """What a classifier predicts in batches that were balanced by some labels.

    Args:
        predictions: ``(N,)`` class indices, in the dataset's order.
        accuracy: share of them that is right, in percent; None if that was not asked for.
        conditional: whether the test labels decided which images came together.
    """

    predictions: Tensor
    accuracy: float | None
    conditional: bool

    def __str__(self) -> str:
        accuracy = "accuracy not measured" if self.accuracy is None else f"accuracy {self.accuracy:.2f} %"
        return accuracy + " (conditional: the test labels balanced the batches)" * self.conditional


def _percent_right(predictions: Tensor, labels: np.ndarray) -> float:
    return 100 * float(np.mean(predictions.numpy() == labels))


@torch.no_grad()
def _predict(
    model: nn.Module,
    crops: Dataset | Sequence[Dataset],
    labels: np.ndarray,
    images_per_class: int,
    spread_crops: bool,
    epoch: int,
    **loader_options,
) -> Tensor:
    """Class indices ``(N,)`` by the class probabilities that a balanced batch's own moments give, averaged over crops.

    Each of ``crops`` is the whole dataset, seen through another crop; with ``spread_crops`` it has batches of its own.
    """
    crops = [crops] if isinstance(crops, Dataset) else list(crops)
    for crop in crops:
        if len(crop) != len(labels):
            raise ValueError(f"the dataset has {len(crop)} images, but there are {len(labels)} labels")
    sampler = BalancedBatchSampler(labels, images_per_class, uneven="cycle", num_replicas=1, rank=0)
    device = device_of(model)
    total = None
    with evaluation_mode(model), batch_moments(model):
        for number, crop in enumerate(crops):
            sampler.set_epoch(epoch * len(crops) + number * spread_crops)
            batches = list(sampler)
            seen = torch.zeros(len(labels), dtype=torch.bool)
            for indices, batch in zip(batches, DataLoader(crop, batch_sampler=batches, **loader_options)):
                images = batch[0] if isinstance(batch, (tuple, list)) else batch
                scores = model(images.to(device)).softmax(dim=1).double().cpu()
                if total is None:
                    total = scores.new_zeros(len(labels), scores.shape[1])
                indices = torch.tensor(indices)
                new = ~seen[indices]
                seen[indices] = True
                total[indices[new]] += scores[new]
    return total.argmax(dim=1)


def evaluate_balanced(
    model: nn.Module,
    crops: Dataset | Sequence[Dataset],
    labels: Sequence[int] | None = None,
    images_per_class: int = 1,
    spread_crops: bool = True,
    **loader_options,
) -> BalancedResult:
    """Classify a test set in balanced batches by the batch's own moments (Hajaj and Gillies 2018, tables 2, 3 and 5).

    The result is *conditional*: the test labels decide which images come together. Every image is predicted; where
    classes are uneven, images of the smaller ones come again as company, and their first prediction counts.

    Args:
        model: images ``(B, ...)`` to logits ``(B, classes)``; run on its own device in evaluation mode, left as it was.
        crops: a dataset of images, or of tuples whose first entry is the image; or several, each giving one crop of the
            same images in the same order, whose class probabilities are averaged.
        labels: ``(N,)`` the true classes; by default the dataset's ``targets`` or ``labels``.
        images_per_class: of a batch.
        spread_crops: shuffle anew for each crop, so that an image's crops meet different images (section 3.3, table 5);
            False keeps the same images together through all crops (table 3).
        **loader_options: for ``DataLoader``, such as ``num_workers``.

    Raises:
        ValueError: labels of another length than the dataset, or that :class:`BalancedBatchSampler` refuses.

    Examples::

        >>> images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 0, 1, 0, 1])
        >>> data = torch.utils.data.TensorDataset(images, labels)
        >>> layers = nn.Conv2d(3, 2, 3), fbn_plugin.FilteredBatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        >>> model = nn.Sequential(*layers)
        >>> result = fbn_plugin.evaluate_balanced(model, data, labels)
        >>> result.predictions.shape, result.conditional
        (torch.Size([6]), True)
    """
    labels = _labels_of(labels if labels is not None else crops if isinstance(crops, Dataset) else crops[0])
    predictions = _predict(model, crops, labels, images_per_class, spread_crops, 0, **loader_options)
    return BalancedResult(predictions, _percent_right(predictions, labels), conditional=True)


def self_label(
    model: nn.Module,
    crops: Dataset | Sequence[Dataset],
    predictions: Sequence[int],
    rounds: int = 20,
    labels: Sequence[int] | None = None,
    images_per_class: int = 1,
    spread_crops: bool = True,
    **loader_options,
) -> list[BalancedResult]:
    """Balance the test batches by predictions, predict again, and so on (Hajaj and Gillies 2018, section 5, figure 6).

    No test label decides which images come together, so the results are not conditional, as long as ``predictions`` are
    not: start from standard inference. The paper found no gain.

    Args:
        model, crops, images_per_class, spread_crops: as in :func:`evaluate_balanced`.
        **loader_options: as in :func:`evaluate_balanced`.
        predictions: ``(N,)`` classes by which the first round is balanced. A class that no image is predicted to have
            is left out of that round's batches.
        rounds: how often to relabel; the paper has 20.
        labels: ``(N,)`` the true classes, to measure the accuracy of each round and nothing else.

    Returns:
        The result of each round.

    Raises:
        ValueError: predictions or labels of another length than the dataset, or ``rounds`` below 1.

    Examples::

        >>> data = torch.utils.data.TensorDataset(torch.randn(6, 3, 8, 8))
        >>> layers = nn.Conv2d(3, 2, 3), fbn_plugin.FilteredBatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        >>> model = nn.Sequential(*layers)
        >>> results = fbn_plugin.self_label(model, data, predictions=[0, 1, 0, 1, 0, 1], rounds=2)
        >>> len(results), results[-1].conditional
        (2, False)
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    predictions = _check_labels(_labels_of(predictions), None)
    truth = None if labels is None else _labels_of(labels)
    if truth is not None and truth.shape != predictions.shape:
        raise ValueError(f"there are {len(predictions)} predictions, but labels of shape {truth.shape}")
    results = []
    for number in range(rounds):
        groups = np.unique(predictions, return_inverse=True)[1]
        predictions = _predict(model, crops, groups, images_per_class, spread_crops, number, **loader_options)
        accuracy = None if truth is None else _percent_right(predictions, truth)
        results.append(BalancedResult(predictions, accuracy, conditional=False))
    return results
