"""The Examples of the public docstrings run as they are printed, and every public name has some."""

import doctest

import pytest
import torch
from documentation import names_as_before
from torch import nn

import fbn_plugin

PUBLIC = {name: getattr(fbn_plugin, name) for name in fbn_plugin.__all__ if name != "ops"}
PUBLIC |= {f"ops.{name}": getattr(fbn_plugin.ops, name) for name in fbn_plugin.ops.__all__}


class Checker(doctest.OutputChecker):
    """Norms that older versions of PyTorch print without their ``bias`` are right, too."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        if "bias=" not in repr(nn.BatchNorm2d(1)):
            want = want.replace(", bias=True", "")
        return super().check_output(want, got, optionflags)


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_run(name):
    if name == "register":
        pytest.importorskip("timm")
    names = {"fbn_plugin": fbn_plugin, "torch": torch, "nn": nn}
    test = doctest.DocTestParser().get_doctest(PUBLIC[name].__doc__, names, name, None, None)
    assert test.examples, f"{name} has no Examples"
    torch.manual_seed(0)
    report = []
    with names_as_before():
        runner = doctest.DocTestRunner(Checker(), optionflags=doctest.NORMALIZE_WHITESPACE)
        failed, _ = runner.run(test, out=report.append)
    assert not failed, "".join(report)
