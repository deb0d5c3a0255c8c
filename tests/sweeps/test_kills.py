"""SIGKILL at random moments of a run's life, of the training tools and of those that write one file: what is on disk is
whole at any moment, and a run that is resumed as often as it is killed ends as one that was never stopped.

Three kills for each tool; ``FBN_PLUGIN_KILLS=20`` is the whole sweep, ``FBN_PLUGIN_KILLS_SEED`` another one.
"""

import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
from forked import Forked
from tiny_runs import TOOLS, arguments, assert_same, import_all, results, tool

KILLS = int(os.environ.get("FBN_PLUGIN_KILLS", 3))
SEED = int(os.environ.get("FBN_PLUGIN_KILLS_SEED", 0))


def killed_after(run, seconds):
    """Kill a run after so many seconds; whether that ended it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitid(os.P_PID, run.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.005)
    run.signal(signal.SIGKILL)
    return os.waitid(os.P_PID, run.pid, os.WEXITED | os.WNOWAIT).si_code == os.CLD_KILLED


def assert_whole(folder):
    """What a tool would read is there as a whole."""
    for file in folder.rglob("*.json"):
        if file.name == "metrics.json":  # whose last line may be cut
            lines = file.read_text().splitlines()
            rows = [json.loads(line) for line in lines[:-1]]
            assert len({json.dumps(row) for row in rows}) == len(rows)
        elif "inference.tmp" not in file.parts:
            json.loads(file.read_text())
    for file in folder.glob("*.pth"):
        torch.load(file, weights_only=True)
    if (folder / "last_checkpoint").exists():
        assert (folder / (folder / "last_checkpoint").read_text()).is_file()


@pytest.mark.parametrize("name", TOOLS)
def test_a_run_killed_at_random_moments_ends_as_if_it_never_was(name, shapes, tmp_path):
    main, random_time = tool(name), random.Random(f"{name} {SEED}")
    import_all(name)
    given = ["--resume", *arguments(name, tmp_path / "whole", shapes)]
    begin = time.monotonic()
    whole = Forked(main, given, tmp_path)
    assert whole.wait() == 0, whole.error
    length, undisturbed = time.monotonic() - begin, results(tmp_path / "whole")
    kills = finished = 0
    out = tmp_path / "killed"
    given = ["--resume", *arguments(name, out, shapes)]
    while kills < KILLS:
        run = Forked(main, given, tmp_path)
        if killed_after(run, random_time.uniform(0, length)):
            assert run.wait() == -signal.SIGKILL
            kills += 1
            assert_whole(out) if out.exists() else None
            continue
        assert run.wait() == 0, run.error
        finished += 1
        assert_same(results(out), undisturbed)
        shutil.rmtree(out)
    run = Forked(main, given, tmp_path)
    assert run.wait() == 0, run.error
    assert_same(results(out), undisturbed)
    assert not [path for path in out.rglob("*") if ".tmp" in path.name]
    print(f"{name}: {kills} kills in {finished + 1} runs of {length:.1f} s")


def _files(command, run_folder, folder):
    """A tool that writes a file, its arguments, and the file."""
    return {
        "evaluate": ([run_folder, "--output", folder / "ap.json"], folder / "ap.json"),
        "make_table": (
            [run_folder, "--output", folder / "table.md", "--json", folder / "table.json"],
            folder / "table.json",
        ),
        "visualize_predictions": ([run_folder, "--output", folder / "drawn.png"], folder / "drawn.png"),
    }[command]


@pytest.mark.parametrize("name", ["evaluate", "make_table", "visualize_predictions"])
def test_a_file_is_whole_or_not_there(name, trained_run, tmp_path):
    main, random_time = tool(name), random.Random(f"{name} {SEED}")
    import_all("train_detection")
    given, file = _files(name, trained_run, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in trained_run.rglob("*")}
    begin = time.monotonic()
    run = Forked(main, given, tmp_path)
    assert run.wait() == 0, run.error
    length, content = time.monotonic() - begin, file.read_bytes()
    for _ in range(KILLS):
        file.unlink(missing_ok=True)
        run = Forked(main, given, tmp_path)
        killed_after(run, random_time.uniform(0, length))
        assert run.wait() in (-signal.SIGKILL, 0)
        assert not file.exists() or file.read_bytes() == content
    run = Forked(main, given, tmp_path)
    assert run.wait() == 0 and file.read_bytes() == content
    assert {path: path.stat().st_mtime_ns for path in trained_run.rglob("*")} == before
