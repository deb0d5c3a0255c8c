"""The linear rule: one config for any number of processes, after Goyal et al., "Accurate, Large Minibatch SGD" (2017),
section 2.1, and detectron2's SOLVER.REFERENCE_WORLD_SIZE."""

import logging
from collections.abc import Callable

from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run.config import CfgNode

__all__ = ["scale_to_processes"]

logger = logging.getLogger(__name__)


def scale_to_processes(cfg: CfgNode, processes: int, say: Callable[[str], None] = logger.info) -> CfgNode:
    """The config for another number of processes than SOLVER.REFERENCE_WORLD_SIZE.

    The images of one process stay as many: IMS_PER_BATCH and BASE_LR are multiplied by ``processes /
    REFERENCE_WORLD_SIZE``, and the numbers of iterations (MAX_ITER, STEPS, WARMUP_ITERS, CHECKPOINT_PERIOD,
    EVAL_PERIOD, EVAL_ITERATIONS) divided by it. The result's REFERENCE_WORLD_SIZE is ``processes``, so that scaling it
    again changes nothing, and the config that a run saves means the same again. With REFERENCE_WORLD_SIZE 0, the config
    as it is.

    Args:
        cfg: settings of a detection run; they are not changed.
        processes: how many share the run.
        say: gets a sentence on what became of the settings.
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
    for node, key in (
        (solver, "MAX_ITER"),
        (solver, "WARMUP_ITERS"),
        (solver, "CHECKPOINT_PERIOD"),
        (test, "EVAL_PERIOD"),
    ):
        node[key] = iterations(node[key])
    for node, key in ((solver, "STEPS"), (test, "EVAL_ITERATIONS")):
        node[key] = tuple(dict.fromkeys(iterations(count) for count in node[key]))
    solver.REFERENCE_WORLD_SIZE = processes
    say(
        f"SOLVER.REFERENCE_WORLD_SIZE {reference}, and {counted(processes, 'process')}: "
        f"IMS_PER_BATCH {solver.IMS_PER_BATCH}, BASE_LR {solver.BASE_LR:g}, MAX_ITER {solver.MAX_ITER}, "
        f"STEPS {solver.STEPS}, WARMUP_ITERS {solver.WARMUP_ITERS}, CHECKPOINT_PERIOD {solver.CHECKPOINT_PERIOD}, "
        f"EVAL_PERIOD {test.EVAL_PERIOD}, EVAL_ITERATIONS {test.EVAL_ITERATIONS}"
    )
    if cfg.is_frozen():
        scaled.freeze()
    return scaled
