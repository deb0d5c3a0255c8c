"""Weights in tools/train_net.py: ImageNet backbones of detectron2's and torchvision's making into every family of
norms, with a report that counts right; and weights of another model, which are refused."""

import logging
import pickle
import re

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed")

from tiny_detectron2 import CONFIG, TINY, datasets, prepare

import fbn_plugin
from fbn_plugin.engine.detectron2.checkpoint import AtomicCheckpointer
from fbn_plugin.engine.detectron2.config import load_config
from fbn_plugin.engine.detectron2.model import build_model

pytestmark = pytest.mark.detectron2

NORMS = 53  # of a ResNet-50


def build(norm, *overrides):
    cfg = load_config(str(CONFIG), [*TINY, "MODEL.RESNETS.NORM", norm, "MODEL.BACKBONE.FREEZE_AT", "0", *overrides])
    fbn_plugin.register()
    try:
        return build_model(cfg)
    finally:
        fbn_plugin.unregister()


@pytest.fixture(scope="module")
def backbone():
    """Entries of a ResNet-50 with batch norms that were trained."""
    generator = torch.Generator().manual_seed(0)
    state = build("BN").backbone.bottom_up.state_dict()
    return {
        name: torch.rand(value.shape, generator=generator) if value.is_floating_point() else torch.tensor(7)
        for name, value in state.items()
    }


def caffe2_name(name):
    """The name in the zoo's files that are not of PyTorch's making."""
    name = name.replace("stem.conv1.norm", "res_conv1_bn").replace("stem.conv1", "conv1")
    name = name.replace("shortcut", "branch1")
    for number, letter in enumerate("abc", start=1):
        name = re.sub(rf"(\d)\.conv{number}", rf"\1.branch2{letter}", name)
    name = name.replace(".norm.", ".bn.").replace("bn.weight", "bn.s").replace("weight", "w").replace("bias", "b")
    return name.replace(".", "_")


def write(path, backbone, style, statistics):
    entries = {
        name: value.numpy() for name, value in backbone.items() if statistics or not re.search("running|tracked", name)
    }
    if style == "caffe2":
        content = {caffe2_name(k): v for k, v in entries.items() if "tracked" not in k}
        content |= {"fc1000_w": np.zeros((10, 8), np.float32), "fc1000_b": np.zeros(10, np.float32)}
    else:
        entries |= {"stem.fc.weight": np.zeros((10, 8), np.float32), "stem.fc.bias": np.zeros(10, np.float32)}
        content = {"model": entries, "__author__": "torchvision", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))


def load(model, path, caplog):
    logging.getLogger("fbn_plugin").propagate = True
    with caplog.at_level(logging.INFO, "fbn_plugin"):
        caplog.clear()
        AtomicCheckpointer(model).load(str(path), checkpointables=[])
    ours = "fbn_plugin.engine.detectron2.checkpoint"
    return [record.getMessage() for record in caplog.records if record.name == ours]


def test_caffe2_names():
    assert caffe2_name("stem.conv1.norm.weight") == "res_conv1_bn_s"
    assert caffe2_name("res2.0.conv1.weight") == "res2_0_branch2a_w"
    assert caffe2_name("res3.1.conv3.norm.running_mean") == "res3_1_branch2c_bn_running_mean"


@pytest.mark.parametrize("style", ["caffe2", "torchvision"])
@pytest.mark.parametrize(
    "norm, kind",
    [
        ("BN", "BatchNorm2d"),
        ("FBN", "FilteredBatchNorm2d"),
        ("GN(num_groups=4)", "GroupNorm"),
        ("FGN(num_groups=4)", "FilteredGroupNorm"),
    ],
)
def test_a_backbone_into_every_family(tmp_path, backbone, caplog, style, norm, kind):
    write(tmp_path / "R-50.pkl", backbone, style, statistics=True)
    model = build(norm)
    lines = load(model, tmp_path / "R-50.pkl", caplog)

    state = model.backbone.bottom_up.state_dict()
    for name, value in state.items():
        if "tracked" not in name:
            assert torch.equal(value, backbone[name]), name
    tensors = sum("tracked" not in name for name in state)
    assert lines[0] == f"{tmp_path / 'R-50.pkl'}: {tensors} of {tensors} tensors of the backbone loaded"
    assert lines[1] == f"scale and shift of {NORMS} norms ({kind}) loaded"
    if "GN" in norm:
        assert lines[2] == f"the file's running statistics left out: {kind} has none"
    else:
        assert lines[2] == f"running statistics of {NORMS} norms ({kind}) loaded"
    assert lines[3] == "not in the file, so at its initial values: fpn, proposal_generator, roi_heads"
    assert lines[4].startswith("2 entries of the file not used: ") and len(lines) == 5


def test_a_backbone_without_statistics(tmp_path, backbone, caplog):
    """The zoo's oldest files hold scale and shift only, with the statistics worked in."""
    write(tmp_path / "R-50.pkl", backbone, "caffe2", statistics=False)
    lines = load(build("FBN"), tmp_path / "R-50.pkl", caplog)
    assert lines[2].startswith(f"{NORMS} norms (FilteredBatchNorm2d) keep mean 0 and variance 1")
    frozen = load(build("FrozenBN"), tmp_path / "R-50.pkl", caplog)
    assert frozen[2].startswith(f"{NORMS} norms (FrozenBatchNorm2d) keep mean 0 and variance 1")


def test_weights_of_another_model(shapes, tmp_path):
    """A model to evaluate or to resume must be the very same; one to start from must have something in common."""
    saved = tmp_path / "saved.pth"
    deeper = ["MODEL.RESNETS.DEPTH", 101]
    torch.save({"model": build("FBN", "MODEL.ROI_HEADS.NUM_CLASSES", "2", *map(str, deeper)).state_dict()}, saved)
    common = [*datasets(shapes, 2), "OUTPUT_DIR", tmp_path / "out", "MODEL.WEIGHTS", saved]
    with pytest.raises(ValueError, match=r"MODEL.WEIGHTS: .*saved.pth is of another model: \d+ entries do not fit"):
        prepare(*common, eval_only=True)
    wider = ["MODEL.ROI_MASK_HEAD.CONV_DIM", 16]
    with pytest.raises(ValueError, match=r"saved.pth is of another model: 5 entries .*\(shape \(8,.*is \(16,"):
        prepare(*common, *deeper, *wider, eval_only=True)
    prepare(*common, *deeper, eval_only=True)
    prepare(*common)

    torch.save({"encoder.layer.0.weight": torch.ones(3)}, saved)
    with pytest.raises(ValueError, match=r"saved.pth has no weight of this model; its entries are encoder.layer"):
        prepare(*common)
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"saved.pth cannot be read: it is cut short"):
        prepare(*common)
