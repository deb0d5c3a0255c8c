"""The detectron2 adapter against detectron2 itself: every place that reads a norm name, and what detectron2 then does
to the norm (freezing, weight decay, checkpoints, statistics per level). Models are tiny; no weights, no data."""

import copy
import functools
import json
import pickle
import re
import shlex
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

pytest.importorskip("detectron2", reason="detectron2 is not installed")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall, LazyConfig, get_cfg, instantiate
from detectron2.engine import default_setup
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.layers import (
    ASPP,
    Conv2d,
    CycleBatchNormList,
    DepthwiseSeparableConv2d,
    FrozenBatchNorm2d,
    NaiveSyncBatchNorm,
    ShapeSpec,
    batch_norm,
)
from detectron2.modeling import build_model
from detectron2.modeling.backbone import FPN, RegNet, ResNet, SimpleFeaturePyramid, ViT
from detectron2.modeling.backbone.regnet import ResBasicBlock, ResBottleneckBlock, SimpleStem, VanillaBlock
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, DeformBottleneckBlock
from detectron2.modeling.backbone.vit import ResBottleneckBlock as ViTBottleneckBlock
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead
from detectron2.solver import build_lr_scheduler, build_optimizer, get_default_optimizer_params
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from omegaconf import OmegaConf
from torchvision.ops import boxes as torchvision_boxes

import fbn_plugin
from fbn_plugin import NORMS, FilteredBatchNorm2d, FilteredGroupNorm
from fbn_plugin.engine.detectron2 import model as engine
from fbn_plugin.engine.detectron2.config import add_config, load_config
from fbn_plugin.frameworks import detectron2 as adapter
from fbn_plugin.layers.description import describe

pytestmark = pytest.mark.detectron2

SPEC = "FBN(t_sigma=4.0)"


@pytest.fixture(autouse=True)
def registered():
    torch.manual_seed(0)
    adapter.register()
    yield
    adapter.unregister()


def norms(module):
    """Names and modules of what detectron2 can put in as a norm, outside torch's own containers."""
    kinds = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, FrozenBatchNorm2d, batch_norm.LayerNorm)
    return {name: m for name, m in module.named_modules() if isinstance(m, kinds)}


def training_losses(model, objects=(2, 2)):
    with EventStorage():
        return model.train()(batch(objects))


def assert_all_filtered(module, expected=None):
    found = norms(module)
    assert found
    for name, norm in found.items():
        assert type(norm) is FilteredBatchNorm2d, name
        assert norm.t_sigma == 4.0, name
    if expected is not None:
        assert len(found) == expected


def assert_trains(module, *inputs):
    """Forward and backward are finite, and every norm has seen data."""
    before = {name: norm.running_mean.clone() for name, norm in norms(module).items()}
    outputs = module.train()(*inputs)
    outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
    flat = [
        t
        for o in (outputs if isinstance(outputs, (list, tuple)) else [outputs])
        for t in (o if isinstance(o, (list, tuple)) else [o])
    ]
    sum(t.square().mean() for t in flat if isinstance(t, torch.Tensor) and t.requires_grad).backward()
    for name, norm in norms(module).items():
        assert not torch.equal(norm.running_mean, before[name]), name
        assert norm.weight is None or norm.weight.grad.isfinite().all(), name


def tiny_config(architecture="GeneralizedRCNN", norm=SPEC, box_head_norm="", **overrides):
    """A Mask R-CNN (or RetinaNet, PanopticFPN) on a ResNet-50 FPN with a few channels."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.BACKBONE.NAME = (
        "build_retinanet_resnet_fpn_backbone" if architecture == "RetinaNet" else "build_resnet_fpn_backbone"
    )
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8
    cfg.MODEL.RESNETS.OUT_FEATURES = (
        ["res3", "res4", "res5"] if architecture == "RetinaNet" else ["res2", "res3", "res4", "res5"]
    )
    cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.RESNETS.OUT_FEATURES
    cfg.MODEL.FPN.NORM = norm
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 50
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = 3
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_CONV = 2
    cfg.MODEL.ROI_BOX_HEAD.CONV_DIM = 16
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_BOX_HEAD.NORM = norm
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 2
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 16
    cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 14
    cfg.MODEL.ROI_MASK_HEAD.NORM = norm
    cfg.MODEL.RETINANET.NORM = norm
    cfg.MODEL.RETINANET.NUM_CONVS = 2
    cfg.MODEL.SEM_SEG_HEAD.NORM = norm
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 16
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 4
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.merge_from_list([item for pair in overrides.items() for item in pair])
    return cfg


def batch(objects=(2, 2), size=64):
    """Two images of noise with boxes and masks (or none) and a semantic map."""
    images = []
    for count in objects:
        instances = Instances((size, size))
        corners = torch.rand(count, 2) * size / 2
        instances.gt_boxes = Boxes(torch.cat([corners, corners + 24], dim=1))
        instances.gt_classes = torch.zeros(count, dtype=torch.long)
        masks = torch.zeros(count, size, size, dtype=torch.bool)
        for mask, (x, y) in zip(masks, corners.long().tolist()):
            mask[y : y + 24, x : x + 24] = True
        instances.gt_masks = BitMasks(masks)
        images.append(
            {
                "image": torch.randint(0, 256, (3, size, size), dtype=torch.uint8),
                "instances": instances,
                "sem_seg": torch.randint(0, 4, (size, size)),
            }
        )
    return images


# --- names ---------------------------------------------------------------------------------------------------------


def test_detectron2s_own_names_keep_their_meaning():
    """Each listed name exists in detectron2, and gives what detectron2 gives."""
    adapter.unregister()
    own = {name: batch_norm.get_norm(name, 64) for name in adapter.DETECTRON2_NORMS}
    adapter.register()
    for name, norm in own.items():
        ours = batch_norm.get_norm(name, 64)
        assert type(ours) is type(norm), name
        assert repr(ours) == repr(norm), name


def test_names_in_any_case(tmp_path):
    """What is detectron2's is that; what is stored has the name's own case."""
    for name in filter(None, adapter.DETECTRON2_NORMS):
        assert repr(batch_norm.get_norm(name.lower(), 64)) == repr(batch_norm.get_norm(name, 64)), name
    assert type(batch_norm.get_norm("fbn(t_sigma=3)", 8)) is FilteredBatchNorm2d
    assert [type(each) for each in retinanet_head("bn").cls_subnet if "Norm" in type(each).__name__] == [
        type(each) for each in retinanet_head("BN").cls_subnet if "Norm" in type(each).__name__
    ]
    written = {"frozenbn": "FrozenBN", "Gn": "GN", "fbn(eps=1e-3)": "FBN(eps=1e-3)", "NoNorm": "NoNorm", "": ""}
    assert {norm: adapter.canonical_norm(norm) for norm in written} == written
    (tmp_path / "config.yaml").write_text("VERSION: 2\nMODEL: {RESNETS: {NORM: fbn}, FPN: {NORM: gn}}\n")
    cfg = load_config(str(tmp_path / "config.yaml"), ["MODEL.RETINANET.NORM", "syncfbn"])
    assert (cfg.MODEL.RESNETS.NORM, cfg.MODEL.FPN.NORM, cfg.MODEL.RETINANET.NORM) == ("FBN", "GN", "SyncFBN")


def test_a_name_that_is_detectron2s_and_anothers_but_for_its_case():
    def NaiveSyncbn(num_channels, *, dims=2, device=None, dtype=None):
        return nn.Identity()

    NORMS.register(NaiveSyncbn)
    try:
        assert type(batch_norm.get_norm("NaiveSyncbn", 8)) is nn.Identity
        assert type(batch_norm.get_norm("naiveSyncBN", 8)) is NaiveSyncBatchNorm
        with pytest.raises(ValueError, match="must be written 'naiveSyncBN' or 'NaiveSyncbn'"):
            batch_norm.get_norm("naivesyncbn", 8)
    finally:
        del NORMS._obj_map["NaiveSyncbn"]


def test_callables_and_no_norm():
    assert batch_norm.get_norm(None, 8) is None
    assert batch_norm.get_norm("", 8) is None
    assert type(batch_norm.get_norm(nn.InstanceNorm2d, 8)) is nn.InstanceNorm2d
    norm = batch_norm.get_norm(fbn_plugin.norm_factory("FBN(t_sigma=3)"), 8)
    assert type(norm) is FilteredBatchNorm2d and norm.t_sigma == 3


def test_specs():
    assert batch_norm.get_norm("FBN", 8).t_sigma == 5.0
    assert batch_norm.get_norm(SPEC, 8).t_sigma == 4.0
    norm = batch_norm.get_norm("FGN(num_groups=16)", 32)
    assert type(norm) is FilteredGroupNorm and norm.num_groups == 16
    assert batch_norm.get_norm("GN(num_groups=4)", 8).num_groups == 4
    assert [batch_norm.get_norm("FGN(t_sigma=3)", channels).num_groups for channels in (24, 40)] == [24, 20]
    with pytest.raises(ValueError, match="divisible"):  # detectron2's own name keeps its meaning
        batch_norm.get_norm("GN", 24)


@pytest.mark.parametrize(
    "norm, words",
    [
        ("FBM", ["FBM", "did you mean 'FBN'", "SyncBN", "FGN", "FrozenBN", "naiveSyncBN"]),
        ("naiveSyncBN(eps=1e-3)", ["naiveSyncBN", "without options"]),
        ("FBN(sigma=4)", ["sigma", "did you mean 't_sigma'"]),
        ("FBN(t_sigma=0.5)", ["0.5"]),
        ("FBN(4)", ["FBN(4)"]),
    ],
)
def test_a_wrong_name_is_one_sentence(norm, words):
    with pytest.raises(ValueError) as error:
        batch_norm.get_norm(norm, 8)
    message = str(error.value)
    assert all(word in message for word in words)
    assert "\n" not in message


# --- registration --------------------------------------------------------------------------------------------------


def test_every_loaded_module_gets_it_and_gives_it_back(monkeypatch):
    adapter.unregister()
    module = types.ModuleType("someones_model")
    exec("from detectron2.layers import get_norm as build_norm", vars(module))
    monkeypatch.setitem(sys.modules, "someones_model", module)
    holders = {
        name for name, m in sys.modules.items() if getattr(m, "__dict__", {}).get("get_norm") is batch_norm.get_norm
    }
    assert {f"detectron2.modeling.backbone.{name}" for name in ("resnet", "fpn", "regnet", "vit")} <= holders
    with pytest.raises(KeyError):
        module.build_norm("FBN", 8)

    adapter.register()
    adapter.register()
    late = {}
    exec("from detectron2.layers.batch_norm import get_norm", late)
    for build in (*(sys.modules[name].get_norm for name in holders), module.build_norm, late["get_norm"]):
        assert type(build("FBN", 8)) is FilteredBatchNorm2d

    adapter.unregister()
    adapter.unregister()
    for build in (module.build_norm, late["get_norm"], lambda norm, _: retinanet_head(norm)):
        with pytest.raises(KeyError):
            build("FBN", 8)


def test_who_holds_get_norm_already_gets_it_too():
    """As the modules of a project do that were imported first, in whatever form."""
    adapter.unregister()

    class Builder:
        own = staticmethod(batch_norm.get_norm)

    lazy = LazyCall(batch_norm.get_norm)(norm=SPEC, out_channels=8)
    holders = {
        "partial": functools.partial(batch_norm.get_norm, out_channels=8),
        "dict": functools.partial({"norm": batch_norm.get_norm}["norm"], out_channels=8),
        "static method": functools.partial(Builder.own, out_channels=8),
    }
    adapter.register()
    for name, build in holders.items():
        assert build(SPEC).t_sigma == 4, name
    assert instantiate(lazy).t_sigma == 4
    assert instantiate(copy.deepcopy(lazy)).t_sigma == 4
    assert "detectron2.layers.get_norm(" in LazyConfig.to_py(lazy)


@pytest.mark.parametrize(
    "before, after",
    [
        ("", "import detectron2.projects.deeplab.resnet as module"),
        ("import detectron2.layers", "import detectron2.projects.deeplab.resnet as module"),
        ("import detectron2.projects.deeplab.resnet as module", ""),
    ],
    ids=["registered first", "after detectron2.layers", "registered last"],
)
def test_import_order(before, after):
    code = f"""
        import fbn_plugin
        {before}
        assert "detectron2" in fbn_plugin.register()
        {after}
        stem = module.DeepLabStem(out_channels=8, norm="FBN")
        assert all(type(c.norm) is fbn_plugin.FilteredBatchNorm2d for c in (stem.conv1, stem.conv2, stem.conv3))
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], check=True)


def test_get_cfg_has_our_keys_while_registered(tmp_path):
    held = get_cfg
    cfg = held()
    assert cfg.SOLVER.SCALE_LR_DIVISOR == 0 and cfg.TEST.EVAL_ITERATIONS == ()
    cfg.merge_from_list(["SOLVER.SCALE_LR_DIVISOR", "100.0"])
    (tmp_path / "changed.yaml").write_text(cfg.dump())
    (tmp_path / "plain.yaml").write_text(held().dump())

    adapter.unregister()
    plain = held()
    assert "SCALE_LR_DIVISOR" not in plain.SOLVER and "NORM_STATS_PERIOD" not in plain
    plain.merge_from_file(str(tmp_path / "plain.yaml"))
    assert json.dumps(plain) == json.dumps(held())  # YAML has no tuples
    with pytest.raises(KeyError, match="SOLVER.SCALE_LR_DIVISOR"):
        plain.merge_from_file(str(tmp_path / "changed.yaml"))

    adapter.register()
    again = held()
    again.merge_from_file(str(tmp_path / "changed.yaml"))
    assert json.dumps(again) == json.dumps(cfg)


def test_scripts_of_others_say_which_keys_they_do_nothing_about(tmp_path, caplog):
    args = types.SimpleNamespace(config_file="")
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    for changed in ({}, {"SOLVER.SCALE_LR_DIVISOR": 100.0, "NORM_STATS_PERIOD": 5}):
        cfg.merge_from_list([part for item in changed.items() for part in item])
        caplog.clear()
        default_setup(cfg, args)
        said = [record.message for record in caplog.records if record.name == adapter.__name__]
        assert len(said) == bool(changed) and all("SOLVER.SCALE_LR_DIVISOR, NORM_STATS_PERIOD" in text for text in said)
    assert "SCALE_LR_DIVISOR: 100.0" in (tmp_path / "config.yaml").read_text()
    default_setup(OmegaConf.create({"train": {"output_dir": str(tmp_path)}}), args)  # of LazyConfig


# --- every place that reads a norm ---------------------------------------------------------------------------------


def resnet(block, **kwargs):
    stem = BasicStem(3, 8, norm=SPEC)
    stage = ResNet.make_stage(block, 2, in_channels=8, out_channels=16, stride_per_block=[2, 1], norm=SPEC, **kwargs)
    return ResNet(stem, [stage], out_features=["res2"])


def regnet(block):
    return RegNet(
        stem_class=SimpleStem,
        stem_width=8,
        block_class=block,
        depth=2,
        w_a=8,
        w_0=8,
        w_m=2,
        group_width=8,
        norm=SPEC,
    )


def simple_feature_pyramid():
    vit = ViT(
        img_size=32,
        patch_size=8,
        embed_dim=16,
        depth=1,
        num_heads=2,
        window_size=0,
        use_rel_pos=False,
        out_feature="last_feat",
    )
    for p in vit.parameters():
        p.requires_grad_(False)
    return SimpleFeaturePyramid(vit, "last_feat", out_channels=16, scale_factors=(4.0, 2.0, 1.0, 0.5), norm=SPEC)


def fpn():
    return FPN(resnet(BasicBlock), ["res2"], out_channels=16, norm=SPEC)


def box_head():
    shape = ShapeSpec(channels=16, height=14, width=14)
    return FastRCNNConvFCHead(shape, conv_dims=[8, 8], fc_dims=[4], conv_norm=SPEC)


def aspp(**kwargs):
    return ASPP(16, 8, [1, 2, 3], norm=SPEC, activation=nn.functional.relu, **kwargs)


PYRAMID = {f"p{i}": ShapeSpec(channels=16, stride=2**i) for i in (2, 3)}
IMAGE, FEATURES, ROIS = (2, 3, 32, 32), (2, 16, 8, 8), (3, 16, 14, 14)

PLACES = {
    "ResNet basic": (lambda: resnet(BasicBlock), IMAGE, 6),
    "ResNet bottleneck": (lambda: resnet(BottleneckBlock, bottleneck_channels=8), IMAGE, 8),
    "ResNeXt": (lambda: resnet(BottleneckBlock, bottleneck_channels=8, num_groups=4), IMAGE, 8),
    "RegNet": (lambda: regnet(ResBottleneckBlock), IMAGE, None),
    "RegNet basic": (lambda: regnet(ResBasicBlock), IMAGE, None),
    "RegNet vanilla": (lambda: regnet(VanillaBlock), IMAGE, None),
    "FPN": (fpn, IMAGE, 8),
    "ViT residual block": (lambda: ViTBottleneckBlock(16, 16, 8, norm=SPEC), FEATURES, 3),
    "box head": (box_head, ROIS, 2),
    "ASPP": (aspp, FEATURES, 5),
    "ASPP separable": (functools.partial(aspp, use_depthwise_separable_conv=True), FEATURES, 8),
    "separable convolution": (lambda: DepthwiseSeparableConv2d(16, 8, norm1=SPEC, norm2=SPEC), FEATURES, 2),
}


@pytest.mark.parametrize("place", PLACES)
def test_place(place):
    build, shape, count = PLACES[place]
    module = build()
    assert_all_filtered(module, count)
    assert_trains(module, torch.randn(shape))


def test_deformable_block():
    """Built only: detectron2's deformable convolution does not run on a CPU."""
    assert_all_filtered(DeformBottleneckBlock(8, 16, bottleneck_channels=8, norm=SPEC), 4)


def test_simple_feature_pyramid():
    module = simple_feature_pyramid()
    pyramid = nn.ModuleList(module.stages)
    assert_all_filtered(pyramid, 9)
    module.net.eval()
    outputs = module(torch.randn(2, 3, 32, 32))
    assert all(o.isfinite().all() for o in outputs.values())


def test_mask_head():
    head = MaskRCNNConvUpsampleHead(ShapeSpec(channels=16), num_classes=2, conv_dims=[8, 8, 8], conv_norm=SPEC)
    assert_all_filtered(head, 2)
    assert_trains(nn.Sequential(*head), torch.randn(ROIS))


def test_semantic_head():
    head = SemSegFPNHead(PYRAMID, num_classes=3, conv_dims=8, common_stride=4, norm=SPEC)
    assert_all_filtered(head, 2)
    features = {"p2": torch.randn(2, 16, 8, 8), "p3": torch.randn(2, 16, 4, 4)}
    loss = head(features, torch.randint(0, 3, (2, 32, 32)))[1]["loss_sem_seg"]
    assert loss.isfinite()


def test_deeplab():
    deeplab = pytest.importorskip("detectron2.projects.deeplab")
    resnet_module = sys.modules["detectron2.projects.deeplab.resnet"]
    assert_all_filtered(resnet_module.DeepLabStem(out_channels=8, norm=SPEC), 3)
    shapes = {"res2": ShapeSpec(channels=16, stride=4), "res5": ShapeSpec(channels=16, stride=16)}
    head = deeplab.DeepLabV3PlusHead(
        shapes,
        project_channels=[8],
        aspp_dilations=[1, 2, 3],
        aspp_dropout=0.0,
        decoder_channels=[8, 8],
        common_stride=4,
        norm=SPEC,
        train_size=None,
        num_classes=3,
    )
    assert_all_filtered(head, 8)
    features = {"res2": torch.randn(2, 16, 16, 16), "res5": torch.randn(2, 16, 4, 4)}
    assert head(features, torch.randint(0, 3, (2, 64, 64)))[1]["loss_sem_seg"].isfinite()


def test_panoptic_deeplab():
    pytest.importorskip("panopticapi", reason="Panoptic-DeepLab needs panopticapi")
    panoptic_deeplab = pytest.importorskip("detectron2.projects.panoptic_deeplab")
    shapes = {"res2": ShapeSpec(channels=16, stride=4), "res5": ShapeSpec(channels=16, stride=16)}
    common = {
        "project_channels": [8],
        "aspp_dilations": [1, 2, 3],
        "aspp_dropout": 0.0,
        "decoder_channels": [8, 8],
        "common_stride": 4,
        "norm": SPEC,
        "train_size": None,
        "head_channels": 8,
    }
    instance = panoptic_deeplab.PanopticDeepLabInsEmbedHead(
        shapes, center_loss_weight=1.0, offset_loss_weight=1.0, **common
    )
    semantic = panoptic_deeplab.PanopticDeepLabSemSegHead(
        shapes, loss_weight=1.0, loss_type="cross_entropy", loss_top_k=1.0, ignore_value=255, num_classes=3, **common
    )
    assert_all_filtered(instance)
    assert_all_filtered(semantic)


def test_tridentnet():
    tridentnet = pytest.importorskip("tridentnet", reason="TridentNet's project folder is not on the path")
    assert_all_filtered(tridentnet.TridentBottleneckBlock(8, 16, bottleneck_channels=8, norm=SPEC), 4)


def test_densepose():
    densepose = pytest.importorskip("densepose", reason="DensePose is not installed")
    decoder = sys.modules["densepose.modeling.roi_heads.roi_head"].Decoder
    cfg = get_cfg()
    densepose.add_densepose_config(cfg)
    cfg.MODEL.ROI_DENSEPOSE_HEAD.DECODER_NORM = SPEC
    assert_all_filtered(decoder(cfg, PYRAMID, ["p2", "p3"]), 2)


# --- whole models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["GeneralizedRCNN", "RetinaNet", "PanopticFPN"])
def test_yaml_builds_and_trains(architecture):
    model = build_model(tiny_config(architecture, **{"MODEL.BACKBONE.FREEZE_AT": 0}))
    assert all(type(m) is FilteredBatchNorm2d for m in norms(model).values())
    bias = [name for name, m in model.backbone.named_modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
    assert not [name for name in bias if "fpn" in name], "a convolution before a norm needs no bias"
    losses = training_losses(model)
    total = sum(losses.values())
    total.backward()
    assert total.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        model(batch())


@pytest.mark.parametrize("norm", ["ConvNorm", "LearnedNorm", "FRN", "FFRN(tlu=True)"])
def test_norms_of_the_other_papers_train(norm):
    # Fifty layers of LearnedNorm's random networks overflow from every second seed.
    resnet18 = {"MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64, "MODEL.BACKBONE.FREEZE_AT": 0}
    model = build_model(tiny_config(norm=norm, **resnet18))
    kind = type(fbn_plugin.get_norm(norm, 8))
    assert sum(type(m) is kind for m in model.modules()) > 20
    sum(training_losses(model).values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad is not None for m in model.backbone.modules() if type(m) is kind for p in m.parameters())
    model.eval()
    with torch.no_grad():
        model(batch())


def test_retinanet_keeps_conv_norms_per_level():
    lists = [m for m in retinanet_head("ConvNorm").modules() if isinstance(m, CycleBatchNormList)]
    assert [[type(norm) for norm in each] for each in lists] == [[fbn_plugin.ConvNorm2d] * 3] * 4


def test_heads_without_objects():
    """No object in the batch leaves the mask head with an empty input: training goes on, its statistics stay."""
    model = build_model(tiny_config())
    norm = model.roi_heads.mask_head.mask_fcn1.norm
    losses = training_losses(model, objects=(0, 0))
    sum(losses.values()).backward()
    assert torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))
    assert torch.equal(norm.running_var, torch.ones_like(norm.running_var))
    assert norm.weight.grad.isfinite().all()


def test_the_saved_config_alone_rebuilds_the_model(tmp_path):
    model = build_model(tiny_config())
    (tmp_path / "config.yaml").write_text(tiny_config().dump())
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "config.yaml"), allow_unsafe=False)
    rebuilt = build_model(cfg)
    assert repr(rebuilt) == repr(model)
    rebuilt.load_state_dict(model.state_dict())


def test_lazy_config(tmp_path):
    cfg = LazyCall(FPN)(
        bottom_up=LazyCall(ResNet)(
            stem=LazyCall(BasicStem)(in_channels=3, out_channels=64, norm=SPEC),
            stages=LazyCall(ResNet.make_default_stages)(depth=18, norm=SPEC),
            out_features=["res5"],
        ),
        in_features=["res5"],
        out_channels=8,
        norm=SPEC,
    )
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    for config in (cfg, LazyConfig.load(str(tmp_path / "config.yaml"))):
        assert_all_filtered(instantiate(config), 22)


def test_the_overrides_that_the_documentation_names_reach_a_whole_lazy_config():
    pytest.importorskip("hydra")
    text = (Path(__file__).parents[2] / "docs" / "detectron2.md").read_text(encoding="utf-8")
    command = re.search(r"lazyconfig_train_net\.py (.*?[^\\])\n", text, re.DOTALL)[1].replace("\\\n", " ")
    resnet = LazyCall(ResNet)(
        stem=LazyCall(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
        stages=LazyCall(ResNet.make_default_stages)(depth=18, norm="FrozenBN"),
        out_features=["res2", "res3"],
    )
    pyramid = LazyCall(FPN)(bottom_up=resnet, in_features=["res2", "res3"], out_channels=8)
    cfg = OmegaConf.create({"model": {"backbone": pyramid}}, flags={"allow_objects": True})
    quoted = re.search(r'"(model\.backbone\.norm=\'FBN.*?)"', text)[1]
    for last in ((), (quoted,)):
        overrides = [word for word in shlex.split(command) if word.startswith("model.")]
        built = instantiate(LazyConfig.apply_overrides(cfg, [*overrides, *last]).model.backbone)
        assert {type(norm) for norm in norms(built).values()} == {FilteredBatchNorm2d}
    assert built.fpn_output2.norm.t_sigma == 4


def test_lazy_config_file_registers_by_itself(tmp_path):
    """For detectron2's own lazyconfig_train_net.py, which knows nothing of us."""
    adapter.unregister()
    (tmp_path / "config.py").write_text(
        textwrap.dedent("""
            import fbn_plugin
            from detectron2.config import LazyCall as L
            from detectron2.modeling.backbone.resnet import BasicStem

            fbn_plugin.register()
            model = L(BasicStem)(norm="FBN(t_sigma=4.0)")
        """)
    )
    assert_all_filtered(instantiate(LazyConfig.load(str(tmp_path / "config.py")).model), 1)


# --- what detectron2 does to norms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze_at, frozen_stages", [(0, []), (1, ["stem"]), (2, ["stem", "res2"])])
def test_freeze_at(freeze_at, frozen_stages):
    """Frozen stages have neither trainable parameters nor moving statistics; the others have both."""
    model = build_model(tiny_config(**{"MODEL.BACKBONE.FREEZE_AT": freeze_at}))
    bottom_up = model.backbone.bottom_up
    before = {name: norm.running_mean.clone() for name, norm in norms(bottom_up).items()}
    sum(training_losses(model).values()).backward()
    seen = set()
    for name, norm in norms(bottom_up).items():
        stage = name.split(".")[0]
        seen.add(stage)
        frozen = stage in frozen_stages
        assert type(norm) is (FrozenBatchNorm2d if frozen else FilteredBatchNorm2d), name
        assert torch.equal(norm.running_mean, before[name]) == frozen, name
        assert bool(list(norm.parameters())) != frozen, name
    assert seen == {"stem", "res2", "res3", "res4", "res5"}


@pytest.mark.parametrize("spec", ["FBN", "SyncFBN"])
def test_frozen_filtered_norm_computes_what_evaluation_computes(spec):
    norm = batch_norm.get_norm(spec, 8)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(norm.weight)
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(copy.deepcopy(norm))
    x = torch.randn(2, 8, 4, 4)
    assert type(frozen) is FrozenBatchNorm2d
    torch.testing.assert_close(frozen(x), norm.eval()(x))


@pytest.mark.parametrize("norm", ["ScaledBN", "ScaledBN-A1", "ScaledBN-A2", "IEBN-"])
def test_frozen_norms_keep_the_whole_scale(norm):
    model = nn.Sequential(*(batch_norm.get_norm(norm, 8) for _ in range(2)))
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    x = torch.randn(2, 8, 4, 4)
    expected = model.eval()(x)
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(model)
    assert [type(m) for m in frozen] == [FrozenBatchNorm2d] * 2
    torch.testing.assert_close(frozen(x), expected)


def test_input_norms_freeze_without_a_shift():
    norm, x = fbn_plugin.InputNorm2d(), torch.randn(2, 3, 4, 4)
    expected = norm.eval()(x)
    torch.testing.assert_close(FrozenBatchNorm2d.convert_frozen_batchnorm(norm)(x), expected)


def test_a_norm_that_is_no_batch_norm_in_evaluation_is_not_frozen():
    with pytest.raises(ValueError, match="RepresentativeBatchNorm2d .*evaluation"):
        build_model(tiny_config(norm="RBN", **{"MODEL.BACKBONE.FREEZE_AT": 1}))
    adapter.unregister()  # after which detectron2 asks nobody
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(fbn_plugin.RepresentativeBatchNorm2d(4))
    assert type(frozen) is FrozenBatchNorm2d


@pytest.mark.parametrize("norm", ["ScaledBN", "ScaledBN-A1", "ScaledBN-A2", "RBN", "RBN-", "IEBN", "IEBN-"])
def test_scaled_and_gated_norms_build_and_train(norm):
    model = build_model(tiny_config(norm=norm, **{"MODEL.BACKBONE.FREEZE_AT": 0}))
    assert {type(m) for m in norms(model).values()} == {type(fbn_plugin.get_norm(norm, 8))}
    fbn_plugin.apply_gamma_init(model)
    sum(training_losses(model).values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_unfreezing_gives_batch_norm_and_conversion_the_filter_back():
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(nn.Sequential(FilteredBatchNorm2d(8)))
    thawed = FrozenBatchNorm2d.convert_frozenbatchnorm2d_to_batchnorm2d(frozen)
    assert type(thawed[0]) is nn.BatchNorm2d
    assert type(fbn_plugin.convert_norm(thawed, "FBN")[0]) is FilteredBatchNorm2d


@pytest.mark.parametrize("norm", [SPEC, "ConvNorm(kernel_sizes=(2, 2))", "LearnedNorm(affine=True)", "FRN"])
def test_weight_decay_norm(norm):
    """Of every norm, but for what it names itself: kernels and networks."""
    cfg = tiny_config(
        norm=norm, **{"SOLVER.WEIGHT_DECAY": 0.1, "SOLVER.WEIGHT_DECAY_NORM": 0.025, "MODEL.BACKBONE.FREEZE_AT": 0}
    )
    model = build_model(cfg)
    decay = {p: group["weight_decay"] for group in build_optimizer(cfg, model).param_groups for p in group["params"]}
    found = [module for module in model.modules() if describe(module) is not None]
    in_norms = {p for norm in found for p in norm.parameters()}
    own = {p for norm in found for name, p in norm.named_parameters() if re.match("kernel|.*network", name)}
    assert in_norms and bool(own) == norm.startswith(("ConvNorm", "Learned"))
    assert all(decay[p] == (0 if p in own else 0.025 if p in in_norms else 0.1) for p in model.parameters())


def test_detectron2s_own_settings_of_biases_stay():
    model = build_model(tiny_config(norm="FRN", **{"MODEL.BACKBONE.FREEZE_AT": 0}))
    settings = {"base_lr": 0.1, "weight_decay": 0.1, "weight_decay_norm": 0.025, "weight_decay_bias": 0.5}
    groups = get_default_optimizer_params(model, overrides={"tau": {"weight_decay": 0.7}}, bias_lr_factor=2, **settings)
    given = {p: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    biases = {given[p] for name, p in model.named_parameters() if name.endswith("bias")}
    scales = {given[norm.weight] for norm in model.modules() if describe(norm) is not None}
    assert (biases, scales) == ({(0.2, 0.5)}, {(0.1, 0.025)}) and len(given) == len(list(model.parameters()))


def randomize(model):
    with torch.no_grad():
        for p in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            p.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("architecture", ["GeneralizedRCNN", "RetinaNet"])
@pytest.mark.parametrize("source, target", [("BN", SPEC), (SPEC, "BN")])
def test_checkpoints_load_both_ways(tmp_path, source, target, architecture):
    saved = randomize(build_model(tiny_config(architecture, norm=source)))
    DetectionCheckpointer(saved, save_dir=str(tmp_path)).save("model")
    loaded = build_model(tiny_config(architecture, norm=target))
    DetectionCheckpointer(loaded).load(str(tmp_path / "model.pth"))
    expected = saved.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_converted_imagenet_weights_load(tmp_path):
    """The zoo's backbones are pickles without the prefix, matched by name: weights and statistics reach the norms."""
    model = build_model(tiny_config(**{"MODEL.BACKBONE.FREEZE_AT": 0}))
    weights = {
        name: torch.rand(value.shape).numpy()
        for name, value in model.backbone.bottom_up.state_dict().items()
        if "num_batches_tracked" not in name
    }
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "torchvision", "matching_heuristics": True}))
    DetectionCheckpointer(model).load(str(path))
    state = model.backbone.bottom_up.state_dict()
    assert any("running_var" in name for name in weights)
    for name, value in weights.items():
        assert torch.equal(state[name], torch.from_numpy(value)), name


def retinanet_head(norm, levels=3):
    return RetinaNetHead(
        input_shape=[ShapeSpec(channels=16)] * levels, num_classes=2, num_anchors=1, conv_dims=[16, 16], norm=norm
    )


@pytest.mark.parametrize("affine", [True, False])
def test_retinanet_keeps_statistics_per_level(affine):
    head = retinanet_head(f"FBN(t_sigma=4.0, affine={affine})")
    lists = [m for m in head.modules() if isinstance(m, CycleBatchNormList)]
    assert [len(m) for m in lists] == [3] * 4
    assert_all_filtered(head, 12)
    assert all((m.weight is not None if affine else not hasattr(m, "weight")) for m in lists)
    head([torch.randn(2, 16, 8, 8) + level for level in range(3)])
    for norms_of_levels in lists:
        assert all(norm.num_batches_tracked == 1 for norm in norms_of_levels)
        assert not torch.equal(norms_of_levels[0].running_mean, norms_of_levels[1].running_mean)


def test_retinanet_keeps_synchronized_statistics_per_level():
    head = retinanet_head("SyncFBN(t_sigma=4.0)")
    lists = [m for m in head.modules() if isinstance(m, CycleBatchNormList)]
    assert len(lists) == 4 and all(type(norm) is fbn_plugin.SyncFilteredBatchNorm for m in lists for norm in m)
    assert all(norm.t_sigma == 4 and norm.weight is None for m in lists for norm in m)


def test_retinanet_like_batch_norm():
    """With nothing to filter, the head computes what detectron2's own BN head does, in the same state_dict."""
    own, ours = retinanet_head("BN"), retinanet_head("FBN(t_sigma=inf)")
    ours.load_state_dict(own.state_dict())
    features = [torch.randn(2, 16, 8, 8) for _ in range(3)]
    for a, b in zip(own(features)[0], ours(features)[0]):
        torch.testing.assert_close(a, b)
    for (name, a), b in zip(own.state_dict().items(), ours.state_dict().values()):
        torch.testing.assert_close(a, b, msg=name)
    copy.deepcopy(ours)


def test_mask_rcnn_like_batch_norm(monkeypatch):
    """With nothing to filter, losses and gradients of the whole detector are those of detectron2's own BN, in float64:
    backbone, FPN, box and mask head."""
    nms = torchvision_boxes.batched_nms  # which detectron2 gives boxes as float32, whatever the scores
    monkeypatch.setattr(
        torchvision_boxes, "batched_nms", lambda boxes, scores, *rest: nms(boxes, scores.float(), *rest)
    )
    results = []
    for norm in ("BN", "FBN(t_sigma=inf)"):
        torch.manual_seed(0)
        overrides = {"MODEL.BACKBONE.FREEZE_AT": 0, "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV2"}
        model = build_model(tiny_config(norm=norm, **overrides)).double()
        kinds = {type(module) for name, module in norms(model).items()}
        assert kinds == {nn.BatchNorm2d if norm == "BN" else FilteredBatchNorm2d}
        torch.manual_seed(1)  # images and proposals
        losses = training_losses(model)
        sum(losses.values()).backward()
        results.append((losses, dict(model.named_parameters()), dict(model.named_buffers())))
    (own, parameters, buffers), (ours, our_parameters, our_buffers) = results
    assert own.keys() == ours.keys() and {"loss_mask", "loss_cls", "loss_rpn_loc"} <= own.keys()
    for name, loss in own.items():
        assert loss > 0, name
        torch.testing.assert_close(ours[name], loss, rtol=1e-6, atol=0, msg=name)
    for part in ("backbone.bottom_up", "backbone.fpn", "roi_heads.box_head", "roi_heads.mask_head"):
        assert any(name.startswith(part) and "norm" in name and p.grad.any() for name, p in parameters.items()), part
    for name, parameter in parameters.items():
        assert parameter.grad.dtype == torch.float64, name
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(our_parameters[name].grad, parameter.grad, rtol=1e-6, atol=1e-6 * scale, msg=name)
    for name, buffer in buffers.items():
        torch.testing.assert_close(our_buffers[name], buffer, rtol=1e-6, atol=1e-9, msg=name)


def test_retinanet_keeps_the_small_scale_of_its_norms():
    head = retinanet_head("ScaledBN(gamma_init=0.25)")
    lists = [m for m in head.modules() if isinstance(m, CycleBatchNormList)]
    assert len(lists) == 4 and all(m.weight.eq(0.25).all() and m.bias.eq(0).all() for m in lists)
    for m in lists:
        nn.init.ones_(m.weight)
    fbn_plugin.apply_gamma_init(head)
    assert all(m.weight.eq(0.25).all() for m in lists)


@pytest.mark.parametrize(
    "norm, kind",
    [
        ("FGN(num_groups=4)", FilteredGroupNorm),
        ("GN(num_groups=8)", nn.GroupNorm),
        ("ScaledBN-A1", fbn_plugin.ScaledBatchNormA1),
    ],
)
def test_retinanet_shares_other_norms(norm, kind):
    head = retinanet_head(norm)
    assert [type(m) for m in norms(head).values()] == [kind] * 4


def test_retinanet_shares_callables():
    """As detectron2 has it: the class or factory, in place of its name, asks for shared statistics."""
    head = retinanet_head(fbn_plugin.norm_factory(SPEC))
    assert not [m for m in head.modules() if isinstance(m, CycleBatchNormList)]
    assert_all_filtered(head, 4)


def test_retinanet_wrong_name():
    with pytest.raises(ValueError, match="FBM"):
        retinanet_head("FBM")


def test_precise_bn_takes_filtered_norms():
    """With nothing filtered, its population statistics are those of batch normalization."""
    data = [torch.randn(4, 3, 16, 16) for _ in range(3)]
    results = []
    for spec in ("BN", "FBN(t_sigma=inf)"):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), batch_norm.get_norm(spec, 8)).train()
        assert len(get_bn_modules(model)) == 1
        update_bn_stats(model, data, num_iters=3)
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=name)


def test_convert_norm_knows_detectron2s_batch_norms():
    model = nn.Sequential(NaiveSyncBatchNorm(8), CycleBatchNormList(2, num_features=8))
    model[0].running_mean.fill_(3)
    fbn_plugin.convert_norm(model, SPEC)
    assert_all_filtered(model, 3)
    assert (model[0].running_mean == 3).all()
    assert not model[1][0].affine


def test_convert_sync_knows_detectron2s_batch_norms():
    norms_of_levels = CycleBatchNormList(2, bn_class=FilteredBatchNorm2d, num_features=8)
    model, report = nn.Sequential(NaiveSyncBatchNorm(8), norms_of_levels), fbn_plugin.NormReport()
    fbn_plugin.convert_sync(model, report=report)
    assert type(model[0]) is NaiveSyncBatchNorm and report.left[0].reason == "it is synchronized already"
    assert [type(norm) for norm in model[1]] == [fbn_plugin.SyncFilteredBatchNorm] * 2 and not model[1][0].affine


def test_convert_norm_knows_detectron2s_layer_norm():
    norm, report = batch_norm.LayerNorm(8, eps=1e-3), fbn_plugin.NormReport()
    with pytest.warns(UserWarning, match="nothing was converted"):
        fbn_plugin.convert_norm(norm, SPEC, report=report)
    assert report.left[0].reason == "LN is not among the sources"
    new = fbn_plugin.convert_norm(norm, "FLN(t_sigma=inf)", sources="LN")
    assert type(new) is fbn_plugin.FilteredLayerNorm2d and new.weight is norm.weight and new.eps == 1e-3
    x = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(new(x), norm(x))


@pytest.mark.parametrize("depth, fused, left", [(18, 17, 3), (50, 49, 4)])
def test_fused_blocks_compute_the_same(depth, fused, left):
    torch.manual_seed(0)
    stages = ResNet.make_default_stages(depth, norm=SPEC)
    old = ResNet(BasicStem(norm=SPEC), stages, out_features=["res2", "res5"]).double()
    new = fbn_plugin.fuse_norm_act(copy.deepcopy(old))
    kinds = [type(m) for m in new.modules()]
    assert (kinds.count(fbn_plugin.FilteredBatchNormAct2d), kinds.count(FilteredBatchNorm2d)) == (fused, left)
    x = torch.randn(2, 3, 64, 64).double()
    results = []
    for model in (old, new):
        outputs = model(x)
        sum(o.square().sum() for o in outputs.values()).backward()
        results.append((outputs, {name: p.grad for name, p in model.named_parameters()}, model.state_dict()))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)


class Deployed(nn.Module):
    """A detector as tools/deploy/export_model.py of detectron2 wraps it, whose ``Instances`` are for one process."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs: tuple[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        return [each.get_fields() for each in self.model.inference(inputs, do_postprocess=False)]


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("norm, fused", [(SPEC, False), (SPEC, True), ("FGN(num_groups=4)", False)])
def test_scripted_and_traced_detectors(norm, fused, tmp_path):
    model = build_model(tiny_config(norm=norm)).eval()
    model = Deployed(fbn_plugin.fuse_norm_act(model) if fused else model).eval()
    kinds = {"objectness_logits": torch.Tensor, "proposal_boxes": Boxes, "pred_boxes": Boxes}
    kinds |= dict.fromkeys(("scores", "pred_classes", "pred_masks"), torch.Tensor)
    images = [{"image": torch.rand(3, 64, 80) * 255}]
    with torch.no_grad():
        torch.jit.save(scripting_with_instances(model, kinds), tmp_path / "model.ts")
        (found,), (expected,) = torch.jit.load(tmp_path / "model.ts")(images), model(images)
        torch.testing.assert_close(found["scores"], expected["scores"])
        torch.testing.assert_close(found["pred_masks"], expected["pred_masks"])
        tracing = TracingAdapter(model, images)
        traced = torch.jit.trace(tracing, (images[0]["image"],), check_trace=False)
        other = torch.rand(3, 96, 64) * 255
        (found,), (expected,) = tracing.outputs_schema(traced(other)), model([{"image": other}])
        # Boxes are cut out of maps at places that roundings move.
        torch.testing.assert_close(found["scores"], expected["scores"], rtol=0, atol=1e-2)


def test_fused_mask_head_computes_the_same():
    head = MaskRCNNConvUpsampleHead(ShapeSpec(channels=16), num_classes=2, conv_dims=[8, 8, 8], conv_norm=SPEC)
    new = fbn_plugin.fuse_norm_act(copy.deepcopy(head))
    assert [type(m.norm) for m in new.conv_norm_relus] == [fbn_plugin.FilteredBatchNormAct2d] * 2
    x = torch.randn(ROIS)
    torch.testing.assert_close(new.layers(x), head.layers(x))


# --- an input norm, slow scales --------------------------------------------------------------------------------------


def training_config(architecture="GeneralizedRCNN", norm="FBN(gamma_init=0.25)", **overrides):
    cfg = tiny_config(architecture, norm)
    add_config(cfg)
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.merge_from_list([item for pair in overrides.items() for item in pair])
    return cfg


def uneven(images):
    """The second image is smaller, so that it is padded."""
    images[1]["image"] = images[1]["image"][:, :40, :48]
    images[1]["sem_seg"] = images[1]["sem_seg"][:40, :48]
    images[1]["instances"] = images[1]["instances"][:0]
    images[1]["instances"]._image_size = (40, 48)
    return images


@pytest.mark.parametrize(
    "architecture", ["GeneralizedRCNN", "RetinaNet", "PanopticFPN", "SemanticSegmentor", "ProposalNetwork"]
)
def test_an_input_norm_sees_the_pixels_and_not_the_padding(architecture):
    model = engine.build_model(training_config(architecture, **{"INPUT.NORM_GAMMA_INIT": 0.25}))
    norm, images = model.input_norm, uneven(batch())
    assert torch.allclose(norm.weight, torch.tensor(0.58 * 0.25)) and norm.bias is None
    seen = []
    model.backbone.register_forward_pre_hook(lambda backbone, args: seen.append(args[0]))
    with EventStorage():
        sum(model.train()(images).values()).backward()
    pixels = torch.cat([each["image"].flatten(1).double() for each in images], 1)
    torch.testing.assert_close(norm.running_mean.double(), 0.1 * pixels.mean(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(norm.running_var.double(), 0.9 + 0.1 * pixels.var(1), rtol=1e-5, atol=0)
    assert norm.weight.grad.isfinite().all() and norm.weight.grad.abs().max() > 0
    inside = torch.zeros_like(seen[0], dtype=torch.bool)
    for place, each in zip(inside, images):
        place[:, : each["image"].shape[1], : each["image"].shape[2]] = True
    assert (seen[0][~inside] == 0).all() and (~inside).any()
    whitened = (pixels - pixels.mean(1, keepdim=True)) / pixels.var(1, correction=0).sqrt()[:, None] * 0.58 * 0.25
    got = torch.cat([each[:, keep[0]] for each, keep in zip(seen[0].flatten(2), inside.flatten(2))], 1)
    torch.testing.assert_close(got.double(), whitened, rtol=1e-4, atol=1e-5)
    assert images[0]["image"].dtype == torch.uint8  # the caller's images are as they were


def test_inference_and_copies_of_a_model_with_an_input_norm():
    model = engine.build_model(training_config(**{"INPUT.NORM_GAMMA_INIT": 1.0}))
    training_losses(model)
    model.eval()
    images = [{"image": each["image"]} for each in batch()]
    with torch.no_grad():
        expected = model(images)
        copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        for got in (model.inference(images), copied(images)):
            assert all(torch.equal(a["instances"].scores, b["instances"].scores) for a, b in zip(got, expected))
        copied.input_norm.weight.data.mul_(3)
        assert not torch.equal(copied.preprocess_image(images).tensor, model.preprocess_image(images).tensor)
    assert model.input_norm.num_batches_tracked == 1


@pytest.mark.parametrize("architecture", ["GeneralizedRCNN", "RetinaNet", "PanopticFPN"])
def test_scales_start_small_and_learn_slowly_through_the_schedule(architecture):
    solver = {"BASE_LR": 0.2, "SCALE_LR_DIVISOR": 50.0, "WEIGHT_DECAY": 0.01, "WARMUP_ITERS": 4, "MAX_ITER": 20}
    overrides = {f"SOLVER.{key}": value for key, value in solver.items()}
    cfg = training_config(architecture, **overrides, **{"SOLVER.STEPS": (10,), "SOLVER.CLIP_GRADIENTS.ENABLED": True})
    model = engine.build_model(cfg)
    optimizer = engine.build_optimizer(cfg, model)
    schedule = build_lr_scheduler(cfg, optimizer)
    scales = {
        m.weight for m in model.modules() if isinstance(m, (_BatchNorm, CycleBatchNormList)) and m.weight is not None
    }
    assert len(scales) > 50 and all((scale == 0.25).all() for scale in scales)
    assert any(isinstance(m, CycleBatchNormList) for m in model.modules()) == (architecture == "RetinaNet")
    others = {p for m in model.modules() for name, p in m.named_parameters(recurse=False) if name == "bias"}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # what clipping wants
    rates = []
    for _ in range(20):
        for group in optimizer.param_groups:
            slow = group["params"][0] in scales
            assert all((p in scales) == slow for p in group["params"])
            assert group["weight_decay"] == (0 if slow or group["params"][0] in others else 0.01)
            assert group["lr"] == pytest.approx(optimizer.param_groups[0]["lr"] / (50 if slow else 1))
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] < rates[3] < rates[5] == pytest.approx(0.2) and rates[-1] == pytest.approx(0.02)
    assert type(optimizer).__name__ == "SGDWithGradientClip"


def test_without_the_keys_model_and_optimizer_are_detectron2s():
    cfg = training_config(norm=SPEC)
    torch.manual_seed(0)
    model = engine.build_model(cfg)
    torch.manual_seed(0)
    plain = build_model(cfg)
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values()))
    groups, expected = (build(cfg, model).param_groups for build in (engine.build_optimizer, build_optimizer))
    assert [{**group, "params": len(group["params"])} for group in groups] == [
        {**group, "params": len(group["params"])} for group in expected
    ]


@pytest.mark.parametrize(
    "key, value", [("WEIGHT_DECAY_NORM", 0.1), ("WEIGHT_DECAY_BIAS", 0.1), ("BIAS_LR_FACTOR", 2.0)]
)
def test_one_rule_for_weight_decay(key, value):
    cfg = training_config(**{"SOLVER.SCALE_LR_DIVISOR": 100.0, f"SOLVER.{key}": value})
    with pytest.raises(ValueError, match=f"SOLVER.{key} must be .*SCALE_LR_DIVISOR"):
        engine.build_optimizer(cfg, nn.BatchNorm2d(2))


def test_a_divisor_below_zero():
    cfg = training_config(**{"SOLVER.SCALE_LR_DIVISOR": -1.0})
    with pytest.raises(ValueError, match="^scale_lr_divisor must be above 0 and finite, got -1.0$"):
        engine.build_optimizer(cfg, nn.BatchNorm2d(2))


# --- freezing, thawing, folding -------------------------------------------------------------------------------------


def moved(model):
    """In evaluation mode, with the parameters and statistics of its norms as after training."""
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.2)
    return model.eval()


@pytest.mark.parametrize("spec", ["BN", SPEC])
def test_detectron2s_frozen_norms_convert_with_their_statistics(spec):
    norm = moved(FrozenBatchNorm2d(8, eps=1e-3))
    x = torch.randn(2, 8, 4, 4)
    expected = norm(x)
    new = fbn_plugin.convert_norm(norm, spec, sources="FrozenBN")
    assert type(new) is type(fbn_plugin.get_norm(spec, 8)) and new.eps == 1e-3 and new.weight.requires_grad
    torch.testing.assert_close(new.eval()(x), expected)
    frozen = fbn_plugin.convert_norm(new, "FrozenBN")
    assert type(frozen) is fbn_plugin.FrozenBatchNorm2d
    torch.testing.assert_close(frozen(x), expected)
    FrozenBatchNorm2d(8).load_state_dict(frozen.state_dict())


@pytest.mark.parametrize("norm", ["BN", SPEC, "FrozenBN", "SyncBN"])
def test_folded_mask_rcnn_computes_the_same(norm):
    model = moved(build_model(tiny_config(norm=norm)))
    images, rois = torch.randn(1, 3, 64, 64), torch.randn(3, 16, 7, 7)
    parts = {
        "features": lambda: model.backbone(images),
        "boxes": lambda: {"": model.roi_heads.box_head(rois)},
        "masks": lambda: {"": model.roi_heads.mask_head.layers(rois)},
    }
    expected = {name: part() for name, part in parts.items()}
    count, report = len(norms(model)), fbn_plugin.NormReport()
    assert fbn_plugin.fold_norms(model, report=report) is model
    assert len(report.changed) == count and not report.left and not norms(model)
    for name, part in parts.items():
        for key, value in part().items():
            error = (value - expected[name][key]).abs().max()
            assert error < 1e-5 * expected[name][key].abs().max(), (name, key)
    with torch.no_grad():
        model(batch())


@pytest.mark.parametrize("spec, left", [(SPEC, 12), (f"{SPEC[:-1]}, affine=False)", 12), (nn.BatchNorm2d, 0)])
def test_folded_retinanet_head_computes_the_same(spec, left):
    """Statistics of each level cannot go into weights that the levels share; one norm for all levels can."""
    head = moved(retinanet_head(spec))
    features = [torch.randn(2, 16, 8, 8) for _ in range(3)]
    expected, report = head(features), fbn_plugin.NormReport()
    fbn_plugin.fold_norms(head, report=report)
    assert (len(report.changed), len(report.left)) == (0 if left else 4, left)
    for a, b in zip(head(features), expected):
        torch.testing.assert_close(a, b)


def test_fused_residuals_and_lone_convolutions_with_activation():
    model = nn.Sequential(Conv2d(3, 4, 1, activation=torch.relu), nn.BatchNorm2d(4), Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model, x, report = moved(model), torch.randn(2, 3, 5, 5), fbn_plugin.NormReport()
    expected = model(x)
    fbn_plugin.fold_norms(model, report=report)
    torch.testing.assert_close(model(x), expected)
    assert [change.name for change in report.changed] == ["3"]
    assert report.left[0].reason == "the Conv2d before it has a norm or activation of its own"

    block = moved(fbn_plugin.fuse_norm_act(BasicBlock(8, 8, norm=SPEC)))
    x = torch.randn(2, 8, 5, 5)
    expected = block(x)
    fbn_plugin.fold_norms(block)
    torch.testing.assert_close(block(x), expected)
