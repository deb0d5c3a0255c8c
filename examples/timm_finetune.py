"""Fine-tune a timm classifier with filtered batch normalization, from weights that were trained with BN.

Data are scikit-learn's digits, and the BN weights are made here, so that nothing is downloaded. In your script they are
``timm.create_model(name, pretrained=True, num_classes=...)``. Run: python examples/timm_finetune.py
"""

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fbn_plugin


def load_data() -> tuple[TensorDataset, TensorDataset]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = nn.functional.interpolate(images, scale_factor=4).expand(-1, 3, -1, -1)
    labels = torch.tensor(digits.target)
    return TensorDataset(images[:1000], labels[:1000]), TensorDataset(images[1000:1500], labels[1000:1500])


def train(model: nn.Module, data: TensorDataset, epochs: int, lr: float, batch_size: int) -> None:
    optimizer = create_optimizer_v2(model, opt="adamw", lr=lr, weight_decay=0.05)  # no decay on norms and biases
    for _ in range(epochs):
        model.train()
        for images, labels in DataLoader(data, batch_size, shuffle=True, drop_last=True):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.inference_mode()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    model.eval()
    hits = [(model(images).argmax(1) == labels).sum().item() for images, labels in DataLoader(data, 100)]
    return 100 * sum(hits) / len(data)


def main() -> float:
    torch.manual_seed(0)
    training, validation = load_data()
    model = timm.create_model("test_resnet", num_classes=10)
    train(model, training, epochs=2, lr=1e-2, batch_size=50)
    print(f"BN, as it comes:      {accuracy(model, validation):.1f} %")

    model = fbn_plugin.convert_norm(model, "FBN(t_sigma=4)")  # before the optimizer is made
    print(f"FBN, before training: {accuracy(model, validation):.1f} %")
    train(model, training, epochs=1, lr=2e-3, batch_size=4)  # small batches are what the filter is for
    fbn_plugin.update_population_stats(model.train(), DataLoader(training, 50))
    print(f"FBN, fine-tuned:      {(result := accuracy(model, validation)):.1f} %")
    return result


if __name__ == "__main__":
    main()
