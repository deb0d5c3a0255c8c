"""PyTorch's own conversion to synchronized batch normalization says which filters it drops."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.ao.quantization import quantize_fx

import fbn_plugin
from fbn_plugin.frameworks import pytorch


@pytest.fixture
def registered():
    pytorch.register()
    pytorch.register()
    yield
    pytorch.unregister()
    pytorch.unregister()


def network():
    return nn.Sequential(
        nn.Sequential(fbn_plugin.FilteredBatchNorm2d(4), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Sequential(fbn_plugin.SyncFilteredBatchNorm(4), nn.ReLU())),
    )


class Narrow(nn.SyncBatchNorm):
    @classmethod
    def convert_sync_batchnorm(cls, module, process_group=None):
        return super().convert_sync_batchnorm(module, process_group)


@pytest.mark.parametrize("cls", [nn.SyncBatchNorm, Narrow])
def test_one_warning_a_call_that_counts_the_filters(registered, cls):
    with pytest.warns(UserWarning) as caught:
        model = cls.convert_sync_batchnorm(network())
    assert [str(w.message) for w in caught] == [
        "convert_sync_batchnorm makes 2 filtered norms plain SyncBatchNorm, without their filter: "
        "fbn_plugin.convert_sync keeps it"
    ]
    assert cls is Narrow or caught[0].filename == __file__
    assert [type(model[0][i]) for i in (0, 1)] == [nn.SyncBatchNorm] * 2 and type(model[1][0][0]) is nn.SyncBatchNorm
    with pytest.warns(UserWarning, match="makes 2 filtered"):
        cls.convert_sync_batchnorm(network())


def test_no_warning_without_a_filter(registered):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)))
        fbn_plugin.convert_sync(network())


def test_an_error_inside_does_not_silence_the_next_call(registered, monkeypatch):
    norm = fbn_plugin.FilteredBatchNorm2d(4)
    del norm.eps
    with pytest.warns(UserWarning, match="makes 1 filtered"), pytest.raises(AttributeError):
        nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    with pytest.warns(UserWarning, match="makes 2 filtered"):
        nn.SyncBatchNorm.convert_sync_batchnorm(network())


def test_it_is_put_in_and_taken_out_with_the_frameworks():
    held = nn.SyncBatchNorm.convert_sync_batchnorm
    try:
        fbn_plugin.register()
        with pytest.warns(UserWarning, match="makes 2 filtered"):
            held(network())
    finally:
        fbn_plugin.unregister()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nn.SyncBatchNorm.convert_sync_batchnorm(network())


def test_without_any_framework():
    code = (
        "import importlib.util, warnings, fbn_plugin; from torch import nn;"
        "importlib.util.find_spec = lambda name: None;"
        "assert fbn_plugin.register() == []; warnings.simplefilter('error');"
        "nn.SyncBatchNorm.convert_sync_batchnorm(fbn_plugin.FilteredBatchNorm2d(4))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UserWarning: convert_sync_batchnorm makes 1 filtered norms" in result.stderr


def conv_and_norm(spec, dims, channels=4):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    norm = fbn_plugin.norm_factory(spec, dims)(channels)
    with torch.no_grad():
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 1.5)
    return nn.Sequential(conv(2, channels, 3), norm, nn.ReLU())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("spec", ["FBN", "SyncFBN", "FBN(bias=False)", "ScaledBN", "ScaledBN-A2", "RBN-"])
def test_eager_quantization_fuses_as_it_does_batch_norms(registered, spec, dims):
    model = conv_and_norm(spec, dims).eval()
    x = torch.randn(2, 2, *(8,) * dims)
    fused = torch.ao.quantization.fuse_modules(copy.deepcopy(model), [["0", "1", "2"]])
    assert isinstance(fused[1], nn.Identity) and isinstance(fused[2], nn.Identity)
    torch.testing.assert_close(fused(x), model(x))


def test_graph_quantization_fuses_what_is_converted_first(registered):
    """The documentation says that it leaves the norms of this package, and what to do."""
    model = conv_and_norm("FBN", 2).eval()
    x = torch.randn(2, 2, 8, 8)
    assert type(dict(quantize_fx.fuse_fx(copy.deepcopy(model)).named_children())["1"]) is fbn_plugin.FilteredBatchNorm2d
    fused = quantize_fx.fuse_fx(fbn_plugin.convert_norm(copy.deepcopy(model), "BN"))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    torch.testing.assert_close(fused(x), model(x))


@pytest.mark.parametrize("spec, dropped", [("FBN(t_sigma=4)", True), ("ScaledBN", False), ("ScaledBN-A1", True)])
def test_quantization_aware_training_says_that_the_filter_is_dropped(registered, spec, dropped):
    model = conv_and_norm(spec, 2).train()
    weight, scale = model[1].weight, model[1].weight.detach().clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fused = torch.ao.quantization.fuse_modules_qat(model, [["0", "1", "2"]], inplace=True)
    said = [str(w.message) for w in caught if "quantization-aware" in str(w.message)]
    assert len(said) == dropped
    norm = next(module for module in fused.modules() if isinstance(module, nn.BatchNorm2d))
    assert type(norm) is nn.BatchNorm2d and torch.equal(norm.weight, scale)
    assert norm.weight is weight or spec == "ScaledBN-A1"


def test_unregister_takes_the_fusers_out():
    model = conv_and_norm("FBN", 2).eval()
    with pytest.raises((AssertionError, NotImplementedError), match="fuser method"):
        torch.ao.quantization.fuse_modules(model, [["0", "1"]])
    pytorch.register()
    torch.ao.quantization.fuse_modules(copy.deepcopy(model), [["0", "1"]])
    pytorch.unregister()
    with pytest.raises((AssertionError, NotImplementedError), match="fuser method"):
        torch.ao.quantization.fuse_modules(model, [["0", "1"]])
