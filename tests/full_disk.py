"""Disks that are full, as far as one may have that in a test, and files that are damaged on them."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

__all__ = ["damage", "largest_file"]


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file that this process writes to may be larger than ``size`` bytes: what would be fails with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def damage(*checkpoints: Path) -> None:
    """Flip a bit in the middle of each."""
    for path in checkpoints:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
