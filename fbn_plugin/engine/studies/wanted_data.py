"""DATA of a study file: the data sets and weights that its jobs read. They are looked for before a job runs, and small
sets that need no download are made where they are to lie.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fbn_plugin.engine.data.locations import data_root, places
from fbn_plugin.engine.files.words import hint, shown
from fbn_plugin.engine.studies.made_data import MADE
from fbn_plugin.engine.studies.study_keys import check_kinds, group

__all__ = ["Wanted", "is_there", "make_wanted", "missing", "read_wanted"]


@dataclass(frozen=True)
class Wanted:
    """A file or folder that jobs read.

    Attributes:
        path: as the configs name it: as it is, or below ``$DETECTRON2_DATASETS``.
        what: it is, and where it comes from.
        made: how it is made where it is not there, one of ``made_data.MADE``; "" for what is the user's.
    """

    path: str
    what: str
    made: str = ""


def read_wanted(given: Any) -> list[Wanted]:
    """DATA: path -> what it is; or ``{made: NAME}`` for what is made.

    Raises:
        ValueError: one sentence.
    """
    found = []
    for path, what in group("DATA", given, "{mnist: what it is and where it comes from}").items():
        if isinstance(what, dict):
            check_kinds(f"DATA of {path!r}", what, {"made": str})
            made = what.get("made")
            if made not in MADE:
                raise ValueError(f"DATA of {path!r} must be made by one of {', '.join(MADE)}, got {shown(made)}")
            found.append(Wanted(path, MADE[made].what, made))
        elif isinstance(what, str) and what.strip():
            found.append(Wanted(path, " ".join(what.split())))
        else:
            accepted = "text that says what it is, or {made: NAME}"
            raise ValueError(f"DATA of {path!r} must be {accepted}, got {shown(what)}{hint(what, tuple(MADE))}")
    return found


def is_there(wanted: Wanted) -> bool:
    """Whether it lies where jobs look for it, in a folder something, or can be made."""
    return bool(wanted.made) or any(place.is_file() or _holds_something(place) for place in places(wanted.path))


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and next(folder.iterdir(), None) is not None


def missing(wanted: Sequence[Wanted]) -> str | None:
    """One sentence on what is not there; None where nothing is missing."""
    gone = [each for each in wanted if not is_there(each)]
    if not gone:
        return None
    listed = "; ".join(f"{each.path} ({each.what})" for each in gone)
    return f"data are missing, neither here nor below $DETECTRON2_DATASETS ({data_root()}): {listed}"


def make_wanted(wanted: Sequence[Wanted]) -> None:
    """Make what can be made and is not there.

    Raises:
        FileNotFoundError: something else is missing; nothing is made then.
        WriteError: it cannot be written.
    """
    if (sentence := missing(wanted)) is not None:
        raise FileNotFoundError(sentence)
    for each in wanted:
        if each.made and not Path(each.path).exists():
            MADE[each.made].make(Path(each.path))
