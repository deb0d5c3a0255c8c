"""PyTorch's own conversion to synchronized batch normalization says which filters it drops."""

import subprocess
import sys
import warnings

import pytest
from torch import nn

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
