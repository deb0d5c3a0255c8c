"""What the emulation cannot show: the CUDA kernels between PyTorch's allocator, its graphs and its streams."""

import pytest
import torch

from fbn_plugin import ops
from fbn_plugin.ops import cuda

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def test_graphs_of_compiled_training_steps():
    """Their warm-up allocates in the graphs' pool, in which nothing of the kernels' may stay."""
    cuda.forget()

    def step(x, weight):
        y = ops.filtered_batch_norm(x, weight, training=True, t_sigma=2.0)
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
