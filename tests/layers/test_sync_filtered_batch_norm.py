"""SyncFilteredBatchNorm: the layer's own promises, and real processes against one with the concatenated batch. The
arithmetic itself is in ``tests/ops/test_sync.py``."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fbn_plugin
from fbn_plugin import FilteredBatchNorm1d, FilteredBatchNorm2d, FilteredBatchNorm3d, SyncFilteredBatchNorm
from fbn_plugin.engine.run.distributed import broadcast_buffers
from fbn_plugin.ops import sync
from fbn_plugin.training.population_statistics import update_population_stats

gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
FORMS = {2: FilteredBatchNorm1d, 3: FilteredBatchNorm1d, 4: FilteredBatchNorm2d, 5: FilteredBatchNorm3d}


def data(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 + 1


# --- one process ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 7), (3, 4, 5, 6), (3, 4, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("options", [{}, {"t_sigma": math.inf}, {"momentum": None}, {"affine": False}], ids=str)
def test_in_one_process_it_is_the_filtered_norm_to_the_bit(shape, options):
    ours, other = SyncFilteredBatchNorm(4, **options), FORMS[len(shape)](4, **options)
    for step in range(2):
        inputs = [data(shape, step, torch.float32).requires_grad_() for _ in range(2)]
        for layer, x in zip((ours, other), inputs):
            layer(x).square().sum().backward()
        assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert list(ours.state_dict()) == list(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), other.state_dict().values()))
    assert torch.equal(ours.eval()(x), other.eval()(x))


def test_it_is_taken_for_a_batch_norm_and_for_no_sync_batch_norm():
    layer = SyncFilteredBatchNorm(4)
    assert isinstance(layer, FilteredBatchNorm2d) and isinstance(layer, nn.BatchNorm2d)
    assert not isinstance(layer, nn.SyncBatchNorm)
    with pytest.raises(ValueError, match="expected at least 2D input"):
        layer(torch.ones(4))
    with pytest.raises(ValueError, match="t_sigma must be a number greater than 1"):
        SyncFilteredBatchNorm(4, t_sigma=1)


def test_copies_keep_the_options():
    layer = SyncFilteredBatchNorm(4, t_sigma=2.5, grad_mode="paper", gaussian_correction=True, gamma_init=0.1)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert repr(twin) == repr(layer) and twin.process_group is None
        assert torch.equal(twin(data((3, 4, 2), dtype=torch.float32)), layer(data((3, 4, 2), dtype=torch.float32)))


def test_it_is_not_fused_with_an_activation_and_folds_into_a_linear_layer():
    model = nn.Sequential(nn.Linear(3, 4), SyncFilteredBatchNorm(4, t_sigma=2.0), nn.ReLU())
    for step in range(3):
        model(data((8, 3), step, torch.float32))
    assert fbn_plugin.fuse_norm_act(model) is model and type(model[1]) is SyncFilteredBatchNorm
    x = data((5, 3), 3, torch.float32)
    expected = model.eval()(x)
    assert type(fbn_plugin.fold_norms(model, example=x)[1]) is nn.Identity
    torch.testing.assert_close(model(x), expected)


def test_evaluation_exports_as_plain_batch_norm():
    exported = torch.export.export(SyncFilteredBatchNorm(4).eval(), (torch.randn(2, 4, 5, 5),))
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert len(targets) == 1 and "batch_norm" in targets[0]


# --- several processes ---------------------------------------------------------------------------------------------

LAYERS = {
    "default": {"t_sigma": 1.5},
    "paper": {"t_sigma": 1.5, "grad_mode": "paper", "gaussian_correction": True},
    "plain": {"t_sigma": math.inf},
    "cumulative": {"t_sigma": 2.0, "momentum": None},
    "not affine": {"t_sigma": 2.0, "affine": False},
    "not tracking": {"t_sigma": 2.0, "track_running_stats": False},
    "small scale": {"t_sigma": 2.0, "gamma_init": 0.1, "eps": 1e-2},
}
SHARES = {2: [(3, 5), (6, 0), (0, 4)], 4: [(3, 0, 1, 5), (0, 0, 2, 0)]}
SPATIAL = [(4, 5), (6,), (2, 2, 3), (), (1, 1)]


def batches(shares, spatial, step):
    """The shares of one batch, the outliers all in the first one that is not empty."""
    x = data((sum(shares), 3, *spatial), step)
    x[0] *= 10
    return list(zip(x.split(shares), data(x.shape, step + 10).split(shares)))


def two_steps(layer, steps):
    result = []
    for x, grad in steps:
        x = x.clone().requires_grad_()
        y = layer(x)
        y.backward(grad)
        result += [y.detach(), x.grad]
    return result, [p.grad for p in layer.parameters()], layer.state_dict(), layer.eval()(steps[0][0])


def compiled_first(rank):
    """The graph breaks at the exchange, also if that is the first in this process."""
    sync._uncompiled = None
    layer = SyncFilteredBatchNorm(3, t_sigma=2.0, dtype=torch.float64)
    compiled = torch.compile(copy.deepcopy(layer), backend="eager")
    x = data((2 + rank, 3, 4, 4), rank)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for module, each in zip((compiled, layer), inputs):
        module(each).square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad) and torch.equal(layer.running_var, compiled.running_var)


def all_layers(rank):
    count = dist.get_world_size()
    compiled_first(rank)
    results = {}
    for name, shares in itertools.product(LAYERS, SHARES[count]):
        layer = SyncFilteredBatchNorm(3, dtype=torch.float64, **LAYERS[name])
        results[name, shares] = two_steps(layer, [batches(shares, (4, 5), step)[rank] for step in range(2)])
    for spatial in SPATIAL:
        layer = SyncFilteredBatchNorm(3, t_sigma=1.5, dtype=torch.float64)
        results[spatial] = two_steps(layer, [batches(SHARES[count][0], spatial, step)[rank] for step in range(2)])
    return results | others(rank, count)


def others(rank, count):
    results = {}
    try:  # on every process alike, though one value is on one of them only
        SyncFilteredBatchNorm(3)(torch.ones(int(rank == 0), 3, 1, 1))
    except ValueError as error:
        results["one value"] = str(error)

    layer = SyncFilteredBatchNorm(3, t_sigma=2.0)
    x = data((rank, 3, 4, 4), rank, torch.float32).contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.bfloat16())
    y.float().sum().backward()
    results["autocast"] = y.dtype, y.is_contiguous(memory_format=torch.channels_last), layer.running_var

    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])] if count == 4 else [dist.new_group([0, 1])]
    layer = SyncFilteredBatchNorm(3, t_sigma=2.0, process_group=pairs[rank // 2], dtype=torch.float64)
    layer(data((2, 3, 4, 4), rank))
    results["group"] = layer.running_mean
    alone = [dist.new_group([each]) for each in range(count)][rank]
    layer = SyncFilteredBatchNorm(3, t_sigma=2.0, process_group=alone, dtype=torch.float64)
    layer(data((2, 3, 4, 4), rank))
    results["group of one"] = layer.running_mean
    for copies in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="pickle"):
            copies(layer)

    model = nn.Sequential(
        nn.Conv2d(3, 3, 1), SyncFilteredBatchNorm(3, t_sigma=2.0), nn.ReLU(), SyncFilteredBatchNorm(3)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    for exact in (False, True):  # another number of batches on every process, one has none
        mine = [data((2, 3, 4, 4), 10 * rank + number, torch.float32) for number in range(rank)]
        update_population_stats(model.train(), mine, exact=exact)
        results["population", exact] = [model[1].running_var.clone(), model[3].running_mean.clone()]
    return results


@gloo
@pytest.mark.parametrize("count", [2, 4])
def test_equals_one_process_with_the_whole_batch(count, tmp_path):
    results = run_processes(all_layers, count, tmp_path)
    close = {"rtol": 1e-10, "atol": 1e-10}
    cases = [
        ((name, shares), shares, (4, 5), LAYERS[name]) for name, shares in itertools.product(LAYERS, SHARES[count])
    ]
    cases += [(spatial, SHARES[count][0], spatial, {"t_sigma": 1.5}) for spatial in SPATIAL]
    for key, shares, spatial, options in cases:
        whole = [[torch.cat(parts) for parts in zip(*batches(shares, spatial, step))] for step in range(2)]
        outputs, gradients, state, evaluated = two_steps(
            FORMS[2 + len(spatial)](3, dtype=torch.float64, **options), whole
        )
        ranks = [result[key] for result in results]
        for number, output in enumerate(outputs):
            torch.testing.assert_close(torch.cat([rank[0][number] for rank in ranks]), output, **close, msg=str(key))
        for number, gradient in enumerate(gradients):
            torch.testing.assert_close(sum(rank[1][number] for rank in ranks), gradient, **close, msg=str(key))
        for name, tensor in state.items():
            torch.testing.assert_close(ranks[0][2][name], tensor, **close, msg=f"{key} {name}")
            if not name.startswith(("weight", "bias")):
                assert all(torch.equal(rank[2][name], ranks[0][2][name]) for rank in ranks)
        if options.get("track_running_stats", True):  # else evaluation takes each process's own moments
            torch.testing.assert_close(torch.cat([rank[3] for rank in ranks]), evaluated, **close)

    assert all("Expected more than 1 value per channel when training" in result["one value"] for result in results)
    for rank, result in enumerate(results):
        dtype, channels_last, var = result["autocast"]
        assert dtype == torch.bfloat16 and channels_last and var.dtype == torch.float32
        assert torch.equal(var, results[0]["autocast"][2])
        partner = results[rank ^ 1]
        assert torch.equal(result["group"], partner["group"])
        assert not torch.equal(result["group of one"], partner["group of one"])
        for exact in (False, True):
            for mine, first in zip(result["population", exact], results[0]["population", exact]):
                assert torch.equal(mine, first)
    if count == 4:
        assert not torch.equal(results[0]["group"], results[2]["group"])
    assert not torch.equal(results[0]["population", False][0], torch.ones(3))


class Head(nn.Module):
    """A norm after a convolution, and a head with another that sees some of the images only."""

    def __init__(self, norm):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(4, 4, 1), norm(4), nn.ReLU(), nn.Conv2d(4, 1, 1))

    def forward(self, x, boxes):
        features = self.body(x)
        return features.mean() + self.head(features[:boxes]).square().sum()


def ddp_steps(rank):
    torch.manual_seed(0)
    model = DistributedDataParallel(Head(lambda channels: SyncFilteredBatchNorm(channels, t_sigma=2.0)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        model(data((2, 3, 6, 6), 10 * step + rank, torch.float32), 0 if rank == step % 2 else 1).backward()
        optimizer.step()
    gradients = [p.grad.clone() for p in model.parameters()]
    local = {}
    for broadcast in (False, True):
        norm = DistributedDataParallel(FilteredBatchNorm2d(3, momentum=0.5), broadcast_buffers=broadcast)
        means = []
        for step in range(2):
            x = data((2, 3, 6, 6), 10 * step + rank, torch.float32)
            norm(x).sum().backward()
            means.append(norm.module.running_mean.clone())
        own, *_ = norm.module.batch_statistics(x)
        broadcast_buffers(norm)
        local[broadcast] = *means, own, norm.module.running_mean.clone()
    with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
        DistributedDataParallel(nn.SyncBatchNorm(3))  # why ours is none
    return gradients, model.state_dict(), local


@gloo
def test_in_ddp(tmp_path):
    """A head that is without input on one process after the other, and what becomes of local statistics."""
    (first, state, local), (second, other_state, other_local) = run_processes(ddp_steps, 2, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first, second)), "DDP has averaged every gradient"
    assert all(torch.equal(tensor, other_state[name]) for name, tensor in state.items())
    assert all(gradient.isfinite().all() for gradient in first) and any(gradient.ne(0).any() for gradient in first)
    for broadcast in (False, True):
        first_mean, saved, _, after = local[broadcast]
        other_first, other_saved, own, other_after = other_local[broadcast]
        assert not torch.equal(saved, other_saved)
        # The second process goes on from rank 0's statistics if DDP sends them, and else from its own.
        start = first_mean if broadcast else other_first
        torch.testing.assert_close(other_saved, 0.5 * start + 0.5 * own)
        assert torch.equal(after, saved) and torch.equal(other_after, saved), "rank 0's, on both"
