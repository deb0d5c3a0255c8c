"""What the command lines share: errors in one line, and a run that is stopped by hand."""

import pytest

from fbn_plugin.engine.cli import interruptible, user_errors


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
