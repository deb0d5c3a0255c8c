"""Pickles for the tests of what reads them: sound ones in every protocol, and ones written by hand to do harm."""

import collections
import pickle
import pickletools
import random

import numpy as np

__all__ = ["array", "dtype", "harmful", "instructions", "mutated", "name", "sound", "sound_content", "text"]

CANARY = "a_pickle_ran_code"  # a file that appears where one does


def sound_content() -> dict:
    """Every kind of array that such files have."""
    generator = np.random.default_rng(0)
    return {
        "conv1_w": generator.standard_normal((4, 3, 2, 2)).astype(np.float32),
        "res_conv1_bn_s": generator.standard_normal(4),
        "conv1_w_momentum": np.zeros(3, np.float32),
        "half": np.linspace(-1, 1, 5).astype(np.float16),
        "big_endian": np.arange(5, dtype=">f8"),
        "columns_first": np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)),
        "turned": np.arange(24, dtype=np.int64).reshape(2, 3, 4).transpose(2, 0, 1),
        "flags": np.array([[True, False, True]]),
        "bytes": np.arange(256, dtype=np.uint8),
        "empty": np.zeros((0, 3), np.float32),
        "number": np.array(3.5),
        "scalar": np.float32(2.5),
        "count": np.int64(7),
    }


def sound() -> dict[str, bytes]:
    """Pickles of `sound_content` in each protocol and form."""
    content = sound_content()
    forms = {
        "bare": content,
        "blobs": {"blobs": content, "cfg": "MODEL:\n  TYPE: x\n", "steps": [1, 2.5, None, (3, True)]},
        "zoo": {
            "model": collections.OrderedDict(content),
            "__author__": "torchvision",
            "matching_heuristics": True,
            "epochs": 2**40,
        },
    }
    # a version 1.x of NumPy calls its inner module by another name
    return {
        f"{form} {protocol} {core}": pickle.dumps(forms[form], protocol).replace(b"numpy._core.", core)
        for form in forms
        for protocol in range(6)
        for core in ([b"numpy._core.", b"numpy.core."] if protocol < 4 else [b"numpy._core."])
    }


def text(value: str) -> bytes:
    data = value.encode()
    return pickle.BINUNICODE + len(data).to_bytes(4, "little") + data


def name(path: str) -> bytes:
    module, _, last = path.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def integer(value: int) -> bytes:
    return pickle.BININT + value.to_bytes(4, "little", signed=True)


def dtype(code: str = "f4", order: str = "<") -> bytes:
    state = integer(3) + text(order) + b"NNN" + integer(-1) * 2 + integer(0)
    return name("numpy.dtype") + text(code) + b"\x89\x88\x87R" + b"(" + state + b"tb"


EMPTY = name("numpy.core.multiarray._reconstruct") + name("numpy.ndarray") + integer(0) + b"\x85" + text("b") + b"\x87R"


def array(shape: bytes | tuple = (2,), kind: bytes | None = None, data: bytes = b"\0" * 8, order: bytes = b"\x89"):
    """The instructions that make an array, from a shape or the instructions of one, and the bytes."""
    if isinstance(shape, tuple):
        shape = b"(" + b"".join(map(integer, shape)) + b"t"
    content = b"B" + len(data).to_bytes(4, "little") + data
    return EMPTY + b"(" + integer(1) + shape + (dtype() if kind is None else kind) + order + content + b"tb"


def _file(*values: bytes) -> bytes:
    """A dictionary of the values that the instructions leave, one after the other."""
    entries = b"".join(text(f"w{index}") + value for index, value in enumerate(values))
    return b"\x80\x04}(" + entries + b"u."


def _with_codes() -> dict[str, bytes]:
    """Pickles that call or make something in Python's unpickler; where the canary's name is in one, it appears."""
    command = text(f"open({CANARY!r}, 'w')")
    call = f"(V{CANARY}\nVw\n".encode()
    return {
        "a call": _file(name("builtins.eval") + command + b"\x85R"),
        "a call by the stack": _file(text("builtins") + text("eval") + b"\x93" + command + b"\x85R"),
        "a call through two names": _file(
            text("builtins") + text("getattr.__self__.eval") + b"\x93" + command + b"\x85R"
        ),
        "an instance": _file(name("fractions.Fraction") + integer(1) + b"\x85\x81"),
        "an instance with keywords": _file(name("fractions.Fraction") + integer(1) + b"\x85}\x92"),
        "an old instance": _file(call + b"iio\nFileIO\n"),
        "an object": _file(b"(" + name("io.FileIO") + call[1:] + b"o"),
        "a command": _file(name("os.system") + text(f"touch {CANARY}") + b"\x85R"),
        "a persistent object": _file(text("x") + b"Q"),
        "a persistent object by text": _file(b"Px\n"),
        "the registry of extensions": _file(b"\x82\x01"),
        "a buffer from outside": _file(b"\x97"),
        "a buffer made read-only": _file(text("x") + b"\x98"),
        "a name by its NumPy": _file(name("numpy.load") + text("x.npy") + b"\x85R"),
        "another name of an allowed module": _file(name("_codecs.lookup") + text("idna") + b"\x85R"),
        "another encoding": _file(name("_codecs.encode") + text("x") + text("idna") + b"\x86R"),
    }


def _with_states() -> dict[str, bytes]:
    """Pickles that set states of NumPy's types."""
    void = name("numpy.dtype") + text("V8") + b"\x89\x88\x87R"
    objects = b"(" + integer(3) + text("|") + b"N" + text("a") + b"\x85}" + text("a") + name("numpy.dtype") + text("O")
    objects += b"\x89\x88\x87R" + integer(0) + b"\x86s" + integer(8) + integer(1) + integer(63) + b"tb"
    state = b"(" + integer(3) + text("|") + b"NNN" + integer(8) + integer(1) + integer(0) + b"tb"
    twice = void + b"q\x05" + state
    order = b"(" + integer(3) + text(">") + b"NNN" + integer(-1) * 2 + integer(0) + b"tb"
    again = b"(" + integer(1) + b"(" + integer(4096) + b"t" + dtype() + b"\x89B\x04\0\0\0abcdtb"
    return {
        "a dtype that becomes one of objects": _file(array((2,), twice, b"A" * 16), b"h\x05" + objects),
        "a dtype whose order changes": _file(array((2,), dtype() + order)),
        "an array with two states": _file(array() + again),
        "a dtype of objects": _file(array((1,), dtype("O8", "|"))),
        "a dtype of text": _file(array((1,), dtype("U2"))),
        "a dtype with fields": _file(array((1,), name("numpy.dtype") + text("f4,f4") + b"\x89\x88\x87R")),
        "a dtype of no order": _file(array((2,), name("numpy.dtype") + text("f4") + b"\x89\x88\x87R")),
        "a dtype of one byte's order": _file(array((2,), dtype("f4", "|"))),
        "attributes of an array": _file(array() + b"}" + text("data") + text("x") + b"sb"),
        "attributes of a dtype": _file(dtype() + b"}" + text("code") + text("O") + b"sb"),
        "attributes of a name": _file(name("numpy.dtype") + b"}" + text("x") + text("y") + b"sb"),
        "slots of an array": _file(array() + b"N}" + text("tensor") + text("x") + b"s\x86b"),
        "an array that has no state": _file(EMPTY),
        "a list of objects": _file(
            EMPTY + b"(" + integer(1) + integer(1) + b"\x85" + dtype() + b"\x89]" + text("x") + b"atb"
        ),
    }


def _with_counts() -> dict[str, bytes]:
    """Pickles whose counts are not those of what is there."""
    numeric = name("numpy.core.numeric._frombuffer")

    def buffer(shape: tuple, order: bytes) -> bytes:
        sizes = b"(" + b"".join(map(integer, shape)) + b"t"
        return _file(numeric + b"(B\x08\0\0\0" + b"\0" * 8 + dtype() + sizes + order + b"tR")

    many = b"\x8a\x08" + (2**62).to_bytes(8, "little")
    return {
        "more elements than bytes": _file(array((3,))),
        "fewer elements than bytes": _file(array((1,))),
        "a negative size": _file(array((-2,))),
        "two negative sizes": _file(array((-2, -1))),
        "a size that is no number": _file(array(b"(" + b"G\x7f\xf8" + b"\0" * 6 + b"t")),
        "a size that is text": _file(array(text("2") + b"\x85")),
        "a size that is True": _file(array((2, 1)).replace(integer(1) + b"t", b"\x88t")),
        "a shape that is a number": _file(array(integer(2))),
        "sizes whose product overflows": _file(array(b"(" + many + integer(4) + b"t")),
        "sizes that overflow beside none": _file(array(b"(" + many + many + integer(0) + b"t", None, b"")),
        "sixty-five dimensions": _file(array((2,) + (1,) * 64)),
        "a buffer of another size": buffer((3,), text("C")),
        "a buffer of another order": buffer((2,), text("X")),
        "axes that are not the array's": buffer((2,), text("K") + integer(1) + b"\x85"),
        "axes that repeat": buffer((2, 1), text("K") + integer(0) * 2 + b"\x86"),
        "axes of other types": buffer((2, 1), text("K") + text("x") + integer(1) + b"\x86"),
        "more bytes of text than there are": b"\x80\x04X\xff\xff\xff\xff.",
        "more bytes than any memory has": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
        "a negative count of text": b"\x80\x02T\xff\xff\xff\xff.",
        "a frame without end": b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
        "a memo of four thousand million": b"\x80\x04Nr\xff\xff\xff\xff.",
        "a value that the memo has not": b"\x80\x04j\xff\xff\xff\xff.",
    }


def _with_effort() -> dict[str, bytes]:
    """Pickles that cost time or memory."""
    long = b"\x80\x04B" + (10**6).to_bytes(4, "little") + b"\0" * 10**6 + b"q\x00" + dtype("u1", "|") + b"q\x01"
    long += b"}" + integer(10**6) + b"\x85q\x02"
    again = EMPTY + b"(" + integer(1) + b"h\x02h\x01\x89h\x00tb"
    many = long + b"".join(text(f"w{index}") + again + b"s" for index in range(20000)) + b"."
    pairs = b"\x80\x02](" + (b"]" + text("x") + b"Na") * 50000 + b"e\x85q\x00" + name("collections.OrderedDict")
    doubled = b"\x80\x02)" + b"q\x00h\x00\x86" * 100000
    return {
        "one string of bytes for many arrays": many,
        "one list for many dictionaries": pairs + b"q\x01" + b"h\x01h\x00R0" * 50000 + b".",
        "tuples of two of the last": doubled + b".",
        "a key of tuples of two of the last": b"\x80\x02}" + doubled[2:] + b"Ns.",
        "tuples in tuples": b"\x80\x02)" + b"\x85" * 200000 + b".",
        "a key of tuples in tuples": b"\x80\x02})" + b"\x85" * 200000 + b"Ns.",
        "lists in lists": b"\x80\x02" + b"]" * 200000 + b"a" * 199999 + b".",
        "a list in itself": b"\x80\x02]q\x00h\x00a.",
        "a dictionary in itself": b"\x80\x02}q\x00" + text("model") + b"h\x00s" + text("__author__") + b"h\x00s.",
        "marks": b"\x80\x02" + b"(" * 200000 + b"t" * 200000 + b".",
        "an integer of a million digits": b"L" + b"9" * 10**6 + b"L\n.",
        "an integer of a million bytes": b"\x80\x02\x8b" + (10**6).to_bytes(4, "little") + b"\x7f" * 10**6 + b".",
        "a fraction of a million digits": b"F0." + b"9" * 10**6 + b"\n.",
        "a memo's number of a million digits": b"Np" + b"9" * 10**6 + b"\n.",
        "three million values": b"\x80\x02" + b"N" * 3 * 10**6 + b".",
    }


def _with_other_content() -> dict[str, bytes]:
    """Pickles of something else."""
    return {
        "nothing": b"",
        "no end": b"\x80\x02}",
        "no value": b"\x80\x02.",
        "a page": b"<html>404</html>",
        "a list": pickle.dumps([1, 2]),
        "a number for an array": pickle.dumps({"conv1_w": 3}),
        "text for an array": pickle.dumps({"conv1_w": "x" * 1000}),
        "a number for a name": pickle.dumps({1: np.zeros(2)}),
        "bytes for a name": pickle.dumps({b"conv1_w": np.zeros(2)}),
        "a tuple for a name": pickle.dumps({("model", 1): np.zeros(2)}),
        "a list for the model": pickle.dumps({"model": [np.zeros(2)], "__author__": "x"}),
        "nothing for the blobs": pickle.dumps({"blobs": None}),
        "dictionaries in the blobs": pickle.dumps({"blobs": {"x": {"y": np.zeros(2)}}}),
        "an array of complex numbers": pickle.dumps({"x": np.zeros(2, complex)}),
        "an array of dates": pickle.dumps({"x": np.zeros(2, "M8[s]")}),
        "a set": pickle.dumps({"x": {1, 2}}),
        "a class": pickle.dumps({"x": np.ndarray}),
        "a dtype": pickle.dumps({"x": np.dtype("f4")}),
        "an OrderedDict of no pairs": _file(name("collections.OrderedDict") + b"](" + text("x") + b"Ne\x85R"),
        "a key without a value": b"\x80\x02}(" + text("x") + b"u.",
        "a text of protocol 0 without its quotes": b"S'abc\n.",
        "a text that is no UTF-8": b"\x80\x02X\x02\0\0\0\xff\xff.",
    }


def harmful() -> dict[str, bytes]:
    """Pickles that must be refused, by what is wrong with them."""
    return _with_codes() | _with_states() | _with_counts() | _with_effort() | _with_other_content()


def instructions(data: bytes) -> list[bytes]:
    """A pickle's instructions, each with its argument; what is no pickle is one of them."""
    try:
        starts = [position for _, _, position in pickletools.genops(data)]
    except ValueError:
        return [data]
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)])]


OPCODES = [each.code.encode("latin1") for each in pickletools.opcodes]
COUNTS = [0, 1, 2, 3, 127, 128, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]


def any_bytes(chance: random.Random, parts: list[bytes]) -> list[bytes]:
    data = bytearray(b"".join(parts))
    for _ in range(chance.choice([1, 1, 2, 5, 30])):
        data[chance.randrange(len(data))] = chance.choice([chance.randrange(256), 0, 255, ord("\n"), ord(".")])
    return [bytes(data)]


def cut(chance: random.Random, parts: list[bytes]) -> list[bytes]:
    data = b"".join(parts)
    start = chance.randrange(len(data))
    return [data[:start] + chance.choice([b"", b".", data[start + chance.randrange(1, 40) :]])]


def removed(chance: random.Random, parts: list[bytes]) -> list[bytes]:
    return [part for part in parts if chance.random() > 2 / len(parts)]


def doubled(chance: random.Random, parts: list[bytes]) -> list[bytes]:
    start = chance.randrange(len(parts))
    end = start + chance.choice([1, 1, 3, 20])
    return parts[:start] + parts[start:end] * chance.choice([2, 2, 3, 50]) + parts[end:]


def swapped(chance: random.Random, parts: list[bytes]) -> list[bytes]:
    parts = list(parts)
    for _ in range(chance.choice([1, 2, 5])):
        one, other = chance.randrange(len(parts)), chance.randrange(len(parts))
        parts[one], parts[other] = parts[other], parts[one]
    return parts


def inserted(chance: random.Random, parts: list[bytes]) -> list[bytes]:
    parts = list(parts)
    for _ in range(chance.choice([1, 1, 3])):
        argument = chance.choice([b"", b"", bytes([chance.randrange(8)]), b"os\nsystem\n", b"1\n", b"\xff" * 8])
        parts.insert(chance.randrange(len(parts)), chance.choice(OPCODES) + argument)
    return parts


def other_instruction(chance: random.Random, parts: list[bytes]) -> list[bytes]:
    """One instruction becomes another, its argument kept."""
    parts = list(parts)
    where = chance.randrange(len(parts))
    parts[where] = chance.choice(OPCODES) + parts[where][1:]
    return parts


def other_count(chance: random.Random, parts: list[bytes]) -> list[bytes]:
    """A number in an argument becomes another."""
    parts = list(parts)
    where = chance.choice([index for index, part in enumerate(parts) if len(part) > 1] or [0])
    size = chance.choice([1, 2, 4, 8])
    number = (chance.choice(COUNTS) % 256**size).to_bytes(size, "little")
    parts[where] = parts[where][:1] + number + parts[where][1 + size :]
    return parts


MUTATIONS = [any_bytes, cut, removed, doubled, swapped, inserted, other_instruction, other_count]


def spliced(chance: random.Random, parts: list[bytes], other: list[bytes]) -> list[bytes]:
    """A piece of another one, in the middle or in the place of as much."""
    start, length = chance.randrange(len(other)), chance.choice([1, 3, 10, len(other)])
    where = chance.randrange(len(parts))
    return parts[:where] + other[start : start + length] + parts[where + chance.choice([0, 0, length]) :]


def mutated(chance: random.Random, parts: list[bytes], sound: list[list[bytes]], harmful: list[list[bytes]]) -> bytes:
    """A pickle with a few mutations, some of them with pieces of others."""
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        mutation = chance.choice([*MUTATIONS, None])
        if mutation is None:
            parts = spliced(chance, parts, chance.choice(harmful if chance.random() < 0.7 else sound))
        else:
            parts = mutation(chance, parts)
        parts = [part for part in parts if part] or [b"."]
    return b"".join(parts)
