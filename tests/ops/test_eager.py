"""The short way of eager calls: that it is the operator, that it leaves to the operator what the operator knows better,
and that it needs no private name of PyTorch."""

import importlib
import importlib.resources

import pytest
import torch
import torch.nn.functional as F
from forms import BOTH_FORMS, act_inputs, batch, norm
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fbn_plugin import FilteredBatchNormAct2d
from fbn_plugin.ops import (
    cuda,
    dispatch,
    eager,
    filtered_batch_norm,
    filtered_batch_norm_act,
    filtered_group_norm,
    functional,
    library,
    reference,
)
from fbn_plugin.ops.reference import ACTIVATIONS, Options, RunningStats


@pytest.mark.parametrize("num_groups", BOTH_FORMS)
def test_many_gradients_at_once(num_groups):
    x, weight, bias = batch((3, 4, 3, 3), dtype=torch.float32)
    x.requires_grad_()
    y = norm(x, weight, bias, num_groups, t_sigma=1.8)
    grads = torch.randn(2, *y.shape)
    (together,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
    for each, grad in zip(together, grads):
        torch.testing.assert_close(each, torch.autograd.grad(y, x, grad, retain_graph=True)[0])


@pytest.mark.parametrize("num_groups", BOTH_FORMS)
def test_the_default_device_does_not_matter(num_groups):
    x, weight, bias = (t.requires_grad_() for t in batch((3, 4, 3, 3), dtype=torch.float32))

    def gradients():
        return torch.autograd.grad(norm(x, weight, bias, num_groups, t_sigma=1.8).sin().sum(), [x, weight, bias])

    expected = gradients()
    with torch.device("meta"):
        got = gradients()
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("num_groups", BOTH_FORMS)
@pytest.mark.parametrize(
    "pack, unpack",
    [(torch.Tensor.double, lambda t: t), (lambda t: torch.stack([t, t], -1), lambda t: t[..., 0])],
    ids=["wider", "strided"],
)
def test_saved_tensors_may_come_back_in_another_form(num_groups, pack, unpack):
    x, weight, bias = (t.requires_grad_() for t in batch((3, 4, 3, 3), dtype=torch.float32))
    plain = norm(x, weight, bias, num_groups, t_sigma=1.8)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        hooked = norm(x, weight, bias, num_groups, t_sigma=1.8)
    expected, got = (torch.autograd.grad(y, [x, weight, bias], y.detach().sin()) for y in (plain, hooked))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("num_groups", BOTH_FORMS)
def test_values_that_are_not_what_lies_in_memory(num_groups):
    x, weight, bias = batch((3, 4, 3, 3), dtype=torch.float32)
    torch.testing.assert_close(norm(torch._neg_view(x), weight, bias, num_groups), norm(-x, weight, bias, num_groups))
    x.requires_grad_()
    y = norm(x, weight, bias, num_groups, t_sigma=1.8)
    grad = torch.randn_like(x)
    for lazy, plain in ((torch._neg_view(grad), -grad), (torch._efficientzerotensor(x.shape), torch.zeros(x.shape))):
        got, expected = (torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in (lazy, plain))
        torch.testing.assert_close(got, expected)


class _Watcher(TorchDispatchMode):
    """Notes the operators that it sees."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["exact", "paper"])
@pytest.mark.parametrize("num_groups", [0, 2])
def test_the_short_way_is_the_operator_that_a_mode_sees(num_groups, mode, dtype):
    x = (torch.randn(3, 4, 5, 7, dtype=dtype) * 3).requires_grad_()
    weight, bias = (torch.randn(4, dtype=dtype).requires_grad_() for _ in range(2))
    grad = torch.randn_like(x)

    def normalize():
        running = torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype)
        if num_groups:
            y = filtered_group_norm(x, num_groups, weight, bias, t_sigma=1.5, grad_mode=mode)
        else:
            y = filtered_batch_norm(x, *running, weight, bias, True, t_sigma=1.5, grad_mode=mode)
            assert all(each._version for each in running), "autograd is told of the new statistics"
        return [y, *running, *torch.autograd.grad(y, [x, weight, bias], grad)]

    direct = normalize()
    with _Watcher() as watcher:
        watched = normalize()
    expected = {"fbn_plugin::filtered_norm", "fbn_plugin::filtered_norm_backward"}
    assert expected <= watcher.seen
    for ours, theirs in zip(direct, watched):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_function_transforms_see_through_the_fused_layer(fused, monkeypatch):
    monkeypatch.setattr(functional, "_fuses", lambda *_: fused)
    x, weight, bias, residual = act_inputs()

    def loss(x, residual):
        y = filtered_batch_norm_act(x, weight=weight, bias=bias, training=True, t_sigma=2.0, residual=residual)
        return y.square().sum()

    gradients = torch.func.grad(loss, argnums=(0, 1))(x.detach(), residual.detach())
    torch.testing.assert_close(gradients, torch.autograd.grad(loss(x, residual), (x, residual)))


@pytest.mark.parametrize("activation, add", [("relu", False), ("relu", True), ("silu", True), ("identity", True)])
@pytest.mark.parametrize("kernels", [False, True])
def test_keeps_no_more_for_the_backward_pass_than_batch_norm_and_relu(activation, add, kernels, monkeypatch):
    monkeypatch.setattr(functional, "_fuses", lambda *_: True)
    if not kernels:
        monkeypatch.setitem(dispatch.BACKENDS, "cpu", reference)
    x, residual = (torch.randn(4, 8, 16, 16, requires_grad=True) for _ in range(2))
    residual = residual if add else None

    def kept(step):
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: storages.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}), lambda t: t
        ):
            y = step()  # alive, so that no address is taken twice
        return sum(n for n in storages.values() if n >= x.nbytes), y

    layers = FilteredBatchNormAct2d(8, activation=activation), nn.BatchNorm2d(8)
    fused, _ = kept(lambda: layers[0](x, residual))
    native, _ = kept(lambda: F.relu_(layers[1](x) if residual is None else layers[1](x).add_(residual)))
    assert fused <= native
    if activation == "identity" or not add:
        assert fused == x.nbytes, "the input alone, which the layer before has made anyway"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("num_groups", BOTH_FORMS)
def test_the_short_way_gives_the_bits_of_the_operator(num_groups, add, activation, dtype):
    x, _, _, residual = act_inputs(dtype, (4, 6, 5, 5))
    weight, bias = (torch.rand(6, requires_grad=True) for _ in range(2))
    residual = residual if add else None
    leaves = [t for t in (x, weight, bias, residual) if t is not None]
    options = Options(num_groups, 1.5, 1e-5, True, "exact", activation, 0.1)
    results = []
    for way in (eager.normalize, lambda *arguments: library.normalize(*arguments)[0]):
        wide = torch.promote_types(dtype, torch.float32)
        running = RunningStats(torch.zeros(6, dtype=wide), torch.ones(6, dtype=wide), None, torch.tensor(2))
        y = way(x, weight, bias, residual, None if num_groups else running, options)
        gradients = torch.autograd.grad(y, leaves, y.detach().sin())
        assert [g.dtype for g in gradients] == [t.dtype for t in leaves]
        assert running.num_batches == (2 if num_groups else 3)
        results.append(([y, *gradients], [running.mean, running.var]))
    (short, averages), (operator, expected) = results
    assert all(map(torch.equal, short, operator))
    torch.testing.assert_close(averages, expected, rtol=1e-6, atol=1e-6)  # kernels of their own, in some backends


@pytest.mark.parametrize("needs", [(False, True, False, False), (False, False, True, True), (True, False, False, True)])
@pytest.mark.parametrize("fused", [False, True])
def test_only_what_needs_a_gradient_gets_one(needs, fused, monkeypatch):
    monkeypatch.setattr(functional, "_fuses", lambda *_: fused)
    leaves = [t.detach().requires_grad_(need) for t, need in zip(act_inputs(torch.float32), needs)]
    x, weight, bias, residual = leaves
    filtered_batch_norm_act(x, weight=weight, bias=bias, training=True, residual=residual).sum().backward()
    assert tuple(t.grad is not None for t in leaves) == needs


class _Missing:
    """An attribute that is not there."""

    def __get__(self, *_):
        raise AttributeError


@pytest.fixture
def without(monkeypatch):
    """Imports the module anew where PyTorch lacks a name; only then, as PyTorch needs it itself."""

    def reload(name):
        *path, last = name.split(".")
        owner = torch
        for part in path:
            owner = getattr(owner, part)
        with monkeypatch.context() as patch:
            if isinstance(owner, type):
                patch.setattr(owner, last, _Missing(), raising=False)
            else:
                patch.delattr(owner, last, raising=False)
            assert not hasattr(owner, last)
            importlib.reload(eager)

    yield reload
    importlib.reload(eager)


@pytest.mark.parametrize("name", eager.PRIVATE)
@pytest.mark.parametrize("fused", [False, True])
def test_no_private_name_is_needed(name, fused, without, monkeypatch):
    monkeypatch.setattr(functional, "_fuses", lambda *_: fused)
    x, weight, bias, residual = act_inputs(torch.float32)
    leaves = x, weight, bias, residual

    def results():
        running = torch.zeros(3), torch.ones(3), torch.tensor(3)
        y = filtered_batch_norm_act(
            x, *running[:2], weight, bias, True, None, t_sigma=1.5, residual=residual, num_batches_tracked=running[2]
        )
        grouped = filtered_group_norm(x, 3, weight, bias, t_sigma=1.5)
        got = [y, grouped, *running, *torch.autograd.grad((y.sin() + grouped).sum(), leaves)]
        plain = filtered_batch_norm(x, weight=weight, bias=bias, training=True, t_sigma=1.5)
        got += torch.autograd.grad(plain, x, torch.stack([y, grouped]), is_grads_batched=True, retain_graph=True)
        (first,) = torch.autograd.grad(plain.square().sum(), x, create_graph=True)
        got.append(torch.autograd.grad(first.square().sum(), x)[0])

        def loss(x):
            return filtered_batch_norm(x, weight=weight, bias=bias, training=True, t_sigma=1.5).sin().sum()

        got.append(torch.func.grad(loss)(x.detach()))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
            got.append(torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent)
        got.append(torch.func.vmap(lambda x: filtered_group_norm(x, 1, t_sigma=1.5))(x.detach()[None]))
        for lazy in (torch._neg_view(x), torch._efficientzerotensor(x.shape)):
            got.append(filtered_batch_norm(lazy, weight=weight, bias=bias, training=True, t_sigma=1.5))
        return got

    expected = results()
    without(name)
    for ours, theirs in zip(results(), expected):
        torch.testing.assert_close(ours, theirs)
    with _Watcher() as watcher:
        y = filtered_batch_norm(x, training=True, t_sigma=1.5)
    assert "fbn_plugin::filtered_norm" in watcher.seen
    compiled = torch.compile(lambda x: filtered_batch_norm(x, training=True, t_sigma=1.5), backend="aot_eager")
    torch.testing.assert_close(compiled(x), y)


def test_no_other_file_asks_for_private_names():
    """Of ``torch._C``, that is."""
    package = importlib.resources.files("fbn_plugin")
    users = [file.name for file in package.rglob("*.py") if "torch._C" in file.read_text() and file.name != "eager.py"]
    assert not users


def test_stream_by_the_public_way(without, monkeypatch):
    class Stream:
        cuda_stream = 1234

    without("_C._cuda_getCurrentRawStream")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream() if device == 3 else None)
    assert cuda.driver.current_stream(3) == 1234
