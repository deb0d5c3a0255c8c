"""mmengine and mmcv: ``norm_cfg=dict(type="FBN")`` builds, trains and is fused, named and frozen as their own norms."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import fbn_plugin
from fbn_plugin import FilteredBatchNorm2d, FilteredGroupNorm, SyncFilteredBatchNorm

pytest.importorskip("mmengine")
mmcv_cnn = pytest.importorskip("mmcv.cnn")

from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm, utils  # noqa: E402
from mmengine.registry import MODELS  # noqa: E402

from fbn_plugin.frameworks import mmengine as adapter  # noqa: E402
from fbn_plugin.layers.description import family  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "registered")

NAMES = [name for name, _ in fbn_plugin.NORMS if name not in adapter.MMCV_NORMS]


@pytest.fixture
def registered():
    adapter.register()
    adapter.register()
    yield
    adapter.unregister()
    adapter.unregister()


def build(norm_cfg: dict, channels: int = 32, postfix: int | str = ""):
    return mmcv_cnn.build_norm_layer(norm_cfg, channels, postfix)


class Network(nn.Module):
    """Two blocks of mmcv's and a norm that is named as its backbones name theirs."""

    def __init__(self, norm_cfg: dict, **kwargs) -> None:
        super().__init__()
        self.stem = mmcv_cnn.ConvModule(3, 8, 3, norm_cfg=norm_cfg, **kwargs)
        self.conv = mmcv_cnn.ConvModule(8, 16, 3, norm_cfg=norm_cfg, **kwargs)
        self.conv1 = nn.Conv2d(16, 32, 1, bias=False)
        self.norm1_name, norm1 = build(norm_cfg, 32, 1)
        self.add_module(self.norm1_name, norm1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, self.norm1_name)(self.conv1(self.conv(self.stem(x)))).mean((2, 3))


def trained(norm_cfg: dict, **kwargs) -> Network:
    """In evaluation mode, with scales, shifts and statistics that are not the first ones."""
    model = Network(norm_cfg, **kwargs)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
    model.train()(torch.randn(4, 3, 12, 12))
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_every_registered_norm_is_built_by_name(name):
    _, norm = build({"type": name, "requires_grad": False})
    assert type(norm) is type(fbn_plugin.get_norm(name, 32))
    assert not any(parameter.requires_grad for parameter in norm.parameters())
    assert norm(torch.randn(2, 32, 8, 8)).shape == (2, 32, 8, 8)
    assert type(MODELS.build({"type": name, "num_features": 32})) is type(norm)


def test_names_in_lower_case():
    assert type(build({"type": "fbn"})[1]) is FilteredBatchNorm2d
    for name in NAMES:
        assert MODELS.get(name.lower()).norm == name
    assert all(MODELS.get(name.lower()) is None for name in adapter.MMCV_NORMS)


def test_mmcvs_own_names_keep_their_meaning():
    for name in adapter.MMCV_NORMS:
        assert not isinstance(MODELS.get(name), adapter._Entry)


def test_options():
    _, norm = build({"type": "FBN", "t_sigma": 4, "momentum": 0.01, "eps": 1e-3, "requires_grad": True})
    assert (norm.t_sigma, norm.momentum, norm.eps) == (4, 0.01, 1e-3)
    assert build({"type": "FBN", "t_sigma": float("inf")})[1].t_sigma == float("inf")
    assert build({"type": "FGN", "num_groups": 4})[1].num_groups == 4  # as mmcv writes GN
    assert build({"type": "FGN"}, 24)[1].num_groups == 24
    assert type(build({"type": "FBN", "dims": 3})[1]) is fbn_plugin.FilteredBatchNorm3d
    with pytest.raises(ValueError, match="unknown option of FBN 't_sgma' .*did you mean 't_sigma'"):
        build({"type": "FBN", "t_sgma": 4})
    with pytest.raises(ValueError, match=r"t_sigma .*greater than 1.*0\.5"):
        build({"type": "FBN", "t_sigma": 0.5})
    with pytest.raises(ValueError, match="5 groups .*24 channels"):
        build({"type": "FGN", "num_groups": 5}, 24)


@pytest.mark.parametrize("name, theirs", [("FBN", "BN"), ("SyncFBN", "BN"), ("ScaledBN", "BN"), ("FGN", "GN")])
def test_checkpoints_have_the_same_keys(name, theirs):
    plain = Network({"type": theirs, **({"num_groups": 4} if theirs == "GN" else {})})
    model = Network({"type": name})
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_a_name_for_the_layer(name):
    prefix = {"BN": "bn", "FrozenBN": "bn", "GN": "gn", "LN": "ln", "IN": "in"}
    layer_name, norm = build({"type": name}, postfix=1)
    assert layer_name == prefix.get(family(norm), "norm_layer") + "1"
    if layer_name == "bn1":
        assert mmcv_cnn.is_norm(norm) or name == "FrozenBN"


@pytest.mark.parametrize("norm_cfg", [{"type": "FBN", "t_sigma": 2}, {"type": "FGN", "num_groups": 4}, {"type": "FRN"}])
def test_a_step_of_training_by_the_runner(norm_cfg, tmp_path):
    from mmengine.dataset import DefaultSampler
    from mmengine.model import BaseModel
    from mmengine.runner import Runner
    from torch.utils.data import DataLoader

    class Classifier(BaseModel):
        def __init__(self):
            super().__init__()
            self.network = Network(norm_cfg)

        def forward(self, images, labels, mode):
            scores = self.network(images)
            return {"loss": nn.functional.cross_entropy(scores, labels)} if mode == "loss" else scores

    data = [(torch.randn(3, 12, 12), index % 2) for index in range(4)]
    model = Classifier()
    before = copy.deepcopy(model.state_dict())
    runner = Runner(
        model,
        str(tmp_path),
        train_dataloader=DataLoader(data, 2, sampler=DefaultSampler(data)),
        train_cfg={"by_epoch": False, "max_iters": 2},
        optim_wrapper={
            "optimizer": {"type": "SGD", "lr": 0.1, "weight_decay": 0.1},
            "paramwise_cfg": {"norm_decay_mult": 0.0},
        },
        custom_hooks=[{"type": "EMAHook"}],
        log_level="ERROR",
        experiment_name=f"step_{norm_cfg['type']}",
    )
    runner.train()
    after = model.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert not torch.equal(before["network.conv1.weight"], after["network.conv1.weight"])
    if norm_cfg["type"] == "FBN":
        assert after["network.bn1.num_batches_tracked"] == 2 and type(model.network.bn1) is FilteredBatchNorm2d
        assert not torch.equal(before["network.bn1.running_mean"], after["network.bn1.running_mean"])
    decayed = {id(p) for group in runner.optim_wrapper.param_groups if group["weight_decay"] for p in group["params"]}
    norms = {id(p) for name, p in model.named_parameters() if "conv.weight" not in name and "conv1.w" not in name}
    assert bool(decayed & norms) == (norm_cfg["type"] == "FRN")  # which mmengine does not know as a norm


def test_norm_eval_and_frozen_stages():
    """mmdet's backbones put what is a ``_BatchNorm`` into evaluation mode, and stop gradients by ``requires_grad``."""
    model = Network({"type": "FBN"}).train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    for parameter in model.stem.parameters():
        parameter.requires_grad = False
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(2, 3, 12, 12)).sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.stem.bn.weight.grad is None and model.conv.bn.weight.grad is not None


def test_synchronized_norms():
    model = convert_sync_batchnorm(Network({"type": "FBN", "t_sigma": 3}))
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    assert {type(norm) for norm in norms} == {SyncFilteredBatchNorm} and {norm.t_sigma for norm in norms} == {3}
    reverted = revert_sync_batchnorm(model)  # as the runner does with a single process
    assert type(reverted.bn1) is SyncFilteredBatchNorm
    reverted(torch.randn(2, 3, 12, 12))
    assert type(utils.convert_sync_batchnorm(Network({"type": "BN"})).bn1) is nn.SyncBatchNorm
    with pytest.warns(UserWarning, match="left unsynchronized"):
        assert type(convert_sync_batchnorm(Network({"type": "RBN"})).bn1).__name__ == "RepresentativeBatchNorm2d"


# ScaledBN-A1 and RBN- are batch norms whose scale is not their weight.
@pytest.mark.parametrize("name", ["FBN", "ScaledBN", "ScaledBN-A1", "RBN-", "ConvNorm", "FGN", "BN"])
def test_fused_with_the_convolution(name):
    model = trained({"type": name})
    x = torch.randn(2, 3, 12, 12)
    expected = model(x)
    torch.testing.assert_close(mmcv_cnn.fuse_conv_bn(model)(x), expected, rtol=1e-4, atol=1e-4)
    assert any(isinstance(module, nn.Identity) for module in model.modules()) == (name != "FGN")


@pytest.mark.parametrize("conv", ["Conv2d", "Conv"])  # PyTorch's, and mmcv's with a forward of its own
def test_folded_by_fold_norms(conv):
    model = trained({"type": "FBN"}, conv_cfg={"type": conv})
    x = torch.randn(2, 3, 12, 12)
    expected = model(x)
    fbn_plugin.fold_norms(model)
    assert not any(isinstance(module, _BatchNorm) for module in model.modules())
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_fused_is_refused():
    with pytest.raises(ValueError, match="its scale depends on the image"):
        mmcv_cnn.fuse_conv_bn(trained({"type": "RBN"}))


@pytest.mark.parametrize("name", ["FBN", "ScaledBN-A1", "RBN-", "RBN", "BN"])
def test_efficient_evaluation(name):
    model = trained({"type": name})
    x = torch.randn(2, 3, 12, 12)
    expected = model(x)
    efficient = trained({"type": name}, efficient_conv_bn_eval=True)
    efficient.load_state_dict(model.state_dict())
    torch.testing.assert_close(efficient(x), expected, rtol=1e-4, atol=1e-4)

    from mmengine.model import efficient_conv_bn_eval as theirs

    got = theirs.efficient_conv_bn_eval_control(getattr(model, model.norm1_name), model.conv1, torch.ones(1, 16, 4, 4))
    torch.testing.assert_close(got, getattr(model, model.norm1_name)(model.conv1(torch.ones(1, 16, 4, 4))))


def test_a_norm_of_ones_own_is_there_as_soon_as_it_is_registered():
    class MineForMMEngine(nn.BatchNorm2d):
        pass

    try:
        fbn_plugin.NORMS.register(MineForMMEngine)
        assert build({"type": "MineForMMEngine", "momentum": 0.2}, postfix=2)[0] == "bn2"
        assert type(build({"type": "MineForMMEngine"})[1]) is MineForMMEngine
    finally:
        fbn_plugin.NORMS._obj_map.pop("MineForMMEngine")


def test_a_name_that_is_taken_keeps_its_meaning():
    adapter.unregister()
    try:
        MODELS.register_module("FBN", module=nn.BatchNorm2d)
        with pytest.warns(UserWarning, match="a 'FBN' already, torch.*BatchNorm2d"):
            adapter.register()
        assert type(build({"type": "FBN"})[1]) is nn.BatchNorm2d
        adapter.unregister()
        assert MODELS.get("FBN") is nn.BatchNorm2d
    finally:
        MODELS.module_dict.pop("FBN")


def test_unregister_leaves_nothing():
    assert type(MODELS.get("FBN")(8)) is FilteredBatchNorm2d and type(MODELS.get("FGN")(8)) is FilteredGroupNorm
    replaced = mmcv_cnn.fuse_conv_bn, utils.convert_sync_batchnorm
    assert all(hasattr(function, "__wrapped__") for function in replaced)
    adapter.unregister()
    assert not {*NAMES, *map(str.lower, NAMES)} & set(MODELS.module_dict)
    assert not any(hasattr(function, "__wrapped__") for function in replaced)
    assert adapter._enter not in fbn_plugin.NORMS.listeners


def test_mmdetection_trains_a_step():
    pytest.importorskip("mmcv._ext", reason="mmcv was installed without its operators, which mmdet needs")
    pytest.importorskip("mmdet")
    from mmdet.models import RetinaNet  # noqa: F401  (enters mmdet's models)
    from mmdet.registry import MODELS as DETECTORS
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    def config(norm, group_norm):
        levels = {"strides": [8, 16, 32, 64, 128]}
        coder = {"type": "mmdet.DeltaXYWHBBoxCoder"}
        anchors = {
            "type": "mmdet.AnchorGenerator",
            "octave_base_scale": 4,
            "scales_per_octave": 3,
            "ratios": [1.0],
            **levels,
        }
        assigner = {"type": "mmdet.MaxIoUAssigner", "pos_iou_thr": 0.5, "neg_iou_thr": 0.4, "min_pos_iou": 0}
        return {
            "type": "mmdet.RetinaNet",
            "backbone": {"type": "mmdet.ResNet", "depth": 18, "norm_cfg": norm, "norm_eval": True, "frozen_stages": 1},
            "neck": {
                **{"type": "mmdet.FPN", "in_channels": [64, 128, 256, 512], "out_channels": 32, "start_level": 1},
                **{"add_extra_convs": "on_input", "num_outs": 5, "norm_cfg": norm},
            },
            "bbox_head": {
                **{"type": "mmdet.RetinaHead", "num_classes": 3, "in_channels": 32, "feat_channels": 32},
                **{"anchor_generator": anchors, "bbox_coder": coder, "norm_cfg": group_norm, "stacked_convs": 1},
                "loss_cls": {"type": "mmdet.FocalLoss", "use_sigmoid": True},
                "loss_bbox": {"type": "mmdet.L1Loss"},
            },
            "train_cfg": {"assigner": assigner, "allowed_border": -1, "pos_weight": -1, "debug": False},
        }

    model = DETECTORS.build(config({"type": "FBN", "t_sigma": 4}, {"type": "FGN"})).train()
    plain = DETECTORS.build(config({"type": "BN"}, {"type": "GN", "num_groups": 32}))
    assert list(model.state_dict()) == list(plain.state_dict())
    norms = {name: module for name, module in model.named_modules() if isinstance(module, FilteredBatchNorm2d)}
    assert {module.training for name, module in norms.items() if name.startswith("backbone")} == {False}
    sample = DetDataSample(metainfo={"img_shape": (64, 64), "pad_shape": (64, 64), "batch_input_shape": (64, 64)})
    sample.gt_instances = InstanceData(bboxes=torch.tensor([[4.0, 4.0, 40.0, 40.0]]), labels=torch.tensor([1]))
    losses = model(torch.randn(2, 3, 64, 64), [sample, sample], mode="loss")
    sum(loss for values in losses.values() for loss in values).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
