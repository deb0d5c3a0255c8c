"""The input norm in place of fixed statistics: what it normalizes, over which pixels, and in which models."""

import copy
import pickle

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from fbn_plugin import InputNorm2d, convert_norm, prepend_input_norm
from fbn_plugin.engine.torchvision.model import DetectionTransform
from fbn_plugin.models.mask_rcnn import mask_rcnn_fpn
from fbn_plugin.surgery.input_norm import normalize_images

SIZES = ((20, 30), (36, 24))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pictures(sizes=SIZES, shift=(0.2, 0.5, 0.7)):
    """Images of different sizes, whose channels differ."""
    return [torch.rand(3, *size) * 0.3 + torch.tensor(shift)[:, None, None] for size in sizes]


def moments(images) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean, biased variance and number of all the images' pixels, in NumPy."""
    pixels = np.concatenate([image.numpy().astype(np.float64).reshape(len(image), -1) for image in images], 1)
    return pixels.mean(1), pixels.var(1), pixels.shape[1]


def assert_saw(norm, images):
    """The running statistics after the first batch are those of ``images`` and of nothing else."""
    mean, var, count = moments(images)
    np.testing.assert_allclose(norm.running_mean.numpy(), 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(norm.running_var.numpy(), 0.9 + 0.1 * var * count / (count - 1), rtol=1e-5)
    assert norm.num_batches_tracked == 1


def expected_of(norm, images):
    """The paper's Eq. 1 times the scale, over all pixels of the batch."""
    mean, var, _ = moments(images)
    scale = norm.weight.detach().double().numpy() / np.sqrt(var + norm.eps)
    return [(image.double().numpy() - mean[:, None, None]) * scale[:, None, None] for image in images]


class Net(nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x, targets=None, *, times=1):
        x = times * self.features(x)
        return x if targets is None else (x, targets)


def small_net(channels=3):
    return Net(channels).features


both_kinds = pytest.mark.parametrize("net", [Net, small_net])


# --- images of different sizes ---------------------------------------------------------------------------------------


def test_images_of_different_sizes_share_the_moments_of_their_pixels():
    norm, images = InputNorm2d(3), pictures()
    for got, expected in zip(normalize_images(norm, images), expected_of(norm, images)):
        np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-4, atol=1e-6)
    assert_saw(norm, images)


def test_bytes_are_images_too():
    norm, images = InputNorm2d(3), [(255 * image).byte() for image in pictures()]
    got = normalize_images(norm, images)
    assert [image.dtype for image in got] == [torch.float32] * 2
    assert_saw(norm, images)


def test_in_evaluation_an_image_does_not_depend_on_the_others():
    norm, (one, other) = InputNorm2d(3), pictures()
    normalize_images(norm, [one, other])
    norm.eval()
    assert torch.equal(normalize_images(norm, [one, other])[0], normalize_images(norm, [one])[0])


# --- models that are called with a batch ----------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("channels", [1, 3])
def test_a_module_is_given_the_normalized_batch(net, channels):
    plain, x = net(channels), torch.rand(4, channels, 8, 8)
    model = prepend_input_norm(copy.deepcopy(plain), gamma_init=0.5)
    assert model.input_norm.num_features == channels
    assert torch.allclose(model.input_norm.weight, torch.tensor(0.29))  # 0.58 times 0.5
    assert model.load_state_dict(plain.state_dict(), strict=False).unexpected_keys == []  # the keys stay
    got = model(x)
    assert_saw(model.input_norm, x)
    (normalized,) = expected_of(model.input_norm, [x.transpose(0, 1).flatten(1)[..., None]])
    normalized = torch.tensor(normalized, dtype=torch.float32).reshape(channels, 4, 8, 8).transpose(0, 1)
    torch.testing.assert_close(got, plain(normalized), rtol=1e-3, atol=1e-4)
    got.sum().backward()
    assert model.input_norm.weight.grad.abs().min() > 0 and model.input_norm.bias is None


def test_device_mode_and_other_arguments_are_kept():
    model = prepend_input_norm(Net().eval())
    assert not model.input_norm.training
    x = torch.rand(1, 3, 4, 4)
    once, targets = model(x, "targets")
    assert targets == "targets" and torch.equal(model(x, times=2), 2 * once)
    assert prepend_input_norm(nn.Conv2d(3, 2, 1, device="meta")).input_norm.weight.device.type == "meta"


@both_kinds
def test_copies_and_files_of_a_model_normalize_too(net):
    model, x = prepend_input_norm(net()), torch.rand(2, 3, 8, 8)
    model(x)
    model.eval()
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.input_norm.running_mean.add_(1)
        assert not torch.equal(other(x), expected)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), expected)
    assert torch.equal(model(x), expected)
    compiled = torch.compile(copy.deepcopy(model).train(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), copy.deepcopy(model).train()(x))


def test_what_cannot_be():
    with pytest.raises(ValueError, match="^the Net has an input norm already$"):
        prepend_input_norm(prepend_input_norm(Net()))
    with pytest.raises(ValueError, match="^the Sequential has an input norm already$"):
        prepend_input_norm(prepend_input_norm(small_net()))
    with pytest.raises(ValueError, match="Linear .*Conv2d"):
        prepend_input_norm(nn.Linear(2, 2))
    for gamma in (0, 1.5, -0.1, float("nan")):
        model = small_net()
        with pytest.raises(ValueError, match=rf"^gamma_init must be .*\(0, 1\], got {gamma}$"):
            prepend_input_norm(model, gamma)
        assert not hasattr(model, "input_norm") and not model._forward_pre_hooks


# --- timm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, channels", [("test_resnet", 3), ("test_vit", 3), ("test_efficientnet", 1)])
def test_timms_loaders_leave_the_pixels_to_the_norm(name, channels):
    model = prepend_input_norm(timm.create_model(name, num_classes=2, in_chans=channels))
    data = resolve_model_data_config(model)
    assert data["mean"] == (0.0,) * channels and data["std"] == (1.0,) * channels
    other = resolve_model_data_config(timm.create_model(name))
    assert other["mean"] != (0.0,) * 3
    size = data["input_size"][-1]
    model(torch.rand(2, channels, size, size))
    assert model.input_norm.num_batches_tracked == 1


def test_timms_transform_and_the_norm():
    model = prepend_input_norm(timm.create_model("test_resnet", num_classes=2))
    data = resolve_model_data_config(model)
    transform = create_transform(data["input_size"], mean=data["mean"], std=data["std"], is_training=False)
    picture = torchvision.transforms.functional.to_pil_image(torch.rand(3, 200, 200))
    x = transform(picture)[None]
    assert x.min() >= 0 and x.max() <= 1 and x.mean() > 0.4
    model(x)
    assert_saw(model.input_norm, x)


def test_a_pyramid_of_timms_features():
    """A container whose forward calls its children in order, with those that follow left as they are."""
    plain = timm.create_model("test_resnet", features_only=True).eval()
    model = prepend_input_norm(copy.deepcopy(plain))
    x = torch.rand(1, 3, 64, 64)
    for got, expected in zip(model(x), plain(model.input_norm(x)), strict=True):
        assert torch.equal(got, expected)


# --- torchvision -----------------------------------------------------------------------------------------------------


def detector(**kwargs):
    return mask_rcnn_fpn(
        norm="BN", num_classes=2, fpn_channels=16, box_fcs=(8, 8), mask_convs=(8,), min_size=32, **kwargs
    )


def boxes(count):
    target = {"boxes": torch.tensor([[2.0, 2.0, 14.0, 14.0]]), "labels": torch.tensor([1])}
    return [{**target, "masks": torch.ones(1, *size, dtype=torch.uint8)} for size in SIZES[:count]]


def test_padding_of_a_detector_does_not_count():
    model = prepend_input_norm(detector())
    images = pictures()
    batch, _ = model.transform(images)
    assert_saw(model.transform.input_norm, images)
    for padded, size in zip(batch.tensors, batch.image_sizes):
        inside = torch.zeros(padded.shape[-2:], dtype=torch.bool)
        inside[: size[0], : size[1]] = True
        assert (padded[:, ~inside] == 0).all() and (~inside).any()
    real = torch.cat(
        [image[:, : size[0], : size[1]].flatten(1) for image, size in zip(batch.tensors, batch.image_sizes)], 1
    )
    assert real.mean(1).abs().max() < 1e-2  # the images are resized after the norm


@pytest.mark.parametrize(
    "build",
    [
        detector,
        lambda: torchvision.models.detection.ssdlite320_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=2
        ),
    ],
)
def test_detectors_train_and_evaluate(build):
    model, images = prepend_input_norm(build(), gamma_init=0.2), pictures()
    norm = model.transform.input_norm
    sum(model.train()(images, boxes(2)).values()).backward()
    assert_saw(norm, images)
    assert norm.weight.grad.isfinite().all() and norm.weight.grad.abs().max() > 0
    model.eval()
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with torch.no_grad():
        before, after = model(images), copied(images)
        assert all(torch.equal(a["scores"], b["scores"]) for a, b in zip(before, after))
    assert norm.num_batches_tracked == 1
    assert {"transform.input_norm.weight", "transform.input_norm.running_mean"} <= model.state_dict().keys()


def test_images_that_become_bgr():
    model = detector()
    model.transform = DetectionTransform(0, 100, [104.0, 116.0, 124.0], [1.0, 1.0, 1.0], bgr=True)
    images = pictures()
    prepend_input_norm(model)
    got = model.transform(images)[0].tensors[0, :, : SIZES[0][0], : SIZES[0][1]]
    expected = expected_of(model.transform.input_norm, images)[0][::-1]
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-4, atol=1e-6)


# --- what else is done to a model -----------------------------------------------------------------------------------


def test_moving_a_whole_model_moves_the_norm():
    model = prepend_input_norm(small_net()).double()
    assert model(torch.rand(2, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64


def test_converting_the_norms_leaves_a_scale_without_shift():
    model = convert_norm(prepend_input_norm(small_net()), "FBN")
    assert model.input_norm.bias is None and model.input_norm.weight[0].item() == pytest.approx(0.058)
    model(torch.rand(2, 3, 8, 8))


class Called(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images):
        return self.conv(images)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_a_model_in_torchscript():
    model, images = prepend_input_norm(Called()).eval(), torch.rand(2, 3, 8, 8)
    model.input_norm.running_mean.fill_(0.5)
    torch.testing.assert_close(torch.jit.script(model)(images), model(images))
