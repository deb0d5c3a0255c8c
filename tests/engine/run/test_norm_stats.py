"""The line that names a run's norms, and the share of filtered values: counted right for every filtered norm, in the
chosen iterations only."""

import pytest
import torch
from torch import nn

import fbn_plugin
from fbn_plugin.engine.run.norm_stats import FilterMeter


def outside(x, dims, t_sigma, eps):
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return ((x - mean).abs() > t_sigma * (var + eps).sqrt()).double().mean().item()


def with_outliers(*shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.view(-1)[::37] *= 30
    return x


def test_a_run_says_which_norms_its_model_has(trained_run):
    assert (trained_run / "log.txt").read_text().count("norms: 20 FBN(t_sigma=5), 0 BN\n") == 1


@pytest.mark.parametrize(
    "norm, expected",
    [
        (fbn_plugin.FilteredBatchNorm2d(8, t_sigma=2), lambda x: outside(x, (0, 2, 3), 2, 1e-5)),
        (fbn_plugin.FilteredGroupNorm(4, 8, t_sigma=2), lambda x: outside(x.view(3, 4, 2, 5, 6), (2, 3, 4), 2, 1e-5)),
        (fbn_plugin.FilteredInstanceNorm2d(8, t_sigma=2), lambda x: outside(x, (2, 3), 2, 1e-5)),
        (fbn_plugin.FilteredLayerNorm2d(8, t_sigma=2), lambda x: outside(x, (1,), 2, 1e-6)),
        (
            fbn_plugin.FilteredFilterResponseNorm2d(8, t_sigma=2),
            lambda x: (x.square() > 4 * (x.square().mean((2, 3), keepdim=True) + 1e-6)).double().mean().item(),
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_share_of_each_norm(norm, expected):
    x = with_outliers(3, 8, 5, 6)
    share = norm.double().filtered_share(x).item()
    assert 0 < share == pytest.approx(expected(x), abs=1e-12)
    assert norm.filtered_share(torch.ones_like(x)).item() == 0


def test_a_model_is_measured_at_the_end_of_each_period():
    norm = fbn_plugin.FilteredBatchNorm2d(4, t_sigma=2)
    model = nn.Sequential(norm, fbn_plugin.FilteredBatchNorm2d(4, t_sigma=float("inf")), norm, nn.BatchNorm2d(4))
    meter = FilterMeter(model, period=3)
    x = with_outliers(2, 4, 6, 6).float()
    found = []
    for iteration in range(6):
        with meter.measure(iteration) as shares:
            assert not shares
            y = model(x)
        found.append(dict(shares))
    assert [bool(shares) for shares in found] == [False, False, True, False, False, True]
    assert set(found[2]) == {"filtered/0", "filtered/mean"}  # one layer, called twice
    both = [norm.filtered_share(x).item(), norm.filtered_share(model[1](norm(x))).item()]
    assert found[2]["filtered/0"] == pytest.approx(sum(both) / 2, abs=1e-6) and y.requires_grad
    assert not norm._forward_pre_hooks


def test_what_is_not_measured():
    model = nn.Sequential(fbn_plugin.FilteredBatchNorm2d(4))
    x = torch.randn(2, 4, 3, 3)
    with FilterMeter(model, 0).measure(0) as shares:
        model(x)
    assert not shares
    with FilterMeter(model, 1).measure(0) as shares:
        model(x[:0])
        model.eval()(x)
    assert not shares
    with pytest.raises(ValueError, match="got -1"):
        FilterMeter(model, -1)
