"""Jobs through submitit, where it is installed; its executors for one machine stand for a cluster."""

import sys
import threading
import time

import pytest
from small_studies import study, tool

from fbn_plugin.engine.studies.cluster import _Attempt, run_on_cluster
from fbn_plugin.engine.studies.jobs import all_jobs, record
from fbn_plugin.engine.studies.running import Resources

try:
    import submitit
except ImportError:
    submitit = None
needs_submitit = pytest.mark.skipif(submitit is None, reason="needs submitit")


@needs_submitit
def test_jobs_are_submitted(tmp_path):
    file, script, output, lines = study(tmp_path, "SEEDS: 1", BN=1, FBN=2), tool(tmp_path), tmp_path / "out", []
    outcomes = run_on_cluster(file, output, script, Resources(2), "debug", {"timeout_min": 5}, say=lines.append)
    assert [each.state for each in outcomes] == ["done", "failed"]
    assert outcomes[1].error == "jobs/FBN/seed-1/nothing is not there" and len(lines) == 2
    (tmp_path / "mended").touch()
    outcomes = run_on_cluster(file, output, script, Resources(2), "local", {}, retry=True, say=lines.append)
    assert [each.state for each in outcomes] == ["done", "done"]
    assert [record(job.folder)["attempts"] for job in all_jobs(file, output)] == [1, 2]


@needs_submitit
def test_combinations_follow_the_jobs_that_they_evaluate(tmp_path):
    text = "SEEDS: 1\nCOMBINE: {both: {of: [BN, FBN]}}"
    outcomes = run_on_cluster(
        study(tmp_path, text, BN=1, FBN=1), tmp_path / "out", tool(tmp_path), Resources(2), "debug", {}
    )
    assert [each.state for each in outcomes] == ["done"] * 3 and outcomes[2].metrics == {"top1": 99.0}
    assert not list(tmp_path.rglob("model_final.pth"))


@needs_submitit
def test_a_job_whose_time_is_over_saves_and_goes_on(tmp_path):
    file = study(tmp_path, "SEEDS: 1", BN=3)
    (job,) = all_jobs(file, tmp_path / "out")
    attempt = _Attempt(job, tool(tmp_path), Resources(1).environment(0), "none")
    thread = threading.Thread(target=attempt)
    thread.start()
    while not (job.folder / "waits").exists():
        assert thread.is_alive()
        time.sleep(0.02)
    rest = attempt.checkpoint()  # as submitit calls it when the time is nearly over
    thread.join()
    assert record(job.folder)["state"] == "stopped"
    submitit.core.utils.cloudpickle.loads(submitit.core.utils.cloudpickle.dumps(rest)).result()
    assert record(job.folder)["state"] == "done" and record(job.folder)["attempts"] == 2
    attempt()  # submitted twice
    assert record(job.folder)["attempts"] == 2


@needs_submitit
def test_what_submitit_does_not_take_is_said(tmp_path):
    file = study(tmp_path, "SEEDS: 1", BN=1)
    given = file, tmp_path / "out", tool(tmp_path), Resources(1)
    with pytest.raises(ValueError, match="--executor local: Unknown argument 'partitio' for executor 'slurm'"):
        run_on_cluster(*given, "local", {"slurm_partitio": "gpu"})
    assert not (tmp_path / "out/jobs").exists()


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match="--executor needs the package submitit: pip install submitit"):
        run_on_cluster(study(tmp_path, BN=1), tmp_path / "out", tool(tmp_path), Resources(1), "slurm", {})
    assert not (tmp_path / "out").exists()
