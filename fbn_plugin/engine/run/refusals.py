"""What no run begins with, and what ends one, whichever engine it is of: settings that do not fit the machine, the
weights or the run that they are to continue, and losses that are not finite.
"""

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run.config import CfgNode, other_processes, refuse_changes
from fbn_plugin.engine.run.logging import read_metrics
from fbn_plugin.engine.run.output_dir import check_output_dir, holds_run
from fbn_plugin.engine.run.rules import refusal
from fbn_plugin.engine.run.run_info import read_run_info
from fbn_plugin.engine.run.states import checked_iteration

__all__ = ["check_enough_iterations", "check_finite", "check_run", "check_state"]


def check_run(
    cfg: CfgNode,
    norms: Mapping[str, str],
    device: str | torch.device,
    processes: int,
    resume: bool,
    eval_only: bool,
    read_saved: Callable[[], CfgNode],
    may_change: Sequence[str],
) -> bool:
    """Refuse what no run begins with; nothing is written.

    Args:
        cfg: the run's settings, scaled to its number of processes.
        norms: key -> spec of each norm.
        device: of one process.
        processes: how many share the run.
        resume, eval_only: as on the command line.
        read_saved: reads the settings of the run in OUTPUT_DIR.
        may_change: keys (with shell wildcards) that a continued run may have otherwise.

    Returns:
        whether there is a checkpoint in OUTPUT_DIR that the run goes on from, or evaluates.

    Raises:
        FileNotFoundError, ValueError: one sentence.
    """
    if not eval_only:
        images = cfg.SOLVER.IMS_PER_BATCH
        if images < 1 or images % processes:
            what = f"a positive multiple of the number of processes ({processes})"
            raise refusal("SOLVER.IMS_PER_BATCH", what, images)
        if torch.device(device).type == "cpu" and (processes > 1 or dist.is_initialized()):
            _refuse_sync_bn(norms)
    check_output_dir(cfg.OUTPUT_DIR, resume, eval_only)
    continues = resume and holds_run(cfg.OUTPUT_DIR)
    if eval_only and not (continues or cfg.MODEL.WEIGHTS or cfg.MODEL.get("PRETRAINED")):
        pretrained = ", MODEL.PRETRAINED" if "PRETRAINED" in cfg.MODEL else ""
        raise ValueError(
            f"nothing to evaluate: set MODEL.WEIGHTS{pretrained}, or --resume with a checkpoint in OUTPUT_DIR"
        )
    if continues and not eval_only:
        made_by = read_run_info(cfg.OUTPUT_DIR).get("processes")
        if isinstance(made_by, int) and made_by != processes:
            raise other_processes(cfg.OUTPUT_DIR, made_by, processes)
        refuse_changes(read_saved(), cfg, may_change)
        read_metrics(os.path.join(cfg.OUTPUT_DIR, "metrics.json"))  # which the run goes on from, too
    return continues


def _refuse_sync_bn(norms: Mapping[str, str]) -> None:
    """PyTorch's and detectron2's synchronized batch norms exchange their statistics between GPUs only."""
    for key, spec in norms.items():
        if spec and spec.partition("(")[0] in ("SyncBN", "nnSyncBN"):
            what = "BN or SyncFBN(t_sigma=inf) where processes train on the CPU, as SyncBN runs on GPUs only"
            raise refusal(key, what, spec)


def check_state(path: str, state: Mapping[str, Any], numbers: Collection[str] = ("iteration",)) -> None:
    """Refuse to go on from a checkpoint that has no states of a run.

    Raises:
        ValueError: one of ``numbers`` is not there, or no whole number from 0 on.
    """
    for name in numbers:
        checked_iteration(path, state, name)


def check_enough_iterations(key: str, value: int, iterations: int, finished: int, output_dir: str) -> None:
    """Refuse an end that lies before what is trained already.

    Args:
        key, value: what sets the end.
        iterations: of the whole run, that follow from it.
        finished: iterations that the checkpoint has behind it.
        output_dir: where that is.

    Raises:
        ValueError: ``finished`` is more.
    """
    if finished > iterations:
        done = counted(finished, "iteration")
        raise refusal(key, f"enough for the {done} of the run that OUTPUT_DIR {output_dir} holds", value)


def check_finite(losses: Mapping[str, float], iteration: int) -> None:
    """Stop a run whose loss has diverged.

    Args:
        losses: name -> value, ``total_loss`` among them.
        iteration: from 0.

    Raises:
        FloatingPointError: ``total_loss`` is infinite or NaN.
    """
    if not math.isfinite(losses["total_loss"]):
        listed = ", ".join(f"{name} {value:g}" for name, value in losses.items())
        raise FloatingPointError(
            f"the loss is not finite at iteration {iteration} ({listed}); lower SOLVER.BASE_LR, or clip gradients"
        )
