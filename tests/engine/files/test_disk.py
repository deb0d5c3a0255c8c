"""Files that are whole or not there: every write that may fail on a full disk, and what is left behind by it."""

import errno
import os
import signal
import stat

import pytest
import torch
from full_disk import largest_file

from fbn_plugin.engine.files import disk
from fbn_plugin.engine.files.disk import AppendedFile, WriteError, atomic_write, remove_leftovers, remove_numbered


class FullDisk:
    """Opens files of which the write number ``left``, counted from 0, and all after it fail."""

    def __init__(self, left: int, error: int = errno.ENOSPC):
        self.left, self.error = left, error

    def open(self, path, mode):
        self.file = open(path, mode, buffering=0)  # noqa: SIM115  closed in __exit__
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        self.left -= 1
        if self.left < 0:
            raise OSError(self.error, os.strerror(self.error))
        return self.file.write(data)

    def flush(self):
        pass

    def fileno(self):
        return self.file.fileno()


@pytest.mark.parametrize("error", [KeyError("a bug"), OSError("disk full")], ids=lambda error: type(error).__name__)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def half(file):
        file.write(b"ne")
        raise error

    with pytest.raises(type(error), match=error.args[0]):
        atomic_write(path, write=half)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_checkpoint_that_any_write_of_fails(tmp_path, monkeypatch):
    """``torch.save`` makes another error of each one, a RuntimeError about its archive."""
    path = tmp_path / "model.pth"
    content = {"model": {f"{number}": torch.rand(50) for number in range(4)}, "iteration": 3}
    atomic_write(path, b"old")
    for number in range(200):
        full = FullDisk(number, (errno.ENOSPC, errno.EDQUOT)[number % 2])
        monkeypatch.setattr(disk, "open", full.open, raising=False)
        try:
            atomic_write(path, write=lambda file: torch.save(content, file))
            break
        except WriteError as error:
            assert str(error) == f"{path} cannot be written: {os.strerror(full.error)}"
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["model.pth"]
    assert number > 20 and torch.load(path)["iteration"] == 3


@pytest.mark.parametrize("size", [0, 10, 1000, 5000])
def test_a_file_that_is_larger_than_may_be(tmp_path, size):
    with largest_file(size), pytest.raises(WriteError, match=r"model\.pth cannot be written: File too large"):
        atomic_write(tmp_path / "model.pth", write=lambda file: torch.save(torch.rand(5000), file))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [errno.EIO, errno.EDQUOT])
def test_a_disk_that_fails_as_late_as_it_can(tmp_path, monkeypatch, error):
    """As a file server does, which has taken the bytes."""

    def fsync(file):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(WriteError, match=f"file cannot be written: {os.strerror(error)}"):
        atomic_write(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_gone_or_read_only_or_cannot_be_synchronized(tmp_path, monkeypatch):
    with pytest.raises(WriteError, match="gone/file cannot be written: No such file or directory"):
        atomic_write(tmp_path / "gone" / "file", b"new")
    with monkeypatch.context() as patch:
        patch.setattr(disk, "open", FullDisk(0, errno.EROFS).open, raising=False)
        with pytest.raises(WriteError, match="file cannot be written: Read-only file system"):
            atomic_write(tmp_path / "file", b"new")
    fsync = os.fsync

    def files_only(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(file)

    monkeypatch.setattr("os.fsync", files_only)
    atomic_write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_an_error_without_a_number_says_what_it_says(tmp_path):
    def write(file):
        try:
            raise ValueError("odd")
        except ValueError:
            raise OSError("no more can be written") from None

    with pytest.raises(WriteError, match="file cannot be written: no more can be written"):
        atomic_write(tmp_path / "file", write=write)


def test_a_link_is_replaced_and_its_target_stays(tmp_path):
    (tmp_path / "archive").write_bytes(b"of another run")
    (tmp_path / "model.pth").symlink_to(tmp_path / "archive")
    atomic_write(tmp_path / "model.pth", b"new")
    assert not (tmp_path / "model.pth").is_symlink() and (tmp_path / "model.pth").read_bytes() == b"new"
    assert (tmp_path / "archive").read_bytes() == b"of another run"


def test_permissions_are_those_of_any_new_file_and_names_may_be_long(tmp_path):
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / ("n" * 255), b"")
    finally:
        os.umask(before)
    assert (tmp_path / ("n" * 255)).stat().st_mode & 0o777 == 0o640


def test_a_line_is_there_as_a_whole_or_not_at_all(tmp_path):
    file = AppendedFile(tmp_path / "lines")
    file.write(b"one\n")
    with largest_file(8), pytest.raises(WriteError, match="lines cannot be written: File too large"):
        file.write(b"two and more\n")  # of which four bytes fit
    assert (tmp_path / "lines").read_bytes() == b"one\n"
    file.write(b"three\n")
    file.close(), file.close()
    assert (tmp_path / "lines").read_bytes() == b"one\nthree\n"


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    if (child := os.fork()) == 0:
        atomic_write(tmp_path / "a", write=lambda file: os.kill(os.getpid(), signal.SIGKILL))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference" / left).touch()
    others = {"inference", "model.pth.tmp", f".fbn_plugin-{os.getppid()}-0123abcd.tmp", ".fbn_plugin-1-x.tmp", "a.tmp"}
    for name in others - {"inference"}:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, ["inference"])
    assert set(os.listdir(tmp_path)) == others and os.listdir(tmp_path / "inference") == []


def test_what_a_longer_series_left_is_removed_and_nothing_else(tmp_path):
    names = ["walks_1.png", "walks_2.png", "walks_3.png", "walks_12.png", "walks_3.json", "walks_03.png", "walks_x.png"]
    for name in names:
        (tmp_path / name).touch()
    remove_numbered(tmp_path, "walks_{}.png", 2)
    assert {path.name for path in tmp_path.iterdir()} == set(names) - {"walks_3.png", "walks_12.png"}
