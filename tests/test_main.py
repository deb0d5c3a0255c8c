"""``python -m fbn_plugin``: another's script runs as without us, and knows the norms in all of its processes."""

import multiprocessing.spawn
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fbn_plugin
from fbn_plugin import __main__ as command

ROOT = Path(__file__).parents[1]

FACTS = """
import sys
from beside import where

def fail():
    raise KeyError(where)

if __name__ == "__main__":
    main = sys.modules["__main__"]
    print([sys.argv, sys.path[0], __file__, __spec__, __package__, __cached__, type(__loader__).__name__])
    print(vars(main) is globals(), sorted(name for name in vars(main) if name != "__annotations__"))
    fail()
"""

CHILDREN = """
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

@dataclass
class Size:
    channels: int

def build(size):
    import fbn_plugin
    from timm.layers import get_norm_layer
    kinds = [type(get_norm_layer(name)(size.channels)).__name__ for name in ("fbn", "quietbn")]
    return [__name__, sys.argv[1:], *kinds]

def build_in_child(size):
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return [build(size), pool.submit(build, size).result()]

if __name__ == "__main__":
    for method in ("spawn", "forkserver"):
        with ProcessPoolExecutor(1, get_context(method)) as pool:
            print(pool.submit(build_in_child if method == "spawn" else build, Size(4)).result())
"""

LAUNCH = """
from detectron2.engine import launch
from detectron2.layers import get_norm
from detectron2.utils import comm

def main(norm):
    names = comm.gather(type(get_norm(norm, 8)).__name__)
    if comm.is_main_process():
        print(names)

if __name__ == "__main__":
    launch(main, 2, dist_url="auto", args=("FBN",))
"""

NORM = """
from torch import nn
from fbn_plugin import NORMS

@NORMS.register()
class QuietBN(nn.BatchNorm2d):
    pass
"""


def run(*arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)


@pytest.fixture
def process(monkeypatch):
    """What running a script changes in a process is changed back."""
    before = dict(fbn_plugin.NORMS)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(multiprocessing.spawn, "get_preparation_data", multiprocessing.spawn.get_preparation_data)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setenv("FBN_PLUGIN_SCRIPT", "")
    yield
    fbn_plugin.unregister()
    for name in set(dict(fbn_plugin.NORMS)) - set(before):
        del fbn_plugin.NORMS._obj_map[name]


def test_a_script_finds_what_it_finds_without_us(tmp_path):
    (tmp_path / "scripts").mkdir()
    write(tmp_path / "scripts", facts=FACTS, beside="where = 'beside'")
    plain = run("scripts/facts.py", "--epochs", "3", "-m", cwd=tmp_path)
    ours = run("-m", "fbn_plugin", "scripts/facts.py", "--epochs", "3", "-m", cwd=tmp_path)
    assert plain.returncode == 1 and "KeyError: 'beside'" in plain.stderr
    assert (ours.stdout, ours.stderr, ours.returncode) == (plain.stdout, plain.stderr, plain.returncode)


def test_processes_that_are_started_anew_know_the_norms(tmp_path):
    """By spawn and by forkserver, and those that they start."""
    write(tmp_path, children=CHILDREN, norms_of_quietbn=NORM)
    done = run("-m", "fbn_plugin", "--import", "norms_of_quietbn.py", "children.py", "--epochs", "3", cwd=tmp_path)
    built = str(["__mp_main__", ["--epochs", "3"], "FilteredBatchNorm2d", "QuietBN"])
    assert done.stdout == f"[{built}, {built}]\n{built}\n", done.stderr


@pytest.mark.detectron2
def test_detectron2s_processes_know_the_norms(tmp_path):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    write(tmp_path, launched=LAUNCH)
    done = run("-m", "fbn_plugin", "launched.py", cwd=tmp_path)
    assert done.stdout == "['FilteredBatchNorm2d', 'FilteredBatchNorm2d']\n", done.stderr


def test_torchrun(tmp_path):
    write(tmp_path, build="import os, timm\nprint(timm.create_model('test_resnet', norm_layer='fbn').bn1.t_sigma)")
    done = run("-m", "torch.distributed.run", "--nproc-per-node=1", "-m", "fbn_plugin", "build.py", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "5.0\n", done.stderr


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("name, module", [("parts", "parts.__main__"), ("parts.step", "parts.step")])
def test_a_module(tmp_path, monkeypatch, capsys, name, module):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "parts").mkdir()
    body = (
        "import sys\nfrom . import number\nprint(__name__, __spec__.name, __package__, sys.argv, number)\nsys.exit(3)"
    )
    write(tmp_path / "parts", __init__="number = 7", __main__=body, step=body)
    with pytest.raises(SystemExit) as stop:
        command.main(["-m", name, "-m", "--import", "--"])
    file = str(tmp_path.joinpath(*module.split("."))) + ".py"
    expected = ("__main__", module, "parts", [file, "-m", "--import", "--"], 7)
    assert stop.value.code == 3 and capsys.readouterr().out == " ".join(map(str, expected)) + "\n"
    for part in [key for key in sys.modules if key.partition(".")[0] == "parts"]:
        del sys.modules[part]


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "no script is given"),
        (["-m"], "-m wants the name of a module"),
        (["nowhere.py"], "the script nowhere.py is not there"),
        (["."], "the script . is a folder"),
        (["-m", "no_such_module_at_all"], "-m no_such_module_at_all: there is no such module"),
        (["-m", "json.tool.part"], "-m json.tool.part: there is no such module"),
        (["-m", "json"], "-m json: a package without a module __main__"),
        (["-m", "tools/train_net.py"], "-m wants the name of a module, got 'tools/train_net.py'"),
        (["--resume", "train.py"], "unrecognized arguments: --resume; those of the script stand behind it"),
        (["--import"], "--import: expected one argument"),
        (["--import", "nowhere.py", __file__], "--import nowhere.py: the file is not there"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0 and "python -m fbn_plugin" in (said := capsys.readouterr().out) and "SCRIPT" in said
