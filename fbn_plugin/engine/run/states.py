"""Whether what a checkpoint holds beside the weights is what a run can go on with, looked at before any of it is used:
optimizer, schedule, scaler, random states, iteration and seed, of the right types and sizes.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fbn_plugin.engine.files.words import shown
from fbn_plugin.engine.run.cli import UserError

__all__ = ["check_like", "check_optimizer", "check_states", "checked_iteration"]

# Of a schedule, in PyTorch before 2.7.
_MAY_BE_MISSING = ("verbose",)

# Larger whole numbers are none of a run's.
_MOST = 2**63


def checked_iteration(path: str, content: Mapping[str, Any], key: str = "iteration") -> int:
    """The last iteration, from 0, that a checkpoint has behind it.

    Raises:
        UserError: there is none, or what is there is no such number.
    """
    if key not in content:
        raise UserError(f"checkpoint {path} is not of a run of this tool: it has no {key}")
    value = content[key]
    if type(value) is not int or not 0 <= value < _MOST:
        raise UserError(f"checkpoint {path}: {key} must be a whole number, 0 or more, got {_shown(value)}")
    return value


def check_states(path: str, content: Mapping[str, Any], objects: Mapping[str, Any]) -> None:
    """Hold the states in a checkpoint against the objects that are to take them; nothing is changed.

    Args:
        path: for the sentence.
        content: of the checkpoint.
        objects: key -> the object whose ``load_state_dict`` gets it. An own one says what fits by a method
            ``check_state_dict``, which raises ValueError.

    Raises:
        UserError: a state is missing, or is not one of such an object.
    """
    for key, own in objects.items():
        if key not in content:
            raise UserError(f"checkpoint {path} is not of a run of this tool: it has no {key}")
        try:
            if hasattr(own, "check_state_dict"):
                own.check_state_dict(content[key])
            elif isinstance(own, Optimizer):
                check_optimizer(own, content[key])
            else:
                check_like(own.state_dict(), content[key])
        except ValueError as error:
            raise UserError(f"checkpoint {path}: its {key} does not fit this run: {error}") from None


def check_like(own: Any, given: Any, name: str = "it") -> None:
    """Hold a state against the one of a new object: the same keys and lengths, and values of the same kind.

    Args:
        own: mappings, lists, tensors, numbers, texts, None. Where it is None, a single value of any kind fits; keys
            that begin with ``_`` may be missing, as PyTorch adds some in newer versions.
        given: what is to be loaded.
        name: of the state, for the sentence.

    Raises:
        ValueError: where it differs.
    """
    if isinstance(own, Mapping):
        _want(isinstance(given, Mapping), name, "a mapping", given)
        for key, value in own.items():
            if key in given:
                check_like(value, given[key], str(key))
            elif not str(key).startswith("_") and key not in _MAY_BE_MISSING:
                raise ValueError(f"{name} has no {key}")
    elif isinstance(own, list | tuple):
        _want(isinstance(given, list | tuple) and len(given) == len(own), name, f"a list of {len(own)}", given)
        for one, other in zip(own, given):
            check_like(one, other, name)
    elif isinstance(own, Tensor):
        fits = isinstance(given, Tensor) and given.shape == own.shape and given.dtype == own.dtype
        _want(fits, name, f"a tensor of shape {tuple(own.shape)} and {own.dtype}", given)
    elif isinstance(own, bool):
        _want(isinstance(given, bool), name, "True or False", given)
    elif isinstance(own, int):
        _want(type(given) is int and 0 <= given < _MOST, name, "a whole number, 0 or more", given)
    elif isinstance(own, float):
        _want(_is_number(given), name, "a finite number", given)
    elif isinstance(own, str):
        _want(isinstance(given, str), name, "text", given)
    else:
        single = given is None or isinstance(given, bool | int | float | str | Tensor | torch.dtype)
        _want(single, name, "a single value", given)


def check_optimizer(optimizer: Optimizer, given: Any) -> None:
    """Hold a state of an optimizer against its parameters: groups of the same sizes, and tensors that fit these.

    Raises:
        ValueError: where it differs.
    """
    for key, kind in (("state", Mapping), ("param_groups", list)):
        _want(isinstance(given, Mapping), "the state", "a mapping", given)
        _want(isinstance(given.get(key), kind), key, f"a {kind.__name__.lower()}", given.get(key))
    groups, own = given["param_groups"], optimizer.param_groups
    sizes = [len(group["params"]) for group in own]
    theirs = [_size(group) for group in groups]
    if theirs != sizes:
        raise ValueError(f"its groups have {theirs} parameters, this run's {sizes}")
    numbers = [number for group in groups for number in group["params"]]
    if len(set(numbers)) < len(numbers):
        raise ValueError("a parameter is in it twice")
    for group, settings in zip(own, groups):
        for key in ("lr", *group):
            if key != "params":
                _want(key != "lr" or key in settings, "a group", "a mapping with lr", "one without")
                _check_setting(key, group[key], settings.get(key, group[key]))
    parameters = dict(zip(numbers, (each for group in own for each in group["params"])))
    for number, state in given["state"].items():
        _want(number in parameters, "state", "by the numbers of parameters", number)
        _want(isinstance(state, Mapping), f"the state of parameter {number}", "a mapping", state)
        for key, value in state.items():
            _check_value(f"{key} of parameter {number}", parameters[number], value)


def _size(group: Any) -> int | str:
    members = group.get("params") if isinstance(group, Mapping) else None
    if not isinstance(members, list) or not all(type(member) is int for member in members):
        return "no"
    return len(members)


def _check_setting(key: str, own: Any, given: Any) -> None:
    """Options such as rates, where 0 and 0.0 are the same, and None is "as PyTorch likes"."""
    if isinstance(own, int | float) and not isinstance(own, bool):
        least = 0 if own >= 0 else -math.inf
        _want(_is_number(given) and given >= least, key, "a finite number" + ", 0 or more" * (least == 0), given)
    elif isinstance(own, list | tuple):
        _want(isinstance(given, list | tuple) and len(given) == len(own), key, f"a list of {len(own)}", given)
        for one, other in zip(own, given):
            _check_setting(key, one, other)
    elif isinstance(own, bool):
        _want(given is None or isinstance(given, bool), key, "True or False", given)
    else:
        check_like(own, given, key)


def _check_value(name: str, parameter: Tensor, given: Any) -> None:
    """A part of a parameter's state: of its shape, of some of its dimensions (factored ones), or a single value."""
    if isinstance(given, Tensor):
        whole, shape = tuple(parameter.shape), tuple(given.shape)
        if len(shape) == len(whole):
            fits = all(size in (1, full) for size, full in zip(shape, whole))
        else:
            fits = len(shape) < len(whole) and all(size in whole for size in shape)
        fits = fits and given.is_floating_point() == parameter.is_floating_point()
        _want(fits or given.numel() == 1, name, f"a tensor of shape {whole}", given)
        if not given.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinity in it")
    elif isinstance(given, list):  # such as factors of a matrix for each dimension
        fits = all(each is None or isinstance(each, Tensor) for each in given)
        _want(fits, name, "a tensor, a number or a list of tensors", given)
    else:
        _want(given is None or isinstance(given, bool) or _is_number(given), name, "a tensor or a number", given)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 2**1000 if isinstance(value, int) else math.isfinite(value)


def _want(holds: bool, name: str, what: str, given: Any) -> None:
    if not holds:
        raise ValueError(f"{name} must be {what}, got {_shown(given)}")


def _shown(value: Any) -> str:
    """A value in a sentence: its beginning, of a tensor its shape."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, Mapping | list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return shown(value, 80)
