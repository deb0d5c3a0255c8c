"""Mask R-CNN on two processes, one of which has nothing to detect: its mask head normalizes nothing, and must not keep
the other waiting."""

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from torch.nn.parallel import DistributedDataParallel

from fbn_plugin import SyncFilteredBatchNorm

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo"),
    pytest.mark.usefixtures("one_thread"),
]


def gradients_of(model, *inputs):
    """After one step of training: losses, gradients, and statistics of the synchronized norms."""
    sizes = []
    for module in model.modules():
        if isinstance(module, SyncFilteredBatchNorm):
            module.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    parallel = DistributedDataParallel(model.train())  # which averages as long as it lives
    losses = parallel(*inputs)
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    statistics = [m.running_var for m in model.modules() if isinstance(m, SyncFilteredBatchNorm)]
    return {name: loss.item() for name, loss in losses.items()}, gradients, statistics, min(sizes)


def check(results):
    (losses, gradients, statistics, smallest), (other_losses, other_gradients, other_statistics, empty) = results
    assert smallest > 0 and empty == 0, "the second process has no box, so its mask head has no input"
    assert other_losses["loss_mask"] == 0 < losses["loss_mask"]
    assert gradients.keys() == other_gradients.keys() and any("mask" in name for name in gradients)
    for name, gradient in gradients.items():
        assert gradient.isfinite().all() and torch.equal(gradient, other_gradients[name]), name
    assert all(torch.equal(mine, other) and mine.ne(1).any() for mine, other in zip(statistics, other_statistics))


def torchvision_step(rank):
    from small_mask_rcnn import batch, small

    torch.manual_seed(0)
    norms = {"norm": "SyncFBN(t_sigma=3)", "norm_fpn": "SyncFBN", "norm_mask_head": "SyncFBN(t_sigma=4)"}
    model = small(backbone="resnet18", **norms)
    images, targets = batch()
    return gradients_of(model, images[rank : rank + 1], targets[rank : rank + 1])


def test_torchvision(tmp_path):
    pytest.importorskip("torchvision")
    check(run_processes(torchvision_step, 2, tmp_path, seconds=120))


def detectron2_step(rank):
    from detectron2.utils.events import EventStorage
    from test_detectron2 import batch, build_model, tiny_config

    torch.manual_seed(0)
    model = build_model(tiny_config(norm="SyncFBN(t_sigma=3)"))
    assert sum(isinstance(m, SyncFilteredBatchNorm) for m in model.roi_heads.mask_head.modules()) > 0
    with EventStorage():
        return gradients_of(model, batch(objects=(2 - 2 * rank,)))


@pytest.mark.detectron2
def test_detectron2(tmp_path):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from fbn_plugin.frameworks import detectron2 as adapter

    adapter.register()
    try:
        check(run_processes(detectron2_step, 2, tmp_path, seconds=120))
    finally:
        adapter.unregister()
