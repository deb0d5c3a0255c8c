"""Filtered batch normalization over processes against one process with the concatenated batch, in float64; the group is
a simulated one. ``tests/layers/test_sync_filtered_batch_norm.py`` has real processes."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_group import SimulatedGroup

from fbn_plugin.ops import filtered_batch_norm, sync, sync_filtered_batch_norm

SIZES = [(4, 4), (1, 6), (5, 0), (0, 5), (3, 0, 1, 5), (0, 0, 2, 0), (7,)]
OPTIONS = [
    {"t_sigma": t, "grad_mode": mode, "gaussian_correction": correction}
    for t, mode, correction in itertools.product((1.5, 3.0, math.inf), ("exact", "paper"), (False, True))
]


@pytest.fixture
def group_of(monkeypatch):
    def make(size):
        group = SimulatedGroup(size)
        monkeypatch.setattr(sync, "dist", group)
        return group

    return make


def data(sizes, channels=3, spatial=(4, 5), dtype=torch.float64, seed=0):
    """The whole batch, with outliers in the images of the last process alone, and the gradient of its output."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), channels, *spatial, generator=generator, dtype=torch.float64) * 2 + 1
    grad = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    last = max((rank for rank, size in enumerate(sizes) if size), default=0)
    x[sum(sizes[:last]) : sum(sizes[: last + 1])].view(sizes[last], channels, math.prod(spatial))[:, :, ::7] *= 8
    return x.to(dtype), grad.to(dtype)


def parameters(channels, dtype=torch.float64):
    """Running mean and variance, weight and bias."""
    weight, bias = torch.linspace(0.5, 1.5, channels), torch.linspace(-1, 1, channels)
    mean, var = torch.linspace(0, 1, channels), torch.linspace(1, 2, channels)
    return [mean.to(dtype), var.to(dtype), *(p.to(dtype).requires_grad_() for p in (weight, bias))]


def once(x, grad, operator, channels, dtype, **options):
    """Output, gradients and running statistics of an operator."""
    x, (mean, var, weight, bias) = x.clone(memory_format=torch.preserve_format), parameters(channels, dtype)
    y = operator(x.requires_grad_(), mean, var, weight, bias, **options)
    y.backward(grad)
    return {"y": y.detach(), "dx": x.grad, "dw": weight.grad, "db": bias.grad, "mean": mean, "var": var}


def compare(group, x, grad, sizes, tolerance=1e-10, **options):
    """Run both, compare, and return what every rank got."""
    channels = x.shape[1]
    expected = once(x, grad, filtered_batch_norm, channels, torch.float64, training=True, **options)
    shares = list(zip(x.split(sizes), grad.split(sizes)))
    results = group.run(lambda rank: once(*shares[rank], sync_filtered_batch_norm, channels, torch.float64, **options))
    for result in results:
        assert isinstance(result, dict), result
    for name in ("y", "dx"):
        together = torch.cat([result[name] for result in results])
        torch.testing.assert_close(together, expected[name], rtol=tolerance, atol=tolerance, msg=name)
    for name in ("dw", "db"):
        total = sum(result[name] for result in results)
        torch.testing.assert_close(total, expected[name], rtol=tolerance, atol=tolerance, msg=name)
    for name in ("mean", "var"):
        torch.testing.assert_close(results[0][name], expected[name], rtol=tolerance, atol=tolerance, msg=name)
        assert all(torch.equal(result[name], results[0][name]) for result in results), "equal to the bit"
    return results


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_one_process_with_the_whole_batch(sizes, options, group_of):
    x, grad = data(sizes)
    compare(group_of(len(sizes)), x, grad, sizes, eps=1e-3, momentum=0.3, **options)


@pytest.mark.parametrize("spatial", [(), (6,), (2, 3, 4), (1, 1)], ids=str)
def test_inputs_of_any_number_of_dimensions(spatial, group_of):
    sizes = (4, 0, 3)
    compare(group_of(3), *data(sizes, spatial=spatial), sizes, t_sigma=1.5)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    channels=st.integers(1, 3),
    width=st.integers(1, 4),
    t_sigma=st.floats(1.05, 6) | st.just(math.inf),
    mode=st.sampled_from(["exact", "paper"]),
    correction=st.booleans(),
    offset=st.sampled_from([0.0, 1e4]),
    seed=st.integers(0, 100),
)
def test_any_shares(sizes, channels, width, t_sigma, mode, correction, offset, seed):
    with pytest.MonkeyPatch.context() as patch:
        group = SimulatedGroup(len(sizes))
        patch.setattr(sync, "dist", group)
        x, grad = data(sizes, channels, (width,), seed=seed)
        options = {"t_sigma": t_sigma, "grad_mode": mode, "gaussian_correction": correction}
        if sum(sizes) * width == 1:
            errors = group.run(lambda rank: sync_filtered_batch_norm(x.split(sizes)[rank], **options))
            assert all("Expected more than 1 value per channel" in str(error) for error in errors)
        else:
            # Few values in a channel: what is left of a variance that cancels has fewer digits.
            compare(group, x + offset, grad, sizes, tolerance=1e-6 if offset else 1e-8, **options)


@pytest.mark.parametrize("t_sigma, gathers", [(2.0, 2), (math.inf, 1)])
def test_two_exchanges_forward_and_one_backward(t_sigma, gathers, group_of):
    group = group_of(3)
    shares = data((2, 0, 3))[0].split((2, 0, 3))
    counted = []

    def both(rank):
        weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
        y = sync_filtered_batch_norm(shares[rank], weight=weight, t_sigma=t_sigma)
        if rank == 0:
            counted.append(dict(group.calls))
        y.sum().backward()

    assert group.run(both) == [None] * 3
    assert counted == [{"all_gather": gathers}]
    assert group.calls == {"all_gather": gathers, "all_reduce": 1}


def test_no_gradient_no_exchange(group_of):
    group = group_of(2)
    outputs = group.run(lambda rank: sync_filtered_batch_norm(data((2, 3))[0].split((2, 3))[rank]))
    assert not any(y.requires_grad for y in outputs) and group.calls == {"all_gather": 2}


@pytest.mark.parametrize("empty", [True, False])
def test_who_needs_no_gradient_takes_part_if_another_does(empty, group_of):
    """As a head that makes its empty input anew, detached from the backbone."""
    sizes = (3, 0) if empty else (3, 2)
    group, (x, grad) = group_of(2), data(sizes)
    shares = list(zip(x.split(sizes), grad.split(sizes)))
    whole = x.clone().requires_grad_()
    filtered_batch_norm(whole, training=True, t_sigma=1.5).backward(grad)

    def one(rank):
        part = shares[rank][0].clone().requires_grad_(rank == 0)
        sync_filtered_batch_norm(part, t_sigma=1.5).backward(shares[rank][1])
        return part.grad

    gradients = group.run(one)
    torch.testing.assert_close(gradients[0], whole.grad[:3])
    assert gradients[1] is None and group.calls["all_reduce"] == 1


def test_nothing_on_any_process(group_of):
    results = group_of(2).run(lambda rank: once(*data((0, 0)), sync_filtered_batch_norm, 3, torch.float64, t_sigma=2.0))
    for result in results:
        assert result["y"].shape == (0, 3, 4, 5) and result["dw"].eq(0).all() and result["db"].eq(0).all()
        assert torch.equal(result["mean"], torch.linspace(0, 1, 3).double()) and result["var"].isfinite().all()


@pytest.mark.parametrize("sizes", [(1, 0), (0, 1, 0)], ids=str)
def test_one_value_on_all_processes_is_pytorchs_error_on_each(sizes, group_of):
    shares = torch.ones(1, 3, 1, 1).split(sizes)
    errors = group_of(len(sizes)).run(lambda rank: sync_filtered_batch_norm(shares[rank]))
    assert all(isinstance(error, ValueError) for error in errors)
    assert all("Expected more than 1 value per channel when training" in str(error) for error in errors)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("t_sigma", [2.0, math.inf])
def test_a_value_that_is_not_finite_is_loud_on_every_process_and_in_its_channel_alone(bad, t_sigma, group_of):
    sizes = (3, 2)
    x, grad = data(sizes)
    clean, dirty = x.split(sizes), x.clone()
    dirty[4, 1, 2, 2] = bad
    results = []
    for shares in (clean, dirty.split(sizes)):
        results += group_of(2).run(
            lambda rank, shares=shares: once(
                shares[rank], grad.split(sizes)[rank], sync_filtered_batch_norm, 3, torch.float64, t_sigma=t_sigma
            )
        )
    others = [0, 2]
    for before, after in zip(results[:2], results[2:]):
        for name in ("y", "dx"):
            assert after[name][:, 1].isnan().all() and torch.equal(after[name][:, others], before[name][:, others])
        assert (after["mean"][1], after["var"][1]) == (0.5, 1.5)
        assert torch.equal(after["mean"][others], before["mean"][others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_narrow_inputs_and_layouts(dtype, channels_last, group_of):
    sizes = (3, 0, 4)
    x, grad = data(sizes, dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    double = (x.double(), grad.double())
    expected = once(*double, filtered_batch_norm, 3, torch.float64, training=True, t_sigma=2.0)
    results = group_of(3).run(
        lambda rank: once(
            x.split(sizes)[rank], grad.split(sizes)[rank], sync_filtered_batch_norm, 3, torch.float32, t_sigma=2.0
        )
    )
    rounding = 4 * torch.finfo(dtype).eps + 1e-5
    for name in ("y", "dx"):
        assert all(result[name].dtype == dtype for result in results)
        together = torch.cat([result[name] for result in results])
        torch.testing.assert_close(together.double(), expected[name], rtol=rounding, atol=rounding)
    assert results[0]["mean"].dtype == results[0]["dw"].dtype == torch.float32
    torch.testing.assert_close(results[0]["var"].double(), expected["var"], rtol=1e-5, atol=1e-5)
    if channels_last:
        assert results[2]["y"].is_contiguous(memory_format=torch.channels_last)
        assert results[2]["dx"].is_contiguous(memory_format=torch.channels_last)


def test_large_mean_keeps_its_digits(group_of):
    """Sums of squares would leave nothing of this variance in float32."""
    sizes = (16, 0, 5)
    x, _ = data(sizes, dtype=torch.float32)
    x = x / 16 + 1e4
    exact = once(x.double(), x.double(), filtered_batch_norm, 3, torch.float64, training=True, momentum=1.0)
    results = group_of(3).run(
        lambda rank: once(
            x.split(sizes)[rank], x.split(sizes)[rank], sync_filtered_batch_norm, 3, torch.float32, momentum=1.0
        )
    )
    torch.testing.assert_close(results[0]["var"].double(), exact["var"], rtol=1e-3, atol=0)


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="t_sigma must be a number greater than 1"):
        sync_filtered_batch_norm(torch.ones(2, 3), t_sigma=1.0)
    with pytest.raises(ValueError, match="weight has 4 elements, but the input has 3 channels"):
        sync_filtered_batch_norm(torch.ones(2, 3), weight=torch.ones(4))


def test_it_cannot_be_differentiated_twice(group_of):
    def twice(rank):
        x = data((2, 2))[0].split(2)[rank].requires_grad_()
        (dx,) = torch.autograd.grad(sync_filtered_batch_norm(x).square().sum(), x, create_graph=True)
        try:
            dx.sum().backward()
        except RuntimeError as error:
            return str(error)

    assert all("differentiate twice" in message for message in group_of(2).run(twice))
