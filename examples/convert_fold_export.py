"""From a trained BN model to FBN and on to a deployed network: convert, train, measure statistics, fold, export.

The model and the data are small and random. Run: python examples/convert_fold_export.py [model.onnx]
"""

import copy
import sys

import torch
from torch import nn
from torchvision.models import resnet18

import fbn_plugin


def main(path: str = "") -> nn.Module:
    torch.manual_seed(0)
    model = resnet18(num_classes=10)  # in your script: with your weights
    batches = [torch.randn(4, 3, 64, 64) for _ in range(4)]

    # 1. Convert. Weights and statistics stay, so the evaluation does too; the report says what was changed.
    report = fbn_plugin.NormReport()
    fbn_plugin.convert_norm(model, "FBN(t_sigma=4)", report=report)
    print(report)

    # 2. Train, here for one step.
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    nn.functional.cross_entropy(model(batches[0]), torch.arange(4)).backward()
    optimizer.step()

    # 3. Population statistics in place of running averages.
    fbn_plugin.update_population_stats(model, batches)
    model.eval()

    # 4. Hand it on as plain BN: the same outputs, PyTorch's own layers, for tools that look for them.
    plain = fbn_plugin.convert_norm(copy.deepcopy(model), "BN")

    # 5. Or fold every norm into the convolution before it.
    folded = fbn_plugin.fold_norms(copy.deepcopy(model))
    left = sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules())

    with torch.inference_mode():
        expected = model(batches[0])
        for name, other in (("plain BN", plain), ("folded", folded)):
            print(f"{name}: outputs differ by at most {(other(batches[0]) - expected).abs().max():.1e}")
    print(f"{left} norms left after folding")

    # 6. Export the folded model.
    if path:
        torch.onnx.export(folded, (batches[0],), path, dynamo=True)
        print(f"written: {path}")
    return folded


if __name__ == "__main__":
    main(*sys.argv[1:2])
