"""Whether a detection config names data sets, and whether they have the classes of its model, and one another's."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.engine.run.evaluation_names import folder_name
from fbn_plugin.engine.run.rules import refusal

__all__ = ["check_named_sets", "check_number_of_classes", "check_same_classes"]


def check_named_sets(cfg: CfgNode, eval_only: bool) -> None:
    """Refuse a run without the sets that it is for, or with sets that it would take for one.

    Raises:
        ValueError: DATASETS.TRAIN, or for an evaluation DATASETS.TEST, is empty; or two sets of DATASETS.TEST are the
            same, or their detections would be the same file.
    """
    name = "TEST" if eval_only else "TRAIN"
    if not cfg.DATASETS[name]:
        what = f"one data set or more, such as 'my_data:{name.lower()}'"
        raise refusal(f"DATASETS.{name}", what, cfg.DATASETS[name])
    places = [folder_name(each) for each in cfg.DATASETS.TEST]
    for each, place in zip(cfg.DATASETS.TEST, places):
        if places.count(place) > 1:
            what = f"sets whose detections have folders of their own, {each!r} and another one have {place}"
            raise refusal("DATASETS.TEST", what, cfg.DATASETS.TEST)


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
