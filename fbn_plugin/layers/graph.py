"""How ``torch.fx`` and TorchScript see the norms.

A tracer of ``torch.fx`` looks into every module that is not in ``torch.nn``, and calls its ``forward`` with a ``Proxy``
in the place of each tensor. A norm that is given one enters its own call into the graph, which so shows a norm as one
node, as it shows PyTorch's own. TorchScript compiles the source of ``forward``; where ``is_scripting()`` decides, it
looks at its own branch alone.
"""

import types
from collections.abc import Callable

from torch import nn
from torch.fx import Proxy

__all__ = ["Proxy", "call_node", "renamed"]


def call_node(norm: nn.Module, *inputs) -> Proxy:
    """A node that calls ``norm``, in the graph that is being traced.

    Args:
        norm: a submodule of what is traced.
        *inputs: those of its ``forward``, the first of them a ``Proxy``.

    Raises:
        ValueError: ``norm`` is itself what is traced.
    """
    tracer = inputs[0].tracer
    path = tracer.path_of_module(norm)
    if not path:
        raise ValueError(
            f"torch.fx traces what calls a norm, not a norm: put the {type(norm).__name__} into a model, such as "
            "nn.Sequential(norm)"
        )
    return tracer.create_proxy("call_module", path, inputs, {})


def renamed(forward: Callable, name: str) -> Callable:
    """A copy of a method under another name, for a class that overrides it: TorchScript compiles a call of it, but no
    ``super()``."""
    copy = types.FunctionType(forward.__code__, forward.__globals__, name, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__, copy.__annotations__ = forward.__kwdefaults__, forward.__annotations__
    return copy
