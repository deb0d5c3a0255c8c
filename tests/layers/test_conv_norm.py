"""ConvNorm and normalization by learned statistics, against the paper's equations written out in NumPy."""

import copy
import io
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fbn_plugin import ConvNorm2d, LearnedStatsNorm2d, get_norm

pytestmark = pytest.mark.usefixtures("one_thread")


def data(shape=(3, 4, 6, 5), seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 + 1


def layer(channels=4, seed=1, **options):
    """With kernels, scale and shift far from their initial values."""
    norm = ConvNorm2d(channels, **{"dtype": torch.float64, "eps": 1e-3, **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return norm


def strided_stack(map, kernels):
    """Section 3.1 and appendix B for one map: each kernel moves by its own size over the map, padded with zeros."""
    for kernel in kernels:
        a, b = kernel.shape
        rows, columns = -(-map.shape[0] // a), -(-map.shape[1] // b)
        padded = np.zeros((rows * a, columns * b))
        padded[: map.shape[0], : map.shape[1]] = map
        map = np.zeros((rows, columns))
        for i, j, p, q in itertools.product(range(rows), range(columns), range(a), range(b)):
            map[i, j] += kernel[p, q] * padded[i * a + p, j * b + q]
    return map.mean()


def paper(norm, x):
    """Eq. 7 and 9 value by value: output, mean, and variance, which Eq. 5 or Eq. 8 gives."""
    gamma, beta = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    y, means, variances = np.empty_like(x), [], []
    for c in range(x.shape[1]):
        raw = [kernel[c].detach().numpy() for kernel in norm.kernels]
        kernels = [np.exp(k) / np.exp(k).sum() for k in raw]
        mass = strided_stack(np.ones(x.shape[2:]), kernels)
        mean = sum(strided_stack(image[c], kernels) / mass for image in x) / len(x)
        if norm.weighted_std:
            var = sum(strided_stack((image[c] - mean) ** 2, kernels) / mass for image in x) / len(x)
        else:
            var = ((x[:, c] - x[:, c].mean()) ** 2).mean()
        y[:, c] = gamma[c] * (x[:, c] - mean) / math.sqrt(var + norm.eps) + beta[c]
        means.append(mean)
        variances.append(var)
    return y, np.array(means), np.array(variances)


SIZES = [
    pytest.param((4, 4), {"kernel_sizes": (2, 2)}, id="the paper's figure 3"),
    pytest.param((8, 8), {"kernel_sizes": (2, 2)}, id="covers less"),
    pytest.param((7, 9), {"kernel_sizes": (2, 2)}, id="covers less, padded"),
    pytest.param((3, 2), {"kernel_sizes": (4, 2)}, id="covers more"),
    pytest.param((6, 7), {"kernel_sizes": ((3, 2), (2, 1))}, id="pairs"),
    pytest.param((5, 13), {}, id="default"),
    pytest.param((6, 10), {"map_size": (6, 10)}, id="factors"),
    pytest.param((11, 3), {"map_size": (11, 3)}, id="prime side"),
]


@pytest.mark.parametrize("weighted_std", [False, True])
@pytest.mark.parametrize("size, options", SIZES)
def test_is_the_paper(size, options, weighted_std):
    norm = layer(2, weighted_std=weighted_std, momentum=1.0, **options)
    x = data((3, 2, *size))
    y, mean, var = paper(norm, x.numpy())
    np.testing.assert_allclose(norm(x).detach().numpy(), y, rtol=1e-9)
    for found, expected in zip(norm.batch_statistics(x)[:2], (mean, var)):
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(norm.running_mean.numpy(), mean, rtol=1e-9)
    count = norm.batch_statistics(x)[2].detach().numpy()
    np.testing.assert_allclose(norm.running_var.numpy(), var * count / (count - 1), rtol=1e-9)
    if weighted_std:
        weights = norm.map_weights(*size).detach().numpy()
        np.testing.assert_allclose(count, 3 / (weights**2).sum((1, 2)))
    else:
        assert (count == 3 * size[0] * size[1]).all()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weighted_std", [False, True])
@pytest.mark.parametrize("size, options", SIZES)
def test_gradients(size, options, weighted_std, memory_format):
    norm = layer(2, weighted_std=weighted_std, **options)
    names = [name for name, _ in norm.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(norm, dict(zip(names, parameters)), x.contiguous(memory_format=memory_format))

    assert torch.autograd.gradcheck(call, (data((2, 2, *size)).requires_grad_(), *norm.parameters()), fast_mode=True)


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.lists(st.integers(1, 5) | st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3),
)
def test_weights_are_non_negative_with_sum_one_on_any_map(size, kernel_sizes):
    norm = layer(3, kernel_sizes=kernel_sizes)
    weights = norm.map_weights(*size)
    assert weights.shape == (3, *size) and (weights >= 0).all()
    torch.testing.assert_close(weights.sum((1, 2)), torch.ones(3, dtype=torch.float64))
    if math.prod(size) > 1:
        x = data((2, 3, *size))
        torch.testing.assert_close(norm.batch_statistics(x)[0], (x.mean(0) * weights).sum((1, 2)))


def test_every_position_of_a_covered_map_has_a_weight_of_its_own():
    weights = layer(1, kernel_sizes=(4, 2, 2, 2)).map_weights(32, 32)
    assert weights.unique().numel() == 32 * 32
    tiled = layer(1, kernel_sizes=(2, 2)).map_weights(8, 8)
    assert torch.equal(tiled[:, :4, :4], tiled[:, 4:, 4:]) and tiled.unique().numel() == 16


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (50, 37), (1, 7)])
@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
)
def test_without_spread_it_starts_as_batch_norm(size, options):
    ours, native = ConvNorm2d(4, init_spread=0, **options), nn.BatchNorm2d(4, **options)
    for step in range(3):
        inputs = [data((3, 4, *size), step, torch.float32).requires_grad_() for _ in range(2)]
        outputs = [norm(x) for norm, x in zip((ours, native), inputs)]
        for output in outputs:
            (output * data(output.shape, 9, torch.float32)).sum().backward()
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-5)
    for name, tensor in native.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)
    torch.testing.assert_close(ours.eval()(inputs[0]), native.eval()(inputs[0]), rtol=1e-5, atol=1e-5)


def test_the_spread_is_small_and_not_nothing():
    norm = ConvNorm2d(4, kernel_sizes=(2, 2), init_spread=0.01)
    relative = norm.map_weights(4, 4) * 16
    assert 1e-4 < (relative - 1).abs().max() <= math.exp(0.04) - 1
    norm.init_spread = 0
    norm.reset_parameters()
    assert torch.equal(norm.map_weights(4, 4), torch.full((4, 4, 4), 1 / 16))


# The table of section 4: channels and kernels of ALL-CNN-C's eight norms. The example of section 3.1 halves 16 weights.
@pytest.mark.parametrize(
    "channels, kernel_sizes, weights",
    [
        (96, (4, 2, 2, 2), 28),
        (96, (4, 2, 2), 24),
        (192, (4, 2, 2), 24),
        (192, (2, 2), 8),
        (192, (2,), 4),
        (1, (2, 2), 8),
    ],
)
def test_number_of_parameters(channels, kernel_sizes, weights):
    norm = ConvNorm2d(channels, kernel_sizes=kernel_sizes)
    assert sum(kernel.numel() for kernel in norm.kernels) == channels * weights
    assert sum(p.numel() for p in norm.parameters()) == channels * (weights + 2)


@pytest.mark.parametrize(
    "map_size, kernel_sizes",
    [
        (32, [4, 2, 2, 2]),
        (16, [4, 2, 2]),
        (4, [2, 2]),
        ((8, 4), [(4, 2), 2]),
        (14, [7, 2]),
        (31, [4, 2, 2, 2]),
        ((7, 1), [(7, 1)]),
        (1, [1]),
        (57, [5, 3, 2, 2]),
    ],
)
def test_kernel_sizes_are_factors_of_the_map(map_size, kernel_sizes):
    expected = [(k, k) if isinstance(k, int) else k for k in kernel_sizes]
    assert list(ConvNorm2d(2, map_size=map_size).kernel_sizes) == expected


def test_evaluation_is_batch_norm_and_its_checkpoints_have_the_kernels_besides():
    norm, native = layer(dtype=torch.float32), nn.BatchNorm2d(4, eps=1e-3)
    norm(data(dtype=torch.float32))
    assert norm.state_dict().keys() == native.state_dict().keys() | {"kernel0", "kernel1", "kernel2", "kernel3"}
    assert native.load_state_dict(norm.state_dict(), strict=False).missing_keys == []
    x = data(seed=1, dtype=torch.float32)
    assert torch.equal(norm.eval()(x), native.eval()(x))
    fresh = ConvNorm2d(4, eps=1e-3)
    assert not torch.equal(fresh.eval()(x), norm(x))
    fresh.load_state_dict(norm.state_dict())
    assert torch.equal(fresh.eval()(x), norm(x)) and torch.equal(fresh.train()(x), norm.train()(x))


def copies(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    yield copy.deepcopy(module)
    yield pickle.loads(pickle.dumps(module))
    yield torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("make", [lambda: layer(kernel_sizes=((3, 2), 2)), lambda: learned(4)], ids=["conv", "learned"])
def test_copies(make):
    module = make()
    for twin in copies(module):
        assert repr(twin) == repr(module)
        assert torch.equal(twin(data()), module(data()))


def test_cumulative_average_and_own_moments():
    norm = layer(momentum=None)
    batches = [data(seed=seed) for seed in range(3)]
    for batch in batches:
        norm(batch)
    expected = torch.stack([norm.batch_statistics(batch)[0] for batch in batches]).mean(0)
    torch.testing.assert_close(norm.running_mean, expected)
    before = copy.deepcopy(norm.state_dict())
    trained = norm(batches[0])
    norm.load_state_dict(before)
    norm.eval()
    norm.running_mean = norm.running_var = None  # as without track_running_stats: the batch's own moments
    assert torch.equal(norm(batches[0]), trained)
    assert norm.num_batches_tracked == 3


@pytest.mark.parametrize("weighted_std", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_and_half_layers(dtype, weighted_std):
    x = data(dtype=torch.float32)
    reference = layer(dtype=torch.float32, weighted_std=weighted_std).to(dtype).float()
    expected = reference(x.to(dtype).float())
    for norm in (reference, copy.deepcopy(reference).to(dtype)):
        inputs = x.to(dtype).requires_grad_()
        y = norm(inputs)
        y.float().square().sum().backward()
        assert y.dtype == inputs.grad.dtype == dtype and norm.kernel0.grad.dtype == norm.kernel0.dtype
        assert all(moment.dtype == torch.float32 for moment in norm.batch_statistics(inputs))
        torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("make", [lambda: ConvNorm2d(4), lambda: LearnedStatsNorm2d(4)], ids=["conv", "learned"])
def test_autocast(make):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), make())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(data(dtype=torch.float32))
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("weighted_std", [False, True])
def test_autocast_rounds_no_weights(weighted_std):
    norm, results = layer(dtype=torch.float32, weighted_std=weighted_std), []
    for enabled in (False, True):
        norm.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = norm(data(dtype=torch.float32))
        (y * data(seed=2, dtype=torch.float32)).sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in norm.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*results))


@pytest.mark.parametrize("options", [{}, {"weighted_std": True}, {"kernel_sizes": (2, 2)}], ids=str)
def test_training_compiles_without_a_graph_break(options):
    eager = layer(dtype=torch.float32, **options)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    inputs = [data(dtype=torch.float32).requires_grad_() for _ in range(2)]
    for module, x in zip((eager, compiled), inputs):
        module(x).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(eager.kernel0.grad, compiled.kernel0.grad)
    torch.testing.assert_close(eager.running_mean, compiled.running_mean)
    assert compiled.num_batches_tracked == 1


def test_evaluation_exports_and_folds_as_batch_norm():
    norm = layer(dtype=torch.float32)
    norm(data(dtype=torch.float32))
    x = data(dtype=torch.float32, seed=1)
    exported = torch.export.export(norm.eval(), (x,))
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert len(targets) == 1 and "batch_norm" in targets[0]
    conv = nn.Conv2d(4, 4, 1).eval()
    torch.testing.assert_close(nn.utils.fusion.fuse_conv_bn_eval(conv, norm)(x), norm(conv(x)))


def test_weight_decay_is_told_the_kernels():
    norm = ConvNorm2d(4, kernel_sizes=(2, 3))
    assert norm.no_weight_decay() == {"kernel0", "kernel1"} <= dict(norm.named_parameters()).keys()
    assert not list(norm.children()), "frameworks treat the parameters of leaf modules as a norm's"


def test_empty_batches():
    norm = ConvNorm2d(4)
    x = torch.empty(0, 4, 5, 5, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad.eq(0).all() for p in norm.parameters()), "distributed training waits for every gradient"
    assert torch.equal(norm.running_mean, torch.zeros(4)) and torch.equal(norm.running_var, torch.ones(4))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"kernel_sizes": (2, 2), "map_size": 8},
            r"kernel_sizes \(2, 2\) .*4 x 4 .*8 x 8",
        ),
        ({"kernel_sizes": ((4, 1),), "map_size": (4, 2)}, "4 x 1 .*4 x 2"),
        ({"kernel_sizes": ()}, r"kernel_sizes .*sequence.*\(\)"),
        ({"kernel_sizes": 4}, "kernel_sizes .*sequence.*4"),
        ({"kernel_sizes": "42"}, "kernel_sizes .*sequence.*'42'"),
        ({"kernel_sizes": (4, 0)}, r"positive whole numbers .*\(height, width\).*0"),
        ({"kernel_sizes": (4, 2.0)}, "got 2.0"),
        ({"kernel_sizes": ((4, 2, 2),)}, r"got \(4, 2, 2\)"),
        ({"map_size": -1}, "map_size .*positive whole numbers.*-1"),
        ({"map_size": True}, "got True"),
        ({"init_spread": -0.1}, "init_spread .*finite.*-0.1"),
    ],
)
def test_bad_options_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message) as error:
        ConvNorm2d(4, **options)
    assert "\n" not in str(error.value)


def test_wrong_inputs():
    with pytest.raises(ValueError, match="expected 4D input"):
        ConvNorm2d(4)(torch.ones(2, 4))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        ConvNorm2d(4)(torch.ones(1, 4, 1, 1))


def test_specs():
    norm = get_norm("ConvNorm(kernel_sizes=((3, 2), 2), weighted_std=True, init_spread=0, eps=1e-3)", 8)
    assert norm.kernel_sizes == ((3, 2), (2, 2)) and norm.weighted_std and norm.eps == 1e-3
    assert "kernel_sizes=[(3, 2), 2], weighted_std=True" in repr(norm)
    assert get_norm("ConvNorm(map_size=16)", 8).kernel_sizes == ((4, 4), (2, 2), (2, 2))
    with pytest.raises(ValueError, match="ConvNorm .*3 spatial dimensions.*ConvNorm2d"):
        get_norm("ConvNorm", 8, dims=3)
    with pytest.raises(ValueError, match="cannot cover the map of 8 x 8"):
        get_norm("ConvNorm(kernel_sizes=(2, 2), map_size=8)", 8)
    assert get_norm("LearnedNorm(first_layer=True, affine=True)", 8).weight.shape == (8,)


def learned(channels=6, **options):
    """With kernels and biases of the order of one."""
    torch.manual_seed(0)
    norm = LearnedStatsNorm2d(channels, **{"dtype": torch.float64, **options})
    for parameter in norm.parameters():
        nn.init.normal_(parameter, std=0.5)
    return norm


def statistic(network, a):
    """Section 5 for one image: convolutions along the channel averages, rectified but for the last, then their mean."""
    convs = [module for module in network if isinstance(module, nn.Conv1d)]
    signal = np.asarray(a)[None]
    for number, conv in enumerate(convs):
        kernel, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
        size = kernel.shape[2]
        padded = np.pad(signal, ((0, 0), (size // 2, size // 2)))
        length = padded.shape[1] - size + 1
        signal = (
            np.array([[(k * padded[:, i : i + size]).sum() for i in range(length)] for k in kernel]) + bias[:, None]
        )
        if number < len(convs) - 1:
            signal = np.maximum(signal, 0)
    return signal.mean()


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("first_layer", [False, True])
def test_learned_statistics_are_the_papers(first_layer, affine):
    norm = learned(first_layer=first_layer, affine=affine)
    x = data((3, 6, 4, 5))
    y = norm(x).detach().numpy()
    for image, found in zip(x.numpy(), y):
        averages = image.mean((1, 2))
        mean, raw = statistic(norm.mean_network, averages), statistic(norm.std_network, averages)
        expected = (image - mean) / (np.log1p(np.exp(raw) * (math.e - 1)) + norm.eps)
        if affine:
            gamma, beta = norm.weight.detach().numpy(), norm.bias.detach().numpy()
            expected = expected * gamma[:, None, None] + beta[:, None, None]
        np.testing.assert_allclose(found, expected)


def test_learned_statistics_have_the_papers_parameters():
    for first_layer, channels, sizes, count in (
        (True, (4, 4, 1), (4, 3, 3), 170),
        (False, (4, 4, 2, 1), (4, 3, 2, 3), 194),
    ):
        norm = LearnedStatsNorm2d(192, first_layer=first_layer)
        assert sum(p.numel() for p in norm.parameters()) == count < 2 * 192
        for network in (norm.mean_network, norm.std_network):
            convs = [m for m in network if isinstance(m, nn.Conv1d)]
            assert tuple(m.out_channels for m in convs) == channels
            assert tuple(m.kernel_size[0] for m in convs) == sizes


def test_the_learned_deviation_stays_positive_and_starts_near_one():
    norm = LearnedStatsNorm2d(6, dtype=torch.float64)
    last = [m for m in norm.std_network if isinstance(m, nn.Conv1d)][-1]
    nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
    nn.init.zeros_(norm.mean_network[-2].weight), nn.init.zeros_(norm.mean_network[-2].bias)
    torch.testing.assert_close(norm(data((2, 6, 3, 3))), data((2, 6, 3, 3)), rtol=1e-4, atol=1e-4)
    nn.init.constant_(last.bias, -1e4)
    y = norm(data((2, 6, 3, 3)))
    torch.testing.assert_close(y, data((2, 6, 3, 3)) / norm.eps)


def test_learned_gradients_layouts_and_precision():
    norm = learned(affine=True)
    names = [name for name, _ in norm.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(norm, dict(zip(names, parameters)), x)

    assert torch.autograd.gradcheck(call, (data((2, 6, 3, 2)).requires_grad_(), *norm.parameters()))
    x = data((2, 6, 3, 2))
    torch.testing.assert_close(norm(x.contiguous(memory_format=torch.channels_last)), norm(x))
    assert torch.equal(norm.eval()(x), norm.train()(x))
    compiled = torch.compile(copy.deepcopy(norm), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), norm(x))
    fresh = LearnedStatsNorm2d(6, affine=True, dtype=torch.float64)
    fresh.load_state_dict(norm.state_dict())
    assert torch.equal(fresh(x), norm(x))
    for module in (norm.float(), copy.deepcopy(norm).bfloat16()):
        y = module(x.bfloat16())
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), norm(x.bfloat16().float()), rtol=3e-2, atol=3e-2)
    with pytest.raises(ValueError, match=r"\(N, 6, \*spatial\).*\[2, 5, 3, 3\]"):
        norm(torch.ones(2, 5, 3, 3))
