"""All registered norms, for tests that hold for every one of them: specs for eight channels, layers with parameters and
statistics that no fresh layer has, and inputs with outliers."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fbn_plugin import NORMS, get_norm

CHANNELS = 8
SPECS = [f"{name}(num_groups=4)" if name in ("GN", "FGN") else name for name, _ in NORMS]
ONE_SIZE = ("PerActivationBN",)  # all maps of a layer must be of the size of its first one
# Options that take other ways through the code.
OPTIONS = [
    "FBN(t_sigma=2)",
    "FBN(t_sigma=2, grad_mode='paper')",
    "FBN(t_sigma=2, gaussian_correction=True, momentum=None)",
    "FBN(t_sigma=inf)",
    "FBN(affine=False)",
    "FBN(bias=False, eps=1e-3)",
    "FBN(track_running_stats=False)",
    "FGN(num_groups=2, t_sigma=2, grad_mode='paper')",
    "FGN(num_groups=2, t_sigma=2, gaussian_correction=True, affine=False)",
    "FLN(t_sigma=1.5, grad_mode='paper')",
    "FFRN(tlu=True, t_sigma=2)",
    "IN(track_running_stats=True)",
    "LearnedNorm(affine=True)",
    "ScaledBN-A2(momentum=None)",
    "RBN(affine=False)",
]


def layers(spec: str) -> Iterator[tuple[nn.Module, Tensor]]:
    """The layer for 1, 2 and 3 spatial dimensions, as far as there is one, and an input for it."""
    for dims in (1, 2, 3):
        try:
            yield layer(spec, dims), data(3, *(5, 4, 3)[:dims])
        except ValueError as error:
            assert "no form for" in str(error)


def layer(spec: str, dims: int = 2) -> nn.Module:
    """The layer that ``spec`` names, with parameters and statistics at random."""
    torch.manual_seed(0)
    norm = get_norm(spec, CHANNELS, dims)
    with torch.no_grad():
        for tensor in (*norm.parameters(), *norm.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return norm


def data(images: int, *size: int, seed: int = 0) -> Tensor:
    """Normal values, ``(images, 8, *size)``, of which a few lie six times as far from zero."""
    x = torch.randn(images, CHANNELS, *size, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[::37] *= 6
    return x
