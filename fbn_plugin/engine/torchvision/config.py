"""The config of torchvision's Mask R-CNN and Faster R-CNN in detectron2's vocabulary, and what its values must be.

Keys and defaults are in ``run/detection_keys.py``, rules that detectron2's engine shares in ``run/detection_rules.py``.
A key of detectron2's is read here, or has one value that this engine can do, or has no effect and is named in a line of
the log.
"""

import math
import re
from collections.abc import Sequence

from fbn_plugin.engine.run.config import CfgNode, load_config
from fbn_plugin.engine.run.detection_keys import FIXED, detection_config
from fbn_plugin.engine.run.detection_rules import DETECTION_RULES, dependent_rules
from fbn_plugin.engine.run.rules import (
    Rule,
    above,
    at_least,
    between,
    check_norms,
    check_values,
    each,
    exactly,
    get_value,
    increasing,
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

# Thresholds that cut 0..1 into parts.
_INCREASING = Rule("increasing from 0 to 1", lambda given: [0, *given, 1] == sorted([0, *given, 1]))

_OF_LEVELS = Rule(
    "a list of one entry or of five, for the levels of the pyramid, each a list of numbers above 0",
    lambda given: len(given) in (1, 5) and all(each(above(0)).accepts(level) for level in given),
)

_RULES = {
    **{key: exactly(value, "in this tool") for key, value in FIXED.items()},
    **DETECTION_RULES,
    "TEST.AUG.ENABLED": exactly(False, "in this tool; tools/train_net.py has test-time augmentation"),
    **dict.fromkeys(
        (
            "MODEL.FPN.OUT_CHANNELS",
            "MODEL.RESNETS.NUM_GROUPS",
            "MODEL.RESNETS.RES2_OUT_CHANNELS",
            "MODEL.RESNETS.STEM_OUT_CHANNELS",
            "MODEL.RESNETS.WIDTH_PER_GROUP",
            "MODEL.ROI_BOX_HEAD.CONV_DIM",
            "MODEL.ROI_BOX_HEAD.FC_DIM",
            "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION",
            "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
            "MODEL.ROI_HEADS.NUM_CLASSES",
            "MODEL.ROI_MASK_HEAD.CONV_DIM",
            "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION",
            "MODEL.RPN.BATCH_SIZE_PER_IMAGE",
            "MODEL.RPN.POST_NMS_TOPK_TEST",
            "MODEL.RPN.POST_NMS_TOPK_TRAIN",
            "MODEL.RPN.PRE_NMS_TOPK_TEST",
            "MODEL.RPN.PRE_NMS_TOPK_TRAIN",
            "TEST.DETECTIONS_PER_IMAGE",
        ),
        at_least(1),
    ),
    **dict.fromkeys(
        (
            "MODEL.PROPOSAL_GENERATOR.MIN_SIZE",
            "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT",
            "MODEL.ROI_BOX_HEAD.NUM_CONV",
            "MODEL.ROI_BOX_HEAD.NUM_FC",
            "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA",
            "MODEL.ROI_MASK_HEAD.NUM_CONV",
            "MODEL.RPN.BBOX_REG_LOSS_WEIGHT",
            "MODEL.RPN.LOSS_WEIGHT",
            "MODEL.RPN.SMOOTH_L1_BETA",
            "SOLVER.MOMENTUM",
            "SOLVER.WARMUP_ITERS",
            "SOLVER.WEIGHT_DECAY",
            "SOLVER.WEIGHT_DECAY_NORM",
        ),
        at_least(0),
    ),
    **dict.fromkeys(
        (
            "MODEL.ROI_HEADS.NMS_THRESH_TEST",
            "MODEL.ROI_HEADS.POSITIVE_FRACTION",
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
            "MODEL.RPN.NMS_THRESH",
            "MODEL.RPN.POSITIVE_FRACTION",
            "SOLVER.WARMUP_FACTOR",
        ),
        between(0, 1),
    ),
    **dict.fromkeys(("MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"), _OF_LEVELS),
    "INPUT.FORMAT": one_of("BGR", "RGB"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of("choice", "range"),
    "INPUT.RANDOM_FLIP": one_of("horizontal", "vertical", "none"),
    "MODEL.BACKBONE.FREEZE_AT": one_of(*range(6)),
    "MODEL.DEVICE": Rule("'cuda', 'cuda:0' and the like, or 'cpu'", re.compile(r"cpu|cuda(:\d+)?").fullmatch),
    "MODEL.PIXEL_MEAN": of_length(3),
    "MODEL.PIXEL_STD": of_length(3, above(0)),
    "MODEL.RESNETS.NORM": Rule("the spec of a norm, such as 'FBN', 'BN' or 'FrozenBN'", bool),
    "MODEL.RESNETS.DEPTH": one_of(18, 34, 50, 101, 152),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": of_length(4),
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": Rule(
        "one threshold from 0 to 1", lambda given: len(given) == 1 and _INCREASING.accepts(given)
    ),
    "MODEL.RPN.BBOX_REG_WEIGHTS": of_length(4),
    "MODEL.RPN.IOU_THRESHOLDS": Rule(
        "two thresholds, increasing from 0 to 1", lambda given: len(given) == 2 and _INCREASING.accepts(given)
    ),
    "SOLVER.BASE_LR": above(0),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of("value", "norm"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": above(0),
    "SOLVER.LR_SCHEDULER_NAME": one_of("WarmupMultiStepLR", "WarmupCosineLR"),
    "SOLVER.STEPS": increasing("iterations"),
    "SOLVER.WARMUP_METHOD": one_of("linear", "constant"),
    "SOLVER.WEIGHT_DECAY_BIAS": Rule(
        "None, or a number that is 0 or more", lambda given: given is None or 0 <= given < math.inf
    ),
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
