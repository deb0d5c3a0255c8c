"""Images that walk through a balanced batch: by a network whose answers are known, which the batch's moments change."""

import pytest
import torch
from torch import nn

from fbn_plugin.analysis.batch_structure import Walk, WalkStudy, choose_cast, study_walks, walk_through
from fbn_plugin.training.evaluation_modes import device_of


class Rules(nn.Module):
    """A network of figure 4: an image is a vector with its class and how sure it is of it. What is sure is its class;
    what is not is the first class that the batch's mean lacks."""

    def __init__(self, classes):
        super().__init__()
        self.norm = nn.BatchNorm1d(classes, affine=False)
        self.seen = []

    def forward(self, images):
        assert not self.training
        scores = images.flatten(1)
        normalized = self.norm(scores)  # by the batch's own moments: 0 in the mean
        assert normalized.mean(0).abs().max() < 1e-4
        self.seen.append(scores)
        sure = scores.max(dim=1).values > 0.5
        missing = (scores * sure[:, None]).sum(0).argmin()
        return torch.where(sure[:, None], scores, nn.functional.one_hot(missing, scores.shape[1]).float())


def image(label, sure, classes=5):
    return (0.9 if sure else 0.3) * nn.functional.one_hot(torch.tensor(label), classes).float()


COMPANY = torch.stack([image(number, True) for number in range(5)])


def test_a_weak_image_takes_the_missing_class():
    model = Rules(5).train()
    walk = walk_through(model, COMPANY, image(3, False)[None])
    assert model.training and model.norm.running_mean.abs().max() == 0
    assert walk.predictions.tolist() == [[0, 1, 2, 3, 4]] * 5 and walk.whole.tolist() == [0, 1, 2, 3, 4]
    assert walk.places.flatten().tolist() == list(range(5)) and walk.of_walkers.flatten().tolist() == list(range(5))
    assert (walk.took_missing, walk.company_kept, walk.took(3)) == (100, 100, 20)
    assert [batch[:, 3].tolist().count(pytest.approx(0.3)) for batch in model.seen] == [1] * 5 + [0]
    torch.testing.assert_close(model.seen[-1], COMPANY)


def test_a_strong_image_keeps_its_class():
    walk = walk_through(Rules(5), COMPANY, image(3, True)[None])
    assert walk.of_walkers.flatten().tolist() == [3] * 5
    assert (walk.took(3), walk.took_missing, walk.company_kept) == (100, 20, 100)
    figure = walk.as_json()
    assert figure["rows"][0] == [3, 0, 0, 0, 0, 0] and figure["rows"][4] == [4, 4, 4, 4, 3, 4]
    assert figure["walkers_at"] == [[0], [1], [2], [3], [4]]


def test_two_images_walk_side_by_side_and_around_the_end():
    walk = walk_through(Rules(5), COMPANY, torch.stack([image(3, False), image(1, False)]))
    assert walk.places.tolist() == [[0, 1], [1, 2], [2, 3], [3, 4], [4, 0]]
    assert walk.of_walkers.tolist() == [[0, 0], [1, 1], [2, 2], [3, 3], [0, 0]]  # one of the two missing classes
    assert (walk.took_missing, walk.company_kept) == (100, 100)


def test_as_many_walkers_as_classes_are_refused():
    for walkers in (COMPANY, COMPANY[:0]):
        with pytest.raises(ValueError, match=f"walkers must be from 1 to 4 images.*got {len(walkers)}"):
            walk_through(Rules(5), COMPANY, walkers)


def test_who_plays():
    """Images 0-5; class 2 is recognized once, image 4 never."""
    labels = [0, 0, 1, 1, 1, 2]
    probabilities = torch.tensor(
        [[0.7, 0.2, 0.1], [0.9, 0.1, 0.0], [0.1, 0.6, 0.3], [0.1, 0.8, 0.1], [0.5, 0.4, 0.1], [0.2, 0.3, 0.5]]
    )
    cast = choose_cast(probabilities, labels, count=5)
    assert (cast.company, cast.strong, cast.weak) == ((1, 3, 5), (0, 2), (4,))
    assert choose_cast(probabilities, labels).strong == (0,)
    with pytest.raises(ValueError, match="class 2 has no image that is recognized"):
        choose_cast(probabilities[:5], labels[:5])
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        choose_cast(probabilities, labels, 0)
    wrong = torch.eye(3)[[1] * 50 + [0, 1, 2]]
    drawn = [choose_cast(wrong, [0] * 51 + [1, 2], 4, seed).weak for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 4


def test_the_three_runs_of_figure_4():
    images = torch.cat([COMPANY, torch.stack([image(4, True), image(2, False), image(1, False), image(0, False)])])
    labels = [0, 1, 2, 3, 4, 4, 2, 1, 0]
    model = Rules(5)
    cast = choose_cast(images - 0.01 * torch.arange(9)[:, None], labels)  # unlike, so that the order is known
    weak = type(cast)(cast.company, cast.strong, (6, 7, 8))
    study = study_walks(model, lambda chosen: images[list(chosen)], weak, labels)
    assert (len(study.weak), len(study.strong), len(study.pairs)) == (3, 1, 1)
    assert study.figures() == {"weak_missing": 100, "strong_own": 100, "pair_missing": 100, "company_kept": 100}
    assert list(study.as_json()) == ["weak", "strong", "pairs"]
    nothing = WalkStudy((), (), (), ())
    assert nothing.figures() == {} and device_of(model) == torch.device("cpu")


def test_the_company_may_be_disturbed():
    walk = Walk(torch.tensor([[2, 1, 1], [0, 0, 2], [0, 1, 2]]), torch.tensor([[0], [1], [2]]), torch.tensor([0, 1, 2]))
    assert walk.company_kept == pytest.approx(100 * 5 / 6) and walk.took_missing == pytest.approx(100 / 3)
