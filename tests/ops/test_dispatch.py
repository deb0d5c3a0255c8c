"""Which backend takes a tensor, what is said of it, and what backends are spared."""

import inspect

import pytest
import torch

from fbn_plugin import ops
from fbn_plugin.ops import dispatch, filtered_batch_norm, reference
from fbn_plugin.ops.reference import Options, RunningStats


class Fake:
    """A backend in name."""

    def __init__(self, reason):
        self.reason = reason

    def describe(self):
        return self.reason or "of great speed"

    def refuses(self, x, num_groups=0, activation="identity"):
        return self.reason


@pytest.mark.parametrize("name, backend", [*dispatch.BACKENDS.items(), ("reference", reference)])
def test_every_backend_has_all_functions_by_the_same_names(name, backend):
    for function, written in inspect.getmembers(dispatch.Backend, inspect.isfunction):
        if function.startswith("_"):
            continue
        arguments = list(inspect.signature(written).parameters)[1:]
        theirs = inspect.signature(getattr(backend, function)).parameters
        assert list(theirs)[: len(arguments)] == arguments, function
        assert all(p.default is not p.empty for p in list(theirs.values())[len(arguments) :]), function


def test_backends_are_named_in_their_order():
    assert list(ops.backends())[:1] == ["cpu"] and list(ops.backends())[-2:] == ["triton", "reference"]
    assert ops.backends()["reference"] == "plain PyTorch, takes everything"


def test_the_next_backend_takes_over_and_explain_says_why(monkeypatch):
    x = torch.randn(2, 3)
    monkeypatch.setattr(dispatch, "BACKENDS", {"cpu": Fake("the library is damaged"), "triton": Fake(None)})
    assert dispatch.backend_of(x) is dispatch.BACKENDS["triton"]
    assert ops.explain(x) == "triton: of great speed; not cpu: the library is damaged"
    monkeypatch.setattr(dispatch, "BACKENDS", {"cpu": Fake("the library is damaged"), "triton": Fake("no GPU")})
    assert dispatch.backend_of(x) is reference
    assert ops.explain(x) == "reference: the library is damaged"
    assert ops.backends() == {
        "cpu": "the library is damaged",
        "triton": "no GPU",
        "reference": "plain PyTorch, takes everything",
    }


@pytest.mark.parametrize("num_groups", [3, -1, 9])
def test_explain_of_groups_that_do_not_divide_the_channels(num_groups):
    with pytest.raises(ValueError, match=f"num_groups .* got {num_groups} for 8 channels"):
        ops.explain(torch.randn(2, 8, 3), num_groups)


def test_explain_of_what_no_filter_takes():
    for x in (torch.randn(3), torch.ones(2, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"floating point of shape \(N, C, \.\.\.\), got torch"):
            ops.explain(x)


def test_who_fuses(monkeypatch):
    x = torch.randn(2, 3)
    monkeypatch.setattr(dispatch, "BACKENDS", {"cpu": Fake(None), "triton": Fake(None)})
    assert not dispatch.fuses(x, "relu")
    monkeypatch.setattr(dispatch, "BACKENDS", {"cpu": Fake("not built"), "triton": Fake(None)})
    assert dispatch.fuses(x, "relu")
    monkeypatch.setattr(dispatch, "BACKENDS", {"cpu": Fake("not built"), "triton": Fake("no GPU")})
    assert not dispatch.fuses(x, "relu")


@pytest.mark.parametrize("kind", ["half", "strided", "int32 counter"])
def test_running_statistics_that_kernels_cannot_write(kind):
    x = torch.randn(4, 3, 5, 5)
    mean, var, counter = torch.zeros(3), torch.ones(3), torch.tensor(1)
    if kind == "half":
        mean, var = mean.half(), var.half()
    elif kind == "strided":
        mean, var = torch.zeros(6)[::2], torch.ones(6)[::2]
    else:
        counter = counter.int()
    filtered_batch_norm(x, mean, var, None, None, True, None, t_sigma=2.0, num_batches_tracked=counter)
    _, moments = reference.forward(x, None, None, None, None, Options(0, 2.0, 1e-5, False, "exact"))
    unbiased = moments[1] * moments[4] / (moments[4] - 1)
    torch.testing.assert_close(mean.float(), moments[0] / 2, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(var.float(), (1 + unbiased) / 2, rtol=1e-3, atol=1e-4)
    assert counter == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_the_batch_is_counted_and_autograd_told(dtype, momentum):
    """The counter by which ``None`` averages has this batch in it."""
    x = torch.randn(4, 3, 5, 5, dtype=dtype)
    running = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype), torch.tensor(4)
    options = {"t_sigma": 2.0, "num_batches_tracked": running[2]}
    filtered_batch_norm(x, *running[:2], None, None, True, momentum, **options)
    weight = 1 / 5 if momentum is None else momentum
    expected = RunningStats(torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype), weight, None)
    mean, var, _, _, count = reference.forward(x, None, None, None, None, Options(0, 2.0, 1e-5, False, "exact"))[1]
    reference.update_running_stats(expected, mean, var, count)
    torch.testing.assert_close(running[0], expected.mean)
    torch.testing.assert_close(running[1], expected.var)
    assert running[2] == 5 and [each._version for each in running] == [1, 1, 1]


def test_without_statistics_the_batch_is_counted_and_without_a_counter_none_moves_nothing():
    x, counter = torch.randn(4, 3), torch.tensor(0)
    filtered_batch_norm(x, training=True, num_batches_tracked=counter)
    assert counter == 1
    mean, var = torch.zeros(3), torch.ones(3)
    filtered_batch_norm(x, mean, var, None, None, True, momentum=None)
    assert mean.eq(0).all() and var.eq(1).all()
