"""The files of configs/: those of one network differ in the norm alone, and every registered norm has one for each
framework that trains on handwritten digits: timm's, torchvision's and detectron2's."""

from pathlib import Path

import pytest
import torch

from fbn_plugin import NORMS
from fbn_plugin.engine import checkpoint
from fbn_plugin.engine.classification import ClassificationTrainer, classification_config
from fbn_plugin.engine.config import CfgNode, load_config
from fbn_plugin.engine.demo_data import make_digits_on_photos
from fbn_plugin.engine.detection import DetectionTrainer, load_detection_config
from fbn_plugin.engine.logging import read_metrics

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
CLASSIFIERS, DETECTORS = CONFIGS / "Digits" / "lenet5_convs", CONFIGS / "Demo" / "mask_rcnn_R_18_FPN"
NAMES = [name for name, _ in NORMS]

# A file is named NETWORK_NORM.yaml, NORM being the registry's name as it stands there, "RBN-" with its minus.
FILES = sorted(CONFIGS.glob("*/[!B]*_*.yaml"))

# What else a norm, or one file, may set.
BESIDES = {
    "ScaledBN": {"SOLVER.SCALE_LR_DIVISOR"},
    "ScaledBN-A1": {"SOLVER.SCALE_LR_DIVISOR"},
    "ScaledBN-A2": {"SOLVER.SCALE_LR_DIVISOR"},
    "lenet5_convs_LearnedNorm": {"SOLVER.OPTIMIZER", "SOLVER.BASE_LR"},
    "mask_rcnn_R_18_FPN_LearnedNorm": {"SOLVER.BASE_LR"},
    "mask_rcnn_R_18_FPN_FrozenBN": {"SOLVER.BASE_LR"},
    "all_cnn_c_ConvNorm": {"MODEL.NAME"},
}

# The detectors on smaller images and fewer regions.
FEW = [
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "TEST.EVAL_PERIOD", "0"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "50", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16", "SOLVER.MAX_ITER", "12", "SOLVER.WARMUP_ITERS", "6"),
]


def split(path: Path) -> tuple[str, str]:
    network, _, norm = path.stem.rpartition("_")
    return network, norm


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def values(path: Path) -> dict:
    return dict(leaves(CfgNode.load_yaml_with_base(str(path))))


@pytest.mark.parametrize("network", [CLASSIFIERS, DETECTORS], ids=lambda path: path.name)
def test_every_norm_has_a_config(network):
    files = [path for path in FILES if path.parent == network.parent]
    assert sorted(split(path)[1] for path in files if split(path)[0] == network.name) == sorted(NAMES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_configs_of_a_network_differ_in_the_norm_alone(path):
    network, norm = split(path)
    own, plain = values(path), values(path.with_name(f"{network}_BN.yaml"))
    assert {spec.partition("(")[0] for key, spec in own.items() if key.endswith("NORM")} <= {norm, ""}
    differing = {key for key in own.keys() | plain.keys() if own.get(key) != plain.get(key)}
    besides = {key for key in differing if not key.endswith("NORM")} - {"OUTPUT_DIR"}
    assert besides == BESIDES.get(path.stem, BESIDES.get(norm, set()))
    assert (norm == "BN") == (not differing)


@pytest.fixture(params=NAMES)
def norm(request):
    if request.param == "SyncBN" and not torch.cuda.is_available():
        pytest.skip("SyncBN trains on GPUs only")
    return request.param


@pytest.fixture(autouse=True)
def nothing_is_saved(monkeypatch):
    """A detector's checkpoint takes 100 MB."""
    monkeypatch.setattr(checkpoint.AtomicCheckpointer, "save", lambda *args, **kwargs: None)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = make_digits_on_photos(tmp_path_factory.mktemp("digits"), num_train=4, num_val=2)
    return ["DATASETS.TRAIN", f"('{folder}:train',)", "DATASETS.TEST", f"('{folder}:val',)"]


def losses(folder: Path) -> list[float]:
    return [row["total_loss"] for row in read_metrics(folder / "metrics.json") if "total_loss" in row]


def test_a_classifier_learns(norm, tmp_path):
    overrides = ["SOLVER.MAX_ITER", "100", "OUTPUT_DIR", str(tmp_path)]
    ClassificationTrainer(load_config(classification_config(), f"{CLASSIFIERS}_{norm}.yaml", overrides)).train()
    first, *_, last = losses(tmp_path)  # means of 20 iterations
    assert last < 0.98 * first


def test_torchvisions_detector_learns(norm, tmp_path, datasets):
    overrides = [*datasets, *FEW, "OUTPUT_DIR", str(tmp_path)]
    DetectionTrainer(load_detection_config(f"{DETECTORS}_{norm}.yaml", overrides), log_period=4).train()
    first, *_, last = losses(tmp_path)
    assert last < 0.98 * first


@pytest.mark.detectron2
def test_detectron2s_detector_learns(norm, tmp_path, datasets, monkeypatch):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import train_net

    monkeypatch.setattr(train_net.AtomicCheckpointer, "save", lambda *args, **kwargs: None)
    overrides = [*datasets, *FEW, "OUTPUT_DIR", str(tmp_path)]
    train_net.main(["--config-file", f"{DETECTORS}_{norm}.yaml", "--log-period", "4", *overrides])
    first, *_, last = losses(tmp_path)
    assert last < 0.98 * first
