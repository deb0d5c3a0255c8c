"""tools/check_peer_tests.py on a small folder of tests: what is equal, and what the plugin changes."""

import importlib.util
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "check_peer_tests.py"
_spec = importlib.util.spec_from_file_location(TOOL.stem, TOOL)
tool = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tool)

TESTS = """
import unittest
class Test(unittest.TestCase):
    def test_passes(self): pass
    def test_fails(self): assert False
    @unittest.skip("so")
    def test_is_skipped(self): pass
"""
MODELS = """
import timm, pytest
@pytest.mark.parametrize("model_name", ["test_resnet", "resnet18", "levit_128s"])
def test_norm(model_name):
    import torch
    model = timm.create_model(model_name)
    kinds = {type(m) for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
    assert all(kind.__module__.startswith(("torch.", "timm.")) for kind in kinds), "what is filtered"
"""


@pytest.fixture
def tests(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(TESTS)
    return tmp_path / "tests"


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        tool.main(list(map(str, arguments)))
    assert exit.value.code == 2
    return capsys.readouterr().err


def test_wrong_arguments(tmp_path, tests, capsys):
    assert refusal(capsys, "timm", tmp_path / "nowhere") == f"error: {tmp_path / 'nowhere'} is no file or folder\n"
    assert "unknown norm 'FBM' (did you mean" in refusal(capsys, "timm", tests, "--norm", "FBM")
    error = refusal(capsys, "timm", tests, "--models", "all", "--no-such-option")
    assert error.startswith(f"error: pytest ended with 4 on {tests}: ")


def test_differences_are_found(tests, capsys):
    pytest.importorskip("timm")
    (tests / "test_more.py").write_text(MODELS)
    arguments = ["timm", tests, "--models", "test_resnet,levit_128s", "--route", "register", "norm_layer"]
    assert tool.main(list(map(str, arguments))) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "without the plugin: 1 failed, 3 passed, 1 skipped",
        "with the plugin, register: 1 failed, 3 passed, 1 skipped",
        "0 of 5 tests end otherwise with the plugin",
    ]
    what = "passed without, failed with the plugin (AssertionError: what is filtered"
    assert lines[3] == "with the plugin, norm_layer: 3 failed, 1 passed, 1 skipped"
    assert lines[4].startswith(f"tests.test_more.test_norm[levit_128s]: {what}")
    assert lines[-1] == "2 of 5 tests end otherwise with the plugin"


@pytest.mark.detectron2
def test_detectron2(tests, capsys):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    assert tool.main(["detectron2", str(tests), "--route", "convert"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 of 3 tests end otherwise with the plugin"
