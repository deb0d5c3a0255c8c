"""The config of torchvision's Mask R-CNN and Faster R-CNN in detectron2's vocabulary: checks and scaling.

Keys and defaults are in ``run/detection_keys.py``. A key of detectron2's is read here, or has one value that this
engine can do, or has no effect and is named in a line of the log.
"""

import logging
import re
from collections.abc import Sequence

from fbn_plugin.engine.run.config import CfgNode, load_config
from fbn_plugin.engine.run.detection_keys import FIXED, detection_config
from fbn_plugin.registry import parse_spec

__all__ = ["load_detection_config", "scale_to_processes"]

logger = logging.getLogger(__name__)

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
    "DATALOADER.REPEAT_*",
    "SOLVER.NUM_DECAYS",
    "TEST.EXPECTED_RESULTS",
    "TEST.KEYPOINT_OKS_SIGMAS",
    "TEST.AUG.*",
    "VIS_PERIOD",
    "GLOBAL.*",
)


def load_detection_config(config_file: str | None = None, overrides: Sequence[str] = ()) -> CfgNode:
    """``load_config`` for this engine, with every value checked that can be checked without data.

    Raises:
        FileNotFoundError, ValueError: one sentence that names the key and what it takes.
    """
    cfg = load_config(detection_config(), config_file, overrides, _UNUSED)
    for key, value in FIXED.items():
        _require(cfg, key, lambda given, value=value: given == value, f"{value!r} in this tool")
    for key, choices in {
        "MODEL.RESNETS.DEPTH": (18, 34, 50, 101, 152),
        "MODEL.BACKBONE.FREEZE_AT": tuple(range(6)),
        "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
        "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
        "INPUT.FORMAT": ("BGR", "RGB"),
        "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR"),
        "SOLVER.WARMUP_METHOD": ("linear", "constant"),
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
        "FLOAT32_PRECISION": ("", "highest", "high", "medium"),
    }.items():
        _require(cfg, key, choices.__contains__, f"one of {', '.join(map(repr, choices))}")
    for key in (
        "SOLVER.MAX_ITER",
        "SOLVER.IMS_PER_BATCH",
        "SOLVER.CHECKPOINT_PERIOD",
        "SOLVER.BASE_LR",
        "TEST.DETECTIONS_PER_IMAGE",
        "MODEL.ROI_HEADS.NUM_CLASSES",
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE",
        "MODEL.FPN.OUT_CHANNELS",
        "INPUT.MAX_SIZE_TRAIN",
        "INPUT.MAX_SIZE_TEST",
        "MODEL.RESNETS.NUM_GROUPS",
        "MODEL.RESNETS.WIDTH_PER_GROUP",
        "MODEL.RESNETS.STEM_OUT_CHANNELS",
        "MODEL.RESNETS.RES2_OUT_CHANNELS",
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN",
        "MODEL.RPN.PRE_NMS_TOPK_TEST",
        "MODEL.RPN.POST_NMS_TOPK_TRAIN",
        "MODEL.RPN.POST_NMS_TOPK_TEST",
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION",
        "MODEL.ROI_BOX_HEAD.FC_DIM",
        "MODEL.ROI_BOX_HEAD.CONV_DIM",
        "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION",
        "MODEL.ROI_MASK_HEAD.CONV_DIM",
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
        "TEST.PRECISE_BN.NUM_ITER",
    ):
        _require(cfg, key, lambda given: given > 0, "above 0")
    for key in (
        "TEST.EVAL_PERIOD",
        "NORM_STATS_PERIOD",
        "SOLVER.REFERENCE_WORLD_SIZE",
        "DATALOADER.NUM_WORKERS",
        "SOLVER.WARMUP_ITERS",
        "SOLVER.WEIGHT_DECAY",
        "SOLVER.WEIGHT_DECAY_NORM",
        "SOLVER.SCALE_LR_DIVISOR",
        "INPUT.MIN_SIZE_TEST",
        "MODEL.PROPOSAL_GENERATOR.MIN_SIZE",
        "MODEL.RPN.BBOX_REG_LOSS_WEIGHT",
        "MODEL.RPN.SMOOTH_L1_BETA",
        "MODEL.RPN.LOSS_WEIGHT",
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT",
        "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA",
        "MODEL.ROI_BOX_HEAD.NUM_FC",
        "MODEL.ROI_BOX_HEAD.NUM_CONV",
        "MODEL.ROI_MASK_HEAD.NUM_CONV",
    ):
        _require(cfg, key, lambda given: given >= 0, "0 or more")
    for key in (
        "SOLVER.WARMUP_FACTOR",
        "INPUT.NORM_GAMMA_INIT",
        "MODEL.RPN.NMS_THRESH",
        "MODEL.RPN.POSITIVE_FRACTION",
        "MODEL.ROI_HEADS.NMS_THRESH_TEST",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
        "MODEL.ROI_HEADS.POSITIVE_FRACTION",
    ):
        _require(cfg, key, lambda given: 0 <= given <= 1, "from 0 to 1")
    for key, length in {
        "MODEL.PIXEL_MEAN": 3,
        "MODEL.PIXEL_STD": 3,
        "MODEL.RPN.IOU_THRESHOLDS": 2,
        "MODEL.ROI_HEADS.IOU_THRESHOLDS": 1,
        "MODEL.RPN.BBOX_REG_WEIGHTS": 4,
        "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": 4,
    }.items():
        _require(cfg, key, lambda given, length=length: len(given) == length, f"a list of {length}")
    for key in ("MODEL.RPN.IOU_THRESHOLDS", "MODEL.ROI_HEADS.IOU_THRESHOLDS"):
        _require(cfg, key, lambda given: [0, *given, 1] == sorted([0, *given, 1]), "increasing from 0 to 1")
    _require(cfg, "MODEL.PIXEL_STD", lambda given: min(given) > 0, "above 0 for each channel")
    _require(cfg, "MODEL.DEVICE", re.compile(r"cpu|cuda(:\d+)?").fullmatch, "'cuda', 'cuda:0' and the like, or 'cpu'")
    _require(cfg, "SEED", lambda given: given < 2**63, "below 2**63")
    _require(
        cfg,
        "SOLVER.WEIGHT_DECAY_BIAS",
        lambda given: given is None or (isinstance(given, int | float) and 0 <= given < float("inf")),
        "None, or a number that is 0 or more",
    )
    if cfg.SOLVER.SCALE_LR_DIVISOR:
        for key, values in {"WEIGHT_DECAY_NORM": (0,), "WEIGHT_DECAY_BIAS": (None, 0), "BIAS_LR_FACTOR": (1,)}.items():
            what = f"{values[0]} with SCALE_LR_DIVISOR, which sets the decay of norms and biases to 0"
            _require(cfg, f"SOLVER.{key}", values.__contains__, what)
    _require(cfg, "INPUT.MIN_SIZE_TRAIN", lambda given: given and all(size > 0 for size in given), "sizes above 0")
    _require(cfg, "SOLVER.STEPS", lambda given: list(given) == sorted(set(given)), "increasing iterations")
    _check_widths(cfg)
    _check_eval_iterations(cfg)
    if cfg.SOLVER.REFERENCE_WORLD_SIZE:
        what = f"a multiple of SOLVER.REFERENCE_WORLD_SIZE, {cfg.SOLVER.REFERENCE_WORLD_SIZE}"
        _require(cfg, "SOLVER.IMS_PER_BATCH", lambda given: given % cfg.SOLVER.REFERENCE_WORLD_SIZE == 0, what)
    own = (-1, cfg.MODEL.FPN.OUT_CHANNELS)
    _require(cfg, "MODEL.RPN.CONV_DIMS", lambda given: all(dim in own for dim in given), f"a list of -1 or {own[1]}")
    for key in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        norm = cfg.MODEL[key].NORM
        if norm and norm != "FrozenBN":
            try:
                parse_spec(norm)
            except ValueError as error:
                raise ValueError(f"MODEL.{key}.NORM: {error}") from None
    return cfg


def scale_to_processes(cfg: CfgNode, processes: int) -> CfgNode:
    """The config for another number of processes than SOLVER.REFERENCE_WORLD_SIZE, by the linear rule.

    The images of one process stay as many: IMS_PER_BATCH and BASE_LR are multiplied by ``processes /
    REFERENCE_WORLD_SIZE``, and the numbers of iterations (MAX_ITER, STEPS, WARMUP_ITERS, CHECKPOINT_PERIOD,
    EVAL_PERIOD, EVAL_ITERATIONS) divided by it. The result's REFERENCE_WORLD_SIZE is ``processes``, so that scaling it
    again changes nothing. With REFERENCE_WORLD_SIZE 0, the config as it is.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference in (0, processes):
        return cfg
    scaled = cfg.clone()
    scaled.defrost()
    solver, test = scaled.SOLVER, scaled.TEST

    def iterations(count: int) -> int:
        return max(1, round(count * reference / processes)) if count else 0

    solver.IMS_PER_BATCH = solver.IMS_PER_BATCH // reference * processes
    solver.BASE_LR *= processes / reference
    for key in ("MAX_ITER", "WARMUP_ITERS", "CHECKPOINT_PERIOD"):
        solver[key] = iterations(solver[key])
    test.EVAL_PERIOD = iterations(test.EVAL_PERIOD)
    for node, key in ((solver, "STEPS"), (test, "EVAL_ITERATIONS")):
        node[key] = tuple(dict.fromkeys(iterations(count) for count in node[key]))
    solver.REFERENCE_WORLD_SIZE = processes
    logger.info(
        "scaled from %d to %d processes: IMS_PER_BATCH %d, BASE_LR %g, MAX_ITER %d, STEPS %s, WARMUP_ITERS %d",
        *(reference, processes, solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER, solver.STEPS),
        solver.WARMUP_ITERS,
    )
    scaled.freeze()
    return scaled


def _check_widths(cfg: CfgNode) -> None:
    """The ResNets that there are: basic blocks (18, 34) have one width, as in detectron2."""
    depth = cfg.MODEL.RESNETS.DEPTH
    if depth < 50:
        for key, value in {"NUM_GROUPS": 1, "WIDTH_PER_GROUP": 64, "RES2_OUT_CHANNELS": 64}.items():
            _require(cfg, f"MODEL.RESNETS.{key}", lambda given, v=value: given == v, f"{value} at DEPTH {depth}")
    _require(cfg, "MODEL.RESNETS.RES2_OUT_CHANNELS", lambda given: given % 4 == 0, "a multiple of 4")


def _check_eval_iterations(cfg: CfgNode) -> None:
    """Turn TEST.EVAL_ITERATIONS into integers, which an empty default does not tell ``load_config``, and check them."""
    key, last = "EVAL_ITERATIONS", cfg.SOLVER.MAX_ITER
    given = cfg.TEST[key]
    try:
        numbers = tuple(int(each) for each in given)
    except ValueError:
        numbers = None
    if numbers is None or min(numbers, default=1) < 1 or list(numbers) != sorted(set(numbers)):
        shown = given if numbers is None else numbers
        raise ValueError(f"TEST.{key} must be increasing numbers of iterations, from 1 on, not {shown!r}")
    if numbers and numbers[-1] > last:
        late = [number for number in numbers if number > last]
        logger.warning("TEST.%s: SOLVER.MAX_ITER is %d, so there is no evaluation after %s", key, last, late)
    cfg.defrost()
    cfg.TEST[key] = numbers
    cfg.freeze()


def _require(cfg: CfgNode, key: str, accept, what: str) -> None:
    value = cfg
    for name in key.split("."):
        value = value[name]
    if not accept(value):
        raise ValueError(f"{key} must be {what}, not {value!r}")
