"""Which samples of a set are held out or left out, class by class: parts that follow from the labels and a seed alone,
the same with every version of NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["held_out_by_class", "subset_by_class"]

_HOLD_OUT, _SUBSET = 0, 1  # two draws with one seed have nothing to do with one another


def held_out_by_class(labels: Sequence[int], share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Part a set in two by taking a share of each class out of it.

    Of a class of n samples ``share`` * n are taken, rounded, but one or more, so that both parts have every class; a
    class of one sample stays as it is.

    Args:
        labels: class index of each sample (N).
        share: between 0 and 1.
        seed: of the draw, 0 or more.

    Returns:
        indices of the samples that stay, and of those that are taken, in increasing order.

    Examples::

        >>> stay, taken = held_out_by_class([0, 1] * 10, 0.2, seed=0)
        >>> len(stay), [index % 2 for index in taken.tolist()].count(0)
        (16, 2)
    """
    counts = {
        label: 0 if number == 1 else min(max(1, round(share * number)), number - 1)
        for label, number in _class_sizes(labels).items()
    }
    taken = _first_of_each(labels, counts, seed, _HOLD_OUT)
    return np.setdiff1d(np.arange(len(labels)), taken), taken


def subset_by_class(labels: Sequence[int], count: int, seed: int) -> np.ndarray:
    """Draw so many samples that every class has the share of them that it has of all, to one sample; a class has one or
    more where ``count`` is that of the classes or more. A larger subset holds the smaller ones, but for that rounding.

    Args:
        labels: class index of each sample (N).
        count: from 1 to N.
        seed: of the draw, 0 or more.

    Returns:
        indices (``count``), in increasing order.

    Examples::

        >>> [index % 2 for index in subset_by_class([0, 1] * 10, 6, seed=0).tolist()].count(0)
        3
    """
    return _first_of_each(labels, _apportioned(_class_sizes(labels), count), seed, _SUBSET)


def _class_sizes(labels: Sequence[int]) -> dict[int, int]:
    values, counts = np.unique(np.asarray(labels), return_counts=True)
    return dict(zip(values.tolist(), counts.tolist()))


def _apportioned(sizes: dict[int, int], count: int) -> dict[int, int]:
    """Shares of ``count`` in whole numbers: by the largest remainders, with one for each if there are enough."""
    total = sum(sizes.values())
    exact = {label: count * size / total for label, size in sizes.items()}
    least = 1 if count >= len(sizes) else 0
    counts = {label: max(least, int(share)) for label, share in exact.items()}
    while (left := count - sum(counts.values())) > 0:
        for label in sorted(exact, key=lambda label: counts[label] - exact[label])[:left]:
            counts[label] += counts[label] < sizes[label]
    while sum(counts.values()) > count:
        above_least = (label for label in counts if counts[label] > least)
        counts[max(above_least, key=lambda label: counts[label] - exact[label])] -= 1
    return counts


def _first_of_each(labels: Sequence[int], counts: dict[int, int], seed: int, purpose: int) -> np.ndarray:
    """Indices of the first ``counts[label]`` samples of each class, in an order drawn for the class."""
    labels = np.asarray(labels)
    taken = []
    for label, number in counts.items():
        members = np.flatnonzero(labels == label)
        # Raw bits, as how NumPy makes a permutation of them may change with its version.
        bits = np.random.PCG64(np.random.SeedSequence([seed, purpose, label])).random_raw(len(members))
        taken.append(members[np.argsort(bits, kind="stable")][:number])
    return np.sort(np.concatenate(taken))
