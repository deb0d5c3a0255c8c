"""How the figures and files of an evaluation are called: COCO's metrics under detectron2's names, with more than one
test set the set's name in front of them, and a folder for each set."""

import os
import re
from collections.abc import Collection

__all__ = ["METRICS", "folder_name", "inference_folder", "metric_prefix"]

# COCO's APs; in metrics.json after "bbox/" or "segm/".
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def metric_prefix(dataset: str, test_sets: Collection[str]) -> str:
    """What stands before ``bbox/AP``: the set's name where there are several."""
    return f"{dataset}/" if len(test_sets) > 1 else ""


def folder_name(dataset: str) -> str:
    """A set's name as one of a folder."""
    return re.sub(r"\W+", "_", dataset)


def inference_folder(
    output_dir: str | os.PathLike, dataset: str, test_sets: Collection[str], name: str = "inference"
) -> str:
    """Where the detections on a set are: in OUTPUT_DIR/inference, where there are several sets in a folder of its own.

    Args:
        name: of the folder in OUTPUT_DIR.
    """
    folder = os.path.join(output_dir, name)
    return os.path.join(folder, folder_name(dataset)) if len(test_sets) > 1 else folder
