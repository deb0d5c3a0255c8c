"""Another project's script, run as Python itself would run it, after :func:`fbn_plugin.register`: what
``python -m fbn_plugin`` does.

The script is ``__main__``, with the arguments, the search path and the traceback that it has without us. Processes
that ``multiprocessing`` starts anew (spawn, forkserver), as detectron2's ``launch`` and a DataLoader do, begin by
running the script's definitions once more: there the norms are registered before that, too.
"""

import builtins
import functools
import importlib.util
import io
import json
import os
import sys
import types
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from multiprocessing import spawn
from pathlib import Path
from typing import Any

import fbn_plugin
from fbn_plugin.engine.run.cli import import_modules, imported

__all__ = ["Script", "main_of_new_process"]

# Tells the processes that are started anew what is run: {"main": what `spawn.prepare` reads, "imports": [...]}.
_VARIABLE = "FBN_PLUGIN_SCRIPT"


class Script:
    """A script, or a module as ``python -m`` runs it.

    Args:
        target: the script's path, or the module's name.
        arguments: its command line.
        is_module: whether ``target`` is a module.
        imports: modules and files of the user's, see :func:`import_modules`.

    Raises:
        ValueError, OSError: one sentence; there is no such script or module, or what is to be imported.
    """

    def __init__(
        self, target: str, arguments: Sequence[str] = (), is_module: bool = False, imports: Iterable[str] = ()
    ):
        if is_module:
            spec = _find_module(target)
            self.file, main = spec.origin, {"init_main_from_name": spec.name}
            self.names = {"__spec__": spec, "__loader__": spec.loader, "__package__": spec.parent}
            self.names["__cached__"] = spec.cached
        else:
            self.file = _find_file(target)
            main = {"init_main_from_path": os.path.normpath(self.file)}
            self.names = {"__spec__": None, "__loader__": SourceFileLoader("__main__", self.file), "__package__": None}
            if not getattr(sys.flags, "safe_path", sys.flags.isolated):  # else Python puts no folder of anyone's there
                sys.path[0] = os.path.dirname(os.path.realpath(target))
        sys.argv = [self.file if is_module else target, *arguments]
        import_modules(imports)
        fbn_plugin.register()
        os.environ[_VARIABLE] = json.dumps({"main": main, "imports": imported()})
        _register_in_new_processes()

    def run(self) -> None:
        """Run it; what it raises is raised, and shown without the frames that lead to it."""
        main = types.ModuleType("__main__")
        vars(main).update({"__cached__": None, "__builtins__": builtins, "__file__": self.file, **self.names})
        show = sys.excepthook

        def show_from_script_on(kind, error, traceback):
            while traceback is not None and traceback.tb_frame.f_globals is not vars(main):
                traceback = traceback.tb_next
            show(kind, error.with_traceback(traceback), traceback)

        sys.excepthook = show_from_script_on
        sys.modules["__main__"] = main
        if self.names["__spec__"] is None:
            with io.open_code(self.file) as file:
                code = compile(file.read(), self.file, "exec", dont_inherit=True)
        else:
            code = self.names["__loader__"].get_code(self.names["__spec__"].name)
        exec(code, vars(main))


def _find_file(script: str) -> str:
    if os.path.isdir(script):
        raise IsADirectoryError(f"the script {script} is a folder")
    if not os.path.isfile(script):
        raise FileNotFoundError(f"the script {script} is not there; -m is for a module")
    return os.path.abspath(script)


def _find_module(name: str) -> ModuleSpec:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"-m wants the name of a module, got {name!r}")
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
            if spec is None:
                raise ValueError(f"-m {name}: a package without a module __main__ cannot be run")
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # what the user's own package needs
        spec = None
    if spec is None or spec.loader is None:
        raise ValueError(f"-m {name}: there is no such module")
    return spec


def _register_in_new_processes() -> None:
    """Let what ``multiprocessing`` tells a new process send it by :func:`main_of_new_process`."""
    theirs = spawn.get_preparation_data
    if hasattr(theirs, "__wrapped__"):
        return

    @functools.wraps(theirs)
    def get_preparation_data(name: str) -> dict[str, Any]:
        data = theirs(name)
        given = [key for key in ("init_main_from_name", "init_main_from_path") if data.pop(key, None) is not None]
        if given:
            data["init_main_from_name"] = "fbn_plugin.engine.run.script_in_new_process"
            folder = str(Path(fbn_plugin.__file__).resolve().parents[1])
            data["sys_path"] = [*data["sys_path"], *({folder} - set(data["sys_path"]))]
        return data

    spawn.get_preparation_data = get_preparation_data


def main_of_new_process() -> dict[str, Any]:
    """Register, then run the script's definitions in a process that ``multiprocessing`` has started anew.

    Returns:
        The names of the script.
    """
    given = json.loads(os.environ[_VARIABLE])
    import_modules(given["imports"])
    fbn_plugin.register()
    _register_in_new_processes()
    before = sys.modules["__main__"]
    spawn.prepare(given["main"])
    return {} if sys.modules["__main__"] is before else vars(sys.modules["__main__"])
