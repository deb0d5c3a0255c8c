"""Mutated pickles, in a process with a limit to time and memory: each ends in weights or in one sentence, and none of
them runs anything."""

import os
import pickle
import pickletools
import random
from collections.abc import Callable

import pickles
import pytest
from limited_process import assert_sound, outcomes

from fbn_plugin.engine.run.array_pickle import read_pickled_weights

CASES, SEED = 4000, 13


def instructions(data: bytes) -> list[bytes]:
    """A pickle's instructions, each with its argument; what is no pickle is one of them."""
    try:
        starts = [position for _, _, position in pickletools.genops(data)]
    except ValueError:
        return [data]
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)])]


SOUND = list(pickles.sound().values())
PARTS = [instructions(data) for data in SOUND]
HARMFUL = [instructions(data) for data in pickles.harmful().values() if 0 < len(data) < 10000]
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


def spliced(chance: random.Random, parts: list[bytes]) -> list[bytes]:
    """A piece of one that does harm, or of another sound one, in the middle or in the place of as much."""
    other = chance.choice(HARMFUL if chance.random() < 0.7 else PARTS)
    start, length = chance.randrange(len(other)), chance.choice([1, 3, 10, len(other)])
    where = chance.randrange(len(parts))
    return parts[:where] + other[start : start + length] + parts[where + chance.choice([0, 0, length]) :]


MUTATIONS = [any_bytes, cut, removed, doubled, swapped, inserted, other_instruction, other_count, spliced]


def mutated(chance: random.Random) -> bytes:
    parts = chance.choice(PARTS if chance.random() < 0.8 else HARMFUL)
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        parts = [part for part in chance.choice(MUTATIONS)(chance, parts) if part] or [b"."]
    return b"".join(parts)


def read(data: bytes) -> str:
    """What a mutated pickle ends in, in a folder where it must leave nothing."""
    with open("x.pkl", "wb") as file:
        file.write(data)
    try:
        weights = read_pickled_weights("x.pkl")["model"]
        return f"{len(weights)} arrays of {sum(float(value.sum()) for value in weights.values())} in sum"
    finally:
        if os.listdir() != ["x.pkl"]:
            raise RuntimeError(f"a pickle ran code: {os.listdir()}")


def sweep(read: Callable[[bytes], object], seed: int, cases: int) -> None:
    chance = random.Random(seed)
    data = [mutated(chance) for _ in range(cases)]
    ended = outcomes(read, data, refusals=(ValueError,), seconds=10, mebibytes=300)
    assert_sound(ended, data)
    kinds = [each.kind for each in ended]
    assert kinds.count("done") > cases // 50 and kinds.count("refused") > cases // 2  # both ends are met


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_mutated_pickles():
    sweep(read, SEED, CASES)


def test_the_canary_is_seen():
    data = pickles.harmful()["a call"]
    with pytest.raises(RuntimeError, match="a pickle ran code"):
        pickle.loads(data)
        read(data)
