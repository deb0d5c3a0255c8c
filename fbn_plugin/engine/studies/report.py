"""The report of a study: ``study.json`` with its jobs and statistics, ``report.md`` with pictures, and ``report.html``,
one page that needs no other file; and the page of the documentation that is made from such JSON files."""

import dataclasses
import json
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fbn_plugin.engine.files.disk import atomic_write
from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.studies.claim_findings import claim_blocks, printed_blocks
from fbn_plugin.engine.studies.claims import check_claims, joint_verdict
from fbn_plugin.engine.studies.comparing import variant_name
from fbn_plugin.engine.studies.document import (
    Block,
    Code,
    Heading,
    Legend,
    Mono,
    Paragraph,
    Picture,
    Table,
    html_page,
    markdown,
)
from fbn_plugin.engine.studies.figures import Figure, quantity, study_figures
from fbn_plugin.engine.studies.findings import (
    best_blocks,
    comparison_blocks,
    glance_blocks,
    mean_blocks,
    run_blocks,
    state_blocks,
    variant_blocks,
)
from fbn_plugin.engine.studies.layer_figures import KERNELS, LAYERS, kernels_figure, layers_figure
from fbn_plugin.engine.studies.outcomes import FULL_SCALE, Outcome, Study, Variant, read_outcomes, write_outcomes
from fbn_plugin.engine.studies.plots import figure_png
from fbn_plugin.engine.studies.row_figures import TOGETHER, together_figures, undrawn_rows
from fbn_plugin.engine.studies.statistics import MetricStatistics, statistics_block, study_statistics
from fbn_plugin.engine.studies.svg import STYLE, figure_file, least_width, legend_svg, panel_svg, svg_size

__all__ = [
    "DocsPage",
    "all_figures",
    "docs_blocks",
    "in_job_order",
    "render_docs",
    "report_markdown",
    "report_page",
    "write_docs",
    "write_report",
]


@dataclass(frozen=True)
class DocsPage:
    """A page of the documentation.

    Attributes:
        text: Markdown.
        pictures: name of the file beside it -> SVG.
    """

    text: str
    pictures: dict[str, bytes]


def write_report(study: Study, outcomes: Sequence[Outcome], folder: str | os.PathLike) -> list[Path]:
    """Write ``study.json``, ``report.md``, ``report.html`` and a PNG for each picture, each file in one step.

    The same study and outcomes give the same bytes, but for the PNG, which Matplotlib draws.

    Args:
        folder: made if it is not there.

    Returns:
        The files.

    Raises:
        ModuleNotFoundError: SciPy or Matplotlib is not installed.
        WriteError: a file cannot be written.
    """
    outcomes = in_job_order(study, outcomes)
    found = study_statistics(study, outcomes)
    figures = all_figures(study, outcomes, found)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {f"{each.name}.png": figure_png(each) for each in figures}
    files["report.md"] = report_markdown(study, outcomes, found).encode()
    files["report.html"] = report_page(study, outcomes, found).encode()
    computed = statistics_block(study, outcomes)
    if study.claims:
        verdicts = check_claims(study, found)
        computed |= {"verdict": joint_verdict(verdicts), "claims": [dataclasses.asdict(each) for each in verdicts]}
    write_outcomes(folder / "study.json", study, outcomes, computed)
    for name, content in files.items():
        atomic_write(folder / name, content)
    return [folder / "study.json", *(folder / name for name in files)]


def report_markdown(
    study: Study, outcomes: Sequence[Outcome], found: Mapping[str, MetricStatistics] | None = None
) -> str:
    """The report as Markdown, with its pictures as PNG files beside it.

    Args:
        found: of ``study_statistics``, where it is known.
    """
    return markdown(_report_blocks(study, outcomes, found or study_statistics(study, outcomes)))


def report_page(study: Study, outcomes: Sequence[Outcome], found: Mapping[str, MetricStatistics] | None = None) -> str:
    """The report as one HTML page, light or dark, that loads nothing.

    Args:
        found: of ``study_statistics``, where it is known.
    """
    return html_page(study.heading, _report_blocks(study, outcomes, found or study_statistics(study, outcomes)), STYLE)


def in_job_order(study: Study, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Jobs by variant and seed, in whatever order they ended."""
    places = {name: i for i, name in enumerate(study.variants)}
    return sorted(outcomes, key=lambda each: (places[each.variant], each.seed))


def _report_blocks(study: Study, outcomes: Sequence[Outcome], found: Mapping[str, MetricStatistics]) -> list[Block]:
    outcomes = in_job_order(study, outcomes)
    blocks: list[Block] = [Heading(1, study.heading), *_description(study), *state_blocks(study, outcomes, found)]
    blocks += claim_blocks(study, found, 2)
    figures = all_figures(study, outcomes, found)
    for name, metric in study.metrics.items():
        mine = [each for each in figures if each.metric == name]
        blocks += [Heading(2, quantity(name, metric)), *best_blocks(study, name, found[name])]
        blocks += printed_blocks(study, name, found[name])
        blocks += _pictures([each for each in mine if each.kind == "means"])
        blocks += [Heading(3, "Means"), *mean_blocks(study, name, found[name])]
        if study.comparisons:
            blocks += [Heading(3, "Comparisons"), *_pictures([each for each in mine if each.kind == "differences"])]
            blocks += comparison_blocks(study, name, found[name])
        blocks += [block for each in mine if each.kind == "curves" for block in _curve_blocks(each)]
        if study.factors:
            blocks += [Heading(3, "Every variant"), *variant_blocks(study, name, found[name])]
    blocks += _measured_blocks(study, figures, 2)
    if failed := run_blocks(study, outcomes, found):
        blocks += [Heading(2, "Runs without a figure"), *failed]
    return [*blocks, *_provenance(study, outcomes, 2), *_commands(outcomes)]


def _description(study: Study) -> list[Block]:
    """What the study file says of it, of which table or figure it is, and whether it is that at the paper's scale."""
    blocks: list[Block] = []
    if study.source:
        what = " at the paper's scale" if study.scale == FULL_SCALE else ""
        reduced = ", reduced" + ("" if study.is_beyond else f": the scale {study.scale} is not the paper's setting")
        scale = reduced if study.is_reduced else what
        blocks.append(Paragraph((f"{study.source}{scale}.",)))
    paragraphs = [" ".join(each.split()) for each in study.description.split("\n\n")]
    return [*blocks, *(Paragraph((each,)) for each in paragraphs if each)]


def _curve_blocks(figure: Figure) -> list[Block]:
    return [Heading(3, "Along the training"), *_pictures([figure])]


def all_figures(study: Study, outcomes: Sequence[Outcome], found: Mapping[str, MetricStatistics]) -> list[Figure]:
    """The pictures of a report: those of the metrics, of rows that are drawn together, and of layers and kernels where
    they were measured."""
    measured = [draw(study, outcomes) for draw in (layers_figure, kernels_figure)]
    return [
        *study_figures(study, outcomes, found),
        *together_figures(study, outcomes),
        *(each for each in measured if each),
    ]


def _measured_blocks(
    study: Study, figures: Sequence[Figure], rank: int, ending: str = "png", prefix: str = ""
) -> list[Block]:
    """What is of no metric, each picture with a heading."""
    headings = {LAYERS: "Layer by layer", KERNELS: "Kernel by kernel"}
    blocks: list[Block] = []
    for each in figures:
        if each.kind in (TOGETHER, LAYERS, KERNELS):
            blocks += [Heading(rank, headings.get(each.kind, each.title)), *_pictures([each], ending, prefix)]
    return [*blocks, *(Paragraph((sentence,), "warning") for sentence in undrawn_rows(study, figures))]


def _pictures(figures: Sequence[Figure], ending: str = "png", prefix: str = "") -> list[Block]:
    blocks: list[Block] = []
    for each in figures:
        svg = tuple(map(panel_svg, each.panels))
        widths = tuple(svg_size(one)[0] for one in svg)
        blocks += [Legend(tuple(legend_svg(*entry, each.has_marks) for entry in each.legend))] if each.legend else []
        blocks.append(Picture(f"{prefix}{each.name}.{ending}", each.title, svg, least_width(each.panels[0]), widths))
        blocks.append(Paragraph((each.caption,), "note"))
    return blocks


def _provenance(study: Study, outcomes: Sequence[Outcome], rank: int, most_variants: int | None = None) -> list[Block]:
    """What was run, on what, and how long it took; of so many variants also what each one sets."""
    facts: list[list] = [["setting", "value"]]
    facts += [["tool", Mono(f"tools/{_SCRIPTS.get(study.tool, study.tool)}")]]
    facts += [["base config", Mono(study.base)]] if study.base else []
    varied = [each.settings for each in study.variants.values()]
    common, alike = study.settings, _shared(varied)
    replaced = {key for key in common if all(key in each for each in varied)} - alike.keys()  # by each with its own
    facts += [[Mono(key), Mono(_value(alike.get(key, common[key])))] for key in common if key not in replaced]
    facts += [["seeds", f"{_ranges(study.seeds)} ({_SEED_RULES.get(study.seed_rule, study.seed_rule)})"]]
    blocks: list[Block] = [Heading(rank, "Settings"), Table(facts, (0, 1))]
    own = [f"{name}: {_settings(each)}" for name, each in study.variants.items()]
    if most_variants is None or len(own) <= most_variants:
        blocks += [Code(own, f"What {counted(len(own), 'variant')} set")]
    elif study.factors:
        blocks += [Code(_level_settings(study), "What all variants of a level set")]
    machines = Counter((each.hardware, tuple(sorted(each.versions.items()))) for each in outcomes if each.hardware)
    rows: list[list] = [["hardware", "versions", "jobs"]]
    for (hardware, versions), count in machines.items():
        rows.append([hardware, ", ".join(f"{name} {version}" for name, version in versions), f"{count:,}"])
    if machines:
        blocks += [Heading(rank, "Made with"), Table(rows, (0, 1))]
    seconds = [each.seconds for each in outcomes if each.seconds is not None]
    if seconds:
        text = f"All jobs together took {_duration(sum(seconds))}, one {_duration(min(seconds))}"
        blocks.append(Paragraph((f"{text} to {_duration(max(seconds))}.",)))
    return blocks


_SCRIPTS = {
    "classification": "train_classification.py",
    "torchvision": "train_detection.py",
    "detectron2": "train_net.py",
}
# A page of the documentation lists the settings of no more; of a product of factors it has those of the levels, and the
# JSON has all.
_MOST_VARIANTS = 20
_SEED_RULES = {
    "md5": "SEED is the last 32 bits of the MD5 digest of the number",
    "plain": "SEED is the number itself",
}


def _level_settings(study: Study) -> list[str]:
    """Of each level of each factor what all variants that have it set alike, and not all of the study."""
    everywhere = _shared([each.settings for each in study.variants.values()])
    lines = []
    for factor, levels in study.factors.items():
        for level in levels:
            mine = [each.settings for each in study.variants.values() if each.levels.get(factor) == level]
            settings = {key: value for key, value in _shared(mine).items() if key not in everywhere}
            lines.append(f"{variant_name({factor: level})}: {_settings(Variant(settings=settings))}")
    return lines


def _shared(settings: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Keys that have the same value in all."""
    return {
        key: value
        for key, value in (settings[0] if settings else {}).items()
        if all(key in each and each[key] == value for each in settings)
    }


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _settings(variant: Variant) -> str:
    if (combined := variant.combines) is not None:
        views = f", {combined.crops} crops" if combined.crops > 1 else ""
        moments = f", {combined.moments} moments" if combined.moments else ""
        how = "evaluated together" if len(combined.of) > 1 else "evaluated"
        return f"final checkpoints of {' and '.join(combined.of)}, {how}{views}{moments}"
    parts = [variant.base] if variant.base else []
    return ", ".join([*parts, *(f"{key} {_value(value)}" for key, value in variant.settings.items())]) or "as the base"


def _ranges(seeds: Sequence[int]) -> str:
    """``1-5, 7``."""
    parts: list[list[int]] = []
    for seed in sorted(set(seeds)):
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    return ", ".join(f"{each[0]}-{each[-1]}" if len(each) > 1 else str(each[0]) for each in parts)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _commands(outcomes: Sequence[Outcome]) -> list[Block]:
    lines = [each.command for each in outcomes if each.command]
    if not lines:
        return []
    return [
        Heading(2, "Commands"),
        Code(lines, f"{counted(len(lines), 'job')}, a line each, from the project's folder"),
    ]


def render_docs(
    studies: Mapping[str, tuple[Study, Sequence[Outcome]]], page: str | os.PathLike, title: str | None = None
) -> DocsPage:
    """A page of the documentation from studies that are done: what is best where, means, comparisons.

    Args:
        studies: name of each JSON file, as a reader finds it from the project's root -> what is in it.
        page: name of the page, from there, too; the pictures' begin with its stem.
        title: of the page; None takes that of the first study.
    """
    title = title or next(study.heading for study, _ in studies.values())
    named = "".join(f" --from {shlex.quote(name)}" for name in studies)
    asked = f" --title {shlex.quote(title)}" if title != next(study.heading for study, _ in studies.values()) else ""
    command = f"python tools/study.py report{named} --markdown {shlex.quote(os.fspath(page))}{asked}"
    head = [
        Heading(1, title),
        Paragraph(("Nothing on this page is written by hand. Page and pictures are made from the kept figures by",)),
        Code([command]),
    ]
    parts, pictures, stem, statistics = [], {}, Path(page).stem, []
    for i, (name, (study, outcomes)) in enumerate(studies.items(), 1):
        outcomes = in_job_order(study, outcomes)
        found = study_statistics(study, outcomes)
        statistics.append((study, found))
        prefix = f"{stem}-{i}-" if len(studies) > 1 else f"{stem}-"
        figures = [each for each in all_figures(study, outcomes, found) if each.is_main]
        pictures |= {f"{prefix}{each.name}.svg": figure_file(each) for each in figures}
        parts.append(markdown(docs_blocks(study, outcomes, found, figures, prefix, name)))
    if len(studies) > 1 and (glance := glance_blocks(statistics)):
        head += [Heading(2, "At a glance"), *glance]
    return DocsPage("\n".join([markdown(head), *parts]), pictures)


def docs_blocks(
    study: Study,
    outcomes: Sequence[Outcome],
    found: Mapping[str, MetricStatistics],
    figures: Sequence[Figure],
    prefix: str,
    source: str,
) -> list[Block]:
    """One study of a page of the documentation.

    Args:
        study, outcomes: in the order of variants and seeds.
        found: of ``study_statistics``.
        figures: of :func:`all_figures`, those that are shown.
        prefix: of the names of the pictures' files.
        source: name of the JSON file, as a reader finds it.
    """
    blocks: list[Block] = [Heading(2, study.heading), *_description(study), *state_blocks(study, outcomes, found)]
    blocks += claim_blocks(study, found, 3)
    for name, metric in study.metrics.items():
        mine = [each for each in figures if each.metric == name]
        blocks += [Heading(3, quantity(name, metric)), *best_blocks(study, name, found[name])]
        blocks += printed_blocks(study, name, found[name])
        blocks += _pictures([each for each in mine if each.kind == "means"], "svg", prefix)
        blocks += mean_blocks(study, name, found[name])
        blocks += _pictures([each for each in mine if each.kind == "differences"], "svg", prefix)
        blocks += comparison_blocks(study, name, found[name])
        blocks += _pictures([each for each in mine if each.kind == "curves"], "svg", prefix)
    blocks += _measured_blocks(study, figures, 3, "svg", prefix)
    if failed := run_blocks(study, outcomes, found):
        blocks += [Heading(3, "Runs without a figure"), *failed]
    blocks += _provenance(study, outcomes, 3, _MOST_VARIANTS)
    example = next((each for each in outcomes if each.command), None)
    if example:
        text = f" has the command of every job. That of {example.variant} with seed {example.seed}:"
        blocks += [Paragraph((Mono(source), text)), Code([example.command])]
    return blocks


def write_docs(files: Sequence[str | os.PathLike], page: str | os.PathLike, title: str | None = None) -> list[Path]:
    """Write :func:`render_docs`'s page, and its pictures beside it.

    Args:
        files: JSON files of studies, named as the page is to name them.
        page: the Markdown file.
        title: of the page; None takes that of the first study.

    Raises:
        OSError, ValueError: a file is not there, or is none of a study.
        WriteError: a file cannot be written.
    """
    studies = {Path(file).as_posix(): read_outcomes(file) for file in files}
    made = render_docs(studies, Path(page).as_posix(), title)
    for name, content in made.pictures.items():
        atomic_write(Path(page).with_name(name), content)
    atomic_write(page, made.text.encode())
    return [Path(page), *(Path(page).with_name(name) for name in made.pictures)]
