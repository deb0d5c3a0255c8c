"""What the values of a detection run's config must be, whichever engine trains it; each adds its own models' rules."""

from collections.abc import Collection, Sequence

from fbn_plugin.engine.run.activation_meter import ACTIVATION_RULES
from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.engine.run.rules import (
    COMMON_RULES,
    MOST_CHANNELS,
    MOST_ITERATIONS,
    Rule,
    above,
    at_least,
    between,
    each,
    each_of,
    exactly,
    increasing,
    multiple_of,
    one_of,
)

__all__ = [
    "ANCHOR_SIZES",
    "ASPECT_RATIOS",
    "DETECTION_RULES",
    "FACTOR",
    "MOST_PIXELS",
    "PIXEL_VALUE",
    "dependent_rules",
    "divisor_rules",
    "increasing_thresholds",
    "of_levels",
]

MOST_PIXELS = 2**15  # of a side of an image
PIXEL_VALUE = between(-(10**6), 10**6)
FACTOR = between(1e-6, 10**6)  # that something is divided by
# Of one level of a pyramid. Anchors of 0 pixels, or none of the ratio, have nothing to learn from.
ANCHOR_SIZES = each_of(100, between(0.1, MOST_PIXELS))
ASPECT_RATIOS = each_of(100, between(0.01, 100))

_LARGEST_LAYER = 2**31  # weights


def increasing_thresholds(number: int | None = None) -> Rule:
    """Thresholds that cut 0..1 into parts: so many, or as many as there are."""

    def accepts(given: Sequence[float]) -> bool:
        return len(given) == (number or len(given)) > 0 and [0, *given, 1] == sorted([0, *given, 1])

    how_many = {None: "thresholds, increasing", 1: "one threshold", 2: "two thresholds, increasing"}[number]
    return Rule(f"{how_many} from 0 to 1", accepts)


def of_levels(rule: Rule, numbers: Collection[int] = range(1, 101)) -> Rule:
    """A list for each level of a pyramid, or one in a list for all of them; each keeps to a rule.

    Args:
        rule: for the list of a level.
        numbers: of lists that there may be. With any number, the list of all levels may stand without one around it, as
            detectron2 takes it.
    """
    how_many = "a list of one entry or of five" if 5 in numbers and 2 not in numbers else "a list of one entry or more"

    def accepts(given: Sequence) -> bool:
        if 2 in numbers and not any(isinstance(level, list | tuple) for level in given):
            given = [given]
        return len(given) in numbers and all(rule.accepts(level) for level in given)

    return Rule(f"{how_many}, for the levels of the pyramid, each a list of {rule.what}", accepts)


_SOLVER_RULES = {
    "SOLVER.BIAS_LR_FACTOR": at_least(0, 1000),
    "SOLVER.CHECKPOINT_PERIOD": at_least(1, MOST_ITERATIONS),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of("value", "norm"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": above(0, 1e30),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": between(0.1, 1000),
    "SOLVER.GAMMA": above(0, 1),
    "SOLVER.MAX_ITER": at_least(1, MOST_ITERATIONS),
    "SOLVER.REFERENCE_WORLD_SIZE": at_least(0, 2**20),
    "SOLVER.STEPS": increasing("iterations"),
    "SOLVER.WARMUP_ITERS": at_least(0, MOST_ITERATIONS),
    "SOLVER.WARMUP_METHOD": one_of("linear", "constant"),
    "SOLVER.WEIGHT_DECAY_BIAS": Rule(
        "None, or a number from 0 to 100",
        lambda given: given is None or (not isinstance(given, bool) and 0 <= given <= 100),
    ),
    "SOLVER.WEIGHT_DECAY_NORM": at_least(0, 100),
}

_MODEL_RULES = {
    **dict.fromkeys(
        (
            "MODEL.FPN.OUT_CHANNELS",
            "MODEL.RESNETS.NUM_GROUPS",
            "MODEL.RESNETS.RES2_OUT_CHANNELS",
            "MODEL.RESNETS.STEM_OUT_CHANNELS",
            "MODEL.RESNETS.WIDTH_PER_GROUP",
            "MODEL.ROI_BOX_HEAD.CONV_DIM",
            "MODEL.ROI_BOX_HEAD.FC_DIM",
            "MODEL.ROI_MASK_HEAD.CONV_DIM",
        ),
        at_least(1, MOST_CHANNELS),
    ),
    **dict.fromkeys(
        (
            "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
            "MODEL.RPN.BATCH_SIZE_PER_IMAGE",
            "MODEL.RPN.POST_NMS_TOPK_TEST",
            "MODEL.RPN.POST_NMS_TOPK_TRAIN",
            "MODEL.RPN.PRE_NMS_TOPK_TEST",
            "MODEL.RPN.PRE_NMS_TOPK_TRAIN",
        ),
        at_least(1, 10**6),
    ),
    **dict.fromkeys(
        ("MODEL.ROI_BOX_HEAD.NUM_CONV", "MODEL.ROI_BOX_HEAD.NUM_FC", "MODEL.ROI_MASK_HEAD.NUM_CONV"), at_least(0, 100)
    ),
    **dict.fromkeys(
        (
            "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT",
            "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA",
            "MODEL.RPN.BBOX_REG_LOSS_WEIGHT",
            "MODEL.RPN.LOSS_WEIGHT",
            "MODEL.RPN.SMOOTH_L1_BETA",
        ),
        at_least(0, 10**6),
    ),
    **dict.fromkeys(
        (
            "MODEL.ROI_HEADS.NMS_THRESH_TEST",
            "MODEL.ROI_HEADS.POSITIVE_FRACTION",
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
            "MODEL.RPN.NMS_THRESH",
            "MODEL.RPN.POSITIVE_FRACTION",
        ),
        between(0, 1),
    ),
    **dict.fromkeys(
        ("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION"), at_least(1, 256)
    ),
    **dict.fromkeys(
        ("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO"), at_least(0, 64)
    ),
    "MODEL.ANCHOR_GENERATOR.SIZES": of_levels(ANCHOR_SIZES),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": of_levels(ASPECT_RATIOS),
    "MODEL.PIXEL_MEAN": each(PIXEL_VALUE),
    "MODEL.PIXEL_STD": each(FACTOR),
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": at_least(0, MOST_PIXELS),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": each(FACTOR),
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": increasing_thresholds(),
    "MODEL.ROI_HEADS.NUM_CLASSES": at_least(1, 10**5),
    "MODEL.RPN.BBOX_REG_WEIGHTS": each(FACTOR),
    "MODEL.RPN.IOU_THRESHOLDS": increasing_thresholds(),
}

DETECTION_RULES = {
    **COMMON_RULES,
    **_SOLVER_RULES,
    **_MODEL_RULES,
    **ACTIVATION_RULES,
    "DATALOADER.REPEAT_THRESHOLD": between(0, 1),
    # Of detectron2's others the order cannot be resumed.
    "DATALOADER.SAMPLER_TRAIN": one_of("TrainingSampler", "RepeatFactorTrainingSampler"),
    "FLOAT32_PRECISION": one_of("", "highest", "high", "medium"),
    "INPUT.MAX_SIZE_TEST": at_least(1, MOST_PIXELS),
    "INPUT.MAX_SIZE_TRAIN": at_least(1, MOST_PIXELS),
    "INPUT.MIN_SIZE_TEST": at_least(0, MOST_PIXELS),
    "INPUT.MIN_SIZE_TRAIN": each(at_least(1, MOST_PIXELS)),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of("choice", "range"),
    "INPUT.RANDOM_FLIP": one_of("horizontal", "vertical", "none"),
    "NORM_STATS_PERIOD": at_least(0, MOST_ITERATIONS),
    "SEED": Rule("below 2**63", lambda given: -(2**63) <= given < 2**63),
    "TEST.PRECISE_BN.NUM_ITER": at_least(1, MOST_ITERATIONS),
}


def divisor_rules(cfg: CfgNode) -> dict[str, Rule]:
    """What SOLVER.SCALE_LR_DIVISOR leaves no choice of: its parameter groups do not decay norms and biases."""
    if not cfg.SOLVER.SCALE_LR_DIVISOR:
        return {}
    reason = "with SCALE_LR_DIVISOR, which sets the decay of norms and biases to 0"
    return {
        "SOLVER.WEIGHT_DECAY_NORM": exactly(0, reason),
        "SOLVER.WEIGHT_DECAY_BIAS": Rule(f"None {reason}", lambda given: given in (None, 0)),
        "SOLVER.BIAS_LR_FACTOR": exactly(1, reason),
    }


def dependent_rules(cfg: CfgNode) -> dict[str, Rule]:
    """Rules that follow from other values of the config, for which ``DETECTION_RULES`` hold already."""
    solver, box = cfg.SOLVER, cfg.MODEL.ROI_BOX_HEAD
    rules = divisor_rules(cfg)
    rules["SOLVER.BASE_LR_END"] = Rule(
        f"from 0 to SOLVER.BASE_LR, {solver.BASE_LR}", lambda given: 0 <= given <= solver.BASE_LR
    )
    if solver.NESTEROV:
        rules["SOLVER.MOMENTUM"] = Rule("above 0, and less than 1, with SOLVER.NESTEROV", lambda given: 0 < given < 1)
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range":
        rules["INPUT.MIN_SIZE_TRAIN"] = Rule(
            "two sizes, the smaller first, with MIN_SIZE_TRAIN_SAMPLING 'range'",
            lambda given: len(given) == 2 and given[0] <= given[1],
        )
    channels = box.CONV_DIM if box.NUM_CONV else cfg.MODEL.FPN.OUT_CHANNELS
    most = _LARGEST_LAYER // (box.POOLER_RESOLUTION**2 * channels)
    if box.NUM_FC:
        what = f"at most {most} with {channels} channels and POOLER_RESOLUTION {box.POOLER_RESOLUTION}"
        rules["MODEL.ROI_BOX_HEAD.FC_DIM"] = Rule(what, lambda given: given <= most)
    if reference := solver.REFERENCE_WORLD_SIZE:
        rules["SOLVER.IMS_PER_BATCH"] = multiple_of(reference, f"SOLVER.REFERENCE_WORLD_SIZE, {reference}")
    return rules
