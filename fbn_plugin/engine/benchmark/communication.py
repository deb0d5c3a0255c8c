"""What synchronized batch norms exchange in a training step, and a model of the time that it takes. A model: nothing
here is measured.

A collective takes a latency for each hop and the time that its bytes need on the slowest link (the alpha-beta model).
Hops are counted as NCCL counts them when it chooses an algorithm, and the default latencies are of the size that it has
there for small messages (src/graph/tuning.cc, protocol LL): rings go through all GPUs, of which those of a node are
neighbours, trees through the nodes and in a chain through the GPUs of each.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fbn_plugin.engine.run.cli import format_table
from fbn_plugin.layers.sync_filtered_batch_norm import SyncFilteredBatchNorm

__all__ = [
    "ALGORITHMS",
    "NORMS",
    "Cluster",
    "Collective",
    "collectives",
    "cost_table",
    "measured_step",
    "step_bytes",
    "step_seconds",
    "sync_channels",
]

NORMS = ("SyncBN", "SyncFBN")
ALGORITHMS = ("ring", "tree")


@dataclass(frozen=True)
class Collective:
    """One exchange: ``"all_gather"`` or ``"all_reduce"``, and the bytes that each process gives."""

    kind: str
    size: int


def collectives(norm: str, channels: int) -> list[Collective]:
    """What one layer exchanges in a training step, forward and backward, in order. None of it can overlap with the
    layer's own work, which waits for it.

    Args:
        norm: ``"SyncFBN"``, as :mod:`fbn_plugin.ops.sync` has it: means and variances in float64 with a count and a
            flag, then filtered means, variances and counts, then two sums; or ``"SyncBN"``, as PyTorch's
            torch/nn/modules/_functions.py has it: means, deviations and a count in float32, then two sums.
        channels: C.

    Examples::

        >>> from fbn_plugin.engine.benchmark.communication import collectives
        >>> [each.size for each in collectives("SyncFBN", 64)]
        [1040, 1536, 1024]
    """
    if norm == "SyncFBN":
        gathered, item = (2 * channels + 2, 3 * channels), 8
    elif norm == "SyncBN":
        gathered, item = (2 * channels + 1,), 4
    else:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    return [
        *(Collective("all_gather", item * count) for count in gathered),
        Collective("all_reduce", item * 2 * channels),
    ]


@dataclass(frozen=True)
class Cluster:
    """A number of GPUs and what is between them.

    Args:
        gpus: all that synchronize.
        node_size: GPUs of a node.
        start: of a collective: its kernel, until the first message goes; seconds.
        node_hop: latency between two GPUs of a node (NVLink), seconds.
        ring_hop, tree_hop: latency between two nodes (InfiniBand), in a ring and in a tree, seconds.
        node_speed: of a GPU's links within its node, one way; bytes a second: 450 GB/s of NVLink 4.
        network_speed: of a node's adapters together, one way; bytes a second: 8 times 50 GB/s of InfiniBand NDR.
        payload: share of these speeds that is left for numbers: the protocol for small messages sends a flag with each.
    """

    gpus: int
    node_size: int = 8
    start: float = 6.6e-6
    node_hop: float = 0.6e-6
    ring_hop: float = 2.7e-6
    tree_hop: float = 5.0e-6
    node_speed: float = 450e9
    network_speed: float = 400e9
    payload: float = 0.5

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / self.node_size)

    def seconds(self, collective: Collective, algorithm: str) -> float:
        """How long a collective takes.

        Args:
            collective: what is exchanged.
            algorithm: ``"ring"``, or ``"tree"``, which for ``all_gather`` is one that doubles what is known with each
                hop between nodes (NCCL has one from 2.23 on, not for every cluster).
        """
        gpus, nodes = self.gpus, self.nodes
        if gpus == 1:
            return 0.0
        reduces = collective.kind == "all_reduce"
        there_and_back = 2 if reduces else 1
        if algorithm == "ring":
            hops = (gpus - nodes) * self.node_hop + (nodes - 1) * self.ring_hop
        else:
            hops = (min(gpus, self.node_size) - 1) * self.node_hop + math.ceil(math.log2(nodes)) * self.tree_hop
        speed = self.payload * (min(self.network_speed, self.node_speed) if nodes > 1 else self.node_speed)
        if not reduces:
            moved = (gpus - 1) * collective.size
        else:
            moved = 2 * collective.size * ((gpus - 1) / gpus if algorithm == "ring" else 1)
        return self.start + there_and_back * hops + moved / speed


def sync_channels(model: nn.Module) -> list[int]:
    """The channels of each norm of a model that exchanges something in training."""
    kinds = SyncFilteredBatchNorm, nn.SyncBatchNorm
    return [module.num_features for module in model.modules() if isinstance(module, kinds)]


def step_seconds(norm: str, channels: Iterable[int], cluster: Cluster, algorithm: str) -> float:
    """Seconds of all exchanges of a training step, one after the other."""
    return sum(cluster.seconds(each, algorithm) for size in channels for each in collectives(norm, size))


def step_bytes(norm: str, channels: Sequence[int], gpus: int) -> int:
    """Bytes that a GPU receives in a training step: of ``all_gather`` those of all others, of ``all_reduce``, in a
    ring, twice its own but for a share."""
    exchanges = [each for size in channels for each in collectives(norm, size)]
    gathered = sum((gpus - 1) * each.size for each in exchanges if each.kind == "all_gather")
    return gathered + sum(2 * each.size * (gpus - 1) // gpus for each in exchanges if each.kind == "all_reduce")


def measured_step(results: Mapping[str, Any], model: str, batch: int, layout: str, dtype: str) -> float:
    """Seconds of a training step with FBN in results of ``tools/benchmark.py``: the median.

    Raises:
        ValueError: they have no such row.
    """
    wanted = {"model": model, "batch": batch, "layout": layout, "dtype": dtype}
    for row in results["models"]:
        if all(row[key] == value for key, value in wanted.items()):
            return row["peers"]["FBN T=5"]["ms"][1] / 1e3
    raise ValueError(f"the results have no step of {model} with {batch} images, {layout}, {dtype}")


def cost_table(channels: Sequence[int], step: float, clusters: Sequence[Cluster]) -> str:
    """What the norms of a model receive, and how long that takes, on each cluster, in Markdown.

    Args:
        channels: of each synchronized norm.
        step: seconds of a training step without exchanges.
        clusters: a row each.
    """
    head = [f"{norm} {what}" for norm in NORMS for what in ("MB", *(f"{each}, ms" for each in ALGORITHMS))]
    rows = [["GPUs", *head, *(f"SyncFBN {each}, % of step" for each in ALGORITHMS)]]
    for cluster in clusters:
        row, shares = [f"{cluster.gpus:,}"], []
        for norm in NORMS:
            seconds = [step_seconds(norm, channels, cluster, each) for each in ALGORITHMS]
            row += [
                f"{step_bytes(norm, channels, cluster.gpus) / 1e6:,.1f}",
                *(f"{1e3 * each:.1f}" for each in seconds),
            ]
            shares = [f"{100 * each / step:.0f}" for each in seconds]
        rows.append(row + shares)
    return format_table(rows)
