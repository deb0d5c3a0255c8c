"""What synchronized norms exchange, as it is counted and as it is, and how long the model says that this takes."""

import math

import pytest
import torch
from simulated_group import SimulatedGroup
from torch import nn

import fbn_plugin
from fbn_plugin.engine.benchmark.communication import (
    ALGORITHMS,
    NORMS,
    Cluster,
    Collective,
    collectives,
    cost_table,
    measured_step,
    step_bytes,
    step_seconds,
    sync_channels,
)
from fbn_plugin.ops import sync


def test_the_collectives_of_sync_fbn_are_those_of_its_code(monkeypatch):
    group = SimulatedGroup(2)
    monkeypatch.setattr(sync, "dist", group)

    def both(rank):
        x = torch.randn(2, 5, 3, 3, requires_grad=True)
        sync.sync_filtered_batch_norm(x, t_sigma=2.0).sum().backward()

    assert group.run(both) == [None, None]
    expected = collectives("SyncFBN", 5)
    assert group.sizes == [each.size for each in expected]
    assert [each.kind for each in expected] == ["all_gather", "all_gather", "all_reduce"]


def test_sync_bn_exchanges_as_pytorch_does():
    assert collectives("SyncBN", 64) == [Collective("all_gather", 4 * 129), Collective("all_reduce", 4 * 128)]
    with pytest.raises(ValueError, match="norm must be one of SyncBN, SyncFBN, got 'BN'"):
        collectives("BN", 64)


def test_norms_are_counted_in_a_model():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), fbn_plugin.FilteredBatchNorm2d(8), nn.GroupNorm(2, 8))
    assert sync_channels(model) == []
    assert sync_channels(fbn_plugin.convert_sync(model)) == [8, 8]


def test_times_by_hand():
    """Two nodes of two GPUs, with round figures."""
    cluster = Cluster(
        4, 2, start=1, node_hop=10, ring_hop=100, tree_hop=1000, node_speed=8, network_speed=4, payload=0.5
    )
    gathered, reduced = Collective("all_gather", 6), Collective("all_reduce", 6)
    assert cluster.seconds(gathered, "ring") == 1 + (2 * 10 + 100) + 3 * 6 / 2
    assert cluster.seconds(gathered, "tree") == 1 + (10 + 1000) + 3 * 6 / 2
    assert cluster.seconds(reduced, "ring") == 1 + 2 * (2 * 10 + 100) + 2 * 6 * 3 / 4 / 2
    assert cluster.seconds(reduced, "tree") == 1 + 2 * (10 + 1000) + 2 * 6 / 2
    assert step_bytes("SyncBN", [1], 4) == 3 * 12 + 2 * 8 * 3 // 4


def test_in_one_node_nothing_crosses_the_network_and_one_gpu_waits_for_nobody():
    exchange = Collective("all_reduce", 1000)
    for algorithm in ALGORITHMS:
        near = Cluster(8, ring_hop=9, tree_hop=9, network_speed=1).seconds(exchange, algorithm)
        assert near == Cluster(8).seconds(exchange, algorithm) > 0
        assert Cluster(1).seconds(exchange, algorithm) == 0


def test_more_gpus_take_longer_and_rings_longer_than_trees():
    for norm in NORMS:
        times = {
            each: [step_seconds(norm, [64, 256], Cluster(8 * 2**n), each) for n in range(8)] for each in ALGORITHMS
        }
        assert all(times[each] == sorted(times[each]) for each in ALGORITHMS)
        assert times["ring"][-1] > 5 * times["tree"][-1]
    assert step_seconds("SyncFBN", [64], Cluster(64), "ring") > step_seconds("SyncBN", [64], Cluster(64), "ring")


def test_the_table_holds_these_figures_and_a_missing_step_is_said():
    cluster, step = Cluster(16), 0.02
    header, _, row = cost_table([64, 256], step, [cluster]).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    seconds = step_seconds("SyncFBN", [64, 256], cluster, "ring")
    assert len(cells) == len(header.strip("|").split("|")) == 9
    assert cells[0] == "16" and cells[5] == f"{1e3 * seconds:.1f}" and cells[7] == f"{100 * seconds / step:.0f}"
    rows = [{"model": "m", "batch": 2, "layout": "l", "dtype": "d", "peers": {"FBN T=5": {"ms": [1, 3, 4]}}}]
    assert math.isclose(measured_step({"models": rows}, "m", 2, "l", "d"), 0.003)
    with pytest.raises(ValueError, match="no step of m with 4 images, l, d"):
        measured_step({"models": rows}, "m", 4, "l", "d")
