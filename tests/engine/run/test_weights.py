"""What the report on loaded weights counts, and which files are refused."""

import pytest
from torch import nn

import fbn_plugin
from fbn_plugin.engine.run.weights import loading_report, refuse_foreign, refuse_misfit


def detector(norm):
    def block():
        return nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), fbn_plugin.get_norm(norm, 4))

    return nn.ModuleDict(
        {
            "backbone": nn.ModuleDict({"body": nn.Sequential(block(), block()), "fpn": block()}),
            "head": nn.Linear(4, 2),
        }
    )


def body(model):
    return [name for name in model.state_dict() if ".body." in name]


@pytest.mark.parametrize(
    "norm, kind, tensors",
    [("BN", "BatchNorm2d", 10), ("FBN", "FilteredBatchNorm2d", 10), ("FrozenBN", "FrozenBatchNorm2d", 10)],
)
def test_a_backbone_with_its_statistics(norm, kind, tensors):
    model = detector(norm)
    assert loading_report("r.pth", model, body(model), ["fc.weight", "fc.bias"]) == [
        f"r.pth: {tensors} of {tensors} tensors of the backbone loaded",
        f"scale and shift of 2 norms ({kind}) loaded",
        f"running statistics of 2 norms ({kind}) loaded",
        "not in the file, so at its initial values: fpn, head",
        "2 entries of the file not used: fc.weight, fc.bias",
    ]


def test_norms_without_statistics_leave_the_files_out():
    model = detector("FGN(num_groups=2)")
    unused = ["conv1.norm.running_mean", "conv1.norm.running_var", "conv1.norm.num_batches_tracked"]
    lines = loading_report("r.pth", model, body(model), unused)
    assert lines[2] == "the file's running statistics left out: FilteredGroupNorm has none"
    assert len(lines) == 4


def test_a_file_without_statistics():
    model = detector("FBN")
    loaded = [name for name in body(model) if "running" not in name and "num_batches" not in name]
    lines = loading_report("r.pth", model, loaded)
    assert lines[0] == "r.pth: 6 of 10 tensors of the backbone loaded"
    assert lines[2].startswith("2 norms (FilteredBatchNorm2d) keep mean 0 and variance 1")
    assert lines[3] == "not in the file, so at its initial values: fpn, head"


def test_a_part_that_was_loaded_in_part():
    model = detector("GN(num_groups=2)")
    lines = loading_report("r.pth", model, {*model.state_dict()} - {"head.bias"})
    assert lines[2:] == [
        "no running statistics, neither in the file nor in the norms",
        "not in the file, so at its initial values: 1 of 2 tensors of head",
    ]


def test_misfits():
    refuse_misfit("a.pth", ["norm.num_batches_tracked"], [], [])
    with pytest.raises(ValueError, match=r"a.pth is of another model: 3 entries .*such as fc \(shape \(2,\), .*\(3,\)"):
        refuse_misfit("a.pth", ["fc", "conv"], [("fc", (2,), (3,))], ["mask"])
    refuse_foreign("a.pth", ["conv.weight"], [])
    with pytest.raises(ValueError, match="a.pth has no weight of this model; its entries are bert.x"):
        refuse_foreign("a.pth", ["norm.running_mean"], ["bert.x"])
