"""The loss landscape at a step of training: how loss and gradient change on the same batch when the weights move along
the gradient.

Source: Horváth and Al-afandi, "Filtered Batch Normalization" (2020), Fig. 7 and 11, after Santurkar, Tsipras, Ilyas and
Madry, "How Does Batch Normalization Help Optimization?" (2018), Fig. 4. What the papers leave open stands in
docs/landscape.md.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fbn_plugin.analysis.state import buffers_kept

__all__ = ["STEPS", "Landscape", "measure_landscape"]

# The step sizes of the paper's figures.
STEPS = (0.02, 0.01, 0.005, 0.001)


@dataclass(frozen=True)
class Landscape:
    """Loss and gradient along the gradient g, from weights w to ``w - step * g``.

    Args:
        steps: the step sizes.
        loss: at w.
        gradient_norm: the Euclidean norm of g, over all parameters together.
        losses: at each step size.
        changes: Euclidean distance of the gradient at each step size from g.

    Examples::

        >>> from fbn_plugin.analysis.landscape import Landscape
        >>> line = Landscape((0.25, 0.5), loss=1.0, gradient_norm=2.0, losses=(0.7, 0.6), changes=(0.5, 3.0))
        >>> line.loss_range
        (0.6, 1.0)
        >>> line.smoothness
        3.0
    """

    steps: tuple[float, ...]
    loss: float
    gradient_norm: float
    losses: tuple[float, ...]
    changes: tuple[float, ...]

    @property
    def loss_range(self) -> tuple[float, float]:
        """The least and the greatest loss, that at w included; NaN if one is not finite."""
        return _range((self.loss, *self.losses))

    @property
    def change_range(self) -> tuple[float, float]:
        """The least and the greatest change of the gradient over the steps; w itself, where it is 0, left out."""
        return _range(self.changes)

    @property
    def smoothness(self) -> float:
        """The effective beta-smoothness: the greatest change of the gradient in proportion to the way,
        ``max |g(step) - g| / |step g|``; NaN where the gradient is 0."""
        if not self.gradient_norm:
            return math.nan
        return _range([change / (step * self.gradient_norm) for step, change in zip(self.steps, self.changes)])[1]

    def figures(self) -> dict[str, float]:
        """What a run records: ``loss``, ``loss_min``, ``loss_max``, ``loss_range``, ``gradient_norm``,
        ``gradient_min`` and ``gradient_max`` (of the change) and ``smoothness``; NaN for what is not finite."""
        low, high = self.loss_range
        least, most = self.change_range
        figures = {"loss": self.loss, "loss_min": low, "loss_max": high, "loss_range": high - low}
        figures |= {"gradient_norm": self.gradient_norm, "gradient_min": least, "gradient_max": most}
        figures["smoothness"] = self.smoothness
        return {name: value if math.isfinite(value) else math.nan for name, value in figures.items()}


def _range(values: Sequence[float]) -> tuple[float, float]:
    return (min(values), max(values)) if all(map(math.isfinite, values)) else (math.nan, math.nan)


def measure_landscape(model: nn.Module, loss: Callable[[], Tensor], steps: Sequence[float] = STEPS) -> Landscape:
    """Move the weights of a model along the gradient of its loss and measure loss and gradient on the way.

    For each step size the weights w become ``w - step * g``, as an update by gradient descent with that learning rate
    would make them; g is the gradient at w. It takes a forward and a backward pass for each step size and one for w.
    Behind it the model is what it was: parameters and buffers, such as running statistics, have their bits, and no
    ``grad`` has changed. The buffers are put back between the passes, too, so that each starts from the same.

    Args:
        model: in the mode that the loss is to be of: training mode for the loss that a norm's batch has a part in. All
            parameters that need a gradient move.
        loss: computes it, a scalar with a graph, always on the same batch. Where it draws random numbers, as dropout
            does, it seeds them.
        steps: step sizes above 0.

    Raises:
        ValueError: no step size, one that is not above 0, or no parameter needs a gradient.

    Examples::

        >>> from fbn_plugin.analysis.landscape import measure_landscape
        >>> bowl = nn.ParameterList([torch.tensor([3.0, 4.0])])  # loss 2 |w|^2, gradient 4 w
        >>> found = measure_landscape(bowl, lambda: 2 * bowl[0].square().sum(), steps=(0.25, 0.5))
        >>> found.loss, found.losses, found.gradient_norm, found.changes, found.smoothness
        (50.0, (0.0, 50.0), 20.0, (20.0, 40.0), 4.0)
    """
    steps = tuple(steps)
    if not steps or not all(0 < step < math.inf for step in steps):
        raise ValueError(f"steps must be step sizes above 0, one or more, got {steps}")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError(f"no parameter of the {type(model).__name__} needs a gradient")
    start = [parameter.detach().clone() for parameter in parameters]
    with torch.enable_grad():
        value, gradient = _loss_and_gradient(model, loss, parameters)
        losses, changes = [], []
        try:
            for step in steps:
                _move(parameters, [torch.sub(w, g, alpha=step) for w, g in zip(start, gradient)])
                moved, other = _loss_and_gradient(model, loss, parameters)
                losses.append(moved)
                changes.append(_norm([a - b for a, b in zip(other, gradient)]))
        finally:
            _move(parameters, start)
    return Landscape(steps, value, _norm(gradient), tuple(losses), tuple(changes))


def _loss_and_gradient(
    model: nn.Module, loss: Callable[[], Tensor], parameters: Sequence[Tensor]
) -> tuple[float, list[Tensor]]:
    with buffers_kept(model):
        value = loss()
        gradient = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    return value.item(), list(gradient)


@torch.no_grad()
def _move(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values):
        parameter.copy_(value)


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))
