"""``torch.fx``: norms are nodes of the graph, as PyTorch's own are, without anything being registered."""

import copy
import pickle

import pytest
import torch
from every_norm import CHANNELS, OPTIONS, SPECS, data, layer
from torch import nn

from fbn_plugin import FilteredBatchNorm2d, FilteredBatchNormAct2d, FilteredGroupNorm


class Block(nn.Module):
    """A norm that is called twice, by name and by place, and one in a container."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm
        self.rest = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), copy.deepcopy(norm))

    def forward(self, x):
        return self.rest(self.norm(x)) + self.norm(input=x).relu()


def nodes(graph):
    return [(node.op, str(node.target), node.name) for node in graph.nodes]


@pytest.mark.parametrize("spec", SPECS + OPTIONS)
def test_a_graph_shows_it_as_batch_norm(spec):
    norm, x = layer(spec), data(3, 5, 4)
    if spec == "SyncBN":
        norm.eval()
    model = Block(norm)
    traced = torch.fx.symbolic_trace(model)
    assert nodes(traced.graph) == nodes(torch.fx.symbolic_trace(Block(nn.BatchNorm2d(CHANNELS))).graph)
    if norm.training:
        expected, grads = copy.deepcopy(model), []
        for module in (expected, traced):
            module.zero_grad()
            module(x).square().sum().backward()
            grads.append([p.grad for p in module.parameters()])
        torch.testing.assert_close(*grads)
        torch.testing.assert_close(list(traced.buffers()), list(expected.buffers()))
    torch.testing.assert_close(traced.eval()(x), model.eval()(x))


def test_a_graph_can_be_copied_stored_and_traced_again():
    traced, x = torch.fx.symbolic_trace(Block(FilteredBatchNorm2d(CHANNELS, t_sigma=2))), data(3, 5, 4)
    for again in (copy.deepcopy(traced), pickle.loads(pickle.dumps(traced)), torch.fx.symbolic_trace(traced)):
        assert nodes(again.graph) == nodes(traced.graph)
        assert isinstance(again.norm, FilteredBatchNorm2d)
        torch.testing.assert_close(again.eval()(x), traced.eval()(x))
    torch.testing.assert_close(torch.jit.script(traced)(x), traced(x))
    assert nodes(torch.fx.Transformer(traced).transform().graph) == nodes(traced.graph)


class Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = FilteredBatchNormAct2d(CHANNELS)

    def forward(self, x, y):
        return self.norm(self.norm(x, y), residual=x)


def test_a_residual_is_an_argument_of_the_node():
    model, x, y = Shortcut().eval(), data(3, 5, 4), data(3, 5, 4, seed=1)
    traced = torch.fx.symbolic_trace(model)
    assert [len(node.args) for node in traced.graph.nodes if node.op == "call_module"] == [2, 2]
    torch.testing.assert_close(traced(x, y), model(x, y))


class OneOfOnesOwn(FilteredBatchNorm2d):
    pass


def test_a_subclass_is_a_node_too():
    traced = torch.fx.symbolic_trace(nn.Sequential(OneOfOnesOwn(CHANNELS)))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]


@pytest.mark.parametrize("norm", [FilteredBatchNorm2d(8), FilteredGroupNorm(2, 8)])
def test_a_norm_alone_is_refused(norm):
    with pytest.raises(ValueError, match=f"put the {type(norm).__name__} into a model"):
        torch.fx.symbolic_trace(norm)
