"""How a network that was trained on balanced batches uses their structure: images that walk through a balanced batch.

Source: Hajaj and Gillies, "Batch Normalization and the impact of batch structure on the behavior of deep convolution
networks" (2018), section 4 and figure 4. The batch is put together by true labels, so what it shows is *conditional*:
it says what the network does that knows the batch's structure, not what it does with unlabelled images. The paper's
other evaluations of this kind are :func:`fbn_plugin.evaluate_balanced` (tables 2, 3, 5) and
:func:`fbn_plugin.self_label` (figure 6).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fbn_plugin.training.evaluation_modes import batch_moments, device_of, evaluation_mode

__all__ = ["Cast", "Walk", "WalkStudy", "choose_cast", "study_walks", "walk_through"]


@dataclass(frozen=True)
class Cast:
    """The images of the experiment, by their index in a set.

    Args:
        company: of each class the image that is recognized with the highest confidence (K), in the order of the
            classes: a balanced batch.
        strong: images that are recognized with high confidence, the highest first.
        weak: images that are not recognized.
    """

    company: tuple[int, ...]
    strong: tuple[int, ...]
    weak: tuple[int, ...]


def choose_cast(probabilities: Tensor, labels: Sequence[int], count: int = 1, seed: int = 0) -> Cast:
    """Choose a confident balanced batch, and images to walk through it, by what standard inference says.

    Args:
        probabilities: of the classes (N, K), by population statistics.
        labels: the true classes (N).
        count: strong images, and weak ones, that are wanted; there may be fewer.
        seed: of the choice among the images that are not recognized. The paper selects one.

    Raises:
        ValueError: ``count`` is below 1, or a class has no image that is recognized.

    Examples::

        >>> probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
        >>> choose_cast(probabilities, [0, 0, 1, 1])
        Cast(company=(0, 2), strong=(1,), weak=(3,))
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    labels = torch.as_tensor(labels)
    confidence, predicted = probabilities.max(dim=1)
    right = (predicted == labels).nonzero().flatten()
    order = right[confidence[right].argsort(descending=True, stable=True)].tolist()
    company = {}
    for index in order:
        company.setdefault(int(labels[index]), index)
    classes = probabilities.shape[1]
    if missing := sorted(set(range(classes)) - set(company)):
        raise ValueError(f"class {missing[0]} has no image that is recognized: a confident batch needs one of each")
    chosen = set(company.values())
    wrong = (predicted != labels).nonzero().flatten().numpy()
    weak = np.random.default_rng(seed).permutation(wrong)[:count]
    strong = [index for index in order if index not in chosen][:count]
    return Cast(tuple(company[number] for number in range(classes)), tuple(strong), tuple(weak.tolist()))


@dataclass(frozen=True)
class Walk:
    """What is predicted while one image or several walk through a balanced batch.

    Args:
        predictions: classes (K, K): of each step, a row, those of the images in the batch's K places.
        places: those where the walkers are in each step (K, M).
        whole: classes that are predicted for the batch without walkers (K).
    """

    predictions: Tensor
    places: Tensor
    whole: Tensor

    @property
    def of_walkers(self) -> Tensor:
        """The classes that are predicted for the walkers in each step (K, M)."""
        return self.predictions.gather(1, self.places)

    @property
    def took_missing(self) -> float:
        """Share of the walkers' predictions that are a class whose image they have replaced, in percent."""
        found = (self.of_walkers[:, :, None] == self.places[:, None, :]).any(dim=2)
        return 100 * found.double().mean().item()

    def took(self, label: int) -> float:
        """Share of the walkers' predictions that are one class, in percent."""
        return 100 * (self.of_walkers == label).double().mean().item()

    @property
    def company_kept(self) -> float:
        """Share of the predictions for the others that are their true class, in percent."""
        classes = torch.arange(len(self.whole))
        others = torch.ones_like(self.predictions, dtype=torch.bool).scatter_(1, self.places, False)
        return 100 * (self.predictions == classes)[others].double().mean().item()

    def as_json(self) -> dict[str, list]:
        """Lists of numbers, as figure 4 has them: a row for each place, a column for each step, the last one of the
        batch without walkers."""
        columns = torch.cat([self.predictions, self.whole[None]])
        return {"rows": columns.T.tolist(), "walkers_at": self.places.tolist()}


@torch.no_grad()
def walk_through(model: nn.Module, company: Tensor, walkers: Tensor) -> Walk:
    """Let images walk through a balanced batch: in each step they replace as many neighbouring images of it, and all
    are classified by the moments of that batch.

    Args:
        model: images (K, ...) to logits (K, classes); run on its own device in evaluation mode, left as it was.
        company: one image of each class, in the order of the classes (K, ...).
        walkers: images (M, ...), fewer than K. In step s they are in the places s, s + 1, ..., behind the last place
            those from the first on.

    Raises:
        ValueError: no walker, or no fewer walkers than classes.

    Examples::

        >>> layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        >>> walk = walk_through(nn.Sequential(*layers), torch.randn(4, 3, 8, 8), torch.randn(1, 3, 8, 8))
        >>> walk.predictions.shape, walk.places.flatten().tolist()
        (torch.Size([4, 4]), [0, 1, 2, 3])
    """
    size, count = len(company), len(walkers)
    if not 1 <= count < size:
        raise ValueError(f"walkers must be from 1 to {size - 1} images, fewer than there are classes, got {count}")
    places = (torch.arange(size)[:, None] + torch.arange(count)) % size
    device, found = device_of(model), []
    with evaluation_mode(model), batch_moments(model):
        for step in (*places, None):
            batch = company.clone()
            if step is not None:
                batch[step] = walkers
            found.append(model(batch.to(device)).argmax(dim=1).cpu())
    return Walk(torch.stack(found[:-1]), places, found[-1])


@dataclass(frozen=True)
class WalkStudy:
    """The three runs of figure 4, each with several images.

    Args:
        weak: of images that standard inference does not recognize, each alone.
        strong: of images that it is sure of, each alone.
        pairs: of two images each that it does not recognize.
        strong_labels: the true class of each of ``strong``.
    """

    weak: tuple[Walk, ...]
    strong: tuple[Walk, ...]
    pairs: tuple[Walk, ...]
    strong_labels: tuple[int, ...]

    def figures(self) -> dict[str, float]:
        """Means over the images, in percent: ``weak_missing`` and ``pair_missing``, how often a weak image is taken for
        a class that is missing in the batch; ``strong_own``, how often a strong one is taken for its own;
        ``company_kept``, how often the others are. What has no image is left out."""
        own = [walk.took(label) for walk, label in zip(self.strong, self.strong_labels)]
        found = {
            "weak_missing": [walk.took_missing for walk in self.weak],
            "strong_own": own,
            "pair_missing": [walk.took_missing for walk in self.pairs],
            "company_kept": [walk.company_kept for walk in (*self.weak, *self.strong, *self.pairs)],
        }
        return {name: float(np.mean(values)) for name, values in found.items() if values}

    def as_json(self) -> dict[str, list]:
        """All walks, see :meth:`Walk.as_json`."""
        named = {"weak": self.weak, "strong": self.strong, "pairs": self.pairs}
        return {name: [walk.as_json() for walk in walks] for name, walks in named.items()}


def study_walks(
    model: nn.Module, images: Callable[[Sequence[int]], Tensor], cast: Cast, labels: Sequence[int]
) -> WalkStudy:
    """Let each weak image, each strong image and each two neighbouring weak ones of a cast walk through its company
    (Hajaj and Gillies 2018, figure 4). The results are *conditional*.

    Args:
        model: see :func:`walk_through`.
        images: indices to images as the model gets them (M, ...).
        cast: see :func:`choose_cast`.
        labels: the true classes of the set (N).
    """
    company = images(cast.company)

    def walks(groups: Sequence[Sequence[int]]) -> tuple[Walk, ...]:
        return tuple(walk_through(model, company, images(group)) for group in groups if len(group) < len(company))

    pairs = list(zip(cast.weak[::2], cast.weak[1::2]))
    strong_labels = tuple(int(labels[index]) for index in cast.strong)
    return WalkStudy(
        walks([[index] for index in cast.weak]), walks([[index] for index in cast.strong]), walks(pairs), strong_labels
    )
