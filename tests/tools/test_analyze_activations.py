"""The command line of tools/analyze_activations.py, on networks of every origin."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_classification import train

import fbn_plugin

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def main(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import analyze_activations

    def run(*arguments):
        defaults = ["--device", "cpu", "--workers", 0, "--output", tmp_path / "out"]
        return analyze_activations.main([str(argument) for argument in (*defaults, *arguments)])

    yield run
    sys.modules.pop("analyze_activations")
    fbn_plugin.unregister()


def record(tmp_path):
    return json.loads((tmp_path / "out/activations.json").read_text())


def test_a_run_of_a_classifier(tmp_path, main, capsys):
    train(tmp_path / "run", SOLVER__MAX_ITER=2)
    kernel = "stages.1.0.conv1_1x1.bn"
    options = ["--max-images", 40, "--sigmas", 1, 2.5, "--t-sigma", 1.5, "--kernel", f"{kernel}:3"]
    figures = main("--model", tmp_path / "run", *options)
    said, found = capsys.readouterr().out, record(tmp_path)
    assert "test_byobnet with FBN on 40 images of handwritten digits (scikit-learn), validation" in said
    assert "is untrained" not in said and "head.fc *" in said and f"unit 3 of {kernel}: " in said
    assert found["trained"] and found["weights"].endswith("run/model_final.pth") and found["images"] == 40
    assert found["figures"] == figures | {"beyond5": None} and list(found["layers"][0]["beyond"]) == ["1", "1.5", "2.5"]
    (gallery,) = found["kernels"]
    assert gallery["passing"] == len(gallery["gallery"]) and gallery["images"] == 40
    assert all(abs(each["activation"]) > 1.5 and each["image"].startswith("number ") for each in gallery["gallery"])
    assert {"torch", "fbn_plugin"} <= set(found["versions"]) and "--t-sigma 1.5" in found["command"]
    for name in ("bands.png", f"kernel_{kernel}_3.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000

    # Of other images the number of classes is that of the weights.
    main("--model", tmp_path / "run", "--images", "digits", "--max-images", 40, "--layers", "head.*")
    assert [layer["name"] for layer in record(tmp_path)["layers"]] == ["head.fc"]
    again = next(layer for layer in found["layers"] if layer["name"] == "head.fc")
    assert record(tmp_path)["layers"][0]["minimum"] == pytest.approx(again["minimum"], abs=1e-5)


def test_an_untrained_network_and_its_weights(tmp_path, main, shapes, capsys):
    arguments = ["--model", "timm:test_resnet", "--num-classes", 3, "--images", shapes / "val", "--image-size", 32]
    main(*arguments)
    assert "note: the network is untrained" in capsys.readouterr().out
    first = record(tmp_path)
    assert (first["trained"], first["weights"], first["images"]) == (False, None, 4)
    import timm

    model = timm.create_model("test_resnet", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    main(*arguments, "--weights", tmp_path / "weights.pth")
    assert "is untrained" not in capsys.readouterr().out and record(tmp_path)["weights"] == str(
        tmp_path / "weights.pth"
    )
    assert record(tmp_path)["layers"][-1]["units"] == 3


def test_detectors(tmp_path, main, shapes, trained_run, capsys):
    """Each image is a batch, so that it is known which one a region is of."""
    main("--model", trained_run, "--kernel", "roi_heads.box_head.fc6:1", "--t-sigma", 1)
    said, found = capsys.readouterr().out, record(tmp_path)
    assert "Mask R-CNN (torchvision) with FBN of run on 4 images of" in said and "model_final.pth" in said
    assert found["kernels"][0]["images"] == 4 and found["dataset"] == f"{shapes}:val"
    conv = next(layer for layer in found["layers"] if layer["name"] == "rpn.head.conv.0.0")
    assert conv["calls"] == 5 and conv["kind"] == "Conv2d"
    options = ["--images", f"{shapes}:val", "--max-images", 1, "--num-classes", 2, "--layers", "backbone.*"]
    main("--model", "torchvision:ssdlite320_mobilenet_v3_large", *options)
    assert len(record(tmp_path)["layers"]) > 30 and record(tmp_path)["trained"] is False


@pytest.mark.detectron2
def test_a_config_of_detectron2(tmp_path, main, shapes, capsys):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from tiny_detectron2 import CONFIG, TINY

    options = ["--images", f"{shapes}:val", "--kernel", "backbone.bottom_up.stem.conv1.norm:2", "--opts", *TINY]
    main("--model", CONFIG, *options)
    said, found = capsys.readouterr().out, record(tmp_path)
    assert "detectron2's GeneralizedRCNN of mask_rcnn_R_50_FPN_FBN.yaml on 4 images" in said and "untrained" in said
    kinds = {layer["name"]: (layer["kind"], layer["note"]) for layer in found["layers"]}
    assert kinds["backbone.bottom_up.stem.conv1.norm"] == ("FBN(t_sigma=5)", "")
    assert "backbone.bottom_up.stem.conv1" not in kinds
    assert kinds["proposal_generator.rpn_head.conv"] == ("Conv2d", "")
    assert found["kernels"][0]["images"] == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "nowhere"], "--images is needed"),
        (["--model", "nowhere", "--images", "digits"], "--model nowhere is not there: name timm:NAME"),
        (["--model", "timm:resnet_18", "--images", "digits"], "did you mean"),
        (
            ["--model", "torchvision:resnet19", "--images", "digits"],
            "torchvision has no model 'resnet19'; did you mean",
        ),
        (["--model", "timm:test_resnet", "--images", "nowhere"], "images 'nowhere' are not there"),
        (["--model", "timm:test_resnet", "--images", "digits", "--max-images", "999"], "at most 360 images"),
        (["--model", "timm:test_resnet", "--images", "digits", "--batch-size", "-1"], "--batch-size must be 0 or more"),
        (["--model", "timm:test_resnet", "--images", "digits", "--t-sigma", "0"], "--t-sigma must be above 0, got 0.0"),
        (["--model", "timm:test_resnet", "--images", "digits", "--sigmas", "inf"], "--sigmas must be above 0, got inf"),
        (["--model", "timm:test_resnet", "--images", "digits", "--kernel", "bn1"], "--kernel must be LAYER:INDEX, got"),
        (["--model", "timm:test_resnet", "--images", "digits", "--kernel", "bn2:0"], "the model has no layer 'bn2'"),
        (["--model", "timm:test_resnet", "--images", "digits", "--kernel", "bn1:99"], "layer 'bn1' has units 0 to "),
        (["--model", "timm:test_resnet", "--images", "digits", "--layers", "x.*"], "dense layer is called 'x.*'"),
        (["--model", "timm:test_resnet", "--images", "digits", "--weights", "w.pth"], "w.pth"),
        (["--model", "timm:test_resnet", "--images", "digits", "--opts", "A", "B"], "--opts are for config files"),
        (["--model", "timm:test_resnet", "--images", "digits", "--pretrained", "--weights", "a"], "give one of them"),
        (["--model", "torchvision:r3d_18", "--images", "digits", "--max-images", "2"], "does not take single images"),
        (["--model", ".", "--images", "digits"], "it has no config.yaml"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, main, capsys, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(*arguments, *([] if "--opts" in arguments else ["--import", "json"]))
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and sentence in error
    assert not (tmp_path / "out").exists()
