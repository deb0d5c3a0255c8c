"""Training order and augmentation randomness as pure functions of (seed, position in the training stream).

Nothing depends on worker processes or on how often a run was interrupted: a resumed run sees the same samples,
augmented the same way, as one that was never stopped.
"""

import contextlib
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterator, Sequence

import numpy as np
from torch.utils.data import Dataset, Sampler, get_worker_info

from fbn_plugin.engine.run.seeding import generators_kept, seed_sample
from fbn_plugin.training.balanced_batches import BalancedBatchSampler

__all__ = [
    "AlternatingBatchSampler",
    "BalancedSampler",
    "GroupedBatchSampler",
    "InfiniteSampler",
    "RepeatFactorSampler",
    "SeededDataset",
    "repeat_factors",
]


class InfiniteSampler(Sampler):
    """An endless stream of ``(index, position)``, one fresh permutation an epoch, dealt out to processes in turn.

    Position p of the stream belongs to rank ``p % world_size``, so the batches of a run are the same images whatever
    the number of processes that share them.

    Args:
        size: number of samples in the dataset.
        seed: of the permutations.
        start: the first of this rank's samples to give, counted from 0: ``iteration * batch_size`` resumes at
            ``iteration``.
        shuffle: False for 0, 1, 2, ... over and over.
        repeats: how often each sample comes in a row, to be augmented otherwise each time (Hoffer et al., "Augment your
            batch", 2020); the next permutation begins when all samples have come so often. timm's RepeatAugSampler has
            the same rows, but leaves off a permutation after as many positions as there are samples.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        shuffle: bool = True,
        repeats: int = 1,
    ):
        if size < 1:
            raise ValueError(f"a sampler needs at least one sample, got size {size}")
        self.size = size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start
        self.shuffle = shuffle
        self.repeats = repeats

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, order = None, None
        for position in itertools.count(self.rank + self.start * self.world_size, self.world_size):
            number = position // self.repeats
            if number // self.size != epoch:
                epoch = number // self.size
                generator = np.random.default_rng([self.seed, epoch])
                order = generator.permutation(self.size) if self.shuffle else np.arange(self.size)
            yield int(order[number % self.size]), position


def repeat_factors(categories: Sequence[Collection[Hashable]], threshold: float, sqrt: bool = True) -> np.ndarray:
    """How often an epoch should have each image so that rare categories are seen more often: the largest
    ``max(1, sqrt(threshold / frequency))`` of its categories, where a frequency is the share of images that have a
    category (Gupta et al., "LVIS", 2019, appendix B.2; detectron2's RepeatFactorTrainingSampler).

    Args:
        categories: of each image.
        threshold: frequency below which images are repeated.
        sqrt: False leaves out the square root.

    Returns:
        factors (N), 1 or more; 1 for an image without categories.
    """
    count = Counter(category for each in categories for category in set(each))
    factor = {category: max(1.0, threshold * len(categories) / number) for category, number in count.items()}
    if sqrt:
        factor = {category: math.sqrt(value) for category, value in factor.items()}
    return np.array([max((factor[category] for category in each), default=1.0) for each in categories])


class RepeatFactorSampler(Sampler):
    """An endless stream of ``(index, position)``, as InfiniteSampler's, whose epochs have each image as often as its
    factor says: the whole part always, once more with the probability of the rest.

    Args:
        factors: of each image, see ``repeat_factors``.
        seed: of the order.
        start: as InfiniteSampler's.
    """

    def __init__(self, factors: np.ndarray, seed: int, rank: int = 0, world_size: int = 1, start: int = 0):
        self.factors = factors
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position, begins = self.rank + self.start * self.world_size, 0
        for epoch in itertools.count():
            generator = np.random.default_rng([self.seed, epoch])
            whole = np.floor(self.factors)
            times = whole + (generator.random(len(whole)) < self.factors - whole)
            size = int(times.sum())
            if position < begins + size:  # an epoch that a resumed run has behind it needs no order
                order = generator.permutation(np.repeat(np.arange(len(times)), times.astype(int)))
                while position < begins + size:
                    yield int(order[position - begins]), position
                    position += self.world_size
            begins += size


class BalancedSampler(Sampler):
    """An endless stream of ``(index, position)``, as InfiniteSampler's, whose batches hold equally many images of every
    class; classes with fewer images start over within an epoch.

    Args:
        labels: the class of each sample of the dataset, or a dataset that has them.
        images_per_class: in a batch of one process; the batch size is that times the number of classes.
        seed: of the order.
        start: batches to pass over, to resume at that iteration.

    Raises:
        ValueError: see :class:`fbn_plugin.BalancedBatchSampler`.
    """

    def __init__(self, labels, images_per_class: int, seed: int, rank: int = 0, world_size: int = 1, start: int = 0):
        self.batches = BalancedBatchSampler(
            labels, images_per_class, uneven="cycle", seed=seed, num_replicas=world_size, rank=rank
        )
        self.start = start

    @property
    def batch_size(self) -> int:
        """Images in a batch of one process."""
        return self.batches.images_per_class * len(self.batches.counts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first, skip = divmod(self.start, len(self.batches))
        number = self.start * self.batches.num_replicas + self.batches.rank
        for epoch in itertools.count(first):
            self.batches.set_epoch(epoch)
            for batch in itertools.islice(self.batches, skip, None):
                for place, index in enumerate(batch):
                    yield int(index), number * len(batch) + place
                number += self.batches.num_replicas
            skip = 0


class AlternatingBatchSampler(Sampler):
    """Batches of several streams in turn: the first batch of each, the second of each, and so on.

    Args:
        samplers: endless ones.
        batch_size: samples in a batch.
    """

    def __init__(self, samplers: Sequence[Sampler], batch_size: int):
        self.samplers = samplers
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for stream in itertools.cycle([iter(sampler) for sampler in self.samplers]):
            yield list(itertools.islice(stream, self.batch_size))


class GroupedBatchSampler(Sampler):
    """Batches whose samples belong to one group (say, landscape or portrait images), in the order in which they fill
    up.

    Args:
        sampler: an InfiniteSampler or RepeatFactorSampler that starts at 0.
        groups: the group of each sample of the dataset.
        batch_size: samples in a batch.
        skip: batches to pass over, to resume at that iteration.
    """

    def __init__(self, sampler: Sampler, groups: Sequence[int], batch_size: int, skip: int = 0):
        self.sampler = sampler
        self.groups = groups
        self.batch_size = batch_size
        self.skip = skip

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.islice(self._batches(), self.skip, None)

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        waiting = defaultdict(list)
        for index, position in self.sampler:
            batch = waiting[self.groups[index]]
            batch.append((index, position))
            if len(batch) == self.batch_size:
                yield batch.copy()
                batch.clear()


class SeededDataset(Dataset):
    """A dataset indexed by InfiniteSampler's ``(index, position)``; its augmentation is drawn from (seed, position).

    The global generators are as before after each sample, or batch of them; but not in a worker process of a loader,
    where nobody else draws.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int]):
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> list:
        """The samples of a batch, which DataLoader asks for at once: saving states takes longer than seeding."""
        with generators_kept() if get_worker_info() is None else contextlib.nullcontext():
            return [self._sample(*item) for item in items]

    def _sample(self, index: int, position: int):
        seed_sample(self.seed, position)
        return self.dataset[index]
