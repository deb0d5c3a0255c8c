"""The jobs of a study: a folder for each variant and seed, in which the tool trains, and ``job.json`` says how far it
is. What a job gave is read from there.
"""

import contextlib
import json
import math
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fbn_plugin.engine.files.disk import atomic_write
from fbn_plugin.engine.files.words import on_one_line, shown
from fbn_plugin.engine.run.logging import is_figure, read_metrics
from fbn_plugin.engine.run.output_dir import holds_run
from fbn_plugin.engine.run.run_info import ACTIVATIONS_FILE, read_record, read_run_info
from fbn_plugin.engine.studies.figures import curve_value
from fbn_plugin.engine.studies.outcomes import KernelDensity, LayerRange, Outcome, Variant
from fbn_plugin.engine.studies.run_figures import figure_of_run
from fbn_plugin.engine.studies.seeds import config_seed
from fbn_plugin.engine.studies.study_file import StudyFile
from fbn_plugin.engine.studies.study_keys import flat

__all__ = [
    "EVALUATION",
    "Job",
    "all_jobs",
    "begin",
    "check_settings",
    "collect",
    "finish",
    "is_held",
    "is_ready",
    "job_log",
    "record",
    "tidy",
]

# What evaluates the checkpoints of several jobs together.
EVALUATION = "evaluate_classification.py"
_FINAL = "model_final.pth"

_RECORD = "job.json"
_LOG = "job.log"
_LONGEST_ERROR = 500

# What two runs may have otherwise and give the same figures.
_IRRELEVANT = (
    "OUTPUT_DIR",
    "MODEL.DEVICE",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "INPUT.MASK_FORMAT",  # which follows from the annotations
)


@dataclass(frozen=True)
class Job:
    """A variant with a seed.

    Attributes:
        variant, seed: as the study has them.
        config_seed: SEED.
        folder: OUTPUT_DIR.
        arguments: the tool's command line, without the tool.
        command: the same for readers, from the project's root.
        parts: folders of the jobs whose final checkpoints it evaluates; of one that trains none.
        keep: which of its checkpoints stay, ``"none"``, ``"final"`` or ``"all"``.
    """

    variant: str
    seed: int
    config_seed: int
    folder: Path
    arguments: list[str]
    command: str
    parts: tuple[Path, ...] = ()
    keep: str = "none"

    @property
    def title(self) -> str:
        return f"{self.variant}, seed {self.seed}"


def all_jobs(study: StudyFile, output: str | os.PathLike) -> list[Job]:
    """The jobs in the order in which they run: all variants with the first seed, then with the next, so that a study
    that is stopped early has whole seeds.

    Args:
        study: the study.
        output: its folder.
    """
    return [
        (_combined if described.combines else _trained)(study, variant, seed, Path(output))
        for seed in study.study.seeds
        for variant, described in study.study.variants.items()
    ]


def _place(variant: str, seed: int) -> Path:
    return Path("jobs", variant, f"seed-{seed}")


def _combined(study: StudyFile, variant: str, seed: int, output: Path) -> Job:
    """The job that evaluates others' checkpoints."""
    combination, place = study.study.variants[variant].combines, _place(variant, seed)

    def arguments(folder: Path) -> list[str]:
        flags = [text for name in study.imports for text in ("--import", name)]
        names = [text for part in combination.of for text in ("--name", part)]
        flags += [*names, "--crops", str(combination.crops)]
        flags += ["--moments", combination.moments] if combination.moments else []
        flags += ["--ensemble"] if len(combination.of) > 1 else []
        return [*(str(folder / _place(part, seed)) for part in combination.of), "--output", str(folder / place), *flags]

    return Job(
        variant,
        seed,
        config_seed(seed, study.study.seed_rule),
        output / place,
        arguments(output),
        shlex.join(["python", f"tools/{EVALUATION}", *map(_without_folder, arguments(Path()))]),
        tuple(output / _place(part, seed) for part in combination.of),
    )


def _without_folder(argument: str) -> str:
    """A file that is imported, by its name alone."""
    return os.path.basename(argument) if argument.endswith(".py") else argument


def _trained(study: StudyFile, variant: str, seed: int, output: Path) -> Job:
    place = _place(variant, seed)
    number = config_seed(seed, study.study.seed_rule)

    def arguments(base: str, folder: str, imports: Sequence[str]) -> list[str]:
        flags = [text for name in imports for text in ("--import", name)]
        end = ["SEED", str(number), "OUTPUT_DIR", folder]
        return [*flags, "--config-file", base, "--resume", "auto", *study.overrides[variant], *end]

    base = study.study.variants[variant].base or study.study.base
    shown_arguments = arguments(base, str(place), [_without_folder(name) for name in study.imports])
    shown_arguments = [each for each in shown_arguments if each not in ("--resume", "auto")]
    return Job(
        variant,
        seed,
        number,
        output / place,
        arguments(os.path.abspath(study.bases[variant]), str(output / place), study.imports),
        shlex.join(["python", f"tools/{study.engine.script}", *shown_arguments]),
        keep=study.keep,
    )


def is_ready(job: Job) -> bool:
    """Whether the jobs whose checkpoints one evaluates are done; of one that trains always.

    Raises:
        ValueError: the record of such a job is damaged.
    """
    return all(record(part).get("state") == "done" for part in job.parts)


def tidy(jobs: Sequence[Job]) -> None:
    """Remove the checkpoints of finished jobs that are not to stay, once no combination waits for them."""
    wanted = {part for job in jobs for part in job.parts if record(job.folder).get("state") != "done"}
    evaluated = {part for job in jobs for part in job.parts}
    for job in jobs:
        if job.folder in evaluated - wanted and record(job.folder).get("state") == "done":
            _tidy(job.folder, job.keep)


def job_log(job: Job) -> Path:
    """What the job prints."""
    return job.folder / _LOG


def record(folder: Path) -> dict[str, Any]:
    """``job.json`` of a job's folder: ``state`` (``"running"``, ``"done"``, ``"failed"`` or ``"stopped"``), ``error``,
    ``seconds`` and ``attempts``; of a job that has not begun an empty one.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / _RECORD
    if not path.is_file():
        return {}
    try:
        content = read_record(path)
    except ValueError as error:
        raise ValueError(f"{error}; remove the file to have the job looked at anew") from None
    known = {"state": str, "error": str | None, "seconds": float | int, "attempts": int}
    for key, kind in known.items():
        if not isinstance(content.get(key), kind):
            raise ValueError(f"{path} has no {key!r} of the right type; remove the file to have the job looked at anew")
    return content


def begin(job: Job) -> None:
    """Note that the job runs.

    Raises:
        OSError: its folder cannot be written to.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    before = record(job.folder)
    _write(job, "running", None, before.get("seconds", 0.0), before.get("attempts", 0) + 1)


def finish(job: Job, code: int, seconds: float, keep: str, stopped: bool = False) -> str | None:
    """Note how the job ended, and remove the checkpoints of a finished one that are not to be kept.

    What a combination still is to evaluate is kept by ``keep``, and removed by :func:`tidy`.

    Args:
        job: that has begun.
        code: exit code of its process; of one that a signal ended, minus its number.
        seconds: that the process took.
        keep: which checkpoints stay, ``"none"``, ``"final"`` or ``"all"``.
        stopped: whether it was asked to stop, so that it goes on later whatever its code is.

    Returns:
        the error, where it failed.
    """
    before = record(job.folder)
    seconds += before.get("seconds", 0.0)
    attempts = before.get("attempts", 1)
    if code == 0:
        _tidy(job.folder, keep)
        _write(job, "done", None, seconds, attempts)
        return None
    if stopped:
        _write(job, "stopped", None, seconds, attempts)
        return None
    error = _last_words(job, code)
    _write(job, "failed", error, seconds, attempts)
    return error


def _write(job: Job, state: str, error: str | None, seconds: float, attempts: int) -> None:
    content = {"state": state, "error": error, "seconds": round(seconds, 3), "attempts": attempts}
    atomic_write(job.folder / _RECORD, (json.dumps(content, indent=2) + "\n").encode())


def _tidy(folder: Path, keep: str) -> None:
    """Remove what a finished run is not asked for again."""
    if keep == "all":
        return
    spared = (_FINAL,) if keep == "final" else ()
    for file in folder.iterdir():
        is_weights = file.suffix == ".pth" and file.name not in spared
        is_pointer = file.name == "last_checkpoint" and keep == "none"
        is_board = file.name.startswith("events.out.tfevents.")  # metrics.json has its figures
        if is_weights or is_pointer or is_board:
            with contextlib.suppress(OSError):
                file.unlink()
    if keep == "none":
        shutil.rmtree(folder / "inference", ignore_errors=True)


def _last_words(job: Job, code: int) -> str:
    """Why a job failed: the last line that tells of an error, else the last line."""
    with contextlib.suppress(OSError), open(job_log(job), "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 100_000))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        words = said[-1] if said and code > 0 else lines[-1] if lines and code > 0 else ""
        if words:
            return on_one_line(words)[:_LONGEST_ERROR]
    if code < 0:
        reason = ", as for want of memory" if code == -9 else ""
        return f"ended by signal {-code}{reason}"
    return f"ended with exit code {code} and no words"


def is_held(folder: Path) -> bool:
    """Whether a process holds a run folder, see ``run/lock.py``; nothing is locked by asking."""
    if not hasattr(os, "lockf"):  # on Windows
        return False
    try:
        file = os.open(folder / ".lock", os.O_RDWR)
    except OSError:
        return False
    try:
        os.lockf(file, os.F_TEST, 0)
    except PermissionError:
        return True
    except OSError:  # no locks on this file system
        return False
    finally:
        os.close(file)
    return False


def collect(study: StudyFile, job: Job, is_running: bool = False) -> Outcome:
    """What a job gave so far.

    Args:
        study: that it is of.
        job: the job.
        is_running: whether it runs where ``job.json`` says so, as the study itself does; else its folder tells.

    Raises:
        ValueError: a file in its folder is damaged.
    """
    known = record(job.folder)
    state = known.get("state", "waiting")
    if state not in ("done", "failed"):
        runs = (is_running and state == "running") or is_held(job.folder)
        state = "running" if runs else "waiting"
    described = study.study.variants[job.variant]
    curves, metrics, info = {}, {}, {}
    if known and described.combines:
        metrics, info = _evaluation(study, job)
    elif known:
        curves, info = _curves(study, job), read_run_info(job.folder)
        known_metrics = study.study.metrics.items()
        metrics = {name: figure_of_run(metric, curves[name]) for name, metric in known_metrics if name in curves}
        if state == "done" and not curves:
            rows = ", ".join(study.study.curve_rows.values())
            known |= {"error": f"metrics.json has no row of {rows}; remove the run's folder to have it made again"}
            state = "failed"
    error = known.get("error") if state == "failed" else None
    return Outcome(
        variant=job.variant,
        seed=job.seed,
        config_seed=job.config_seed,
        state=state,
        levels=described.levels,
        metrics=metrics if state == "done" else {},
        curves=curves,
        seconds=known.get("seconds"),
        command=job.command,
        error=error and _without_places(error, job.folder),
        hardware=info.get("hardware"),
        versions=info.get("versions", {}),
        **(_measured(job.folder) if state == "done" else {}),
    )


def _evaluation(study: StudyFile, job: Job) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures of the evaluation of several jobs' checkpoints, the ensemble's of several, and all that it recorded."""
    path = job.folder / "evaluation.json"
    if not path.is_file():
        return {}, {}
    content = read_record(path)
    try:
        given = content["entries"][-1]["metrics"]
        rows = {name: metric.row or name for name, metric in study.study.metrics.items() if metric.of == "last"}
        figures = {name: float(given[row]) for name, row in rows.items() if given.get(row) is not None}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is damaged: its last entry has no metrics") from None
    return figures, content


def _curves(study: StudyFile, job: Job) -> dict[str, list[tuple[int, float]]]:
    """What the runs have curves of, see ``Study.curve_rows`` -> (finished iterations, figure), in order."""
    engine, last = study.engine, study.configs[job.variant].get(study.engine.last, math.inf)
    rows = study.study.curve_rows
    keys = {name: engine.row_key(row) for name, row in rows.items()}
    found: dict[str, dict[int, float]] = {}
    for row in read_metrics(job.folder / "metrics.json"):
        for name in rows:
            if (value := row.get(keys[name], ...)) is not ...:
                finished = min(row["iteration"] + 1, last)
                found.setdefault(name, {})[finished] = math.nan if value is None else float(value)
    results = _results(job.folder)  # the last evaluation has the last word
    for name, curve in found.items():
        value = results.get(rows[name], ...)
        if engine.metric(rows[name]) is not None and value is not ... and is_figure(value):
            curve[max(curve)] = math.nan if value is None else float(value)
    return {name: sorted(found[name].items()) for name in rows if name in found}


def _measured(folder: Path) -> dict[str, list[LayerRange] | list[KernelDensity]]:
    """What the run has measured of its layers, and of single units, where it has."""
    path = folder / ACTIVATIONS_FILE
    if not path.is_file():
        return {}
    content = read_record(path)
    try:
        layers = [
            LayerRange(
                each["name"],
                *(curve_value(each[end]) for end in ("minimum", "maximum", "median")),
                {percent: tuple(map(curve_value, ends)) for percent, ends in each["bands"].items()},
            )
            for each in content["layers"]
            if each["count"]
        ]
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: it has no layers with their bands") from None
    try:
        kernels = [
            KernelDensity(
                *(each[key] for key in ("layer", "unit", "sigma", "images", "passing")),
                *(list(map(curve_value, each["density"][key])) for key in ("edges", "values")),
            )
            for each in content.get("kernels", [])
            if each["count"]
        ]
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: it has no kernels with their density") from None
    return {"layers": layers, "kernels": kernels}


def _results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    return read_record(path) if path.is_file() else {}


def _without_places(text: str, folder: Path) -> str:
    """A sentence without the folders of the machine that it was said on."""
    for place in (folder.parents[2], Path.cwd(), Path.home()):
        for name in {str(place), os.path.abspath(place), os.path.realpath(place)} - {"/", ".", ""}:
            text = text.replace(f"{name}{os.sep}", "")
    return text


def check_settings(study: StudyFile, jobs: Sequence[Job]) -> None:
    """Refuse a study file that says something else than what its jobs were run with.

    Raises:
        ValueError: the first job whose ``config.yaml`` differs, with the key.
    """
    for job in jobs:
        if job.parts:
            _check_combination(study.study.variants[job.variant], job)
            continue
        path = job.folder / "config.yaml"
        if not path.is_file() or not (holds_run(job.folder) or record(job.folder).get("state") == "done"):
            continue
        saved = flat(study.engine.load(str(path), []))
        wanted = {**study.configs[job.variant], "SEED": job.config_seed}
        for key, old in saved.items():
            if key not in _IRRELEVANT and key in wanted and old != wanted[key]:
                raise ValueError(
                    f"{job.title} was run with {key} {shown(old)}, and the study file has {shown(wanted[key])}; put "
                    f"the old value back, remove {job.folder}, or choose another --output"
                )


def _check_combination(variant: Variant, job: Job) -> None:
    """Refuse a study file that combines otherwise than was done."""
    path = job.folder / "evaluation.json"
    if record(job.folder).get("state") != "done" or not path.is_file():
        return
    content = read_record(path)
    wanted = variant.combines
    names = [each.get("name") for each in content.get("entries", [])][: len(wanted.of)]
    for what, old, new in (("crops", content.get("crops"), wanted.crops), ("variants", names, wanted.of)):
        if old != new:
            raise ValueError(
                f"{job.title} was evaluated with {what} {shown(old)}, and the study file has {shown(new)}; put the old "
                f"value back, remove {job.folder}, or choose another --output"
            )
