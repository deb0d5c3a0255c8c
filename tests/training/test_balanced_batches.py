"""Balanced batches: laws of the sampler, evaluation in them, and what is marked as conditional."""

import copy
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from fbn_plugin import BalancedBatchSampler, evaluate_balanced, self_label

counts = st.lists(st.integers(1, 9), min_size=1, max_size=5)
seeds = st.integers(0, 2**40)


def flat(batches):
    return [index for batch in batches for index in batch]


def labels_with(counts, seed=0):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


@given(counts, st.integers(1, 3), st.sampled_from(["drop", "cycle"]), st.booleans(), seeds, st.integers(1, 3))
def test_every_batch_of_every_rank_is_balanced(counts, k, uneven, shuffle, seed, replicas):
    labels, step = labels_with(counts, seed), k * replicas
    if uneven == "drop" and min(counts) < step:
        with pytest.raises(ValueError, match=f"class {np.argmin(counts)} .*{min(counts)} images.*{step}"):
            BalancedBatchSampler(labels, k, uneven, num_replicas=replicas, rank=0)
        return
    length = min(counts) // step if uneven == "drop" else -(-max(counts) // step)
    seen = Counter()
    for rank in range(replicas):
        sampler = BalancedBatchSampler(labels, k, uneven, shuffle, seed, replicas, rank)
        batches = list(sampler)
        assert len(sampler) == len(batches) == length and batches == list(sampler)
        for batch in batches:
            assert len(batch) == sampler.batch_size and (np.bincount(labels[batch]) == k).all()
        seen.update(flat(batches))
    if uneven == "drop":
        assert set(seen.values()) == {1}
    else:
        assert set(seen) == set(range(len(labels)))
        for label, count in enumerate(counts):  # an image is used again only once all of its class have been
            uses = [seen[index] for index in np.flatnonzero(labels == label)]
            assert sum(uses) == length * step and max(uses) - min(uses) <= 1, count


def test_order_companions_and_places_change_with_the_epoch_and_the_seed():
    labels = labels_with([40] * 5)
    sampler = BalancedBatchSampler(labels)
    first = list(sampler)
    sampler.set_epoch(1)
    second, other_seed = list(sampler), list(BalancedBatchSampler(labels, seed=1))
    for other in (second, other_seed):
        assert sorted(map(sorted, other)) != sorted(map(sorted, first))
        assert sorted(flat(other)) == sorted(flat(first))
    assert len({tuple(labels[batch]) for batch in first}) > 10  # the classes do not keep their places
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_dropped_images_differ_from_epoch_to_epoch():
    sampler, seen = BalancedBatchSampler([0, 0, 1] * 4), set()
    for epoch in range(20):
        sampler.set_epoch(epoch)
        seen.update(flat(sampler))
    assert seen == set(range(12))


def test_unshuffled_batches_follow_the_dataset():
    assert list(BalancedBatchSampler([1, 0, 1, 0, 1], shuffle=False)) == [[1, 0], [3, 2]]
    assert list(BalancedBatchSampler([1, 0, 1, 0, 1], shuffle=False, uneven="cycle")) == [[1, 0], [3, 2], [1, 4]]


def test_the_order_depends_on_no_state_of_the_process():
    sampler, orders = BalancedBatchSampler([0, 1, 2] * 20, seed=5), []
    for state in (1, 2):
        np.random.seed(state), torch.manual_seed(state)
        before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        orders += [list(sampler), list(copy.deepcopy(sampler)), list(pickle.loads(pickle.dumps(sampler)))]
        assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert all(order == orders[0] for order in orders)


def test_batches_are_made_in_chunks_without_a_seam(monkeypatch):
    labels = labels_with([50] * 4)
    whole = list(BalancedBatchSampler(labels, shuffle=False))
    monkeypatch.setattr("fbn_plugin.training.balanced_batches._CHUNK", 9)
    assert list(BalancedBatchSampler(labels, shuffle=False)) == whole
    assert sorted(flat(BalancedBatchSampler(labels))) == list(range(200))


class Pictures(Dataset):
    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.tensor(index), self.targets[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_data_loader_from_a_dataset_a_subset_or_a_tensor(workers):
    dataset = Pictures([0, 0, 1, 1, 0, 1])
    sampler = BalancedBatchSampler(dataset)
    for indices, (images, targets) in zip(sampler, DataLoader(dataset, batch_sampler=sampler, num_workers=workers)):
        assert images.tolist() == indices and sorted(targets.tolist()) == [0, 1]
    assert list(BalancedBatchSampler(torch.tensor(dataset.targets))) == list(sampler)
    assert list(BalancedBatchSampler(Subset(dataset, [5, 0]), shuffle=False)) == [[1, 0]]


def test_processes_are_those_of_torch_distributed(monkeypatch):
    for name, value in {"is_initialized": True, "get_world_size": 4, "get_rank": 3}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    sampler = BalancedBatchSampler([0, 1] * 8)
    assert (sampler.num_replicas, sampler.rank, len(sampler)) == (4, 3, 2)


@pytest.mark.parametrize(
    "labels, options, message",
    [
        ([], {}, r"one class index for each image, got an array of shape \(0,\)"),
        ([[0, 1]], {}, r"one class index for each image, got an array of shape \(1, 2\)"),
        ([0.0, 1.0], {}, "labels must be integers, got float64"),
        ([0, 1, -1], {}, "must not be negative, got -1 at position 2"),
        ([0, 2, 2], {}, "class 1 has no image"),
        ([0, 1], {"num_classes": 3}, "class 2 has no image"),
        ([0, 1, 2], {"num_classes": 2}, "num_classes 2.*2"),
        ([0, 10**15], {}, "2 labels .*1000000000000000"),
        (Pictures([0, 1]), {}, "6 images.*2 targets"),
        (TensorDataset(torch.zeros(2)), {}, "TensorDataset .*'targets'.*'labels'"),
        ([0, 1], {"images_per_class": 0}, "images_per_class .*integer.*1.*0"),
        ([0, 1], {"images_per_class": 1.5}, "images_per_class .*integer.*1.*1.5"),
        ([0, 1], {"seed": -1}, "seed .*integer.*0.*-1"),
        ([0, 1], {"num_replicas": 2, "rank": 2}, "rank .*num_replicas 2.*2"),
        ([0, 1], {"uneven": "repeat"}, "uneven .*'drop'.*'cycle'.*'repeat'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_gets_one_sentence(labels, options, message):
    with pytest.raises(ValueError, match=message) as error:
        BalancedBatchSampler(labels, **options)
    assert "\n" not in str(error.value)


class Guesser(nn.Module):
    """Knows an image by its pixels, and one without any by the class that its batch lacks: by the batch's own moments
    it is half a deviation below the mean of every class but that one."""

    def __init__(self, classes=5):
        super().__init__()
        self.norm = nn.BatchNorm1d(classes, affine=False)

    def forward(self, x):
        weak = x.sum(1, keepdim=True) == 0
        return torch.where(weak, self.norm(x), x)


class OneHot(Dataset):
    """Images that are their class, but for ``weak`` ones, which show nothing."""

    def __init__(self, targets, weak=(), classes=5):
        self.targets = targets
        self.images = nn.functional.one_hot(torch.tensor(targets), classes).float()
        self.images[list(weak)] = 0

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.images[index], self.targets[index]


TARGETS = labels_with([4, 4, 4, 4, 4], seed=3).tolist()


def test_balanced_evaluation_in_dataset_order_says_conditional():
    model = Guesser().train()
    result = evaluate_balanced(model, OneHot(TARGETS))
    assert result.predictions.tolist() == TARGETS and result.accuracy == 100
    assert result.conditional
    assert str(result) == "accuracy 100.00 % (conditional: the test labels balanced the batches)"
    assert model.training and model.norm.training and model.norm.num_batches_tracked == 0


def test_a_weak_image_takes_the_missing_class():
    model, weak = Guesser(), TARGETS.index(3)
    dataset = OneHot(TARGETS, [weak])
    assert model.eval()(dataset.images)[weak].argmax() == 0  # by the population's moments
    assert evaluate_balanced(model, dataset).predictions.tolist() == TARGETS


def test_every_image_of_uneven_classes_is_predicted():
    targets = labels_with([1, 3, 7, 2, 5], seed=1).tolist()
    for k in (1, 2):
        result = evaluate_balanced(Guesser(), OneHot(targets), images_per_class=k)
        assert result.predictions.tolist() == targets


class Spy(nn.Module):
    """Notes which images come together, and is always right."""

    def __init__(self):
        super().__init__()
        self.companies = []

    def forward(self, x):
        numbers = x.argmax(1).tolist()
        self.companies.append(frozenset(numbers))
        return nn.functional.one_hot(torch.tensor([TARGETS[number] for number in numbers]), 5).float()


@pytest.mark.parametrize("spread", [True, False])
def test_the_crops_of_an_image_are_spread_over_different_batches(spread):
    crops = [OneHot(range(20), classes=20) for _ in range(3)]  # here an image's number, not its class
    model = Spy()
    evaluate_balanced(model, crops, TARGETS, spread_crops=spread)
    first, second, third = (set(model.companies[start : start + 4]) for start in (0, 4, 8))
    assert (first == second == third) != spread
    assert not spread or (first != second and second != third)


def test_probabilities_are_averaged_over_crops():
    crops = [TensorDataset(torch.tensor([[a, b], [0.0, 1.0]])) for a, b in ((9.0, 0.0), (0.0, 4.0), (0.0, 4.0))]
    assert evaluate_balanced(nn.Identity(), crops[:1], [0, 1]).predictions.tolist() == [0, 1]
    assert evaluate_balanced(nn.Identity(), crops, [0, 1]).predictions.tolist() == [1, 1]


def test_the_first_prediction_of_a_repeated_image_counts():
    class Moody(nn.Module):
        sign = 1

        def forward(self, x):
            self.sign, sign = -1, self.sign
            return sign * x

    result = evaluate_balanced(Moody(), OneHot([0, 1, 1, 1], classes=2))  # image 0 is in all three batches
    assert result.predictions[0] == 0 and sorted(result.predictions[1:].tolist()) == [0, 0, 1]


def test_labels_of_the_wrong_length():
    model, dataset = Guesser(), OneHot(TARGETS)
    with pytest.raises(ValueError, match="20 images.*19 labels"):
        evaluate_balanced(model, dataset, TARGETS[:19])
    with pytest.raises(ValueError, match="20 images.*19 labels"):
        self_label(model, dataset, TARGETS[:19])
    with pytest.raises(ValueError, match=r"20 predictions.*\(19,\)"):
        self_label(model, dataset, TARGETS, labels=TARGETS[:19])
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        self_label(model, dataset, TARGETS, rounds=0)


def test_self_labelling_relabels_and_rebalances():
    dataset, model = OneHot(range(20), classes=20), Spy()
    start = torch.tensor(TARGETS)
    start[start == 4] = 3  # no image is predicted to be of class 4
    results = self_label(model, dataset, start, rounds=3, labels=TARGETS)
    assert len(results) == 3 and all(r.accuracy == 100 and not r.conditional for r in results)
    assert str(results[0]) == "accuracy 100.00 %"
    # The first round is balanced by the four classes of `start`, one of which has eight images.
    rounds = model.companies[:8], model.companies[8:12], model.companies[12:]
    for companies, labels in zip(rounds, (start.tolist(), TARGETS, TARGETS)):
        assert all(sorted(labels[number] for number in company) == sorted(set(labels)) for company in companies)
    assert len(rounds[2]) == 4 and set(rounds[1]) != set(rounds[2])
    unmeasured = self_label(model, dataset, start, rounds=1)[0]
    assert unmeasured.accuracy is None and str(unmeasured) == "accuracy not measured"
