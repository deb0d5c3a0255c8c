"""Files that are whole or not there, files that are added to line by line, and the one error for a file that cannot be
written: a full disk, a quota, a folder that is gone or read-only.
"""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

__all__ = ["AppendedFile", "WriteError", "atomic_write", "is_full", "remove_leftovers", "remove_numbered", "writing"]

# No space left, no quota left, a file larger than may be: nothing is wrong with the input.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_BINARY = getattr(os, "O_BINARY", 0)  # of Windows, which would write other line ends

_LEFTOVER = re.compile(r"\.fbn_plugin-(\d+)-[0-9a-f]{8}\.tmp")


class WriteError(OSError):
    """A file cannot be written, in one sentence with its name and the reason; tools end with exit code 1."""


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or the one in whose handling it was raised, is that of a full disk or a read-only one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (*_FULL, errno.EROFS):
            return True
        error = error.__context__
    return False


@contextlib.contextmanager
def writing(path: str | os.PathLike, only_full: bool = False) -> Iterator[None]:
    """Turn what a block raises as it writes into a :class:`WriteError`.

    Args:
        path: the file or folder that the sentence names.
        only_full: leave other errors than those of full and read-only disks as they are, as the block reads, too.

    Raises:
        WriteError: instead of OSError, and of the RuntimeError that ``torch.save`` makes of a failed write.
    """
    try:
        yield
    except WriteError:
        raise
    except (OSError, RuntimeError) as error:
        if not (is_full(error) or (isinstance(error, OSError) and not only_full)):
            raise
        raise WriteError(f"{path} cannot be written: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """What the system says of a failed write, in whose handling others may have been raised."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return str(error)


class _Sink:
    """A binary file that remembers the first error of a write and takes all else, as ``torch.save`` makes another error
    of each one, and writes on as it handles it."""

    def __init__(self, file):
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        pass  # atomic_write does


def atomic_write(
    path: str | os.PathLike, data: bytes | None = None, write: Callable[[Any], object] | None = None
) -> None:
    """Replace ``path`` in one step: a reader, or a crash at any moment, finds the old file or the new one, whole.

    A symbolic link is replaced, and what it points to stays as it is. The file has the permissions of any new one.

    Args:
        path: file to write; its folder must exist.
        data: the content, or
        write: a function that writes it to a binary file object.

    Raises:
        WriteError: the disk is full, or the folder cannot be written to; the old file is as it was, and nothing else is
            left behind.
    """
    path = os.fspath(path)
    folder = os.path.dirname(path) or "."
    # A name of its own: two processes may write the same file. Short, as the file's own may have the greatest length.
    temporary = os.path.join(folder, f".fbn_plugin-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with writing(path):
        try:
            with open(temporary, "xb") as file:
                sink = _Sink(file)
                sink.write(data) if write is None else write(sink)
                if sink.error is not None:
                    raise sink.error
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise
        _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    """Let a rename reach the disk, where folders can be opened and synchronized."""
    if os.name != "posix":
        return
    with contextlib.suppress(PermissionError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(opened)


class AppendedFile:
    """A file that is added to; what is written is there as a whole, or not at all where the disk is full.

    Args:
        path: opened, or made.

    Raises:
        WriteError: it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        with writing(self.path):
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _BINARY, 0o666)

    def write(self, data: bytes) -> None:
        """Add ``data``.

        Raises:
            WriteError: it does not fit; the file is as before.
        """
        with writing(self.path):
            size = os.fstat(self._file).st_size
            rest = memoryview(data)
            try:
                while rest:
                    rest = rest[os.write(self._file, rest) :]
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, size)
                raise

    def flush(self) -> None:
        """Nothing waits to be written."""

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        file, self._file = self._file, -1
        if file >= 0:
            with writing(self.path):
                os.close(file)


def remove_leftovers(folder: str | os.PathLike, below: Collection[str] = ()) -> None:
    """Remove what processes that were killed in an :func:`atomic_write` left in a folder; other files are not touched.

    Args:
        folder: a run's.
        below: patterns of folders in it to look into, too.
    """
    for place in (Path(folder), *(each for pattern in below for each in Path(folder).glob(pattern))):
        for file in place.glob(".fbn_plugin-*.tmp"):
            found = _LEFTOVER.fullmatch(file.name)
            if found and not _is_alive(int(found[1])):
                with contextlib.suppress(OSError):
                    file.unlink()


def remove_numbered(folder: str | os.PathLike, name: str, last: int) -> None:
    """Remove what an earlier, longer series of files left behind a newer one.

    Args:
        folder: that holds both.
        name: of the files, ``{}`` for the number: ``"confusion_{}.png"``.
        last: the newer one's last number.
    """
    head, _, tail = name.partition("{}")
    form = re.compile(re.escape(head) + "([1-9][0-9]*)" + re.escape(tail))
    for file in os.listdir(folder):
        found = form.fullmatch(file)
        if found and int(found[1]) > last:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, file))


def _is_alive(process: int) -> bool:
    if os.name != "posix":  # to ask would end it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return process > 0 and process != os.getpid()
