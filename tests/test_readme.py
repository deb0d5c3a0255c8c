"""The README's Python snippets run as they are printed."""

import re
from pathlib import Path

import pytest

import fbn_plugin

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize(
    "snippet", SNIPPETS, ids=[s.split("import ")[-1].split()[0] + str(i) for i, s in enumerate(SNIPPETS)]
)
def test_snippet_runs(snippet):
    if "detectron2" in snippet:
        pytest.importorskip("detectron2", reason="detectron2 is not installed")
    try:
        exec(compile(snippet, "README", "exec"), {})
    finally:
        fbn_plugin.unregister()


def test_every_config_that_is_named_exists():
    texts = [README.read_text(encoding="utf-8"), *(p.read_text(encoding="utf-8") for p in ROOT.glob("tools/*.py"))]
    named = {name for text in texts for name in re.findall(r"configs/[\w/-]+\.yaml", text)}
    assert len(named) > 3 and [name for name in named if not (ROOT / name).is_file()] == []


def test_there_is_one_for_each_framework():
    text = "".join(SNIPPETS)
    assert all(name in text for name in ("detectron2", "timm", "torchvision"))


def test_the_table_of_norms_is_the_registry():
    named = set(
        re.findall(
            r"`([\w-]+)`", "".join(re.findall(r"^\| (`.*?) \|", README.read_text(encoding="utf-8"), re.MULTILINE))
        )
    )
    assert {name for name, _ in fbn_plugin.NORMS} <= named
