"""The jobs of a study: their order, their folders, and what is read from these."""

import json
import math
import multiprocessing
import os
import shlex

import pytest
from small_studies import ROOT, study, write_study

from fbn_plugin.engine.classification.config import classification_config
from fbn_plugin.engine.run.config import load_config, save_config
from fbn_plugin.engine.run.lock import hold, let_go
from fbn_plugin.engine.studies.jobs import (
    all_jobs,
    begin,
    check_settings,
    collect,
    finish,
    is_held,
    job_log,
    record,
)
from fbn_plugin.engine.studies.seeds import config_seed
from fbn_plugin.engine.studies.study_file import read_study


@pytest.fixture
def two(tmp_path):
    """A study, and its first job."""
    file = study(tmp_path, BN=1, FBN=1)
    return file, all_jobs(file, tmp_path / "out")[0]


def test_whole_seeds_come_first(tmp_path):
    jobs = all_jobs(study(tmp_path, BN=1, FBN=2), tmp_path / "out")
    assert [job.title for job in jobs] == ["BN, seed 1", "FBN, seed 1", "BN, seed 2", "FBN, seed 2"]
    assert [job.config_seed for job in jobs] == [config_seed(1)] * 2 + [config_seed(2)] * 2
    assert jobs[1].folder == tmp_path / "out/jobs/FBN/seed-1"


def test_a_command_is_the_jobs_own_without_places(tmp_path):
    text = "VARIANTS: {a b: {MODEL.NORM: FBN(t_sigma=3), INPUT.SCALE: [0.5, 1]}}\nSEEDS: 1\n"
    file = read_study(write_study(tmp_path, text), ROOT, [str(tmp_path / "my_norms.py")])
    job = all_jobs(file, tmp_path / "out")[0]
    assert shlex.split(job.command) == [
        *("python", "tools/train_classification.py", "--import", "my_norms.py"),
        *("--config-file", "configs/Digits/lenet5_convs_BN.yaml"),
        *("MODEL.NORM", "FBN(t_sigma=3)", "INPUT.SCALE", "[0.5, 1]"),
        *("SEED", "1869972635", "OUTPUT_DIR", "jobs/a b/seed-1"),
    ]
    assert str(tmp_path) not in job.command
    overrides = job.arguments[job.arguments.index("auto") + 1 :]
    cfg = load_config(classification_config(), file.bases["a b"], overrides)
    assert cfg.INPUT.SCALE == (0.5, 1.0) and str(job.folder) == cfg.OUTPUT_DIR


def test_a_job_from_beginning_to_end(two):
    file, job = two
    assert collect(file, job).state == "waiting" and record(job.folder) == {}
    begin(job)
    assert collect(file, job, is_running=True).state == "running" and collect(file, job).state == "waiting"
    assert finish(job, 143, 2.0, "none", stopped=True) is None and collect(file, job).state == "waiting"

    begin(job)
    (job.folder / "metrics.json").write_text(
        '{"iteration": 9, "total_loss": 2.0}\n{"iteration": 9, "val/top1": 40}\n{"iteration": 19, "val/top1": null}\n'
    )
    (job.folder / "results.json").write_text('{"top1": 61.25, "model": "m"}')
    (job.folder / "run_info.json").write_text('{"hardware": "a CPU", "versions": {"torch": "2.6"}}')
    assert finish(job, 0, 3.0, "none") is None
    outcome = collect(file, job)
    assert (outcome.state, outcome.seconds, outcome.error) == ("done", 5.0, None)
    assert outcome.metrics == {"top1": 61.25} and outcome.curves == {"top1": [(10, 40.0), (20, 61.25)]}
    assert outcome.hardware == "a CPU" and outcome.versions == {"torch": "2.6"}
    assert outcome.config_seed == config_seed(1) and record(job.folder)["attempts"] == 2


def test_a_metric_that_is_no_number(two):
    file, job = two
    begin(job)
    (job.folder / "metrics.json").write_text('{"iteration": 9, "val/top1": null}\n')
    finish(job, 0, 3.0, "none")
    assert math.isnan(collect(file, job).metrics["top1"])


@pytest.mark.parametrize("content", [None, "", '{"iteration": 9, "total_loss": 2.0}\n'])
def test_a_finished_run_whose_rows_are_gone_has_not_diverged(two, content):
    file, job = two
    begin(job)
    if content is not None:
        (job.folder / "metrics.json").write_text(content)
    finish(job, 0, 3.0, "none")
    outcome = collect(file, job)
    assert (outcome.state, outcome.metrics) == ("failed", {})
    assert outcome.error == "metrics.json has no row of top1; remove the run's folder to have it made again"


@pytest.mark.parametrize(
    ("log", "code", "error"),
    [
        ("a line\nerror: OUT/a.png is not there\nstopped\n", 2, "a.png is not there"),
        ("Traceback:\n  one\nRuntimeError: \x1b[1mbad\n\n", 1, r"RuntimeError: \x1b[1mbad"),
        ("", 3, "ended with exit code 3 and no words"),
        ("half a line", -9, "ended by signal 9, as for want of memory"),
        (None, -11, "ended by signal 11"),
    ],
)
def test_a_failure_has_its_last_words(two, log, code, error):
    file, job = two
    begin(job)
    if log is not None:
        job_log(job).write_text(log.replace("OUT", str(job.folder.parents[2])))
    finish(job, code, 1.0, "none")
    outcome = collect(file, job)
    assert (outcome.state, outcome.error, outcome.metrics) == ("failed", error, {})


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ("none", set()),
        ("final", {"model_final.pth", "last_checkpoint", "inference"}),
        ("all", {"model_final.pth", "last_checkpoint", "inference", "model_best.pth", "events.out.tfevents.1"}),
    ],
)
def test_checkpoints_stay_as_asked(two, keep, left):
    _, job = two
    begin(job)
    for name in ("model_final.pth", "model_best.pth", "last_checkpoint", "events.out.tfevents.1", "config.yaml"):
        (job.folder / name).touch()
    (job.folder / "inference").mkdir()
    finish(job, 2, 1.0, keep)
    assert (job.folder / "model_best.pth").exists()  # a failed job goes on from there
    finish(job, 0, 1.0, keep)
    assert set(os.listdir(job.folder)) == {"config.yaml", "job.json", *left}


def test_a_damaged_record_is_named(two):
    file, job = two
    begin(job)
    (job.folder / "job.json").write_text(json.dumps({"state": "done"}))
    with pytest.raises(ValueError, match=r"job\.json has no 'error' of the right type|has no 'seconds'"):
        collect(file, job)
    (job.folder / "job.json").write_text('{"state": "do')
    with pytest.raises(ValueError, match=r"job\.json .*; remove the file to have the job looked at anew$"):
        collect(file, job)


def _hold(folder, held, end):
    hold(folder)
    held.set()
    end.wait()
    let_go(folder)


def test_a_folder_that_a_run_holds(two):
    file, job = two
    assert not is_held(job.folder)
    begin(job)
    assert not is_held(job.folder)
    context = multiprocessing.get_context("fork")
    held, end = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(job.folder, held, end))
    process.start()
    assert held.wait(30)
    assert is_held(job.folder) and is_held(job.folder) and collect(file, job).state == "running"
    end.set()
    process.join()
    assert not is_held(job.folder)


def test_other_settings_than_those_of_finished_jobs_are_refused(two, tmp_path):
    file, job = two
    begin(job)
    cfg = load_config(classification_config(), file.bases["BN"], job.arguments[job.arguments.index("auto") + 1 :])
    save_config(cfg, job.folder / "config.yaml")
    finish(job, 0, 1.0, "none")
    check_settings(file, [job])

    other = study(tmp_path, "SEEDS: 1\nSET: {DATALOADER.NUM_WORKERS: 1}", BN=1, FBN=1)
    check_settings(other, all_jobs(other, tmp_path / "out"))
    other = study(tmp_path, "SEEDS: 1\nSET: {SOLVER.BASE_LR: 0.5}", BN=1, FBN=1)
    with pytest.raises(ValueError, match="BN, seed 1 was run with SOLVER.BASE_LR 0.05, and the study file has 0.5; "):
        check_settings(other, all_jobs(other, tmp_path / "out"))
    other = study(tmp_path, "SEEDS: 1\nSEED_RULE: plain", BN=1, FBN=1)
    with pytest.raises(ValueError, match="BN, seed 1 was run with SEED 1869972635, and the study file has 1; "):
        check_settings(other, all_jobs(other, tmp_path / "out"))
    finish(job, 2, 1.0, "none")  # nothing is trained there that would go on
    check_settings(other, all_jobs(other, tmp_path / "out"))
