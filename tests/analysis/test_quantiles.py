"""The streaming quantiles against exact ones, by properties: the error, the ends, merging, and what is no number."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fbn_plugin.analysis.quantiles import QuantileSketch

LEVELS = [0.0, 0.01, 0.125, 0.15, 0.25, 0.5, 0.75, 0.85, 0.875, 0.99, 1.0]
DISTRIBUTIONS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "far from zero": lambda rng, n: 1000 + rng.standard_normal(n),
    "cauchy": lambda rng, n: rng.standard_cauchy(n),
    "lognormal": lambda rng, n: rng.lognormal(0, 6, n),
    "rectified": lambda rng, n: rng.standard_normal(n).clip(0),
    "two values": lambda rng, n: rng.choice([-3e-20, 7e25], n),
}


def exact(values, levels=LEVELS):
    return np.quantile(np.asarray(values, dtype=np.float64), levels, method="inverted_cdf")


def assert_close(found, wanted):
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-3, atol=1.2e-38)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(sorted(DISTRIBUTIONS)),
    st.integers(1, 3000),
    st.integers(0, 2**32 - 1),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.floats(1e-6, 1e4),
)
def test_quantiles_of_known_distributions(name, count, seed, dtype, scale):
    values = torch.from_numpy(scale * DISTRIBUTIONS[name](np.random.default_rng(seed), count)).to(dtype)
    finite = values[values.isfinite()].double()
    sketch, halves = QuantileSketch(), [QuantileSketch(), QuantileSketch()]
    sketch.update(values)
    for half, part in zip(halves, values.tensor_split(2)):
        half.update(part)
    halves[0].merge(halves[1])
    for each in (sketch, halves[0]):
        assert each.count.item() == len(finite)
        assert each.infinite.item() == count - len(finite)
        if len(finite):
            assert (each.minimum.item(), each.maximum.item()) == (finite.min().item(), finite.max().item())
            assert_close(each.quantile(LEVELS)[0], exact(finite))
    torch.testing.assert_close(sketch.quantile(LEVELS), halves[0].quantile(LEVELS), rtol=0, atol=0, equal_nan=True)


@settings(deadline=None)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=30))
def test_any_numbers(numbers):
    values = torch.tensor(numbers, dtype=torch.float64)
    finite = values[values.isfinite()]
    sketch = QuantileSketch()
    sketch.update(values)
    assert sketch.nan.item() == values.isnan().sum() and sketch.infinite.item() == values.isinf().sum()
    if not len(finite):
        assert sketch.quantile([0.0, 0.5]).isnan().all() and sketch.histogram(torch.tensor([0.0, 1.0])).sum() == 0
        return
    assert sketch.quantile([0.0, 1.0])[0].tolist() == [finite.min(), finite.max()]
    within = finite.clamp(-3e38, 3e38)
    assert_close(sketch.quantile([0.3, 0.5])[0].clamp(-3e38, 3e38), exact(within, [0.3, 0.5]))


def test_a_row_for_each_channel_is_a_sketch_of_its_own():
    x = (
        torch.randn(6, 3, 5, 4, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-6, 1, 1e6])[:, None, None]
    )
    x[0, 1, 0, 0] = torch.nan
    together, other = QuantileSketch(3), QuantileSketch(3)
    together.update(x[:4], dim=1)
    other.update(x[4:], dim=1)
    together.merge(other)
    for channel in range(3):
        alone = QuantileSketch()
        alone.update(x[:, channel])
        assert torch.equal(together.quantile(LEVELS)[channel], alone.quantile(LEVELS)[0])
        assert together.nan[channel] == alone.nan == (channel == 1)
        edges = torch.tensor([-1e6, -1.0, -1e-6, 0.0, 1e-6, 1.0, 1e6])
        assert torch.equal(together.histogram(edges)[channel], alone.histogram(edges)[0])


def test_histogram_counts_each_value_once():
    values = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    sketch = QuantileSketch()
    sketch.update(values)
    edges = torch.linspace(values.min(), values.max(), 40).double()
    edges[-1] = values.max()
    found = sketch.histogram(edges)[0]
    wanted = np.histogram(values.double(), edges.numpy())[0]
    assert found.sum() == 20000 and np.abs(found.numpy() - wanted).max() < 30


def test_memory_does_not_grow_with_the_stream():
    sketch, generator = QuantileSketch(), torch.Generator().manual_seed(0)
    sizes = []
    for _ in range(20):
        sketch.update(torch.randn(50000, generator=generator))
        sizes.append(sketch._counts.numel())
    assert sketch.count.item() == 10**6 and sizes[-1] <= sizes[0] + 12 * 2 * 512
    sketch.update(torch.tensor([1e-38, 3e38, 0.0]))
    assert sketch._counts.numel() * 8 < 2.2e6
    assert abs(sketch.quantile([0.975]).item() - 1.96) < 0.01


@pytest.mark.parametrize("values", [torch.arange(-5, 6), torch.tensor([True, False])])
def test_whole_numbers(values):
    sketch = QuantileSketch()
    sketch.update(values)
    assert_close(sketch.quantile([0.0, 0.5, 1.0])[0], exact(values, [0.0, 0.5, 1.0]))


def test_errors():
    with pytest.raises(ValueError, match="rows must be 1 or more, got 0"):
        QuantileSketch(0)
    with pytest.raises(ValueError, match="values of 2 rows are wanted, got 3"):
        QuantileSketch(2).update(torch.zeros(3, 2), dim=0)
    with pytest.raises(ValueError, match="a sketch of 2 rows is wanted, got one of 1"):
        QuantileSketch(2).merge(QuantileSketch())
    with pytest.raises(ValueError, match=r"from 0 to 1, got 1\.5"):
        QuantileSketch().quantile([0.5, 1.5])
