"""Mask R-CNN: the norm reaches every place, frozen stages stay as they are, and torchvision's own weights fit."""

import pytest
import torch
import torchvision
from small_mask_rcnn import batch, small
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import feature_extraction
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

import fbn_plugin
from fbn_plugin import FilteredBatchNorm2d, norm_factory
from fbn_plugin.models import mask_rcnn
from fbn_plugin.models.mask_rcnn import BACKBONES, ScaledResNet, load_backbone, mask_rcnn_fpn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "BN"},
        {"norm": "FBN(t_sigma=3)", "norm_fpn": "FBN", "norm_box_head": "FBN", "norm_mask_head": "FBN"},
        {"norm": "FGN", "norm_fpn": "GN(num_groups=4)", "norm_mask_head": "FLN"},
        {"norm": "FrozenBN", "trainable_layers": 0},
        {"norm": "ConvNorm", "norm_fpn": "FRN", "norm_box_head": "LearnedNorm", "norm_mask_head": "ConvNorm"},
        {"masks": False, "box_fcs": ()},
    ],
)
def test_it_trains_and_detects(options):
    torch.manual_seed(0)
    if "norm_box_head" in options:
        options = {**options, "box_convs": (16,), "box_fcs": (16,)}
    model = small(**options).train()
    losses = model(*batch())
    names = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert losses.keys() == names | ({"loss_mask"} if options.get("masks", True) else set())
    sum(losses.values()).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    model.eval()
    with torch.no_grad():
        outputs = model(batch()[0])
    assert [("masks" in output) for output in outputs] == [options.get("masks", True)] * 2


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone(name):
    with torch.device("meta"):
        model = mask_rcnn_fpn(name, "FBN")
    with torch.device("meta"):
        reference = getattr(torchvision.models, name)()
    own, theirs = model.backbone.body.state_dict(), reference.state_dict()
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in theirs.items() if not k.startswith("fc.")}
    assert not any(type(m) is nn.BatchNorm2d for m in model.modules())


def test_norms_stand_where_they_are_named():
    model = small(
        norm="FBN", norm_fpn="GN(num_groups=4)", norm_box_head="BN", norm_mask_head="FIN", box_convs=None, box_fcs=None
    )

    def norms(module):
        return [type(m).__name__ for m in module.modules() if type(m).__name__.endswith(("Norm", "Norm2d"))]

    assert set(norms(model.backbone.body)) == {"FilteredBatchNorm2d"}
    assert norms(model.backbone.fpn) == ["GroupNorm"] * 8
    assert norms(model.roi_heads.box_head) == ["BatchNorm2d"] * 4  # and one fully connected layer
    assert [type(m) for m in model.roi_heads.box_head.modules()].count(nn.Linear) == 1
    assert norms(model.roi_heads.mask_head) == ["FilteredInstanceNorm2d"]
    assert norms(model.rpn) == []


@pytest.mark.parametrize("norm", ["BN", "FBN"])
@pytest.mark.parametrize("trainable", range(6))
def test_frozen_stages_do_not_move(norm, trainable):
    torch.manual_seed(0)
    model = small(norm=norm, trainable_layers=trainable).train()
    body = model.backbone.body
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    before = {name: value.clone() for name, value in body.state_dict().items()}
    sum(model(*batch()).values()).backward()
    optimizer.step()
    moved = {name.split(".")[0] for name, value in body.state_dict().items() if not torch.equal(value, before[name])}
    stages = [("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)]
    assert moved == {name for stage in stages[5 - trainable :] for name in stage}
    frozen = [m for stage in stages[: 5 - trainable] for name in stage for m in body[name].modules()]
    assert not any(isinstance(m, _BatchNorm) for m in frozen)
    assert not any(p.requires_grad for m in frozen for p in m.parameters())


@pytest.mark.parametrize("norm", ["ScaledBN", "ScaledBN-A1", "ScaledBN-A2", "IEBN-"])
def test_a_frozen_stage_keeps_the_whole_scale(norm):
    body = torchvision.models.resnet18(norm_layer=norm_factory(norm))
    for parameter in body.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    x = torch.rand(2, 3, 64, 64)
    before = body.eval()(x)
    frozen = mask_rcnn._freeze(body)
    assert not [m for m in frozen.modules() if isinstance(m, _BatchNorm)]
    torch.testing.assert_close(frozen.train()(x), before, rtol=1e-3, atol=1e-4)


def test_a_stage_whose_scale_depends_on_the_image_is_not_frozen():
    with pytest.raises(ValueError, match="InstanceEnhancementBatchNorm2d .*evaluation"):
        small(norm="IEBN", trainable_layers=4)
    small(norm="IEBN", trainable_layers=5)


def test_a_frozen_stage_is_the_batch_norm_of_evaluation(tmp_path):
    source = torchvision.models.resnet18()
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2), nn.init.normal_(module.bias)
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
            module.eps = 1e-3
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model = small(norm="FBN(eps=1e-3)", trainable_layers=0, weights_backbone=tmp_path / "weights.pth").train()
    x = torch.rand(2, 3, 64, 64)
    source.eval()
    features = feature_extraction.create_feature_extractor(source, {"layer1": "0", "layer4": "3"})(x)
    own = model.backbone.body(x)
    for level in features:
        torch.testing.assert_close(own[level], features[level], rtol=1e-3, atol=1e-3)


def test_torchvisions_detector_has_the_same_keys_and_the_same_output():
    torch.manual_seed(0)
    reference = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
    model = mask_rcnn_fpn("resnet50", "FBN", num_classes=3)
    model.load_state_dict(reference.state_dict())
    images = [torch.rand(3, 40, 50)]
    for each in (model, reference):
        each.eval()
        each.transform.min_size, each.transform.max_size = (64,), 96
        each.roi_heads.score_thresh = 0.3
    with torch.no_grad():
        (own,), (theirs,) = model(images), reference(images)
    assert own.keys() == theirs.keys() and len(theirs["boxes"])
    assert all(torch.equal(own[name], theirs[name]) for name in own)


NARROW = {"stem_channels": 16, "res2_channels": 64, "width_per_group": 16}


@pytest.mark.parametrize(
    "name, options", [("resnet18", {}), ("resnet50", {}), ("resnet50", {"groups": 32, "width_per_group": 4})]
)
def test_a_scaled_resnet_at_torchvisions_widths_is_torchvisions(name, options):
    block, layers = mask_rcnn._BLOCKS[name]
    own = ScaledResNet(block, layers, res2_channels=64 * block.expansion, **options)
    plain = getattr(torchvision.models, name)(**options)
    own.load_state_dict(plain.state_dict())
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(own.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("res2", [64, 4 * 49])  # 49 * (1 / 49) is below 1 in floating point
def test_a_scaled_resnet_has_the_widths_that_it_is_told(res2):
    options = {"stem_channels": 16, "res2_channels": res2, "groups": 2, "width_per_group": 3}
    model = ScaledResNet(*mask_rcnn._BLOCKS["resnet50"], norm_layer=norm_factory("FBN"), num_classes=10, **options)
    assert (model.conv1.out_channels, model.bn1.num_features, model.layer1[0].conv1.in_channels) == (16, 16, 16)
    for level in range(4):
        for block in getattr(model, f"layer{level + 1}"):
            assert block.conv2.in_channels == block.conv2.out_channels == 6 * 2**level
            assert block.conv3.out_channels == block.bn3.num_features == res2 * 2**level
            assert isinstance(block.bn3, FilteredBatchNorm2d) and block.conv2.groups == 2
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 10)
    assert isinstance(fbn_plugin.fuse_norm_act(model).bn1, fbn_plugin.FilteredBatchNormAct2d)


def test_a_narrow_detector_trains_in_all_its_parts():
    model = small(backbone="resnet50", norm="FBN", backbone_options=NARROW, bottleneck_stride="1x1")
    first = model.backbone.body.layer2[0]
    assert first.conv1.stride == (2, 2) and first.conv2.stride == (1, 1) and first.conv2.out_channels == 32
    sum(model(*batch()).values()).backward()
    assert all(parameter.grad is not None for parameter in model.backbone.parameters())


@pytest.mark.parametrize("norm", ["BN", "FBN", "FrozenBN"])
def test_backbone_weights_load(tmp_path, norm):
    source = torchvision.models.resnet18()
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    own = small(norm=norm, weights_backbone=tmp_path / "weights.pth").backbone.body.state_dict()
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in own.items())


def test_backbone_weights_go_into_norms_without_statistics_with_a_warning():
    source = torchvision.models.resnet18()
    body = small(norm="FGN").backbone.body
    with pytest.warns(UserWarning, match="running statistics .*state dict"):
        load_backbone(body, source.state_dict())
    assert torch.equal(body.layer4[1].conv2.weight, source.layer4[1].conv2.weight)


def test_what_a_norm_has_besides_keeps_its_value():
    source = torchvision.models.resnet18()
    body = small(norm="RBN").backbone.body
    before = {name: value.clone() for name, value in body.state_dict().items() if name not in source.state_dict()}
    loaded = load_backbone(body, source.state_dict())
    assert before and before.keys().isdisjoint(loaded) and set(loaded) == body.state_dict().keys() - before.keys()
    assert all(torch.equal(body.state_dict()[name], value) for name, value in before.items())


def test_wrong_weights_are_named(tmp_path):
    body = small().backbone.body
    path = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match=r"weights\.pth are not there"):
        load_backbone(body, path)
    path.write_text("no weights")
    with pytest.raises(ValueError, match=r"weights\.pth cannot be read"):
        load_backbone(body, path)
    for content in ([body.state_dict()], {"model": body.state_dict()}):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"weights\.pth are not a dictionary of tensors"):
            load_backbone(body, path)
    for source in (torchvision.models.resnet34(), torchvision.models.resnet50(), torchvision.models.vgg11_bn()):
        with pytest.raises(ValueError, match="does not fit the backbone"):
            load_backbone(body, source.state_dict())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"backbone": "resnet20"}, "backbone 'resnet20'.*resnet18"),
        ({"norm": "FBM"}, "unknown norm 'FBM'"),
        ({"norm": ""}, "norm .*backbone.*''"),
        ({"bottleneck_stride": 1}, "bottleneck_stride .*'3x3'.*'1x1'.*1"),
        (
            {"backbone": "wide_resnet50_2", "backbone_options": {"res2_channels": 64}},
            "wide_resnet50_2 .*res2_channels.*resnet18, resnet34",
        ),
        ({"norm_fpn": "GN(num_groups=32)"}, "32 groups for"),
        ({"trainable_layers": 6}, "trainable_layers .*0.*5.*6"),
        ({"anchor_sizes": ((8,), (16,))}, "anchor_sizes .*5 .*2"),
        ({"anchor_sizes": ((8,), (16,), (32,), (64,), (128, 256))}, "same number of anchors"),
    ],
)
def test_wrong_arguments_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        small(**options)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_in_torchscript():
    model = small(norm="FBN(t_sigma=3)", norm_fpn="FGN(num_groups=4)", norm_mask_head="FBN").eval()
    model, (images, _) = fbn_plugin.fuse_norm_act(model), batch()
    for expected, found in zip(model(images), torch.jit.script(model)(images)[1], strict=True):
        torch.testing.assert_close(found, expected)


def test_frozen_batch_norm_is_torchvisions():
    assert {type(m) for m in small(norm="FrozenBN").backbone.body.modules() if "Norm" in type(m).__name__} == {
        FrozenBatchNorm2d
    }
