"""The pages of ``docs/results``: of every table and figure of the papers what is printed, what was measured here and
what that says, or why nothing was. All of it is made from the study files and from the figures that are kept.
"""

import os
import re
import shlex
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fbn_plugin.engine.files.disk import atomic_write
from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.studies.catalog import PAPERS, Experiment, jobs_of
from fbn_plugin.engine.studies.claim_findings import printed_text
from fbn_plugin.engine.studies.claims import ClaimVerdict, check_claims, joint_text
from fbn_plugin.engine.studies.comparing import variant_name
from fbn_plugin.engine.studies.document import (
    Block,
    Code,
    Heading,
    Inline,
    Link,
    Mono,
    Paragraph,
    Strong,
    Table,
    anchor,
    markdown,
)
from fbn_plugin.engine.studies.figures import Figure
from fbn_plugin.engine.studies.findings import Numbers, p_text
from fbn_plugin.engine.studies.kept import KEPT, kept_file
from fbn_plugin.engine.studies.layer_figures import KERNELS, LAYERS
from fbn_plugin.engine.studies.outcomes import FULL_SCALE, Outcome, Study, read_outcomes
from fbn_plugin.engine.studies.report import all_figures, docs_blocks, in_job_order
from fbn_plugin.engine.studies.row_figures import TOGETHER
from fbn_plugin.engine.studies.statistics import MetricStatistics, compared_factor, study_statistics
from fbn_plugin.engine.studies.svg import figure_file

__all__ = ["KeptStudy", "read_kept", "render_results", "strays", "write_results"]

_MOST_NAMED = 6  # variants in a cell of the table of all
_NONE = "-"
_NO_SCALE = "smoke"  # which is kept nowhere


@dataclass(frozen=True)
class KeptStudy:
    """A study whose figures are kept.

    Attributes:
        name: of its file, from the project's root.
        study: what is in it.
        outcomes: in the order of variants and seeds.
    """

    name: str
    study: Study
    outcomes: Sequence[Outcome]


def read_kept(catalog: Sequence[Experiment], root: str | os.PathLike) -> dict[tuple[str, str], KeptStudy]:
    """What is kept of experiments: (id, scale) -> study. What the paper says is taken from the study files as they are
    now; what was run, from the day that it was kept.

    Raises:
        OSError, ValueError: a file is none of a study, or of another one; one sentence.
    """
    found = {}
    for each in catalog:
        for scale in each.scales:
            file = kept_file(root, each.path, scale)
            if not file.is_file():
                continue
            study, outcomes = read_outcomes(file)
            if (study.id, study.scale) != (each.study.id, scale):
                raise ValueError(f"{file} is of {study.heading}, and not of {each.study.id} at the scale {scale}")
            now = each.scales[scale].study
            study = replace(study, title=now.title, source=now.source, printed=now.printed, claims=now.claims)
            if study.variants.keys() == now.variants.keys():  # with other names it cannot be told what was meant
                study = replace(study, comparisons=now.comparisons)
            found[each.id, scale] = KeptStudy(file.relative_to(root).as_posix(), study, in_job_order(study, outcomes))
    return found


def strays(root: str | os.PathLike, known: Container[str]) -> list[str]:
    """Names, from the project's root, of kept files that belong to no experiment, as after one was renamed.

    Args:
        root: of the project.
        known: names of those that do.
    """
    names = (path.relative_to(root).as_posix() for path in sorted(Path(root, KEPT).glob("*.json")))
    return [name for name in names if name not in known]


def render_results(catalog: Sequence[Experiment], kept: Mapping[tuple[str, str], KeptStudy]) -> dict[str, bytes]:
    """The pages and their pictures.

    Args:
        catalog: all experiments.
        kept: of :func:`read_kept`.

    Returns:
        Name of each file in the folder -> its content: ``index.md``, a page for each paper, pictures.
    """
    statistics = {key: study_statistics(each.study, each.outcomes) for key, each in kept.items()}
    papers = [name for name in PAPERS if any(each.paper == name for each in catalog)]
    figures = {key: _shown(all_figures(each.study, each.outcomes, statistics[key])) for key, each in kept.items()}
    files: dict[str, bytes] = {}
    blocks = _head("Tables and figures of the papers")
    blocks.append(Paragraph((_READING,)))
    for paper in papers:
        mine = [each for each in catalog if each.paper == paper]
        blocks += [Heading(2, _paper_title(paper)), _index_table(mine, kept, statistics, figures)]
        page, pictures = _page(paper, mine, kept, statistics, figures)
        files[_page_name(paper)] = page.encode()
        files |= pictures
    toctree = "\n".join(["```{toctree}", ":hidden:", "", *(Path(_page_name(each)).stem for each in papers), "```", ""])
    files["index.md"] = f"{markdown(blocks)}\n{toctree}".encode()
    return files


_READING = (
    "Each row is one study: variants of a config, each run with several seeds. Verdicts are over what the paper "
    "claims: reproduced, not reproduced and inconclusive (the seeds do not tell the variants apart) are as its page "
    "says. A reduced scale is not the paper's setting, and its figures are not to be held against the printed ones. "
    "p: of the claims, adjusted. With many variants, the least and the greatest figure of each that is compared, "
    "over all else that the study varies; its page has each. Printed are those of the scale's own variants; of a scale "
    "that has none of the paper's they are those of the paper's, and it is said. "
    "Negative results stand here as others do."
)


# What a paper's page and the pictures of its studies are called: after the study files, which are named by their ids.
_OWN_FILE = re.compile(r"(p\d|x)(\.md|_\w+-[a-z][a-z0-9_]*-.+\.svg)")


def write_results(
    catalog: Sequence[Experiment], kept: Mapping[tuple[str, str], KeptStudy], folder: str | os.PathLike
) -> list[Path]:
    """Write :func:`render_results` into a folder, and take out of it the pages and pictures of an earlier time; what is
    called otherwise than those stays.

    Raises:
        WriteError: a file cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = render_results(catalog, kept)
    for old in folder.iterdir():
        if _OWN_FILE.fullmatch(old.name) and old.name not in files:
            old.unlink()
    for name, content in files.items():
        atomic_write(folder / name, content)
    return [folder / name for name in files]


def _head(title: str) -> list[Block]:
    return [
        Heading(1, title),
        Paragraph(("Nothing on this page is written by hand. It is made from study files and kept figures by",)),
        Code(["python tools/reproduce.py report"]),
    ]


def _page_name(paper: str) -> str:
    return f"{paper.casefold()}.md"


def _paper_title(paper: str) -> str:
    return PAPERS[paper] if paper == "X" else f"{paper}: {PAPERS[paper]}"


def _command(experiment: Experiment, scale: str) -> str:
    return f"python tools/reproduce.py run {shlex.quote(experiment.id)} --scale {scale}"


def _index_table(
    experiments: Sequence[Experiment],
    kept: Mapping[tuple[str, str], KeptStudy],
    statistics: Mapping[tuple[str, str], Mapping[str, MetricStatistics]],
    figures: Mapping[tuple[str, str], Sequence[Figure]],
) -> Table:
    header: list[Inline] = ["id", "what", "scale", "printed", "here", "seeds", "p", "verdict", "figure", "command"]
    rows = [header]
    for each in experiments:
        mine = [scale for scale in each.scales if (each.id, scale) in kept]
        for scale in mine:
            key = each.id, scale
            rows.append(_kept_row(each, scale, kept[key], statistics[key], figures[key]))
        if not mine:
            scale = _scale_to_run(each)
            printed = _printed(each, each.scales[scale].study)
            why = f"not run: {_why_not(each, scale)}"
            command = Mono(_command(each, scale))
            rows.append([_link(each, _title(each)), each.study.title, "-", printed, "-", "-", "-", why, "-", command])
    return Table(rows, (0, 1, 2, 3, 4, 7, 8, 9))


def _link(experiment: Experiment, heading: str) -> Link:
    return Link(", ".join(experiment.ids), f"{_page_name(experiment.paper)}#{anchor(heading)}")


def _title(experiment: Experiment) -> str:
    """The heading of one that was not run."""
    return f"{experiment.study.id}: {experiment.study.title}"


def _picture(file: str, figures: Sequence[Figure], metric: str) -> Inline:
    """The picture that stands for a study: one in the form of the paper's, else that of its main metric."""
    own = [each for kind in (TOGETHER, KERNELS, LAYERS) for each in figures if each.kind == kind]
    found = next(iter(own), None) or next((each for each in figures if each.metric == metric), None)
    return Link("picture", f"{Path(file).stem}-{found.name}.svg") if found else _NONE


def _scale_to_run(experiment: Experiment) -> str:
    """The scale that a reader can run: the one for a CPU, else the first that is kept at all."""
    names = [name for name in experiment.scales if name != _NO_SCALE]
    return "cpu" if "cpu" in names else (names or list(experiment.scales))[0]


def _why_not(experiment: Experiment, scale: str) -> str:
    return " ".join(experiment.scales[scale].not_run.split()).rstrip(".") or "no figures are kept yet"


def _kept_row(
    experiment: Experiment,
    scale: str,
    kept: KeptStudy,
    found: Mapping[str, MetricStatistics],
    figures: Sequence[Figure],
) -> list[Inline]:
    study, main = kept.study, _main_metric(kept.study)
    verdicts, what = check_claims(study, found), study.metrics[main].label or main
    return [
        _link(experiment, study.heading),
        study.title,
        f"{scale}{', reduced' * study.is_reduced}{', conditional' * bool(study.conditional)}",
        _printed(experiment, study),
        f"{what}: {_figures(study, main, found)}",
        str(len(set(study.seeds))),
        _p_range(verdicts),
        _verdict(verdicts, study.is_reduced) if verdicts else "no claim",
        _picture(kept.name, figures, main),
        Mono(_command(experiment, scale)),
    ]


def _verdict(verdicts: Sequence[ClaimVerdict], is_reduced: bool) -> Inline:
    """That of the experiment, and how many claims it rests on; what a reduced scale says does not stand out."""
    checked = [each.verdict for each in verdicts if each.verdict != "not run"]
    if not checked:
        return joint_text(verdicts)
    said = f"{checked.count('reproduced')} of {counted(len(checked), 'claim')} reproduced"
    joint = joint_text(verdicts)
    return f"{joint} on the reduced setting: {said}" if is_reduced else Strong(f"{joint}: {said}")


def _main_metric(study: Study) -> str:
    """The first metric of which something is printed or claimed, else the first of all."""
    told = [*study.printed, *(each.metric for each in study.claims)]
    return next((name for name in study.metrics if name in told), next(iter(study.metrics)))


def _printed(experiment: Experiment, study: Study) -> str:
    """The paper's figures of the variants of a scale; where it has none of the paper's, those of the paper's scale."""
    own, papers = (_figures(each, _main_metric(each), None) for each in (study, experiment.study))
    return own if own != _NONE or papers == _NONE else f"of other variants: {papers}"


def _figures(study: Study, name: str, found: Mapping[str, MetricStatistics] | None) -> str:
    """Figures of the variants of which something is printed or claimed: those printed, or those found. Of many that are
    a product of factors, the least and the greatest at each level of what is compared."""
    claimed = [one for each in study.claims if each.metric == name for one in (each.variant, each.baseline)]
    printed = study.printed.get(name, {})
    named = [each for each in study.variants if each in printed or each in claimed] or list(study.variants)
    if found is None:
        named = [each for each in named if each in printed]
        texts = {each: printed_text(printed[each]) for each in named}
        values = {each: printed[each].value for each in named}
        show = "{:,g}".format
    else:
        numbers, summaries = Numbers(found[name]), found[name].summaries
        texts = {each: numbers.spread(summaries[each].mean, summaries[each].sd) for each in named}
        values = {each: summaries[each].mean for each in named if summaries[each].mean is not None}
        show = numbers.plain
    if len(named) > _MOST_NAMED and study.factors:
        texts = _ends_by_level(study, values, show)
    if not texts:
        return _NONE
    parts = [f"{each}: {text}" for each, text in texts.items()]
    more = len(parts) - _MOST_NAMED
    shown = "; ".join(parts[:_MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
    unit = study.metrics[name].unit
    return f"{shown} ({unit})" if unit else shown


def _ends_by_level(study: Study, values: Mapping[str, float], show: Callable[[float], str]) -> dict[str, str]:
    """Level of what is compared -> the least and the greatest value of its variants."""
    factor, texts = compared_factor(study), {}
    for level in study.factors[factor]:
        mine = [value for each, value in values.items() if study.variants[each].levels[factor] == level]
        if mine:
            ends = dict.fromkeys((show(min(mine)), show(max(mine))))
            texts[variant_name({factor: level})] = " to ".join(ends)
    return texts


def _p_range(verdicts: Sequence[ClaimVerdict]) -> str:
    values = sorted(each.p for each in verdicts if each.p is not None)
    if not values:
        return "-"
    ends = list(dict.fromkeys(map(p_text, (values[0], values[-1]))))
    return " to ".join(ends)


def _page(
    paper: str,
    experiments: Sequence[Experiment],
    kept: Mapping[tuple[str, str], KeptStudy],
    statistics: Mapping[tuple[str, str], Mapping[str, MetricStatistics]],
    figures: Mapping[tuple[str, str], Sequence[Figure]],
) -> tuple[str, dict[str, bytes]]:
    """A paper's page with its pictures."""
    blocks, pictures = _head(_paper_title(paper)), {}
    for each in experiments:
        mine = [scale for scale in each.scales if (each.id, scale) in kept]
        for scale in mine:
            found, entry = statistics[each.id, scale], kept[each.id, scale]
            prefix = f"{Path(entry.name).stem}-"
            drawn = figures[each.id, scale]
            pictures |= {f"{prefix}{figure.name}.svg": figure_file(figure) for figure in drawn}
            blocks += docs_blocks(entry.study, entry.outcomes, found, drawn, prefix, entry.name)
        if not mine:
            blocks += _not_run_blocks(each)
        blocks += _scale_blocks(each, mine)
    return markdown(blocks), pictures


def _shown(figures: Sequence[Figure]) -> list[Figure]:
    """What a paper's page shows: what a short report does, and the curves."""
    return [each for each in figures if each.is_main or each.kind == "curves"]


def _not_run_blocks(experiment: Experiment) -> list[Block]:
    study, scale = experiment.study, _scale_to_run(experiment)
    source = f"{study.source}. " if study.source else ""
    return [
        Heading(2, _title(experiment)),
        Paragraph((source, Strong("Not run"), f": {_why_not(experiment, scale)}.")),
    ]


def _scale_blocks(experiment: Experiment, kept: Sequence[str]) -> list[Block]:
    """At which scales it can be run, by which command, and why it was not at those that are not kept."""
    rows: list[list[Inline]] = [["scale", "jobs", "figures", "data that it wants", "command"]]
    for name, each in experiment.scales.items():
        wanted = "; ".join(one.what if one.made else f"{one.path}: {one.what}" for one in each.wanted) or "none"
        said = name if name == FULL_SCALE else f"{name}, reduced"
        why = "a check" if name == _NO_SCALE else f"not run: {_why_not(experiment, name)}"
        state = "above" if name in kept else why
        rows.append([said, f"{jobs_of(each.study):,}", state, wanted, Mono(_command(experiment, name))])
    file = "/".join(experiment.path.parts[-3:])
    return [Paragraph((f"{counted(len(rows) - 1, 'scale')} of ", Mono(file), ":")), Table(rows, (0, 2, 3, 4))]
