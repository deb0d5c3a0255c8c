"""detectron2's model and optimizer for a config that has what ``add_config`` adds."""

import torch
from detectron2 import modeling
from detectron2.config import CfgNode
from detectron2.solver import build as solver_build
from torch import nn

from fbn_plugin import apply_gamma_init, param_groups, prepend_input_norm
from fbn_plugin.engine.run.detection_rules import divisor_rules
from fbn_plugin.engine.run.rules import check_values

__all__ = ["build_model", "build_optimizer"]


def build_model(cfg: CfgNode) -> nn.Module:
    """detectron2's model, not trained: with the scales that its norms are to start at, and INPUT.NORM_GAMMA_INIT.

    Raises:
        ValueError: what detectron2 refuses, or an INPUT.NORM_GAMMA_INIT that is neither 0 nor in (0, 1].
    """
    model = apply_gamma_init(modeling.build_model(cfg))
    if cfg.INPUT.NORM_GAMMA_INIT:
        prepend_input_norm(model, cfg.INPUT.NORM_GAMMA_INIT)
    return model


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """detectron2's optimizer, with SOLVER.SCALE_LR_DIVISOR over the groups of :func:`fbn_plugin.param_groups`.

    Raises:
        ValueError: a divisor below 0; or one together with a weight decay on norms or biases, or with BIAS_LR_FACTOR,
            see ``divisor_rules``.
    """
    solver = cfg.SOLVER
    if not solver.SCALE_LR_DIVISOR:
        return solver_build.build_optimizer(cfg, model)
    check_values(cfg, divisor_rules(cfg))
    groups = param_groups(model, solver.BASE_LR, solver.WEIGHT_DECAY, solver.SCALE_LR_DIVISOR)
    optimizer = torch.optim.SGD(groups, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, foreach=True)
    return solver_build.maybe_add_gradient_clipping(cfg, optimizer)
