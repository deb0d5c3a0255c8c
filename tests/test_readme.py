"""The README is short, its links lead somewhere, and its Python snippets run as they are printed."""

import re
from pathlib import Path

import pytest
import yaml
from documentation import run_snippet, snippets

import fbn_plugin

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


def test_links_lead_to_files():
    targets = re.findall(r"\]\(([^)#]+)", TEXT)
    assert len(targets) > 10
    assert [target for target in targets if "://" not in target and not (ROOT / target).exists()] == []


def test_it_links_to_every_page():
    pages = {f"docs/{page.name}" for page in ROOT.glob("docs/*.md")} - {"docs/index.md"}
    assert pages <= set(re.findall(r"\]\(([^)#]+)", TEXT))


def test_its_accuracies_are_those_of_the_studies():
    studies = (ROOT / "docs/which-norm.md").read_text(encoding="utf-8")
    found = re.findall(r"\d+\.\d ± \d+\.\d", TEXT)
    assert len(found) >= 9 and all(re.search(rf"(?<![\d.]){re.escape(each)}(?![\d.])", studies) for each in found)


def test_the_citation_is_of_this_version_and_names_every_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == fbn_plugin.__version__
    papers = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (.*?), \*(.*?)\*", papers, re.MULTILINE)
    cited = {(paper["authors"][0]["family-names"], paper["title"].split(":")[0]) for paper in citation["references"]}
    assert cited == {(authors.split(" and ")[0], title) for authors, title in table}
