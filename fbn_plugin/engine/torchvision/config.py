"""The config of torchvision's Mask R-CNN and Faster R-CNN in detectron2's vocabulary, and what its values must be.

Keys and defaults are in ``run/detection_keys.py``, rules that detectron2's engine shares in ``run/detection_rules.py``.
A key of detectron2's is read here, or has one value that this engine can do, or has no effect and is named in a line of
the log.
"""

import re
from collections.abc import Sequence

from fbn_plugin.engine.run.config import CfgNode, load_config
from fbn_plugin.engine.run.detection_keys import FIXED, detection_config
from fbn_plugin.engine.run.detection_rules import (
    ANCHOR_SIZES,
    ASPECT_RATIOS,
    DETECTION_RULES,
    FACTOR,
    PIXEL_VALUE,
    dependent_rules,
    increasing_thresholds,
    of_levels,
)
from fbn_plugin.engine.run.rules import (
    Rule,
    at_least,
    check_norms,
    check_values,
    exactly,
    get_value,
    multiple_of,
    of_length,
    one_of,
)
from fbn_plugin.engine.run.run_folder import NORM_KEYS
from fbn_plugin.engine.run.schedule import eval_iterations

__all__ = ["load_detection_config", "norms_of"]

# detectron2's other keys: they belong to other models, or torchvision's model has no such setting.
_UNUSED = (
    "MODEL.RESNETS.DEFORM_*",
    "MODEL.ANCHOR_GENERATOR.ANGLES",
    "MODEL.ANCHOR_GENERATOR.OFFSET",
    "MODEL.RPN.BOUNDARY_THRESH",
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_*",
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE",
    "MODEL.ROI_BOX_CASCADE_HEAD.*",
    "MODEL.ROI_KEYPOINT_HEAD.*",
    "MODEL.SEM_SEG_HEAD.*",
    "MODEL.PANOPTIC_FPN.*",
    "MODEL.RETINANET.*",
    "INPUT.CROP.*",
    "INPUT.MASK_FORMAT",
    "DATASETS.P*",
    "DATALOADER.RANDOM_SUBSET_RATIO",
    "SOLVER.NUM_DECAYS",
    "TEST.EXPECTED_RESULTS",
    "TEST.KEYPOINT_OKS_SIGMAS",
    "TEST.AUG.*",
    "VIS_PERIOD",
    "GLOBAL.*",
)

_RULES = {
    **{key: exactly(value, "in this tool") for key, value in FIXED.items()},
    **DETECTION_RULES,
    "TEST.AUG.ENABLED": exactly(False, "in this tool; tools/train_net.py has test-time augmentation"),
    "INPUT.FORMAT": one_of("BGR", "RGB"),
    "MODEL.ANCHOR_GENERATOR.SIZES": of_levels(ANCHOR_SIZES, (1, 5)),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": of_levels(ASPECT_RATIOS, (1, 5)),
    "MODEL.BACKBONE.FREEZE_AT": one_of(*range(6)),
    "MODEL.DEVICE": Rule("'cuda', 'cuda:0' and the like, or 'cpu'", re.compile(r"cpu|cuda(:\d+)?").fullmatch),
    "MODEL.PIXEL_MEAN": of_length(3, PIXEL_VALUE),
    "MODEL.PIXEL_STD": of_length(3, FACTOR),
    "MODEL.RESNETS.NORM": Rule("the spec of a norm, such as 'FBN', 'BN' or 'FrozenBN'", bool),
    "MODEL.RESNETS.DEPTH": one_of(18, 34, 50, 101, 152),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": of_length(4, FACTOR),
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": increasing_thresholds(1),
    "MODEL.RPN.BBOX_REG_WEIGHTS": of_length(4, FACTOR),
    "MODEL.RPN.IOU_THRESHOLDS": increasing_thresholds(2),
    "SOLVER.LR_SCHEDULER_NAME": one_of("WarmupMultiStepLR", "WarmupCosineLR"),
    "TEST.DETECTIONS_PER_IMAGE": at_least(1, 10**6),
}


def load_detection_config(config_file: str | None = None, overrides: Sequence[str] = ()) -> CfgNode:
    """``load_config`` for this engine, with every value checked that can be checked without data.

    Raises:
        FileNotFoundError, ValueError: one sentence that names the key and what it takes.
    """
    cfg = load_config(detection_config(), config_file, overrides, _UNUSED)
    check_values(cfg, _RULES)
    check_values(cfg, {**_width_rules(cfg), **dependent_rules(cfg)})
    check_norms({key: spec for key, spec in norms_of(cfg).items() if spec != "FrozenBN"})
    # As integers, which an empty default does not tell `load_config`.
    chosen = eval_iterations(cfg.TEST.EVAL_ITERATIONS, cfg.SOLVER.MAX_ITER)
    cfg.defrost()
    cfg.TEST.EVAL_ITERATIONS = chosen
    cfg.freeze()
    return cfg


def norms_of(cfg: CfgNode) -> dict[str, str]:
    """Key -> spec of each norm of the model."""
    return {key: get_value(cfg, key) for key in NORM_KEYS}


def _width_rules(cfg: CfgNode) -> dict[str, Rule]:
    """The networks that there are: basic blocks (ResNet-18 and 34) have one width, as in detectron2."""
    depth, channels = cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.FPN.OUT_CHANNELS
    rules = {
        "MODEL.RESNETS.RES2_OUT_CHANNELS": multiple_of(4),
        "MODEL.RPN.CONV_DIMS": Rule(
            f"a list of -1 or {channels}", lambda given: all(dim in (-1, channels) for dim in given)
        ),
    }
    if depth < 50:
        for key, value in {"NUM_GROUPS": 1, "WIDTH_PER_GROUP": 64, "RES2_OUT_CHANNELS": 64}.items():
            rules[f"MODEL.RESNETS.{key}"] = exactly(value, f"at DEPTH {depth}")
    return rules
