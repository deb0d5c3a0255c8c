"""The values of detectron2's keys: of the type of their defaults, elements of lists included, and what detectron2 makes
of them. It answers most of a wrong value with a bare error, and names the key in few."""

import functools
import math
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from detectron2.config import CfgNode, get_cfg

from fbn_plugin.engine.files.words import shown
from fbn_plugin.engine.run.rules import get_value, refusal
from fbn_plugin.frameworks.detectron2_keys import add_keys

__all__ = ["attempt", "check_types", "differences", "is_float", "type_sentence"]

T = TypeVar("T")

# In the place of defaults that are empty, and so tell nothing of their elements.
_EXAMPLES = {"DATASETS.TRAIN": ("my_data:train",), "DATASETS.TEST": ("my_data:val",)}

# What detectron2 raises for a wrong value.
_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def check_types(cfg: CfgNode) -> None:
    """Refuse a value that is not of the type of detectron2's default.

    Raises:
        ValueError: the first one.
    """
    for key, default in _values(get_cfg()):
        value = get_value(cfg, key)
        default = _EXAMPLES.get(key, default)
        if default is not None and value != default and not _is_like(value, default):
            raise refusal(key, f"of type {_type_name(default)}, such as {default!r}", value)


@functools.cache
def _floats() -> frozenset[str]:
    cfg = get_cfg()
    add_keys(cfg)
    return frozenset(key for key, default in _values(cfg) if isinstance(default, float))


def is_float(key: str) -> bool:
    """Whether a key has a float as its default, in whose place detectron2 takes no integer."""
    return key in _floats()


def type_sentence(sentence: str) -> str:
    """What detectron2's config says of a value of another type than the key's, in the words of ``check_types``; another
    sentence as it is."""
    found = re.search(r"Type mismatch .* with values \((.*) vs\. (.*)\) for config key: ([\w.]+)", sentence)
    default = dict(_values(get_cfg())).get(found[3]) if found else None
    if default is None:
        return sentence
    default = _EXAMPLES.get(found[3], default)
    given = found[2] if len(found[2]) <= 200 else f"{found[2][:100]}... ({len(found[2]):,} characters)"
    return f"{found[3]} must be of type {_type_name(default)}, such as {default!r}, got {given}"


def differences(cfg: CfgNode, other: CfgNode) -> dict[str, Any]:
    """The keys that have another value in another config, and that value."""
    return {key: value for key, value in _values(other) if get_value(cfg, key) != value}


def attempt(cfg: CfgNode, group: str, build: Callable[[CfgNode], T], others: Mapping[str, Any]) -> T:
    """What ``build`` makes of a config; where it raises an error, one sentence, with the key if one alone is to blame,
    which is looked for for 15 seconds.

    Args:
        cfg: config.
        group: the part of it that ``build`` reads.
        build: raises an error for a wrong value.
        others: keys that may be to blame, the likeliest first, and the values that they would have otherwise.

    Raises:
        ValueError: one sentence.
    """
    try:
        return build(cfg)
    except _ERRORS as error:
        reason = _reason(error)
    start = time.monotonic()
    for key, before in others.items():
        if time.monotonic() - start > 15:
            break
        if key.startswith(f"{group}.") and get_value(cfg, key) != before:
            value = get_value(cfg, key)
            other = cfg.clone()
            other.merge_from_list([key, repr(before) if isinstance(before, str) else before])
            try:
                build(other)
            except _ERRORS:
                continue
            raise ValueError(f"{key} {shown(value)} is refused by detectron2: {reason}")
    raise ValueError(f"the config's {group} is refused by detectron2: {reason}")


def _reason(error: BaseException) -> str:
    """What an error says; of one without words, the line that raised it."""
    said = " ".join(str(error.args[0] if error.args else "").split())
    if said and not isinstance(error, LookupError):
        return said
    line = traceback.extract_tb(error.__traceback__)[-1].line
    return f"{type(error).__name__}{f' {said}' if said else ''} at `{line}`"


def _values(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _values(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _is_like(value: Any, default: Any) -> bool:
    if isinstance(default, bool | str):
        return isinstance(value, type(default))
    if isinstance(default, int | float):
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not isinstance(value, list | tuple):
        return False
    if not default:
        return True
    kinds = [default[0]]
    if isinstance(default[0], Sequence) and not isinstance(default[0], str):
        kinds.append(default[0][0])  # one list for all levels
    return any(all(_is_like(each, kind) for each in value) for kind in kinds)


def _type_name(default: Any) -> str:
    if isinstance(default, list | tuple):
        return f"{type(default).__name__}{f' of {_type_name(default[0])}' if default else ''}"
    return "finite number" if type(default) in (int, float) else type(default).__name__
