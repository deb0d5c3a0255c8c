"""How a function gets into modules of another package, those that are imported and those that will be.

``register()`` at the top of a script should not import what the script does not use: Transformers takes seconds, and
Ultralytics writes a settings file. A program that does use them may import them before or after. So their adapters wait
here for the module that they enter: a finder on ``sys.meta_path`` finds nothing by itself, and, when a module that is
waited for is found by another, calls what waits right after the module has run.
"""

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_waiting: dict[str, list[Callable[[], object]]] = {}


class _Watcher(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _waiting:
            return None
        finders = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        if spec is not None and spec.loader is not None:
            _call_after(spec.loader, name)
        return spec


def _call_after(loader: importlib.abc.Loader, name: str) -> None:
    """Let a loader, which is of this module alone, call what waits once the module has run."""
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        loader.exec_module = execute
        execute(module)
        for call in _waiting.pop(name, ()):
            call()
        _watch()

    loader.exec_module = exec_module


_watcher = _Watcher()


def after_import(module: str, call: Callable[[], object]) -> None:
    """Call ``call`` once ``module`` has been imported: now, if it is, and else as soon as it has run.

    Args:
        module: dotted name.
        call: without arguments; the same one waits once, however often it is given.
    """
    if module in sys.modules:
        call()
        return
    calls = _waiting.setdefault(module, [])
    if call not in calls:
        calls.append(call)
    _watch()


def forget(module: str, call: Callable[[], object]) -> None:
    """Take back what :func:`after_import` was given, if it has not been called."""
    calls = _waiting.get(module, [])
    if call in calls:
        calls.remove(call)
    if not calls:
        _waiting.pop(module, None)
    _watch()


def _watch() -> None:
    """Be among the finders as long as something waits."""
    if _waiting and _watcher not in sys.meta_path:
        sys.meta_path.insert(0, _watcher)
    elif not _waiting and _watcher in sys.meta_path:
        sys.meta_path.remove(_watcher)
