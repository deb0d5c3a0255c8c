"""Every norm wherever nn.BatchNorm2d works: torch.func, forward mode, second derivatives, checkpoints, copies, graphs.

The oracle is a second way to the same numbers: each model alone, the other mode of differentiation, finite differences,
float64.
"""

import copy
import io
import pickle

import pytest
import torch
from every_norm import ONE_SIZE
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from fbn_plugin import NORMS, FilteredBatchNormAct2d, norm_factory
from fbn_plugin.layers.filtered_batch_norm import FilterMixin

# PyTorch's SyncBN is for GPUs. Norms for maps of one size have a test of their own.
NAMES = [name for name, _ in NORMS if name not in ("SyncBN", *ONE_SIZE)]


def build(name, **options):
    groups = {"num_groups": 2} if name in ("GN", "FGN") else {}
    return norm_factory(name)(4, **groups, **options)


OF_A_BATCH = [name for name in NAMES if isinstance(build(name), nn.BatchNorm2d)]
OURS = [name for name in OF_A_BATCH if name != "BN"]


def make(name, seed=0, **options):
    """A norm of four channels whose parameters and statistics are no constants, its filter at work."""
    torch.manual_seed(seed)
    norm = build(name, **options)
    if isinstance(norm, FilterMixin):
        norm.t_sigma = 1.5
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            tensor.data.add_(torch.rand_like(tensor) / 2)
    return norm


def images(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1
    x.flatten()[::17] *= 6
    return x.to(dtype)


def state(norm):
    """Parameters and buffers, copied, for functional_call."""
    return [{n: t.detach().clone() for n, t in named} for named in (norm.named_parameters(), norm.named_buffers())]


def step(norm, x):
    """Output and gradients of the parameters."""
    y = norm(x)
    names = [name for name, _ in norm.named_parameters()]
    leaves = list(norm.parameters())
    found = torch.autograd.grad(y.sin().sum(), leaves, allow_unused=True) if leaves else ()
    return y.detach(), {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, leaves, found)}


def close(got, expected, **how):
    assert set(got) == set(expected)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], msg=lambda m, name=name: f"{name}: {m}", **how)


# --- torch.func -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", NAMES)
def test_an_ensemble_is_its_models(name, momentum):
    """vmap over stacked parameters, buffers and counters: outputs, gradients and statistics of several steps, and then
    the evaluation."""
    if momentum is None and name not in OURS:
        pytest.skip("no cumulative average, or PyTorch's, which reads a number")
    options = {"momentum": None} if momentum is None else {}
    models = [make(name, seed, **options) for seed in range(3)]
    stacked, buffers = stack_module_state(models)
    stacked = {n: t.detach() for n, t in stacked.items()}
    inputs = images(3, 6, 4, 5, 5)

    def loss(parameters, buffers, x):
        y = functional_call(models[0], (parameters, buffers), (x,))
        return y.sin().sum(), y

    for x, in_dims in ((inputs, 0), (inputs[0], None)):  # a batch for each, and one for all
        gradients, y = vmap(grad(loss, has_aux=True), (0, 0, in_dims), randomness="different")(stacked, buffers, x)
        alone = [step(model, x if in_dims is None else x[i]) for i, model in enumerate(models)]
        torch.testing.assert_close(y, torch.stack([each for each, _ in alone]), rtol=1e-4, atol=1e-5)
        close(gradients, {n: torch.stack([g[n] for _, g in alone]) for n in gradients}, rtol=1e-3, atol=1e-4)
        close(buffers, {n: torch.stack([m.state_dict()[n] for m in models]) for n in buffers}, rtol=1e-4, atol=1e-5)
    for model in models:
        model.eval()
    evaluate = vmap(lambda p, b, x: functional_call(models[0], (p, b), (x,)), (0, 0, None))
    expected = torch.stack([model(inputs[0]) for model in models])
    torch.testing.assert_close(evaluate(stacked, buffers, inputs[0]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_each_sample(name):
    """Where batch normalization permits it: without running statistics in training, and in evaluation."""
    norm = make(name, **({"track_running_stats": False} if name in OF_A_BATCH else {}))
    x = images(3, 4, 5, 5)
    parameters, buffers = state(norm)

    def loss(parameters, image):
        return functional_call(norm, (parameters, buffers), (image[None],)).sin().sum()

    got = vmap(grad(loss), (None, 0))(parameters, x)
    alone = [step(norm, image[None])[1] for image in x]
    close(got, {n: torch.stack([g[n] for g in alone]) for n in got}, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", OURS)
def test_statistics_that_many_samples_would_write(name):
    """They are one model's, and no sample's: refused, as batch normalization does."""
    norm = make(name)
    parameters, buffers = state(norm)
    if norm.description.family != "BN":
        pytest.skip("frozen")
    with pytest.raises(RuntimeError, match="in-? ?place"):
        vmap(lambda image: functional_call(norm, (parameters, buffers), (image[None],)))(images(3, 4, 5, 5))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_reverse_and_forward_mode_agree(name, training):
    """Buffers as arguments, which end as after a call alone."""
    norm = make(name).double().train(training)
    x, tangent = images(2, 4, 3, 2, dtype=torch.float64), images(2, 4, 3, 2, seed=1, dtype=torch.float64)
    parameters, buffers = state(norm)

    def call(parameters, buffers, x):
        return functional_call(norm, (parameters, buffers), (x,)).sin()

    fresh = {n: t.clone() for n, t in buffers.items()}
    gradients = grad(lambda *a: call(*a).sum())(parameters, fresh, x)
    close(gradients, step(norm, x)[1])
    close(fresh, dict(norm.named_buffers()))
    norm.load_state_dict({**parameters, **buffers})
    leaf = x.clone().requires_grad_()
    y = norm(leaf).sin()

    def of_x(x):
        return call(parameters, {n: t.clone() for n, t in buffers.items()}, x)

    (dx,) = torch.autograd.grad(y, leaf, tangent)
    torch.testing.assert_close(vjp(of_x, x)[1](tangent)[0], dx)
    jacobian = jacrev(of_x)(x)
    torch.testing.assert_close(jacfwd(of_x)(x), jacobian)
    ahead, behind = (of_x(x + s * tangent) for s in (1e-6, -1e-6))
    forward = jvp(of_x, (x,), (tangent,))[1]
    torch.testing.assert_close(forward, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(forward, torch.tensordot(jacobian, tangent, 4))


@pytest.mark.parametrize("name", [name for name in NAMES if "BN" in name])
def test_captured_buffers_are_updated(name):
    """By transforms that refuse a write into a tensor which is no argument of theirs; PyTorch's own norm counts its
    batches by such a one."""
    if name in ("BN", "FrozenBN") or not isinstance(make(name), FilterMixin):
        pytest.skip("PyTorch's, or no write")
    norm, twin = make(name), make(name)
    x = images(4, 4, 3, 3)
    parameters, buffers = state(norm)

    def loss(parameters):
        return functional_call(norm, (parameters, buffers), (x,)).sin().sum()

    gradients = grad(loss)(parameters)
    close(gradients, step(twin, x)[1])
    close(buffers, dict(twin.named_buffers()))
    jvp(loss, (parameters,), (parameters,))
    twin(x)
    close(buffers, dict(twin.named_buffers()))


@pytest.mark.parametrize("name", NAMES)
def test_hessian(name):
    norm = make(name).double()
    parameters, buffers = state(norm)
    x = images(2, 4, 2, 1, dtype=torch.float64)

    def loss(x):
        fresh = {n: t.clone() for n, t in buffers.items()}
        return functional_call(norm, (parameters, fresh), (x,)).sin().sum()

    got = hessian(loss)(x)
    torch.testing.assert_close(got, got.permute(4, 5, 6, 7, 0, 1, 2, 3))
    torch.testing.assert_close(got, torch.autograd.functional.hessian(loss, x))


# --- autograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*NAMES, "act"])
def test_derivatives_of_both_orders_in_both_modes(name, training):
    norm = make(name) if name != "act" else FilteredBatchNormAct2d(4, activation="silu", t_sigma=1.5)
    norm = norm.double().train(training)
    names = [n for n, _ in norm.named_parameters()]
    x = images(2, 4, 3, 2, dtype=torch.float64).requires_grad_()

    def call(x, *parameters):
        return functional_call(norm, dict(zip(names, parameters)), (x,))

    leaves = (x, *(p.detach().requires_grad_() for p in norm.parameters()))
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_penalty(name):
    """A float32 batch, which has kernels for the first derivative: the second is that in float64."""
    results = []
    for dtype in (torch.float32, torch.float64):
        norm, x = make(name).to(dtype), images(4, 4, 3, 3, dtype=dtype).requires_grad_()
        (dx,) = torch.autograd.grad(norm(x).sin().sum(), x, create_graph=True)
        (dx.square().sum() / 10).backward()
        results.append([x.grad.double(), *(p.grad.double() for p in norm.parameters() if p.grad is not None)])
    for single, double in zip(*results):
        torch.testing.assert_close(single, double, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "GN"])  # whose operator has no tangents
def test_tangents_of_gradients(name):
    """The forward pass without forward mode, then a backward pass with it."""
    norm, x = make(name).double(), images(2, 4, 3, 2, dtype=torch.float64).requires_grad_()
    y = norm(x)
    g, tangent = (images(*y.shape, seed=seed, dtype=torch.float64) for seed in (1, 2))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(g, tangent)
        (dx,) = torch.autograd.grad(y, x, dual, retain_graph=True)
        got = torch.autograd.forward_ad.unpack_dual(dx)
    for each, of in zip(got, (g, tangent)):
        torch.testing.assert_close(each, torch.autograd.grad(y, x, of, retain_graph=True)[0])


@pytest.mark.parametrize("name", NAMES)
def test_many_gradients_at_once(name):
    norm, x = make(name), images(2, 4, 3, 2).requires_grad_()
    y = norm(x)
    grads = images(3, *y.shape, seed=1)
    expected = torch.stack([torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in grads])
    got = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    got = vmap(lambda g: torch.autograd.grad(y, x, g, retain_graph=True)[0])(grads)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_checkpoints(name, reentrant):
    """Gradients of one pass. Statistics of two, as batch normalization's, where the second is gone through to its
    end."""
    norm, twin = make(name), make(name)
    x, other = (images(4, 4, 3, 3).requires_grad_() for _ in range(2))
    checkpoint(norm, x, use_reentrant=reentrant).sin().sum().backward()
    twin(other).sin().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    for ours, theirs in zip(norm.parameters(), twin.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)
    if reentrant:
        twin(other)
        close(norm.state_dict(), twin.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_saved_tensors_on_disk_and_anomaly_mode(name):
    norm, x = make(name), images(4, 4, 3, 3).requires_grad_()
    (expected,) = torch.autograd.grad(norm(x).sin().sum(), x)

    def pack(tensor):
        torch.save(tensor, file := io.BytesIO())
        return file

    def unpack(file):
        file.seek(0)
        return torch.load(file)

    norm = make(name)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack), torch.autograd.set_detect_anomaly(True):
        (got,) = torch.autograd.grad(norm(x).sin().sum(), x)
    torch.testing.assert_close(got, expected)


# --- modules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_copies_pickles_and_memory_that_is_shared(name):
    norm = make(name)
    x = images(4, 4, 3, 3)
    twins = [copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), copy.deepcopy(norm).share_memory()]
    assert all(t.is_shared() for t in twins[-1].state_dict().values())
    expected = norm(x)
    for twin in twins:
        torch.testing.assert_close(twin(x), expected)
        close(twin.state_dict(), norm.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_made_on_the_meta_device(name):
    with torch.device("meta"):
        norm = build(name)
        y = norm(torch.empty(2, 4, 5, 5))
    assert y.is_meta and y.shape == (2, 4, 5, 5)
    filled = make(name)
    for twin in (norm.to_empty(device="cpu"), build(name, device="meta")):
        twin.load_state_dict(filled.state_dict(), assign=True)
        if isinstance(twin, FilterMixin):
            twin.t_sigma = 1.5
        torch.testing.assert_close(twin(images(4, 4, 3, 3)), make(name)(images(4, 4, 3, 3)))


class _Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("name", [name for name in NAMES if getattr(build(name), "weight", None) is not None])
def test_parametrized_weight(name):
    if not isinstance(make(name).weight, nn.Parameter):
        pytest.skip("a buffer")
    norm, twin = make(name), make(name)
    twin.weight.data.mul_(2)
    nn.utils.parametrize.register_parametrization(norm, "weight", _Doubled())
    x = images(4, 4, 3, 3)
    y = norm(x)
    torch.testing.assert_close(y, twin(x))
    y.sin().sum().backward()
    assert norm.parametrizations.weight.original.grad.abs().sum() > 0


class _Named(torch.Tensor):
    """A subclass that is followed by ``__torch_function__``."""


@pytest.mark.parametrize("name", NAMES)
def test_subclasses_of_tensors_come_out_again(name):
    x = images(4, 4, 3, 3)
    y = make(name)(x.as_subclass(_Named))
    assert type(y) is _Named
    torch.testing.assert_close(y.as_subclass(torch.Tensor), make(name)(x))


@pytest.mark.parametrize("name", NAMES)
def test_autocast_as_batch_norm(name):
    """The input's dtype goes in and comes out."""
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.bfloat16, torch.float32):
            assert make(name)(images(4, 4, 3, 3, dtype=dtype)).dtype is dtype


# --- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*OURS, "FBN(t_sigma=inf)", "act"])
def test_cumulative_average_without_reading_a_number(name):
    torch.compiler.reset()
    if name == "act":
        torch.manual_seed(0)
        norm = FilteredBatchNormAct2d(4, momentum=None, t_sigma=1.5)
    else:
        norm = make(name, momentum=None)
    norm.reset_running_stats()
    plain = nn.BatchNorm2d(4, momentum=None)
    twin = copy.deepcopy(norm)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        x, other = (images(4, 4, 3, 3, seed=seed).requires_grad_() for _ in range(2))
        got, expected = compiled(x), norm(other)
        torch.testing.assert_close(got, expected)
        for y in (got, expected):
            y.sin().sum().backward()
        torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5)
        close(twin.state_dict(), norm.state_dict())
        plain(x)
    assert norm.num_batches_tracked == 3
    if not isinstance(norm, FilterMixin) or norm.t_sigma == torch.inf:
        torch.testing.assert_close(norm.running_var, plain.running_var)
        if name != "ConvNorm":
            torch.testing.assert_close(norm.running_mean, plain.running_mean)


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="PyTorch 2.6 does not tell that it exports")
@pytest.mark.parametrize("name", [*NAMES, "paper"])
def test_exported_while_it_trains(name):
    """A graph of standard operators, with the module's outputs, gradients and statistics at other sizes."""
    norm = make("FBN", grad_mode="paper", gaussian_correction=True) if name == "paper" else make(name)
    sides = {} if name == "ConvNorm" else {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    shapes = ({0: torch.export.Dim.DYNAMIC, **sides},)
    program = torch.export.export(copy.deepcopy(norm), (images(4, 4, 5, 6),), dynamic_shapes=shapes)
    assert not [n for n in program.graph.nodes if n.op == "call_function" and "fbn_plugin" in str(n.target)]
    exported = program.module()
    for x in (images(4, 4, 5, 6), images(3, 4, 5, 6) if name == "ConvNorm" else images(3, 4, 7, 3)):
        (y, gradients), (expected, theirs) = step(exported, x), step(norm, x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        close(gradients, theirs, rtol=1e-3, atol=1e-4)
        close(dict(exported.named_buffers()), dict(norm.named_buffers()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OURS)
def test_compiled_transforms(name):
    """torch.compile around torch.func, buffers as arguments."""
    torch.compiler.reset()
    norm, x = make(name), images(4, 4, 3, 3)
    if not isinstance(norm, FilterMixin):
        pytest.skip("PyTorch's operators, or a function of its own, which the compiler has no transform of")

    def gradient(parameters, buffers):
        return grad(lambda p, b: functional_call(norm, (p, b), (x,)).sin().sum())(parameters, buffers)

    (parameters, buffers), (_, others) = state(norm), state(norm)
    expected = gradient(parameters, others)
    close(torch.compile(gradient, fullgraph=True, backend="aot_eager")(parameters, buffers), expected)
    close(buffers, others)
    stacked, buffers = stack_module_state([make(name, seed) for seed in range(2)])

    def ensemble(parameters, buffers):
        return vmap(lambda p, b: functional_call(norm, (p, b), (x,)))(parameters, buffers)

    got = torch.compile(ensemble, fullgraph=True, backend="aot_eager")(stacked, buffers)
    torch.testing.assert_close(got, torch.stack([make(name, seed)(x) for seed in range(2)]))
    assert buffers["num_batches_tracked"].tolist() == [1, 1]


@pytest.mark.parametrize("name", NAMES)
def test_traced_gradients(name):
    """make_fx over a whole step."""
    norm = make(name)
    parameters, buffers = state(norm)

    def gradient(parameters, buffers, x):
        return grad(lambda p, b: functional_call(norm, (p, b), (x,)).sin().sum())(parameters, buffers)

    graph = make_fx(gradient)(parameters, {n: t.clone() for n, t in buffers.items()}, images(4, 4, 3, 3))
    x = images(4, 4, 3, 3, seed=3)
    close(graph(parameters, buffers, x), step(make(name), x)[1], rtol=1e-4, atol=1e-5)
