"""The linear rule: one config for any number of processes, after Goyal et al., "Accurate, Large Minibatch SGD" (2017),
section 2.1, and detectron2's SOLVER.REFERENCE_WORLD_SIZE."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.engine.run.rules import get_value

__all__ = ["DETECTION", "ScaledKeys", "scale_to_processes"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScaledKeys:
    """What of a config follows from the number of processes, besides SOLVER.IMS_PER_BATCH.

    Args:
        rates: keys of learning rates, which grow as the batch does.
        iterations: keys of numbers of iterations, or of lists of them, which shrink as the batch grows; 0 stays 0.
    """

    rates: tuple[str, ...]
    iterations: tuple[str, ...]


DETECTION = ScaledKeys(
    rates=("SOLVER.BASE_LR",),
    iterations=(
        "SOLVER.MAX_ITER",
        "SOLVER.STEPS",
        "SOLVER.WARMUP_ITERS",
        "SOLVER.CHECKPOINT_PERIOD",
        "TEST.EVAL_PERIOD",
        "TEST.EVAL_ITERATIONS",
    ),
)


def scale_to_processes(
    cfg: CfgNode, processes: int, say: Callable[[str], None] = logger.info, keys: ScaledKeys = DETECTION
) -> CfgNode:
    """The config for another number of processes than SOLVER.REFERENCE_WORLD_SIZE.

    The images of one process stay as many: IMS_PER_BATCH and the rates are multiplied by ``processes /
    REFERENCE_WORLD_SIZE``, and the numbers of iterations divided by it. The result's REFERENCE_WORLD_SIZE is
    ``processes``, so that scaling it again changes nothing, and the config that a run saves means the same again. With
    REFERENCE_WORLD_SIZE 0, the config as it is.

    Args:
        cfg: settings of a run; they are not changed.
        processes: how many share the run.
        say: gets a sentence on what became of the settings.
        keys: what is scaled.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference in (0, processes):
        return cfg
    scaled = cfg.clone()
    scaled.defrost()

    def iterations(count: int) -> int:
        return max(1, round(count * reference / processes)) if count else 0

    def rate(value: float) -> float:
        return value * (processes / reference)

    scaled.SOLVER.IMS_PER_BATCH = scaled.SOLVER.IMS_PER_BATCH // reference * processes
    for key, scale in (*((key, rate) for key in keys.rates), *((key, iterations) for key in keys.iterations)):
        group, _, name = key.rpartition(".")
        node = get_value(scaled, group)
        several = isinstance(node[name], list | tuple)
        node[name] = tuple(dict.fromkeys(map(scale, node[name]))) if several else scale(node[name])
    scaled.SOLVER.REFERENCE_WORLD_SIZE = processes
    became = [(key.rpartition(".")[2], get_value(scaled, key)) for key in (*keys.rates, *keys.iterations)]
    listed = ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in became)
    say(
        f"SOLVER.REFERENCE_WORLD_SIZE {reference}, and {counted(processes, 'process')}: "
        f"IMS_PER_BATCH {scaled.SOLVER.IMS_PER_BATCH}, {listed}"
    )
    if cfg.is_frozen():
        scaled.freeze()
    return scaled
