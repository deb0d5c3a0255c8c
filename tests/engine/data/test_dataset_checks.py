"""Data sets against the model's number of classes, and against one another."""

import pytest

from fbn_plugin.engine.data.dataset_checks import check_named_sets, check_number_of_classes, check_same_classes
from fbn_plugin.engine.run.config import CfgNode


def test_a_run_names_its_sets():
    cfg = CfgNode({"DATASETS": {"TRAIN": (), "TEST": ("a:val",)}})
    check_named_sets(cfg, eval_only=True)
    with pytest.raises(ValueError, match=r"DATASETS.TRAIN must be .*'my_data:train', got \(\)"):
        check_named_sets(cfg, eval_only=False)
    for names in (("a:val", "a:val"), ("my-data:val", "my_data:val")):
        cfg.DATASETS.TEST = names
        with pytest.raises(ValueError, match=f"DATASETS.TEST must be sets whose detections .* got .*{names[1]}"):
            check_named_sets(cfg, eval_only=True)


def test_number_of_classes():
    check_number_of_classes("NUM_CLASSES", 2, "a:val", ("disc", "box"))
    with pytest.raises(ValueError, match=r"NUM_CLASSES must be 2, .*'a:val' \(disc, box\), got 80"):
        check_number_of_classes("NUM_CLASSES", 80, "a:val", ("disc", "box"))
    with pytest.raises(ValueError, match=r"c9, \.\.\.\), got 3"):
        check_number_of_classes("NUM_CLASSES", 3, "a:val", [f"c{number}" for number in range(80)])


def test_sets_have_the_same_classes():
    check_same_classes({})
    check_same_classes({"a": ("disc", "box"), "b": ["disc", "box"]})
    with pytest.raises(ValueError, match="'a' and 'b' have different classes"):
        check_same_classes({"a": ("disc", "box"), "b": ("box", "disc")})
