"""Frameworks that bring norms, layers and blocks of their own, and what lets the functions that work on any model know
them.

A model of a framework can only exist if the framework is imported. So a function that is given a model asks here first,
and the adapters of those that are imported get loaded: they tell the functions below them what they need. What an
adapter is, and of which packages, :mod:`fbn_plugin.frameworks` says; nothing here or below knows one.
"""

import sys
from collections.abc import Callable

_LOADERS: dict[str, Callable[[], object]] = {}


def register_loader(package: str, load: Callable[[], object]) -> None:
    """Call ``load`` as soon as a function is given a model while ``package`` is imported; it may be called again."""
    _LOADERS[package] = load


def load_adapters() -> None:
    """Load the adapters of the packages that are imported."""
    for package, load in list(_LOADERS.items()):
        if package in sys.modules:
            load()
