"""What the command lines share: errors in one line, outputs that cannot be written, a run that is stopped by hand."""

import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import fbn_plugin
from fbn_plugin.engine.files.disk import WriteError
from fbn_plugin.engine.run.cli import (
    RUN_ERRORS,
    check_outputs,
    error_sentence,
    import_modules,
    parse_config_arguments,
    stoppable,
    user_errors,
)


def test_bad_input_is_one_line_and_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit) as exit, user_errors():
        raise ValueError("t_sigma must be above 1")
    assert exit.value.code == 2 and capsys.readouterr().err == "error: t_sigma must be above 1\n"
    with pytest.raises(KeyError), user_errors():
        raise KeyError("a bug")


def deprecated(folder="/somewhere/torch"):
    warnings.warn_explicit("use another", FutureWarning, f"{folder}/jit.py", 7, module="torch.jit")


def test_deprecations_of_others_do_not_stand_above_an_error(capsys, recwarn):
    with user_errors():
        deprecated()
    with pytest.raises(SystemExit), user_errors():
        deprecated()
        raise ValueError("t_sigma must be above 1")
    with user_errors(*RUN_ERRORS):
        pass
    assert capsys.readouterr().err == "error: t_sigma must be above 1\n" and not recwarn


def test_deprecations_are_shown_when_the_run_begins_or_with_a_bug(recwarn):
    with user_errors():
        deprecated()
        deprecated(str(Path(fbn_plugin.__file__).parent))
        warnings.warn("of use at once", stacklevel=1)
    assert [str(each.message) for each in recwarn] == ["use another", "of use at once"]
    with user_errors(*RUN_ERRORS):
        assert len(recwarn) == 3 and recwarn[-1].filename == "/somewhere/torch/jit.py"
    with pytest.raises(KeyError), user_errors():
        deprecated()
        raise KeyError("a bug")
    assert len(recwarn) == 4


def test_an_error_of_the_system_names_the_file_and_the_reason(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit, user_errors():
        (tmp_path / "it's gone.json").read_text()
    reason = os.strerror(errno.ENOENT)
    assert exit.value.code == 2 and capsys.readouterr().err == f"error: {tmp_path}/it's gone.json: {reason}\n"
    with pytest.raises(SystemExit), user_errors():
        (tmp_path / "nowhere" / "a").rename(tmp_path / "b")
    assert capsys.readouterr().err.endswith(f"b: {reason}\n")


def test_an_error_of_the_system_without_a_file_or_from_a_worker():
    assert error_sentence(OSError(errno.ENOSPC, "No space left on device")) == "No space left on device"
    assert error_sentence(OSError("OUTPUT_DIR x cannot be made: File exists")).startswith("OUTPUT_DIR x cannot be made")
    sent = "Caught FileNotFoundError in DataLoader worker 0.\n  File 'a.py'\nFileNotFoundError: [Errno 2] Gone: 'b'"
    assert error_sentence(FileNotFoundError(sent)) == "b: Gone"


@pytest.mark.parametrize("saved, words", [(True, "--resume continues from the last checkpoint"), (False, "nothing is")])
def test_ctrl_c_says_how_to_go_on(tmp_path, capsys, saved, words):
    if saved:
        (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(SystemExit) as exit, stoppable(tmp_path):
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


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--evalonly", "unknown flag '--evalonly'; did you mean '--eval-only'?"),
        ("--logperiod=5", "unknown flag '--logperiod'; did you mean '--log-period'?"),
        ("--zzz", "unknown flag '--zzz'; this tool has --log-period, --import, --config-file, --resume, --eval-only"),
    ],
)
def test_an_unknown_flag_behind_the_overrides_is_named(capsys, flag, words):
    with pytest.raises(SystemExit) as exit:
        parse_config_arguments("A tool.", ["SEED", "1", flag])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and words in error
    for known in ("--eval-only", "--eval", "--log-period=5", "--help"):  # refused with the other overrides
        assert parse_config_arguments("A tool.", ["SEED", "1", known]).overrides[2] == known


@pytest.mark.parametrize(
    ("arguments", "resume", "overrides"),
    [
        ([], False, []),
        (["--resume"], True, []),
        (["--resume", "auto"], "auto", []),
        (["--resume=auto", "SEED", "1"], "auto", ["SEED", "1"]),
        (["--resume", "auto", "--eval-only", "SEED", "1"], "auto", ["SEED", "1"]),
        (["--resume", "SEED", "auto"], True, ["SEED", "auto"]),
        (["--eval-only", "--res", "SEED", "1"], True, ["SEED", "1"]),
    ],
)
def test_resume_with_and_without_a_value(arguments, resume, overrides, monkeypatch):
    args = parse_config_arguments("a tool", arguments)
    assert (args.resume, args.overrides) == (resume, overrides)
    monkeypatch.setattr("sys.argv", ["tool", *arguments])
    assert parse_config_arguments("a tool", None) == args


def test_resume_with_another_value(capsys):
    with pytest.raises(SystemExit) as exit:
        parse_config_arguments("a tool", ["--resume=yes"])
    assert exit.value.code == 2 and "--resume" in capsys.readouterr().err


@pytest.mark.parametrize("types", [(), RUN_ERRORS])
def test_a_full_disk_is_no_bad_input(tmp_path, capsys, types):
    for error in (WriteError("x cannot be written: File too large"), OSError(errno.ENOSPC, "No space left", "x")):
        with pytest.raises(SystemExit) as exit, user_errors(*types):
            raise error
        assert exit.value.code == 1 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as exit, user_errors(*types):
        raise FileNotFoundError(errno.ENOENT, "No such file", "x")
    assert exit.value.code == 2


def test_names_from_a_file_do_not_break_the_line_or_reach_the_terminal(capsys):
    with pytest.raises(SystemExit), user_errors():
        raise ValueError("its entries are a\n\x1b[2Jweight, ü, \udce9")
    assert capsys.readouterr().err == "error: its entries are a\\n\\x1b[2Jweight, ü, \\udce9\n"


def test_without_standard_streams_no_file_gets_their_numbers(tmp_path):
    code = f"""if True:
        import os
        from fbn_plugin.engine.run.cli import stoppable
        with stoppable():
            print("nobody reads this", flush=True)
            with open({str(tmp_path / "file")!r}, "w") as file:
                assert file.fileno() > 2
                os.write(2, b"nor this")
        """
    assert (
        subprocess.run(["sh", "-c", '"$0" -c "$1" >&- 2>&-', sys.executable, code], capture_output=True).returncode == 0
    )
    assert (tmp_path / "file").read_bytes() == b""


def test_links_that_lead_in_a_circle_are_one_sentence(tmp_path, capsys):
    (tmp_path / "loop.py").symlink_to("loop.py")
    check_outputs(tmp_path / "loop.py")  # which is replaced
    with pytest.raises(SystemExit) as exit, user_errors():
        import_modules([str(tmp_path / "loop.py")])
    assert exit.value.code == 2 and capsys.readouterr().err.startswith("error: --import")
