"""Checkpoints that are damaged anywhere, in any way: each is read to the very same bits, or refused in one sentence."""

import functools
import hashlib
import io
import os
import random
import tempfile
from collections.abc import Callable

import pytest
import torch
from limited_process import assert_sound, outcomes
from torch import Tensor, nn

from fbn_plugin.engine.run.checkpoint import AtomicCheckpointer, RandomState, load_file
from fbn_plugin.engine.run.logging import read_metrics
from fbn_plugin.engine.run.refusals import check_state

NUMBER = 500


def checkpointer(folder: str = "") -> AtomicCheckpointer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return AtomicCheckpointer(model, folder, optimizer=optimizer, random=RandomState())


@functools.cache
def sound() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        found = checkpointer(folder)
        found.model(torch.ones(2, 3, 8, 8)).square().sum().backward()
        found.checkpointables["optimizer"].step()
        found.save("model", iteration=3, seed=5)
        with open(f"{folder}/model.pth", "rb") as file:
            return file.read()


def digest(value: object) -> str:
    """Of all bits of what a checkpoint holds."""
    found = hashlib.sha256()

    def add(part: object) -> None:
        if isinstance(part, dict):
            for key in part:
                found.update(repr(key).encode())
                add(part[key])
        elif isinstance(part, list | tuple):
            found.update(f"{len(part)}".encode())
            for each in part:
                add(each)
        elif isinstance(part, Tensor):
            found.update(f"{part.dtype} {tuple(part.shape)}".encode() + part.contiguous().numpy().tobytes())
        else:
            found.update(repr(part).encode())

    add(value)
    return found.hexdigest()


def resume(content: bytes) -> str:
    """What a run would go on from."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.pth")
        with open(path, "wb") as file:
            file.write(content)
        read = load_file(path)
        check_state(path, checkpointer().load(path), ("iteration", "seed"))
        return digest(read)


def flip_bit(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def flip_bit_of_the_directory(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(content.rindex(b"PK\1\2") - 1000, len(content))] ^= 1 << rng.randrange(8)


def replace_bytes(content: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 3, 30))):
        content[rng.randrange(len(content))] = rng.choice((0, 255, rng.randrange(256)))


def cut(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def zero(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(content)) // 512 * 512
    length = min(rng.choice((512, 4096)), len(content) - start)
    content[start : start + length] = bytes(length)


def swap(content: bytearray, rng: random.Random) -> None:
    length = rng.choice((1, 4, 64, 512))
    one, other = sorted(rng.sample(range(len(content) // length), 2))
    first, second = (slice(place * length, (place + 1) * length) for place in (one, other))
    content[first], content[second] = content[second], content[first]


def remove(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(content))
    del content[start : start + rng.choice((1, 16, 512))]


def insert(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(content) + 1)
    content[start:start] = rng.choice((b"\0", b"junk", bytes(content[start : start + 200]), bytes(512)))


DAMAGES = (flip_bit, flip_bit_of_the_directory, replace_bytes, cut, zero, swap, remove, insert)


def damaged(content: bytes, damages: tuple[Callable, ...], number: int, seed: int) -> list[bytes]:
    rng = random.Random(seed)
    cases = []
    for each in range(number):
        case = bytearray(content)
        damages[each % len(damages)](case, rng)
        cases.append(bytes(case))
    return cases


def test_damaged_checkpoints():
    right = resume(sound())
    cases = damaged(sound(), DAMAGES, NUMBER, 0)
    ended = outcomes(resume, cases)
    assert_sound(ended, cases, lambda case: f"{len(case)} bytes, {hashlib.sha256(case).hexdigest()}")
    wrong = [number for number, each in enumerate(ended) if each.kind == "done" and each.text != right]
    assert wrong == [], f"read to other bits, as {DAMAGES[wrong[0] % len(DAMAGES)].__name__} number {wrong[0]}"
    refused = [each.text for each in ended if each.kind == "refused"]
    assert len(refused) > NUMBER // 2 and all("checkpoint " in text for text in refused)


def metrics(content: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "metrics.json")
        with open(path, "wb") as file:
            file.write(content)
        return str(read_metrics(path))


def test_damaged_metrics():
    rows = [f'{{"iteration": {number}, "total_loss": {number / 7}, "bbox/AP": null}}\n' for number in range(9, 200, 10)]
    cases = damaged("".join(rows).encode(), (flip_bit, replace_bytes, cut, zero, remove, insert), NUMBER, 0)
    cases += [b"[" * 100_000, b'{"iteration": ' + b"9" * 5000 + b"}\n{}", b"\xff" * 10, b"1\n", b"x" * 2**21 + b"\n"]
    ended = outcomes(metrics, cases)
    assert_sound(ended, cases)
    assert {each.kind for each in ended} == {"done", "refused"}


@pytest.mark.parametrize("number", [1, 2])
def test_the_sweep_finds_what_it_is_for(number):
    """A flipped bit of a weight is other bits, without the look at the checksums."""
    content = bytearray(sound())
    weight = torch.load(io.BytesIO(sound()))["model"]["0.weight"].numpy().tobytes()
    content[content.index(weight) + number] ^= 1
    assert digest(torch.load(io.BytesIO(content))) != digest(torch.load(io.BytesIO(sound())))
    with pytest.raises(ValueError, match="cut short or damaged"):
        resume(bytes(content))
