"""Which source a run was made with: the commit of the checkout that the package runs from, if it runs from one."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

import fbn_plugin

__all__ = ["source_commit"]

_SECONDS = 10  # a checkout on a slow disk must not hold up a run


@functools.cache
def source_commit(package: str | os.PathLike | None = None) -> tuple[str, bool] | None:
    """The commit that is checked out where the package lies, and whether files that git tracks differ from it there.

    Args:
        package: the package's folder; None is this one's.

    Returns:
        None where git does not track the package there, as when it is installed, or where there is no git.
    """
    folder = Path(fbn_plugin.__file__).parent if package is None else Path(package)
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changes is None else (commit, bool(changes))


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None where it fails."""
    # Those that git sets in its hooks name another checkout.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", folder, *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
