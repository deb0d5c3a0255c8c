"""Python snippets of Markdown files, and how a test runs one: shared by the tests of README and docs/."""

import re
from pathlib import Path

import pytest

import fbn_plugin


def snippets(page: Path) -> list:
    """The fenced Python blocks of a page, as parameters of a test with their page and number for a name."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [pytest.param(block, id=f"{page.stem}{i}") for i, block in enumerate(blocks)]


def run_snippet(snippet: str) -> None:
    """Run it in a namespace of its own; what it registers is gone afterwards."""
    if "detectron2" in snippet:
        pytest.importorskip("detectron2", reason="detectron2 is not installed")
    norms = dict(fbn_plugin.NORMS)
    try:
        exec(compile(snippet, "snippet", "exec"), {"__name__": "snippet"})
    finally:
        fbn_plugin.unregister()
        for name in set(dict(fbn_plugin.NORMS)) - set(norms):
            del fbn_plugin.NORMS._obj_map[name]
