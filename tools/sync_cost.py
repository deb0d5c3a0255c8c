"""What synchronized batch norms (SyncBN, SyncFBN) exchange in a training step of ResNet-50 and of Mask R-CNN X-101, and
how long that takes by a model of latency and bandwidth, against measured steps of one GPU.

    python tools/sync_cost.py
    python tools/sync_cost.py --gpus 4 8 16 --node-size 4 --network-speed 25

The norms and their channels are counted in the models. The times are a model's, not measured ones: what NCCL needs for
small messages by its own constants, on nodes of eight GPUs with NVLink 4 and an adapter of InfiniBand NDR for each.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import interruption  # noqa: F401
import torch

from fbn_plugin import convert_sync
from fbn_plugin.engine.benchmark import load
from fbn_plugin.engine.benchmark.communication import Cluster, cost_table, measured_step, sync_channels
from fbn_plugin.engine.run.cli import stoppable, user_errors

ROOT = Path(__file__).parents[1]
DETECTOR = ROOT / "configs" / "COCO-InstanceSegmentation" / "mask_rcnn_X_101_32x8d_FPN_SyncFBN.yaml"

# Option -> field of Cluster, its unit, and what the option's number is multiplied by.
OPTIONS = {
    "--start": ("start", "µs until the first message of a collective", 1e-6),
    "--node-hop": ("node_hop", "µs between two GPUs of a node", 1e-6),
    "--ring-hop": ("ring_hop", "µs between two nodes in a ring", 1e-6),
    "--tree-hop": ("tree_hop", "µs between two nodes in a tree", 1e-6),
    "--node-speed": ("node_speed", "GB/s of a GPU in its node, one way", 1e9),
    "--network-speed": ("network_speed", "GB/s of all adapters of a node, one way", 1e9),
    "--payload": ("payload", "share of these speeds that is left for numbers", 1.0),
}


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def number_of_gpus(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return int(text)


def models() -> dict[str, list[int]]:
    """Title -> channels of each norm that is synchronized; the models have no memory."""
    from torchvision.models import resnet50

    from fbn_plugin.engine.torchvision.config import load_detection_config
    from fbn_plugin.engine.torchvision.model import build_model

    with torch.device("meta"):
        built = {
            "ResNet-50": convert_sync(resnet50()),
            "Mask R-CNN X-101-32x8d FPN": build_model(load_detection_config(DETECTOR)),
        }
    return {title: sync_channels(model) for title, model in built.items()}


@stoppable()
def main(argv: Sequence[str] | None = None) -> str:
    """Run the command line; return the text that it prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpus = [8 * 2**power for power in range(8)]
    parser.add_argument("--gpus", type=number_of_gpus, nargs="+", default=gpus, metavar="N", help="a row for each")
    parser.add_argument("--node-size", type=number_of_gpus, default=Cluster.node_size, help="GPUs of a node")
    for option, (name, unit, scale) in OPTIONS.items():
        default = getattr(Cluster, name) / scale
        parser.add_argument(option, dest=name, type=positive, default=default, help=f"{unit} (default: {default:g})")
    parser.add_argument("--steps", type=Path, default=ROOT / "benchmarks" / "gpu.json", help="results of benchmark.py")
    args = parser.parse_args(argv)
    with user_errors():
        results = load(args.steps)
        steps = {
            "ResNet-50": ("64 images, bfloat16", ("resnet50", 64, "channels_last", "bfloat16")),
            "Mask R-CNN X-101-32x8d FPN": (
                "2 images, float16",
                ("mask_rcnn_X_101_32x8d_FPN", 2, "contiguous", "float16"),
            ),
        }
        measured = {title: measured_step(results, *row) for title, (_, row) in steps.items()}
        counted = models()
    options = {name: getattr(args, name) * scale for name, _, scale in OPTIONS.values()}
    clusters = [Cluster(number, args.node_size, **options) for number in args.gpus]
    parts = []
    for title, channels in counted.items():
        parts.append(
            f"{title}: {len(channels)} synchronized norms, {sum(channels):,} channels; "
            f"a step of {1e3 * measured[title]:.1f} ms on one {results['environment']['gpu']} ({steps[title][0]})"
        )
        parts.append(cost_table(channels, measured[title], clusters))
    text = "\n\n".join(parts)
    print(text)
    return text


if __name__ == "__main__":
    main()
