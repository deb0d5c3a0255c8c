"""FBN in one model of every family of timm: ``tools/check_timm_families.py``, a test a family."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from timm.models import list_modules
from torch import nn

import fbn_plugin
from fbn_plugin.engine.classification.smallest_models import smallest_model
from fbn_plugin.frameworks import timm as adapter
from fbn_plugin.layers import description

_spec = importlib.util.spec_from_file_location(
    "check_timm_families", Path(__file__).parents[2] / "tools" / "check_timm_families.py"
)
tool = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = tool  # dataclasses look their module up
_spec.loader.exec_module(tool)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The images are so small that more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def registered():
    adapter.register()
    yield
    adapter.unregister()


def smallest(family):
    return smallest_model(timm.create_model, timm.list_models(module=family))


@pytest.mark.parametrize("family", list_modules())
def test_family(family):
    name = smallest(family)
    if name is None:
        pytest.skip(f"no model of timm.models.{family} has batch normalization")
    result = tool.check(name)
    assert not result.problems
    assert result.norms > 0


@pytest.mark.parametrize("family", ["regnet", "maxxvit"])  # by norm_layer, by convert_norm
def test_a_lost_activation_is_noticed(family, monkeypatch):
    name = smallest(family)
    form = adapter._form
    monkeypatch.setattr(adapter, "_form", lambda spec: _without_activation(form(spec)))
    convert = adapter._convert

    def losing(old, factory):
        new = convert(old, factory)
        new.act = nn.Identity()
        return new

    for cls in (adapter.BatchNormAct2d, adapter.SyncBatchNormAct):
        described = replace(description.describe_type(cls), convert=losing)
        monkeypatch.setitem(description._DESCRIPTIONS, cls, described)
    assert any("other modules changed" in problem for problem in tool.check(name).problems)


def _without_activation(form):
    def build(*args, **kwargs):
        norm = form(*args, **kwargs)
        norm.act = nn.Identity()
        return norm

    return build


def test_another_network_with_the_same_modules_is_noticed(monkeypatch):
    forward = adapter.FilteredBatchNormAct2d.forward
    monkeypatch.setattr(adapter.FilteredBatchNormAct2d, "forward", lambda self, x: self.act(forward(self, x)) + 1e-3)
    problems = tool.check("test_efficientnet").problems
    assert any("evaluation differs" in problem for problem in problems), problems


def test_plain_norms_that_are_left_are_noticed(monkeypatch):
    monkeypatch.setattr(fbn_plugin, "convert_norm", lambda model, spec: model)
    assert any("plain batch normalization is left" in problem for problem in tool.check("repghostnet_050").problems)


def test_command_prints_the_count(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["check_timm_families.py", "resnet", "ghostnet", "nest"])
    with pytest.raises(SystemExit) as exit:
        tool.main()
    assert not exit.value.code
    output = capsys.readouterr().out
    assert "2 of 2 timm" in output
    assert "1 through norm_layer=" in output
    assert "1 through convert_norm" in output
    assert "families without batch normalization: 1" in output


def test_command_refuses_an_unknown_family(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["check_timm_families.py", "resnext"])
    with pytest.raises(SystemExit) as exit:
        tool.main()
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("error: timm has no family resnext: accepted are")
