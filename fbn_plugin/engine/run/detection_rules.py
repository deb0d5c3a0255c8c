"""What the values of a detection run's config must be, whichever engine trains it; each adds its own models' rules."""

from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.engine.run.rules import COMMON_RULES, Rule, at_least, between, each, exactly, multiple_of, one_of

__all__ = ["DETECTION_RULES", "dependent_rules", "divisor_rules"]

DETECTION_RULES = {
    **COMMON_RULES,
    "DATALOADER.REPEAT_THRESHOLD": between(0, 1),
    # Of detectron2's others the order cannot be resumed.
    "DATALOADER.SAMPLER_TRAIN": one_of("TrainingSampler", "RepeatFactorTrainingSampler"),
    "FLOAT32_PRECISION": one_of("", "highest", "high", "medium"),
    "INPUT.MAX_SIZE_TEST": at_least(1),
    "INPUT.MAX_SIZE_TRAIN": at_least(1),
    "INPUT.MIN_SIZE_TEST": at_least(0),
    "INPUT.MIN_SIZE_TRAIN": each(at_least(1)),
    "NORM_STATS_PERIOD": at_least(0),
    "SEED": Rule("below 2**63", lambda given: given < 2**63),
    "SOLVER.CHECKPOINT_PERIOD": at_least(1),
    "SOLVER.MAX_ITER": at_least(1),
    "SOLVER.REFERENCE_WORLD_SIZE": at_least(0),
    "TEST.PRECISE_BN.NUM_ITER": at_least(1),
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
    rules = divisor_rules(cfg)
    if reference := cfg.SOLVER.REFERENCE_WORLD_SIZE:
        rules["SOLVER.IMS_PER_BATCH"] = multiple_of(reference, f"SOLVER.REFERENCE_WORLD_SIZE, {reference}")
    return rules
