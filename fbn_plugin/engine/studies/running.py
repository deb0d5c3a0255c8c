"""Runs the jobs of a study on this machine: as many at once as it is told, each a process of its own, in an order that
leaves whole seeds. What is finished is not run again, and what was stopped goes on from its checkpoint.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run.lock import hold, let_go
from fbn_plugin.engine.run.output_dir import make_output_dir
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
    tidy,
)
from fbn_plugin.engine.studies.outcomes import Outcome
from fbn_plugin.engine.studies.processes import Forks, NewProcesses, Process, Start, can_fork
from fbn_plugin.engine.studies.status import ended_line, seconds_left
from fbn_plugin.engine.studies.study_file import StudyFile
from fbn_plugin.engine.studies.wanted_data import make_wanted, missing

__all__ = ["Resources", "is_due", "open_folder", "outcomes_of", "resources", "run_study", "wants_gpu"]

_PAUSE = 0.05  # seconds between two looks at the jobs
_PATIENCE = 120.0  # seconds in which a job that is asked to stop saves
_KEPT_BYTES = str(2**32)  # below which glibc keeps freed memory, rather than return it at every step


@dataclass(frozen=True)
class Resources:
    """What jobs share.

    Attributes:
        at_once: jobs at a time.
        threads: of each.
        gpus: numbers or names as CUDA_VISIBLE_DEVICES takes them, dealt out in turn; empty on the CPU.
    """

    at_once: int
    threads: int = 1
    gpus: tuple[str, ...] = ()

    def environment(self, slot: int) -> dict[str, str]:
        """Variables of the job in one of the places."""
        variables = {
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
            "OPENBLAS_NUM_THREADS": "1",  # NumPy's, which training does not wait for
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),  # the jobs share the cores
        }
        if self.gpus:
            return variables | {"CUDA_VISIBLE_DEVICES": self.gpus[slot % len(self.gpus)]}
        kept = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
        return variables | {name: os.environ.get(name, _KEPT_BYTES) for name in kept}


def resources(study: StudyFile, at_once: int | None = None, threads: int = 1) -> Resources:
    """What this machine has for a study: all of its GPUs, a job on each, or all of its cores.

    Args:
        study: the study; where all of its variants have MODEL.DEVICE ``"cpu"``, GPUs are left alone.
        at_once: jobs at a time, if not as many as there is room for.
        threads: of each job.

    Raises:
        ValueError: a number below 1.
    """
    for name, given in (("--jobs", at_once), ("--threads", threads)):
        if given is not None and given < 1:
            raise ValueError(f"{name} must be 1 or more, got {given}")
    gpus = _gpus() if wants_gpu(study) else ()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Resources(at_once or len(gpus) or max(1, cores // threads), threads, gpus)


def wants_gpu(study: StudyFile) -> bool:
    """Whether a variant would train on a GPU."""
    return any(config["MODEL.DEVICE"] != "cpu" for config in study.configs.values())


def _gpus() -> tuple[str, ...]:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return tuple(visible.split(",")[:count]) if visible else tuple(map(str, range(count)))


def outcomes_of(study: StudyFile, output: str | os.PathLike) -> list[Outcome]:
    """The outcome of each job, in the order in which they run.

    Raises:
        ValueError: a file of a job is damaged.
    """
    is_run = is_held(Path(output))
    return [collect(study, job, is_run) for job in all_jobs(study, output)]


def run_study(
    study: StudyFile,
    output: str | os.PathLike,
    script: Path,
    shared: Resources,
    retry: bool = False,
    forks: bool | None = None,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Run the jobs that are not done.

    Args:
        study: the study.
        output: its folder; made where it is not there.
        script: the tool that trains.
        shared: what the jobs share.
        retry: whether those that failed are tried again.
        forks: whether jobs are forked from one process; by default where that is known to be safe, see ``processes``.
        say: gets a line for each job that ends.

    Returns:
        the outcomes of all jobs.

    Raises:
        ValueError, OSError: jobs were run with other settings, another process runs the study, data that it wants are
            not there, or the disk is full.
        KeyboardInterrupt: a signal stopped it, after the jobs have saved.
    """
    open_folder(study, output)
    try:
        jobs = all_jobs(study, output)
        check_settings(study, jobs)
        runner = _Runner(study, jobs, shared, retry, say)
        if runner.waiting:
            make_wanted(study.wanted)
            start = _start(study, script, shared, forks)
            try:
                runner.run(start, NewProcesses(script.with_name(EVALUATION)))
            finally:
                start.close()
        tidy(jobs)
        return runner.outcomes
    finally:
        let_go(output)


def open_folder(study: StudyFile, output: str | os.PathLike) -> None:
    """Make a study's folder and hold it. One that is not there is not made where data that the study wants are missing.

    Raises:
        OSError: data are missing, another process runs the study, or the folder cannot be made.
    """
    sentence = missing(study.wanted)
    if sentence is not None and not os.path.isdir(output):
        raise FileNotFoundError(f"study {study.path}: {sentence}")
    make_output_dir(output)
    hold(output, "the study's folder")


def _start(study: StudyFile, script: Path, shared: Resources, forks: bool | None) -> Start:
    if forks or (forks is None and can_fork() and not shared.gpus):
        try:
            return Forks(script, study.engine.modules, shared.environment(0))
        except RuntimeError:
            if forks:
                raise
    return NewProcesses(script)


def is_due(outcome: Outcome, retry: bool) -> bool:
    """Whether a job is to be run; one that runs is waited for."""
    return outcome.state in ("waiting", "running") or (retry and outcome.state == "failed")


@dataclass
class _Running:
    process: Process
    slot: int
    since: float


class _Runner:
    """One session."""

    def __init__(
        self, study: StudyFile, jobs: Sequence[Job], shared: Resources, retry: bool, say: Callable[[str], None]
    ):
        self.study, self.shared, self.say = study, shared, say
        self._outcomes = {job.folder: collect(study, job) for job in jobs}
        self.waiting = [job for job in jobs if is_due(self._outcomes[job.folder], retry)]
        for job in self.waiting:  # those that failed, too
            self._outcomes[job.folder] = dataclasses.replace(self._outcomes[job.folder], state="waiting")
        self._evaluated = {part for job in self.waiting for part in job.parts}
        self.running: dict[Path, tuple[Job, _Running]] = {}
        self._told: set[Path] = set()
        self._just_ended: set[tuple[str, int]] = set()
        self._ended = len(jobs) - len(self.waiting)
        if self._ended and self.waiting:
            say(
                f"{self._ended} of {counted(len(jobs), 'job')} are done or failed; the other {len(self.waiting)} follow"
            )

    @property
    def outcomes(self) -> list[Outcome]:
        return list(self._outcomes.values())

    def run(self, train: Start, evaluate: Start) -> None:
        """Run all that waits, but for what is to evaluate jobs that failed."""
        try:
            while self.running or any(map(self._can_run, self.waiting)):
                while len(self.running) < self.shared.at_once and self._start_next(train, evaluate):
                    pass
                self._reap()
                time.sleep(_PAUSE)
        except BaseException:
            self._stop()
            raise

    def _can_run(self, job: Job) -> bool:
        """Whether a job that waits can be started, now or after others that wait."""
        waiting = {each.folder for each in self.waiting}
        return is_ready(job) or any(part in waiting for part in job.parts)

    def _start_next(self, train: Start, evaluate: Start) -> bool:
        """Start the first job whose folder is free, and of what it evaluates all is done; False where there is none."""
        for i, job in enumerate(self.waiting):
            if not is_ready(job):
                continue
            if is_held(job.folder):  # by a job of a study that was killed, which saves and leaves
                if job.folder not in self._told:
                    self._told.add(job.folder)
                    self.say(f"{job.title} is still run by another process; it goes on when that one ends")
                continue
            del self.waiting[i]
            slot = min(set(range(self.shared.at_once)) - {running.slot for _, running in self.running.values()})
            begin(job)
            start = evaluate if job.parts else train
            process = start(job.arguments, self.shared.environment(slot), job_log(job))
            self.running[job.folder] = job, _Running(process, slot, time.monotonic())
            self._outcomes[job.folder] = collect(self.study, job, is_running=True)
            return True
        return False

    def _reap(self, stopped: bool = False) -> None:
        for job, running in list(self.running.values()):
            if (code := running.process.poll()) is None:
                continue
            del self.running[job.folder]
            seconds = time.monotonic() - running.since
            # 130 and 143 are those of a run that a signal stopped, whoever sent it.
            keep = "final" if job.folder in self._evaluated and job.keep == "none" else job.keep
            finish(job, code, seconds, keep, stopped or code in (130, 143))
            outcome = self._outcomes[job.folder] = collect(self.study, job)
            self._ended += 1
            if outcome.seconds is not None and outcome.seconds < seconds + 1:  # no part of it is of an earlier session
                self._just_ended.add((job.variant, job.seed))
            self.say(self._line(job, outcome, seconds))

    def _line(self, job: Job, outcome: Outcome, seconds: float) -> str:
        now = time.monotonic()
        elapsed = {(job.variant, job.seed): now - running.since for job, running in self.running.values()}
        left = seconds_left(self.outcomes, self.shared.at_once, elapsed, self._just_ended)
        return f"{self._ended} of {len(self._outcomes)}  {ended_line(outcome, self.study.study, seconds, left)}"

    def _stop(self) -> None:
        """Ask all jobs to save and leave, and wait for them."""
        if self.running:
            self.say(f"stopping {counted(len(self.running), 'job')}, which save first")
        for _, running in self.running.values():
            running.process.stop()
        end = time.monotonic() + _PATIENCE
        while self.running and time.monotonic() < end:
            self._reap(stopped=True)
            time.sleep(_PAUSE)
