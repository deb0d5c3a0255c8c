"""Processes and accumulation steps: the images of an update, their losses, and what the update makes of the weights,
are the same however they are shared out, in float64."""

import pytest
import torch
from processes import run_processes
from test_step import CPU, config, training_step

from fbn_plugin.engine.classification.data import build_train_loader
from fbn_plugin.engine.data.image_data import load_image_data

SHARED = {"SOLVER__IMS_PER_BATCH": 32, "SOLVER__WARMUP_EPOCHS": 0, "DATALOADER__NUM_WORKERS": 0}


def train(norm: str, steps: int = 1, **overrides) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of three iterations, and the weights behind them; on the processes that there are."""
    cfg = config(
        "Digits/lenet5_convs_BN.yaml", MODEL__NORM=norm, SOLVER__ACCUMULATION_STEPS=steps, **SHARED, **overrides
    )
    data = load_image_data("digits", mode="L").train
    step = training_step(cfg, dtype=torch.float64)
    batches = ((images.double(), targets) for images, targets in build_train_loader(cfg, data, CPU))
    losses = [step(iteration, batches)[0]["total_loss"] for iteration in range(3)]
    return losses, {name: parameter.detach() for name, parameter in step.model.named_parameters()}


def assert_same(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-10, abs=0) and len(set(one[0])) == 3
    for name, value in one[1].items():
        torch.testing.assert_close(value, other[1][name], rtol=1e-8, atol=1e-12, msg=name)


def on_processes(count, folder, *args, **overrides):
    """What each of ``count`` processes has in the end, which must be the same for all."""
    each = run_processes(lambda rank: train(*args, **overrides), count, folder)
    for other in each[1:]:
        assert_same(each[0], other)
    return each[0]


@pytest.mark.parametrize("count", [2, 4])
def test_synchronized_norms_train_as_one_process_with_all_images(count, tmp_path):
    assert_same(on_processes(count, tmp_path, "SyncFBN(t_sigma=1.5)"), train("FBN(t_sigma=1.5)"))


def test_accumulation_steps_are_as_many_processes(tmp_path):
    """The same images in the moments of every norm, and the same updates; fewer images are another training."""
    expected = train("FBN(t_sigma=1.5)", steps=4)
    for count in (2, 4):
        (tmp_path / str(count)).mkdir()
        assert_same(on_processes(count, tmp_path / str(count), "FBN(t_sigma=1.5)", steps=4 // count), expected)
    assert train("FBN(t_sigma=1.5)")[0][0] != pytest.approx(expected[0][0], rel=1e-6)


def test_what_is_drawn_is_drawn_as_on_many_processes(tmp_path):
    """Dropout, mixup and the augmentation of each image."""
    random = {"MODEL__DROP_RATE": 0.3, "INPUT__MIXUP": 0.4, "INPUT__TRAIN_CROP": "padded", "INPUT__HFLIP": 0.5}
    assert_same(on_processes(2, tmp_path, "FBN", **random), train("FBN", steps=2, **random))


def test_without_batch_norm_accumulation_is_a_large_batch():
    assert_same(train("GN(num_groups=2)", steps=4), train("GN(num_groups=2)"))


def test_balanced_batches_of_several_steps():
    cfg = config(SOLVER__ACCUMULATION_STEPS=2, SOLVER__IMS_PER_BATCH=20, DATALOADER__IMAGES_PER_CLASS=1)
    data = load_image_data("digits", mode="L").train
    batches = build_train_loader(cfg, data, CPU)
    first = [next(batches) for _ in range(6)]
    assert all(sorted(targets.tolist()) == list(range(10)) for _, targets in first)
    later = build_train_loader(cfg, data, CPU, start=2)
    assert all(map(torch.equal, next(later), first[4]))
