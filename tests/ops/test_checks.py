"""An eps that float32 has no room for is refused where a norm divides by the moments of its input, and only there."""

import math

import pytest
import torch
from torch import nn

import fbn_plugin
from fbn_plugin.ops import filtered_batch_norm, filtered_batch_norm_act, filtered_group_norm

TOO_SMALL = r"eps must be a number in \[1\.2e-38, 1\) to normalize by the moments of the input, got 0"
NONE = r"eps must be a number in \[0, 1\), got "


@pytest.mark.parametrize("eps", [0, 0.0, 1e-45, 1e-60])
def test_the_functions_refuse_to_divide_by_nothing(eps):
    x = torch.full((2, 4, 3, 3), 1e-24)  # whose variance is 0 in float32
    statistics = torch.zeros(4), torch.ones(4)
    for function in (filtered_batch_norm, filtered_batch_norm_act):
        with pytest.raises(ValueError, match="eps must be"):
            function(x, *statistics, training=True, eps=eps)
        with pytest.raises(ValueError, match="eps must be"):
            function(x, training=True, eps=eps, t_sigma=math.inf)
        assert function(x, *statistics, eps=eps).isfinite().all()
    for t_sigma in (4.0, math.inf):
        with pytest.raises(ValueError, match="eps must be"):
            filtered_group_norm(x, 2, eps=eps, t_sigma=t_sigma)


@pytest.mark.parametrize("eps", [1.2e-38, 1e-30, 1e-5])
@pytest.mark.parametrize("spread", [0.0, 1e-24, 1e-21, 1e-3])
def test_what_is_accepted_is_finite(eps, spread):
    x = (torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0)) * spread).requires_grad_()
    for y in (filtered_batch_norm(x, training=True, eps=eps), filtered_group_norm(x, 2, eps=eps)):
        assert y.isfinite().all()
    x64 = x.detach().double()
    torch.testing.assert_close(
        filtered_group_norm(x, 2, eps=1e-5).double(), filtered_group_norm(x64, 2, eps=1e-5), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("eps", [-1e-5, math.nan, math.inf, 1, "1e-5", True, None])
@pytest.mark.parametrize("norm", ["FBN", "FGN", "FIN", "FLN", "FFRN", "FRN", "ScaledBN", "RBN", "IEBN", "LearnedNorm"])
def test_what_is_no_eps_is_refused_when_the_layer_is_built(norm, eps):
    make = type(fbn_plugin.get_norm(norm, 32))
    with pytest.raises((ValueError, TypeError)) as error:
        make(*((32,) if norm != "FGN" else (2, 32)), eps=eps)
    assert "eps" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("norm", ["FBN", "ScaledBN", "ScaledBN-A1", "RBN", "RBN-", "IEBN", "ConvNorm"])
def test_batch_norms_evaluate_without_eps_and_do_not_train(norm):
    layer = fbn_plugin.get_norm(f"{norm}(eps=0)", 4)
    x = torch.randn(2, 4, 6, 6)
    with pytest.raises(ValueError, match=TOO_SMALL):
        layer(x)
    assert layer.eval()(x).isfinite().all()


@pytest.mark.parametrize("norm", ["FGN(num_groups=2, eps=0)", "FIN(eps=0)", "FLN(eps=0)", "FFRN(eps=0)", "FRN(eps=0)"])
def test_norms_of_a_sample_are_not_built_without_eps(norm):
    with pytest.raises(ValueError, match=TOO_SMALL):
        fbn_plugin.get_norm(norm, 4)


def test_scripted_layers_refuse_too():
    layer = torch.jit.script(fbn_plugin.FilteredBatchNorm2d(4, eps=0.0))
    with pytest.raises(torch.jit.Error, match="eps must be a number in"):
        layer(torch.randn(2, 4, 3, 3))


@pytest.mark.parametrize("spec", ["FBN", "ScaledBN", "BN"])
def test_a_norm_without_eps_is_converted_to_one_that_trains(spec):
    old = fbn_plugin.FilteredBatchNorm2d(4, eps=0.0) if spec == "BN" else nn.BatchNorm2d(4, eps=0.0)
    old.running_var.copy_(torch.tensor([1e-3, 0.1, 1.0, 2.0]))
    old.bias.data.normal_()
    x, report = torch.randn(2, 4, 3, 3), fbn_plugin.NormReport()
    expected = old.eval()(x)
    new = fbn_plugin.convert_norm(old, spec, report=report)
    assert new.eps == 1e-5 and "eps is 1e-05 in the place of 0" in report.changed[0].note
    torch.testing.assert_close(new(x), expected, rtol=1e-4, atol=1e-5)
    assert new.train()(torch.zeros(2, 4, 3, 3)).isfinite().all()


@pytest.mark.parametrize("norm", ["FBN", "RBN", "IEBN", "FGN(num_groups=4)", "FIN(affine=True)"])
def test_an_input_with_channels_last_is_refused_by_the_place_of_its_channels(norm):
    message = r"has 8 elements, but the input has 6 channels, the second dimension of \(2, 6, 7, 8\)"
    with pytest.raises((ValueError, RuntimeError), match=message):
        fbn_plugin.get_norm(norm, 8)(torch.randn(2, 6, 7, 8))
