"""OUTPUT_DIR: what must not be written over, and how a run goes on."""

import os

import pytest

from fbn_plugin.engine.run.lock import hold
from fbn_plugin.engine.run.output_dir import check_output_dir, holds_run, how_to_continue, make_output_dir


def test_a_run_is_resumed_or_evaluated_and_not_written_over(tmp_path):
    check_output_dir(tmp_path / "new", resume=False, eval_only=False)
    (tmp_path / "notes.txt").touch()
    check_output_dir(tmp_path, resume=False, eval_only=False)
    assert not holds_run(tmp_path) and "nothing is saved" in how_to_continue(tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    assert holds_run(tmp_path) and f"--resume continues from the last checkpoint in {tmp_path}" in how_to_continue(
        tmp_path
    )
    check_output_dir(tmp_path, resume=True, eval_only=False)
    check_output_dir(tmp_path, resume=False, eval_only=True)
    with pytest.raises(ValueError, match=f"OUTPUT_DIR {tmp_path} holds a run"):
        check_output_dir(tmp_path, resume=False, eval_only=False)


def test_a_folder_that_is_read_only(tmp_path, monkeypatch):
    """Whoever runs the tests may write everywhere."""
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK or str(path) != str(tmp_path))
    for resume, eval_only in ((False, False), (True, False), (False, True)):
        with pytest.raises(ValueError, match=f"OUTPUT_DIR {tmp_path} cannot be written to: it is read-only"):
            check_output_dir(tmp_path, resume, eval_only)
    with pytest.raises(ValueError, match=f"OUTPUT_DIR {tmp_path}/a/b cannot be written to: {tmp_path} is read-only"):
        check_output_dir(tmp_path / "a" / "b", resume=False, eval_only=False)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file"):
        check_output_dir(tmp_path / "file", resume=True, eval_only=False)
    with pytest.raises(OSError, match="cannot be made: Not a directory"):
        make_output_dir(tmp_path / "file" / "below")
    make_output_dir(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_name_that_leads_to_no_folder(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("loop", "dangling"):
        with pytest.raises(ValueError, match=f"{name} is a link to a folder that is not there"):
            check_output_dir(tmp_path / name, resume=False, eval_only=False)
    with pytest.raises(ValueError, match="OUTPUT_DIR must be the name of a folder, got ''"):
        check_output_dir("", resume=False, eval_only=False)


@pytest.mark.parametrize("name", ["loop", "loop/below", "x" * 300])
def test_the_lock_leaves_what_cannot_be_a_folder_to_the_check(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    hold(tmp_path / name)
    with pytest.raises(OSError, match="OUTPUT_DIR .* cannot be made"):
        make_output_dir(tmp_path / name)
