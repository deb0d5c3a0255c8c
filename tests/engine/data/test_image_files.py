"""Which files of a folder or an archive are the images of which class; what is none is counted or refused."""

import gzip
import io
import logging
import os
import pickle
import random
import re
import tarfile
from pathlib import Path

import pytest
from image_files import NO_FILES
from timm.data.readers import create_reader

from fbn_plugin.engine.data.image_files import images_in_archive, images_in_folder
from fbn_plugin.engine.data.tar_files import Archive, Member


def make_folder(root: Path, names: list[str]) -> Path:
    root.mkdir(exist_ok=True)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))
    return root


def make_tar(path: Path, names: list[str], **options) -> Path:
    with tarfile.open(path, "w", **options) as archive:
        for name in names:
            add(archive, name, os.fsencode(name))
    return path


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(data))


def warned(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.fixture(params=["folder", "tar"])
def find(request, tmp_path):
    """Makes a set of the given names and looks for its images."""

    def look(names: list[str]):
        if request.param == "folder":
            return images_in_folder(make_folder(tmp_path / "train", names))
        return images_in_archive(make_tar(tmp_path / "train.tar", names))

    return look


def contents(found) -> list[tuple[str, str]]:
    """What each image holds, and its class."""
    classes = found.classes
    return [
        ((file.read() if isinstance(file, Member) else Path(file).read_bytes()).decode(), classes[label])
        for file, label in found.samples(classes)
    ]


def test_order_and_classes_are_timms(tmp_path):
    rng = random.Random(0)
    parts = ["a", "B", "10", "9", "_", "x y", "007", "é", "img"]

    def name() -> str:
        return "".join(rng.choices(parts, k=rng.randint(1, 4)))

    classes = {name().lower(): name for _ in range(12)}  # names that differ in case alone are in no order of timm's
    names = sorted({f"{each}/{name()}.{rng.choice(['png', 'JPG', 'jpeg'])}" for each in classes for _ in range(4)})
    for root, look in (
        (make_folder(tmp_path / "set", names), images_in_folder),
        (make_tar(tmp_path / "set.tar", names), images_in_archive),
    ):
        reader, found = create_reader("", root=str(root)), look(root)
        numbers = getattr(reader, "class_to_idx", None) or reader.class_name_to_idx
        assert found.classes == sorted(numbers, key=numbers.get)
        theirs = [reader[i] for i in range(len(reader))]
        assert contents(found) == [(file.read().decode(), found.classes[label]) for file, label in theirs]


def test_names_that_differ_in_case_or_zeros_are_classes_in_one_order(find):
    assert find(["a/1.png", "A/1.png", "01/1.png", "1/1.png"]).classes == ["01", "1", "A", "a"]


def test_hidden_files_and_folders_are_none(find, caplog):
    hidden = [".ipynb_checkpoints/1.png", "ant/.git/1.png", "ant/._1.png", "__MACOSX/ant/1.png", "ant/.DS_Store"]
    found = find(["ant/1.png", "ant/notes.txt", "classes.csv", *hidden])
    assert found.classes == ["ant"] and contents(found) == [("ant/1.png", "ant")] and found.empty == []
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert (
        "7 entries left out: 2 not named as an image (such as ant/notes.txt), 5 hidden (such as .ip" in record.message
    )


def test_a_sound_set_gives_no_warning(find, caplog):
    find(["ant/1.jpg", "bee/1.png", "bee/2.TIF", "cow/1.webp", "cow/1.bmp"])
    assert not caplog.records


def test_one_name_for_all_folders_is_said(find, caplog):
    assert find(["ant/images/1.png", "bee/images/1.png"]).classes == ["images"]
    assert "all 2 folders with images are named 'images' and are one class" in warned(caplog)
    caplog.clear()
    assert find(["ant/images/1.png", "bee/images/1.png", "bee/1.png"]).classes == ["bee", "images"]


@pytest.mark.parametrize(
    "names, words",
    [
        ([], "no images found in"),
        (["ant/1.txt"], "no images found in"),
        (["ant/1.png", "2.png"], "images outside of class folders, such as 2.png"),
        (["a\nb/1.png"], r"'a\\nb'"),
        (["a\udcff/1.png"], r"'a\\udcff'"),
    ],
)
def test_what_cannot_be_classes_is_refused(find, names, words):
    with pytest.raises(ValueError, match=words) as error:
        find(names)
    assert "\n" not in str(error.value)


def test_folders_without_images_are_known(tmp_path):
    make_folder(tmp_path, ["ant/deep/1.png", "cow/notes.txt", "bee10/x", "bee9/x"])
    assert images_in_folder(tmp_path).empty == ["bee9", "bee10", "cow"]


@pytest.mark.parametrize("name", ["pipe", "socket", "device", "link_to_nothing", "link_to_itself"])
def test_what_is_no_file_is_refused(tmp_path, name):
    make_folder(tmp_path, ["ant/1.png"])
    NO_FILES[name][0](tmp_path / "ant/2.png")
    with pytest.raises((ValueError, OSError), match=r"ant/2\.png"):
        images_in_folder(tmp_path)


def test_links(tmp_path):
    """To files and folders elsewhere they are followed; what leads back, or to one folder twice, is refused."""
    make_folder(tmp_path / "store", ["x/1.png", "2.png"])
    root = make_folder(tmp_path / "train", ["ant/1.png"])
    (root / "bee").symlink_to(tmp_path / "store/x")
    (root / "ant/2.png").symlink_to(tmp_path / "store/2.png")
    assert contents(images_in_folder(root)) == [("ant/1.png", "ant"), ("2.png", "ant"), ("x/1.png", "bee")]
    for link, target in ((root / "ant/again", root), (root / "cow", tmp_path / "store/x")):
        link.symlink_to(target)
        with pytest.raises(ValueError, match="are one folder"):
            images_in_folder(root)
        link.unlink()


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    make_folder(tmp_path, ["ant/1.png", "bee/1.png"])
    scan = os.scandir

    def denied(path):
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError, match="bee"):
        images_in_folder(tmp_path)


def test_archives_in_an_archive_are_classes(tmp_path):
    """As ImageNet is given out: one archive for each class."""
    inner = {name: make_tar(tmp_path / f"{name}.tar", [f"{name}_1.png", "deep/2.png"]) for name in ("n1", "n2")}
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for name, path in inner.items():
            archive.add(path, f"./{name}.tar")
        add(archive, "cow/1.png", b"moo")
    found = images_in_archive(tmp_path / "train.tar")
    assert found.classes == ["cow", "deep", "n1", "n2"]
    assert sorted(contents(found)) == [
        ("deep/2.png", "deep"),
        ("deep/2.png", "deep"),
        ("moo", "cow"),
        ("n1_1.png", "n1"),
        ("n2_1.png", "n2"),
    ]
    reader = create_reader("", root=str(tmp_path / "train.tar"))
    assert [file.read().decode() for file, _ in (reader[i] for i in range(5))] == [data for data, _ in contents(found)]


def test_members_that_are_no_plain_files_are_counted(tmp_path, caplog):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "ant", type=tarfile.DIRTYPE)
        add(archive, "ant/1.png", b"first")
        add(archive, "./ant/1.png", b"second")
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)):
            add(archive, f"ant/x{number}.png", type=kind, linkname="/etc/passwd")
    found = images_in_archive(tmp_path / "a.tar")
    assert contents(found) == [("second", "ant")]
    assert "1 replaced by a later member (such as ./ant/1.png), 4 no plain file (such as ant/x0.png)" in warned(caplog)


def test_members_that_lead_out_are_refused(tmp_path):
    for name in ("../1.png", "ant/../../bee/1.png"):
        path = make_tar(tmp_path / "a.tar", ["ant/1.png", name])
        with pytest.raises(ValueError, match=re.escape(f"leads out of it: {name}")):
            images_in_archive(path)


def with_size(data: bytes, size: bytes) -> bytes:
    """An archive whose first header says this size, with a sound checksum."""
    header = bytearray(data[:512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


DAMAGES = {
    "text": lambda data: b"no archive",
    "empty": lambda data: b"",
    "cut_header": lambda data: data[:1300],
    "cut_member": lambda data: data[:1540],
    "no_end": lambda data: data[:1024],
    "damaged_header": lambda data: data[:1030] + b"x" + data[1031:],
    "negative_size": lambda data: with_size(data, b"\xff" * 12),
    "huge_size": lambda data: with_size(data, b"\x80" + b"\0" * 4 + b"\x7f" + b"\xff" * 6),
    "compressed": gzip.compress,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_archives_are_refused(tmp_path, damage):
    path = make_tar(tmp_path / "a.tar", ["ant/1.png", "ant/2.png"])
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(ValueError, match=r"no images found in .*a\.tar, which is not a whole tar archive: ") as error:
        images_in_archive(path)
    assert "\n" not in str(error.value)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"a\.tar is not a file"):
        images_in_archive(path)


def test_an_archive_is_read_by_several_processes(tmp_path):
    """None moves the position of another; a copy for a new process opens the file itself."""
    path = make_tar(tmp_path / "a.tar", ["ant/1.png", "ant/2.png"])
    (first, _), (second, _) = images_in_archive(path).samples(["ant"])
    assert first.archive is second.archive and first.read() == b"ant/1.png"
    if not (child := os.fork()):
        os._exit(0 if second.read() == b"ant/2.png" else 1)
    assert first.read() == b"ant/1.png"
    assert os.waitpid(child, 0)[1] == 0
    copied = pickle.loads(pickle.dumps(second))
    assert copied.read() == b"ant/2.png" and str(copied) == f"ant/2.png in {path}"
    path.write_bytes(path.read_bytes()[:600])
    assert Archive(path).read(590, 100) == path.read_bytes()[590:]
