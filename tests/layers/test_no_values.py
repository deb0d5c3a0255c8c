"""Inputs without values, such as no images or maps of height or width 0: an empty result, and a gradient of zero for
every parameter, in all norms of this package."""

import every_norm
import pytest
import torch

from fbn_plugin.layers.description import family

SHAPES = [(0, 8, 4, 4), (2, 8, 0, 4), (2, 8, 4, 0), (0, 8, 0, 4)]
# PyTorch's own group normalization refuses them.
SPECS = [spec for spec in (*every_norm.SPECS, *every_norm.OPTIONS) if not spec.startswith("GN")]
SPECS += ["FGN(num_groups=4, t_sigma=inf)", "FIN(t_sigma=inf)", "FLN(t_sigma=inf)", "FFRN(t_sigma=inf)"]


def assert_empty(norm, run, shape, dtype=torch.float32, memory_format=torch.contiguous_format):
    x = torch.randn(shape, dtype=dtype).to(memory_format=memory_format).requires_grad_()
    y = run(x)
    assert y.shape == x.shape and y.dtype == dtype
    y.sum().backward()
    assert x.grad.shape == x.shape
    for name, parameter in norm.named_parameters():
        unused = not norm.training and parameter.grad is None  # such as the kernels of ConvNorm in evaluation
        assert unused or not parameter.grad.any(), name


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("training", [True, False])
def test_no_values_in_none_out(spec, training):
    if spec == "SyncBN" and not torch.cuda.is_available():
        pytest.skip("PyTorch's SyncBatchNorm needs a GPU")
    for shape in SHAPES:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            norm = every_norm.layer(spec).train(training)
            before = {name: value.clone() for name, value in norm.named_buffers() if value.is_floating_point()}
            assert_empty(norm, norm, shape, memory_format=memory_format)
            if family(norm) != "IN":  # PyTorch's has none to speak of
                assert all(torch.equal(value, norm.get_buffer(name)) for name, value in before.items())


@pytest.mark.parametrize("spec", ["FBN", "FGN(num_groups=4)", "FIN", "FLN", "FFRN", "RBN", "LearnedNorm"])
def test_no_values_in_other_ways_to_run(spec):
    shape = (2, 8, 0, 4)
    norm = every_norm.layer(spec).half()
    assert_empty(norm, norm, shape, dtype=torch.float16)
    norm = every_norm.layer(spec).eval()
    assert torch.func.vmap(norm)(torch.randn(3, *shape)).shape == (3, *shape)
    norm = every_norm.layer(spec)
    assert_empty(norm, torch.jit.script(norm), shape)
    torch.compiler.reset()
    norm = every_norm.layer(spec)
    assert_empty(norm, torch.compile(norm, backend="aot_eager"), shape)
