"""Mutated pickles, in a process with a limit to time and memory: each ends in weights or in one sentence, and none of
them runs anything."""

import os
import pickle
import random

import pickles
import pytest
from limited_process import assert_sound, outcomes

from fbn_plugin.engine.files.array_pickle import read_pickled_weights

CASES, SEED = 4000, 13
SOUND = [pickles.instructions(data) for data in pickles.sound().values()]
HARMFUL = [pickles.instructions(data) for data in pickles.harmful().values() if 0 < len(data) < 10000]


def mutated(chance: random.Random) -> bytes:
    start = chance.choice(SOUND if chance.random() < 0.8 else HARMFUL)
    return pickles.mutated(chance, start, SOUND, HARMFUL)


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


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_mutated_pickles():
    chance = random.Random(SEED)
    data = [mutated(chance) for _ in range(CASES)]
    ended = outcomes(read, data, refusals=(ValueError,), seconds=10, mebibytes=300)
    assert_sound(ended, data)
    kinds = [each.kind for each in ended]
    assert kinds.count("done") > CASES // 50 and kinds.count("refused") > CASES // 2  # both ends are met


def test_the_canary_is_seen():
    data = pickles.harmful()["a call"]
    with pytest.raises(RuntimeError, match="a pickle ran code"):
        pickle.loads(data)
        read(data)
