"""tools/check_detectron2_tests.py on a small folder of tests: what is equal, and what the plugin changes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "check_detectron2_tests.py"
TESTS = """
import unittest
class Test(unittest.TestCase):
    def test_passes(self): pass
    def test_fails(self): assert False
    @unittest.skip("so")
    def test_is_skipped(self): pass
"""


def run(*arguments):
    environment = {"PYTHONPATH": str(TOOL.parents[1])}
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_not_a_folder(tmp_path):
    result = run(tmp_path / "nowhere")
    assert result.returncode == 2 and result.stderr == f"error: {tmp_path / 'nowhere'} is not a folder\n"


@pytest.mark.detectron2
def test_differences_are_found(tmp_path):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(TESTS)
    result = run(tmp_path / "tests")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "without the plugin: 1 failed, 1 passed, 1 skipped",
        "with the plugin: 1 failed, 1 passed, 1 skipped",
        "0 of 3 tests end otherwise with the plugin",
    ]
    norm = (
        "from detectron2.layers import get_norm\ndef test_name(): assert get_norm.__module__.startswith('detectron2')\n"
    )
    (tmp_path / "tests" / "test_more.py").write_text(norm)
    result = run(tmp_path / "tests", "-k", "name")
    assert result.returncode == 1
    assert "test_more.test_name: passed without, failed with the plugin" in result.stdout
