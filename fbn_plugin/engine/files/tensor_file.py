"""What ``torch.load(..., weights_only=True)`` leaves to be looked at in a file of ``torch.save``'s.

It runs no code from the file, but up to version 2.9 it believes the file on how long each tensor's memory is, so that a
false number makes it read, and write, memory that is not the tensor's; and a dictionary's key of tuples in tuples ends
the process when it is hashed. Here the file is looked through before it is loaded, by following the stack of its pickle
without making anything of it. Tensors that are sparse or quantized, into which PyTorch does not look until they are
used, are no weights of ours.
"""

import os
import pickletools
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from fbn_plugin.engine.files.array_pickle import BoundedFile

__all__ = ["check_pickles", "check_tensors"]

_BYTES_EACH = {
    **{"ByteStorage": 1, "CharStorage": 1, "BoolStorage": 1, "UntypedStorage": 1},
    **{"HalfStorage": 2, "BFloat16Storage": 2, "ShortStorage": 2},
    **{"FloatStorage": 4, "IntStorage": 4, "DoubleStorage": 8, "LongStorage": 8},
    **{"ComplexFloatStorage": 8, "ComplexDoubleStorage": 16},
}
_MOST_INSTRUCTIONS = 2_000_000
_MOST_CALLS = 1000  # with arguments, of what is not PyTorch's: sets and the like, which hash these
_DEEPEST = 20  # tuples in tuples
_MOST_ELEMENTS = 10_000_000  # of all tuples together, each counted wherever it is used

_OTHER = object()  # a value that no storage is described by

# The instructions that PyTorch reads.
_INSTRUCTIONS = {
    *("GLOBAL", "NEWOBJ", "REDUCE", "BUILD", "BINPERSID", "PROTO", "STOP", "MARK"),
    *("BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT"),
    *("APPEND", "APPENDS", "SETITEM", "SETITEMS", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "NONE", "NEWFALSE", "NEWTRUE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"),
}
_PICKLES_OF_OLD = 5  # a number to know the file by, a version, the machine, the content, the order of the storages


def check_pickles(path: str | os.PathLike) -> None:
    """Refuse a file of ``torch.save``'s whose tensors' memory is not as long as it says, whose zip's records are
    together longer than the file, or that has such keys as crash Python.

    Raises:
        ValueError: one sentence without the file's name.
    """
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":
            _check_archive(file)
        else:
            _check_old_form(BoundedFile(file))


def _check_archive(file: BinaryIO) -> None:
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        raise ValueError("it is cut short") from None
    with archive:
        records = archive.infolist()
        sizes = {record.filename.partition("/")[2]: record.file_size for record in records}
        folders = {record.filename.partition("/")[0] for record in records}
        if len(sizes) < len(records) or len(folders) != 1 or "data.pkl" not in sizes or archive.comment:
            raise ValueError("its records are not those of one checkpoint")
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("its records are compressed, which PyTorch's are not")
        if sum(sizes.values()) > file.seek(0, os.SEEK_END):
            raise ValueError("its records are longer than the file")
        try:
            with archive.open(f"{folders.pop()}/data.pkl") as content:
                storages = _storages(BoundedFile(content))
        except zipfile.BadZipFile:
            raise ValueError("its record data.pkl is damaged") from None
        for key, length in storages:
            if sizes.get(f"data/{key}") != length:
                raise ValueError(f"tensor data {key!r} has {sizes.get(f'data/{key}')} bytes, not {length}")


def _check_old_form(file: BoundedFile) -> None:
    """Of PyTorch before 1.6: pickles, and the storages behind them."""
    storages = dict(storage for _ in range(_PICKLES_OF_OLD) for storage in _storages(file))
    if sum(storages.values()) > file.size - file.tell():
        raise ValueError("its tensors are longer than the file")


def check_tensors(content: Any) -> None:
    """Refuse tensors that are not dense, anywhere in a loaded file.

    Raises:
        ValueError: one sentence without the file's name.
    """
    left, seen = [content], set()
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided or value.is_quantized or value.is_nested or value.device.type != "cpu":
                raise ValueError("it has a tensor that is not dense")
        elif isinstance(value, (Mapping, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, Mapping) else value


@dataclass(frozen=True, slots=True, eq=False)
class _Tuple:
    values: list[Any]
    depth: int
    elements: int


def _storages(file: BoundedFile) -> list[tuple[str, int]]:
    """Key and length in bytes of each storage that a pickle asks for. The file is behind the pickle then."""
    walk = _Walk()
    try:
        for instruction, argument, _ in pickletools.genops(file):
            walk.follow(instruction, argument)
    except (IndexError, KeyError):
        raise ValueError("its pickle takes values where there are none") from None
    return walk.storages


class _Walk:
    """Follows the stack of a pickle.

    Every instruction takes and leaves the same number of values whatever these are, and only constants and tuples of
    them describe a storage, so one stand-in does for all else.
    """

    def __init__(self) -> None:
        self.storages: list[tuple[str, int]] = []
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._instructions = self._calls = self._elements = 0

    def follow(self, instruction: pickletools.OpcodeInfo, argument: Any) -> None:
        name = instruction.name
        self._instructions += 1
        if name not in _INSTRUCTIONS or self._instructions > _MOST_INSTRUCTIONS:
            raise ValueError(f"it is not as PyTorch writes it (instruction {name} is number {self._instructions})")
        if name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self._push(self._memo[argument])
        elif name == "GLOBAL" and "sparse" in argument:  # PyTorch would warn of what it does with it
            raise ValueError("it has a tensor that is not dense")
        elif name == "MARK":
            self._stack.append(pickletools.markobject)
        elif name == "BINPERSID":
            self.storages.append(_storage(self._stack.pop()))
            self._stack.append(_OTHER)
        else:
            taken = _take(self._stack, instruction)
            if name == "REDUCE":
                self._count_call(*taken)
            if "TUPLE" in name:
                self._push(_tuple(taken))
            elif instruction.stack_after:
                self._stack.append(argument if isinstance(argument, (int, str)) else _OTHER)

    def _push(self, value: Any) -> None:
        if isinstance(value, _Tuple):
            self._elements += value.elements
            if value.depth > _DEEPEST or self._elements > _MOST_ELEMENTS:
                raise ValueError("it has tuples in tuples")
        self._stack.append(value)

    def _count_call(self, function: Any, arguments: Any) -> None:
        is_empty = isinstance(arguments, _Tuple) and not arguments.values
        self._calls += not (is_empty or str(function).startswith("torch"))
        if self._calls > _MOST_CALLS:
            raise ValueError(f"it has more than {_MOST_CALLS} objects that are neither tensors nor plain values")


def _tuple(values: list[Any]) -> _Tuple:
    inner = [value for value in values if isinstance(value, _Tuple)]
    depth = 1 + max((value.depth for value in inner), default=0)
    return _Tuple(values, depth, len(values) + sum(value.elements for value in inner))


def _take(stack: list[Any], instruction: pickletools.OpcodeInfo) -> list[Any]:
    """What an instruction takes from the stack, without the mark; its target, where it has one, goes too."""
    before = list(instruction.stack_before)
    taken: list[Any] = []
    if pickletools.markobject in before:
        while (value := stack.pop()) is not pickletools.markobject:
            taken.append(value)
        before = before[: before.index(pickletools.markobject)]
    taken += [stack.pop() for _ in before]
    return taken[::-1]


def _storage(value: Any) -> tuple[str, int]:
    match value.values if isinstance(value, _Tuple) else None:
        case ("storage", str() as kind, str() as key, str(), int() as count, *_):  # the old form has views of storages
            each = _BYTES_EACH.get(kind.rpartition(" ")[2])
            if each is not None:
                return key, count * each
    raise ValueError("it has a tensor of a type that weights do not have")
