"""Numbers of things, values, and what was meant, in the sentences that tools print."""

import difflib
import os
from collections.abc import Iterable
from typing import Any

__all__ = ["counted", "hint", "on_one_line", "shown", "shown_path"]

_PLURALS = {
    "batch": "batches",
    "category": "categories",
    "class": "classes",
    "entry": "entries",
    "process": "processes",
}


def counted(number: int, what: str) -> str:
    """A number with its noun: ``1 process``, ``2 processes``.

    Args:
        number: how many.
        what: one of them; more words than one end in the noun.
    """
    if number == 1:
        return f"{number:,} {what}"
    before, space, noun = what.rpartition(" ")
    return f"{number:,} {before}{space}{_PLURALS.get(noun, noun + 's')}"


def hint(given: Any, known: Iterable[str]) -> str:
    """``; did you mean 'SEEDS'?``, or nothing where no known name is near."""
    lower = {name.lower(): name for name in known}
    nearest = difflib.get_close_matches(str(given).lower(), lower, n=1)
    return f"; did you mean {lower[nearest[0]]!r}?" if nearest else ""


def shown(value: Any, most: int = 200) -> str:
    """A value as a sentence shows it: its ``repr`` on one line, of a long one the beginning, and how long it is.

    Args:
        value: what was given.
        most: characters of the ``repr``; a longer one is cut.
    """
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} that is nested too deeply"
    except ValueError:  # Python writes out no whole number of more than some thousand digits
        return "a number of too many digits"
    if len(text) <= most:
        return text
    end = text[-1] if text[-1] in "'\")]}" else ""
    return f"{text[: most // 2]}...{end} ({len(text):,} characters)"


def shown_path(name: str | os.PathLike) -> str:
    """A path as it stands in a sentence: in quotes and with escapes where it has line breaks or is no text.

    Examples::

        >>> shown_path("a/1.png"), shown_path("a\\n1.png")
        ('a/1.png', "'a\\\\n1.png'")
    """
    name = os.fspath(name)
    return name if isinstance(name, str) and name and name.isprintable() else repr(name)


def on_one_line(text: str) -> str:
    """Text with escapes for all that is not printed: a name that a file gives may break a line, or tell the terminal to
    erase one.

    Examples::

        >>> on_one_line("a\\n\\x1b[2Jb ü")
        'a\\\\n\\\\x1b[2Jb ü'
    """
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
