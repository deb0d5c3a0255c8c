"""What the arithmetic in plain PyTorch offers besides the filter's equations."""

import pytest
import torch

from fbn_plugin.ops import reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(5, 3, 1, 1), (4, 3, 7, 6), (1, 3, 40, 40)], ids=str)
def test_plain_moments(shape, memory_format, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 100
    x[:, 0] = 2.0  # a channel without variance
    x = x.to(dtype).contiguous(memory_format=memory_format)
    mean, var = reference.plain_moments(x)
    assert mean.dtype == var.dtype == reference.accumulate_dtype(dtype)
    expected_var, expected_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), expected_var, rtol=1e-4, atol=1e-9)
