"""The README is short, its links lead somewhere, and its Python snippets run as they are printed."""

import re
import statistics
from pathlib import Path

import pytest
import yaml
from documentation import run_snippet, snippets

import fbn_plugin
from fbn_plugin.engine.studies.outcomes import read_outcomes

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")


@pytest.mark.parametrize("snippet", snippets(README))
def test_snippet_runs(snippet):
    run_snippet(snippet)


def test_there_is_one_for_each_framework():
    text = "".join(snippet.values[0] for snippet in snippets(README))
    assert all(name in text for name in ("detectron2", "timm", "torchvision"))


def test_it_is_short():
    lines = TEXT.splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 150


def test_it_links_to_every_page():
    pages = {f"docs/{page.name}" for page in ROOT.glob("docs/*.md")} - {"docs/index.md"}
    assert pages <= set(re.findall(r"\]\(([^)#]+)", TEXT))


@pytest.mark.parametrize(
    ("row", "study", "where"),
    [
        ("mask AP, narrow Mask R-CNN", "p0_tab1-cpu", ""),
        ("top-1, narrow ResNet on CIFAR-10 (JPEG), batches of 2", "x_small_batches-cpu", ", batch 2"),
        ("top-1, the same, batches of 16", "x_small_batches-cpu", ", batch 16"),
    ],
)
def test_its_accuracies_are_those_of_the_studies(row, study, where):
    study, outcomes = read_outcomes(ROOT / f"benchmarks/papers/{study}.json")
    line = next(line for line in TEXT.splitlines() if line.startswith(f"| {row}"))
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    for cell, norm in zip(cells, ("BN", "FBN, T=5", "GN"), strict=True):
        figures = [each.metrics[next(iter(study.metrics))] for each in outcomes if each.variant == norm + where]
        assert len(figures) == 15 and cell == f"{statistics.fmean(figures):.1f} ± {statistics.stdev(figures):.1f}"


def test_the_citation_is_of_this_version_and_names_every_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == fbn_plugin.__version__
    papers = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (.*?), \*(.*?)\*", papers, re.MULTILINE)
    cited = {(paper["authors"][0]["family-names"], paper["title"].split(":")[0]) for paper in citation["references"]}
    assert cited == {(authors.split(" and ")[0], title) for authors, title in table}
