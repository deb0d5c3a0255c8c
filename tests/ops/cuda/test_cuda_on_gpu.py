"""What the emulation cannot show: the CUDA kernels between PyTorch's allocator, its graphs and its streams."""

import pytest
import torch

from fbn_plugin import ops
from fbn_plugin.ops import cuda
from fbn_plugin.ops.cuda import driver, plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def test_graphs_of_compiled_training_steps():
    """Their warm-up allocates in the graphs' pool, in which nothing of the kernels' may stay."""
    cuda.forget()

    def step(x, weight):
        y = ops.filtered_batch_norm(x, weight=weight, training=True, t_sigma=2.0)
        return ops.filtered_group_norm(y, 4, t_sigma=2.0).sin().sum()

    x = torch.randn(2, 16, 250, 250, device="cuda", requires_grad=True)  # of several blocks a channel
    assert ops.explain(x).startswith("cuda: ")
    weight = torch.rand(16, device="cuda", requires_grad=True)
    expected = torch.autograd.grad(step(x, weight), (x, weight))
    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # warm-up, capture, replays
        torch.compiler.cudagraph_mark_step_begin()
        found = [gradient.clone() for gradient in torch.autograd.grad(compiled(x, weight), (x, weight))]
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_card_holds_as_many_blocks_as_the_driver_says():
    """More than it holds, and a group might wait for a member that never starts."""
    cuda.forget()
    for shape in ((2, 8, 6, 6), (2, 8, 20, 20), (2, 16, 250, 250), (3, 8, 7, 7), (64, 32)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape, device="cuda", dtype=dtype)
            for form in (x, x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x):
                for num_groups in (0, 4):
                    assert cuda.refuses(form, num_groups) is None
    card, rows = driver.card(0), []
    for (device, variant), (kernel, _) in cuda._kernels.items():
        shared = plan.room_for(card, variant).shared
        with driver._context(device):
            occupancy = "cuOccupancyMaxActiveBlocksPerMultiprocessor"
            truth = driver._call(occupancy, kernel.handle, variant.threads, shared) * card.multiprocessors
        rows.append((card.resident(kernel, variant.threads, shared), truth, kernel, variant))
    assert len(rows) > 10 and all(ours == truth for ours, truth, *_ in rows), rows
