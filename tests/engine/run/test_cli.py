"""What the command lines share: errors in one line, outputs that cannot be written, a run that is stopped by hand."""

import os

import pytest

from fbn_plugin.engine.run.cli import check_outputs, interruptible, user_errors


def test_bad_input_is_one_line_and_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit) as exit, user_errors():
        raise ValueError("t_sigma must be above 1")
    assert exit.value.code == 2 and capsys.readouterr().err == "error: t_sigma must be above 1\n"
    with pytest.raises(KeyError), user_errors():
        raise KeyError("a bug")


@pytest.mark.parametrize("saved, words", [(True, "--resume continues from the last checkpoint"), (False, "nothing is")])
def test_ctrl_c_says_how_to_go_on(tmp_path, capsys, saved, words):
    if saved:
        (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(SystemExit) as exit, interruptible(tmp_path):
        raise KeyboardInterrupt
    error = capsys.readouterr().err
    assert exit.value.code == 130 and error.count("\n") == 1 and words in error


def test_outputs_that_can_be_written(tmp_path):
    (tmp_path / "old.md").write_text("old")
    check_outputs(None, tmp_path / "old.md", tmp_path / "new.json")
    assert [path.name for path in tmp_path.iterdir()] == ["old.md"] and (tmp_path / "old.md").read_text() == "old"


def test_outputs_that_cannot(tmp_path, monkeypatch):
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        check_outputs(tmp_path / "a.md", tmp_path)
    (tmp_path / "file").write_text("")
    for folder in ("nowhere", "file"):
        with pytest.raises(FileNotFoundError, match=f"the folder {tmp_path / folder} is not there"):
            check_outputs(tmp_path / folder / "a.md")
    with pytest.raises(ValueError, match="two outputs"):
        check_outputs(tmp_path / "a.md", tmp_path / ".." / tmp_path.name / "a.md")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(PermissionError, match=f"the folder {tmp_path} is not writable"):
        check_outputs(tmp_path / "a.md")
