"""What the command lines of ``tools/`` share: their arguments, their tables, and one line instead of a traceback for
bad input."""

import argparse
import contextlib
import difflib
import importlib
import importlib.util
import multiprocessing
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from fbn_plugin.engine.files.disk import WriteError, is_full
from fbn_plugin.engine.files.words import on_one_line
from fbn_plugin.engine.run import distributed, stopping
from fbn_plugin.engine.run.output_dir import how_to_continue

__all__ = [
    "RUN_ERRORS",
    "UserError",
    "add_import",
    "add_log_period",
    "add_resume_auto",
    "check_outputs",
    "error_sentence",
    "format_table",
    "import_modules",
    "imported",
    "parse_config_arguments",
    "path_names",
    "refuse_unknown_flags",
    "show_held_warnings",
    "stoppable",
    "user_errors",
    "with_resume_auto",
]


class UserError(ValueError):
    """Bad input that shows up late, in the middle of a run: an image file cut short, a diverged loss."""


# What bad input may still raise while a run computes; all else is a bug.
RUN_ERRORS = (UserError, FloatingPointError, OSError)


@contextlib.contextmanager
def user_errors(*types: type[BaseException]) -> Iterator[None]:
    """Print an error of the given types as ``error: sentence`` and exit with code 2, or with 1 where a file cannot be
    written, as of a full disk; all else keeps its traceback.

    Without types: what set-up raises for bad input (ValueError, OSError, missing package). Wrap the training itself in
    ``user_errors(*RUN_ERRORS)``, so that a bug keeps its traceback.

    What other packages say in set-up about their own future is held back, so that the sentence does not stand below
    pages of it, and is shown when the training begins, or with a bug.
    """
    in_run, types = bool(types), types or (ValueError, OSError, ModuleNotFoundError)
    if in_run:
        show_held_warnings()
    try:
        with contextlib.nullcontext() if in_run else _hold_warnings():
            yield
    except types as error:
        if stopping.interrupted_by() is not None or isinstance(error, BrokenPipeError):
            raise  # no bad input, see `stoppable`
        _held.clear()
        print(f"error: {on_one_line(error_sentence(error))}", file=sys.stderr)
        disk = isinstance(error, WriteError) or (isinstance(error, OSError) and is_full(error))
        raise SystemExit(1 if disk else 2) from None
    except Exception:
        show_held_warnings()
        raise


# Arguments for `warnings.showwarning`.
_held: list[tuple] = []
_PACKAGE = str(Path(__file__).parents[2])


@contextlib.contextmanager
def _hold_warnings() -> Iterator[None]:
    """Keep deprecations back that are not this package's."""
    show = warnings.showwarning

    def hold(message, category, filename, *place):
        if issubclass(category, FutureWarning | DeprecationWarning) and not filename.startswith(_PACKAGE):
            _held.append((message, category, filename, *place))
        else:
            show(message, category, filename, *place)

    warnings.showwarning = hold
    try:
        yield
    finally:
        if warnings.showwarning is hold:
            warnings.showwarning = show


def show_held_warnings() -> None:
    """Show the warnings that :func:`user_errors` has held back."""
    held = _held[:]
    _held.clear()
    for warning in held:
        warnings.showwarning(*warning)


def error_sentence(error: BaseException) -> str:
    """What an error says, in a sentence: of one of the system's the file and the reason, without its number."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"this needs the package {error.name!r}, which is not installed"
    # A DataLoader worker sends its whole traceback as the message; the sentence comes last.
    sentence = str(error).strip().rsplit(f"{type(error).__name__}: ", 1)[-1]
    system = re.fullmatch(r"\[Errno -?\d+\] (.+?)(?:: (['\"])(.+)\2)?", sentence)
    if system is None:
        return sentence
    reason, _, file = system.groups()
    return reason if file is None else f"{file}: {reason}"


@contextlib.contextmanager
def stoppable(output_dir: str | os.PathLike | None = None) -> Iterator[None]:
    """Let signals and lost processes end a tool with one sentence, no traceback and a code of its own.

    130 is Ctrl-C, 143 SIGTERM and its like (see ``stopping``), 141 a reader of the output that is gone, as ``head``,
    and 1 another process of the run that stopped, or one that loads images. Of several processes of a run, the first
    one says the sentence, and none that the tool itself has started.

    Args:
        output_dir: of a training, which goes on with ``--resume``.

    Raises:
        SystemExit: it has ended so.
    """
    _open_missing_streams()
    with stopping.handled():
        try:
            yield
            sys.stdout.flush()
        except SystemExit as stop:
            if stop.code:
                _end_among_others(stop.code)
            raise
        except BaseException as error:
            number = stopping.interrupted_by()
            if number is None and isinstance(error, KeyboardInterrupt):
                number = signal.SIGINT
            if number is not None:
                name = "Ctrl-C" if number == signal.SIGINT else number.name
                rest = f"; {how_to_continue(output_dir)}" if output_dir is not None else " before the end"
                _leave(stopping.exit_code(number), f"stopped by {name}{rest}", distributed.is_main())
            if isinstance(error, BrokenPipeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
                rest = f"stopped, as nobody reads its output; {how_to_continue(output_dir)}" if output_dir else ""
                _leave(141, rest, bool(output_dir))
            if (sentence := distributed.lost_process(error)) is not None:
                _leave(1, f"error: {sentence}", True)
            if distributed.world_size() > 1:
                traceback.print_exc()
                _end_among_others(1)
            raise


def _open_missing_streams() -> None:
    """Give a process that was started without a standard stream (``>&-``, as daemons are) one that leads nowhere: else
    the next file that it opens gets the stream's number, and what libraries print there ends up in that file."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w", closefd=False))


def _leave(code: int, sentence: str, speaks: bool) -> NoReturn:
    if speaks and multiprocessing.parent_process() is None:
        with contextlib.suppress(OSError):  # of a terminal that was closed
            print(sentence, file=sys.stderr, flush=True)
    _end_among_others(code)
    raise SystemExit(code) from None


def _end_among_others(code: int) -> None:
    """End here where processes share a run: the destructor of their group would wait for the others, for ten seconds in
    which they do not know yet."""
    if distributed.world_size() > 1:
        stopping.end(code)


def parse_config_arguments(description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line of a training tool: detectron2's ``--config-file``, ``--resume``, ``--eval-only`` and
    trailing ``KEY VALUE ...`` overrides, ``--log-period`` and ``--import``.

    Args:
        description: the tool's docstring.
        argv: without the tool's name; None is that of the process.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_log_period(parser)
    add_import(parser)
    parser.add_argument("--config-file", metavar="FILE", help="YAML configuration file")
    add_resume_auto(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint in OUTPUT_DIR; --resume auto: from the newest that is not damaged",
    )
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, or with --resume the last checkpoint"
    )
    parser.add_argument("overrides", metavar="KEY VALUE", nargs=argparse.REMAINDER, help="config overrides, in pairs")
    args = parser.parse_args(with_resume_auto(argv))
    with user_errors():
        refuse_unknown_flags(parser, args.overrides)
    return args


def add_resume_auto(parser: argparse.ArgumentParser) -> None:
    """Add what :func:`with_resume_auto` writes for ``--resume auto``: argparse has no option whose value may be missing
    before ``KEY VALUE`` pairs."""
    parser.add_argument(
        "--auto-resume", dest="resume", action="store_const", const="auto", default=False, help=argparse.SUPPRESS
    )


def with_resume_auto(argv: Sequence[str] | None) -> list[str]:
    """A command line (None is that of the process) with ``--resume auto`` and ``--resume=auto`` as one flag.

    Examples::

        >>> with_resume_auto(["--resume", "auto", "SEED", "1"])
        ['--auto-resume', 'SEED', '1']
        >>> with_resume_auto(["--resume", "SEED", "1"])
        ['--resume', 'SEED', '1']
    """
    rest = list(sys.argv[1:] if argv is None else argv)
    found = []
    while rest:
        argument = rest.pop(0)
        if argument == "--resume" and rest[:1] == ["auto"]:
            rest.pop(0)
            argument = "--resume=auto"
        found.append("--auto-resume" if argument == "--resume=auto" else argument)
    return found


def refuse_unknown_flags(parser: argparse.ArgumentParser, overrides: Sequence[str]) -> None:
    """Refuse a flag among the ``KEY VALUE`` overrides that the tool does not have; one that it has, or an abbreviation
    of one, is refused with the other overrides.

    Raises:
        ValueError: there is one.
    """
    known = [*re.findall(r"--[a-z][\w-]*", parser.format_usage()), "--help"]
    for given in overrides:
        flag = given.partition("=")[0]
        if flag.startswith("--") and not any(each.startswith(flag) for each in known):
            nearest = difflib.get_close_matches(flag, known, n=1)
            hint = f"did you mean {nearest[0]!r}? It" if nearest else f"this tool has {', '.join(known)}, and a flag"
            raise ValueError(f"unknown flag {flag!r}; {hint} goes before the KEY VALUE overrides")


def add_log_period(parser: argparse.ArgumentParser) -> None:
    """Add ``--log-period``."""

    def period(given: str) -> int:
        number = int(given)
        if number < 1:
            raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
        return number

    parser.add_argument(
        "--log-period", type=period, default=20, metavar="N", help="iterations between two lines of metrics.json"
    )


def add_import(parser: argparse.ArgumentParser) -> None:
    """Add ``--import``, whose values are ``imports``; :func:`import_modules` does what it says."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE_OR_FILE",
        help="import this first, such as my_norms.py that registers a norm or a data set; may be repeated",
    )


_imported: list[str] = []


def import_modules(names: Iterable[str]) -> None:
    """Import what registers norms or models of the user's, each once.

    Args:
        names: modules, looked for in the working folder too, and paths of files that end in ``.py``; such a file is a
            module under its own name, so that what it defines can be pickled.

    Raises:
        ValueError, OSError: one sentence; a module that is not there, or whose name another one has. What a module
            itself raises is left as it is.
    """
    for name in names:
        if name.endswith(".py"):
            name = _import_file(name)
        else:
            _import_module(name)
        if name not in _imported:
            _imported.append(name)


def imported() -> list[str]:
    """What :func:`import_modules` has imported in this process: names of modules, and absolute paths of files."""
    return list(_imported)


def _import_module(name: str) -> None:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"--import must be a module, or a file that ends in .py, got {name!r}")
    if os.getcwd() not in sys.path:  # a script has its own folder there, not the one it is called in
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # a module that the user's own needs
        raise ValueError(f"--import {name}: there is no module {error.name!r}; a file is named with its .py") from None


def _import_file(name: str) -> str:
    path = Path(os.path.realpath(name))
    if not path.is_file():
        raise FileNotFoundError(f"--import {name}: the file is not there")
    if (known := sys.modules.get(path.stem)) is not None:
        if getattr(known, "__file__", None) != str(path):
            raise ValueError(f"--import {name}: another module {path.stem!r} is in use; give the file another name")
        return str(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return str(path)


def check_outputs(*files: Path | None) -> None:
    """Refuse files that cannot be written, before the work that they are to hold; None stands for a file not asked for.

    Raises:
        OSError, ValueError: one is a folder, or given twice, or its folder is not there or not writable.
    """
    wanted = [file for file in files if file is not None]
    for file in wanted:
        folder = file.absolute().parent
        if file.is_dir():
            raise IsADirectoryError(f"{file} cannot be written: it is a folder")
        if not folder.is_dir():
            raise FileNotFoundError(f"{file} cannot be written: the folder {folder} is not there")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{file} cannot be written: the folder {folder} is not writable")
        if [os.path.realpath(other) for other in wanted].count(os.path.realpath(file)) > 1:
            raise ValueError(f"{file} is given for two outputs")


def path_names(paths: Sequence[Path], names: Sequence[str] | None) -> list[str]:
    """A short name for each of the paths that a tool compares.

    Args:
        paths: folders and files.
        names: what ``--name`` gave; without, a folder's own name, and of a file with its folder's, or the paths where
            two would be alike.

    Raises:
        ValueError: there are more or fewer names than paths, or one is there twice.
    """
    given, names = bool(names), list(names or map(_short_name, paths))
    if not given and len(set(names)) < len(names):
        names = [str(path) for path in paths]
    if len(names) != len(paths):
        raise ValueError(f"--name must be given once for each PATH, {len(paths)} times, got {len(names)}")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} is there more than once; names, or --name, must tell all apart")
    return names


def _short_name(path: Path) -> str:
    path = path.absolute()
    return path.name if path.is_dir() else f"{path.parent.name}/{path.name}"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Align rows for a terminal, in Markdown."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(lines)
