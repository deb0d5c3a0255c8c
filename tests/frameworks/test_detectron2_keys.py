"""The keys beside detectron2's own: in every detection config, and out of what is written where they say nothing."""

import pytest

from fbn_plugin.engine.run.config import read_config, saved_config
from fbn_plugin.engine.run.detection_keys import detection_config
from fbn_plugin.engine.run.run_folder import read_run
from fbn_plugin.engine.torchvision.config import load_detection_config
from fbn_plugin.frameworks.detectron2_keys import KEYS, add_keys, changed_keys, without_defaults


def keys_of(cfg, prefix=""):
    for name, value in cfg.items():
        yield from keys_of(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]


def test_defaults_are_left_out_and_nothing_else():
    cfg = detection_config()
    cfg.SOLVER.SCALE_LR_DIVISOR = 100.0
    cfg.TEST.EVAL_ITERATIONS = []
    cfg.freeze()
    left = without_defaults(cfg)
    assert set(keys_of(cfg)) - set(keys_of(left)) == set(KEYS) - {"SOLVER.SCALE_LR_DIVISOR"}
    assert changed_keys(cfg) == changed_keys(left) == {"SOLVER.SCALE_LR_DIVISOR": 100.0}
    assert set(KEYS) < set(keys_of(cfg)) and left.is_frozen()

    left.defrost()
    add_keys(left)
    assert left == detection_config() | {"SOLVER": cfg.SOLVER}
    assert without_defaults(cfg.SOLVER) == cfg.SOLVER, "a group is no config"


def test_a_run_writes_none_and_is_read_with_them(trained_run):
    assert not set(read_config(trained_run / "config.yaml")) & set(KEYS)
    config = read_run(trained_run).config
    assert {key: config[key] for key in KEYS} == {k: list(v) if isinstance(v, tuple) else v for k, v in KEYS.items()}
    assert changed_keys(saved_config(trained_run, detection_config())) == {}


@pytest.mark.detectron2
def test_plain_detectron2_reads_a_run(trained_run):
    """But for the norm's name, which it keeps."""
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from detectron2.config.defaults import _C  # `get_cfg` has our keys where another test has called `register`

    cfg, ours = _C.clone(), load_detection_config(trained_run / "config.yaml")
    cfg.merge_from_file(str(trained_run / "config.yaml"))
    assert not set(keys_of(cfg)) & set(KEYS)
    assert cfg.MODEL.RESNETS.NORM == "FBN" and cfg.SOLVER.MAX_ITER == ours.SOLVER.MAX_ITER
