"""Functions of other packages that ours take the place of, for everyone who holds them.

A function is held in more places than the module that defines it: other modules bind it by ``from ... import``, and
partials, dicts, class attributes, closures and LazyCalls keep it. So the function stays the object that it is, and its
code is changed for one that calls ours. What it did by itself is kept as another function.
"""

import functools
import inspect
import types
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from fbn_plugin import internals

__all__ = ["CALLER", "original", "replace", "restore"]


@dataclass
class _Replaced:
    original: Callable[..., Any]
    code: types.CodeType  # which calls ours
    ours: Callable[..., Any] | None = None
    # Those that have the code above, with their own: a module that is loaded anew has another function.
    functions: list[tuple[types.FunctionType, types.CodeType]] = field(default_factory=list)


_REPLACED: dict[str, _Replaced] = {}

# The `stacklevel` with which a function in the place of one that calls itself warns its caller.
CALLER = 4


def original(name: str) -> Callable[..., Any]:
    """The function under a dotted name as its package has it, whatever is in its place.

    Args:
        name: such as ``"detectron2.layers.batch_norm.get_norm"``; of a class method with ``.__func__`` behind it, of a
            function that is wrapped with ``.__wrapped__``.

    Raises:
        ValueError: it is not a Python function, or has a closure, so that it cannot get the code of another.
    """
    if name not in _REPLACED:
        function = internals.lookup(name)
        if not isinstance(function, types.FunctionType) or function.__closure__:
            raise ValueError(f"{name} is not a plain function, which another could take the place of")
        _REPLACED[name] = _Replaced(_copy(function), _code_that_calls(name, function.__code__))
    return _REPLACED[name].original


def replace(
    name: str, ours: Callable[..., Any], calls_itself: bool = False, signature: inspect.Signature | None = None
) -> None:
    """Let ``ours`` take the place of a function. Doing so again is for a module that was loaded anew.

    Args:
        name: see :func:`original`.
        ours: takes the same arguments.
        calls_itself: whether the function calls itself by its name, as one that walks over the children of a model
            does. Then it goes on as it began: ``ours`` gets the outermost call.
        signature: what ``inspect`` is to say of the function; None is what it said before.
    """
    theirs = original(name)
    entry, function = _REPLACED[name], internals.lookup(name)
    entry.ours = _outermost(ours, theirs) if calls_itself else ours
    if function.__code__ is not entry.code:
        entry.functions.append((function, function.__code__))
        function.__wrapped__ = theirs  # the signature is still that
        if signature is not None:
            function.__signature__ = signature
        function.__code__ = entry.code


def restore(name: str) -> None:
    """Give a function its own code back; does nothing where it has it."""
    if name in _REPLACED:
        for function, code in _REPLACED[name].functions:
            function.__code__ = code
            del function.__wrapped__
            vars(function).pop("__signature__", None)
        _REPLACED[name].functions.clear()


def in_place_of(name: str) -> Callable[..., Any]:
    """What to call in place of a function."""
    return _REPLACED[name].ours


def _calls_ours(*args, **kwargs):
    # This code has the globals of the function that gets it.
    from fbn_plugin.frameworks.replacement import in_place_of

    return in_place_of("name")(*args, **kwargs)


def _code_that_calls(name: str, code: types.CodeType) -> types.CodeType:
    own = _calls_ours.__code__
    constants = tuple(name if constant == "name" else constant for constant in own.co_consts)
    return own.replace(co_consts=constants, co_name=code.co_name)


def _copy(function: types.FunctionType) -> types.FunctionType:
    copy = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    del copy.__wrapped__
    return copy


def _outermost(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    inside: ContextVar[bool] = ContextVar(f"inside of {theirs.__qualname__}", default=False)

    def call(*args, **kwargs):
        if inside.get():
            return theirs(*args, **kwargs)
        token = inside.set(True)
        try:
            return ours(*args, **kwargs)
        finally:
            inside.reset(token)

    return call
