"""A function does the same wherever it is imported from, as soon as the model's framework is."""

import subprocess
import sys

import pytest

import fbn_plugin
from fbn_plugin.surgery import convert, fold, fuse, input_norm
from fbn_plugin.training import parameter_groups

CONVERT = """
from {module} import convert_norm
import timm, fbn_plugin
model = timm.create_model("efficientnet_b0")
report = fbn_plugin.NormReport()
convert_norm(model, "FBN", report=report)
print(len(report.changed), len(report.left), sum("Filtered" in type(m).__name__ for m in model.modules()))
"""


@pytest.mark.parametrize("module", ["fbn_plugin", "fbn_plugin.surgery.convert"])
def test_the_norms_of_efficientnet_are_converted(module):
    """timm's norms hold their activation, which only timm's adapter knows."""
    run = subprocess.run([sys.executable, "-c", CONVERT.format(module=module)], capture_output=True, text=True)
    assert run.stdout.split() == ["49", "0", "49"], run.stderr


def test_the_package_hands_on_the_functions_themselves():
    for module, name in (
        (convert, "convert_norm"),
        (convert, "convert_sync"),
        (fold, "fold_norms"),
        (fuse, "fuse_norm_act"),
        (input_norm, "prepend_input_norm"),
        (parameter_groups, "param_groups"),
    ):
        assert getattr(fbn_plugin, name) is getattr(module, name)
