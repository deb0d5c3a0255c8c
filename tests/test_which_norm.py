"""docs/which-norm.md is what the command on it makes of the kept figures."""

import itertools
import re
import shlex
from pathlib import Path

from fbn_plugin.engine.studies.outcomes import read_outcomes
from fbn_plugin.engine.studies.report import render_docs

ROOT = Path(__file__).parents[1]
PAGE = "docs/which-norm.md"


def test_the_page_is_made_of_the_kept_figures(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = Path(PAGE).read_text(encoding="utf-8")
    command = shlex.split(re.search(r"^python tools/study.py report (.*)$", text, re.MULTILINE)[1])
    kept = [value for flag, value in itertools.pairwise(command) if flag == "--from"]
    title = command[command.index("--title") + 1]
    made = render_docs({name: read_outcomes(name) for name in kept}, PAGE, title)
    assert made.text == text
    pictures = {path.name: path.read_bytes() for path in Path("docs").glob("which-norm*.svg")}
    assert pictures == {name: bytes(data) for name, data in made.pictures.items()}
