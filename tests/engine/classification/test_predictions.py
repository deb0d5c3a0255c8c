"""Predictions of checkpoints: as the run measured them, averaged over views and models, by moments of batches."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny_classification import train

from fbn_plugin import evaluate_balanced
from fbn_plugin.engine.classification.comparison import check_same_set, evaluate_checkpoints
from fbn_plugin.engine.classification.crops import Views, normalized
from fbn_plugin.engine.classification.measures import measure
from fbn_plugin.engine.classification.model import build_model
from fbn_plugin.engine.classification.predictions import average, find_checkpoint, predict
from fbn_plugin.engine.data.image_data import load_image_data
from fbn_plugin.engine.data.splits import subset_by_class
from fbn_plugin.engine.run.checkpoint import load_file


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that have learned something: of FBN and of BN, in one thread, as how much depends on their number."""
    folder, threads = tmp_path_factory.mktemp("runs"), torch.get_num_threads()
    torch.set_num_threads(1)
    for norm in ("FBN", "BN"):
        train(folder / norm, MODEL__NORM=norm, SOLVER__MAX_ITER=30, SOLVER__BASE_LR=0.1)
    torch.set_num_threads(threads)
    return folder


def checkpoint(folder, *overrides, **options):
    return find_checkpoint(folder, overrides=list(map(str, overrides)), **options)


def images(cfg, crops=1):
    """All views of the validation images, normalized, (N, crops, C, H, W); and the labels."""
    data, views = load_image_data("digits", mode="L").val, Views(cfg, crops)
    pixels = torch.stack([views(image) for image, _ in (data[index] for index in range(len(data)))])
    return normalized(pixels, cfg), torch.tensor(data.targets)


def network(folder, cfg):
    model = build_model(cfg, 10).eval()
    model.load_state_dict(load_file(folder / "model_final.pth")["model"])
    return model


def test_one_crop_is_the_runs_own_evaluation(runs):
    found = predict(checkpoint(runs / "FBN"))
    figures, record = (
        measure(found.probabilities, found.labels).figures,
        json.loads((runs / "FBN/results.json").read_text()),
    )
    for name in ("top1", "top5", "loss"):
        assert figures[name] == pytest.approx(record[name], rel=1e-5)
    assert found.iteration == 29 and record["top1"] > 20


def test_pretrained_weights_are_not_wanted_again(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs / "FBN", folder)
    text = (folder / "config.yaml").read_text().replace("PRETRAINED: false", "PRETRAINED: true")
    (folder / "config.yaml").write_text(text.replace("PRETRAINED_PATH: ''", "PRETRAINED_PATH: gone.pth"))
    assert "gone.pth" in (folder / "config.yaml").read_text() and predict(checkpoint(folder)).iteration == 29


def test_probabilities_are_averaged_over_views(runs):
    each = checkpoint(runs / "FBN", "DATASETS.VAL_IMAGES", 30, "TEST.IMS_PER_BATCH", 300)
    found = predict(each, 144)
    data = load_image_data("digits", mode="L").val
    chosen, views = subset_by_class(data.targets, 30, 0), Views(each.cfg, 144)
    assert found.labels.tolist() == [data.targets[index] for index in chosen]
    x = normalized(torch.cat([views(data[index][0]) for index in chosen]), each.cfg)
    with torch.no_grad():
        logits = network(runs / "FBN", each.cfg)(x).numpy().astype(np.float64).reshape(30, 144, 10)
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(found.probabilities, softmax.mean(1), atol=1e-6)


def test_an_ensemble_against_numpy(runs):
    pair = [checkpoint(runs / norm, name=norm) for norm in ("FBN", "BN")]
    comparison = evaluate_checkpoints(pair, ensemble=True)
    x, labels = images(pair[0].cfg)
    with torch.no_grad():
        logits = [network(runs / each.name, each.cfg)(x[:, 0]).numpy().astype(np.float64) for each in pair]
    softmax = np.mean([np.exp(each) / np.exp(each).sum(1, keepdims=True) for each in logits], axis=0)
    figures = comparison.entries["ensemble of 2"].figures
    assert figures["top1"] == pytest.approx(100 * np.mean(softmax.argmax(1) == labels.numpy()))
    assert figures["loss"] == pytest.approx(-np.log(softmax[np.arange(360), labels]).mean(), rel=1e-5)
    assert list(comparison.entries) == ["FBN", "BN", "ensemble of 2"]


def test_balanced_moments_are_those_of_evaluate_balanced(runs):
    each = checkpoint(runs / "FBN", "TEST.MOMENTS", "balanced")
    x, labels = images(each.cfg)
    expected = evaluate_balanced(network(runs / "FBN", each.cfg), torch.utils.data.TensorDataset(x[:, 0]), labels)
    found = predict(each)
    assert torch.equal(found.probabilities.argmax(1), expected.predictions) and torch.equal(found.labels, labels)
    assert found.note.endswith("conditional: the test labels balanced the batches")


def test_batch_moments_of_ten_crops(runs):
    """Each view of a batch by the moments of that view, and the answers in the set's order."""
    each = checkpoint(runs / "FBN", "TEST.MOMENTS", "batch", "TEST.IMS_PER_BATCH", 360, "INPUT.CROP_PCT", 0.8)
    found = predict(each, 10)
    x, _ = images(each.cfg, 10)
    model = network(runs / "FBN", each.cfg).train()  # all images are one batch
    with torch.no_grad():
        expected = torch.stack([model(view).double().softmax(1) for view in x.unbind(1)]).mean(0)
    torch.testing.assert_close(found.probabilities, expected, atol=1e-5, rtol=0)


def test_what_does_not_go_together(runs, tmp_path):
    first = predict(checkpoint(runs / "FBN", "DATASETS.VAL_IMAGES", 50))
    with pytest.raises(ValueError, match="--ensemble must be of runs on the same images, as a is, got 'b'"):
        average([first, predict(checkpoint(runs / "BN"))], ["a", "b"])
    other = checkpoint(runs / "BN", "DATASETS.VAL_IMAGES", 50)
    with pytest.raises(ValueError, match="DATASETS.VAL_IMAGES must be the same in all that is compared, got 0 in "):
        check_same_set([checkpoint(runs / "FBN"), other])
    with pytest.raises(FileNotFoundError, match="nowhere is not there"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        find_checkpoint(tmp_path)
    (tmp_path / "weights.pth").write_bytes((runs / "BN/model_final.pth").read_bytes())
    with pytest.raises(ValueError, match="is a run folder with a config of its own: --config-file is of weights alone"):
        find_checkpoint(tmp_path, tmp_path / "other.yaml")
    with pytest.raises(FileNotFoundError, match="--config-file names the config of weights that lie alone"):
        find_checkpoint(tmp_path / "weights.pth")
    found = find_checkpoint(tmp_path / "weights.pth", runs / "BN/config.yaml", ["MODEL.NAME", "test_resnet"])
    with pytest.raises(ValueError, match="weights.pth"):
        predict(found)


def test_a_run_of_a_detector_is_named_as_one(tmp_path):
    (tmp_path / "config.yaml").write_text("MODEL: {META_ARCHITECTURE: GeneralizedRCNN}\n")
    (tmp_path / "run_info.json").write_text('{"engine": "torchvision"}')
    (tmp_path / "model_final.pth").touch()
    with pytest.raises(ValueError, match="is no run of a classifier: by its run_info.json it is one of torchvision"):
        find_checkpoint(tmp_path)
