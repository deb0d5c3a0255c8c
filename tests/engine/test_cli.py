"""What the command lines share: outputs that cannot be written are refused before the work."""

import os

import pytest

from fbn_plugin.engine.cli import check_outputs


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
