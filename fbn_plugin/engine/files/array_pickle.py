"""Weights in pickle form, as Detectron and detectron2 publish them (``R-50.pkl``): dictionaries of NumPy arrays, read
without Python's unpickler and without NumPy's.

A pickle is a program for a stack machine (https://docs.python.org/3/library/pickletools.html). Python's own machine
calls what the file names and sets the state of what comes of it, so that whoever wrote the file runs code, or gives an
array or a dtype a state that NumPy never has. The machine here is closed, by what it lacks:

- It knows the instructions that dictionaries of arrays are made of, in protocols 0 to 5, and no other: none that makes
  an instance of a class, asks for a persistent object, or looks into ``copyreg``'s registry.
- Every value on its stack is None, a number, text, bytes, a tuple, a list, a dictionary, or one of three types of this
  file: a name of ``_NAMES``, a dtype, an array. A name calls nothing: ``_called`` compares it and its arguments with
  the few forms that NumPy writes. No attribute is read or set by a name from the file.
- A dtype is one of ``_CODES`` with a byte order, given once. An array is made once, from a shape, such a dtype and
  bytes, after their counts were compared.
- Keys of dictionaries are text, and nothing recurses into a value, so that no depth of nesting matters.
- Time and memory are bounded by the file: no instruction reads or reserves more than there is, what the instructions
  copy is together no more than the file's size, numbers have at most eight bytes, and there is a limit to how many
  instructions there are.
"""

import enum
import math
import os
import pickle
import re
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fbn_plugin.engine.files.words import shown

__all__ = ["BoundedFile", "read_pickled_weights"]

_MOST_INSTRUCTIONS = 1_000_000  # some 25 an array
_MOST_DIMENSIONS = 32
_MOST_ELEMENTS = 2**48  # of an array with none, its other sizes multiplied
_LONGEST_NUMBER = 32  # characters

_CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


class _Name(enum.Enum):
    NDARRAY = enum.auto()
    DTYPE = enum.auto()
    RECONSTRUCT = enum.auto()
    SCALAR = enum.auto()
    FROM_BUFFER = enum.auto()
    ORDERED_DICT = enum.auto()
    ENCODE = enum.auto()
    BYTES = enum.auto()


# NumPy's inner module has one name in its versions up to 1 and another since; `bytes` is how protocols below 3 write an
# empty string of bytes, and `encode` any other.
_NAMES = {
    ("numpy", "ndarray"): _Name.NDARRAY,
    ("numpy", "dtype"): _Name.DTYPE,
    ("collections", "OrderedDict"): _Name.ORDERED_DICT,
    ("_codecs", "encode"): _Name.ENCODE,
    ("__builtin__", "bytes"): _Name.BYTES,
    ("builtins", "bytes"): _Name.BYTES,
} | {
    (f"numpy.{core}.{module}", name): value
    for core in ("core", "_core")
    for module, name, value in (
        ("multiarray", "_reconstruct", _Name.RECONSTRUCT),
        ("multiarray", "scalar", _Name.SCALAR),
        ("numeric", "_frombuffer", _Name.FROM_BUFFER),
    )
}


class _DType:
    """One of ``_CODES``; its byte order is given once."""

    __slots__ = ("code", "order")

    def __init__(self, code: str):
        self.code, self.order = code, None


class _Array:
    """An array; its content is given once."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor | None = None):
        self.tensor = tensor


class BoundedFile:
    """A file, of which no more is asked for than there is, so that a false count reserves no memory.

    Args:
        file: open for reading, in binary.

    Raises:
        ValueError: from its methods, where the file is shorter; one sentence.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self.size = file.seek(0, os.SEEK_END)
        file.seek(0)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, count: int) -> bytes:
        data = self._file.read(count) if count <= self.size - self._file.tell() else b""
        if len(data) < count:
            raise ValueError(f"it is cut short, at byte {self.size}")
        return data

    def readline(self) -> bytes:
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise ValueError(f"it is cut short, at byte {self.size}")
        return line


def read_pickled_weights(path: str | os.PathLike) -> dict[str, Any]:
    """Read a dictionary of arrays, in any of the forms that detectron2 takes, without running anything in it.

    Args:
        path: a pickle of ``{"model": arrays, "__author__": text}``, of ``{"blobs": arrays}``, or of the arrays alone;
            what else is beside ``"model"`` or ``"blobs"`` is left out.

    Returns:
        as ``detectron2.checkpoint.DetectionCheckpointer`` reads it: ``"model"``, the arrays by name as tensors of the
        same shape and type, without Caffe2's momentum; ``"__author__"``, which is ``"Caffe2"`` where the file does not
        say; ``"matching_heuristics"``, whether names are to be matched by their likeness.

    Raises:
        FileNotFoundError, ValueError: no such file; not such a pickle, or one that is cut short.

    Examples::
        >>> import pickle, tempfile
        >>> with tempfile.NamedTemporaryFile(suffix=".pkl") as file:
        ...     pickle.dump({"conv1_w": np.ones((2, 3), np.float32)}, file)
        ...     file.flush()
        ...     read_pickled_weights(file.name)
        {'model': {'conv1_w': tensor([[1., 1., 1.],
                [1., 1., 1.]])}, '__author__': 'Caffe2', 'matching_heuristics': True}
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"weights {path} are not there")
    try:
        with open(path, "rb") as file:
            return _weights(_Machine(BoundedFile(file)).run())
    except ValueError as error:
        raise ValueError(f"weights {path} cannot be read as a pickle of arrays: {error}") from None


def _weights(content: Any) -> dict[str, Any]:
    """The content in detectron2's form; see `read_pickled_weights`."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds {_kind(content)}, not a dictionary")
    if "model" in content and "__author__" in content:
        author = content["__author__"] if isinstance(content["__author__"], str) else ""
        return {
            "model": _tensors(content["model"]),
            "__author__": author,
            "matching_heuristics": bool(content.get("matching_heuristics", False)),
        }
    blobs = _tensors(content.get("blobs", content), ignored="_momentum")
    return {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}


def _tensors(arrays: Any, ignored: str | None = None) -> dict[str, Tensor]:
    """The arrays as tensors, but for names that end in ``ignored``."""
    if not isinstance(arrays, dict):
        raise ValueError(f"it holds {_kind(arrays)} where the dictionary of arrays should be")
    tensors = {}
    for name, array in arrays.items():
        if ignored and name.endswith(ignored):
            continue
        if not isinstance(array, _Array) or array.tensor is None:
            raise ValueError(f"entry {shown(name, 80)} is {_kind(array)}, not an array of numbers")
        tensors[name] = array.tensor
    return tensors


class _Machine:
    """Runs the instructions of one file."""

    def __init__(self, file: BoundedFile):
        self._file = file
        self._to_copy = file.size  # bytes and items; a sound file has each once
        self._stack: list[Any] = []
        self._marks: list[int] = []  # heights of the stack
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The value that is left at the end."""
        for _ in range(_MOST_INSTRUCTIONS):
            code = self._file.read(1)
            if code == pickle.STOP:
                return self._pop()
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise ValueError(f"it holds more than arrays (instruction {code!r} at byte {self._file.tell() - 1})")
            try:
                instruction(self)
            except UnicodeError:
                raise ValueError(f"it holds text that is none (before byte {self._file.tell()})") from None
        raise ValueError(f"it has more than {_MOST_INSTRUCTIONS} instructions")

    # What is read

    def _line(self) -> bytes:
        return self._file.readline()[:-1]

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._file.read(struct.calcsize(layout)))[0]

    def _number_in_text(self, convert: Callable[[bytes], Any]) -> Any:
        line = self._line()
        if len(line) > _LONGEST_NUMBER:
            raise ValueError(f"it holds a number of {len(line)} characters")
        try:
            return convert(line)
        except ValueError:
            raise ValueError(f"it has {line!r} where a number should be") from None

    def _counted(self, layout: str) -> bytes:
        return self._file.read(self._number(layout))

    # The stack

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self, kind: type = object) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ValueError("an instruction takes a value where there is none")
        value = self._stack.pop()
        if not isinstance(value, kind):
            raise ValueError(f"it holds more than arrays ({_kind(value)} in the place of {kind.__name__.strip('_')})")
        return value

    def _to_mark(self) -> list[Any]:
        if not self._marks:
            raise ValueError("an instruction takes a mark where there is none")
        height = self._marks.pop()
        values = self._stack[height:]
        del self._stack[height:]
        return values

    def _mark(self) -> None:
        self._marks.append(len(self._stack))

    def _tuple(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._push(tuple(values[::-1]))

    def _put(self, index: int) -> None:
        value = self._pop()
        self._memo[index] = value
        self._push(value)

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise ValueError(f"it asks for value {index} of its memo, which has none")
        self._push(self._memo[index])

    # Containers

    def _extend(self, values: list[Any]) -> None:
        target = self._pop(list)
        target += values
        self._push(target)

    def _update(self, values: list[Any]) -> None:
        target = self._pop(dict)
        _fill(target, values)
        self._push(target)

    def _dictionary(self, values: list[Any]) -> None:
        target: dict[str, Any] = {}
        _fill(target, values)
        self._push(target)

    # Names and what is made of them

    def _name(self, module: Any, name: Any) -> None:
        if (module, name) not in _NAMES:
            raise ValueError(f"it holds more than arrays ({shown(f'{module}.{name}', 80)})")
        self._push(_NAMES[module, name])

    def _name_from_lines(self) -> None:
        module, name = (self._line().decode() for _ in range(2))
        self._name(module, name)

    def _name_from_stack(self) -> None:
        name, module = self._pop(str), self._pop(str)
        self._name(module, name)

    def _reduce(self) -> None:
        arguments, name = self._pop(tuple), self._pop(_Name)
        self._push(self._called(name, arguments))

    def _called(self, name: _Name, arguments: tuple) -> Any:
        """What a name and its arguments stand for; text stands for bytes where Python 2 or ``encode`` wrote these."""
        match name, arguments:
            case _Name.DTYPE, (str() as code, 0, 1) if code in _CODES:
                return _DType(code)
            case _Name.RECONSTRUCT, (_Name.NDARRAY, (0,), "b" | b"b"):
                return _Array()
            case _Name.SCALAR, (_DType() as dtype, data):
                return _Array(self._tensor((), dtype, data))
            case _Name.FROM_BUFFER, (data, _DType() as dtype, tuple() as shape, "C" | "F" as order):
                return _Array(self._tensor(shape, dtype, data, order))
            case _Name.FROM_BUFFER, (data, _DType() as dtype, tuple() as shape, "K", tuple() as axes):
                tensor = self._tensor(shape, dtype, data)
                if not all(type(axis) is int for axis in axes) or sorted(axes) != list(range(len(shape))):
                    raise ValueError("the order of an array's axes is none")
                return _Array(tensor.permute(axes).contiguous())
            case _Name.ENCODE, (str() as text, "latin1"):
                return text
            case _Name.BYTES, ():
                return b""
            case _Name.ORDERED_DICT, ():
                return {}
            case _Name.ORDERED_DICT, (list() as pairs,):
                self._spend(len(pairs))
                if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
                    raise ValueError("an OrderedDict is made of something else than pairs")
                content: dict[str, Any] = {}
                _fill(content, [value for pair in pairs for value in pair])
                return content
        raise ValueError(f"it holds more than arrays of numbers ({name.name.lower()} is called as for none of these)")

    def _build(self) -> None:
        state, target = self._pop(), self._pop()
        match target, state:
            case _DType(order=None, code=code), (3, "<" | ">" | "|" as order, None, None, None, -1, -1, 0):
                if (order == "|") != code.endswith("1"):
                    raise ValueError(f"a dtype {code} of byte order {order}")
                target.order = order
            case _Array(tensor=None), (1, tuple() as shape, _DType() as dtype, 0 | 1 as is_fortran, data):
                target.tensor = self._tensor(shape, dtype, data, "F" if is_fortran else "C")
            case dict(), dict():  # attributes of an OrderedDict, such as PyTorch's `_metadata`
                pass
            case _:
                raise ValueError(f"it holds more than arrays of numbers ({_kind(target)} is given another state)")
        self._push(target)

    def _tensor(self, shape: tuple, dtype: _DType, data: Any, order: str = "C") -> Tensor:
        if dtype.order is None:
            raise ValueError(f"a dtype {dtype.code} has no byte order")
        if not isinstance(data, (str, bytes)):
            raise ValueError(f"the content of an array is {_kind(data)}, not bytes")
        if len(shape) > _MOST_DIMENSIONS or not all(type(size) is int and 0 <= size < _MOST_ELEMENTS for size in shape):
            raise ValueError("the shape of an array is none")
        expected = math.prod(shape) * int(dtype.code[1:])
        if len(data) != expected or math.prod(size or 1 for size in shape) > _MOST_ELEMENTS:
            raise ValueError(f"an array of shape {shape} and dtype {dtype.code} has {len(data)} bytes")
        self._spend(len(data))
        content = data.encode("latin1") if isinstance(data, str) else data
        if dtype.code == "b1":  # a byte that is neither 0 nor 1 is no bool
            values = np.frombuffer(content, np.uint8) != 0
        else:
            values = np.frombuffer(content, dtype.order + dtype.code)
        native = values.dtype.newbyteorder("=")
        return torch.from_numpy(np.array(values.reshape(shape, order=order), dtype=native, order="C"))

    def _spend(self, amount: int) -> None:
        self._to_copy -= amount
        if self._to_copy < 0:
            raise ValueError("its arrays have more bytes than the file")


def _fill(target: dict[str, Any], values: list[Any]) -> None:
    if len(values) % 2:
        raise ValueError("a dictionary has a key without a value")
    for key, value in zip(values[::2], values[1::2]):
        if not isinstance(key, str):
            raise ValueError(f"a dictionary has {_kind(key)} for a name")
        target[key] = value


def _kind(value: Any) -> str:
    """What a value is, in words; never its content, which may be of any size and depth."""
    return "nothing" if value is None else f"a value of type {type(value).__name__.strip('_').lower()}"


def _integer_in_text(line: bytes) -> int | bool:
    if line in (b"00", b"01"):  # how protocols 0 and 1 write False and True
        return line == b"01"
    return int(line.removesuffix(b"L"))


def _integer(data: bytes) -> int:
    if len(data) > 8:
        raise ValueError(f"it holds an integer of {len(data)} bytes")
    return int.from_bytes(data, "little", signed=True)


def _python2_text(line: bytes) -> str:
    """Python 2's ``repr`` of a string of bytes, as the text of these bytes in Latin-1."""
    body = line[1:-1]
    escapes = body.replace(b"\\\\", b"")
    if len(line) < 2 or line[:1] != line[-1:] or re.search(rb"\\(?![nrt'\"]|x[0-9a-f]{2})", escapes):
        raise ValueError("a text of protocol 0 is not as Python writes it")
    return body.decode("unicode_escape")


_INSTRUCTIONS: dict[bytes, Callable[[_Machine], None]] = {
    pickle.PROTO: lambda machine: machine._file.read(1),
    pickle.FRAME: lambda machine: machine._file.read(8),  # a promise of how much follows, to read ahead
    pickle.MARK: _Machine._mark,
    pickle.NONE: lambda machine: machine._push(None),
    pickle.NEWTRUE: lambda machine: machine._push(True),
    pickle.NEWFALSE: lambda machine: machine._push(False),
    pickle.INT: lambda machine: machine._push(machine._number_in_text(_integer_in_text)),
    pickle.LONG: lambda machine: machine._push(machine._number_in_text(_integer_in_text)),
    pickle.FLOAT: lambda machine: machine._push(machine._number_in_text(float)),
    pickle.BININT: lambda machine: machine._push(machine._number("<i")),
    pickle.BININT1: lambda machine: machine._push(machine._number("<B")),
    pickle.BININT2: lambda machine: machine._push(machine._number("<H")),
    pickle.LONG1: lambda machine: machine._push(_integer(machine._counted("<B"))),
    pickle.LONG4: lambda machine: machine._push(_integer(machine._counted("<I"))),
    pickle.BINFLOAT: lambda machine: machine._push(machine._number(">d")),
    pickle.STRING: lambda machine: machine._push(_python2_text(machine._line())),
    pickle.SHORT_BINSTRING: lambda machine: machine._push(machine._counted("<B").decode("latin1")),
    pickle.BINSTRING: lambda machine: machine._push(machine._counted("<I").decode("latin1")),
    pickle.UNICODE: lambda machine: machine._push(machine._line().decode("raw-unicode-escape")),
    pickle.SHORT_BINUNICODE: lambda machine: machine._push(machine._counted("<B").decode()),
    pickle.BINUNICODE: lambda machine: machine._push(machine._counted("<I").decode()),
    pickle.BINUNICODE8: lambda machine: machine._push(machine._counted("<Q").decode()),
    pickle.SHORT_BINBYTES: lambda machine: machine._push(machine._counted("<B")),
    pickle.BINBYTES: lambda machine: machine._push(machine._counted("<I")),
    pickle.BINBYTES8: lambda machine: machine._push(machine._counted("<Q")),
    pickle.BYTEARRAY8: lambda machine: machine._push(machine._counted("<Q")),
    pickle.EMPTY_TUPLE: lambda machine: machine._push(()),
    pickle.TUPLE1: lambda machine: machine._tuple(1),
    pickle.TUPLE2: lambda machine: machine._tuple(2),
    pickle.TUPLE3: lambda machine: machine._tuple(3),
    pickle.TUPLE: lambda machine: machine._push(tuple(machine._to_mark())),
    pickle.EMPTY_LIST: lambda machine: machine._push([]),
    pickle.LIST: lambda machine: machine._push(machine._to_mark()),
    pickle.APPEND: lambda machine: machine._extend([machine._pop()]),
    pickle.APPENDS: lambda machine: machine._extend(machine._to_mark()),
    pickle.EMPTY_DICT: lambda machine: machine._push({}),
    pickle.DICT: lambda machine: machine._dictionary(machine._to_mark()),
    pickle.SETITEM: lambda machine: machine._update([machine._pop(), machine._pop()][::-1]),
    pickle.SETITEMS: lambda machine: machine._update(machine._to_mark()),
    pickle.PUT: lambda machine: machine._put(machine._number_in_text(int)),
    pickle.BINPUT: lambda machine: machine._put(machine._number("<B")),
    pickle.LONG_BINPUT: lambda machine: machine._put(machine._number("<I")),
    pickle.MEMOIZE: lambda machine: machine._put(len(machine._memo)),
    pickle.GET: lambda machine: machine._get(machine._number_in_text(int)),
    pickle.BINGET: lambda machine: machine._get(machine._number("<B")),
    pickle.LONG_BINGET: lambda machine: machine._get(machine._number("<I")),
    pickle.GLOBAL: _Machine._name_from_lines,
    pickle.STACK_GLOBAL: _Machine._name_from_stack,
    pickle.REDUCE: _Machine._reduce,
    pickle.BUILD: _Machine._build,
}
