"""``tools/sync_cost.py``: the tables that the documentation prints."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    pytest.importorskip("torchvision")
    spec = importlib.util.spec_from_file_location("sync_cost", ROOT / "tools" / "sync_cost.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        spec.loader.exec_module(module)
    return module


def test_the_documentation_has_its_tables(tool):
    """Whoever changes what is exchanged, or the model, makes the tables anew."""
    text = tool.main([])
    assert "53 synchronized norms, 26,560 channels" in text
    assert text in (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


def test_options_change_the_model(tool, capsys):
    near, far = (tool.main(["--gpus", "16", "--ring-hop", hop]).splitlines()[4].split("|") for hop in ("1", "100"))
    assert float(far[6]) > 5 * float(near[6]) and far[7] == near[7]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--gpus", "0"], "must be 1 or more, got 0"),
        (["--tree-hop", "nan"], "must be above 0, got nan"),
        (["--steps", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_input_is_answered_in_a_sentence(tool, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        tool.main(arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err
