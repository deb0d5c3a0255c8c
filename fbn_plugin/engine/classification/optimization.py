"""timm's optimizers and learning rate schedules for a config."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import PlateauLRScheduler, create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.engine.run.rules import refusal
from fbn_plugin.engine.run.states import check_like
from fbn_plugin.frameworks.timm_optimizers import by_layer, param_groups, weight_decay_groups

__all__ = [
    "WITH_MIN_LR",
    "IterationSchedule",
    "PlateauSchedule",
    "build_optimizer",
    "build_scheduler",
    "optimizer_arguments",
]

_BLOCK = 64  # iterations

WITH_MIN_LR = ("cosine", "poly", "tanh")  # the schedules that end at MIN_LR

# Arguments that have a key of their own.
_OWN_KEYS = {"lr": "SOLVER.BASE_LR", "weight_decay": "SOLVER.WEIGHT_DECAY", "momentum": "SOLVER.MOMENTUM"}


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer over groups of parameters, in which norms are told by their type: timm's, or with
    SCALE_LR_DIVISOR those of ``param_groups``, and with LAYER_DECAY each in as many as there are layers.

    Raises:
        ValueError: it needs a package or a device that is not there, or refuses a value of OPT_ARGS.
    """
    solver = cfg.SOLVER
    if solver.SCALE_LR_DIVISOR:
        groups = param_groups(model, solver.BASE_LR, solver.WEIGHT_DECAY, solver.SCALE_LR_DIVISOR)
    else:
        groups = weight_decay_groups(model, solver.WEIGHT_DECAY, solver.FILTER_BIAS_AND_BN)
    if solver.LAYER_DECAY:
        groups = by_layer(model, groups, solver.LAYER_DECAY)
    arguments = optimizer_arguments(cfg)
    try:
        return create_optimizer_v2(
            groups,
            solver.OPTIMIZER,
            lr=solver.BASE_LR,
            weight_decay=solver.WEIGHT_DECAY,
            momentum=solver.MOMENTUM,
            **arguments,
        )
    except ValueError as error:
        if not arguments:
            raise
        raise refusal("SOLVER.OPT_ARGS", f"what {solver.OPTIMIZER} takes ({error})", solver.OPT_ARGS) from None
    except (AssertionError, ImportError) as error:  # NVIDIA's and others that timm knows
        raise refusal("SOLVER.OPTIMIZER", f"one that can be used here ({error})", solver.OPTIMIZER) from None


def optimizer_arguments(cfg: CfgNode) -> dict[str, Any]:
    """OPT_ARGS, if they are names that the optimizer takes, and values of the kind of its defaults.

    Raises:
        ValueError: the first that is not, with the names that are accepted.
    """
    name, given = cfg.SOLVER.OPTIMIZER, dict(cfg.SOLVER.OPT_ARGS)
    if not given or name not in list_optimizers():
        return given
    for argument, key in _OWN_KEYS.items():
        if argument in given:
            raise ValueError(f"SOLVER.OPT_ARGS must be without {argument}, for which there is {key}")
    try:
        signature = inspect.signature(get_optimizer_class(name, bind_defaults=False))
    except ImportError:  # which is said when it is built
        return given
    accepted = {
        each.name: each.default
        for each in list(signature.parameters.values())[1:]
        if each.name not in _OWN_KEYS and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    }
    for argument, value in given.items():
        if argument not in accepted:
            names = ", ".join(accepted) or "none"
            raise ValueError(f"SOLVER.OPT_ARGS must be arguments of {name}, got {argument!r}: accepted are {names}")
        if not _is_like(value, accepted[argument]):
            example = f"a value such as {accepted[argument]!r}"
            raise refusal(f"SOLVER.OPT_ARGS.{argument}", example, value)
    return given


def _is_like(value: Any, default: Any) -> bool:
    """Whether a value is of the kind of a default; None and what has no default may be anything."""
    if default is None or default is inspect.Parameter.empty:
        return True
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int | float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, tuple | list):
        return isinstance(value, tuple) and len(value) == len(default) and all(map(_is_like, value, default))
    return isinstance(value, type(default))


def build_scheduler(
    cfg: CfgNode, optimizer: torch.optim.Optimizer, iters_per_epoch: int
) -> "IterationSchedule | PlateauSchedule":
    """timm's schedule over SOLVER.MAX_EPOCH, one step an iteration; of "plateau", one an evaluation."""
    solver = cfg.SOLVER
    name, steps, decay_epochs, rate = solver.LR_SCHEDULER_NAME, solver.STEPS, solver.DECAY_EPOCHS, solver.GAMMA
    if not solver.MAX_EPOCH:  # nothing is trained
        name = "constant"
    if name == "plateau":
        return PlateauSchedule(cfg, optimizer, iters_per_epoch)
    epochs = solver.MAX_EPOCH - solver.COOLDOWN_EPOCHS - (solver.WARMUP_EPOCHS if solver.WARMUP_PREFIX else 0)
    if name == "constant":  # of which some releases of timm make no schedule, and so no warm-up
        name, steps = "multistep", ()
    elif name == "exponential":  # a step every iteration
        name, rate, decay_epochs = "step", rate ** (1 / (decay_epochs * iters_per_epoch)), 1 / iters_per_epoch
    scheduler, _ = create_scheduler_v2(
        optimizer,
        name,
        num_epochs=epochs,
        decay_epochs=decay_epochs,
        decay_milestones=steps,
        decay_rate=rate,
        min_lr=solver.MIN_LR,
        warmup_epochs=solver.WARMUP_EPOCHS if solver.MAX_EPOCH else 0,
        warmup_lr=solver.WARMUP_FACTOR * solver.BASE_LR,
        warmup_prefix=solver.WARMUP_PREFIX,
        step_on_epochs=False,
        updates_per_epoch=iters_per_epoch,
    )
    return IterationSchedule(scheduler)


class IterationSchedule:
    """A schedule of timm's whose rates follow from the iteration alone, asked for those of many iterations at once: one
    by one, with the caches full of a model's weights and activations, they would take some ten times as long.

    Args:
        schedule: timm's, of the rates of an optimizer.
    """

    def __init__(self, schedule: Scheduler):
        self._timm, self._optimizer = schedule, schedule.optimizer
        self._block, self._rates = -1, []

    def step_update(self, iteration: int) -> None:
        """Set the rates of an iteration, from 0."""
        block, place = divmod(iteration, _BLOCK)
        if block != self._block:
            self._rates = [self._rates_of(block * _BLOCK + number) for number in range(_BLOCK)]
            self._block = block
        for group, rate in zip(self._optimizer.param_groups, self._rates[place]):
            group["lr"] = rate

    def _rates_of(self, iteration: int) -> list[float]:
        self._timm.step_update(iteration)
        return [group["lr"] for group in self._optimizer.param_groups]


class PlateauSchedule:
    """timm's PlateauLRScheduler: a rate that falls where a metric of the evaluations has not got better for a while.

    timm's own keeps neither how long that is nor the rates in its state; this one keeps all, so that a resumed run goes
    on as if it had not stopped. The rates themselves are in the optimizer's state.

    Args:
        cfg: config.
        optimizer: whose rates are set.
        iters_per_epoch: in which the warm-up is counted.
    """

    def __init__(self, cfg: CfgNode, optimizer: torch.optim.Optimizer, iters_per_epoch: int):
        solver = cfg.SOLVER
        self.metric = solver.PLATEAU_METRIC
        with warnings.catch_warnings():
            # timm warns that a run which is resumed loses the state that is kept here.
            warnings.filterwarnings("ignore", "PlateauLRScheduler is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "The verbose parameter is deprecated", UserWarning)  # in timm 1.0.21
            self._timm = PlateauLRScheduler(
                optimizer,
                decay_rate=solver.GAMMA,
                patience_t=solver.PLATEAU_PATIENCE,
                warmup_t=solver.WARMUP_EPOCHS * iters_per_epoch,
                warmup_lr_init=solver.WARMUP_FACTOR * solver.BASE_LR,
                lr_min=solver.MIN_LR,
                mode="min" if self.metric == "loss" else "max",
            )
        shares = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]
        self._timm.lr_scheduler.min_lrs = [solver.MIN_LR * share for share in shares]
        self._seen = 0

    def step_update(self, iteration: int) -> None:
        """The rates of an iteration of the warm-up; behind it they stay."""
        if 0 < self._timm.warmup_t >= iteration:  # without one timm would begin at its first rate
            self._timm.step(iteration)

    def evaluated(self, finished: int, result: Mapping[str, float]) -> None:
        """Take an evaluation into account, once, and not within the warm-up.

        Args:
            finished: iterations before it.
            result: its metrics.
        """
        if finished > self._seen:
            self._seen = finished
            if finished > self._timm.warmup_t:
                self._timm.lr_scheduler.step(result[self.metric])  # as timm's does, where the metric alone is handed on

    def state_dict(self) -> dict[str, Any]:
        return {"evaluated": self._seen, **{name: getattr(self._timm.lr_scheduler, name) for name in _PLATEAU_STATE}}

    def check_state_dict(self, state: Any) -> None:
        """ValueError for what is no such state."""
        if isinstance(state, Mapping) and state.get("best") in (float("inf"), -float("inf")):
            state = {**state, "best": 0.0}  # before the first evaluation
        check_like({**dict.fromkeys(_PLATEAU_STATE, 0), "evaluated": 0, "best": 0.0}, state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seen = state["evaluated"]
        for name in _PLATEAU_STATE:
            setattr(self._timm.lr_scheduler, name, state[name])


_PLATEAU_STATE = ("best", "num_bad_epochs", "last_epoch", "cooldown_counter")
