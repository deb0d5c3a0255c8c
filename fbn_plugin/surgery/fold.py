"""Fold norms that are a fixed scale and shift in evaluation into the convolution or linear layer next to them: the same
outputs with one layer less. Source: Ioffe and Szegedy, "Batch Normalization" (2015), section 3.1, Algorithm 2, step 11.

Which layer is next to a norm is read from the model's own forward pass, traced by ``torch.fx``. What cannot be traced
is taken apart into the modules in it, and each of these is traced.
"""

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from fbn_plugin.adapters import load_adapters
from fbn_plugin.layers.description import (
    describe,
    eval_affine,
    evaluates_by_constants,
    family,
    has_hooks,
    has_known_forward,
    is_replaced,
)
from fbn_plugin.surgery.norm_report import NormChange, NormLeft, NormReport
from fbn_plugin.surgery.references import holders
from fbn_plugin.training.evaluation_modes import device_of
from fbn_plugin.training.population_statistics import forward_batch

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# The forward of a layer that can take a norm in, and the attributes that it applies to its output, if they are set.
_LAYERS: dict[Callable, tuple[str, ...]] = {cls.forward: () for cls in (nn.Linear, *_CONVS, *_TRANSPOSED)}


def register_layer(module_type: type[nn.Module], *then: str) -> None:
    """Teach :func:`fold_norms` a convolution or linear layer with a forward of its own.

    Args:
        module_type: a subclass of PyTorch's layer whose output is linear in ``weight`` and ``bias`` as that one's is.
        then: attributes that its forward applies to the output, in this order, where they are not None.
    """
    _LAYERS[module_type.forward] = then


def _why_not_norm(norm: nn.Module) -> str | None:
    description = describe(norm)
    if not evaluates_by_constants(norm):
        if description.evaluation == "image":
            return "in evaluation its scale depends on the image"
        if description.evaluation == "activation":
            return "in evaluation each position has a scale of its own"
        if has_known_forward(type(norm)):
            return "in evaluation it takes moments of its input"
        return "its evaluation is not known to be a scale and shift of each channel"
    if norm.training and description.family != "FrozenBN":
        return "it is in training mode"
    return "it has hooks or another forward" if has_hooks(norm) else None


def _why_not_layer(layer: nn.Module, scale: Tensor, before: bool) -> str | None:
    if is_parametrized(layer):
        return f"the {type(layer).__name__} beside it has a parametrization"
    width = "in" if before else "out"
    if len(scale) != getattr(layer, f"{width}_channels", getattr(layer, f"{width}_features", None)):
        return f"the {type(layer).__name__} beside it has other channels"
    return f"the {type(layer).__name__} beside it has hooks or another forward" if has_hooks(layer) else None


def _set(layer: nn.Module, weight: Tensor, bias: Tensor) -> str | None:
    """Give a layer its folded weight and bias; or tell why it was not done."""
    old = layer.weight
    weight, bias = weight.to(old), bias.to(old)
    if not (weight.isfinite().all() and bias.isfinite().all()):
        return f"with it the {type(layer).__name__} beside it would have weights that are not finite in {old.dtype}"
    layer.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
    layer.bias = nn.Parameter(bias, requires_grad=old.requires_grad)
    return None


def _bias(layer: nn.Module) -> Tensor | float:
    return 0.0 if layer.bias is None else layer.bias.detach().double()


def _over_groups(values: Tensor, groups: int, rows: int, dims: int) -> Tensor:
    """One value for each channel, as ``(rows, channels / groups, 1, ...)`` for a weight with ``rows`` channels of the
    other kind, those of a group together."""
    parts = values.reshape(groups, 1, -1).expand(-1, rows // groups, -1)
    return parts.reshape(rows, -1, *[1] * (dims - 2))


def _fold_after(layer: nn.Module, scale: Tensor, shift: Tensor) -> str | None:
    weight = layer.weight.detach().double()
    if isinstance(layer, _ConvTransposeNd):
        factor = _over_groups(scale, layer.groups, layer.in_channels, weight.dim())
    else:
        factor = scale.reshape(-1, *[1] * (weight.dim() - 1))
    return _set(layer, weight * factor, _bias(layer) * scale + shift)


def _fold_before(layer: nn.Module, scale: Tensor, shift: Tensor) -> str | None:
    weight = layer.weight.detach().double()
    groups = getattr(layer, "groups", 1)
    scale, shift = (_over_groups(values, groups, len(weight), weight.dim()) for values in (scale, shift))
    return _set(layer, weight * scale, _bias(layer) + (weight * shift).flatten(1).sum(1))


def _no_zeros_around(layer: nn.Module) -> bool:
    """Whether each output is a sum over values of the input alone, so that a shift can move through the layer."""
    if type(layer).forward is nn.Linear.forward:
        return True
    if type(layer).forward not in [cls.forward for cls in _CONVS]:
        return False
    return layer.padding_mode != "zeros" or layer.padding == "valid" or set(layer.padding) == {0}


class _Tracer(fx.Tracer):
    """Stops at norms, at layers that can take one in, at modules with hooks, and at types that tracing failed in."""

    def __init__(self, opaque: set[type[nn.Module]]) -> None:
        super().__init__()
        self.opaque = opaque
        self.failed: nn.Module | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        stop = type(m) in self.opaque or type(m).forward in _LAYERS or family(m) is not None or has_hooks(m)
        return stop or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m, forward, args, kwargs):
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or m  # the innermost
            raise


def _memory(model: nn.Module) -> dict[nn.Module, dict]:
    """What plain values the modules hold, to tell those that behave otherwise at their next call."""
    plain = (int, float, str, type(None))
    return {m: {key: value for key, value in vars(m).items() if isinstance(value, plain)} for m in model.modules()}


def _graphs(model: nn.Module) -> Iterator[tuple[nn.Module, fx.Graph]]:
    """Graphs of ``model``, or of the largest modules in it that can be traced."""
    opaque: set[type[nn.Module]] = set()
    waiting, done = [model], set()
    while waiting:
        root = waiting.pop(0)
        if root in done or family(root) is not None or type(root).forward in _LAYERS:
            continue
        if is_replaced(root):  # what is traced is that of the class
            done.add(root)
            waiting.extend(root.children())
            continue
        tracer, before = _Tracer(opaque), _memory(root)
        try:
            defaults = {
                name: p.default
                for name, p in inspect.signature(root.forward).parameters.items()
                if p.default is not p.empty
            }
            graph, failed = tracer.trace(root, defaults), None
        except Exception:  # code of any model, run on what are no tensors, fails in any way
            graph, failed = None, tracer.failed or root
        else:
            after = _memory(root)
            failed = next((module for module in before if before[module] != after[module]), None)
        if failed is None:
            yield root, graph
        elif failed is not root:
            opaque.add(type(failed))
            waiting.insert(0, root)
            continue
        done.add(root)
        inner = root.children() if failed is root else (m for m in root.modules() if type(m) in opaque or has_hooks(m))
        waiting.extend(inner)


def _twin(model: nn.Module) -> nn.Module:
    """A copy that shares the parameters, to run the model's code in, which may count calls or the like. Buffers are
    small."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


@torch.no_grad()
def _ranks(model: nn.Module, example: Any) -> dict[nn.Module, set[int]]:
    """How many dimensions the input of each module of ``model`` has, in a call with an example."""
    twin, ranks = _twin(model), defaultdict(set)
    for module, own in zip(twin.modules(), model.modules()):

        def note(_: nn.Module, args: tuple, seen: set[int] = ranks[own]) -> None:
            seen.update(each.dim() for each in args[:1] if isinstance(each, Tensor))

        module.register_forward_pre_hook(note)
    forward_batch(twin, example, device_of(model))
    return ranks


_FLATTEN = (torch.flatten, "flatten")
# Functions, methods and modules whose output has the dimensions of their input.
_SAME_RANK = (
    torch.relu,
    torch.sigmoid,
    torch.tanh,
    *(getattr(F, name) for name in ("relu", "gelu", "silu", "dropout")),
)
_SAME_RANK = (*_SAME_RANK, "relu", "relu_", "sigmoid", "tanh", "contiguous", "float")
_SAME_RANK_MODULES = tuple(f"torch.nn.modules.{name}" for name in ("activation", "dropout", "pooling"))


class _Calls:
    """Which nodes call which module, in all graphs of a model; the modules are those of ``model`` itself."""

    def __init__(self, model: nn.Module, example: Any = None) -> None:
        self.ranks = {} if example is None else _ranks(model, example)
        twin = _twin(model)
        original = dict(zip(twin.modules(), model.modules()))
        self.nodes: dict[nn.Module, list[fx.Node]] = defaultdict(list)
        self.module: dict[fx.Node, nn.Module] = {}
        self.read: set[int] = set()  # parameters that are used by others than their module
        self.graphs = []  # nodes do not keep their graph alive
        for root, graph in _graphs(twin):
            self.graphs.append(graph)
            for node in graph.nodes:
                if node.op == "call_module":
                    module = self.module[node] = original[root.get_submodule(node.target)]
                    self.nodes[module].append(node)
                elif node.op == "get_attr":
                    owner, _, name = node.target.rpartition(".")
                    self.read.add(id(getattr(root.get_submodule(owner), name)))

    def read_elsewhere(self, module: nn.Module) -> bool:
        return any(id(p) in self.read for p in module.parameters(recurse=False))

    def rank(self, node: Any) -> int | None:
        """How many dimensions the output of a node has, as far as the graph tells; a convolution's is a batch."""
        if not isinstance(node, fx.Node) or not node.args:
            return None
        module = self.module.get(node)
        if isinstance(module, _ConvNd):
            return module.weight.dim()
        if isinstance(module, nn.Flatten):
            return 2 if (module.start_dim, module.end_dim) == (1, -1) else None
        if module is None and node.target in _FLATTEN:
            start, end = (*node.args[1:], *node.kwargs.values(), -1)[:2]
            return 2 if (start, end) == (1, -1) else None
        if module is None and node.target in ("view", "reshape"):
            sizes = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
            return 2 if len(sizes) == 2 else None
        if module is None:
            return self.rank(node.args[0]) if node.target in _SAME_RANK else None
        same = type(module).forward is nn.Linear.forward or family(module) is not None
        same = same or type(module) is nn.Identity or type(module).__module__ in _SAME_RANK_MODULES
        return self.rank(node.args[0]) if same else None

    def why_other_axis(self, norm: nn.Module, layer: nn.Module) -> str | None:
        """Why the channels of a norm are not, or may not be, those of the layer beside it."""
        dims, kind, is_conv = describe(norm).dims, type(layer).__name__, isinstance(layer, _ConvNd)
        rank = layer.weight.dim()  # of a batch (N, C, ...), whose channels are the second dimension to both
        if dims not in (None, rank - 2 if is_conv else 1) or (not is_conv and family(norm) == "IN"):
            return f"the {kind} beside it has channels in another place"
        seen = self.ranks.get(norm) or {self.rank(node.args[0]) for node in self.nodes[norm]}
        if seen == {rank} or (is_conv and None in seen):
            return None
        if None in seen:
            return f"whether the {kind} beside it works on (N, C) is not known: give an example input"
        return f"the {kind} beside it has channels in another place, as an input has {max(seen - {rank})} dimensions"

    def layer_before(self, norm: nn.Module) -> nn.Module | str:
        """The layer whose every output goes to ``norm`` and nowhere else; or why there is none."""
        inputs = [node.args[0] if node.args else None for node in self.nodes[norm]]
        feeding = {self.module.get(node) for node in inputs}
        layer = feeding.pop() if len(feeding) == 1 else None
        if layer is None or type(layer).forward not in _LAYERS:
            return "it follows no convolution or linear layer"
        if any(getattr(layer, name) is not None for name in _LAYERS[type(layer).forward]):
            return f"the {type(layer).__name__} before it has a norm or activation of its own"
        if set(self.nodes[layer]) != set(inputs) or any(len(node.users) != 1 for node in inputs):
            return f"the output of the {type(layer).__name__} before it is used elsewhere too"
        return layer

    def layer_behind(self, norm: nn.Module) -> nn.Module | None:
        """The layer that gets every output of ``norm`` and nothing else, nor does anything else get these."""
        users = [user for node in self.nodes[norm] for user in node.users]
        layers = {self.module.get(user) for user in users}
        layer = layers.pop() if len(layers) == 1 else None
        alone = all(len(node.users) == 1 for node in self.nodes[norm]) and set(self.nodes.get(layer, ())) == set(users)
        return layer if alone and type(layer).forward in _LAYERS else None

    def skip(self, norm: nn.Module) -> None:
        """Go on as if ``norm`` were not there."""
        for node in self.nodes.pop(norm):
            node.replace_all_uses_with(node.args[0])
            node.graph.erase_node(node)


def fold_norms(model: nn.Module, *, example: Any = None, report: NormReport | None = None) -> nn.Module:
    """Fold the norms of a trained model into its convolutions and linear layers, for inference.

    A batch norm (plain, filtered, synchronized, frozen, or any norm with ``eval_affine()``) is in evaluation ``scale *
    x + shift``, which goes into weight and bias of the convolution, transposed convolution or linear layer before it;
    or behind it, where no zero padding stands in the way. In place of the norm stands an identity, or the activation if
    the norm held one, so all other modules keep their names. Outputs agree to the rounding of the weights' precision.

    A norm is left where that would not be exact: another operation also uses the layer's output, one of the two is used
    in other places too, either has hooks or another forward than its class, the norm is also in a plain list or the
    like of a module, or the layer's weight is parametrized. Norms that take moments of their input in evaluation are
    left as well: GN, LN, IN, and batch norms without running statistics.

    The model's forward pass is traced with symbolic inputs and the defaults of its optional arguments. In a model that
    cannot be traced as a whole, a module that can is taken to be called as a whole: if code outside of it calls a
    convolution in it on its own, do not fold it. A convolution is taken to work on a batch ``(N, C, ...)``. A linear
    layer has its channels in the last dimension and a batch norm in the second, which are the same one on ``(N, C)``
    only: where the trace does not show that, as a ``flatten(1)`` before does, an example has to, or the norm is left.

    Args:
        model: in evaluation mode; changed in place and no longer fit for training. Use ``copy.deepcopy`` to keep it.
        example: the model's input, or a tuple that begins with it, to see of how many dimensions each norm's input is.
        report: is filled with what was folded and what was left; print it.

    Returns:
        ``model``.

    Raises:
        ValueError: the model is in training mode, or has a lazy module that was never run.

    Examples::

        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), fbn_plugin.FilteredBatchNorm2d(8), nn.ReLU()).eval()
        >>> x = torch.randn(2, 3, 16, 16)
        >>> before = model(x)
        >>> [type(module).__name__ for module in fbn_plugin.fold_norms(model)]
        ['Conv2d', 'Identity', 'ReLU']
        >>> torch.allclose(model(x), before, atol=1e-5)
        True
    """
    if model.training:
        raise ValueError("fold_norms takes a model in evaluation mode, got one in training mode: call model.eval()")
    lazy = [name for name, module in model.named_modules() if isinstance(module, nn.modules.lazy.LazyModuleMixin)]
    if lazy:
        raise ValueError(f"{lazy[0]!r} does not know its channels yet: run the model once, then fold")
    load_adapters()
    report = NormReport() if report is None else report
    calls = _Calls(model, example)
    names = {module: name for name, module in model.named_modules()}
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
    for parent in names:
        for name, child in parent._modules.items():
            places[child].append((parent, name))

    norms = [module for module in names if family(module) is not None]
    held = {norm: holders(model, [norm]) for norm in norms} if holders(model, norms) else {}
    for norm in norms:
        layer = f"{held[norm][0]!r} holds it too" if held.get(norm) else _fold(norm, places[norm], calls)
        if isinstance(layer, str):
            report.left.append(NormLeft(names[norm], type(norm).__name__, layer))
        else:
            report.changed.append(NormChange(names[norm], type(norm).__name__, f"part of {type(layer).__name__}"))
    return model


def _fold(norm: nn.Module, places: list[tuple[nn.Module, str]], calls: _Calls) -> nn.Module | str:
    """Fold one norm; returns the layer that it is in now, or why it was left."""
    if reason := _why_not_norm(norm):
        return reason
    scale, shift = eval_affine(norm)
    rest = describe(norm).rest
    replacement = nn.Identity() if rest is None else rest(norm)
    holder = places[0][0] if len(places) == 1 else None
    before = False
    inside = holder is not None and (*_LAYERS.get(type(holder).forward, ()), None)[0] == places[0][1]
    if inside:
        layer = holder
    elif not calls.nodes.get(norm):
        return "it is not called where the model can be traced"
    elif any(len(node.args) != 1 or node.kwargs for node in calls.nodes[norm]):
        return "it is called with more than its input"
    else:
        layer = calls.layer_before(norm)
        if isinstance(layer, str) and isinstance(replacement, nn.Identity):
            behind = calls.layer_behind(norm)
            if behind is not None and _no_zeros_around(behind):
                layer, before = behind, True
        if isinstance(layer, str):
            return layer
        if reason := calls.why_other_axis(norm, layer):
            return reason
    if calls.read_elsewhere(layer) or calls.read_elsewhere(norm):
        return f"its weight or that of the {type(layer).__name__} beside it is used elsewhere too"
    if not inside and (reason := _why_not_layer(layer, scale, before)):
        return reason
    with torch.no_grad():
        if reason := (_fold_before if before else _fold_after)(layer, scale, shift):
            return reason
    if inside:
        setattr(holder, places[0][1], None if isinstance(replacement, nn.Identity) else replacement)
        return layer
    for parent, name in places:
        setattr(parent, name, replacement)
    if isinstance(replacement, nn.Identity):
        calls.skip(norm)
    return layer
