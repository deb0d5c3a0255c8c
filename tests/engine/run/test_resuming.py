"""Which checkpoint a run goes on from when the last one is damaged or named wrongly, and which ones are kept."""

import os
import shutil

import pytest
import torch
from torch import nn

from fbn_plugin.engine.run.checkpoint import AtomicCheckpointer
from fbn_plugin.engine.run.output_dir import last_checkpoint
from fbn_plugin.engine.run.resuming import PeriodicCheckpointer, checkpoint_to_resume


def train(folder, start, stop, period=2, keep=None, max_iter=None):
    """The checkpoints of a run of iterations ``start`` to ``stop``."""
    model = nn.Linear(2, 2)
    checkpointer = AtomicCheckpointer(model, str(folder), optimizer=torch.optim.SGD(model.parameters(), 0.1))
    saver = PeriodicCheckpointer(checkpointer, period, max_iter, max_to_keep=keep)
    for iteration in range(start, stop):
        saver.step(iteration)


def names(folder):
    return sorted(os.listdir(folder))


def damage(path):
    """Flip a bit of a weight, which ``torch.load`` reads without a word."""
    content = bytearray(path.read_bytes())
    content[content.index(torch.load(path)["model"]["weight"].numpy().tobytes()) + 3] ^= 1
    path.write_bytes(content)
    assert torch.load(path)


def test_the_last_one_that_is_sound(tmp_path):
    train(tmp_path, 0, 8)
    sound = str(tmp_path / "model_0000007.pth")
    assert checkpoint_to_resume(tmp_path) == checkpoint_to_resume(tmp_path, "auto") == (sound, [])


def test_a_damaged_one_is_named_with_the_newest_sound_one_before(tmp_path):
    train(tmp_path, 0, 8)
    last, before = tmp_path / "model_0000007.pth", tmp_path / "model_0000003.pth"
    damage(last)
    (tmp_path / "model_0000005.pth").write_bytes(last.read_bytes()[:500])
    shutil.copy(before, tmp_path / "model_0000009.pth")  # not before
    shutil.copy(before, tmp_path / "model_0000004_mine.pth")
    content = last.read_bytes()
    sentence = rf"^checkpoint {last} cannot be read: it is cut short or damaged \(its part .*\); "
    with pytest.raises(
        ValueError, match=f"{sentence}--resume auto continues from {before}, the newest sound one before$"
    ):
        checkpoint_to_resume(tmp_path)
    path, (note,) = checkpoint_to_resume(tmp_path, "auto")
    assert path == str(before) and str(last) in note and f"continuing from {before}" in note
    assert last.read_bytes() == content and last_checkpoint(tmp_path) == str(last)

    damage(before), damage(tmp_path / "model_0000001.pth")
    for resume in (True, "auto"):
        with pytest.raises(ValueError, match=f"{sentence}no other checkpoint in {tmp_path} is sound$"):
            checkpoint_to_resume(tmp_path, resume)


def test_a_final_model_counts_by_its_iteration(tmp_path):
    train(tmp_path, 0, 6, max_iter=6)
    damage(tmp_path / "model_final.pth")
    assert checkpoint_to_resume(tmp_path, "auto")[0] == str(tmp_path / "model_0000005.pth")
    train(tmp_path, 0, 3, max_iter=3)  # then the run was made longer
    train(tmp_path, 3, 6)
    for name in ("model_0000005.pth", "model_0000003.pth"):
        damage(tmp_path / name)
    assert checkpoint_to_resume(tmp_path, "auto")[0] == str(tmp_path / "model_final.pth")


def test_weights_alone_are_no_checkpoint_to_go_on_from(tmp_path):
    train(tmp_path, 0, 4)
    state = torch.load(tmp_path / "model_0000001.pth")
    torch.save({"model": state["model"], "iteration": 1}, tmp_path / "model_0000001.pth")
    damage(tmp_path / "model_0000003.pth")
    with pytest.raises(ValueError, match="no other checkpoint"):
        checkpoint_to_resume(tmp_path, "auto")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"..",
        b"../model_0000003.pth",
        b"/etc/passwd",
        b"http://localhost:9/model_0000003.pth",
        b"file:model_0000003.pth",
        b"model_0000003.pth?x=1",
        b"model_0000003.pth\nmodel_0000001.pth",
        b"model_0000003.pth\0",
        b"\xff\xfe junk",
        b"m" * 100_000,
    ],
)
def test_a_last_checkpoint_that_names_none(tmp_path, content):
    train(tmp_path, 0, 4)
    (tmp_path / "last_checkpoint").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        checkpoint_to_resume(tmp_path)
    said = str(error.value)
    assert f"{tmp_path}/last_checkpoint" in said and "auto continues from" in said
    assert "\n" not in said and len(said) < 1500
    assert checkpoint_to_resume(tmp_path, "auto")[0] == str(tmp_path / "model_0000003.pth")
    with pytest.raises((ValueError, FileNotFoundError), match="last_checkpoint"):
        AtomicCheckpointer(nn.Linear(2, 2), str(tmp_path)).resume_or_load("")


def test_a_last_checkpoint_that_is_gone(tmp_path):
    train(tmp_path, 0, 4)
    (tmp_path / "model_0000003.pth").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"model_0000003.pth, which .*last_checkpoint names, is not there; --res"
    ):
        checkpoint_to_resume(tmp_path)


def test_interrupted_runs_leave_no_more_checkpoints_than_others(tmp_path):
    for start in range(0, 10, 2):  # each is stopped behind its first checkpoint
        train(tmp_path, start, start + 2, keep=2)
    assert names(tmp_path) == ["last_checkpoint", "model_0000007.pth", "model_0000009.pth"]
    train(tmp_path, 10, 14, period=1, keep=2, max_iter=14)
    assert names(tmp_path) == ["last_checkpoint", "model_0000012.pth", "model_0000013.pth", "model_final.pth"]


def test_only_checkpoints_behind_the_run_are_removed(tmp_path):
    kept = {"model_best.pth", "model_final.pth", "model_0000001.pth.bak", "my_model_0000001.pth", "model_1.pth"}
    for name in kept:
        (tmp_path / name).touch()
    (tmp_path / "model_0000000.pth").mkdir()
    train(tmp_path, 0, 6, keep=1)
    train(tmp_path, 2, 4, keep=1)  # resumed from one before the last, which is damaged, say
    assert set(names(tmp_path)) == kept | {
        "last_checkpoint",
        "model_0000000.pth",
        "model_0000003.pth",
        "model_0000005.pth",
    }


def test_nothing_is_removed_before_a_newer_one_is_whole(tmp_path, monkeypatch):
    train(tmp_path, 0, 2, keep=1)

    def save(content, file):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match=r"model_0000003\.pth cannot be written: No space left on device"):
        train(tmp_path, 2, 4, keep=1)
    assert names(tmp_path) == ["last_checkpoint", "model_0000001.pth"]
    monkeypatch.undo()

    def remove(path):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.remove", remove)
    train(tmp_path, 2, 4, keep=1)
    assert names(tmp_path) == ["last_checkpoint", "model_0000001.pth", "model_0000003.pth"]
