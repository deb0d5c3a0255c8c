"""Mutated checkpoints, in a process with a limit to time and memory: each ends in tensors, whose memory can be read, or
in one sentence."""

import argparse
import io
import os
import pickletools
import random
import warnings
import zipfile

import pickles
import pytest
import torch
from limited_process import assert_sound, outcomes

from fbn_plugin.engine.run.checkpoint import load_file

CASES, SEED = 1500, 14


def content() -> dict:
    torch.manual_seed(0)
    weight = torch.arange(12.0).reshape(3, 4)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return {
        "model": {**model.state_dict(), "turned": weight.t(), "part": weight[1:, 2:], "half": weight.half()},
        "optimizer": optimizer.state_dict(),
        "arguments": argparse.Namespace(lr=0.1),
        "parameter": torch.nn.Parameter(weight.clone()),
        "iteration": 7,
    }


def saved(**how) -> bytes:
    file = io.BytesIO()
    torch.save(content(), file, **how)
    return file.getvalue()


def records() -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(saved())) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


ARCHIVE, OLD = saved(), saved(_use_new_zipfile_serialization=False)
RECORDS = records()
PICKLE = next(name for name in RECORDS if name.endswith("/data.pkl"))
FLOATS = pickles.name("torch.FloatStorage")


def tensor(key="0", numel=4, offset=0, size=4, stride=1, kind=FLOATS) -> bytes:
    """The instructions that make a tensor of one dimension, with numbers that need not fit."""

    def number(value: int) -> bytes:
        return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)

    storage = b"(" + pickles.text("storage") + kind + pickles.text(key) + pickles.text("cpu") + number(numel) + b"tQ"
    rest = number(offset) + number(size) + b"\x85" + number(stride) + b"\x85\x89"
    rebuild = pickles.name("torch._utils._rebuild_tensor_v2")
    return rebuild + b"(" + storage + rest + pickles.name("collections.OrderedDict") + b")RtR"


def model_of(*values: bytes) -> bytes:
    entries = b"".join(pickles.text(f"w{index}") + value for index, value in enumerate(values))
    return b"\x80\x02}" + pickles.text("model") + b"}(" + entries + b"us."


def harmful() -> dict[str, bytes]:
    """Pickles for the record data.pkl."""
    deep = b")" + b"\x85" * 200000
    doubled = b")" + b"q\x00h\x00\x86" * 60
    ordered = pickles.name("collections.OrderedDict")
    sparse = pickles.name("torch._utils._rebuild_sparse_tensor") + pickles.name("torch.sparse_coo") + b"("
    return {
        "longer than its record": model_of(tensor(numel=2**26, size=2**26)),
        "much longer than its record": model_of(tensor(numel=2**40, size=2**40)),
        "written where nothing is": model_of(
            tensor(numel=2**26, size=2**26) + b"J\xff\xff\xff\x03" + pickles.text("x")[:0] + b"G" + b"\0" * 8 + b"s"
        ),
        "a size that overflows": model_of(tensor(size=2**62)),
        "a negative size": model_of(tensor(size=-1)),
        "a negative step": model_of(tensor(stride=-1)),
        "a step that overflows": model_of(tensor(stride=2**62)),
        "a step beyond the end": model_of(tensor(stride=2)),
        "a start beyond the end": model_of(tensor(offset=1)),
        "a negative start": model_of(tensor(offset=-1)),
        "a start that overflows": model_of(tensor(offset=2**62 - 1)),
        "another type": model_of(tensor(kind=pickles.name("torch.DoubleStorage"))),
        "a type that is no storage": model_of(tensor(kind=pickles.name("torch.Tensor"))),
        "a negative length": model_of(tensor(numel=-4)),
        "a record that is not there": model_of(tensor(key="77")),
        "the pickle as a record": model_of(tensor(key="../data.pkl")),
        "a key of tuples in tuples": b"\x80\x02}" + deep + b"Ns.",
        "a key of tuples of two of the last": b"\x80\x02}" + doubled + b"Ns.",
        "an OrderedDict with such a key": b"\x80\x02" + ordered + b"]]" + deep + b"aNaa\x85R.",
        "a set of such a value": b"\x80\x02" + pickles.name("builtins.set") + b"]" + deep + b"a\x85R.",
        "a sparse tensor": model_of(
            sparse + tensor(numel=4, size=4) + tensor() + pickles.name("torch.Size") + b"K\x02\x85\x85Rt\x86R"
        ),
        "marks": b"\x80\x02" + b"(" * 200000 + b".",
    }


def archive(changes: dict[str, bytes], names: tuple[str, ...] = (), compression: int = zipfile.ZIP_STORED) -> bytes:
    """The records with changes, their CRC right."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name that is there twice
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name, data in RECORDS.items():
                archive.writestr(name, changes.get(name, data))
            for name in names:
                archive.writestr(name, b"\0" * 4)
    return file.getvalue()


def mutated(chance: random.Random) -> bytes:
    kind = chance.randrange(4)
    if kind == 0:
        return b"".join(pickles.any_bytes(chance, [ARCHIVE]))
    if kind == 1:
        return pickles.mutated(chance, OLD_PARTS, SOUND, HARMFUL)
    return archive({PICKLE: pickles.mutated(chance, SOUND[0], SOUND, HARMFUL)})


def parts_of_old() -> list[bytes]:
    """The instructions of the pickles that the old form starts with, and the rest."""
    file, parts = io.BytesIO(OLD), []
    for _ in range(5):
        start = file.tell()
        starts = [position for _, _, position in pickletools.genops(file)]
        parts += [OLD[one:next_one] for one, next_one in zip(starts, [*starts[1:], file.tell()])]
        assert starts[0] == start
    return [*parts, OLD[file.tell() :]]


OLD_PARTS = parts_of_old()
SOUND = [pickles.instructions(RECORDS[PICKLE])]
HARMFUL = [pickles.instructions(data) for data in harmful().values() if len(data) < 10000]
HARMFUL += [pickles.instructions(data) for data in pickles.harmful().values() if 0 < len(data) < 10000]


def read(data: bytes) -> str:
    """Every tensor in a file, and its sum, so that its memory is read."""
    with open("x.pth", "wb") as file:
        file.write(data)
    try:
        left, total, count = [load_file("x.pth")], 0.0, 0
        while left and count < 1000:
            value = left.pop()
            count += 1
            if isinstance(value, torch.Tensor):
                total += float(value.detach().to(torch.complex128).sum().real)
            elif isinstance(value, dict):
                left += value.values()
            elif isinstance(value, (list, tuple)):
                left += value
        return f"{count} values, {total} in sum"
    finally:
        if os.listdir() != ["x.pth"]:
            raise RuntimeError(f"a checkpoint ran code: {os.listdir()}")


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_sound_files_are_read():
    assert read(ARCHIVE) == read(OLD) == read(archive({}))


def test_harmful_files_are_refused():
    cases = {name: archive({PICKLE: data}) for name, data in harmful().items()}
    cases["a record twice"] = archive({}, (PICKLE,))
    cases["another folder"] = archive({}, ("other/data/0",))
    cases["compressed"] = archive({}, (), zipfile.ZIP_DEFLATED)
    others = [archive({PICKLE: data}) for data in pickles.harmful().values() if len(data) < 10000]
    ended = outcomes(read, [*cases.values(), *others], refusals=(ValueError,), seconds=10, mebibytes=500)
    assert not {name: each for name, each in zip(cases, ended) if each.kind != "refused"}
    assert_sound(ended[len(cases) :], others)


def test_mutated_files():
    chance = random.Random(SEED)
    data = [mutated(chance) for _ in range(CASES)]
    ended = outcomes(read, data, refusals=(ValueError,), seconds=10, mebibytes=500)
    assert_sound(ended, data, lambda case: repr(case[:40]))
    kinds = [each.kind for each in ended]
    assert kinds.count("done") > CASES // 50 and kinds.count("refused") > CASES // 3
