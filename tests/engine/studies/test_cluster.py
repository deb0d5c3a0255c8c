"""Jobs through submitit, where it is installed; its executors for one machine stand for a cluster."""

import importlib.util
import sys

import pytest
from small_studies import study, tool

from fbn_plugin.engine.studies.cluster import run_on_cluster
from fbn_plugin.engine.studies.jobs import all_jobs, record
from fbn_plugin.engine.studies.running import Resources

needs_submitit = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs submitit")


@needs_submitit
@pytest.mark.parametrize("executor", ["debug", "local"])
def test_jobs_are_submitted(tmp_path, executor):
    file, script, output, lines = study(tmp_path, "SEEDS: 1", BN=1, FBN=2), tool(tmp_path), tmp_path / "out", []
    outcomes = run_on_cluster(file, output, script, Resources(2), executor, {"timeout_min": 5}, say=lines.append)
    assert [each.state for each in outcomes] == ["done", "failed"]
    assert outcomes[1].error == "jobs/FBN/seed-1/nothing is not there" and len(lines) == 2
    (tmp_path / "mended").touch()
    outcomes = run_on_cluster(file, output, script, Resources(2), executor, {}, retry=True, say=lines.append)
    assert [each.state for each in outcomes] == ["done", "done"]
    assert [record(job)["attempts"] for job in all_jobs(file, output)] == [1, 2]


@needs_submitit
def test_a_job_whose_time_is_over_saves_and_goes_on(tmp_path):
    import submitit

    from fbn_plugin.engine.studies.cluster import _Attempt

    file = study(tmp_path, "SEEDS: 1", BN=3)
    (job,) = all_jobs(file, tmp_path / "out")
    attempt = _Attempt(job, tool(tmp_path), Resources(1).environment(0), "none")
    executor = submitit.AutoExecutor(folder=tmp_path / "submitit", cluster="local")
    executor.update_parameters(timeout_min=5)
    submitted = executor.submit(attempt)
    while not (job.folder / "waits").exists():
        assert not submitted.done(), submitted.stderr()
    submitted._interrupt()  # as before the end of its time
    submitted.result()
    assert record(job)["state"] == "done" and record(job)["attempts"] == 2


@needs_submitit
def test_what_submitit_does_not_take_is_said(tmp_path):
    file = study(tmp_path, "SEEDS: 1", BN=1)
    given = file, tmp_path / "out", tool(tmp_path), Resources(1)
    with pytest.raises(ValueError, match="--executor local: Unknown argument 'partitio' for executor 'slurm'|partitio"):
        run_on_cluster(*given, "local", {"slurm_partitio": "gpu"})
    assert not (tmp_path / "out/jobs").exists()


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match="--executor needs the package submitit: pip install submitit"):
        run_on_cluster(study(tmp_path, BN=1), tmp_path / "out", tool(tmp_path), Resources(1), "slurm", {})
    assert not (tmp_path / "out").exists()
