"""The examples in the docstrings of studies run as they are printed."""

import doctest
import importlib
from pathlib import Path

import pytest

import fbn_plugin.engine.studies as studies

pytest.importorskip("scipy", reason="scipy is not installed")
FILES = sorted(Path(studies.__path__[0]).glob("*.py"))
MODULES = [path.stem for path in FILES if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    assert doctest.testmod(importlib.import_module(f"{studies.__name__}.{name}")).failed == 0
