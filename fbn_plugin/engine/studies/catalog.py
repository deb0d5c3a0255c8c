"""The experiments of a folder: study files that have the ID of a paper's table or figure, their scales, and how far
each is.
"""

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fbn_plugin.engine.files.yaml_file import read_yaml
from fbn_plugin.engine.studies.jobs import record
from fbn_plugin.engine.studies.outcomes import Study
from fbn_plugin.engine.studies.scales import folder_name, scales_of
from fbn_plugin.engine.studies.study_file import Described, read_study_alone
from fbn_plugin.engine.studies.wanted_data import Wanted, is_there

__all__ = [
    "PAPERS",
    "Experiment",
    "Progress",
    "data_text",
    "find_experiments",
    "jobs_of",
    "output_of",
    "progress",
    "read_catalog",
]

# Papers by what stands before the dot of an id.
PAPERS = {
    "P0": "Filtered Batch Normalization",
    "P1": "Batch Normalization and the impact of batch structure",
    "P2": "Revisiting Batch Norm Initialization",
    "P3": "Batch Normalization",
    "P4": "Convolutional Normalization",
    "X": "Beyond the papers",
}


@dataclass(frozen=True)
class Experiment:
    """A study file of a table or figure.

    Attributes:
        path: the file.
        ids: of what it makes again; the first one is its name.
        scales: name -> what the file says there.
    """

    path: Path
    ids: list[str]
    scales: dict[str, Described]

    @property
    def id(self) -> str:
        return self.ids[0]

    @property
    def paper(self) -> str:
        """What stands before the dot."""
        return self.id.partition(".")[0]

    @property
    def study(self) -> Study:
        """The study at its first scale, for what is the same at all."""
        return next(iter(self.scales.values())).study


def read_catalog(folder: str | os.PathLike, root: str | os.PathLike = ".") -> list[Experiment]:
    """The experiments of a folder, in the papers' order.

    Args:
        folder: with the study files; those without an ID are left out.
        root: of the project.

    Raises:
        OSError, ValueError: a file is wrong, an id is there twice, its paper is unknown, or there is no file; one
            sentence.
    """
    if not Path(folder).is_dir():
        what = "is not a folder" if Path(folder).exists() else "is not there"
        raise FileNotFoundError(f"folder of experiments {folder} {what}")
    found, owners = [], {}
    for path in sorted(Path(folder).glob("*.yaml")):
        content = read_yaml(path)
        if "ID" not in content or "TOOL" not in content:
            continue
        try:
            names = list(scales_of(content))
        except ValueError as error:
            raise ValueError(f"study {path}: {error}") from None
        scales = {name: read_study_alone(path, root, name) for name in names or [None]}
        ids = next(iter(scales.values())).study.id.split(", ")
        for each in ids:
            if (other := owners.setdefault(each, path)) != path:
                raise ValueError(f"the id {each} is that of {other} and of {path}")
            if each.partition(".")[0] not in PAPERS:
                raise ValueError(f"the id {each} of {path} is of a paper that is none of {', '.join(PAPERS)}")
        found.append(Experiment(path, ids, scales))
    if not found:
        raise ValueError(f"folder of experiments {folder} has no study file with an ID and a TOOL")
    return sorted(found, key=lambda each: _in_papers_order(each.id))


def _in_papers_order(name: str) -> list[tuple[int, int, str]]:
    """Numbers within a name by their size, figures before tables as their letters are."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part.casefold()) for part in parts]


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).casefold()


def find_experiments(catalog: Sequence[Experiment], given: Sequence[str]) -> list[Experiment]:
    """The experiments that names mean, each once: ids in any spelling, a paper's for all of its own, or ``all``.

    Raises:
        ValueError: there is none of a name, with those that are near.

    Examples::

        >>> find_experiments([], ["all"])
        []
    """
    found: dict[Path, Experiment] = {}
    for name in given:
        wanted = _plain(name)
        mine = [
            each
            for each in catalog
            if wanted in ("all", each.paper.casefold(), *map(_plain, each.ids)) or wanted == _plain(each.path.stem)
        ]
        if not mine and wanted != "all":
            known = {_plain(one): one for each in catalog for one in each.ids}
            near = [known[one] for one in difflib.get_close_matches(wanted, known, n=3)]
            hint = f"did you mean {', '.join(near)}?" if near else "`list` shows all"
            raise ValueError(f"there is no experiment {name!r}; {hint}")
        found |= {each.path: each for each in mine}
    return list(found.values())


@dataclass(frozen=True)
class Progress:
    """How many jobs of a study have ended."""

    done: int
    failed: int
    all: int

    @property
    def untouched(self) -> bool:
        """Nothing has ended."""
        return not self.done and not self.failed

    def __str__(self) -> str:
        return f"{self.done} of {self.all}" + (f", {self.failed} failed" if self.failed else "")


def jobs_of(study: Study) -> int:
    """How many jobs a study has."""
    return len(study.variants) * len(set(study.seeds))


def progress(study: Study, folder: str | os.PathLike) -> Progress:
    """How far a study is, by the records in its folder.

    Raises:
        ValueError: a record is damaged.
    """
    states = []
    for variant in study.variants:
        for seed in study.seeds:
            states.append(record(Path(folder, "jobs", variant, f"seed-{seed}")).get("state"))
    return Progress(states.count("done"), states.count("failed"), jobs_of(study))


def data_text(experiment: Experiment) -> str:
    """The data that an experiment wants and that nobody makes: what is there, and what is missing for which scale."""
    scales: dict[Wanted, list[str]] = {}
    for name, each in experiment.scales.items():
        for wanted in each.wanted:
            scales.setdefault(wanted, []).append(name)
    states: dict[str, list[str]] = {}
    for wanted, names in scales.items():
        if not wanted.made:
            state = "there" if is_there(wanted) else f"missing for {' and '.join(names)}"
            states.setdefault(state, []).append(wanted.path)
    return "; ".join(f"{state}: {', '.join(paths)}" for state, paths in states.items()) or "none"


def output_of(experiment: Experiment, scale: str) -> Path:
    """The folder in which an experiment runs, as ``tools/study.py`` chooses it."""
    return Path("output", folder_name(experiment.path, scale))
