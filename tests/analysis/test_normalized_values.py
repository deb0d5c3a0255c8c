"""The values before scale and shift: of every norm, in evaluation and training, against its own output."""

import copy

import pytest
import torch
import torch.nn.functional as F
from every_norm import OPTIONS, SPECS, data, layers
from simulated_group import SimulatedGroup
from torch import nn

import fbn_plugin
from fbn_plugin.analysis import normalized_values
from fbn_plugin.analysis.normalized_values import BATCH, RUNNING, SAMPLE, channel_dim, moments_taken, normalized
from fbn_plugin.layers import sync_filtered_batch_norm
from fbn_plugin.layers.description import affine_terms
from fbn_plugin.ops import sync


def channels(value, x):
    return value.view(-1, *(1,) * (x.dim() - 2))


def rebuilt(norm, x, z):
    """The output of a norm, from its normalized values."""
    y = z
    if hasattr(norm, "gate_weight"):
        seen = z if isinstance(norm, fbn_plugin.RepresentativeBatchNorm2d) else x
        mean = seen.mean(tuple(range(2, x.dim())), keepdim=True)
        gate = channels(norm.gate_weight, x) * mean + channels(norm.gate_bias, x)
        y = torch.sigmoid(gate) * z
    weight, bias = affine_terms(norm)
    y = y if weight is None else y * channels(weight, x)
    y = y if bias is None else y + channels(bias, x)
    return y if getattr(norm, "tau", None) is None else torch.maximum(y, channels(norm.tau, x))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("spec", [*SPECS, *OPTIONS])
def test_scaled_and_shifted_they_are_the_output(spec, training):
    for norm, x in layers(spec):
        norm.train(training)
        before = copy.deepcopy(norm.state_dict())
        z = normalized(norm, x)
        assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
        assert norm.training is training and not z.requires_grad and z.shape == x.shape
        with torch.no_grad():
            torch.testing.assert_close(rebuilt(norm, x, z), norm(x), rtol=1e-4, atol=1e-5)


class _Doubled(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("norm", "evaluation", "training"),
    [
        (fbn_plugin.FilteredBatchNorm2d(8), RUNNING, BATCH),
        (nn.BatchNorm2d(8, track_running_stats=False), BATCH, BATCH),
        (nn.SyncBatchNorm(8), RUNNING, BATCH),
        (fbn_plugin.FrozenBatchNorm2d(8), RUNNING, RUNNING),
        (nn.InstanceNorm2d(8, track_running_stats=True), RUNNING, SAMPLE),
        (nn.GroupNorm(2, 8), SAMPLE, SAMPLE),
        (nn.RMSNorm(8), SAMPLE, SAMPLE),
        (_Doubled(8), None, None),
        (nn.Conv2d(8, 8, 1), None, None),
        (nn.LocalResponseNorm(2), None, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_by_which_moments(norm, evaluation, training):
    assert (moments_taken(norm.eval()), moments_taken(norm.train())) == (evaluation, training)
    if evaluation is None:
        with pytest.raises(ValueError, match=f"of a {type(norm).__name__} it is not known"):
            normalized(norm, torch.zeros(1, 8, 2, 2))


def test_what_a_norm_does_besides_is_left_out():
    """Activations that are fused into it, and timm's."""
    x = data(3, 5, 4)
    norm = fbn_plugin.FilteredBatchNorm2d(8).eval()
    fused = fbn_plugin.FilteredBatchNormAct2d(8, activation="silu").eval()
    assert torch.equal(normalized(fused, x), normalized(norm, x))
    layers = pytest.importorskip("timm.layers")
    fbn_plugin.register()
    try:
        groups = layers.GroupNormAct(8, 4)
        filtered = layers.get_norm_act_layer("fgn", "relu")(8, num_groups=4, t_sigma=2)
    finally:
        fbn_plugin.unregister()
    torch.testing.assert_close(normalized(groups, x), F.group_norm(x, 4))
    assert normalized(filtered, x).min() < -1
    torch.testing.assert_close(normalized(layers.LayerNormAct2d(8), x).mean(1), torch.zeros(3, 5, 4))
    torch.testing.assert_close(normalized(layers.BatchNormAct2d(8).eval(), x), normalized(norm, x))


def test_half_precision_and_a_compiled_or_hooked_norm():
    norm = nn.BatchNorm2d(8).eval()
    norm.register_forward_hook(lambda *_: 1 / 0)
    norm.compile(backend="eager")
    x = data(2, 3, 3).bfloat16()
    assert torch.equal(normalized(norm, x), x.float() / (1 + norm.eps) ** 0.5)


def test_moments_of_each_place_of_a_map():
    class PerActivation(nn.BatchNorm1d):
        description = fbn_plugin.NormDescription("BN", "channel")

        def forward(self, input):
            return super().forward(input.flatten(1)).view_as(input)

    norm = PerActivation(8 * 12)
    norm.running_mean.uniform_(), norm.running_var.uniform_(0.5, 1)
    x = data(5, 4, 3)
    torch.testing.assert_close(normalized(norm.eval(), x), norm(x).detach())


@pytest.mark.parametrize(
    ("layer", "shape", "dim"),
    [
        (nn.Conv2d(3, 8, 1), (2, 8, 4, 4), 1),
        (nn.Conv2d(3, 8, 1), (8, 4, 4), 0),
        (nn.Conv1d(3, 8, 1), (2, 8, 4), 1),
        (nn.Linear(3, 8), (2, 5, 8), 2),
        (nn.LayerNorm(8), (2, 8, 8), 2),
        (fbn_plugin.get_norm("LN", 8), (2, 8, 4, 4), 1),
        (nn.BatchNorm1d(8), (2, 8), 1),
        (nn.Identity(), (2,), 0),
    ],
)
def test_where_the_channels_are(layer, shape, dim):
    assert channel_dim(layer, torch.zeros(shape)) == dim


def test_a_synchronized_norm_takes_the_moments_of_all_processes(monkeypatch):
    group = SimulatedGroup(2)
    for module in (sync, sync_filtered_batch_norm, normalized_values):
        monkeypatch.setattr(module, "dist", group)
    x = data(4, 3, 3)
    layers = [fbn_plugin.SyncFilteredBatchNorm(8, t_sigma=2) for _ in range(2)]
    parts = group.run(lambda rank: normalized(layers[rank], x[2 * rank : 2 * rank + 2]))
    whole = normalized(fbn_plugin.FilteredBatchNorm2d(8, t_sigma=2), x)
    torch.testing.assert_close(torch.cat(parts), whole)
    assert layers[0].num_batches_tracked == 0 and layers[0].running_mean.eq(0).all()
