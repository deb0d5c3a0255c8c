"""Shards: each image with the class that its sample gives it, in any order; what is damaged or ambiguous is refused."""

import io
import json
import os
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fbn_plugin.engine.data.image_data import load_image_data
from fbn_plugin.engine.data.webdataset_files import find_shards, images_in_shards


def image(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path: Path, members: dict[str, bytes], **fields) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for field, value in fields.items():
                setattr(member, field, value)
            archive.addfile(member, io.BytesIO(data))
    return path


def samples(start: int, labels: list, form: str = "cls") -> dict[str, bytes]:
    """Sample i, of grey 10 * i, with its label beside it."""
    found = {}
    for i, label in enumerate(labels, start):
        found[f"{i:05d}.png"] = image(10 * i)
        text = str(label) if form == "cls" else json.dumps({"label": label, "caption": "x"})
        found[f"{i:05d}.{form}"] = text.encode()
    return found


def contents(images) -> list[tuple[int, int]]:
    return [(np.asarray(image).flat[0].item() // 10, label) for image, label in images]


@pytest.mark.parametrize("form", ["cls", "json"])
@pytest.mark.parametrize(
    "names", ["train-{}.tar val-{}.tar", "imagenet-train-{}.tar imagenet-validation-{}.tar", "train/{}.tar test/{}.tar"]
)
def test_images_of_all_shards_by_number(tmp_path, form, names):
    train, val = names.split()
    shard(tmp_path / train.format("000010"), samples(8, [1, 0], form))
    for number, start in ((9, 4), (8, 0)):
        shard(tmp_path / train.format(f"{number:06d}"), samples(start, [0, 1, 2, 1], form))
    shard(tmp_path / val.format("000000"), samples(0, [2, 0], form))
    data = load_image_data("webdataset", str(tmp_path))
    assert data.title == tmp_path.name and data.classes == ("0", "1", "2")
    assert contents(data.train) == list(enumerate([0, 1, 2, 1, 0, 1, 2, 1, 1, 0]))
    assert contents(data.val) == [(0, 2), (1, 0)]
    assert data.train[7][0].size == (4, 4)  # in any order


def test_names_for_classes(tmp_path):
    shard(tmp_path / "train.tar", samples(0, ["bee", "ant", "bee"], "json"))
    shard(tmp_path / "val.tar", samples(0, ["bee"], "json"))
    data = load_image_data("webdataset", str(tmp_path))
    assert data.classes == ("ant", "bee") and contents(data.train) == [(0, 1), (1, 0), (2, 1)]
    shard(tmp_path / "val.tar", samples(0, ["cow"], "json"))
    with pytest.raises(ValueError, match=r"val\.tar has classes that .*train\.tar lacks: 'cow'"):
        load_image_data("webdataset", str(tmp_path))


def test_what_the_library_itself_writes_is_read(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    with webdataset.ShardWriter(str(tmp_path / "train-%06d.tar"), maxcount=2, verbose=0) as writer:
        for i in range(5):
            picture = Image.fromarray(np.full((4, 4, 3), 10 * i, np.uint8))
            writer.write({"__key__": f"some/sample{i}", "png": picture, "cls": i % 2, "json": {"label": 7}})
    found = images_in_shards(find_shards(tmp_path, ["train"]))
    theirs = webdataset.WebDataset(str(tmp_path / "train-{000000..000002}.tar"), shardshuffle=False).decode("pil")
    expected = [(str(each["cls"]), np.asarray(each["png"]).flat[0]) for each in theirs]
    ours = [(label, member.read()) for _, label, member in found.images]
    assert [(label, np.asarray(Image.open(io.BytesIO(data))).flat[0]) for label, data in ours] == expected


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"1.png": b"x"}, r"sample 1 in .*a\.tar has no class: neither .cls nor .json"),
        ({"1.png": b"x", "1.cls": b"ant"}, r"1\.cls in .*a\.tar must hold the number of a class, .* got b'ant'"),
        ({"1.png": b"x", "1.cls": b"-1"}, "must hold the number of a class, 0 or more, got b'-1'"),
        ({"1.png": b"x", "1.cls": b"1" * 5000}, "must hold the number of a class"),
        ({"1.png": b"x", "1.json": b"{"}, r"1\.json in .*a\.tar is not valid JSON"),
        ({"1.png": b"x", "1.json": b"[" * 100_000}, "nested too deeply"),
        ({"1.png": b"x", "1.json": b" " * 2**21}, "1.json in .* has 2,097,152 bytes, more than 1,048,576"),
        ({"1.png": b"x", "1.json": b'{"class": 3}'}, "1.json in .* has no 'label'; it has 'class'"),
        ({"1.png": b"x", "1.json": b'{"label": true}'}, "the label must be a number of a class, .*, got True"),
        ({"1.png": b"x", "1.json": b'{"label": [1]}'}, r"the label must be a number .*, got \[1\]"),
        ({"1.png": b"x", "1.jpg": b"x", "1.cls": b"0"}, "sample 1 in .* has two images, .png and .jpg"),
        ({"1.png": b"x", "1.cls": b"0", "./1.png": b"y"}, "has two members ./1.png"),
        (
            {"1.png": b"x", "1.cls": b"0", "2.png": b"x", "2.json": b'{"label": "a"}'},
            "labels that are numbers and labels",
        ),
        ({"../1.png": b"x"}, r"has a member whose name leads out of it: \.\./1\.png"),
        ({"1.txt": b"x"}, "no images found in .*; expected are KEY.jpg beside KEY.cls"),
    ],
)
def test_what_is_refused(tmp_path, members, words):
    with pytest.raises(ValueError, match=words) as error:
        images_in_shards([shard(tmp_path / "a.tar", members)])
    assert "\n" not in str(error.value)


def test_links_are_not_followed_and_archives_must_be_whole(tmp_path, caplog):
    path = shard(tmp_path / "a.tar", {"1.png": b"", "1.cls": b""}, type=tarfile.SYMTYPE, linkname="/etc/passwd")
    with pytest.raises(ValueError, match="no images found"):
        images_in_shards([path])
    whole = shard(tmp_path / "b.tar", samples(0, [0, 1])).read_bytes()
    for damaged in (whole[:-9000], b"no archive", b""):
        (tmp_path / "b.tar").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"b\.tar, which is not a whole tar archive"):
            images_in_shards([tmp_path / "b.tar"])


def test_missing_shards_and_labels_are_said(tmp_path):
    for number in (0, 1, 3):
        shard(tmp_path / f"train-{number:04d}.tar", samples(number, [number]))
    with pytest.raises(ValueError, match=r"has 3 shards such as train-0000\.tar, and none of number 2"):
        find_shards(tmp_path, ["train"])
    (tmp_path / "train-0003.tar").rename(tmp_path / "train-0002.tar")
    with pytest.raises(
        FileNotFoundError, match=r"has no shards such as val-00000\.tar or validation-00000\.tar or test"
    ):
        load_image_data("webdataset", str(tmp_path))
    shard(tmp_path / "val-0000.tar", samples(0, [0]))
    with pytest.raises(ValueError, match=re.escape("train-*.tar has 3 labels from 0 to 3, and no image of label 2")):
        load_image_data("webdataset", str(tmp_path))
    for number in (0, 1):
        shard(tmp_path / f"of/train-{number:05d}-of-00003.tar", samples(0, [0]))
    with pytest.raises(ValueError, match="and none of number 2"):
        find_shards(tmp_path / "of", ["train"])
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz/train-0.tar.gz").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"train-0\.tar\.gz is compressed"):
        find_shards(tmp_path / "gz", ["train"])


def test_no_more_shards_are_open_than_a_process_may_have(tmp_path):
    paths = [shard(tmp_path / f"train-{number}.tar", samples(number % 20, [number % 2])) for number in range(70)]
    found = images_in_shards(paths)
    before = len(os.listdir("/proc/self/fd"))
    assert all(member.read() for _, _, member in found.images)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_index_is_small(tmp_path):
    """An image costs less than a kilobyte of memory, whatever its size."""
    members = {}
    for i in range(300):
        members |= {f"{i}.png": bytes(20_000), f"{i}.cls": b"0"}
    found = images_in_shards([shard(tmp_path / "a.tar", members)])
    size = sum(
        sys.getsizeof(part) for name, label, member in found.images for part in (name, label, member, *member[1:])
    )
    assert size < 1000 * len(found.images)
