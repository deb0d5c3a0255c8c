"""Runs the jobs of a study through submitit (https://github.com/facebookincubator/submitit): as an array of Slurm's, or
by its local executors. What a job does there is what it does here: the tool's own process, with ``job.json`` beside it.
"""

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fbn_plugin import internals
from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run.lock import let_go
from fbn_plugin.engine.studies.jobs import (
    EVALUATION,
    Job,
    all_jobs,
    begin,
    check_settings,
    collect,
    finish,
    is_held,
    is_ready,
    job_log,
    record,
    tidy,
)
from fbn_plugin.engine.studies.outcomes import Outcome
from fbn_plugin.engine.studies.processes import NewProcesses, Process
from fbn_plugin.engine.studies.running import Resources, is_due, open_folder, wants_gpu
from fbn_plugin.engine.studies.status import ended_line, seconds_left
from fbn_plugin.engine.studies.study_file import StudyFile
from fbn_plugin.engine.studies.wanted_data import make_wanted

if TYPE_CHECKING:
    import submitit

__all__ = ["EXECUTORS", "run_on_cluster"]

EXECUTORS = ("slurm", "local", "debug")

_PAUSE = {"slurm": 10.0, "local": 0.1, "debug": 0.0}  # seconds between two looks at the jobs
_PATIENCE = 60.0  # seconds in which a job that is preempted saves; Slurm waits for 90 by submitit's default
_MINUTES = 24 * 60


@dataclass
class _Attempt:
    """One job, as it runs on the cluster; submitit pickles it, and calls ``checkpoint`` when its time is over."""

    job: Job
    script: Path
    environment: Mapping[str, str]
    keep: str

    def __call__(self) -> None:
        if record(self.job.folder).get("state") == "done" or is_held(self.job.folder):  # submitted twice
            return
        begin(self.job)
        start = NewProcesses(self.script, (signal.SIGUSR2,))  # which Slurm sends to all processes, for submitit
        self._since = time.monotonic()
        self._process: Process = start(self.job.arguments, self.environment, job_log(self.job))
        while (code := self._process.poll()) is None:
            time.sleep(0.05)
        finish(self.job, code, time.monotonic() - self._since, self.keep, code in (130, 143))

    def checkpoint(self) -> Any:
        """Let the run save, and say how it goes on."""
        import submitit

        self._process.stop()
        end = time.monotonic() + _PATIENCE
        while self._process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        finish(self.job, 143, time.monotonic() - self._since, self.keep, stopped=True)
        return submitit.helpers.DelayedSubmission(_Attempt(self.job, self.script, self.environment, self.keep))


def run_on_cluster(
    study: StudyFile,
    output: str | os.PathLike,
    script: Path,
    shared: Resources,
    executor: str,
    options: Mapping[str, Any],
    retry: bool = False,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Submit the jobs that are not done, and wait for them.

    Args:
        study: the study.
        output: its folder, which all machines see.
        script: the tool that trains.
        shared: how many jobs run at a time, and the threads of each.
        executor: one of :data:`EXECUTORS`.
        options: of submitit's ``AutoExecutor.update_parameters``, such as ``slurm_partition``.
        retry: whether those that failed are tried again.
        say: gets a line for each job that ends.

    Returns:
        the outcomes of all jobs.

    Raises:
        ValueError, OSError: as ``run_study``; an option or an executor that submitit does not take, or no submitit.
    """
    submitting = _executor(study, Path(output), shared, executor, options)
    open_folder(study, output)
    try:
        jobs = all_jobs(study, output)
        check_settings(study, jobs)
        outcomes = {job.folder: collect(study, job) for job in jobs}
        due = [job for job in jobs if is_due(outcomes[job.folder], retry)]
        if due:
            make_wanted(study.wanted)
        evaluated = {part for job in due for part in job.parts}
        for wave in ([job for job in due if not job.parts], [job for job in due if job.parts]):
            attempts = [
                _Attempt(
                    job,
                    script.with_name(EVALUATION) if job.parts else script,
                    shared.environment(0),
                    "final" if job.folder in evaluated and job.keep == "none" else job.keep,
                )
                for job in wave
                if is_ready(job)
            ]
            at_once = len(attempts) if executor == "slurm" else shared.at_once
            _Waiting(study, outcomes, at_once, executor, say).run(submitting, attempts)
        tidy(jobs)
        return list(outcomes.values())
    finally:
        let_go(output)


def _executor(
    study: StudyFile, output: Path, shared: Resources, name: str, options: Mapping[str, Any]
) -> "submitit.AutoExecutor":
    """submitit's executor, with the options that it takes."""
    if not internals.is_installed("submitit"):
        raise ValueError("--executor needs the package submitit: pip install submitit")
    import submitit

    given = {
        "name": output.name,
        "timeout_min": _MINUTES,
        "cpus_per_task": shared.threads,
        "gpus_per_node": int(name == "slurm" and wants_gpu(study)),
        **options,
    }
    try:
        executor = submitit.AutoExecutor(folder=output / "submitit" / "%j", cluster=name)
        executor.update_parameters(**given)
    except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"--executor {name}: {str(error).splitlines()[0]}") from None
    return executor


class _Waiting:
    """Submits jobs and waits for them.

    Args:
        study: that they are of.
        outcomes: folder -> outcome of all jobs, which is kept up to date.
        at_once: how many are submitted at a time.
        executor: submitit's name of it.
        say: gets a line for each job that ends.
    """

    def __init__(
        self,
        study: StudyFile,
        outcomes: dict[Path, Outcome],
        at_once: int,
        executor: str,
        say: Callable[[str], None],
    ):
        self.study, self.outcomes, self.at_once, self.executor, self.say = study, outcomes, at_once, executor, say

    def run(self, submitting: "submitit.AutoExecutor", attempts: Sequence[_Attempt]) -> None:
        """Return when all have ended."""
        waiting, submitted = list(attempts), []
        try:
            while waiting or submitted:
                new, waiting = _split(waiting, self.at_once - len(submitted))
                if new:
                    with submitting.batch():
                        submitted += [(attempt.job, submitting.submit(attempt)) for attempt in new]
                    if self.executor == "slurm":
                        self.say(f"submitted {counted(len(new), 'job')}")
                for pair in [pair for pair in submitted if pair[1].done()]:
                    submitted.remove(pair)
                    self._ended(pair[0], len(attempts) - len(waiting) - len(submitted), len(attempts))
                time.sleep(_PAUSE[self.executor])
        except BaseException:
            self._leave(submitted)
            raise

    def _ended(self, job: Job, ended: int, total: int) -> None:
        before = self.outcomes[job.folder].seconds or 0.0
        outcome = self.outcomes[job.folder] = collect(self.study, job)
        seconds = None if outcome.seconds is None else outcome.seconds - before
        left = seconds_left(list(self.outcomes.values()), self.at_once)
        self.say(f"{ended} of {total}  {ended_line(outcome, self.study.study, seconds, left)}")

    def _leave(self, submitted: Sequence[tuple[Job, "submitit.Job"]]) -> None:
        if self.executor == "slurm" and submitted:
            self.say(
                f"{counted(len(submitted), 'job')} of Slurm's go on, and scancel ends them; run again for the others"
            )
            return
        for _, each in submitted:
            each.cancel()


def _split(values: list[Any], count: int) -> tuple[list[Any], list[Any]]:
    return values[: max(0, count)], values[max(0, count) :]
