"""Moments of a part of a batch: against a direct computation, on dense and convolutional layers."""

import numpy as np
import pytest
import torch
from torch import nn

import fbn_plugin
from fbn_plugin.analysis.moments import MomentDistance, check_norm, flat_distances, measure_moments

NORMS = ["BN", "FBN(t_sigma=2)"]
CHOSEN = [5, 0, 7, 2]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5)
    )


def moments(values: np.ndarray, t_sigma: float | None) -> tuple[float, float]:
    """Mean and biased variance of a channel's values, with the equations of the filter written down."""
    mean, var = values.mean(), values.var()
    if t_sigma is None:
        return mean, var
    kept = values[abs(values - mean) <= t_sigma * np.sqrt(var + 1e-5)]
    return kept.mean(), kept.var()


def expected(x: np.ndarray, t_sigma: float | None) -> list[float]:
    differences = []
    for channel in range(x.shape[1]):
        mean, var = moments(x[:, channel].ravel(), None)
        part_mean, part_var = moments(x[CHOSEN][:, channel].ravel(), t_sigma)
        off, wide = abs(part_mean - mean), abs(part_var - var)
        differences.append((off, wide, off / np.sqrt(var + 1e-5), wide / (var + 1e-5)))
    return np.mean(differences, 0).tolist()


def test_against_a_direct_computation():
    model = network()
    x = torch.randn(8, 1, 6, 6)
    x[0, 0, 0, 0] = 40.0  # the filter has something to leave out
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = measure_moments(model, lambda: model(x), CHOSEN, NORMS)
    assert list(found) == ["1", "5"] and all(list(layer) == NORMS for layer in found.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in model)

    # The norms before a layer take the moments of the whole batch.
    inputs = {"1": model[0](x).detach().double().numpy(), "5": model[:5](x).detach().double().numpy()}
    for name, values in inputs.items():
        for spec, t_sigma in zip(NORMS, (None, 2.0)):
            distance = found[name][spec]
            ours = [distance.mean, distance.var, distance.relative_mean, distance.relative_var]
            assert ours == pytest.approx(expected(values, t_sigma), rel=1e-4)
    assert all(layer["BN"] != layer["FBN(t_sigma=2)"] for layer in found.values())

    figures = flat_distances(found)
    assert figures["5/BN/var"] == found["5"]["BN"].var
    mean = (found["1"]["FBN(t_sigma=2)"].relative_mean + found["5"]["FBN(t_sigma=2)"].relative_mean) / 2
    assert figures["FBN(t_sigma=2)/relative_mean"] == pytest.approx(mean)
    assert len(figures) == 3 * 2 * 4


def test_the_whole_batch_is_at_no_distance_from_itself():
    model, x = network(), torch.randn(6, 1, 6, 6)
    found = measure_moments(model, lambda: model(x), range(6), ["BN", "FBN(t_sigma=inf)"])
    assert all(value < 1e-5 for value in flat_distances(found).values())


def test_the_models_own_filter_is_not_what_is_compared_with():
    x = torch.randn(16, 3, 5, 5) ** 3
    distances = []
    for norm in ("BN", "FBN(t_sigma=2)", "SyncFBN"):
        layer = fbn_plugin.get_norm(norm, 3)
        distances.append(measure_moments(layer, lambda layer=layer: layer(x), CHOSEN, NORMS))
    assert distances[0] == distances[1] == distances[2]


def test_a_layer_that_is_used_twice_has_the_mean_of_its_calls():
    model = nn.Sequential(nn.BatchNorm1d(2))
    one, other = torch.randn(6, 2), 10 * torch.randn(6, 2)

    def distance(*inputs) -> MomentDistance:
        def forward():
            for x in inputs:
                model(input=x)

        return measure_moments(model, forward, [0, 1, 2], ["BN"])["0"]["BN"]

    assert distance(one, other).var == pytest.approx((distance(one).var + distance(other).var) / 2)


@pytest.mark.parametrize("spec", ["GN", "ConvNorm", "FrozenBN", "SyncBN", "SyncFBN", "FGN", "XBN", ""])
def test_refuses_another_norm(spec):
    with pytest.raises(ValueError):
        check_norm(spec)


@pytest.mark.parametrize("spec", ["BN", "FBN", "FBN(t_sigma=3, gaussian_correction=True)", "ScaledBN", "RBN"])
def test_takes_what_has_moments_of_a_batch(spec):
    check_norm(spec)
    x, model = torch.randn(8, 3, 4), nn.BatchNorm1d(3)
    assert measure_moments(model, lambda: model(x), CHOSEN, [spec])[""][spec].mean > 0


def test_refuses_what_cannot_be_compared():
    model, x = network(), torch.randn(4, 1, 6, 6)
    with pytest.raises(ValueError, match="'1' gets 4 images, and 7 was to be one"):
        measure_moments(model, lambda: model(x), CHOSEN, NORMS)
    with pytest.raises(ValueError, match="no value reached a batch norm, of which there are 2"):
        measure_moments(model, lambda: None, CHOSEN, NORMS)
    with pytest.raises(ValueError, match="no batch norm of the Sequential is in training mode"):
        measure_moments(model.eval(), lambda: model(x), CHOSEN, NORMS)
    assert not any(layer._forward_pre_hooks for layer in model)
