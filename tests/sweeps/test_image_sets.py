"""Stored image sets with changed bytes: each gives images of its classes or is refused in one sentence. Other seeds:
``python tests/sweeps/test_image_sets.py SEED COUNT`` from the project's folder, with ``tests`` on PYTHONPATH."""

import gzip
import io
import itertools
import logging
import random
import struct
import sys
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
from image_files import COLOUR, saved
from limited_process import assert_sound, outcomes

from fbn_plugin.engine.data.image_data import ImageData, load_image_data

COUNT = 240
NAMES = {
    "tar": "train.tar",
    "nested": "train.tar",
    "shard": "train-0.tar",
    "csv": "train/metadata.csv",
    "npz": "cifar10_jpeg.npz",
    "idx": "train-images-idx3-ubyte",
    "gz": "train-labels-idx1-ubyte.gz",
}


def _tar(files: dict[str, bytes], tar_format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _npz() -> bytes:
    image = saved(COLOUR, "JPEG")
    arrays = {"class_names": np.array(["ant", "bee"])}
    for split in ("train", "test"):
        arrays[f"{split}_jpeg"] = np.frombuffer(2 * image, np.uint8)
        arrays[f"{split}_offsets"] = np.array([0, len(image), 2 * len(image)])
        arrays[f"{split}_labels"] = np.array([0, 1])
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def originals() -> dict[str, bytes]:
    image = saved(COLOUR)
    files = {"ant/1.png": image, "bee/" + 60 * "x" + "/é" + 60 * "y" + ".png": image}
    nested = {"ant.tar": _tar({"1.png": image}, tarfile.PAX_FORMAT), "bee/1.png": image}
    return {
        "tar": _tar(files, tarfile.PAX_FORMAT),
        "nested": _tar(nested, tarfile.GNU_FORMAT),
        "shard": _tar({"0.png": image, "0.cls": b"0", "1.png": image, "1.json": b'{"label": 1}'}, tarfile.PAX_FORMAT),
        "csv": b"file_name,label\n0.png,ant\n1.png,bee\n",
        "npz": _npz(),
        "idx": b"\0\0\x08\3" + struct.pack(">III", 2, 6, 8) + bytes(range(96)),
        "gz": gzip.compress(b"\0\0\x08\1" + struct.pack(">I", 2) + b"\0\1", mtime=0),
    }


SOUND = originals()


def _with_changed_header(data: bytes, rng: random.Random) -> bytes:
    """A tar archive with one field of a header changed, and its checksum with it."""
    place = 512 * rng.randrange(len(data) // 512)
    header = bytearray(data[place : place + 512])
    start, length = rng.choice(((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155)))
    new = rng.choice((b"\0" * length, b"7" * length, b"\xff" * length, rng.randbytes(length), b"gxLKSD50123"[:length]))
    if length == 1:
        new = rng.choice((b"g", b"x", b"L", b"K", b"S", b"D", b"5", b"1", b"2", b"3", b"X", b"V"))
    header[start : start + length] = new
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:place] + bytes(header) + data[place + 512 :]


def _with_changed_array(data: bytes, rng: random.Random) -> bytes:
    """An .npz with the bytes of one array changed, packed anew."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(buffer, "w") as changed:
        names = archive.namelist()
        chosen = rng.choice(names)
        for name in names:
            content = bytearray(archive.read(name))
            if name == chosen:
                for _ in range(rng.randint(1, 3)):
                    content[rng.randrange(len(content))] = rng.randrange(256)
                if rng.random() < 0.5:  # in the text of the header
                    place = rng.randrange(10, 70)
                    content[place : place + 1] = rng.choice((b"9", b"9999999", b"(", b"-", b"'", b"O", b"*", b"[" * 99))
            changed.writestr(name, bytes(content))
    return buffer.getvalue()


def mutated(kind: str, data: bytes, rng: random.Random) -> bytes:
    chance = rng.random()
    if kind in ("tar", "nested", "shard") and chance < 0.6:
        return _with_changed_header(data, rng)
    if kind == "npz" and chance < 0.6:
        return _with_changed_array(data, rng)
    changed = bytearray(data)
    if chance < 0.7:
        del changed[rng.randrange(len(changed)) :]
    else:
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(min(len(changed), rng.choice((20, 600, 10**6))))] = rng.randrange(256)
    return bytes(changed)


def cases(seed: int, count: int) -> list[tuple[str, bytes]]:
    rng = random.Random(seed)
    kinds = itertools.islice(itertools.cycle(SOUND), count)
    return [(kind, mutated(kind, SOUND[kind], rng)) for kind in kinds]


def _write(kind: str, data: bytes, folder: Path) -> ImageData:
    if kind in ("idx", "gz"):
        for split in ("train", "t10k"):
            (folder / f"{split}-images-idx3-ubyte").write_bytes(SOUND["idx"])
            (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(SOUND["gz"])
    elif kind == "csv":
        for split in ("train", "val"):
            (folder / split).mkdir()
            for name in ("0.png", "1.png"):
                (folder / split / name).write_bytes(saved(COLOUR))
        (folder / "val/metadata.csv").write_bytes(SOUND[kind])
    elif kind != "npz":
        (folder / "val.tar").write_bytes(SOUND[kind])
    (folder / NAMES[kind]).write_bytes(data)
    names = {"idx": "mnist", "gz": "mnist", "npz": "cifar10_jpeg", "shard": "webdataset", "csv": "hf_folder"}
    name = names.get(kind, "tar")
    return load_image_data(name, str(folder))


def load(case: tuple[str, bytes]) -> str:
    logging.disable()  # in the process that this runs in
    with tempfile.TemporaryDirectory() as folder:
        data = _write(*case, Path(folder))
        for images in (data.train, data.val):
            assert all(0 <= label < len(data.classes) for label in images.targets)
            for image, _ in images:
                assert image.mode == "RGB"
    return f"{len(data.train)} {data.classes}"


def swept(seed: int, count: int) -> dict[str, int]:
    made = cases(seed, count)
    ended = outcomes(load, made, (ValueError, OSError), seconds=20, mebibytes=300)
    assert_sound(ended, made, lambda case: f"{case[0]} {zlib.compress(case[1]).hex()}")
    kinds = [each.kind for each in ended]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def test_changed_sets_are_read_or_refused():
    kinds = swept(0, COUNT)
    assert kinds["done"] > COUNT / 20 and kinds["refused"] > COUNT / 4


if __name__ == "__main__":
    print(swept(int(sys.argv[1]), int(sys.argv[2])))
