"""Functional filtered normalization: see :mod:`fbn_plugin.ops.filtered_norm` and, over several processes,
:mod:`fbn_plugin.ops.sync`."""

from fbn_plugin.ops.filtered_norm import (
    backends,
    explain,
    filtered_batch_norm,
    filtered_batch_norm_act,
    filtered_group_norm,
)
from fbn_plugin.ops.sync import sync_filtered_batch_norm

__all__ = [
    "backends",
    "explain",
    "filtered_batch_norm",
    "filtered_batch_norm_act",
    "filtered_group_norm",
    "sync_filtered_batch_norm",
]
