"""What all parts of a study file are checked by: known keys, groups of them, values of a kind."""

import math
from collections.abc import Mapping
from typing import Any

from fbn_plugin.engine.files.words import hint, shown

__all__ = ["check_key", "check_kinds", "flat", "group", "number"]


def check_key(what: str, key: str, known: Mapping[str, Any]) -> None:
    """Refuse a key that is none of those known, with the nearest one."""
    if key not in known:
        near = hint(key, tuple(known))
        raise ValueError(f"unknown {what} {shown(key)}{f'{near} It' if near else '; it'} has {', '.join(known)}")


def check_kinds(where: str, given: Mapping[str, Any], kinds: Mapping[str, type], what: str = "key") -> None:
    """Refuse unknown keys of a part of the file, and values of another type than ``kinds`` has.

    Args:
        where: the part, as a sentence names it.
        given: the part.
        kinds: key -> type; ``object`` takes anything, ``float`` any number.
        what: what its keys are called.
    """
    for key, value in given.items():
        check_key(f"{what} of {where}", key, kinds)
        kind = kinds[key]
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind in (int, float)):
            raise ValueError(f"{key} of {where} must be of type {kind.__name__}, got {shown(value)}")
        if kind is float:
            number(f"{key} of {where}", value)


def group(where: str, given: Any, example: str = "{MODEL.NORM: FBN}") -> dict[str, Any]:
    """A part of the file that must be a mapping."""
    if not isinstance(given, dict):
        raise ValueError(f"{where} must be a mapping such as {example}, got {shown(given)}")
    return given


def number(where: str, given: Any) -> float:
    """A part of the file that must be a finite number."""
    if not isinstance(given, int | float) or isinstance(given, bool) or not math.isfinite(given):
        raise ValueError(f"{where} must be a number, got {shown(given)}")
    return float(given)


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Groups of keys as one mapping, each key with its dots and tuples as lists, as files have them.

    Raises:
        ValueError: a key is there twice, once with its dots and once in its group.
    """
    found: dict[str, Any] = {}
    for name, value in node.items():
        is_group = isinstance(value, Mapping) and value
        for key, each in (flat(value, f"{prefix}{name}.") if is_group else {prefix + name: _lists(value)}).items():
            if key in found:
                raise ValueError(f"{key} is there twice, once with its dots and once in its group")
            found[key] = each
    return found


def _lists(value: Any) -> Any:
    return [_lists(each) for each in value] if isinstance(value, tuple | list) else value
