"""Configuration from YAML files with ``_BASE_`` and ``KEY VALUE`` overrides, in detectron2's vocabulary.

Built on fvcore's CfgNode, with five differences from its ``merge_from_file``: files are read by ``yaml_file.py``, an
unknown key is answered with the nearest known one, an integer is taken where a number is expected, keys that a tool
knows but does not use are reported, not refused, and a group may be the user's own: arguments of somebody else's.
"""

import difflib
import fnmatch
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fvcore.common.config import CfgNode

from fbn_plugin.engine.files.disk import atomic_write
from fbn_plugin.engine.files.literals import literal
from fbn_plugin.engine.files.words import counted, shown
from fbn_plugin.engine.files.yaml_file import read_yaml
from fbn_plugin.frameworks.detectron2_keys import without_defaults
from fbn_plugin.registry import with_registered_name

__all__ = [
    "Arguments",
    "CfgNode",
    "check_texts",
    "flatten",
    "load_config",
    "other_processes",
    "pairs",
    "read_config",
    "refuse_changes",
    "save_config",
    "saved_config",
    "with_value",
]

logger = logging.getLogger(__name__)

_LONGEST_KEY = 200
_LONGEST_TEXT = 4096  # as long as a path can be on Linux


class Arguments(CfgNode):
    """A group whose keys are the names of arguments that something else takes, and its values literals: numbers, texts,
    True, False, None, and tuples of these. What they must be is for whoever hands them on to say.

    Examples::

        >>> Arguments({"alpha": 0.999})
        {'alpha': 0.999}
    """

    def __repr__(self) -> str:
        return repr(dict(self))

    __str__ = __repr__


def load_config(
    defaults: CfgNode,
    config_file: str | os.PathLike | None = None,
    overrides: Sequence[str] = (),
    unused: Sequence[str] = (),
) -> CfgNode:
    """Return a frozen copy of ``defaults`` with a file and then overrides merged in.

    Args:
        defaults: every key that the tool reads, with its default; a value must have its default's type.
        config_file: YAML file; its ``_BASE_`` is a path (or a list of paths) relative to the file.
        overrides: ``["KEY", "VALUE", ...]`` as they come from the command line; values are Python literals or plain
            strings. A NORM gets the name that is registered, in whatever case it is written. Of a group of
            :class:`Arguments` one may be given, ``SOLVER.OPT_ARGS.alpha 0.9``, or all, ``SOLVER.OPT_ARGS "{...}"``.
        unused: keys (with shell wildcards: ``"MODEL.RETINANET.*"``) that are accepted but have no effect; those that
            occur are logged in one line.

    Raises:
        FileNotFoundError: the file, or one of its bases, is not there.
        ValueError: the file is no YAML mapping, a key is unknown, or a value has the wrong type.
    """
    cfg = defaults.clone()
    cfg.defrost()
    known = dict(flatten(defaults))
    groups = [key for key, default in known.items() if isinstance(default, Arguments)]
    ignored = []
    for key, value in [*_read(config_file), *pairs(overrides)]:
        group = next((each for each in groups if key == each or key.startswith(f"{each}.")), None)
        if group is not None:
            _set_arguments(cfg, group, key, value)
        elif key in known:
            _set(cfg, key, _coerce(key, value, known[key]))
        elif value == {} and any(each.startswith(f"{key}.") for each in (*known, *unused)):
            continue  # a group of which nothing is set
        elif any(fnmatch.fnmatchcase(key, pattern) for pattern in unused):
            ignored.append(key)
        else:
            raise ValueError(_unknown_key(key, known))
    if ignored:
        logger.warning("these keys are not used: %s", ", ".join(dict.fromkeys(ignored)))
    cfg.freeze()
    return cfg


def read_config(config_file: str | os.PathLike) -> dict[str, Any]:
    """A YAML file's keys, with their dots, and the values as they stand there; errors as ``load_config``."""
    return dict(_read(config_file))


def save_config(cfg: CfgNode, path: str | os.PathLike) -> None:
    """Write ``cfg`` as YAML that ``load_config`` reads back to the same values.

    Of the keys that detection has besides detectron2's, those at their default are left out, so that detectron2 reads
    the file without this package.
    """
    atomic_write(path, without_defaults(cfg).dump().encode())


def with_value(cfg: CfgNode, key: str, value: Any) -> CfgNode:
    """A frozen copy of ``cfg`` in which ``key`` has another value, taken as it is."""
    cfg = cfg.clone()
    cfg.defrost()
    _set(cfg, key, value)
    cfg.freeze()
    return cfg


def saved_config(output_dir: str | os.PathLike, defaults: CfgNode) -> CfgNode:
    """The settings of the run in OUTPUT_DIR, its ``config.yaml``; arguments and errors as ``load_config``."""
    return load_config(defaults, os.path.join(output_dir, "config.yaml"))


def refuse_changes(saved: Mapping[str, Any], cfg: Mapping[str, Any], may_change: Sequence[str]) -> None:
    """Refuse to continue the run in OUTPUT_DIR with settings other than those that it began with.

    Args:
        saved: those.
        cfg: the settings to continue with. Tuples and lists of the same values are the same.
        may_change: keys (with shell wildcards) that a continued run may have otherwise.

    Raises:
        ValueError: the first key that differs, with its old and new value.
    """
    old = dict(flatten(saved))
    # First, as the linear rule changes other keys with it.
    for key, new in sorted(flatten(cfg), key=lambda item: item[0] != "SOLVER.REFERENCE_WORLD_SIZE"):
        if _as_lists(new) == _as_lists(old[key]) or any(fnmatch.fnmatchcase(key, pattern) for pattern in may_change):
            continue
        if key == "SOLVER.REFERENCE_WORLD_SIZE" and new and old[key]:  # the linear rule sets it to their number
            raise other_processes(cfg["OUTPUT_DIR"], old[key], new)
        raise ValueError(
            f"{key} must be {old[key]!r} as in the run that OUTPUT_DIR {cfg['OUTPUT_DIR']} holds, got {shown(new)}; "
            "resume it with the old value, or choose another OUTPUT_DIR"
        )


def other_processes(output_dir: str, made_by: int, processes: int) -> ValueError:
    """The error of a run that is to go on with another number of processes: images would be dealt out otherwise, and
    its norms take the moments of others."""
    return ValueError(
        f"the run that OUTPUT_DIR {output_dir} holds was made by {counted(made_by, 'process')}, got {processes}: "
        "resume it with as many, or choose another OUTPUT_DIR"
    )


def _as_lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_lists(each) for key, each in value.items()}
    return [_as_lists(each) for each in value] if isinstance(value, tuple | list) else value


def flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each key of a nested mapping, written out with its dots, and its value."""
    for name, value in node.items():
        if isinstance(value, Mapping) and value and not isinstance(value, Arguments):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + str(name), value


def _read(config_file: str | os.PathLike | None) -> list[tuple[str, Any]]:
    if not config_file:
        return []
    values = list(flatten(read_yaml(config_file)))
    keys = [key for key, _ in values]
    if len(set(keys)) < len(keys):  # SOLVER.BASE_LR as one word, and in its group
        twice = Counter(keys).most_common(1)[0][0]
        raise ValueError(f"config file {config_file} has {twice} twice")
    return values


def pairs(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """``[KEY, VALUE, ...]`` as pairs; ValueError where a flag is among them, or the last key has no value."""
    if flags := [each for each in overrides if each.startswith("--")]:
        raise ValueError(f"{shown(flags[0])} stands among the KEY VALUE overrides: flags go before them")
    if files := [each for each in overrides[::2] if each.lower().endswith((".yaml", ".yml"))]:
        raise ValueError(f"{shown(files[0])} stands among the KEY VALUE overrides: a file is named by --config-file")
    if long := [each for each in overrides[::2] if len(each) > _LONGEST_KEY]:
        raise ValueError(f"overrides come in pairs KEY VALUE, and {shown(long[0])} is no key")
    if len(overrides) % 2:
        raise ValueError(f"overrides come in pairs KEY VALUE, and {shown(overrides[-1])} has no partner")
    return list(zip(overrides[::2], overrides[1::2]))


def _unknown_key(key: str, known: Mapping[str, Any]) -> str:
    upper = {name.upper(): name for name in known}
    nearest = [upper[name] for name in difflib.get_close_matches(key.upper(), upper, n=1)]
    inside = [name for name in known if name.startswith(key + ".")]
    hint = f"; it is a group of {', '.join(inside)}" if inside else f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown config key {shown(key)}{hint}"


def _coerce(key: str, value: Any, default: Any) -> Any:
    if isinstance(value, str):
        value = literal(value)
    if isinstance(default, tuple) and isinstance(value, str | int | float):
        value = (value,)  # one dataset, one size
    if key.rpartition(".")[2] == "NORM":
        value = with_registered_name(value)  # what is no spec is refused with the other values
    check_texts(key, value)
    try:
        return _cast(value, default)
    except ValueError:
        if isinstance(default, int) and isinstance(value, str) and re.fullmatch(r"\s*[-+]?[\d_]+\s*", value):
            raise ValueError(f"{key} must be a whole number of at most 64 bits, got {shown(value)}") from None
        kind = _type_name(default)
        raise ValueError(f"{key} must be of type {kind}, such as {default!r}, got {shown(value)}") from None


def _set_arguments(cfg: CfgNode, group: str, key: str, value: Any) -> None:
    """Set one of a group of arguments, or all."""
    given = literal(value) if isinstance(value, str) else value
    if key != group:
        current = cfg
        for part in group.split("."):
            current = current[part]
        given = {**current, key.removeprefix(f"{group}."): given}
    if not isinstance(given, Mapping):
        raise ValueError(f"{group} must be a mapping of names to values, such as {{'eps': 1e-8}}, got {shown(given)}")
    arguments = Arguments()
    for name, each in given.items():
        if not isinstance(name, str) or not name.isidentifier() or len(name) > _LONGEST_KEY:
            raise ValueError(f"{group} must have names of arguments as its keys, got {shown(name)}")
        arguments[name] = _argument(f"{group}.{name}", each)
    _set(cfg, group, arguments)


def _argument(key: str, value: Any) -> Any:
    """An argument's value, lists as tuples."""
    if isinstance(value, str):
        value = literal(value)  # YAML 1.1 reads 1e-4 as a string
    check_texts(key, value)
    if isinstance(value, list | tuple):
        return tuple(_argument(key, each) for each in value)
    whole = isinstance(value, int) and abs(value) < 2**63
    number = whole or (isinstance(value, float) and math.isfinite(value))
    if value is not None and not isinstance(value, str) and not number:
        what = "a finite number, a text, True, False, None or a list of these"
        raise ValueError(f"{key} must be {what}, got {shown(value)}")
    return value


def check_texts(key: str, value: Any) -> None:
    """Refuse text that no file's or norm's name can be; ``value`` is text, or holds some, or none.

    Raises:
        ValueError: with the key.
    """
    if isinstance(value, list | tuple):
        for each in value:
            check_texts(key, each)
    elif isinstance(value, str):
        if len(value) > _LONGEST_TEXT:
            raise ValueError(f"{key} must have at most {_LONGEST_TEXT:,} characters, got {shown(value)}")
        if "\0" in value or (not value.isascii() and re.search("[\ud800-\udfff]", value)):
            raise ValueError(f"{key} must be text that UTF-8 can write, without null characters, got {shown(value)}")


def _cast(value: Any, default: Any) -> Any:
    """``value`` in the type of ``default``, its elements in that of ``default``'s first (of an empty one: strings)."""
    if isinstance(default, tuple | list) and isinstance(value, tuple | list):
        return type(default)(_cast(element, default[0] if default else "") for element in value)
    if isinstance(default, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        number = float(value)  # YAML 1.1 reads 1e-4 as a string
        if math.isfinite(number):
            return number
    elif isinstance(default, str) and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    elif default is None or type(value) is type(default):
        return value
    raise ValueError(value)


def _type_name(default: Any) -> str:
    if isinstance(default, tuple | list):
        return f"{type(default).__name__} of {_type_name(default[0] if default else '')}"
    return "finite float" if isinstance(default, float) else type(default).__name__


def _set(cfg: CfgNode, key: str, value: Any) -> None:
    *groups, name = key.split(".")
    for group in groups:
        cfg = cfg[group]
    cfg[name] = value
