"""What a measurement leaves as it was."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["buffers_kept"]


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put the values of a model's buffers, such as running statistics, back behind a block.

    Examples::

        >>> from fbn_plugin.analysis.state import buffers_kept
        >>> norm = fbn_plugin.FilteredBatchNorm1d(1)
        >>> with buffers_kept(norm):
        ...     _ = norm(torch.tensor([[1.0], [3.0]]))
        ...     norm.running_mean
        tensor([0.2000])
        >>> norm.running_mean
        tensor([0.])
    """
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
