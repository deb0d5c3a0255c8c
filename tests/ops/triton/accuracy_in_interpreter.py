"""The error of the Triton kernels on inputs that are made to lose digits, run by Triton's interpreter on CPU tensors.

The rule: against float64, at most twice the error of plain PyTorch in float32, plus one rounding. ``test_triton.py``
runs this file in a process of its own, with ``TRITON_INTERPRET=1``.
"""

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from fbn_plugin.ops import reference, triton
from fbn_plugin.ops.reference import FilteredMoments, Options

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "_TILE", 256)
        patch.setattr(triton, "_PROGRAMS", 4)
        patch.setattr(triton, "_ADDED", 16)
        patch.setattr(triton, "_CHUNK", 1)
        triton._planned.cache_clear()
        yield
        triton._planned.cache_clear()


def cluster(x, far, share, generator):
    return torch.where(torch.rand(x.shape, generator=generator) < share, far + x, x)


def single(x, far, share, generator):
    """A far value in each channel."""
    x[0, :, 0, 0] += far
    return x


def sampled_places(x, far, share, generator):
    """Far values where one would look for a value to sum around: first, last, and at even distances."""
    flat = x.movedim(1, 0).reshape(x.shape[1], -1)
    size = flat.shape[1]
    places = [0, size - 1, *(size * (2 * i + 1) // 18 for i in range(9)), *(size * (7 * i + 4) >> 6 for i in range(9))]
    flat[:, sorted(set(places))] += far
    return flat.reshape(x.shape[1], x.shape[0], *x.shape[2:]).movedim(0, 1)


def far_channel(x, far, share, generator):
    x[:, 0] += far
    return x


def far_sample(x, far, share, generator):
    x[-1] += far
    return x


def steps(x, far, share, generator):
    """Channels far from each other and from zero."""
    return x + far * torch.arange(x.shape[1]).view(1, -1, 1, 1)


def constant(x, far, share, generator):
    return torch.full_like(x, far / 3)


def neighbours(x, far, share, generator):
    """Two values, one rounding apart."""
    low = torch.tensor(far / 3)
    return torch.where(x > 0, torch.nextafter(low, low * 2), low)


KINDS = [cluster, single, sampled_places, far_channel, far_sample, steps, constant, neighbours]
inputs = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(KINDS),
        "far": st.sampled_from([3.0, 30.0, 300.0, 1e4, 1e6, 1e8, -1e8]),
        "share": st.sampled_from([0.02, 0.15, 0.3]),
        "spread": st.sampled_from([0.0, 1e-3, 1.0]),
        "mean": st.sampled_from([0.0, 1.0, 1e4]),
        "t_sigma": st.sampled_from([1.1, 1.9, 2.0, 5.0]),
        "eps": st.sampled_from([0.0, 1e-5]),
        "channels_last": st.booleans(),
        "num_groups": st.sampled_from([0, 0, 1, 2]),
        "seed": st.integers(0, 99),
    }
)


def typical(kind, far, num_groups, channels_last, spread=1.0, eps=1e-5, t_sigma=2.0):
    return {
        "kind": kind,
        "far": far,
        "share": 0.15,
        "spread": spread,
        "mean": 0.0,
        "t_sigma": t_sigma,
        "eps": eps,
        "channels_last": channels_last,
        "num_groups": num_groups,
        "seed": 0,
    }


@settings(max_examples=60, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(inputs)
@example(typical(cluster, 300.0, 0, False, t_sigma=1.9))
@example(typical(cluster, 30.0, 0, True, spread=0.0))
@example(typical(sampled_places, 1e4, 0, False, eps=0.0))
@example(typical(sampled_places, 1e8, 0, True))
@example(typical(far_channel, 1e8, 1, True))
@example(typical(far_channel, 1e8, 1, False, eps=0.0))
@example(typical(constant, 1e8, 2, True))
@example(typical(neighbours, 1e4, 0, False, eps=0.0))
def test_error_is_at_most_twice_that_of_plain_pytorch(case):
    generator = torch.Generator().manual_seed(case["seed"])
    x = torch.randn(3, 4, 5, 7, generator=generator) * case["spread"] + case["mean"]
    x = case["kind"](x, case["far"], case["share"], generator)
    x = x.contiguous(memory_format=torch.channels_last if case["channels_last"] else torch.contiguous_format)
    options = Options(case["num_groups"], case["t_sigma"], case["eps"], False, "exact")
    y, moments = triton.forward(x, None, None, None, None, options)
    y32, moments32 = reference.forward(x, None, None, None, None, options)
    y64, moments64 = reference.forward(x.double(), None, None, None, None, options)
    ours, plain, exact = (FilteredMoments(*m) for m in (moments, moments32, moments64))

    # A set is looked at where it has a deviation, or an eps, and where no value is so near to the edge of the band that
    # its rounding tells whether it is kept.
    view = reference._view(x, case["num_groups"])
    sets = x.double().reshape(view.shape)
    edges = [edge.view(view.stats) for edge in (exact.lower, exact.upper)]
    rounding = 64 * EPS * max(edge.abs().max() for edge in edges)
    near = torch.stack([(sets - edge).abs() < rounding for edge in edges]).any(0).sum(view.reduced).flatten() > 0
    told = ~near & (exact.var.flatten() + case["eps"] > 0)
    kept, kept32, kept64 = (m.count.flatten().double()[told] for m in (ours, plain, exact))
    assert torch.equal(kept, kept64) or not torch.equal(kept32, kept64)

    def error(got, truth):
        """The largest of all sets, each relative to the largest of its own values."""
        error, size = (
            each.reshape(view.shape if truth.shape == x.shape else view.stats) for each in (got - truth, truth)
        )
        dims = view.reduced if truth.shape == x.shape else ()
        error, size = (each.abs().amax(dims, keepdim=True) if dims else each.abs() for each in (error, size))
        return (
            (error / size.clamp_min(torch.finfo(torch.float32).tiny)).flatten()[told].max().item() if told.any() else 0
        )

    for name, got, theirs, truth in (
        ("y", y, y32, y64),
        ("mean", ours.mean, plain.mean, exact.mean),
        ("var", ours.var, plain.var, exact.var),
    ):
        # One rounding of the result, and one since either may be lucky in what it rounds.
        assert error(got, truth) <= 2 * error(theirs, truth) + 2 * EPS, name
