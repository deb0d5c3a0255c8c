"""Running a study: what is done is kept, what fails is noted, what is stopped goes on, by a tool of milliseconds."""

import dataclasses
import os
import signal
import time

import pytest
from forked import Forked
from small_studies import ROOT, study, tool

from fbn_plugin.engine.run.cli import stoppable
from fbn_plugin.engine.run.lock import hold, let_go
from fbn_plugin.engine.studies import running
from fbn_plugin.engine.studies.engines import ENGINES
from fbn_plugin.engine.studies.jobs import all_jobs, job_log, record
from fbn_plugin.engine.studies.processes import Forks, can_fork
from fbn_plugin.engine.studies.running import Resources, outcomes_of, resources, run_study


def states(outcomes) -> str:
    """The first letters of the jobs' states, in order."""
    return "".join(each.state[0] for each in outcomes)


def test_jobs_that_fail_are_noted_and_tried_again_when_asked(tmp_path):
    file, script, output, lines = study(tmp_path, BN=1, FBN=2), tool(tmp_path), tmp_path / "out", []
    outcomes = run_study(file, output, script, Resources(2), forks=False, say=lines.append)
    assert states(outcomes) == "dfdf"
    assert outcomes[0].metrics == {"top1": 90.0 + outcomes[0].config_seed % 7}
    assert outcomes[1].error == "jobs/FBN/seed-1/nothing is not there"
    assert len(lines) == 4 and lines[-1].startswith("4 of 4  ") and lines[-1].endswith("; ETA 00:00")
    assert any("BN, seed 1: top1 9" in line and " % (" in line for line in lines)
    assert any("FBN, seed 1: failed: jobs/FBN/seed-1/nothing is not there (" in line for line in lines)
    assert not (output / ".lock").exists() and not (output / "jobs/BN/seed-1/model_final.pth").exists()

    (tmp_path / "mended").touch()
    times = [(job.folder / "job.json").stat().st_mtime_ns for job in all_jobs(file, output)]
    lines.clear()
    again = running._Runner(file, all_jobs(file, output), Resources(1), retry=True, say=lines.append)
    assert states(again.outcomes) == "dwdw"  # their time is still to come
    lines.clear()
    assert states(run_study(file, output, script, Resources(2), forks=False, say=lines.append)) == "dfdf"
    assert lines == []  # nothing was to be done
    assert states(run_study(file, output, script, Resources(2), retry=True, forks=False, say=lines.append)) == "dddd"
    assert lines[0].startswith("2 of 4 jobs are done or failed")
    assert [(job.folder / "job.json").stat().st_mtime_ns for job in all_jobs(file, output)][::2] == times[::2]
    assert states(outcomes_of(file, output)) == "dddd"


def test_threads_and_gpus_are_dealt_out(tmp_path, monkeypatch):
    file, script = study(tmp_path, "SEEDS: 1-4", BN=1), tool(tmp_path)
    run_study(file, tmp_path / "out", script, Resources(2, 3, ("4", "7")), say=lambda line: None)
    logs = [job_log(job).read_text() for job in all_jobs(file, tmp_path / "out")]
    assert {log.splitlines()[0] for log in logs} == {"threads 3 gpu 4", "threads 3 gpu 7"}

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert resources(file) == Resources(2, 1, ("0", "1")) and resources(file, 5).at_once == 5
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c")
    assert resources(file).gpus == ("GPU-a", "GPU-b")
    on_cpu = study(tmp_path, "SEEDS: 1\nSET: {MODEL.DEVICE: cpu}", BN=1)
    cores = len(os.sched_getaffinity(0))
    assert resources(on_cpu, threads=1) == Resources(cores, 1) and resources(on_cpu, threads=10 * cores).at_once == 1
    with pytest.raises(ValueError, match="--jobs must be 1 or more, got 0"):
        resources(file, 0)


def test_jobs_on_a_cpu_keep_the_memory_that_they_free(monkeypatch):
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert [Resources(1).environment(0)[name] for name in names] == [str(2**32)] * 2
    assert not set(names) & Resources(1, gpus=("0",)).environment(0).keys()
    monkeypatch.setenv(names[0], "4096")  # the user's
    assert [Resources(1).environment(0)[name] for name in names] == ["4096", str(2**32)]


def test_one_process_runs_a_study(tmp_path):
    file = study(tmp_path, BN=1)
    output = tmp_path / "out"
    output.mkdir()

    def main(argv):
        hold(output)
        (tmp_path / "held").touch()
        time.sleep(60)

    other = Forked(main, [], tmp_path)
    wait_for([tmp_path / "held"])
    with pytest.raises(ValueError, match=f"the study's folder .* is in use by process {other.pid} on "):
        run_study(file, output, tool(tmp_path), Resources(1), forks=False)
    other.signal(signal.SIGKILL)
    other.wait()
    hold(output)  # of a process that is gone, nothing is left
    let_go(output)


@pytest.mark.skipif(not can_fork(), reason="jobs end with their study on Linux")
@pytest.mark.parametrize(
    ("number", "forks", "code"),
    [(signal.SIGINT, False, 130), (signal.SIGTERM, True, 143), (signal.SIGKILL, False, -9), (signal.SIGKILL, True, -9)],
)
def test_a_study_that_is_stopped_goes_on(tmp_path, monkeypatch, number, forks, code):
    monkeypatch.setitem(ENGINES, "classification", dataclasses.replace(ENGINES["classification"], modules=()))
    file, script, output = study(tmp_path, "SEEDS: 1\nKEEP: all", BN=3, FBN=3, GN=1), tool(tmp_path), tmp_path / "out"

    def main(argv):
        with stoppable():
            run_study(file, output, script, Resources(2), forks=forks)

    process = Forked(main, [], tmp_path)
    waiting = [output / f"jobs/{name}/seed-1/waits" for name in ("BN", "FBN")]
    wait_for(waiting)
    assert states(outcomes_of(file, output)) == "rrw"
    process.signal(number)  # which the jobs do not get
    assert process.wait() == code
    saved = [file.with_name("last_checkpoint") for file in waiting]
    if number == signal.SIGKILL:  # the jobs save, though nobody waits for them
        wait_for(saved)
    else:
        assert "stopping 2 jobs, which save first" in process.output
        assert process.error.startswith("stopped by ") and process.error.count("\n") == 1
    assert all(file.exists() for file in saved)
    assert states(outcomes_of(file, output)) == "www"

    assert states(run_study(file, output, script, Resources(2), forks=False)) == "ddd"
    assert [record(job.folder)["attempts"] for job in all_jobs(file, output)] == [2, 2, 1]


def wait_for(files, seconds: float = 60) -> None:
    """Wait until files are there."""
    end = time.monotonic() + seconds
    while not all(file.exists() for file in files):
        assert time.monotonic() < end, [file for file in files if not file.exists()]
        time.sleep(0.02)


@pytest.mark.skipif(not can_fork(), reason="jobs are forked on Linux")
def test_a_process_with_threads_is_not_forked_from(tmp_path):
    (tmp_path / "threads.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    with pytest.raises(RuntimeError, match="has 2 threads"):
        Forks(tool(tmp_path), ["threads"], {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"})
