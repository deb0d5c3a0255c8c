"""Nothing in a file that a tool is given runs. Each file here would leave a canary if it did; what reads pickles has
tests of its own beside it.
"""

import pytest

from fbn_plugin.engine.run.config import read_config

CANARY = "a_file_ran_code"
TAGS = [
    f'!!python/object/apply:os.system ["touch {CANARY}"]',
    f'!!python/object/new:io.FileIO ["{CANARY}", "w"]',
    f"!!python/object/apply:builtins.open ['{CANARY}', 'w']",
    "!!python/name:os.system",
    "!!python/module:os",
]


@pytest.fixture(autouse=True)
def canary(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / CANARY).exists()


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("as_base", [False, True])
def test_tags_of_yaml_call_nothing(tag, as_base):
    with open("x.yaml", "w") as file:
        file.write(f"OUTPUT_DIR: {tag}\n")
    with open("y.yaml", "w") as file:
        file.write("_BASE_: x.yaml\n")
    with pytest.raises(ValueError, match=r"^[^\n]*\.yaml[^\n]*python/[^\n]*$"):
        read_config("y.yaml" if as_base else "x.yaml")


@pytest.mark.detectron2
@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("as_base", [False, True])
def test_tags_of_yaml_call_nothing_in_detectron2_runs(tag, as_base):
    """Its CfgNode lets them, unless it is told otherwise."""
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from fbn_plugin.engine.detectron2.config import load_config

    with open("x.yaml", "w") as file:
        file.write(f"OUTPUT_DIR: {tag}\n")
    with open("y.yaml", "w") as file:
        file.write("_BASE_: x.yaml\n")
    with pytest.raises(ValueError, match=r"^[^\n]*python/[^\n]*$"):
        load_config("y.yaml" if as_base else "x.yaml", [])


@pytest.mark.detectron2
def test_files_of_proposals_are_not_unpickled(tmp_path):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from tiny_detectron2 import prepare

    with pytest.raises(ValueError, match=r"MODEL\.LOAD_PROPOSALS must be False as detectron2 unpickles .*, got True"):
        prepare("MODEL.LOAD_PROPOSALS", "True", "DATASETS.PROPOSAL_FILES_TRAIN", "('x.pkl',)", "OUTPUT_DIR", tmp_path)
