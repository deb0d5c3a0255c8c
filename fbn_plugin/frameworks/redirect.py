"""Put another function in the place of one that may be held anywhere: imported by name, in a registry, in a partial.

A module's attribute can be replaced, but what took the function before goes on with the old one. So the function itself
stays, and its code is exchanged.
"""

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

_FIELDS = ("__code__", "__defaults__", "__kwdefaults__")


def _redirected(*args: Any, __target__: Callable, **kwargs: Any) -> Any:
    return __target__(*args, **kwargs)


class Redirection:
    """A function whose calls go to another one, from :meth:`start` to :meth:`stop`, wherever it is held.

    Attributes:
        function: the function, without a closure.
        original: does what it did before.
        signature: its signature.
    """

    def __init__(self, function: FunctionType) -> None:
        self.function = function
        self.signature = inspect.signature(function)
        self._fields = {name: getattr(function, name) for name in _FIELDS}
        self.original = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
        self.original.__kwdefaults__ = function.__kwdefaults__
        self.original.__doc__, self.original.__module__ = function.__doc__, function.__module__

    def start(self, target: Callable, signature: inspect.Signature | None = None) -> None:
        """Let calls go to ``target``; ``signature`` is what ``inspect`` then says of the function, by default what it
        said before."""
        self.function.__signature__ = signature or self.signature
        self.function.__defaults__, self.function.__kwdefaults__ = None, {"__target__": target}
        self.function.__code__ = _redirected.__code__

    def stop(self) -> None:
        """Let the function do what it did before."""
        for name, value in self._fields.items():
            setattr(self.function, name, value)
        vars(self.function).pop("__signature__", None)
