"""Reads the YAML of configs, whoever wrote it: plain values alone, in bounded time and memory, and nothing in it is
ever executed or fetched. What YAML 1.1 (yaml.org/spec/1.1) would take for something that nobody means, such as a key
that stands twice or ``1:30`` for 90, is refused with its line.
"""

import copy
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.resolver import Resolver

from fbn_plugin.engine.files.words import shown

__all__ = ["read_yaml"]

# Of a config with all of its bases. The largest of detectron2's and of this project's have 30 kB and 700 values.
_MOST_BYTES = 2**21
_MOST_VALUES = 20_000  # keys included, and what stands behind an alias as often as the alias does
_MOST_FILES = 100
_DEEPEST = 32
_LONGEST_KEY = 200
_LONGEST_INTEGER = 2**64

_TAG = "tag:yaml.org,2002:"
_LISTS = (None, "!", _TAG + "seq", _TAG + "python/tuple")
_MAPS = (None, "!", _TAG + "map")
_BOOLEANS = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}

# Two configs of detectron2's zoo, those of RetinaNet and of Panoptic-DeepLab, have Python instead of numbers. These two
# texts are known, and replaced by what they stand for; none is executed.
_COMPUTED = "tag:yaml.org,2002:python/object/apply:eval"
_KNOWN_TEXTS = {
    "[[x,x*2**(1.0/3),x*2**(2.0/3)]forxin[32,64,128,256,512]]": [
        [x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in (32, 64, 128, 256, 512)
    ],
    "[int(x*0.1*640)forxinrange(5,16)]": [int(x * 0.1 * 640) for x in range(5, 16)],
}

_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # which parses; of what it could build nothing is used
_RESOLVER = Resolver()


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The mapping that a YAML file holds, merged over those of its ``_BASE_``.

    Args:
        path: a file; its ``_BASE_`` is a path, or a list of paths of which later ones go over earlier ones, relative to
            the file. ``~`` is the home folder.

    Returns:
        Nested dictionaries with text as keys, and lists, text, numbers, booleans and None. A date is text, and so is a
        whole number of more than 64 bits.

    Raises:
        FileNotFoundError: the file, or one of its bases, is not there.
        ValueError: it cannot be read, is no YAML mapping of plain values, or is larger than a config can be; one
            sentence with the file's name and, where there is one, the line.
    """
    return _Reading().read(os.fspath(path), ())


@dataclass
class _Open:
    """A list or a mapping that has begun.

    Attributes:
        line: its first.
        anchor: its name for aliases, or None.
        is_map: whether it is a mapping.
        tag: of the file's, or None.
        values: its elements; of a mapping keys and values, in turn.
        lines: where these stand.
        size: of values within, aliases written out, and itself.
        depth: of lists and mappings within, and itself.
    """

    line: int
    anchor: str | None
    is_map: bool
    tag: str | None
    values: list[Any] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    size: int = 1
    depth: int = 1


class _Merge:
    """The key ``<<``."""


_MERGE = _Merge()


class _Reading:
    """One config with all of its bases, which share the limits."""

    def __init__(self) -> None:
        self.bytes = self.values = self.files = 0

    def read(self, path: str, above: tuple[str, ...]) -> dict[str, Any]:
        """A file and its bases; ``above`` are the real paths of those that it is a base of."""
        name = _name(path)
        self.files += 1
        if self.files > _MOST_FILES:
            raise ValueError(f"{name} is one of more than {_MOST_FILES} that are read by _BASE_")
        own = _parse(self._text(path), name, self)
        if not isinstance(own, dict):
            raise ValueError(f"{name} must hold a YAML mapping such as 'MODEL: {{...}}'")
        bases = own.pop("_BASE_", [])
        above = (*above, os.path.realpath(path))
        merged: dict[str, Any] = {}
        for base in bases if isinstance(bases, list) else [bases]:
            _merge(self._base(base, path, above), merged, name)
        _merge(own, merged, name)
        return merged

    def _base(self, base: Any, path: str, above: tuple[str, ...]) -> dict[str, Any]:
        name = _name(path)
        if not isinstance(base, str) or not base or "\0" in base:
            raise ValueError(f"{name}: _BASE_ must be a path, or a list of paths, got {shown(base)}")
        if not _is_address(base):
            base = os.path.join(os.path.dirname(path), os.path.expanduser(base))
            if not os.path.exists(base):
                raise FileNotFoundError(f"{_name(base)}, which {_name(path, '')} names as its _BASE_, is not there")
        if os.path.realpath(base) in above:
            raise ValueError(f"{_name(above[0])} includes itself through _BASE_: {_name(path, '')} names {base}")
        return self.read(base, above)

    def _text(self, path: str) -> str:
        name = _name(path)
        if _is_address(path):
            raise ValueError(f"{name} must be a file on this machine: nothing is fetched")
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a named pipe would wait for its writer for ever
                raise ValueError(f"{name} must be a file; it is a folder, a pipe or a device")
            with open(path, "rb") as file:
                content = file.read(_MOST_BYTES - self.bytes + 1)
        except FileNotFoundError:
            raise FileNotFoundError(f"{name} is not there") from None
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error.strerror}") from None
        self.bytes += len(content)
        if self.bytes > _MOST_BYTES:
            raise ValueError(f"{name} must, with its bases, have at most {_MOST_BYTES:,} bytes")
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"{name} must be text in UTF-8") from None


def _name(path: str, kind: str = "config file ") -> str:
    return f"{kind}{path}" if len(path) < 1000 and path.isprintable() else f"{kind}{shown(path)}"


def _is_address(path: str) -> bool:
    return re.match(r"[A-Za-z][\w+.-]*://", path) is not None


def _merge(over: Mapping[str, Any], under: dict[str, Any], name: str, group: str = "") -> None:
    """Put what ``over`` has into ``under``, over what is there; groups are copied, as an alias may share them."""
    for key, value in over.items():
        if key in under and isinstance(value, dict) != isinstance(under[key], dict):
            kinds = ("a group", "one value") if isinstance(value, dict) else ("one value", "a group")
            raise ValueError(f"{name}: {group}{key} is {kinds[0]}, and in its _BASE_ {kinds[1]}")
        if isinstance(value, dict):
            _merge(value, under.setdefault(key, {}), name, f"{group}{key}.")
        else:
            under[key] = value


def _parse(text: str, name: str, reading: _Reading) -> Any:
    """The value of a YAML text; ``name`` is its file's in sentences."""
    try:
        return _Builder(name, reading).build(yaml.parse(text, _PARSER))
    except yaml.MarkedYAMLError as error:
        what = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        what += error.problem or "it cannot be read"
        if error.context and error.context_mark:
            what += f", {error.context}, begun in line {error.context_mark.line + 1}"
        raise ValueError(f"{name} is not valid YAML: {_on_one_line(what)}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not valid YAML: {_on_one_line(str(error))}") from None


def _on_one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 400 and text.isprintable() else shown(text, 400)[1:-1]


class _Builder:
    """Builds a value from the events of a parser, without recursion, and stops where it gets too large."""

    def __init__(self, name: str, reading: _Reading) -> None:
        self.name = name
        self.reading = reading
        self.open: list[_Open] = []
        # Value, size and depth by name; None while it is open.
        self.anchors: dict[str, tuple[Any, int, int] | None] = {}
        self.result: Any = None
        self.documents = 0

    def build(self, events: Iterator[yaml.Event]) -> Any:
        for event in events:
            line = event.start_mark.line + 1 if event.start_mark else 0
            if isinstance(event, yaml.ScalarEvent):
                self._count(line, 1, 0)
                self._add(self._scalar(event, line), line, 1, 0, event.anchor)
            elif isinstance(event, yaml.CollectionStartEvent):
                self._begin(event, line)
            elif isinstance(event, yaml.CollectionEndEvent):
                self._end()
            elif isinstance(event, yaml.AliasEvent):
                self._alias(event.anchor, line)
            elif isinstance(event, yaml.DocumentStartEvent):
                self.documents += 1
                if self.documents > 1:
                    raise self._error(line, "begins a second document: a config is one")
        return self.result

    def _error(self, line: int, what: str) -> ValueError:
        return ValueError(f"{self.name}: line {line} {what}")

    def _begin(self, event: yaml.CollectionStartEvent, line: int) -> None:
        is_map = isinstance(event, yaml.MappingStartEvent)
        self._check_tag(event.tag, _MAPS if is_map else (*_LISTS, _COMPUTED), line)
        self._count(line, 1, 1)
        if event.anchor:
            self.anchors[event.anchor] = None
        self.open.append(_Open(line, event.anchor, is_map, event.tag))

    def _end(self) -> None:
        node = self.open.pop()
        value = self._mapping(node) if node.is_map else self._list(node)
        self._add(value, node.line, node.size, node.depth, node.anchor)

    def _alias(self, anchor: str, line: int) -> None:
        if anchor not in self.anchors:
            raise self._error(line, f"names *{shown(anchor)[1:-1]}, and there is no such anchor before it")
        if self.anchors[anchor] is None:
            raise self._error(line, f"has *{shown(anchor)[1:-1]} within what it stands for")
        value, size, depth = self.anchors[anchor]
        self._count(line, size, depth)
        self._add(value, line, size, depth, None)

    def _count(self, line: int, size: int, depth: int) -> None:
        """Refuse what goes beyond the limits."""
        if len(self.open) + depth > _DEEPEST:
            raise self._error(line, f"is nested more than {_DEEPEST} deep")
        self.reading.values += size
        if self.reading.values > _MOST_VALUES:
            raise self._error(line, f"goes beyond {_MOST_VALUES:,} values, which is more than a config has")

    def _add(self, value: Any, line: int, size: int, depth: int, anchor: str | None) -> None:
        """Put a finished value where it belongs."""
        if anchor:
            self.anchors[anchor] = value, size, depth
        if not self.open:
            self.result = value
            return
        parent = self.open[-1]
        parent.size += size
        parent.depth = max(parent.depth, depth + 1)
        parent.values.append(value)
        parent.lines.append(line)

    def _list(self, node: _Open) -> list[Any]:
        if node.tag != _COMPUTED:
            return node.values
        known = _KNOWN_TEXTS.get("".join(str(node.values[0]).split())) if len(node.values) == 1 else None
        if known is None:
            self._check_tag(node.tag, (), node.line)
        return copy.deepcopy(known)

    def _mapping(self, node: _Open) -> dict[str, Any]:
        own, under = {}, []
        for i in range(0, len(node.values), 2):
            key, value, line = node.values[i], node.values[i + 1], node.lines[i]
            if isinstance(key, _Merge):
                under += value if isinstance(value, list) else [value]
                if not all(isinstance(each, dict) for each in under):
                    raise self._error(line, "merges what is no mapping into one")
            elif not isinstance(key, str):
                raise self._error(line, f"has {shown(key)} as a key, which must be text: put it in quotes")
            elif key in own:
                raise self._error(line, f"has {key!r} for the second time in one group")
            elif len(key) > _LONGEST_KEY:
                raise self._error(line, f"has a key of {len(key):,} characters, {shown(key)}")
            else:
                own[key] = value
        merged: dict[str, Any] = {}
        for each in reversed(under):  # the first one counts
            merged.update(each)
        return {**merged, **own}

    def _check_tag(self, tag: str | None, known: tuple[str | None, ...], line: int) -> None:
        if tag not in known:
            name = shown(tag.replace(_TAG, "!!"))[1:-1]
            raise self._error(line, f"has the tag {name}: nothing in a config is executed; write the value itself")

    def _scalar(self, event: yaml.ScalarEvent, line: int) -> Any:
        text, tag = event.value, event.tag
        if tag is None or tag == "!":
            tag = _RESOLVER.resolve(yaml.ScalarNode, text, event.implicit)
        kind = tag.removeprefix(_TAG)
        is_key = bool(self.open) and self.open[-1].is_map and len(self.open[-1].values) % 2 == 0
        if kind == "merge" and is_key:
            return _MERGE
        if kind in ("str", "merge", "timestamp", "value"):
            return text
        if kind == "null":
            return None
        try:
            if kind == "bool":
                return _BOOLEANS[text.lower()]
            if kind == "int":
                return _integer(text)
            if kind == "float":
                return _number(text)
        except (KeyError, ValueError):
            reason = "YAML reads 010 in base 8 and 1:30 in base 60; write the number out, or text in quotes"
            raise self._error(line, f"has {shown(text)}, which is no plain {kind}: {reason}") from None
        self._check_tag(tag, (), line)


def _integer(text: str) -> int | str:
    """As it reads; ValueError for what is octal (``010``) or of base 60 (``1:30``) in YAML 1.1."""
    digits = text.replace("_", "")
    if len(digits) > 100:
        return text
    number = int(digits, 0)
    return number if -_LONGEST_INTEGER < number < _LONGEST_INTEGER else text


def _number(text: str) -> float:
    return float(re.sub(r"\.(?=inf|nan)", "", text.replace("_", "").lower()))
