"""``--import``: a norm that a file or a module of the user's registers, in the tools."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fbn_plugin import NORMS
from fbn_plugin.engine.run import cli

ROOT = Path(__file__).parents[2]
CLASSIFICATION = ["train_classification.py", "--config-file", ROOT / "configs/Digits/test_resnet_FBN.yaml"]
QUICK = ["SOLVER.MAX_ITER", "2", "MODEL.NAME", "test_byobnet"]
NORM = """
from torch import nn

from fbn_plugin import NORMS, NormDescription


@NORMS.register()
class {name}(nn.BatchNorm2d):
    description = NormDescription("BN", "channel", dims=2)

    def forward(self, input):
        return super().forward(input)
"""
DATA = """
from detectron2.data import DatasetCatalog, MetadataCatalog

from fbn_plugin.engine.data.named_sets import resolve_dataset
from fbn_plugin.engine.detectron2.data import records

for split in ("train", "val"):
    data = resolve_dataset("{folder}:" + split)
    DatasetCatalog.register("mine_" + split, lambda data=data: records(data, masks=True))
    MetadataCatalog.get("mine_" + split).thing_classes = ["disc", "box"]
"""


def run(tool, *arguments, processes=0, cwd=None):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    command = [sys.executable, *launcher, ROOT / "tools" / tool, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, cwd=cwd)


def module(folder, name="QuietBN"):
    file = folder / f"norms_of_{name.lower()}.py"
    file.write_text(NORM.format(name=name))
    return file


@pytest.fixture
def forgotten(monkeypatch):
    """What a test imports and registers is gone afterwards."""
    modules, path, norms = set(sys.modules), list(sys.path), dict(NORMS._obj_map)
    yield
    for name in set(sys.modules) - modules:
        if name.startswith("norms_of_"):
            del sys.modules[name]
    sys.path[:] = path
    for name in set(NORMS._obj_map) - set(norms):
        NORMS._obj_map.pop(name)


@pytest.mark.parametrize("processes", [0, 2])
def test_a_run_with_a_file(tmp_path, processes):
    file = module(tmp_path)
    options = [*QUICK, "MODEL.NORM", "QuietBN(eps=1e-3)", "OUTPUT_DIR", tmp_path / "out", "SOLVER.IMS_PER_BATCH", "8"]
    done = run(*CLASSIFICATION, "--import", file.name, *options, processes=processes, cwd=tmp_path)
    assert done.returncode == 0 and "test_byobnet with QuietBN(eps=1e-3)" in done.stdout, done.stderr
    assert json.loads((tmp_path / "out/run_info.json").read_text())["imports"] == [str(file)]


def test_without_it_the_error_says_so(tmp_path):
    done = run(*CLASSIFICATION, *QUICK, "MODEL.NORM", "QuietBN", "OUTPUT_DIR", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "unknown norm 'QuietBN'" in done.stderr and "--import names the file or module" in done.stderr
    done = run("benchmark.py", "--layers", "--norms", "QuietBN")
    assert done.returncode == 2 and "--import names the file or module" in done.stderr


@pytest.mark.usefixtures("forgotten")
def test_a_module_of_the_working_folder(tmp_path, monkeypatch):
    module(tmp_path, "WorkingBN")
    monkeypatch.chdir(tmp_path)
    cli.import_modules(["norms_of_workingbn", "norms_of_workingbn"])
    assert "WorkingBN" in NORMS and cli.imported() == ["norms_of_workingbn"]


@pytest.mark.usefixtures("forgotten")
def test_a_file_is_imported_once_under_its_own_name(tmp_path):
    file = module(tmp_path, "OnceBN")
    cli.import_modules([str(file)])
    norm = NORMS.get("OnceBN")
    cli.import_modules([str(file)])
    assert NORMS.get("OnceBN") is norm and cli.imported() == [str(file)]
    assert sys.modules["norms_of_oncebn"].OnceBN.__module__ == "norms_of_oncebn"

    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="another module 'norms_of_oncebn' is in use"):
        cli.import_modules([str(module(tmp_path / "other", "OnceBN"))])


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("no_such_module_at_all", "there is no module 'no_such_module_at_all'"),
        ("json.no_such_part", "there is no module 'json.no_such_part'"),
        ("nowhere/norms.py", "--import nowhere/norms.py: the file is not there"),
        ("nowhere/norms", "must be a module, or a file that ends in .py, got 'nowhere/norms'"),
    ],
)
def test_what_is_not_there_is_one_sentence(name, sentence, capsys):
    with pytest.raises(SystemExit) as stop, cli.user_errors():
        cli.import_modules([name])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in error and error.count("\n") == 1


@pytest.mark.usefixtures("forgotten")
def test_an_error_of_the_module_is_its_own(tmp_path):
    file = tmp_path / "norms_of_wrong.py"
    file.write_text("import a_package_that_is_missing")
    with pytest.raises(ModuleNotFoundError) as error:
        cli.import_modules([str(file)])
    assert error.value.name == "a_package_that_is_missing" and "norms_of_wrong" not in sys.modules


@pytest.mark.usefixtures("one_thread")
def test_evaluate_asks_for_it(trained_run, tmp_path):
    folder, file = shutil.copytree(trained_run, tmp_path / "run"), module(tmp_path)
    config, info = folder / "config.yaml", folder / "run_info.json"
    text = config.read_text()
    assert "NORM: FBN\n" in text
    config.write_text(text.replace("NORM: FBN\n", "NORM: QuietBN\n"))
    info.write_text(json.dumps({**json.loads(info.read_text()), "imports": [str(file)]}))
    done = run("evaluate.py", folder)
    assert done.returncode == 2 and f"add --import {file}" in done.stderr and done.stderr.count("\n") == 1
    done = run("evaluate.py", folder, "--import", file)
    assert done.returncode == 0 and "bbox" in done.stdout, done.stderr


@pytest.mark.usefixtures("one_thread")
def test_population_statistics_of_unknown_moments_are_refused_before_the_run(tmp_path, trained_run):
    file = module(tmp_path)
    file.write_text("".join(line for line in file.open() if "description" not in line))
    options = ["MODEL.RESNETS.NORM", "QuietBN", "TEST.PRECISE_BN.ENABLED", "True", "OUTPUT_DIR", tmp_path / "out"]
    config = trained_run / "config.yaml"
    done = run("train_detection.py", "--config-file", config, "--import", file, *options)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "TEST.PRECISE_BN.ENABLED must be False: QuietBN has a forward" in done.stderr, done.stderr


def test_several_processes_of_detectron2(tmp_path, shapes):
    """They are started anew, and import it too: norms and data sets; ``tools/evaluate.py`` hands it on."""
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from tiny_detectron2 import CONFIG, TINY, datasets

    file, out = module(tmp_path), tmp_path / "out"
    file.write_text(f"{file.read_text()}\n{DATA.format(folder=str(shapes))}")
    options = [*TINY, *datasets(shapes, 2), "MODEL.RESNETS.NORM", "QuietBN", "OUTPUT_DIR", out]
    options += ["DATASETS.TRAIN", "('mine_train',)", "DATASETS.TEST", "('mine_val',)"]
    options += ["SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "2"]
    done = run("train_net.py", "--config-file", CONFIG, "--num-gpus", "2", "--import", file, *options)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "run_info.json").read_text())["imports"] == [str(file)]
    done = run("evaluate.py", out)
    assert done.returncode == 2 and f"add --import {file}" in done.stderr
    done = run("evaluate.py", out, "--import", file)
    assert done.returncode == 0 and "\nmine_val (" in done.stdout, done.stderr
    done = run("evaluate.py", "--results", out / "inference/coco_instances_results.json", "--dataset", "mine_val")
    assert done.returncode == 2 and "--import the module that registers it" in done.stderr
    done = run("visualize_predictions.py", out, "--import", file)
    assert done.returncode == 0 and "4 images of mine_val" in done.stdout, done.stderr


def test_the_argument_may_be_repeated():
    parser = argparse.ArgumentParser()
    cli.add_import(parser)
    assert parser.parse_args(["--import", "a", "--import", "b.py"]).imports == ["a", "b.py"]
    assert parser.parse_args([]).imports == []
