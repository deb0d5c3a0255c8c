"""Tar archives whose members are read where they lie, by any number of processes at once, and whose headers are not
trusted: what is cut short or no archive is refused in one sentence, and nothing is unpacked.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from fbn_plugin.engine.files.words import shown_path
from fbn_plugin.engine.run.cli import error_sentence

__all__ = ["Archive", "Member", "Part", "read_members"]


def _seek_and_read(file: int, size: int, start: int) -> bytes:
    os.lseek(file, start, os.SEEK_SET)
    return os.read(file, size)


# Leaves the file's position alone, which forked processes share. Windows has neither.
_read_at = getattr(os, "pread", _seek_and_read)


class Archive:
    """A tar file, of which any number of processes may read at once.

    Args:
        path: the file.
        stays_open: whether it is kept open from the first reading on; a process may have some hundred open files.
    """

    def __init__(self, path: str | os.PathLike, stays_open: bool = True):
        self.path, self.stays_open = path, stays_open
        self._file: int | None = None

    def read(self, start: int, size: int) -> bytes:
        """Bytes from ``start`` on; fewer than ``size`` where the file ends."""
        file = self._file
        if file is None:
            file = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            parts, end = [], start + size
            while start < end and (part := _read_at(file, end - start, start)):
                parts.append(part)
                start += len(part)
            return b"".join(parts)
        finally:
            if self.stays_open and self._file is None:
                self._file = file
            elif file != self._file:
                os.close(file)

    def __getstate__(self) -> dict:
        return {**vars(self), "_file": None}

    def __del__(self):
        if self._file is not None:
            os.close(self._file)


class Member(NamedTuple):
    """A file in a tar archive, or in one within that: its name, and the bytes of the outer archive that it takes."""

    archive: Archive
    name: str
    start: int
    size: int

    def read(self) -> bytes:
        """The file's content."""
        return self.archive.read(self.start, self.size)

    def __str__(self) -> str:
        return f"{shown_path(self.name)} in {shown_path(self.archive.path)}"


def read_members(file: BinaryIO, name: str | os.PathLike) -> Iterator[tarfile.TarInfo]:
    """The headers of an archive, which may be as many as one likes.

    Args:
        file: open for reading bytes; one that can seek.
        name: what errors call it.

    Raises:
        ValueError: it is compressed, damaged, cut short, or no tar archive.
    """
    try:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if not 0 <= member.size <= size - member.offset_data and member.isreg() and not member.issparse():
                    raise tarfile.ReadError(f"{shown_path(member.name)} is cut short")
                yield member
                archive.members.clear()  # millions of them would stay
            # tarfile takes a header that is cut or damaged for the end, which is a block of zeros.
            file.seek(archive.offset)
            if file.read(512) != bytes(512):
                raise tarfile.ReadError("it has no end, perhaps it is cut short")
    except Exception as error:  # whatever tarfile makes of bytes that are no archive
        reason = " ".join(error_sentence(error).split()) or type(error).__name__
        raise ValueError(f"no images found in {shown_path(name)}, which is not a whole tar archive: {reason}") from None


class Part(io.RawIOBase):
    """A stretch of a file as a file."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self._whole, self._start, self._size, self._position = file, start, size, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._position)
        self._whole.seek(self._start + self._position)
        data = self._whole.read(left if size < 0 else min(size, left))
        self._position += len(data)
        return data
