"""The report of a study: what it writes stands alone, says the same for the same figures, and survives what is missing
or odd."""

import dataclasses
import json
import math
import re
import sys
from xml.etree import ElementTree

import pytest
from PIL import Image
from synthetic_study import LOSS, TOP1, changed, draw, plain_study, product_study

pytest.importorskip("scipy", reason="scipy is not installed")
from fbn_plugin.engine.studies import statistics
from fbn_plugin.engine.studies.document import Code, Heading, Mono, Paragraph, Strong, Table, html_page, markdown
from fbn_plugin.engine.studies.figures import comparison_groups, study_figures
from fbn_plugin.engine.studies.findings import best_blocks, comparison_blocks, mean_blocks
from fbn_plugin.engine.studies.outcomes import Comparison, Metric, Outcome, Variant, read_outcomes, write_outcomes
from fbn_plugin.engine.studies.plots import figure_png
from fbn_plugin.engine.studies.report import render_docs, report_markdown, report_page, write_docs, write_report
from fbn_plugin.engine.studies.statistics import study_statistics
from fbn_plugin.engine.studies.svg import _spread, figure_file, nice_ticks, tick_text

SHARE_BEFORE = {"start": 0.0, "middle": 0.5, "end": 1.0}  # of a text, before its place


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 199)


def small_product(**changes):
    return product_study(norms=("BN", "FBN, T=3", "GN"), batches=("2", "16"), sets=("CIFAR-10",), **changes)


def svgs(page: str) -> list[ElementTree.Element]:
    found = re.findall(r"(?s)<svg (?!x=).*?\n</svg>(?=</div>|<svg width)", page)
    return [ElementTree.fromstring(each) for each in found]


@pytest.mark.parametrize("make", [small_product, plain_study])
def test_the_files_say_the_same_twice_and_the_page_needs_no_other(make, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    study = make()
    outcomes = draw(study)
    files = write_report(study, outcomes, tmp_path / "a")
    assert sorted(tmp_path.joinpath("a").iterdir()) == sorted(files)
    page = report_page(study, outcomes[::-1])
    assert page.encode() == (tmp_path / "a" / "report.html").read_bytes()
    assert report_markdown(study, outcomes[::-1]).encode() == (tmp_path / "a" / "report.md").read_bytes()
    assert not re.search(r"https?://|<script|<link|<img|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", (tmp_path / "a" / "report.md").read_text())
    assert {tmp_path / "a" / each for each in pictures} == {each for each in files if each.suffix == ".png"}
    for each in pictures:
        image = Image.open(tmp_path / "a" / each)
        assert min(image.size) > 100 and image.convert("L").getextrema()[0] < 100, "something is drawn"


def test_json_is_read_back_and_makes_the_same_page(tmp_path):
    study = small_product(seeds=3)
    outcomes = changed(draw(study, iterations=2), "BN, batch 2", 1, metrics={"top1": math.nan})
    write_report(study, outcomes, tmp_path)
    content = json.loads((tmp_path / "study.json").read_text())
    block = content["statistics"]["metrics"]["top1"]
    assert block["summaries"]["BN, batch 2"]["n"] == 2 and len(block["comparisons"]) == 4
    read = read_outcomes(tmp_path / "study.json")
    assert report_page(*read).encode() == (tmp_path / "report.html").read_bytes()
    assert report_markdown(*read).encode() == (tmp_path / "report.md").read_bytes()


def test_page_and_markdown_want_no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    study = small_product(seeds=3)
    outcomes = draw(study, iterations=2)
    assert "<svg" in report_page(study, outcomes)
    assert render_docs({"a.json": (study, outcomes)}, "a.md").pictures


def test_numbers_in_the_report_are_those_of_the_statistics():
    study = small_product(seeds=15)
    found = study_statistics(study, outcomes := draw(study, iterations=2))["top1"]
    text = report_markdown(study, outcomes)
    for summary in found.summaries.values():
        assert f"{summary.mean:.2f} ± {summary.sd:.2f}" in text
    for each in found.comparisons:
        assert f"{each.difference:+.2f} ± {each.sd:.2f}" in text and f"{each.verdict} (n = 15)" in text
        assert f"{each.interval[0]:+.2f} to {each.interval[1]:+.2f}" in text and f"{each.d_z:+.2f}" in text
    assert "nderpowered" not in text.replace("Fewer than 15 pairs are labelled underpowered", "")


def test_fewer_seeds_are_labelled_wherever_something_is_said():
    study = small_product(seeds=5)
    outcomes = draw(study, iterations=2)
    found = study_statistics(study, outcomes)["top1"]
    for blocks in (best_blocks(study, "top1", found), comparison_blocks(study, "top1", found)):
        assert "n = 5, underpowered" in markdown(blocks)
    assert markdown(comparison_blocks(study, "top1", found)).count("(n = 5, underpowered)") == 4 + 2
    assert "**Underpowered**: 5 seeds" in report_markdown(study, outcomes)


def means_of(table: dict):
    return lambda levels, name: table[levels.get("norm", name), levels.get("batch")]


def test_the_best_is_named_with_those_that_it_is_not_told_apart_from():
    study = small_product(seeds=15)
    means = {("BN", "2"): 60, ("FBN, T=3", "2"): 70, ("GN", "2"): 70.01}
    means |= {("BN", "16"): 75, ("FBN, T=3", "16"): 72, ("GN", "16"): 65}
    outcomes = draw(study, 1, sd=0.3, mean=means_of(means), iterations=1)
    found = study_statistics(study, outcomes)["top1"]
    text = markdown(best_blocks(study, "top1", found))
    rows = {
        row[1].strip(): [cell.strip() for cell in row[2:-1]]
        for row in (line.split("|") for line in text.splitlines())
        if len(row) > 3
    }
    assert rows["batch 16"][0] == "**BN**" and rows["batch 16"][2:] == ["-", "FBN, T=3; GN"]
    assert {rows["batch 2"][0].strip("*"), rows["batch 2"][2]} == {"FBN, T=3", "GN"} and rows["batch 2"][3] == "BN"
    assert "in 1 of 2 settings, **BN** in 1. In 1 setting it is told apart from all others" in text
    assert "Nowhere beaten: none" in text and "Beaten everywhere: none" in text
    table = markdown(mean_blocks(study, "top1", found))
    assert re.search(r"\*\*7[45]\.\d+ ± 0\.\d+ °\*\*", table) and re.search(r"6[45]\.\d+ ± 0\.\d+ ↓ +\|", table)


@pytest.mark.parametrize("batches, heads", [(("2", "16"), ["batch 2", "batch 16"]), (("2 images", "16 images"),) * 2])
def test_a_column_is_headed_by_its_level_which_says_its_factor_only_if_it_is_a_number(batches, heads):
    study = product_study(norms=("BN", "GN"), batches=batches, sets=("CIFAR-10",))
    outcomes = draw(study, mean=lambda levels, name: 50.0)
    table = markdown(mean_blocks(study, "top1", study_statistics(study, outcomes)["top1"]))
    assert [cell.strip() for cell in table.split("|")[2:4]] == list(heads)


def test_a_page_of_several_studies_begins_with_who_is_not_beaten_where():
    small, detectors = small_product(seeds=15), plain_study(seeds=4)
    means = {("BN", "2"): 60, ("FBN, T=3", "2"): 70, ("GN", "2"): 65}
    means |= {("BN", "16"): 75, ("FBN, T=3", "16"): 72, ("GN", "16"): 65}
    studies = {
        "small.json": (small, draw(small, 1, sd=0.3, mean=means_of(means), iterations=1)),
        "detectors.json": (detectors, draw(detectors, mean=lambda levels, name: 9.0 if name == "GN" else 5.0)),
        "begun.json": (detectors, []),
    }
    glance = render_docs(studies, "page.md", "Which norm").text.split("## ")[1]
    assert glance.startswith("At a glance")
    assert "**Small batches**. The highest top-1 accuracy" in glance
    assert re.search(
        r"By the mean over the settings, told apart: FBN, T=3 higher than BN by \d\.\d+ ± 0\.\d+ points \(adj", glance
    )
    assert "**Table I, reduced**. **GN** has the highest mask AP" in glance and glance.count("Table I, reduced") == 1
    assert re.search(r"\| where +\| Small batches, top-1 accuracy \(%\) +\|", glance)
    assert re.search(r"\| batch 2 +\| FBN, T=3 +\|", glance) and re.search(r"\| batch 16 +\| BN +\|", glance)
    assert "At a glance" not in render_docs({"small.json": studies["small.json"]}, "page.md").text
    assert "At a glance" not in render_docs({"a.json": (detectors, []), "b.json": (detectors, [])}, "page.md").text


def test_of_a_loss_the_lowest_is_named():
    study = dataclasses.replace(small_product(seeds=15), metrics={"loss": LOSS})
    text = report_markdown(study, draw(study, iterations=1))
    assert "lowest validation loss" in text and "highest" not in text


def test_runs_without_a_figure_are_named_and_their_variant_is_not_called_best():
    study = plain_study(seeds=4)
    outcomes = draw(study, mean=lambda levels, name: 90.0 if name == "GN" else 50.0, iterations=1)
    outcomes = changed(outcomes, "GN", 2, state="failed", metrics={}, error="exit code 1: loss | is `nan`")
    outcomes = changed(outcomes, "BN", 3, metrics={"segm/AP": math.inf})
    outcomes = changed(outcomes, "FBN, T=3", 4, state="waiting", metrics={})
    text = report_markdown(study, outcomes)
    assert "1 failed, 1 diverged, 1 still to end" in text
    assert re.search(r"\| GN +\| +2 \| `` exit code 1: loss \\\| is `nan` ``", text)
    assert re.search(r"\| BN +\| +3 \| `no finite mask AP", text)
    assert "**FBN, T=5** has the highest" in text and "Left out: BN; FBN, T=3; GN" in text
    assert report_page(study, outcomes)


def test_a_variant_that_is_alone_is_not_told_apart_from_others_that_were_not_tested():
    study = small_product()
    outcomes = [each for each in draw(study) if each.levels["norm"] == "BN"]
    found = study_statistics(study, outcomes)["top1"]
    text = markdown(best_blocks(study, "top1", found))
    assert "In no setting is it told apart from all others that were tested" in text


@pytest.mark.parametrize("seeds", [0, 1, 2])
@pytest.mark.parametrize("make", [small_product, plain_study])
def test_hardly_any_runs_are_a_report(make, seeds):
    study = make(seeds=3)
    outcomes = [each for each in draw(study, iterations=seeds) if each.seed <= seeds]
    for text in (report_page(study, outcomes), report_markdown(study, outcomes)):
        assert "still to end" in text and "named the best" in text and not re.search(r"\bnan\b|\binf\b|None", text)
    assert render_docs({"a.json": (study, outcomes)}, "a.md").text


def test_figures_of_any_size_and_equal_ones_are_drawn():
    study = plain_study(seeds=3)
    for scale in (0.0, 1e-12, 1e12):
        outcomes = draw(study, mean=lambda levels, name: scale, sd=0.0, iterations=3)  # noqa: B023
        page = report_page(study, outcomes)
        assert "nan" not in page and len(svgs(page)) >= 3


def test_names_are_escaped_in_all_forms():
    name = "a|b <i>*c*</i> & `d`\n_e_"
    study = plain_study(variants=("BN", name), seeds=3)
    study = dataclasses.replace(study, title=name, comparisons=[Comparison(name, "BN", "<g>|")])
    outcomes = draw(study, iterations=3)
    page, text = report_page(study, outcomes), report_markdown(study, outcomes)
    assert "<i>" not in page and "a|b &lt;i&gt;*c*&lt;/i&gt; &amp; `d`\\n_e_" in page and len(svgs(page)) >= 3
    tables = re.findall(r"(?m)(?:^\|.*\n)+", text)
    assert len(tables) >= 4
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert r"a\|b \<i>\*c\*\</i> & \`d\`" in text


def test_pictures_show_the_summaries():
    study = small_product(seeds=5, metrics={"a": TOP1, "b": LOSS})
    found = study_statistics(study, outcomes := draw(study))
    figures = {(each.metric, each.name): each for each in study_figures(study, outcomes, found)}
    assert {name for _, name in figures} == {
        f"{metric}-{kind}" for metric in "ab" for kind in ("by-batch", "by-batch-each", "differences", "curves")
    }
    (panel,) = figures["a", "a-by-batch"].panels
    for line in panel.lines:
        variants = [f"{line.label}, batch {batch}" for batch in ("2", "16")]
        assert line.y == [found["a"].summaries[each].mean for each in variants]
        assert line.intervals == [found["a"].summaries[each].interval for each in variants]
    assert panel.is_log and panel.ticks == [2, 16] and panel.y_label == "top-1 accuracy (%)"
    rows = [row for panel in figures["b", "b-differences"].panels for row in panel.rows]
    assert [row.middle for row in rows] == [each.difference for each in found["b"].comparisons]
    curves = figures["a", "a-curves"]
    assert [panel.title for panel in curves.panels] == ["batch 2", "batch 16"]
    assert curves.panels[0].lines[0].x[-1] == 10_000 and len(curves.legend) == 3
    last = curves.panels[0].lines[0]
    assert last.y[-1] == pytest.approx(found["a"].summaries["BN, batch 2"].mean)
    for each in figures.values():
        root = ElementTree.fromstring(figure_file(each))
        assert float(root.get("width")) < 1100 and "nan" not in ElementTree.tostring(root, "unicode")


@pytest.mark.parametrize(
    "study",
    [
        small_product(seeds=3),
        plain_study(variants=("BN", "a" * 60 + "b" * 60, *(f"a norm of a long name {i}" for i in range(24))), seeds=3),
        small_product(seeds=3, metrics={"top1": dataclasses.replace(TOP1, label="what takes many words to say " * 8)}),
    ],
)
def test_all_that_is_drawn_lies_within_its_picture(study):
    for svg in svgs(report_page(study, draw(study, iterations=3))):
        _, _, width, height = map(float, svg.get("viewBox").split())
        for inner in svg.findall("svg"):  # which cuts off what lies outside
            svg.remove(inner)
        for each in svg.iter():
            places = [(each.get("x"), each.get("y"))] if each.get("x") else [(each.get("cx"), each.get("cy"))]
            places = [place for place in places if place[0]] + re.findall(r"(-?[\d.]+) (-?[\d.]+)", each.get("d", ""))
            assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in places), each.attrib
            if each.get("x"):
                start = float(each.get("x")) - 5.2 * len(each.text) * SHARE_BEFORE[each.get("text-anchor", "start")]
                assert start > -8 and start + 5.2 * len(each.text) < width + 8, each.text


def test_each_comparison_says_within_what_it_is():
    """Also those that a claim adds, of which the study names no group."""
    study = small_product(seeds=3)
    more = [
        Comparison("GN, batch 2", "FBN, T=3, batch 2"),
        Comparison("BN, batch 16", "BN, batch 2"),
        Comparison("GN, batch 16", "GN, batch 2"),
        Comparison("GN, batch 16", "BN, batch 2"),
    ]
    study = dataclasses.replace(study, comparisons=[*study.comparisons, *more])
    outcomes = draw(study, iterations=3)
    found = study_statistics(study, outcomes)
    groups = comparison_groups(study, found["top1"].comparisons)
    assert [(each.title, each.baseline, [tuple(row[1:]) for row in each.rows]) for each in groups] == [
        ("batch 2", "", [("FBN, T=3", "BN"), ("GN", "BN"), ("GN", "FBN, T=3")]),
        ("batch 16", "BN", [("FBN, T=3", "BN"), ("GN", "BN")]),
        ("batch 16 minus batch 2", "", [("BN", ""), ("GN", "")]),
        ("", "BN, batch 2", [("GN, batch 16", "BN, batch 2")]),
    ]
    text = markdown(comparison_blocks(study, "top1", found["top1"]))
    assert "batch 16 minus batch 2, top-1 accuracy:" in text and "top-1 accuracy minus that of BN, batch 2:" in text
    assert "difference ± sd (points)" in text
    (figure,) = (each for each in study_figures(study, outcomes, found) if each.kind == "differences")
    assert [(panel.title, panel.x_label) for panel in figure.panels] == [
        ("batch 2", "top-1 accuracy minus its baseline (points)"),
        ("batch 16", "top-1 accuracy minus BN (points)"),
        ("batch 16 minus batch 2", "difference of top-1 accuracy (points)"),
        ("", "top-1 accuracy minus BN, batch 2 (points)"),
    ]
    assert [row.label for row in figure.panels[0].rows] == ["FBN, T=3 minus BN", "GN minus BN", "GN minus FBN, T=3"]
    assert len({panel.x_range for panel in figure.panels}) == 1


def test_of_what_has_no_better_end_no_best_is_named():
    share = Metric(False, "", "share of values left out", is_ranked=False)
    study = small_product(seeds=3, metrics={"share": share})
    outcomes = draw(study, iterations=3)
    found = study_statistics(study, outcomes)["share"]
    assert found.best == [] and best_blocks(study, "share", found) == []
    means = markdown(mean_blocks(study, "share", found))
    assert "Bold" not in means and "**" not in means and "°" not in means
    header = markdown(comparison_blocks(study, "share", found))
    assert "p two-sided" in header and "p better (Holm)" not in header


def test_levels_that_are_numbers_are_told_with_their_factor():
    study = product_study(norms=("0.05", "0.1"), batches=("2", "16"), sets=("one",), seeds=3)
    outcomes = draw(study, mean=lambda levels, name: 60.0 + 100 * float(levels["norm"]), iterations=3)
    found = study_statistics(study, outcomes)
    text = report_markdown(study, outcomes, found)
    assert "**norm 0.1** in 2 of 2 settings" in text and "minus that of norm 0.05:" in text
    assert "mean over 2 settings, top-1 accuracy minus that of norm 0.05:\n\n| variant" in text
    figures = study_figures(study, outcomes, found)
    lines = [line.label for panel in figures[0].panels for line in panel.lines]
    assert lines == ["norm 0.05", "norm 0.1"]
    assert all(len({line.style for line in panel.lines}) == 2 for panel in figures[0].panels)


def test_styles_differ_where_there_are_more_variants_than_colours():
    study = plain_study(variants=tuple(f"norm {i}" for i in range(19)), seeds=3)
    page = report_page(study, draw(study, iterations=3))
    kinds = re.findall(r'<g class="(s\d(?: d\d)?)"><path class="line"[^>]*/>(?:<circle|<path class="mark")', page)
    assert len(svgs(page)) >= 3 and len(set(re.findall(r'class="(s\d d\d)"', page))) >= 11, kinds


def test_long_curves_keep_their_end():
    study = plain_study(variants=("BN", "FBN"), seeds=3)
    found = study_statistics(study, outcomes := draw(study, iterations=1_000))
    curves = next(each for each in study_figures(study, outcomes, found) if each.kind == "curves")
    for line in curves.panels[0].lines:
        assert len(line.x) <= 60 and line.x[-1] == 500_000


def curves_of(levels: dict[str, list[list[float]]]):
    """The picture of curves: of each variant what its seeds reached."""
    study = plain_study(variants=tuple(levels), seeds=max(map(len, levels.values())))
    outcomes = [
        Outcome(
            name, seed, seed, "done", metrics={"segm/AP": y[-1]}, curves={"segm/AP": list(zip(range(10, 999, 10), y))}
        )
        for name, runs in levels.items()
        for seed, y in enumerate(runs, 1)
    ]
    figures = study_figures(study, outcomes, study_statistics(study, outcomes))
    return next((each for each in figures if each.kind == "curves"), None)


def test_curves_show_what_is_to_be_seen():
    assert curves_of({"BN": [[1.0, 2.0]], "GN": [[2.0, 3.0]]}) is None  # a line of two points says nothing
    steep = curves_of({"BN": [[0.0, 98.0, 98.5, 98.5, 99.0]], "GN": [[0.0, 98.5, 99.0, 99.0, 99.5]]})
    assert steep.panels[0].y_range == (98.0, 99.5) and "first quarter is cut off" in steep.caption
    flat = curves_of({"BN": [[1.0, 3.0, 2.0, 3.0]], "GN": [[1.5, 3.0, 3.0, 2.0]]})
    assert flat.panels[0].y_range is None and "cut off" not in flat.caption and not flat.panels[0].is_log_y
    apart = curves_of({"BN": [[0.01, 0.02, 0.01]], "GN": [[1.0, 2.0, 1.5]]})
    assert apart.panels[0].is_log_y and apart.panels[0].y_range is None
    grid = re.findall(r'class="grid" d="M[\d.]+ ([\d.]+)L', figure_file(apart).decode())
    heights = [float(y) for y in grid]
    decades = [a - b for a, b in zip(heights, heights[2:])]  # a line at 1 and at 3 of each
    assert len(decades) >= 2 and max(decades) - min(decades) < 0.3 and figure_png(apart).startswith(b"\x89PNG")


def test_a_band_stays_within_what_runs_reached():
    line = (
        curves_of({"BN": [[0.0, 0.0, 9.0], [0.0, 0.0, 1.0], [9.0, 6.0, 2.0]], "GN": [[1.0] * 3] * 3}).panels[0].lines[0]
    )
    assert [interval[0] for interval in line.intervals] == [0.0, 0.0, 1.0]
    assert all(low <= y <= high <= 9.0 for y, (low, high) in zip(line.y, line.intervals))


def test_the_docs_page_is_made_from_files(tmp_path):
    names = []
    for i, study in enumerate((small_product(), plain_study())):
        names.append(tmp_path / f"{i}.json")
        write_outcomes(names[-1], study, draw(study, iterations=2))
    page = tmp_path / "which-norm.md"
    files = write_docs(names, page, "Which norm")
    text = page.read_text()
    command = f"python tools/study.py report --from {names[0]} --from {names[1]} --markdown {page} --title 'Which norm'"
    assert text.startswith("# Which norm\n") and command in text
    assert "## Small batches" in text and "## Table I, reduced" in text and text.count("train_torchvision.py") == 1
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", text)
    assert sorted(tmp_path / each for each in pictures) == sorted(files[1:]) and len(set(pictures)) == 4
    before = {each: each.read_bytes() for each in files}
    assert write_docs(names, page, "Which norm") == files
    assert before == {each: each.read_bytes() for each in files}


def test_a_product_of_many_variants_is_told_by_its_levels():
    study = product_study(batches=("2", "4", "16"), sets=("one",), seeds=3)
    study = dataclasses.replace(
        study,
        variants={
            name: dataclasses.replace(
                each, settings={**each.settings, "SEED_OF_ALL": 1, "MODEL.NORM": each.levels["norm"]}
            )
            for name, each in study.variants.items()
        },
    )
    text = render_docs({"a.json": (study, draw(study, iterations=1))}, "a.md").text
    assert len(study.variants) == 24 and "What all variants of a level set" in text and "SEED_OF_ALL" not in text
    assert "\nFBN, T=3: MODEL.NORM FBN, T=3\n" in text and "\nbatch 16: SOLVER.IMS_PER_BATCH 16\n" in text


def test_a_setting_that_all_variants_replace_is_told_as_they_have_it():
    study = small_product(seeds=3)
    variants = {
        name: dataclasses.replace(each, settings={**each.settings, "REPLACED": "two", "OWN": name})
        for name, each in study.variants.items()
    }
    study = dataclasses.replace(study, settings={"SHARED": 1, "REPLACED": 2, "OWN": 3}, variants=variants)
    facts = dict(re.findall(r"\| `(\w+)` +\| `(\w+)` +\|", report_markdown(study, draw(study, iterations=1))))
    assert facts == {"SHARED": "1", "REPLACED": "two"}


def test_a_factor_without_numbers_and_variants_without_comparisons():
    study = small_product(seeds=3)
    renamed = {
        name: Variant({"norm": each.levels["norm"], "size": f"size {each.levels['batch']}"})
        for name, each in study.variants.items()
    }
    study = dataclasses.replace(
        study, factors={"norm": study.factors["norm"], "size": ["size 2", "size 16"]}, variants=renamed, comparisons=[]
    )
    text = report_markdown(study, draw(study, iterations=2, mean=lambda levels, name: 50.0))
    assert "top1-by-variant.png" in text and "### Comparisons" not in text
    assert re.search(r"\| norm +\| +size 2 +\| +size 16 +\|", text) and "size size" not in text


# ---- the parts


def test_markdown_and_html_of_blocks():
    blocks = [
        Heading(2, "A # b"),
        Paragraph(("x ", Strong("y*"), Mono("k`"), " d_z < 1 _e_ &lt;"), "note"),
        Table([["name", "n"], [Mono("a|b"), "1"]]),
        Code(["one", "two"], "Lines"),
    ]
    assert markdown(blocks) == (
        "## A \\# b\n\nx **y\\***`` k` `` d_z < 1 \\_e\\_ \\&lt;\n\n"
        "| name   |   n |\n|--------|----:|\n| `a\\|b` |   1 |\n\nLines:\n\n```\none\ntwo\n```\n"
    )
    page = html_page("T $title", blocks)
    assert "<title>T $title</title>" in page and "<h2>A # b</h2>" in page
    assert '<p class="note">x <strong>y*</strong><code>k`</code> d_z &lt; 1 _e_ &amp;lt;</p>' in page
    assert '<td class="text"><code>a|b</code></td><td>1</td>' in page
    assert "<details><summary>Lines</summary><pre>one\ntwo</pre></details>" in page


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (-3, 7, [-2, 0, 2, 4, 6]), (64.2, 72.9, [66, 68, 70, 72]), (5, 5, [5])],
)
def test_ticks_are_round(low, high, ticks):
    assert nice_ticks(low, high) == ticks
    assert [tick_text(each, [0.1, 0.25]) for each in (0.1, 0.25)] == ["0.10", "0.25"]


def test_labels_are_spread():
    assert _spread([10, 11, 50], 10, 0, 100) == pytest.approx([5.5, 15.5, 50])
    assert _spread([1, 2, 3], 10, 0, 100) == pytest.approx([0, 10, 20])
    assert _spread([99, 100], 10, 0, 100) == pytest.approx([90, 100])
