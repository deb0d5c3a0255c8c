"""The files of configs/: those of one network differ in the norm alone, and every registered norm has one for each
framework that trains on handwritten digits: timm's, torchvision's and detectron2's. The detectors at full size, built
without memory, have the norms that they name where they name them, and are detectron2's own but for those."""

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from every_norm import ONE_SIZE
from torch import nn

import fbn_plugin
from fbn_plugin import NORMS
from fbn_plugin.engine.classification.config import classification_config
from fbn_plugin.engine.classification.trainer import ClassificationTrainer
from fbn_plugin.engine.data.demo_data import make_digits_on_photos
from fbn_plugin.engine.run import checkpoint
from fbn_plugin.engine.run.config import CfgNode, load_config, save_config
from fbn_plugin.engine.run.logging import read_metrics
from fbn_plugin.engine.torchvision.config import load_detection_config
from fbn_plugin.engine.torchvision.model import build_model
from fbn_plugin.engine.torchvision.trainer import DetectionTrainer
from fbn_plugin.frameworks.detectron2_keys import KEYS, changed_keys

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
CLASSIFIERS, DETECTORS = CONFIGS / "Digits" / "lenet5_convs", CONFIGS / "Demo" / "mask_rcnn_R_18_FPN"
NAMES = [name for name, _ in NORMS]

# Study files name their tool, and other configs.
STUDIES = [path for path in sorted(CONFIGS.glob("experiments/*.yaml")) if re.search("^TOOL:", path.read_text(), re.M)]
# A file is named NETWORK_NORM.yaml, NORM being the registry's name as it stands there, "RBN-" with its minus, or with a
# threshold behind it, as FBN-T2.
FILES = [path for path in sorted(CONFIGS.glob("*/[!B]*_*.yaml")) if path not in STUDIES]

# The detectors at full size.
COCO = [path for path in FILES if path.parent.name == "Misc" or path.parent.name.startswith("COCO-")]
SIX = ["BN", "FBN", "SyncBN", "SyncFBN", "GN", "FGN"]
NINE = [*SIX, "ConvNorm", "ScaledBN", "FrozenBN"]
PLAIN = {"FBN": "BN", "SyncFBN": "SyncBN", "FGN": "GN"}
COCO_NORMS = {
    "COCO-Detection/faster_rcnn_R_50_FPN_1x": ["BN", "FBN"],
    "COCO-Detection/retinanet_R_50_FPN_1x": ["BN", "FBN"],
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN": NINE,
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_all": SIX,
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x": NINE,
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_all": SIX,
    "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN": NINE,
    "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x": NINE,
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x": ["BN", "FBN"],
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x": ["BN", "FBN"],
    "Misc/cascade_mask_rcnn_R_50_FPN_1x": ["BN", "FBN"],
    "Misc/mask_rcnn_R_50_FPN_3x": SIX,
    "Misc/scratch_mask_rcnn_R_50_FPN_3x": [*SIX, "ScaledBN"],
}
# Models that torchvision's engine has not, with the key that says so.
NOT_TORCHVISION = {
    "retinanet": "ANCHOR_GENERATOR.SIZES|META_ARCHITECTURE",
    "panoptic": "META_ARCHITECTURE",
    "keypoint": "KEYPOINT_ON",
    "cascade": "ROI_HEADS.NAME",
}

# What else a norm, or one file, may set.
BESIDES = {
    "ScaledBN": {"SOLVER.SCALE_LR_DIVISOR"},
    "ScaledBN-A1": {"SOLVER.SCALE_LR_DIVISOR"},
    "ScaledBN-A2": {"SOLVER.SCALE_LR_DIVISOR"},
    "lenet5_convs_LearnedNorm": {"SOLVER.OPTIMIZER", "SOLVER.BASE_LR"},
    "mask_rcnn_R_18_FPN_LearnedNorm": {"SOLVER.BASE_LR"},
    "mask_rcnn_R_18_FPN_FrozenBN": {"SOLVER.BASE_LR"},
    "all_cnn_c_ConvNorm": {"MODEL.NAME"},
    "ImageNet/vgg16_ConvNorm": {"MODEL.NAME"},
    **{
        f"ImageNet/{network}_ScaledBN": {"SOLVER.SCALE_LR_DIVISOR", "SOLVER.FILTER_BIAS_AND_BN"}
        for network in ("resnet18", "resnet50", "resnet101", "resnext50_32x4d", "vgg16")
    },
    "CIFAR10/resnet18_ScaledBN": {"SOLVER.SCALE_LR_DIVISOR", "INPUT.NORM_GAMMA_INIT"},
    "CIFAR100/resnet34_ScaledBN": {"SOLVER.SCALE_LR_DIVISOR", "INPUT.NORM_GAMMA_INIT"},
}
for norm in ("GN", "FGN"):
    # The ImageNet weights that were trained with GN, and the place of the stride in them.
    for schedule in ("", "_all", "_1x", "_1x_all", "_3x"):
        BESIDES[f"mask_rcnn_R_50_FPN{schedule}_{norm}"] = {"MODEL.WEIGHTS", "MODEL.RESNETS.STRIDE_IN_1X1"}
    # There are none: BN's do not fit, so nothing of them is frozen.
    for schedule in ("", "_3x"):
        BESIDES[f"mask_rcnn_X_101_32x8d_FPN{schedule}_{norm}"] = {"MODEL.BACKBONE.FREEZE_AT"}

# The detectors on smaller images and fewer regions.
FEW = [
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "TEST.EVAL_PERIOD", "0"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "50", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16", "SOLVER.MAX_ITER", "12", "SOLVER.WARMUP_ITERS", "6"),
]


def split(path: Path) -> tuple[str, str]:
    network, _, norm = path.stem.rpartition("_")
    return network, norm


def coco_id(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


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
    names = [name for name in NAMES if network == CLASSIFIERS or name not in ONE_SIZE]
    assert sorted(split(path)[1] for path in files if split(path)[0] == network.name) == sorted(names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_configs_of_a_network_differ_in_the_norm_alone(path):
    network, norm = split(path)
    own, plain = values(path), values(path.with_name(f"{network}_BN.yaml"))
    kind = norm.partition("-T")[0]
    assert {spec.partition("(")[0] for key, spec in own.items() if key.endswith(".NORM")} <= {kind, ""}
    differing = {key for key in own.keys() | plain.keys() if own.get(key) != plain.get(key)}
    besides = {key for key in differing if not key.endswith(".NORM")} - {"OUTPUT_DIR"}
    names = f"{path.parent.name}/{path.stem}", path.stem, norm
    assert besides == next((BESIDES[name] for name in names if name in BESIDES), set())
    assert (norm == "BN") == (not differing)


@pytest.mark.parametrize("network", COCO_NORMS)
def test_every_detector_has_its_norms(network):
    found = [split(path)[1] for path in COCO if split(path)[0] == Path(network).name and path.match(f"{network}_*")]
    assert sorted(found) == sorted(COCO_NORMS[network])


def test_every_detector_is_listed():
    assert len(COCO) == sum(map(len, COCO_NORMS.values()))


@pytest.mark.parametrize("path", [path for path in COCO if split(path)[1] in PLAIN], ids=coco_id)
def test_a_filtered_config_is_its_plain_ones_but_for_the_filter(path):
    network, norm = split(path)
    own, plain = values(path), values(path.with_name(f"{network}_{PLAIN[norm]}.yaml"))
    differing = {key for key in own.keys() | plain.keys() if own.get(key) != plain.get(key)}
    assert differing and all(key.endswith(".NORM") for key in differing)
    assert {own[key] for key in differing} == {f"{norm}(t_sigma=5.0)"}


def is_detector(path: Path) -> bool:
    return "NAME" not in CfgNode.load_yaml_with_base(str(path))["MODEL"]  # of a network of timm's


def test_what_is_saved_is_read_back(tmp_path):
    """By the engines that do without detectron2."""
    for path in FILES:
        if is_detector(path) and not path.name.startswith(tuple(NOT_TORCHVISION)):
            cfg, again = load_detection_config(path), load_detection_config
        elif not is_detector(path):
            cfg, again = (
                load_config(classification_config(), path),
                functools.partial(load_config, classification_config()),
            )
        else:
            continue
        save_config(cfg, tmp_path / "config.yaml")
        assert again(tmp_path / "config.yaml") == cfg, path


@pytest.mark.detectron2
def test_plain_detectron2_code_reads_every_detector_after_register(tmp_path):
    """And what a run then saves, without this package, where it says nothing that is not detectron2's."""
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from detectron2.config import get_cfg

    file, plain = tmp_path / "config.yaml", 0
    for path in filter(is_detector, FILES):
        fbn_plugin.register()
        try:
            cfg, again = get_cfg(), get_cfg()
            cfg.merge_from_file(str(path))
            save_config(cfg, file)
            assert file.read_text() == cfg.dump()
            again.merge_from_file(str(file))
        finally:
            fbn_plugin.unregister()
        assert json.dumps(again, sort_keys=True) == json.dumps(cfg, sort_keys=True), path  # YAML has no tuples
        if not changed_keys(cfg):
            get_cfg().merge_from_file(str(file))
            plain += 1
    assert plain > 10


def norms_in(module: nn.Module | None) -> set[type]:
    leaves = [] if module is None else [each for each in module.modules() if not any(each.children())]
    return {type(each) for each in leaves if "Norm" in type(each).__name__}


@pytest.mark.parametrize("path", COCO, ids=coco_id)
def test_torchvisions_engine_reads_it_or_says_why_not(path):
    key = next((key for kind, key in NOT_TORCHVISION.items() if path.name.startswith(kind)), None)
    if key:
        with pytest.raises(ValueError, match=key):
            load_detection_config(path)
        return
    cfg = load_detection_config(path)
    with torch.device("meta"):
        model = build_model(cfg)
    body, names = model.backbone.body, ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
    mask_head = model.roi_heads.mask_head if cfg.MODEL.MASK_ON else None
    for name, part in zip(names, (body.layer4, model.backbone.fpn, model.roi_heads.box_head, mask_head)):
        norm = cfg.MODEL[name].NORM
        if norm == "FrozenBN":
            assert [each.__name__ for each in norms_in(part)] == ["FrozenBatchNorm2d"]
        else:
            assert norms_in(part) == ({type(fbn_plugin.get_norm(norm, 64))} if norm else set())


@pytest.fixture
def in_detectron2():
    """The norms in detectron2."""
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    fbn_plugin.register()
    yield
    fbn_plugin.unregister()


def detectron2_config(path: Path):
    """The config as the tool reads it, for a model without memory."""
    from fbn_plugin.engine.detectron2.config import load_config

    return load_config(str(path), ["MODEL.DEVICE", "meta"])


def detectron2_model(path: Path) -> nn.Module:
    from fbn_plugin.engine.detectron2.model import build_model

    with torch.device("meta"):
        return build_model(detectron2_config(path))


def detectron2_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a model by the group of the config that names their norm; of the backbone, what is never frozen."""
    backbone = model.backbone
    yield "RESNETS", nn.ModuleList([backbone.bottom_up.res3, backbone.bottom_up.res4, backbone.bottom_up.res5])
    yield "FPN", nn.ModuleList([part for name, part in backbone.named_children() if name != "bottom_up"])
    heads = getattr(model, "roi_heads", None)
    yield "ROI_BOX_HEAD", getattr(heads, "box_head", None)
    yield "ROI_MASK_HEAD", getattr(heads, "mask_head", None)
    yield "ROI_KEYPOINT_HEAD", getattr(heads, "keypoint_head", None)
    yield "SEM_SEG_HEAD", getattr(model, "sem_seg_head", None)
    yield "RETINANET", getattr(model, "head", None)


@pytest.mark.detectron2
@pytest.mark.parametrize("path", COCO, ids=coco_id)
def test_detectron2_builds_the_norms_where_they_are_named(path, in_detectron2):
    from detectron2.layers import FrozenBatchNorm2d, get_norm

    cfg = detectron2_config(path)
    model = detectron2_model(path)
    for name, part in detectron2_parts(model):
        norm = cfg.MODEL[name].get("NORM", "")
        assert norms_in(part) == ({type(get_norm(norm, 64))} if norm and part is not None else set())

    body, norm = model.backbone.bottom_up, type(get_norm(cfg.MODEL.RESNETS.NORM, 64))
    first = nn.ModuleList([body.stem, body.res2])
    assert cfg.MODEL.BACKBONE.FREEZE_AT in (0, 2)
    frozen = cfg.MODEL.BACKBONE.FREEZE_AT == 2
    assert {parameter.requires_grad for parameter in first.parameters()} == {not frozen}
    has_statistics = "running_mean" in dict(get_norm(cfg.MODEL.RESNETS.NORM, 64).named_buffers())
    assert norms_in(first) == {FrozenBatchNorm2d if frozen and has_statistics else norm}


@pytest.mark.detectron2
@pytest.mark.parametrize(
    "ours, own, besides",
    [
        ("COCO-Detection/faster_rcnn_R_50_FPN_1x_BN", "", {"MODEL.RESNETS.NORM"}),
        ("COCO-Detection/retinanet_R_50_FPN_1x_BN", "", {"MODEL.RESNETS.NORM", "MODEL.RETINANET.NORM"}),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_FrozenBN", "", set()),
        ("COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x_FrozenBN", "", set()),
        ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x_BN", "", {"MODEL.RESNETS.NORM"}),
        (
            "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x_BN",
            "",
            {"MODEL.RESNETS.NORM", "MODEL.SEM_SEG_HEAD.NORM"},
        ),
        ("Misc/cascade_mask_rcnn_R_50_FPN_1x_BN", "", {"MODEL.RESNETS.NORM"}),
        ("Misc/mask_rcnn_R_50_FPN_3x_GN", "Misc/mask_rcnn_R_50_FPN_3x_gn", {"MODEL.WEIGHTS"}),
        ("Misc/mask_rcnn_R_50_FPN_3x_SyncBN", "Misc/mask_rcnn_R_50_FPN_3x_syncbn", set()),
        ("Misc/scratch_mask_rcnn_R_50_FPN_3x_GN", "Misc/scratch_mask_rcnn_R_50_FPN_3x_gn", {"MODEL.PIXEL_STD"}),
    ],
)
def test_it_is_detectron2s_own_but_for_norm_and_evaluation(ours, own, besides, in_detectron2):
    from detectron2.checkpoint.catalog import ModelCatalog
    from detectron2.config import get_cfg

    model_zoo = pytest.importorskip("detectron2.model_zoo", reason="detectron2's model zoo wants setuptools below 81")
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(f"{own or ours.rpartition('_')[0]}.yaml"))
    plain = dict(leaves(cfg))
    mine = dict(leaves(detectron2_config(CONFIGS / f"{ours}.yaml")))
    differing = {key for key in plain.keys() - KEYS.keys() if mine[key] != plain[key]} - {"MODEL.DEVICE"}
    evaluation = {"TEST.EVAL_PERIOD", "TEST.PRECISE_BN.ENABLED", "SOLVER.CHECKPOINT_PERIOD"}
    assert differing - evaluation == besides | {"SOLVER.REFERENCE_WORLD_SIZE"}
    if "MODEL.WEIGHTS" in besides:  # the same file, under the address that needs no catalog
        assert mine["MODEL.WEIGHTS"] == ModelCatalog.get(plain["MODEL.WEIGHTS"].removeprefix("catalog://"))


@pytest.mark.detectron2
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.py")), ids=coco_id)
def test_a_lazy_config_is_its_yaml(path, in_detectron2):
    pytest.importorskip("detectron2.model_zoo", reason="detectron2's model zoo wants setuptools below 81")
    from detectron2.config import LazyConfig, instantiate

    fbn_plugin.unregister()  # the file registers by itself
    lazy = LazyConfig.load(str(path))
    with torch.device("meta"):
        model = instantiate(lazy.model)
    cfg, same = (
        detectron2_config(path.with_suffix(".yaml")),
        detectron2_model(path.with_suffix(".yaml")),
    )
    kinds = [{name: type(each) for name, each in built.named_modules()} for built in (model, same)]
    assert kinds[0] == kinds[1]
    shapes = [{name: value.shape for name, value in built.state_dict().items()} for built in (model, same)]
    assert shapes[0] == shapes[1]
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert lazy.train.max_iter == cfg.SOLVER.MAX_ITER and lazy.train.eval_period == cfg.TEST.EVAL_PERIOD
    assert lazy.optimizer.lr == cfg.SOLVER.BASE_LR
    assert lazy.dataloader.train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert lazy.dataloader.train.dataset.names in cfg.DATASETS.TRAIN


@pytest.mark.parametrize("folder", [CONFIGS, CONFIGS / "COCO-InstanceSegmentation"], ids=lambda path: path.name)
def test_a_readme_lists_every_config_of_its_folder_and_no_other(folder):
    """By patterns such as ``mask_rcnn_R_50_FPN_{BN,FBN}.yaml``."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    listed = set()
    for pattern in re.findall(r"^\| `([^`]+\.(?:yaml|py))`", text, re.MULTILINE):
        head, choices, tail = re.fullmatch(r"([^{]*)(?:\{(.*)\})?(.*)", pattern).groups()
        for choice in (choices or "").split(","):
            found = set(folder.glob(head + choice + tail))
            assert found and not found & listed, f"{pattern} names no file, or one that another row names"
            listed |= found
    there = {path for ending in ("yaml", "py") for path in folder.rglob(f"*.{ending}")}
    assert {path for path in there - listed if not path.name.startswith("Base-")} == set()


@pytest.fixture(params=NAMES)
def norm(request):
    if request.param == "SyncBN" and not torch.cuda.is_available():
        pytest.skip("SyncBN trains on GPUs only")
    return request.param


@pytest.fixture
def detector_norm(norm):
    if norm in ONE_SIZE:
        pytest.skip("a detector's maps are of many sizes")
    return norm


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


def test_torchvisions_detector_learns(detector_norm, tmp_path, datasets):
    overrides = [*datasets, *FEW, "OUTPUT_DIR", str(tmp_path)]
    DetectionTrainer(load_detection_config(f"{DETECTORS}_{detector_norm}.yaml", overrides), log_period=4).train()
    first, *_, last = losses(tmp_path)
    assert last < 0.98 * first


@pytest.mark.detectron2
def test_detectron2s_detector_learns(detector_norm, tmp_path, datasets, monkeypatch):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import train_net

    from fbn_plugin.engine.detectron2.checkpoint import AtomicCheckpointer

    monkeypatch.setattr(AtomicCheckpointer, "save", lambda *args, **kwargs: None)
    overrides = [*datasets, *FEW, "OUTPUT_DIR", str(tmp_path)]
    train_net.main(["--config-file", f"{DETECTORS}_{detector_norm}.yaml", "--log-period", "4", *overrides])
    first, *_, last = losses(tmp_path)
    assert last < 0.98 * first
