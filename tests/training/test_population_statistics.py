"""Population statistics: Algorithm 2 against a transcription of it, the exact mode's law, and what must not change."""

import copy
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_processes
from torch import nn

from fbn_plugin import FilteredBatchNorm1d, FilteredBatchNorm2d, FilteredBatchNormAct2d, update_population_stats

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from paper_equations import forward as paper_forward

pytestmark = pytest.mark.usefixtures("one_thread")


def batches(*sizes, seed=0, channels=3, dtype=torch.float64):
    """Batches of images with a mean of 1 and an outlier in each."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(sum(sizes), channels, 5, 4, dtype=dtype, generator=generator) + 1
    images[::3] *= 8
    return list(images.split(sizes))


def moments_in_numpy(x, norm):
    """Mean, unbiased variance and nothing else, of the kept values of each channel."""
    t_sigma = getattr(norm, "t_sigma", math.inf)
    ones = np.ones(x.shape[1])
    _, moments = paper_forward(x, ones, ones, t_sigma, norm.eps)
    mean, var, count = (np.array(column, dtype=float) for column in zip(*moments))
    return mean, var * count / (count - 1)


def statistics(norm):
    return torch.stack((norm.running_mean, norm.running_var))


def network():
    """Norms plain and filtered, one of them used twice, dropout, and a norm that no value reaches."""
    torch.manual_seed(0)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.first = nn.BatchNorm2d(4)
            self.twice = FilteredBatchNorm2d(4, t_sigma=1.5)
            self.last = FilteredBatchNorm1d(4, t_sigma=2.0, gaussian_correction=True)
            self.unused = nn.BatchNorm2d(4)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            x = self.drop(self.first(self.conv1(x)).relu())
            x = self.twice(self.conv2(x)).relu()
            x = self.twice(self.conv2(x)).relu()
            return self.last(input=x.mean((2, 3)))

    return Network().double()


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), FilteredBatchNorm2d(3, t_sigma=1.5)], ids=lambda n: str(n)[:8])
def test_algorithm_2_as_printed(norm):
    norm, loader = copy.deepcopy(norm).double(), batches(4, 4, 4, 2)
    each = [moments_in_numpy(x.numpy(), norm) for x in loader]
    update_population_stats(norm, loader)
    np.testing.assert_allclose(statistics(norm), np.mean(each, axis=0), rtol=1e-12)


def test_equal_batches_give_the_bessel_factor_times_the_mean_variance():
    norm, loader = nn.BatchNorm2d(3).double(), batches(4, 4, 4)
    update_population_stats(norm, loader)
    m = 4 * 5 * 4
    biased = torch.stack([x.var((0, 2, 3), correction=0) for x in loader]).mean(0)
    torch.testing.assert_close(norm.running_var, m / (m - 1) * biased)


def test_every_call_of_a_layer_is_a_batch_and_later_layers_see_batch_moments():
    model, loader = network(), batches(4, 6)
    reference = copy.deepcopy(model)
    reference.drop.eval()
    for norm in (reference.first, reference.twice, reference.last):
        norm.momentum = None  # a cumulative average over training forwards is the same mean over calls
    for x in loader:
        reference(x)
    update_population_stats(model, loader)
    assert reference.twice.num_batches_tracked == 4
    for name in ("first", "twice", "last"):
        torch.testing.assert_close(statistics(getattr(model, name)), statistics(getattr(reference, name)))


@pytest.mark.parametrize("exact", [False, True])
def test_nothing_but_the_statistics_changes(exact):
    model = network().train()
    model.drop.eval()
    model.conv2.weight.requires_grad_(False)
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    model.twice.momentum, model.last.momentum = 0.3, None
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    update_population_stats(model, batches(4, 5), exact=exact)
    assert torch.equal(rng, torch.get_rng_state())
    assert [m.training for m in model.modules()] == flags
    assert (model.twice.momentum, model.last.momentum) == (0.3, None)
    assert not model.conv2.weight.requires_grad and model.conv1.weight.requires_grad
    assert (model.conv1.weight.grad == 1).all() and not model.first.running_mean.requires_grad
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{norm}.running_{what}" for norm in ("first", "twice", "last") for what in ("mean", "var")}
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("exact", [False, True])
def test_norms_in_evaluation_mode_are_left_alone_and_used_as_they_are(exact):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).double()
    model[0].eval().running_var.fill_(4.0)
    x = batches(6)[0]
    update_population_stats(model, [x], exact=exact)
    assert (model[0].running_var == 4).all() and (model[0].running_mean == 0).all()
    expected = (x / math.sqrt(4 + 1e-5)).var((0, 2, 3))
    torch.testing.assert_close(model[1].running_var, expected)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_exact_statistics_do_not_depend_on_the_batches(sizes):
    whole = network()
    update_population_stats(whole, batches(sum(sizes)), exact=True)
    model = network()
    update_population_stats(model, batches(*sizes), exact=True)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name], rtol=1e-9, atol=1e-9)


def test_exact_statistics_are_those_of_all_values_layer_by_layer():
    model, x = network(), batches(10)[0]
    update_population_stats(model, x.split(3), exact=True)
    model.eval()
    inputs = {"first": [], "twice": [], "last": []}
    for name, seen in inputs.items():

        def keep(module, args, kwargs, seen=seen):
            seen.append((args[0] if args else kwargs["input"]).detach())

        getattr(model, name).register_forward_pre_hook(keep, with_kwargs=True)
    model(x)
    for name, expected in (("first", inputs["first"][0]), ("last", inputs["last"][0])):
        norm = getattr(model, name)
        mean, var = moments_in_numpy(expected[..., None].numpy(), norm)
        if name == "last":
            var = var / 0.7737413  # the variance of a unit Gaussian cut at 2
        np.testing.assert_allclose(statistics(norm), [mean, var], rtol=1e-7)
    # Both calls of the shared layer are pooled; the second is measured behind the first one's own statistics.
    alone = copy.deepcopy(model.twice)
    alone.running_mean, alone.running_var = map(torch.tensor, moments_in_numpy(inputs["twice"][0].numpy(), alone))
    second = model.conv2(alone(inputs["twice"][0]).relu()).detach()
    both = torch.cat((inputs["twice"][0], second))
    np.testing.assert_allclose(statistics(model.twice), moments_in_numpy(both.numpy(), model.twice), rtol=1e-9)


def test_exact_statistics_of_large_means_and_constants_keep_their_digits():
    x = torch.randn(12, 3, 5, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([1e4, 0, 0]).view(3, 1, 1)
    x[:, 2] = 1e6 + 1 / 3
    norm = FilteredBatchNorm2d(3, t_sigma=6.0)
    update_population_stats(norm, x.split(2), exact=True)
    torch.testing.assert_close(norm.running_var, x.double().var((0, 2, 3)).float())
    torch.testing.assert_close(norm.running_mean, x.double().mean((0, 2, 3)).float())


def test_values_that_the_population_cuts_from_a_whole_batch():
    far = torch.full((1, 1, 2, 2), 50.0)
    norm = FilteredBatchNorm2d(1, t_sigma=2.0)
    near = torch.randn(30, 1, 2, 2, generator=torch.Generator().manual_seed(0)).clamp(-1.5, 1.5)
    update_population_stats(norm, [near, far], exact=True)
    torch.testing.assert_close(norm.running_mean, near.mean().view(1))
    torch.testing.assert_close(norm.running_var, near.var().view(1))


def test_no_more_batches_are_read_than_asked_for_and_fewer_will_do():
    endless = (x for x in itertools.cycle(batches(4, 4, 4)))
    norm, expected = nn.BatchNorm2d(3).double(), nn.BatchNorm2d(3).double()
    update_population_stats(norm, endless, num_batches=2)
    update_population_stats(expected, batches(4, 4, 4)[:2], num_batches=100)
    assert torch.equal(statistics(norm), statistics(expected))
    assert torch.equal(next(endless), batches(4, 4, 4)[2])


def test_float32_sums_and_half_precision_buffers():
    x = batches(*[2] * 50, dtype=torch.float32)
    norm = nn.BatchNorm2d(3).bfloat16()
    update_population_stats(norm, [b.bfloat16() for b in x])
    expected = torch.stack([b.bfloat16().double().mean((0, 2, 3)) for b in x]).mean(0)
    torch.testing.assert_close(norm.running_mean, expected.bfloat16(), rtol=1e-2, atol=0)
    assert norm.running_mean.dtype == torch.bfloat16


@pytest.mark.parametrize("exact", [False, True])
def test_an_error_on_the_way_changes_nothing(exact):
    class Loader:
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield from batches(4, 4)
            if self.passes == (4 if exact else 1):  # exact: the first layer has its new statistics by then
                raise OSError("disk on fire")

    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OSError, match="disk on fire"):
        update_population_stats(model, Loader(), exact=exact)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and model.first.running_mean is not None
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("exact", [False, True])
def test_a_nan_is_an_error_that_changes_nothing(exact):
    model, loader = network(), batches(4, 4)
    before = copy.deepcopy(model.state_dict())
    loader[1][0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="the statistics of 'first' are not finite"):
        update_population_stats(model, loader, exact=exact)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FilteredBatchNorm2d])
def test_a_variance_that_a_buffer_cannot_hold_is_an_error_that_changes_nothing(exact, norm):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), norm(3)).half()
    with torch.no_grad():
        model[1].weight.mul_(3000)
    before = copy.deepcopy(model.state_dict())
    loader = [x.half() for x in batches(4, 4)]
    with pytest.raises(ValueError, match=r"the running_var of '2' is .*, more than its float16 buffer holds.*float32"):
        update_population_stats(model, loader, exact=exact)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    update_population_stats(model.float(), [x.float() for x in loader], exact=exact)
    assert model[2].running_var.max() > torch.finfo(torch.float16).max


@pytest.mark.parametrize("exact", [False, True])
def test_empty_inputs_of_a_norm_are_no_batches(exact):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3).double()

        def forward(self, x):
            return self.norm(x[x.mean((1, 2, 3)) > 0])

    model, x = Head(), batches(4)[0].abs()
    update_population_stats(model, [-x, x], exact=exact)
    torch.testing.assert_close(model.norm.running_mean, x.mean((0, 2, 3)))


@pytest.mark.parametrize("exact", [False, True])
def test_bad_input_gets_one_sentence(exact):
    norm = nn.BatchNorm2d(3).double()
    with pytest.raises(ValueError, match="batch norm.* 1: .*loader"):
        update_population_stats(norm, [], exact=exact)
    with pytest.raises(ValueError, match="training mode.*model.train"):
        update_population_stats(copy.deepcopy(norm).eval(), batches(4), exact=exact)
    with pytest.raises(ValueError, match="num_batches .*1.*None.*0"):
        update_population_stats(norm, batches(4), num_batches=0, exact=exact)
    if exact:
        with pytest.raises(ValueError, match="give a loader, not an iterator"):
            update_population_stats(norm, iter(batches(4)), exact=True)


def test_a_norm_with_moments_of_its_own():
    class Doubled(nn.BatchNorm2d):
        def batch_statistics(self, x):
            mean = 2 * x.mean((0, 2, 3))
            return mean, torch.ones_like(mean), torch.full_like(mean, 5)

    norm, loader = Doubled(3).double(), batches(4, 4)
    update_population_stats(norm, loader)
    torch.testing.assert_close(norm.running_mean, 2 * torch.cat(loader).mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, torch.full((3,), 1.25, dtype=torch.float64))
    with pytest.raises(ValueError, match="'' .*Doubled"):
        update_population_stats(norm, loader, exact=True)


def test_batches_in_the_forms_of_the_frameworks():
    expected, x = nn.BatchNorm2d(3).double(), batches(4)[0]
    update_population_stats(expected, [x])

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3).double()

        def forward(self, images):
            images = [i["image"] if isinstance(i, dict) else i for i in images]
            return self.norm(torch.stack(images))

    for batch in ((x, torch.zeros(4)), [x, torch.zeros(4)], (tuple(x), ({},) * 4), [{"image": i} for i in x]):
        model = Detector()
        update_population_stats(model, [batch])
        assert torch.equal(statistics(model.norm), statistics(expected))
    model = Detector()
    update_population_stats(model, [{"pixels": x}], forward=lambda model, batch: model(batch["pixels"]))
    assert torch.equal(statistics(model.norm), statistics(expected))


def test_fused_norms_are_measured_before_residual_and_activation():
    fused, plain = FilteredBatchNormAct2d(3, t_sigma=1.5).double(), FilteredBatchNorm2d(3, t_sigma=1.5).double()
    loader = batches(4, 4)
    update_population_stats(fused, loader, forward=lambda model, x: model(x, residual=x))
    update_population_stats(plain, loader)
    assert torch.equal(statistics(fused), statistics(plain))


def _states(rank):
    mine = batches(4, 4, 4, 2)[:3] if rank == 0 else batches(4, 4, 4, 2)[3:]
    states = {}
    for exact in (False, True):
        model = network()
        update_population_stats(nn.parallel.DistributedDataParallel(model), mine, exact=exact)
        states[exact] = model.state_dict()
    share = mine[:2] if rank == 0 else []
    for loader, exact in (([], False), (share, False), (share, True)):  # no batch in both processes, and in one
        model = network()
        try:
            update_population_stats(nn.parallel.DistributedDataParallel(model), loader, exact=exact)
            states[len(states)] = model.state_dict()
        except ValueError as error:
            states[len(states)] = str(error)
    return states


def test_two_processes_with_unequal_shares_end_equal(tmp_path):
    first, second = run_processes(_states, 2, tmp_path)
    every, some = batches(4, 4, 4, 2), batches(4, 4, 4, 2)[:2]
    for key, loader, exact in ((False, every, False), (True, batches(14), True), (3, some, False), (4, some, True)):
        model = network()
        update_population_stats(model, loader, exact=exact)
        for name, tensor in model.state_dict().items():
            assert torch.equal(first[key][name], second[key][name])
            torch.testing.assert_close(first[key][name], tensor)
    assert first[2] == second[2] and "is the loader empty" in first[2]
