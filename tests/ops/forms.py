"""Either form of the norm by one name, and small inputs for it."""

import torch

from fbn_plugin.ops import filtered_batch_norm, filtered_group_norm

BOTH_FORMS = [0, 2]


def norm(x, weight, bias, num_groups, **options):
    """Either form by one name; ``num_groups`` 0 is the batch form."""
    if num_groups == 0:
        return filtered_batch_norm(x, weight=weight, bias=bias, training=True, **options)
    return filtered_group_norm(x, num_groups, weight, bias, **options)


def batch(shape, seed=0, dtype=torch.float64, outliers=True):
    """Values with a mean away from zero, and one outlier in every channel of the first sample."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 3
    if outliers:
        x[(0, slice(None), *([0] * (len(shape) - 2)))] = 40.0
    weight = torch.rand(shape[1], generator=generator, dtype=torch.float64) + 0.5
    bias = torch.randn(shape[1], generator=generator, dtype=torch.float64)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def act_inputs(dtype=torch.float64, shape=(4, 3, 5, 5)):
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1 for _ in range(2))
    x[0, :, 0, 0] = 40.0
    weight = torch.rand(shape[1], generator=generator, dtype=torch.float64) + 0.5
    bias = torch.randn(shape[1], generator=generator, dtype=torch.float64)
    return [t.to(dtype).requires_grad_() for t in (x, weight, bias, residual)]
