"""What is timed: single layers and whole models, each with the peer that its time is compared to.

The naive form is filtered batch normalization as one writes it in PyTorch: Horváth and Al-afandi, "Filtered Batch
Normalization" (2020), Eq. 2-8.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fbn_plugin
from fbn_plugin.layers import FilteredBatchNorm2d, FilteredBatchNormAct2d, FilteredGroupNorm


def naive_filtered_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float,
    t_sigma: float,
) -> Tensor:  # fmt: skip
    """Filtered batch normalization as one writes it down from the paper (Eq. 2-8), differentiated by autograd."""
    dims = (0, 2, 3)
    values = x.float()
    with torch.no_grad():
        var, mean = torch.var_mean(values, dims, correction=0, keepdim=True)
        kept = (values - mean).abs() <= t_sigma * torch.sqrt(var + eps)
        count = kept.sum(dims, keepdim=True)
    mean = (values * kept).sum(dims, keepdim=True) / count
    var = ((values - mean).square() * kept).sum(dims, keepdim=True) / count
    with torch.no_grad():
        running_mean.lerp_(mean.flatten(), momentum)
        running_var.lerp_((var * count / (count - 1)).flatten(), momentum)
    y = (values - mean) / torch.sqrt(var + eps) * weight[:, None, None] + bias[:, None, None]
    return y.to(x.dtype)


class NaiveFilteredBatchNorm2d(nn.BatchNorm2d):
    """:func:`naive_filtered_batch_norm` in training."""

    t_sigma = 5.0

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return naive_filtered_batch_norm(
            input, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps, self.t_sigma
        )


def _relu_after(norm: nn.Module) -> nn.Module:
    return nn.Sequential(norm, nn.ReLU(inplace=True))


class AddReLU(nn.Module):
    """``relu(norm(x) + residual)`` by three modules, in place as the blocks of ResNet do it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y = self.norm(x)
        y += residual
        return self.relu(y)


@dataclass(frozen=True)
class Peer:
    """Something to time: ``build(channels)`` gives the module, ``to`` names the peer that its ratio is to.

    ``residual``: the module takes a second tensor of the input's shape.
    """

    name: str
    to: str
    build: Callable[[int], nn.Module]
    residual: bool = False


def _groups(channels: int) -> int:
    return math.gcd(32, channels)


def _native_group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(_groups(channels), channels)


def _filtered(t_sigma: float) -> Callable[[int], nn.Module]:
    return lambda channels: FilteredBatchNorm2d(channels, t_sigma=t_sigma)


def _filtered_act(t_sigma: float) -> Callable[[int], nn.Module]:
    return lambda channels: FilteredBatchNormAct2d(channels, t_sigma=t_sigma)


def _filtered_group(t_sigma: float) -> Callable[[int], nn.Module]:
    return lambda channels: FilteredGroupNorm(_groups(channels), channels, t_sigma=t_sigma)


BN, BN_RELU = Peer("BN", "BN", nn.BatchNorm2d), Peer("BN, ReLU", "BN, ReLU", lambda c: _relu_after(nn.BatchNorm2d(c)))
FBN, FUSED = Peer("FBN T=5", "BN", _filtered(5.0)), Peer("FBN+ReLU fused", "BN, ReLU", _filtered_act(5.0))
GROUP_NORMS = (
    Peer("GN", "BN", _native_group_norm),
    Peer("FGN T=2", "GN", _filtered_group(2.0)),
    Peer("FGN T=5", "GN", _filtered_group(5.0)),
)
LAYER_PEERS = (
    BN,
    Peer("FBN T=2", "BN", _filtered(2.0)),
    FBN,
    Peer("naive FBN", "BN", NaiveFilteredBatchNorm2d),
    BN_RELU,
    Peer("FBN, ReLU", "BN, ReLU", lambda channels: _relu_after(FilteredBatchNorm2d(channels))),
    FUSED,
    *GROUP_NORMS,
)
COMPILED = Peer("compiled naive FBN", "BN", lambda channels: torch.compile(NaiveFilteredBatchNorm2d(channels)))

# What the targets of a GPU compare.
TARGET_LAYER_PEERS = (
    BN,
    Peer("FBN T=2", "BN", _filtered(2.0)),
    FBN,
    Peer("FBN T=inf", "BN", _filtered(math.inf)),
    BN_RELU,
    Peer("FBN+ReLU fused T=2", "BN, ReLU", _filtered_act(2.0)),
    FUSED,
    Peer("BN, add, ReLU", "BN, add, ReLU", lambda channels: AddReLU(nn.BatchNorm2d(channels)), residual=True),
    Peer("FBN+add+ReLU fused T=2", "BN, add, ReLU", _filtered_act(2.0), residual=True),
    Peer("FBN+add+ReLU fused", "BN, add, ReLU", _filtered_act(5.0), residual=True),
    *GROUP_NORMS,
)
HOST_PEERS = (BN, FBN, BN_RELU, FUSED)


def _make_naive(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = NaiveFilteredBatchNorm2d  # the same parameters and buffers, another forward
    return model


def _make_filtered(model: nn.Module) -> nn.Module:
    return fbn_plugin.convert_norm(model, "FBN(t_sigma=5.0)")


# Name -> what makes it out of the model with BN.
MODEL_PEERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "BN": lambda model: model,
    "FBN T=5": _make_filtered,
    "FBN T=5 fused": lambda model: fbn_plugin.fuse_norm_act(_make_filtered(model)),
    "naive FBN": _make_naive,
}
TARGET_MODEL_PEERS = {name: MODEL_PEERS[name] for name in ("BN", "FBN T=5", "FBN T=5 fused")}
