"""Whether data sets have the classes that a detector is built for, and one another's."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from fbn_plugin.engine.run.rules import refusal

__all__ = ["check_number_of_classes", "check_same_classes"]


def check_number_of_classes(key: str, number: int, dataset: str, classes: Sequence[str]) -> None:
    """Refuse a model of another number of classes than the data have.

    Args:
        key, number: the config's NUM_CLASSES.
        dataset: name of the set.
        classes: names of its classes.

    Raises:
        ValueError: they are not ``number``.
    """
    if len(classes) != number:
        listed = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        raise refusal(key, f"{len(classes)}, the number of classes of dataset {dataset!r} ({listed})", number)


def check_same_classes(classes: Mapping[str, Sequence[str]]) -> None:
    """Refuse sets that number their classes differently.

    Args:
        classes: name of each set -> names of its classes, in order.

    Raises:
        ValueError: two of them differ.
    """
    for first, other in pairwise(classes):
        if list(classes[other]) != list(classes[first]):
            raise ValueError(f"datasets {first!r} and {other!r} have different classes")
