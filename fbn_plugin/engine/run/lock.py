"""One run folder belongs to one run: a lock on ``.lock`` in OUTPUT_DIR that ends with the process that holds it.

It is a lock of POSIX (``fcntl.lockf``), which a process does not hand on to those that it forks: the workers of a
DataLoader may outlive a run that was killed, and must not hold its folder.
"""

import atexit
import contextlib
import errno
import functools
import logging
import os
import re
import socket
from collections.abc import Callable
from typing import Any, TypeVar

from fbn_plugin.engine.files.disk import remove_leftovers, writing
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.cli import UserError
from fbn_plugin.engine.run.output_dir import holds_run, make_output_dir

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

__all__ = ["hold", "let_go", "lets_go", "open_output_dir"]

# No folder, or none to write to: check_output_dir and make_output_dir say so.
_NO_FOLDER = (
    *(errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
)

logger = logging.getLogger(__name__)

_Method = TypeVar("_Method", bound=Callable[..., Any])

# Of this process: folder -> its open lock file, and the process that opened it. Closing any other file object of the
# lock file would end the lock, so a folder that is held is never opened again.
_held: dict[str, tuple[int, int]] = {}


def hold(folder: str | os.PathLike, name: str = "OUTPUT_DIR") -> None:
    """Take OUTPUT_DIR for this run, where it is there; called by every process, rank 0 holds it.

    The run has it until :func:`let_go`, or until the process ends in any way.

    Args:
        folder: the folder.
        name: what the user calls it, for the sentences.

    Raises:
        UserError: another process has it; on every process.
    """
    distributed.on_main(lambda: _take(folder, name))


def open_output_dir(folder: str | os.PathLike) -> None:
    """Make OUTPUT_DIR, take it if :func:`hold` has not, and remove what killed runs left half written; called by every
    process.

    Raises:
        OSError, UserError: it cannot be made; another process has it, or began a run there in the meantime.
    """
    distributed.on_main(lambda: _open(folder))


def _open(folder: str | os.PathLike) -> None:
    make_output_dir(folder)
    if _take(folder) and holds_run(folder):  # it was not there when this run looked
        let_go(folder)
        raise UserError(f"OUTPUT_DIR {folder} holds a run that began in the meantime; choose another")
    remove_leftovers(folder, ["inference*", "inference*/*"])


def _take(folder: str | os.PathLike, name: str = "OUTPUT_DIR") -> bool:
    """Whether the folder is newly taken; it is not where it is not there, or held by this process already."""
    key = os.path.realpath(folder)
    path = os.path.join(folder, ".lock")
    if key in _held and _held[key][1] == os.getpid():
        if _is_still(_held[key][0], path):
            return False
        let_go(folder)  # someone has removed the folder, or the lock file
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            if error.errno in _NO_FOLDER and not os.path.islink(path):
                return False
            with writing(path):
                raise
        if not _lock(file, folder, name):
            break
        # Whoever let go of the folder has removed the file, perhaps after this one was opened.
        if _is_still(file, path):
            break
        os.close(file)
    with contextlib.suppress(OSError):  # it is for the sentence alone
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _held[key] = file, os.getpid()
    return True


def _is_still(file: int, path: str) -> bool:
    """Whether an open file is the one that has its name."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(file: int, folder: str | os.PathLike, name: str) -> bool:
    """Lock an open file; False where the file system has no locks.

    Raises:
        UserError: another process has it.
    """
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            logger.warning(
                "%s %s cannot be locked (%s): a second run there would not be noticed", name, folder, error.strerror
            )
            return False
        text = os.read(file, 300).decode("utf-8", "replace").strip()
        os.close(file)
        by = text if re.fullmatch(r"process \d+ on [\w.-]+", text) else "another process"
        raise UserError(f"{name} {folder} is in use by {by}; choose another, or wait for its end") from None
    return True


def let_go(folder: str | os.PathLike) -> None:
    """Give OUTPUT_DIR back; nothing happens where this process does not hold it."""
    file, process = _held.pop(os.path.realpath(folder), (-1, -1))
    if process == os.getpid():
        path = os.path.join(folder, ".lock")
        with contextlib.suppress(OSError):
            if _is_still(file, path):  # and is held, so that no other run has it
                os.unlink(path)
        with contextlib.suppress(OSError):
            os.close(file)


@atexit.register
def _let_go_of_all() -> None:
    for folder in list(_held):
        let_go(folder)


def lets_go(method: _Method) -> _Method:
    """Decorate the last method of a run that a trainer with a ``cfg`` is asked for: behind it, or an error in it, the
    run gives OUTPUT_DIR back."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        finally:
            let_go(self.cfg.OUTPUT_DIR)

    return run
