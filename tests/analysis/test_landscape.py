"""The loss landscape: known answers on a bowl and on a linear model, and a model that is left as it was."""

import math

import pytest
import torch
from torch import nn

import fbn_plugin
from fbn_plugin.analysis.landscape import measure_landscape

STEPS = (0.02, 0.01, 0.005, 0.001)


class Bowl(nn.Module):
    """The loss w'Aw / 2 in float64, whose gradient is Aw."""

    def __init__(self, curvatures, start):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        self.curvatures = torch.tensor(curvatures, dtype=torch.float64)

    def forward(self):
        return (self.curvatures * self.w.square()).sum() / 2


def test_bowl():
    """Along its gradient g the loss is L - s g'g + s^2/2 g'Ag and the gradient changes by s |Ag|."""
    bowl = Bowl([3.0, 150.0, 0.5], [2.0, -1.0, 4.0])
    a, g = bowl.curvatures, bowl.curvatures * bowl.w.detach()
    found = measure_landscape(bowl, bowl, STEPS)
    losses = [(bowl().item() - s * g @ g + s**2 / 2 * g @ (a * g)).item() for s in STEPS]
    changes = [s * (a * g).norm().item() for s in STEPS]
    assert found.loss == bowl().item() and found.gradient_norm == pytest.approx(g.norm().item())
    assert found.losses == pytest.approx(losses) and found.changes == pytest.approx(changes)
    # The largest step goes beyond the far side of the bowl: the loss grows there, and that at w is inside of the range.
    assert losses[0] > found.loss > losses[-1]
    figures = found.figures()
    assert figures["loss_min"] == pytest.approx(min(losses)) and figures["loss_max"] == pytest.approx(losses[0])
    assert figures["loss_range"] == pytest.approx(losses[0] - min(losses))
    assert (figures["gradient_min"], figures["gradient_max"]) == pytest.approx((changes[-1], changes[0]))
    assert figures["smoothness"] == pytest.approx(((a * g).norm() / g.norm()).item())


def test_round_bowl_has_its_curvature_as_smoothness():
    assert measure_landscape(bowl := Bowl([7.0, 7.0], [1.0, 2.0]), bowl).smoothness == pytest.approx(7.0)


def test_linear_model():
    """The gradient is the same everywhere, and the loss falls by step |g|^2; that at w is the greatest."""
    model = nn.Linear(4, 1).double()
    x = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, 1.0, -1.0]], dtype=torch.float64)
    found = measure_landscape(model, lambda: model(x).sum(), STEPS)
    squared = x.sum(0).square().sum().item() + 4  # the bias has the gradient 2
    assert found.changes == (0.0, 0.0, 0.0, 0.0) and found.smoothness == 0
    assert found.losses == pytest.approx([found.loss - s * squared for s in STEPS])
    assert found.loss_range == pytest.approx((found.loss - 0.02 * squared, found.loss))


def test_the_model_stays_as_it_was():
    """Weights and running statistics keep their bits, gradients are left alone, frozen parameters do not move."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), fbn_plugin.FilteredBatchNorm2d(4, t_sigma=2.0), nn.Flatten())
    model.append(nn.Linear(4 * 36, 3))
    model[0].weight.requires_grad_(False)
    unused = nn.Parameter(torch.ones(2))
    model.register_parameter("unused", unused)
    model[3].weight.grad = torch.full_like(model[3].weight, 5.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, targets = torch.randn(8, 1, 8, 8), torch.arange(8) % 3
    seen = []

    def loss():
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return nn.functional.cross_entropy(model(images), targets)

    with torch.no_grad():  # it takes gradients all the same
        found = measure_landscape(model, loss, (0.1, 0.2))
    assert found.gradient_norm > 0 and all(change > 0 for change in found.changes)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert bool((model[3].weight.grad == 5).all()) and model[3].bias.grad is None
    for state in seen:
        assert torch.equal(state["1.running_mean"], before["1.running_mean"])
        assert torch.equal(state["0.weight"], before["0.weight"])
    assert not torch.equal(seen[1]["3.weight"], before["3.weight"])


def test_the_model_stays_as_it_was_behind_an_error():
    bowl = Bowl([1.0], [2.0])

    def loss():
        if bowl.w.item() != 2:
            raise RuntimeError("broken off")
        return bowl()

    with pytest.raises(RuntimeError, match="broken off"):
        measure_landscape(bowl, loss)
    assert bowl.w.item() == 2


def test_a_loss_that_is_not_finite_is_no_range():
    class Cliff(Bowl):
        def forward(self):
            return -self.w.sum().log() if self.w.sum() < 2.5 else (self.w * math.inf).sum()

    figures = measure_landscape(cliff := Cliff([1.0], [2.0]), cliff, (0.1, 2.0)).figures()
    assert figures["loss"] == pytest.approx(-math.log(2))
    names = ("loss_min", "loss_max", "loss_range", "gradient_max", "smoothness")
    assert all(math.isnan(figures[name]) for name in names)
    assert math.isnan(measure_landscape(flat := Bowl([0.0], [2.0]), flat).figures()["smoothness"])


@pytest.mark.parametrize("steps", [(), (0.0,), (0.1, -1.0), (math.inf,), (math.nan,)])
def test_refuses_what_is_no_step(steps):
    bowl = Bowl([1.0], [2.0])
    with pytest.raises(ValueError, match="steps must be step sizes above 0"):
        measure_landscape(bowl, bowl, steps)


def test_refuses_a_model_without_weights():
    with pytest.raises(ValueError, match="no parameter of the ReLU needs a gradient"):
        measure_landscape(nn.ReLU(), lambda: torch.tensor(0.0))
