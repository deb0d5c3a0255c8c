"""Reading a JSON file that a user gives: whatever lies there instead of one is refused in one sentence, before what is
in it is looked at."""

import codecs
import json
import os
import stat
from collections import Counter
from typing import Any

from fbn_plugin.engine.files.words import shown

__all__ = ["has_mark", "parse_json", "read_json"]

# Longer marks first, as that of UTF-32 begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_json(path: str | os.PathLike, most: int | None = None) -> Any:
    """The content of a JSON file in UTF-8, with a byte-order mark or without.

    Numbers that Python's ``json`` takes beyond the standard (``NaN``, ``Infinity``, ``1e400``) are left to whoever
    knows what the number is for.

    Args:
        path: the file.
        most: bytes that it may have, where what it is for has a bound.

    Raises:
        OSError: the file is not there, or is none: a folder, a pipe, a device.
        ValueError: it is no JSON, is nested too deeply, has a whole number of thousands of digits, or has one key twice
            in an object, of which JSON means none; it has more than ``most`` bytes.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path} is not a file")
    if most is not None and status.st_size > most:
        raise ValueError(f"{path} is {status.st_size:,} bytes large, and must be at most {most:,}")
    with open(path, "rb") as file:
        return parse_json(file.read(), os.fspath(path))


def parse_json(data: bytes, name: str) -> Any:
    """The content of JSON in UTF-8, as of :func:`read_json`.

    Args:
        data: the JSON.
        name: what errors call it.

    Raises:
        ValueError: as of :func:`read_json`.
    """
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            raise ValueError(f"{name} is not valid JSON: it is text in {encoding}, and JSON is in UTF-8")
    try:
        text = data.decode("utf-8-sig")
        del data  # files of gigabytes there are
        return json.loads(text, object_pairs_hook=_object)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is not valid JSON, perhaps cut short: {_reason(error)}") from None
    except RecursionError:
        raise ValueError(f"{name} is not valid JSON: its lists or objects are nested too deeply") from None
    except ValueError as error:  # _object's, and Python's on whole numbers of thousands of digits
        raise ValueError(f"{name} is not valid JSON: {_reason(error)}") from None


def has_mark(path: str | os.PathLike) -> bool:
    """Whether a file begins with a byte-order mark of UTF-8, which Python's ``json`` takes for damage."""
    with open(path, "rb") as file:
        return file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        where = f" of id {shown(found['id'], 60)}" if "id" in found else ""
        raise ValueError(f"an object{where} has the key {shown(twice, 60)} twice")
    return found


def _reason(error: ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    return str(error).partition(";")[0]  # behind it Python says how a program may raise its limit
