"""Rules for the values of detectron2's keys: its own configs keep to them, and what has no meaning is named."""

from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed")

import detectron2.model_zoo
from detectron2.modeling import META_ARCH_REGISTRY

from fbn_plugin.engine.detectron2.config import load_config
from fbn_plugin.engine.detectron2.rules import RULES, input_rules
from fbn_plugin.engine.detectron2.values import check_types
from fbn_plugin.engine.run.detection_rules import dependent_rules
from fbn_plugin.engine.run.rules import check_values

pytestmark = pytest.mark.detectron2

ROOT = Path(__file__).parents[3]
ZOO = Path(detectron2.model_zoo.__file__).parent / "configs"
CONFIG = ROOT / "configs" / "Base-RCNN-FPN.yaml"


def checked(file, *overrides):
    cfg = load_config(str(file), [str(each) for each in overrides])
    check_types(cfg)
    check_values(cfg, RULES)
    check_values(cfg, {**input_rules(cfg), **dependent_rules(cfg)})
    return cfg


def test_detectron2s_own_configs_keep_to_them():
    files = sorted(ZOO.glob("*/*.yaml"))
    assert len(files) > 50
    with_proposals = []
    for file in files:
        if load_config(str(file), []).MODEL.LOAD_PROPOSALS:
            with_proposals.append(file)
        else:
            checked(file)
    assert with_proposals  # Fast R-CNN's, whose files of proposals are pickles
    for file in with_proposals:
        with pytest.raises(ValueError, match=r"MODEL\.LOAD_PROPOSALS must be False as detectron2 unpickles"):
            checked(file)


def test_the_retinanet_of_its_zoo_has_the_anchors_of_this_projects():
    sizes = [
        checked(file).MODEL.ANCHOR_GENERATOR.SIZES
        for file in (
            ZOO / "COCO-Detection" / "retinanet_R_50_FPN_1x.yaml",
            ROOT / "configs" / "COCO-Detection" / "retinanet_R_50_FPN_1x_BN.yaml",
        )
    ]
    assert sizes[0] == sizes[1]


def test_other_values_that_have_a_meaning():
    cfg = checked(
        CONFIG,
        *(
            "SOLVER.BASE_LR",
            "1",
            "MODEL.ANCHOR_GENERATOR.SIZES",
            [32, 64],
            "MODEL.RPN.BBOX_REG_WEIGHTS",
            [1, 1, 1, 1, 1],
        ),
        *("INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", [128.0], "MODEL.PIXEL_STD", [1.0], "TEST.DETECTIONS_PER_IMAGE", -1),
        *("SOLVER.WEIGHT_DECAY_BIAS", 0.0, "INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute_range"),
        *("INPUT.CROP.SIZE", [384, 600], "OUTPUT_DIR", "'5'", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0),
    )
    assert cfg.SOLVER.BASE_LR == 1.0 and type(cfg.SOLVER.BASE_LR) is float and cfg.OUTPUT_DIR == "5"


def test_a_registered_name_is_one(monkeypatch):
    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "MyNet", object)
    checked(CONFIG, "MODEL.META_ARCHITECTURE", "MyNet")


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["SOLVER.MOMENTUM", "5"], "SOLVER.MOMENTUM must be from 0 to less than 1, got 5.0"),
        (["SOLVER.GAMMA", "-1.0"], "SOLVER.GAMMA must be above 0, and 1 or less, got -1.0"),
        (["SOLVER.STEPS", "(-5,)"], "SOLVER.STEPS must be increasing iterations, from 1 on, got (-5,)"),
        (["SOLVER.BASE_LR", "nan"], "SOLVER.BASE_LR must be of type finite number, such as 0.001, got nan"),
        (["SOLVER.BASE_LR", "1e999"], "SOLVER.BASE_LR must be of type finite number, such as 0.001, got inf"),
        (["SOLVER.MAX_ITER", "9" * 400], "SOLVER.MAX_ITER must be of type finite number, such as 40000, got 9999"),
        (["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[0.0]]"], "each from 0.01 to 100, got [[0.0]]"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", "[[0]]"], "each from 0.1 to 32768, got [[0]]"),
        (
            ["MODEL.ANCHOR_GENERATOR.SIZES", "[[], []]"],
            "MODEL.ANCHOR_GENERATOR.SIZES must be a list of one entry or more",
        ),
        (
            ["MODEL.PIXEL_STD", "[0.0, 1.0, 1.0]"],
            "MODEL.PIXEL_STD must be one value or more, each from 1e-06 to 1000000",
        ),
        (
            ["MODEL.PIXEL_STD", "[1.0]"],
            "MODEL.PIXEL_STD must be a list of 3 as INPUT.FORMAT BGR has channels, got [1.0]",
        ),
        (
            ["INPUT.FORMAT", "L"],
            "MODEL.PIXEL_MEAN must be a list of 1 as INPUT.FORMAT L has channels, got [103.53, 116.28, 123.675]",
        ),
        (["MODEL.RPN.BBOX_REG_WEIGHTS", "(1.0, 1.0)"], "MODEL.RPN.BBOX_REG_WEIGHTS must be a list of 4 (of rotated"),
        (["MODEL.RPN.IOU_LABELS", "[0, 2, 1]"], "MODEL.RPN.IOU_LABELS must be 1 to 100 values, each one of -1, 0, 1"),
        (["MODEL.RPN.CONV_DIMS", "[0]"], "each -1, or a number of channels, got [0]"),
        (["MODEL.META_ARCHITECTURE", "Foo"], "MODEL.META_ARCHITECTURE must be one of "),
        (["MODEL.BACKBONE.NAME", ""], "MODEL.BACKBONE.NAME must be one of "),
        (["MODEL.RETINANET.PRIOR_PROB", "1.0"], "MODEL.RETINANET.PRIOR_PROB must be from 1e-06 to 0.999999, got 1.0"),
        (
            ["MODEL.ROI_BOX_CASCADE_HEAD.IOUS", "(0.5, 0.6)"],
            "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS must be a list",
        ),
        (["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "()"], "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS must be 1 to 100 values"),
        (["MODEL.SEM_SEG_HEAD.COMMON_STRIDE", "3"], "MODEL.SEM_SEG_HEAD.COMMON_STRIDE must be one of 1, 2, 4"),
        (["INPUT.CROP.ENABLED", "True", "INPUT.CROP.SIZE", "[0.0, 0.5]"], "INPUT.CROP.SIZE must be a list of 2, each"),
        (
            ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", "absolute"],
            "INPUT.CROP.SIZE must be two whole numbers of pixels",
        ),
        (["SOLVER.NUM_DECAYS", "0"], "SOLVER.NUM_DECAYS must be 1 or more"),
        (["SOLVER.BASE_LR_END", "1.0"], "SOLVER.BASE_LR_END must be from 0 to SOLVER.BASE_LR, 0.001, got 1.0"),
        (["VERSION", "1"], "VERSION must be 2 as in detectron2 from October 2019 on, got 1"),
        (["VIS_PERIOD", "-1"], "VIS_PERIOD must be 0 or more"),
        (
            ["SOLVER.WEIGHT_DECAY_BIAS", "True"],
            "SOLVER.WEIGHT_DECAY_BIAS must be None, or a number from 0 to 100, got True",
        ),
        (["OUTPUT_DIR", "x" * 9999], "OUTPUT_DIR must have at most 4,096 characters, got 'xxx"),
        (["OUTPUT_DIR", "-" + "-" * 4000], "'---"),
        (["SEED", " " + "-" * 4000 + "1"], "SEED must be of type finite number, such as -1, got ---"),
        (["MODEL.WEIGHTS.X", "1"], "KEY VALUE: Non-existent key: MODEL.WEIGHTS.X"),
        (["INPUT.FORMAT.B", "1"], "KEY VALUE"),
        (["_BASE_", "x.yaml"], "KEY VALUE: The reserved key '_BASE_' can only be used in files!"),
    ],
)
def test_values_without_a_meaning(overrides, words):
    with pytest.raises(ValueError) as error:
        checked(CONFIG, *overrides)
    assert words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_a_file_runs_nothing(tmp_path):
    """As detectron2's own loader would."""
    canary, file = tmp_path / "canary", tmp_path / "run.yaml"
    for text in (
        f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{canary}']",
        f'OUTPUT_DIR: !!python/object/apply:eval [\'__import__("os").mkdir("{canary}")\']',
        f"_BASE_: [{tmp_path / 'base.yaml'}]",
    ):
        file.write_text(f"VERSION: 2\n{text}\n")
        (tmp_path / "base.yaml").write_text(f"A: !!python/object/new:os.mkdir ['{canary}']\n")
        with pytest.raises(ValueError, match="has the tag !!python/object/"):
            load_config(str(file), [])
    assert not canary.exists()
