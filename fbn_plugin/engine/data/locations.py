"""Where data sets lie: as a config names them, or in the folder that detectron2 looks in."""

import os
from pathlib import Path

__all__ = ["data_root", "places"]


def data_root() -> Path:
    """``$DETECTRON2_DATASETS``; ``datasets`` where it is not set."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def places(path: str | os.PathLike) -> list[Path]:
    """Where a file or folder of a config may be, in the order in which it is looked for.

    Args:
        path: as the config has it; an absolute path has two equal places.
    """
    return [Path(path).expanduser(), data_root() / Path(path).expanduser()]
