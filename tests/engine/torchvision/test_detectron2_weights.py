"""Backbones in detectron2's two ways of naming come out as torchvision's, and a pickle runs no code."""

import os
import pickle

import numpy as np
import pytest
import torch
from torchvision.models import resnet18, resnet50

from fbn_plugin.engine.torchvision import detectron2_weights
from fbn_plugin.engine.torchvision.config import load_detection_config
from fbn_plugin.engine.torchvision.detectron2_weights import local_path, read_backbone
from fbn_plugin.engine.torchvision.model import build_model
from fbn_plugin.models.mask_rcnn import load_backbone

ENTRIES = ("weight", "bias", "running_mean", "running_var")


def randomized(model):
    generator = torch.Generator().manual_seed(3)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5 if value.dim() == 1 else value)
    return model.state_dict()


def places(state):
    """torchvision's name -> (stage or None, block, convolution or 0 for the shortcut, is it the norm's, entry)."""
    for name in state:
        parts = name.split(".")
        if parts[0] == "fc" or parts[-1] == "num_batches_tracked":
            continue
        if not parts[0].startswith("layer"):
            yield name, (None, None, 1, parts[0] == "bn1", parts[-1])
        elif parts[2] == "downsample":
            yield name, (int(parts[0][-1]) + 1, parts[1], 0, parts[3] == "1", parts[-1])
        else:
            yield name, (int(parts[0][-1]) + 1, parts[1], int(parts[2][-1]), parts[2].startswith("bn"), parts[-1])


def caffe2(state, norm="bn", **suffixes):
    """As Caffe2 names it, with all that such a file holds besides."""
    suffixes = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv", **suffixes}
    blobs = {}
    for name, (stage, block, conv, is_norm, entry) in places(state):
        if stage is None:
            start = "res_conv1" if norm == "bn" else "conv1"
            key = f"{start}_{norm}_{suffixes[entry]}" if is_norm else "conv1_w"
        else:
            branch = "1" if conv == 0 else "2" + "abc"[conv - 1]
            key = f"res{stage}_{block}_branch{branch}_{f'{norm}_{suffixes[entry]}' if is_norm else 'w'}"
        blobs[key] = state[name].numpy()
    some = np.zeros(3, np.float32)
    return {**blobs, "conv1_b": some, "pred_w": some, "pred_b": some}


def detectron2_style(state, prefix=""):
    content = {}
    for name, (stage, block, conv, is_norm, entry) in places(state):
        where = "stem.conv1" if stage is None else f"res{stage}.{block}.{f'conv{conv}' if conv else 'shortcut'}"
        content[f"{prefix}{where}.{'norm.' if is_norm else ''}{entry}"] = state[name].numpy()
    return {**content, f"{prefix}stem.fc.weight": state["fc.weight"].numpy()}


STYLES = {
    "blobs": lambda state: {"blobs": {**caffe2(state), "conv1_w_momentum": np.zeros(3)}},
    "bare": caffe2,
    "Caffe2 in detectron2's wrapping": lambda state: {
        "model": caffe2(state, running_mean="running_mean", running_var="running_var", weight="gamma", bias="beta"),
        "__author__": "Caffe2",
        "matching_heuristics": True,
    },
    "converted from torchvision": lambda state: {
        "model": detectron2_style(state),
        "__author__": "torchvision",
        "matching_heuristics": True,
    },
    "a detector of the zoo": lambda state: {
        "model": detectron2_style(state, "backbone.bottom_up."),
        "__author__": "Detectron2 Model Zoo",
    },
}


def write(path, content, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("protocol", [2, 5])
def test_every_style_gives_the_same_weights(tmp_path, style, protocol):
    state = randomized(resnet18())
    weights, unused = read_backbone(write(tmp_path / "r18.pkl", STYLES[style](state), protocol))
    assert weights.keys() == {name for name, _ in places(state)}
    assert all(torch.equal(weights[name], state[name]) for name in weights)
    assert sorted(unused) in (
        ["conv1_b", "pred_b", "pred_w"],
        ["stem.fc.weight"],
        ["backbone.bottom_up.stem.fc.weight"],
    )


def test_group_norms_of_caffe2(tmp_path):
    state = {name: value for name, value in randomized(resnet18()).items() if "running" not in name}
    weights, _ = read_backbone(write(tmp_path / "gn.pkl", {"blobs": caffe2(state, norm="gn")}))
    assert weights.keys() == {name for name, _ in places(state)}


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"blobs": {"conv1_w": Malicious()}}),
        pickle.dumps({"blobs": {"conv1_w": torch.zeros(1)}}),
        pickle.dumps({"conv1_w": np.array([Malicious()], dtype=object)}),
        pickle.dumps({"conv1_w": np.array(["words"], dtype=object)}),
        pickle.dumps({"conv1_w": np.zeros(1000)})[:-500],
        pickle.dumps([1, 2]),
        b"",
        b"<html>404</html>",
    ],
)
def test_what_is_not_arrays_is_refused_in_one_sentence(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"^weights x\.pkl cannot be read as a pickle of arrays: .+$"):
        read_backbone("x.pkl")
    assert not (tmp_path / "pwned").exists()


def test_another_network_and_no_file(tmp_path):
    path = write(tmp_path / "vgg.pkl", {"conv1_1_w": np.zeros(3)})
    with pytest.raises(ValueError, match=r"vgg\.pkl are not of a ResNet: its names are such as 'conv1_1_w'"):
        read_backbone(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pkl are not there"):
        read_backbone("nowhere.pkl")
    weights, _ = read_backbone(write(tmp_path / "r18.pkl", caffe2(randomized(resnet18()))))
    with pytest.raises(ValueError, match="does not fit the backbone"):
        load_backbone(resnet50(), weights)


def test_a_failing_download_says_what_to_do(monkeypatch):
    asked = []

    def get_local_path(_, address):
        asked.append(address)
        raise OSError("no route\nto host")

    monkeypatch.setattr(detectron2_weights.PathManager, "get_local_path", get_local_path)
    with pytest.raises(
        OSError, match=r"^detectron2://ImageNetPretrained/MSRA/R-50.pkl cannot be downloaded from https://\S+ \(no"
    ):
        local_path("detectron2://ImageNetPretrained/MSRA/R-50.pkl")
    assert asked == ["https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/MSRA/R-50.pkl"]


@pytest.mark.detectron2
@pytest.mark.parametrize("style, in_1x1", [("blobs", True), ("converted from torchvision", False)])
@pytest.mark.parametrize("norm", ["BN", "FBN", "FrozenBN"])
def test_detectron2s_own_loader_gives_the_same_function(tmp_path, style, in_1x1, norm):
    """A narrow ResNet-50: widths, stride and weights agree with those of detectron2's backbone of the same config."""
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone.resnet import build_resnet_backbone

    import fbn_plugin

    narrow = {"STEM_OUT_CHANNELS": 16, "RES2_OUT_CHANNELS": 64, "WIDTH_PER_GROUP": 16, "STRIDE_IN_1X1": in_1x1}
    settings = [
        str(part) for key, value in {**narrow, "NORM": norm}.items() for part in (f"MODEL.RESNETS.{key}", value)
    ]
    settings += ["MODEL.BACKBONE.FREEZE_AT", "0"]
    body = build_model(load_detection_config(None, settings)).backbone.body
    source = {**randomized(body), "fc.weight": torch.zeros(10, 512)}
    source = {name: value.clone() for name, value in source.items()}
    path = write(tmp_path / "narrow.pkl", STYLES[style](source))
    for value in body.state_dict().values():
        value.zero_()
    load_backbone(body, read_backbone(path)[0])

    cfg = get_cfg()
    cfg.merge_from_list([*settings, "MODEL.RESNETS.OUT_FEATURES", "['res2', 'res3', 'res4', 'res5']"])
    fbn_plugin.register()
    try:
        theirs = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    finally:
        fbn_plugin.unregister()
    DetectionCheckpointer(theirs).load(str(path))
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        ours, expected = body.eval()(x), theirs.eval()(x)
    for level, feature in enumerate(expected.values()):
        difference = (ours[str(level)] - feature).abs().max()  # frozen norms multiply and add in another order
        assert difference <= 1e-5 * feature.abs().max() and feature.abs().max() > 0.1
