"""Models from a config: arguments of their builders, and what is refused before a run, or of a file of weights."""

import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from fbn_plugin.engine.classification.config import check_config, classification_config
from fbn_plugin.engine.classification.model import build_model, model_title
from fbn_plugin.engine.classification.trainer import ClassificationTrainer
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.config import load_config

CONFIGS = Path(__file__).parents[3] / "configs"


def config(output_dir="unused", **overrides):
    """A run of LeNet-5 on handwritten digits."""
    values = {"OUTPUT_DIR": output_dir, "MODEL.NAME": "lenet5", "MODEL.NORM": "FBN", "INPUT.SIZE": 28}
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    flat = [str(part) for pair in values.items() for part in pair]
    return load_config(classification_config(), CONFIGS / "Digits/test_resnet_FBN.yaml", flat)


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "t_sigma")]


# --- arguments of the model ------------------------------------------------------------------------------------------


def test_options_of_models():
    assert norms(build_model(config(MODEL__OPTIONS__norm_after="fc1"), 10)) == ["features.fc1.norm"]
    model = build_model(config(MODEL__OPTIONS="{'norm_after': ['conv1', 'fc1']}"), 10)
    assert norms(model) == ["features.conv1.norm", "features.fc1.norm"]
    resnet = {"MODEL__NAME": "resnet10t", "MODEL__OPTIONS__drop_block_rate": 0.1, "MODEL__DROP_PATH_RATE": 0.2}
    model = build_model(config(**resnet), 10)
    assert any(type(module).__name__ == "DropBlock2d" for module in model.modules())
    rates = [module.drop_prob for module in model.modules() if type(module).__name__ == "DropPath"]
    assert rates and max(rates) == pytest.approx(0.2)


def test_a_norm_in_some_layers():
    resnet = {"MODEL__NAME": "resnet10t", "MODEL__NORM": "FBN(t_sigma=2)"}
    every, some = norms(build_model(config(**resnet), 10)), config(**resnet, MODEL__NORM_LAYERS="('layer1', '*.bn2')")
    model = build_model(some, 10)
    assert norms(model) == [name for name in every if name.startswith("layer1.") or name.endswith(".bn2")]
    others = {type(module) for name, module in model.named_modules() if name in set(every) - set(norms(model))}
    assert others and not any("Filtered" in each.__name__ for each in others)
    assert model_title(some) == "resnet10t with FBN(t_sigma=2) in layer1, *.bn2"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"MODEL__NORM_LAYERS": "('layer9',)"}, "MODEL.NORM with NORM_LAYERS: include='layer9' names no norm"),
        ({"MODEL__NORM_LAYERS": "('fc1',)", "MODEL__NORM": ""}, "MODEL.NORM_LAYERS must be empty without MODEL.NORM"),
    ],
)
def test_layers_that_are_none(overrides, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        cfg = config(**overrides)
        check_config(cfg)
        build_model(cfg, 10)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            {"MODEL__OPTIONS__norm_aftr": "fc1"},
            "MODEL.OPTIONS must be arguments of lenet5, got 'norm_aftr': accepted are norm_after, act_layer",
        ),
        (
            {"MODEL__NAME": "resnet18", "MODEL__OPTIONS__norm_after": "fc1"},
            "MODEL.OPTIONS must be arguments of resnet18, got 'norm_after': accepted are .*drop_block_rate",
        ),
        (
            {"MODEL__OPTIONS__norm_after": "fc9"},
            "MODEL.OPTIONS must be what lenet5 takes .norm_after takes .* got .*fc9",
        ),
        (
            {"MODEL__OPTIONS__norm_layer": "BN"},
            "MODEL.OPTIONS must be without norm_layer, for which there is MODEL.NORM",
        ),
        (
            {"MODEL__OPTIONS__features_only": True},
            "MODEL.OPTIONS must be arguments that describe .* got 'features_only'",
        ),
        ({"MODEL__DROP_PATH_RATE": 0.1}, "MODEL.DROP_PATH_RATE must be 0 with lenet5, .* no such argument, got 0.1"),
        ({"MODEL__DROP_PATH_RATE": 1.0}, "MODEL.DROP_PATH_RATE must be from 0 to less than 1"),
        ({"MODEL__NAME": "resnet51"}, "did you mean 'resnet\\w+' or 'resnet\\w+' or 'resnet\\w+'"),
    ],
)
def test_options_that_are_refused(overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        cfg = config(**overrides)
        check_config(cfg)
        build_model(cfg, 10)


# --- weights of timm's from a file -----------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    """Of timm's smallest ResNet, for three channels and 1000 classes."""
    torch.manual_seed(3)
    model = timm.create_model("test_resnet")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    return model.state_dict()


@pytest.mark.parametrize("is_below_the_data", [False, True])
def test_a_file_in_the_place_of_the_download(tmp_path, monkeypatch, weights, is_below_the_data):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    path = "weights.pth" if is_below_the_data else tmp_path / "weights.pth"
    given = {"MODEL__NAME": "test_resnet", "MODEL__PRETRAINED": True, "MODEL__PRETRAINED_PATH": path}
    found = build_model(config(**given, INPUT__FORMAT="RGB"), 1000).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in weights.items())
    found = build_model(config(**given), 10).state_dict()  # grey, ten classes: as timm adapts them
    assert torch.allclose(found["conv1.0.weight"], weights["conv1.0.weight"].sum(1, keepdim=True))
    inner = "layer4.0.conv1.weight"
    assert len(found["fc.weight"]) == 10 and torch.equal(found[inner], weights[inner])


@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("name", ["test_vit", "lenet5"])
def test_a_file_of_another_model(tmp_path, weights, classes, name):
    given = {"MODEL__PRETRAINED": True, "MODEL__PRETRAINED_PATH": tmp_path / "weights.pth"}
    with pytest.raises(ValueError, match=rf"^MODEL.PRETRAINED_PATH .*weights.pth is not of {name}: ") as error:
        build_model(config(**given, MODEL__NAME=name, MODEL__NORM="", INPUT__SIZE=160), classes)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_a_wrong_model_is_not_blamed_on_the_file(tmp_path, weights):
    given = {"MODEL__PRETRAINED": True, "MODEL__PRETRAINED_PATH": tmp_path / "weights.pth"}
    with pytest.raises(ValueError, match="timm cannot build 'resnet51'"):
        build_model(config(**given, MODEL__NAME="resnet51"), 10)
    with pytest.raises(ValueError, match="MODEL.OPTIONS must be arguments of test_resnet, got 'norm_aftr'"):
        build_model(config(**given, MODEL__NAME="test_resnet", MODEL__OPTIONS__norm_aftr=1), 10)


@pytest.mark.parametrize("classes", [10, 7, 1000])
def test_a_file_that_lacks_weights_is_refused(tmp_path, weights, classes):
    del weights["layer1.0.conv1.weight"]
    torch.save(weights, tmp_path / "weights.pth")
    given = {
        "MODEL__NAME": "test_resnet",
        "MODEL__PRETRAINED": True,
        "MODEL__PRETRAINED_PATH": tmp_path / "weights.pth",
    }
    with pytest.raises(ValueError, match=r"is not of test_resnet: .*Missing key.* \"layer1.0.conv1.weight\""):
        build_model(config(**given), classes)
    torch.save({}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="MODEL.PRETRAINED_PATH .* is not of test_resnet: it has no weights"):
        build_model(config(**given), classes)


@pytest.mark.parametrize(("classes", "stays"), [(7, True), (10, False), (1000, False)])
def test_a_classifier_comes_over_where_the_classes_are_the_files(tmp_path, caplog, classes, stays):
    source = timm.create_model("test_resnet", num_classes=7)
    torch.save(source.state_dict(), tmp_path / "seven.pth")
    given = {"MODEL__NAME": "test_resnet", "MODEL__PRETRAINED": True, "MODEL__PRETRAINED_PATH": tmp_path / "seven.pth"}
    with caplog.at_level("INFO"):
        model = build_model(config(**given, INPUT__FORMAT="RGB"), classes)
    assert len(model.fc.weight) == classes and torch.equal(model.layer4[0].conv1.weight, source.layer4[0].conv1.weight)
    assert (len(source.fc.weight) == classes and torch.equal(model.fc.weight, source.fc.weight)) == stays
    said = "seven.pth: all weights of test_resnet, with 7 classes"
    assert said + ("" if stays else f"; the classifier begins anew, as the data have {classes}") in caplog.text


def test_a_file_that_is_not_there_or_not_asked_for(tmp_path):
    given = {"MODEL__NAME": "test_resnet", "MODEL__PRETRAINED_PATH": tmp_path / "none.pth"}
    with pytest.raises(FileNotFoundError, match="MODEL.PRETRAINED_PATH: checkpoint .*none.pth is not there"):
        build_model(config(**given, MODEL__PRETRAINED=True), 10)
    with pytest.raises(ValueError, match="MODEL.PRETRAINED_PATH must be '' without MODEL.PRETRAINED, got '.*none.pth'"):
        check_config(config(**given))


# --- one value a channel ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "norm"),
    [
        ({"MODEL__NAME": "test_resnet", "MODEL__NORM": "FBN", "INPUT__SIZE": 32}, "layer4.0.*FilteredBatchNorm2d"),
        ({"MODEL__NAME": "lenet5", "MODEL__NORM": "BN"}, "features.fc2.norm, a BatchNorm1d"),
    ],
)
def test_batch_norms_of_one_value(tmp_path, monkeypatch, overrides, norm):
    cfg = config(tmp_path / "out", **overrides, SOLVER__IMS_PER_BATCH=1)
    with pytest.raises(ValueError, match=f"SOLVER.IMS_PER_BATCH must be more than 1 image for .*{norm}, .*, got 1"):
        ClassificationTrainer(cfg)
    assert not (tmp_path / "out").exists()
    ClassificationTrainer(config(tmp_path, **overrides, SOLVER__IMS_PER_BATCH=2))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match=f"more than 1 image for each process and step: .*{norm}, .*, got 2"):
        ClassificationTrainer(config(tmp_path, **overrides, SOLVER__IMS_PER_BATCH=2))


def test_one_image_is_enough_elsewhere(tmp_path):
    larger = {"MODEL__NAME": "test_resnet", "INPUT__SIZE": 64}  # the last map has 2 x 2 pixels
    for overrides in (larger, {"MODEL__NORM": "GN"}, {"MODEL__NAME": "lenet5_convs"}):
        ClassificationTrainer(config(tmp_path, **overrides, SOLVER__IMS_PER_BATCH=1))


# --- weights of other classes ----------------------------------------------------------------------------------------


@pytest.fixture
def seven_classes(tmp_path) -> Path:
    torch.manual_seed(0)
    torch.save(build_model(config(), 7).state_dict(), tmp_path / "seven.pth")
    return tmp_path / "seven.pth"


def test_weights_of_other_classes_are_refused(seven_classes):
    file = "MODEL.WEIGHTS: checkpoint .*seven.pth has 7 classes, and the data set has 10: "
    with pytest.raises(ValueError, match=f"{file}MODEL.RESET_CLASSIFIER True trains a new classifier on its other"):
        ClassificationTrainer(config(MODEL__WEIGHTS=seven_classes))
    with pytest.raises(ValueError, match=f"{file}evaluate it on a data set of 7 classes"):
        ClassificationTrainer(config(MODEL__WEIGHTS=seven_classes), eval_only=True)


def test_a_new_classifier_for_them(seven_classes):
    own = ClassificationTrainer(config()).model.state_dict()
    trainer = ClassificationTrainer(config(MODEL__WEIGHTS=seven_classes, MODEL__RESET_CLASSIFIER=True))
    given, file = trainer.model.state_dict(), torch.load(seven_classes)
    assert all(torch.equal(given[name], own[name] if "classifier" in name else file[name]) for name in given)


# --- seeds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [2**64, -(2**70), "9" * 4000])
def test_seeds_of_more_than_64_bits(seed):
    with pytest.raises(ValueError, match="^SEED must be a whole number of at most 64 bits, got '-?\\d+"):
        check_config(config(SEED=seed))


@pytest.mark.parametrize("seed", [2**63, -1])
def test_seeds_in_a_file(tmp_path, seed):
    (tmp_path / "seed.yaml").write_text(f"SEED: {seed}\n")
    with pytest.raises(ValueError, match=rf"^SEED must be 0 or more, and below 2\*\*63, got {seed}$"):
        check_config(load_config(classification_config(), tmp_path / "seed.yaml"))
