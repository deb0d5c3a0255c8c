"""Python snippets of Markdown files, and how a test runs one: shared by the tests of README, docs/ and
docstrings."""

import contextlib
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
    for package in ("detectron2", "mmcv", "transformers", "ultralytics"):
        if package in snippet:
            pytest.importorskip(package, reason=f"{package} is not installed")
    with names_as_before():
        exec(compile(snippet, "snippet", "exec"), {"__name__": "snippet"})


@contextlib.contextmanager
def names_as_before():
    """Frameworks know no norms afterwards, and the registry those that it knew before."""
    norms = dict(fbn_plugin.NORMS)
    try:
        yield
    finally:
        fbn_plugin.unregister()
        for name in set(dict(fbn_plugin.NORMS)) - set(norms):
            del fbn_plugin.NORMS._obj_map[name]
