"""A disk that is full, as far as one may have that in a test: files of this process that may not grow."""

import contextlib
import resource
from collections.abc import Iterator

__all__ = ["largest_file"]


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file that this process writes to may be larger than ``size`` bytes: what would be fails with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
