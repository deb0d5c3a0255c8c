"""Filter response normalization and its filtered form, against their equations in NumPy and timm's layer."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fbn_plugin import FilteredFilterResponseNorm2d, FilterResponseNorm2d, get_norm
from fbn_plugin.ops.reference import gaussian_kappa

LAYERS = [FilterResponseNorm2d, lambda *a, **o: FilteredFilterResponseNorm2d(*a, **{"t_sigma": 1.5, **o})]
IDS = ["plain", "filtered"]


def data(shape=(3, 4, 6, 5), seed=0, dtype=torch.float64):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) + 0.5
    x.view(*shape[:2], -1)[..., 0] = 8.0
    return x


def randomize(norm, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return norm


def equations(norm, x, t_sigma=math.inf, kappa=1.0):
    """The docstrings' equations, a map at a time."""
    gamma, beta, tau = (p.detach().numpy() for p in norm.parameters())
    y = np.empty_like(x)
    for n, c in np.ndindex(x.shape[:2]):
        values = x[n, c].ravel()
        nu2 = math.fsum(values**2) / len(values)
        kept = [v for v in values if abs(v) <= t_sigma * math.sqrt(nu2 + norm.eps)]
        nu2 = math.fsum(v**2 for v in kept) / len(kept) / kappa
        y[n, c] = np.maximum(gamma[c] * x[n, c] / math.sqrt(nu2 + norm.eps) + beta[c], tau[c])
    return y


@pytest.mark.parametrize("shape", [(3, 4, 7), (3, 4, 6, 5), (2, 4, 2, 3, 4)])
def test_is_the_equation(shape):
    x = data(shape)
    norm = randomize(FilterResponseNorm2d(4, eps=1e-2, dtype=torch.float64))
    np.testing.assert_allclose(norm(x).detach().numpy(), equations(norm, x.numpy()))
    for correction in (False, True):
        norm = FilteredFilterResponseNorm2d(4, 1e-2, t_sigma=1.5, gaussian_correction=correction, dtype=torch.float64)
        expected = equations(randomize(norm), x.numpy(), 1.5, gaussian_kappa(1.5) if correction else 1.0)
        np.testing.assert_allclose(norm(x).detach().numpy(), expected)
    assert (norm(x) - FilterResponseNorm2d(4, dtype=torch.float64)(x)).abs().max() > 0.1


@pytest.mark.parametrize("tlu", [True, False])
def test_is_timms_layer(tlu):
    frn = pytest.importorskip("timm.layers.filter_response_norm")
    theirs, ours = frn.FilterResponseNormTlu2d(4, apply_act=tlu, eps=1e-6), FilterResponseNorm2d(4, tlu=tlu)
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    inputs = [data(dtype=torch.float32).requires_grad_() for _ in range(2)]
    outputs = [norm(x) for norm, x in zip((ours, theirs), inputs)]
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for (_, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_starts_as_the_rectified_response():
    x = data()
    torch.testing.assert_close(
        FilterResponseNorm2d(4, eps=1e-30, dtype=torch.float64)(x), (x / x.square().mean((2, 3), True).sqrt()).relu()
    )


def test_infinite_cut_is_the_plain_norm():
    norms = [randomize(FilterResponseNorm2d(4)), randomize(FilteredFilterResponseNorm2d(4, t_sigma=math.inf))]
    x = data(dtype=torch.float32)
    torch.testing.assert_close(norms[0](x), norms[1](x))
    assert list(norms[0].state_dict()) == list(norms[1].state_dict())


@pytest.mark.parametrize("make", LAYERS, ids=IDS)
@pytest.mark.parametrize("options", [{}, {"affine": False, "tlu": False}])
def test_gradcheck(make, options):
    norm = randomize(make(4, dtype=torch.float64, **options))
    names = [name for name, _ in norm.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(norm, dict(zip(names, parameters)), x)

    assert torch.autograd.gradcheck(call, (data((2, 4, 3, 2)).requires_grad_(), *norm.parameters()))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=12),
    st.floats(1, 3, exclude_min=True) | st.sampled_from([1e30, 1e300]),
    st.sampled_from([1e-6, 1e-30]),
)
def test_at_least_one_value_is_kept(values, t_sigma, eps):
    x = torch.tensor(values).view(1, 1, -1)
    mean_square = FilteredFilterResponseNorm2d(1, eps, t_sigma=t_sigma).mean_square(x)
    squares = x.square()
    assert (mean_square >= squares.min() * 0.999).all() and (mean_square <= squares.mean() * 1.001).all()


def test_a_constant_map_keeps_its_values_for_the_smallest_cut():
    norm = FilteredFilterResponseNorm2d(1, t_sigma=math.nextafter(1, 2), tlu=False)
    torch.testing.assert_close(norm(torch.full((1, 1, 37, 41), 0.1)), torch.ones(1, 1, 37, 41), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", LAYERS, ids=IDS)
def test_layouts_copies_modes_and_compile(make):
    norm, x = randomize(make(4)), data(dtype=torch.float32)
    y = norm(x)
    torch.testing.assert_close(norm(x.contiguous(memory_format=torch.channels_last)), y)
    fresh = make(4)
    fresh.load_state_dict(norm.state_dict())
    compiled = torch.compile(copy.deepcopy(norm), fullgraph=True, backend="aot_eager")
    for twin in (fresh, copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), norm.eval(), compiled):
        torch.testing.assert_close(twin(x), y)
    assert repr(fresh) == repr(norm)
    empty = torch.empty(0, 4, 3, 3, requires_grad=True)
    norm(empty).sum().backward()
    assert empty.grad.shape == empty.shape


@pytest.mark.parametrize("make", LAYERS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(make, dtype):
    norm = randomize(make(4)).to(dtype).float()
    x = (data(dtype=torch.float32) * 100).to(dtype).requires_grad_()  # squares beyond the range of float16
    expected = norm(x.float())
    for layer in (norm, copy.deepcopy(norm).to(dtype)):
        y = layer(x)
        y.float().square().sum().backward()
        assert y.dtype == x.grad.dtype == dtype and x.grad.isfinite().all()
        torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)


def test_specs_have_the_threshold_on_demand():
    assert get_norm("FRN", 8).tau is None and get_norm("FFRN", 8).tau is None
    norm = get_norm("FFRN(tlu=True, t_sigma=3, eps=1e-4, gaussian_correction=True)", 8, dims=1)
    assert isinstance(norm, FilteredFilterResponseNorm2d) and norm.tau.shape == (8,)
    assert repr(norm) == (
        "FilteredFilterResponseNorm2d(8, eps=0.0001, affine=True, tlu=True, t_sigma=3, gaussian_correction=True)"
    )
    assert not list(get_norm("FRN(affine=False)", 8).parameters())


@pytest.mark.parametrize("make", LAYERS, ids=IDS)
def test_wrong_inputs_and_options(make):
    with pytest.raises(ValueError, match=r"\(N, 4, \*spatial\).*\[2, 4\]"):
        make(4)(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"\(N, 1, \*spatial\).*\[2, 4, 3, 3\]"):
        make(1)(torch.ones(2, 4, 3, 3))
    with pytest.raises(ValueError, match="t_sigma must be a number greater than 1"):
        FilteredFilterResponseNorm2d(4, t_sigma=1.0)
