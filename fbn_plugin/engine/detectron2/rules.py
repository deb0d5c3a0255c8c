"""What the values of detectron2's keys must be, of all models that the configs of this project and of detectron2's zoo
have. detectron2 itself answers most of the rest with a bare error, some of it in the middle of a run."""

from detectron2.config import CfgNode
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)
from fvcore.common.registry import Registry
from PIL import Image, ImageMode

from fbn_plugin.engine.run.detection_rules import DETECTION_RULES, FACTOR, MOST_PIXELS, increasing_thresholds
from fbn_plugin.engine.run.rules import (
    MOST_CHANNELS,
    MOST_ITERATIONS,
    Rule,
    at_least,
    between,
    each,
    each_of,
    exactly,
    from_to_below,
    of_length,
    one_of,
)

__all__ = ["RULES", "input_rules"]

_LABELS = each_of(100, one_of(-1, 0, 1))
_BOX_WEIGHTS = Rule(
    f"a list of 4 (of rotated boxes 5), each {FACTOR.what}",
    lambda given: len(given) in (4, 5) and each(FACTOR).accepts(given),
)

_CROPS_OF_PIXELS = Rule(
    f"two whole numbers of pixels, from 1 to {MOST_PIXELS}",
    lambda given: len(given) == 2 and all(isinstance(size, int) and 1 <= size <= MOST_PIXELS for size in given),
)


def _registered(registry: Registry, *others: str) -> Rule:
    """A name in one of detectron2's registries, or that ``--import`` has put there, or one of a few others."""
    known = ", ".join(repr(name) for name in (*others, *(name for name, _ in registry)))
    return Rule(
        f"one of {known}, or another that --import registers", lambda given: given in others or given in dict(registry)
    )


_LOSS_TYPES = one_of("smooth_l1", "giou", "diou", "ciou")
_POOLERS = one_of("ROIAlignV2", "ROIAlign", "ROIPool", "ROIAlignRotated")

_NAME_RULES = {
    "MODEL.ANCHOR_GENERATOR.NAME": _registered(ANCHOR_GENERATOR_REGISTRY),
    "MODEL.BACKBONE.NAME": _registered(BACKBONE_REGISTRY),
    "MODEL.META_ARCHITECTURE": _registered(META_ARCH_REGISTRY),
    "MODEL.PROPOSAL_GENERATOR.NAME": _registered(PROPOSAL_GENERATOR_REGISTRY, "PrecomputedProposals"),
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": _LOSS_TYPES,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _LOSS_TYPES,
    "MODEL.ROI_BOX_HEAD.NAME": _registered(ROI_BOX_HEAD_REGISTRY, ""),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": _POOLERS,
    "MODEL.ROI_HEADS.NAME": _registered(ROI_HEADS_REGISTRY),
    "MODEL.ROI_KEYPOINT_HEAD.NAME": _registered(ROI_KEYPOINT_HEAD_REGISTRY),
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": _POOLERS,
    "MODEL.ROI_MASK_HEAD.NAME": _registered(ROI_MASK_HEAD_REGISTRY),
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": _POOLERS,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": _LOSS_TYPES,
    "MODEL.RPN.HEAD_NAME": _registered(RPN_HEAD_REGISTRY),
    "MODEL.SEM_SEG_HEAD.NAME": _registered(SEM_SEG_HEADS_REGISTRY),
}

_HEAD_RULES = {
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH": between(0, 1),
    "MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH": between(0, 1),
    "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT": at_least(0, MOST_PIXELS**2),
    "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT": at_least(0, 10**6),
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.RETINANET.FOCAL_LOSS_ALPHA": between(-1, 1),  # below 0: no weights
    "MODEL.RETINANET.FOCAL_LOSS_GAMMA": between(0, 100),
    "MODEL.RETINANET.IOU_LABELS": _LABELS,
    "MODEL.RETINANET.IOU_THRESHOLDS": increasing_thresholds(),
    "MODEL.RETINANET.NMS_THRESH_TEST": between(0, 1),
    "MODEL.RETINANET.NUM_CLASSES": at_least(1, 10**5),
    "MODEL.RETINANET.NUM_CONVS": at_least(0, 100),
    "MODEL.RETINANET.PRIOR_PROB": between(1e-6, 1 - 1e-6),
    "MODEL.RETINANET.SCORE_THRESH_TEST": between(0, 1),
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": at_least(0, 10**6),
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": at_least(1, 10**6),
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": each_of(100, _BOX_WEIGHTS),
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": each_of(100, between(0, 1)),
    "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER": between(0, 100),
    "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES": at_least(1, 10**5),
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": each_of(100, at_least(1, MOST_CHANNELS)),
    "MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT": at_least(0, 10**6),
    "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": at_least(0, 10**6),
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": at_least(1, 10**4),
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": at_least(1, 256),
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO": at_least(0, 64),
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": one_of(*(2**i for i in range(11))),
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": at_least(1, MOST_CHANNELS),
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": at_least(0, 10**6),
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": at_least(1, 10**5),
}

RULES = {
    "VERSION": exactly(2, "as in detectron2 from October 2019 on"),
    **DETECTION_RULES,
    **_HEAD_RULES,
    **_NAME_RULES,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": at_least(1, 10**6),
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": at_least(1, 10**6),
    "INPUT.CROP.TYPE": one_of("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.FORMAT": one_of("BGR", "YUV-BT.601", *Image.MODES),
    "INPUT.MASK_FORMAT": one_of("polygon", "bitmask"),
    "MODEL.LOAD_PROPOSALS": exactly(False, "as detectron2 unpickles such files, which runs what is in them"),
    "MODEL.ANCHOR_GENERATOR.ANGLES": each(each_of(100, between(-360, 360))),
    "MODEL.ANCHOR_GENERATOR.OFFSET": from_to_below(0, 1),
    "MODEL.BACKBONE.FREEZE_AT": at_least(0, 100),
    "MODEL.FPN.FUSE_TYPE": one_of("sum", "avg"),
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": at_least(1, MOST_CHANNELS),
    "MODEL.RESNETS.RES5_DILATION": one_of(1, 2),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.ROI_HEADS.IOU_LABELS": _LABELS,
    "MODEL.RPN.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.RPN.BOUNDARY_THRESH": at_least(-1, MOST_PIXELS),
    "MODEL.RPN.CONV_DIMS": each_of(100, Rule("-1, or a number of channels", lambda given: given == -1 or given >= 1)),
    "MODEL.RPN.IOU_LABELS": _LABELS,
    "SOLVER.LR_SCHEDULER_NAME": one_of("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    "SOLVER.NUM_DECAYS": at_least(1, 1000),
    "TEST.DETECTIONS_PER_IMAGE": at_least(-1, 10**6),  # -1 is all
    "TEST.KEYPOINT_OKS_SIGMAS": Rule(
        f"a list of values {FACTOR.what}", lambda given: all(FACTOR.accepts(each) for each in given)
    ),
    "VIS_PERIOD": at_least(0, MOST_ITERATIONS),
}


def input_rules(cfg: CfgNode) -> dict[str, Rule]:
    """Rules that follow from other values of the config, for which ``RULES`` hold already."""
    channels = 3 if cfg.INPUT.FORMAT in ("BGR", "YUV-BT.601") else len(ImageMode.getmode(cfg.INPUT.FORMAT).bands)
    reason = f"as INPUT.FORMAT {cfg.INPUT.FORMAT} has channels"
    rules = {f"MODEL.PIXEL_{name}": of_length(channels, reason=reason) for name in ("MEAN", "STD")}
    for name in ("RPN", "ROI_HEADS", "RETINANET"):  # a label for what lies below, between and above the thresholds
        rules[f"MODEL.{name}.IOU_LABELS"] = of_length(
            len(cfg.MODEL[name].IOU_THRESHOLDS) + 1, reason="with these IOU_THRESHOLDS"
        )
    rules["MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS"] = of_length(
        len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS), reason="with these IOUS"
    )
    if cfg.INPUT.CROP.ENABLED:
        kind = cfg.INPUT.CROP.TYPE
        rules["INPUT.CROP.SIZE"] = _CROPS_OF_PIXELS if kind.startswith("absolute") else of_length(2, between(0.01, 1))
        if kind == "absolute_range":
            rules["INPUT.CROP.SIZE"] = Rule(
                "two sizes in pixels, the smaller first",
                lambda given: _CROPS_OF_PIXELS.accepts(given) and given[0] <= given[1],
            )
    return rules
