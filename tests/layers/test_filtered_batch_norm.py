"""FilteredBatchNorm modules as users of ``nn.BatchNorm*`` handle them: checkpoints, copies, flags, export."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from fbn_plugin import FilteredBatchNorm1d, FilteredBatchNorm2d, FilteredBatchNorm3d
from fbn_plugin.ops import filtered_batch_norm

CASES = [
    pytest.param(FilteredBatchNorm1d, nn.BatchNorm1d, (6, 4), id="1d-flat"),
    pytest.param(FilteredBatchNorm1d, nn.BatchNorm1d, (3, 4, 7), id="1d"),
    pytest.param(FilteredBatchNorm2d, nn.BatchNorm2d, (3, 4, 5, 6), id="2d"),
    pytest.param(FilteredBatchNorm3d, nn.BatchNorm3d, (3, 4, 2, 3, 4), id="3d"),
]


def data(shape, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 1
    x[0] *= 10
    return x


@pytest.mark.parametrize("filtered, plain, shape", CASES)
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"momentum": 0.3, "eps": 1e-2}],
    ids=str,
)
def test_infinite_cut_behaves_as_the_plain_layer_over_several_steps(filtered, plain, shape, options):
    ours, native = filtered(4, t_sigma=math.inf, **options), plain(4, **options)
    assert isinstance(ours, plain)
    for step in range(3):
        x = data(shape, step)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [module(i) for module, i in zip((ours, native), inputs)]
        for output in outputs:
            output.square().sum().backward()
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for name, tensor in native.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)
    for (_, a), (_, b) in zip(ours.named_parameters(), native.named_parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(ours.eval()(x), native.eval()(x))


@pytest.mark.parametrize("filtered, plain, shape", CASES)
def test_layer_is_the_operator(filtered, plain, shape):
    layer = filtered(4, t_sigma=2.0, eps=1e-3, momentum=0.2, grad_mode="paper", gaussian_correction=True)
    mean, var = torch.zeros(4), torch.ones(4)
    options = {"training": True, "momentum": 0.2, "eps": 1e-3, "t_sigma": 2.0}
    options.update(grad_mode="paper", gaussian_correction=True)
    expected = filtered_batch_norm(data(shape), mean, var, layer.weight, layer.bias, **options)
    assert torch.equal(layer(data(shape)), expected)
    assert torch.equal(layer.running_mean, mean) and torch.equal(layer.running_var, var)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("filtered, plain, shape", CASES)
def test_checkpoints_go_both_ways(filtered, plain, shape):
    ours, native = filtered(4), plain(4)
    ours(data(shape)), native(data(shape))
    assert list(ours.state_dict()) == list(native.state_dict())
    fresh_ours, fresh_native = filtered(4), plain(4)
    fresh_ours.load_state_dict(native.state_dict(), strict=True)
    fresh_native.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(fresh_native.eval()(data(shape)), ours.eval()(data(shape)))
    assert torch.equal(fresh_ours.eval()(data(shape)), native.eval()(data(shape)))


def test_cumulative_average():
    layer = FilteredBatchNorm2d(4, t_sigma=2.0, momentum=None)
    single = []
    for step in range(3):
        x = data((3, 4, 5, 6), step)
        layer(x)
        mean, var = torch.zeros(4), torch.ones(4)
        filtered_batch_norm(x, mean, var, training=True, momentum=1.0, t_sigma=2.0)
        single.append((mean, var))
    torch.testing.assert_close(layer.running_mean, torch.stack([m for m, _ in single]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([v for _, v in single]).mean(0))


@pytest.mark.parametrize("filtered, plain, shape", CASES)
@pytest.mark.parametrize("t_sigma", [2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_batch_statistics_are_what_training_normalizes_with(filtered, plain, shape, t_sigma, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    layer, x = filtered(4, t_sigma=t_sigma, momentum=1.0, dtype=wide), data(shape).to(dtype).requires_grad_()
    mean, var, count = layer.batch_statistics(x)
    assert layer.num_batches_tracked == 0 and not mean.requires_grad
    assert {(s.shape, s.dtype) for s in (mean, var, count)} == {((4,), wide)}
    values = x[:, 0].numel()
    assert (count < values).any() if t_sigma == 2 else (count == values).all()
    layer(x)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var * count / (count - 1))


def test_without_tracking_evaluation_filters_the_batch():
    layer = FilteredBatchNorm2d(4, t_sigma=2.0, track_running_stats=False)
    x = data((3, 4, 5, 6))
    assert torch.equal(layer.eval()(x), layer.train()(x))
    assert layer.running_mean is None and "running_mean" not in layer.state_dict()


def test_evaluation_changes_no_buffer_and_is_batch_norm():
    layer, native = FilteredBatchNorm2d(4, t_sigma=2.0), nn.BatchNorm2d(4)
    layer(data((3, 4, 5, 6)))
    native.load_state_dict(layer.state_dict())
    before = copy.deepcopy(layer.state_dict())
    assert torch.equal(layer.eval()(data((2, 4, 3, 3))), native.eval()(data((2, 4, 3, 3))))
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


def copies(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    yield copy.deepcopy(layer)
    yield pickle.loads(pickle.dumps(layer))
    yield torch.load(buffer, weights_only=False)


def test_copies_keep_the_filter():
    layer = FilteredBatchNorm2d(4, t_sigma=2.5, grad_mode="paper", gaussian_correction=True)
    layer(data((3, 4, 5, 6)))
    x = data((3, 4, 5, 6), 1)
    expected = layer(x)
    for twin in copies(layer):
        assert repr(twin) == repr(layer)
        assert torch.equal(twin(x), expected)


def test_weights_only_load(tmp_path):
    layer = FilteredBatchNorm2d(4)
    layer(data((3, 4, 5, 6)))
    torch.save(layer.state_dict(), tmp_path / "weights.pth")
    loaded = torch.load(tmp_path / "weights.pth", weights_only=True)
    FilteredBatchNorm2d(4).load_state_dict(loaded)
    assert torch.equal(loaded["running_var"], layer.running_var)


def test_repr_names_what_is_set():
    assert repr(FilteredBatchNorm2d(4)).endswith("t_sigma=5)")
    text = repr(FilteredBatchNorm2d(4, t_sigma=math.inf, grad_mode="paper", gaussian_correction=True))
    assert text.endswith("t_sigma=inf, grad_mode='paper', gaussian_correction=True)")


def test_device_and_dtype():
    layer = FilteredBatchNorm2d(4, device="meta", dtype=torch.float64)
    assert layer.weight.is_meta and layer.running_var.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_and_half_layers(dtype):
    x = data((3, 4, 5, 6))
    expected = FilteredBatchNorm2d(4, t_sigma=2.0)(x.to(dtype).float())
    for layer in (FilteredBatchNorm2d(4, t_sigma=2.0), FilteredBatchNorm2d(4, t_sigma=2.0, dtype=dtype)):
        inputs = x.to(dtype).requires_grad_()
        y = layer(inputs)
        y.float().square().sum().backward()
        assert y.dtype == inputs.grad.dtype == dtype
        assert layer.weight.grad.dtype == layer.weight.dtype
        torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)


def test_autocast():
    layer = nn.Sequential(nn.Conv2d(4, 4, 3), FilteredBatchNorm2d(4, t_sigma=2.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(data((3, 4, 5, 6)))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer[1].running_mean.dtype == torch.float32


def test_wrong_inputs_are_pytorchs_errors():
    with pytest.raises(ValueError, match="expected 4D input"):
        FilteredBatchNorm2d(4)(torch.ones(2, 4))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        FilteredBatchNorm2d(4)(torch.ones(1, 4, 1, 1))
    with pytest.raises(ValueError, match="has 4 elements, but the input has 5 channels"):
        FilteredBatchNorm2d(4)(torch.ones(2, 5, 2, 2))
    assert FilteredBatchNorm2d(4).eval()(torch.ones(1, 4, 1, 1)).shape == (1, 4, 1, 1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"t_sigma": 1.0}, "t_sigma must be a number greater than 1 .*, got 1.0"),
        ({"t_sigma": math.nan}, "got nan"),
        ({"grad_mode": "printed"}, "grad_mode must be one of 'exact', 'paper', got 'printed'"),
    ],
)
def test_bad_options_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        FilteredBatchNorm2d(4, **options)


def test_updating_statistics_with_swa_utils():
    """``update_bn`` sets momentum to None and resets the buffers: the cumulative average must carry the filter."""
    model = nn.Sequential(FilteredBatchNorm2d(4, t_sigma=2.0))
    batches = [data((3, 4, 5, 6), step) for step in range(3)]
    torch.optim.swa_utils.update_bn(batches, model)
    plain = nn.Sequential(nn.BatchNorm2d(4))
    torch.optim.swa_utils.update_bn(batches, plain)
    assert model[0].momentum == 0.1 and model[0].num_batches_tracked == 3
    assert (model[0].running_var < plain[0].running_var).all()


def test_folds_into_the_convolution_before_it():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), FilteredBatchNorm2d(4, t_sigma=2.0))
    for step in range(20):
        model(data((3, 4, 8, 8), step))
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(model.eval()[0], model[1])
    torch.testing.assert_close(fused(data((2, 4, 8, 8))), model(data((2, 4, 8, 8))))


def test_evaluation_exports_as_plain_batch_norm():
    exported = torch.export.export(FilteredBatchNorm2d(4, t_sigma=2.0).eval(), (data((2, 4, 5, 5)),))
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert len(targets) == 1 and "batch_norm" in targets[0] and "fbn_plugin" not in targets[0]


def test_training_compiles_without_a_graph_break():
    layer = FilteredBatchNorm2d(4, t_sigma=2.0)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    x = data((3, 4, 5, 6))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for module, i in zip((layer, compiled), inputs):
        module(i).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(layer.running_var, compiled.running_var)
    assert compiled.num_batches_tracked == 1


def test_gradient_checkpointing_gives_the_same_gradients():
    layer = FilteredBatchNorm2d(4, t_sigma=2.0)
    inputs = [data((3, 4, 5, 6)).requires_grad_() for _ in range(2)]
    layer(inputs[0]).square().sum().backward()
    torch.utils.checkpoint.checkpoint(layer, inputs[1], use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
