"""Weights to start a detectron2 run from: as detectron2's own checkpointer loads them, but nothing in a file is run."""

import pickle

import numpy as np
import pickles
import pytest
import torch
from torch import nn

pytest.importorskip("detectron2", reason="detectron2 is not installed")
pytestmark = pytest.mark.detectron2

from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.config import get_cfg  # noqa: E402
from detectron2.layers import ShapeSpec  # noqa: E402
from detectron2.modeling.backbone.resnet import build_resnet_backbone  # noqa: E402

from fbn_plugin.engine.detectron2.checkpoint import AtomicCheckpointer  # noqa: E402


def model():
    """A ResNet in an FPN's place for it, so that a file's names are the ends of the model's."""
    return nn.ModuleDict({"bottom_up": backbone()})


def backbone():
    cfg = get_cfg()
    for key, value in {"STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 16, "WIDTH_PER_GROUP": 4, "NORM": "BN"}.items():
        cfg.MODEL.RESNETS[key] = value
    return build_resnet_backbone(cfg, ShapeSpec(channels=3))


def weights():
    generator = np.random.default_rng(5)
    state = backbone().state_dict()
    return {
        name: generator.standard_normal(value.shape).astype(np.float32)
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }


def caffe2(content):
    """Under Caffe2's names."""
    last = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}
    blobs = {}
    for name, value in content.items():
        stage, *where, conv, entry = name.replace(".norm", "/norm").split(".")
        conv, _, is_norm = conv.partition("/")
        entry = f"bn_{last[entry]}" if is_norm else "w"
        if stage == "stem":
            blobs["conv1_w" if entry == "w" else f"res_conv1_{entry}"] = value
        else:
            branch = "branch1" if conv == "shortcut" else f"branch2{'abc'[int(conv[-1]) - 1]}"
            blobs[f"{stage}_{where[0]}_{branch}_{entry}"] = value
    return blobs


def forms():
    content = weights()
    most = {f"bottom_up.{name}": value for name, value in content.items() if "res4.5" not in name}
    some = np.zeros(3, np.float32)
    return {
        "caffe2.pkl": {"blobs": {**caffe2(content), "conv1_w_momentum": some, "pred_w": some}, "cfg": "x: 1"},
        "bare.pkl": {**caffe2(content), "conv1_b": some},
        "heuristics.pkl": {"model": content, "__author__": "torchvision", "matching_heuristics": True},
        "zoo.pkl": {"model": most, "__author__": "Detectron2 Model Zoo"},
    }


FORMS = forms()


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", FORMS)
def test_it_loads_what_detectron2_loads(tmp_path, monkeypatch, name, protocol):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(FORMS[name], protocol))
    ours, theirs = model(), model()
    theirs.load_state_dict(ours.state_dict())
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    DetectionCheckpointer(theirs).load(name)
    AtomicCheckpointer(ours).load(name, checkpointables=[])
    state, expected = ours.state_dict(), theirs.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    changed = sum(not torch.equal(state[key], before[key]) for key in before)
    assert changed > 0.7 * len(before)


def test_pycls_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = {
        **{name: torch.from_numpy(value) for name, value in weights().items()},
        "x.num_batches_tracked": torch.ones(1),
    }
    torch.save({"model_state": state, "epoch": 3}, "a.pyth")
    ours, theirs = model(), model()
    DetectionCheckpointer(theirs).load("a.pyth")
    AtomicCheckpointer(ours).load("a.pyth", checkpointables=[])
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    torch.save({"state": state}, "b.pyth")
    with pytest.raises(ValueError, match=r"b\.pyth has no 'model_state'"):
        AtomicCheckpointer(ours).load("b.pyth", checkpointables=[])


HARMFUL = {name: data for name, data in pickles.harmful().items() if pickles.CANARY.encode() in data}


@pytest.mark.parametrize("suffix", ["pkl", "pth", "pyth"])
def test_no_file_runs_code(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    start = model()
    for name, data in HARMFUL.items():
        (tmp_path / f"x.{suffix}").write_bytes(data)
        with pytest.raises(ValueError, match=rf"x\.{suffix} cannot be read[^\n]*$"):
            AtomicCheckpointer(start).load(f"x.{suffix}", checkpointables=[])
        assert not (tmp_path / pickles.CANARY).exists(), name
