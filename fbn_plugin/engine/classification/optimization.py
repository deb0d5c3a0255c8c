"""timm's optimizers and learning rate schedules for a config."""

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.engine.run.rules import refusal
from fbn_plugin.frameworks.timm import param_groups

__all__ = ["build_optimizer", "build_scheduler"]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer over its own parameter groups, or with SCALE_LR_DIVISOR over those of ``param_groups``.

    Raises:
        ValueError: it needs a package or a device that is not there.
    """
    solver = cfg.SOLVER
    parameters = model
    if solver.SCALE_LR_DIVISOR:
        parameters = param_groups(model, solver.BASE_LR, solver.WEIGHT_DECAY, solver.SCALE_LR_DIVISOR)
    try:
        return create_optimizer_v2(
            parameters,
            solver.OPTIMIZER,
            lr=solver.BASE_LR,
            weight_decay=solver.WEIGHT_DECAY,
            momentum=solver.MOMENTUM,
            filter_bias_and_bn=solver.FILTER_BIAS_AND_BN,
        )
    except (AssertionError, ImportError) as error:  # NVIDIA's and others that timm knows
        raise refusal("SOLVER.OPTIMIZER", f"one that can be used here ({error})", solver.OPTIMIZER) from None


def build_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer, iters_per_epoch: int) -> Scheduler:
    """timm's schedule over SOLVER.MAX_EPOCH, one step an iteration."""
    solver = cfg.SOLVER
    name, steps = solver.LR_SCHEDULER_NAME, solver.STEPS
    if name == "constant":  # of which some releases of timm make no schedule, and so no warm-up
        name, steps = "multistep", ()
    scheduler, _ = create_scheduler_v2(
        optimizer,
        name,
        num_epochs=solver.MAX_EPOCH,
        decay_milestones=steps,
        decay_rate=solver.GAMMA,
        min_lr=solver.MIN_LR,
        warmup_epochs=solver.WARMUP_EPOCHS,
        warmup_lr=solver.WARMUP_FACTOR * solver.BASE_LR,
        step_on_epochs=False,
        updates_per_epoch=iters_per_epoch,
    )
    return scheduler
