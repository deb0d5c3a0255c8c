"""Ultralytics: the trainer's own model has the norms, and so have its moving average, its checkpoints and a run that is
resumed. Everything is made here: nothing is downloaded."""

import subprocess
import sys
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import fbn_plugin
from fbn_plugin import FilteredBatchNorm2d, convert_norm


@pytest.fixture(scope="module", autouse=True)
def installed():
    pytest.importorskip("ultralytics")


@pytest.fixture
def registered(installed):
    from fbn_plugin.frameworks import ultralytics as adapter

    adapter.register()
    adapter.register()
    yield adapter
    adapter.unregister()
    adapter.unregister()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four images with a bright square each."""
    folder = tmp_path_factory.mktemp("squares")
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    for number in range(4):
        image = np.random.default_rng(number).integers(0, 90, (64, 64, 3), dtype=np.uint8)
        image[10:40, 10:40] = 200
        Image.fromarray(image).save(folder / "images" / f"{number}.png")
        (folder / "labels" / f"{number}.txt").write_text("0 0.39 0.39 0.47 0.47\n")
    (folder / "data.yaml").write_text(f"path: {folder}\ntrain: images\nval: images\nnames: {{0: square}}\n")
    return str(folder / "data.yaml")


def kinds(model: nn.Module) -> Counter:
    return Counter(type(module).__name__ for module in model.modules() if "Norm" in type(module).__name__)


def settings(data, folder, **kwargs):
    return {
        **{"data": data, "epochs": 2, "imgsz": 32, "batch": 2, "device": "cpu", "workers": 0, "plots": False},
        **{"project": str(folder), "name": "run", "verbose": False, "nbs": 2, "warmup_epochs": 0, "optimizer": "SGD"},
        **kwargs,
    }


class Interrupted(Exception):
    pass


def interrupt(trainer):
    raise Interrupted


@pytest.fixture(scope="module")
def run(installed, data, tmp_path_factory):
    """A run with FBN that is interrupted after the first of two epochs: its trainer, and what it held at the start."""
    from ultralytics import YOLO

    from fbn_plugin.frameworks.ultralytics import norm_trainer

    seen = {}

    def look(trainer):
        parameters = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        norms = [module for module in trainer.model.modules() if isinstance(module, _BatchNorm)]
        seen["model"], seen["ema"] = kinds(trainer.model), kinds(trainer.ema.ema)
        seen["options"] = {(norm.t_sigma, norm.eps, norm.momentum) for norm in norms}
        seen["optimized"] = all(id(norm.weight) in parameters and id(norm.bias) in parameters for norm in norms)
        seen["decay"] = {
            group["weight_decay"]
            for group in trainer.optimizer.param_groups
            for parameter in group["params"]
            if any(parameter is norm.weight for norm in norms)
        }
        seen["before"] = norms[0].weight.detach().clone()

    model = YOLO("yolov8n.yaml")
    model.add_callback("on_train_start", look)
    model.add_callback("on_model_save", interrupt)
    with pytest.raises(Interrupted):
        folder = tmp_path_factory.mktemp("runs")
        model.train(trainer=norm_trainer(model, "FBN(t_sigma=4)"), **settings(data, folder))
    return model.trainer, seen


def test_the_model_that_is_trained_has_the_norms_from_the_beginning(run):
    trainer, seen = run
    assert seen["model"] == seen["ema"] == {"FilteredBatchNorm2d": 57}
    assert seen["options"] == {(4, 1e-3, 0.03)}  # YOLO's own eps and momentum
    assert seen["optimized"] and seen["decay"] == {0.0}
    norm = next(module for module in trainer.model.modules() if isinstance(module, FilteredBatchNorm2d))
    assert not torch.equal(norm.weight, seen["before"]) and norm.num_batches_tracked == 2
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    checkpoint = torch.load(trainer.last, weights_only=False)
    assert kinds(checkpoint["ema"]) == {"FilteredBatchNorm2d": 57}


def test_a_checkpoint_is_resumed_and_all_processes_of_a_run_get_the_norms(run):
    """In a program that knows nothing of this package."""
    from ultralytics.utils.dist import ddp_cleanup, generate_ddp_file

    trainer, _ = run
    trainer.callbacks = {}  # they are functions of this file
    script = generate_ddp_file(trainer)  # what the processes of a run on several GPUs are given
    code = f"""
import sys, torch
from collections import Counter
from ultralytics import YOLO
from ultralytics.utils.patches import torch_load
def kinds(model):
    return Counter(type(module).__name__ for module in model.modules() if "Norm" in type(module).__name__)
model = YOLO({str(trainer.last)!r})
seen = []
model.add_callback("on_train_start", lambda t: seen.extend([t.start_epoch, kinds(t.model), kinds(t.ema.ema)]))
model.train(resume=True)
assert seen == [1, {{"FilteredBatchNorm2d": 57}}, {{"FilteredBatchNorm2d": 57}}], seen
assert kinds(model.model) == {{"FilteredBatchNorm2d": 57}} and model.model.model[0].bn.t_sigma == 4
state = torch_load({script.replace(".py", ".pt")!r}, map_location="cpu")
assert state["trainer"].__name__ == "NormDetectionTrainer"
trainer = object.__new__(state["trainer"])
trainer.data, trainer.args = model.trainer.data, model.trainer.args
assert kinds(trainer.get_model(cfg="yolov8n.yaml")) == {{"FilteredBatchNorm2d": 57}}
"""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    finally:
        ddp_cleanup(trainer, script)
    assert done.returncode == 0, done.stderr[-3000:]


def test_fused_validated_and_exported(run, tmp_path):
    from ultralytics import YOLO

    last = str(tmp_path / "last.pt")
    torch.save(torch.load(run[0].last, weights_only=False), last)
    model, x = YOLO(last), torch.rand(1, 3, 64, 64)
    expected = model.model.eval()(x)[0]
    fused = YOLO(last).model.eval().fuse(verbose=False)
    assert not kinds(fused)
    torch.testing.assert_close(fused(x)[0], expected, rtol=1e-3, atol=1e-3)
    script = torch.jit.load(model.export(format="torchscript", imgsz=64))
    result = script(x)
    torch.testing.assert_close(result[0] if isinstance(result, tuple) else result, expected, rtol=1e-3, atol=1e-3)


def test_handed_on_to_those_without_this_package(run, tmp_path):
    from ultralytics import YOLO

    model, x = YOLO(run[0].last), torch.rand(1, 3, 64, 64)
    expected = model.model.eval()(x)[0]
    convert_norm(model.model, "BN")
    assert kinds(model.model) == {"BatchNorm2d": 57} and torch.equal(model.model.eval()(x)[0], expected)
    model.save(tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    assert b"BatchNorm2d" in pickled and b"fbn_plugin" not in pickled


def test_exported_to_onnx(run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    from ultralytics import YOLO

    last = str(tmp_path / "last.pt")
    torch.save(torch.load(run[0].last, weights_only=False), last)
    model, x = YOLO(last), torch.rand(1, 3, 64, 64)
    expected = model.model.eval()(x)[0]
    session = onnxruntime.InferenceSession(model.export(format="onnx", imgsz=64, simplify=False))
    got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_train_keeps_a_converted_model_after_register(registered, data, tmp_path):
    from ultralytics import YOLO

    model = YOLO("yolov8n.yaml")
    convert_norm(model.model, "FBN(t_sigma=3)")
    seen = []
    model.add_callback("on_train_start", lambda trainer: seen.append((kinds(trainer.model), kinds(trainer.ema.ema))))
    model.add_callback("on_train_start", interrupt)
    with pytest.raises(Interrupted):
        model.train(**settings(data, tmp_path))
    assert seen == [({"FilteredBatchNorm2d": 57},) * 2]
    assert {m.t_sigma for m in model.trainer.model.modules() if isinstance(m, FilteredBatchNorm2d)} == {3}


def test_train_of_a_plain_model_is_ultralytics_own(registered, monkeypatch):
    from ultralytics import YOLO

    given = []
    monkeypatch.setattr(registered, "_ultralytics_train", lambda model, trainer, **kwargs: given.append(trainer))
    model = YOLO("yolov8n.yaml")
    model.train(epochs=1)
    assert given == [None]
    registered.unregister()
    assert type(model).train is not registered._train


@pytest.mark.parametrize("spec", ["FGN", "RBN", "RBN-", "ScaledBN-A1", "IN", "FRN", "LearnedNorm"])
def test_norms_that_ultralytics_would_fold_wrongly_are_refused(registered, spec):
    from ultralytics import YOLO

    model = YOLO("yolov8n.yaml")
    with pytest.raises(ValueError, match=f"{spec} cannot be trained by ultralytics.* FBN"):
        registered.norm_trainer(model, spec)
    convert_norm(model.model, spec)
    with pytest.raises(ValueError, match="cannot be trained by ultralytics"):
        model.train()


@pytest.mark.parametrize("spec", ["FBN", "SyncFBN", "ScaledBN(gamma_init=0.5)", "ConvNorm", "BN", "FBN(bias=False)"])
def test_fuse_is_exact_for_the_others(registered, spec):
    from ultralytics import YOLO

    model = YOLO("yolov8n.yaml").model
    registered.norm_trainer(YOLO("yolov8n.yaml"), spec)
    convert_norm(model, spec)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.momentum = 1.0
    x = torch.rand(2, 3, 64, 64)
    model.train()(x)
    x = x.double()
    expected = model.double().eval()(x)[0]
    fused = model.fuse(verbose=False)
    assert not kinds(fused)
    torch.testing.assert_close(fused(x)[0], expected)


def test_a_norm_without_a_place_is_told(registered):
    old = nn.Sequential(FilteredBatchNorm2d(4), FilteredBatchNorm2d(4, t_sigma=3))
    new = nn.Sequential(nn.BatchNorm2d(4))
    with pytest.warns(UserWarning, match="1 norm of the model before has no place"):
        registered._put_same({}, new, old)
    assert type(new[0]) is FilteredBatchNorm2d and new[0].t_sigma == 5
    assert fbn_plugin.parse_spec(registered.norms_of(old)["1"]).options["t_sigma"] == 3


@pytest.mark.parametrize("name", [name for name, _ in fbn_plugin.NORMS if name not in ("BN", "SyncBN", "GN")])
def test_the_norms_of_a_model_are_built_again_with_all_options(registered, name):
    """Those at their default too, which are not YOLO's."""
    old = nn.Sequential(fbn_plugin.get_norm(name, 4))
    new = nn.Sequential(nn.BatchNorm2d(4, eps=1e-3, momentum=0.03))
    registered._put_same(registered.norms_of(old), new, None)
    assert repr(new) == repr(old)
