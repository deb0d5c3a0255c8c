"""Functional filtered normalization: see :mod:`fbn_plugin.ops.functional` and, over several processes,
:mod:`fbn_plugin.ops.sync`."""

from fbn_plugin.ops.dispatch import backends, explain
from fbn_plugin.ops.functional import filtered_batch_norm, filtered_batch_norm_act, filtered_group_norm
from fbn_plugin.ops.library import decompositions
from fbn_plugin.ops.sync import sync_filtered_batch_norm

__all__ = [
    "backends",
    "decompositions",
    "explain",
    "filtered_batch_norm",
    "filtered_batch_norm_act",
    "filtered_group_norm",
    "sync_filtered_batch_norm",
]
