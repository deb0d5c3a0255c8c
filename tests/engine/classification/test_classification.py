"""Classification: the norm reaches every layer of a model, metrics are right, and an interrupted run loses nothing."""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file as save_safetensors
from timm.data.loader import PrefetchLoader, fast_collate
from timm.models import load_state_dict as load_timm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from fbn_plugin import SyncFilteredBatchNorm
from fbn_plugin.engine.classification import model
from fbn_plugin.engine.classification.config import check_config, classification_config
from fbn_plugin.engine.classification.data import (
    build_train_loader,
    build_train_transform,
    build_val_loader,
    pixel_statistics,
)
from fbn_plugin.engine.classification.evaluation import evaluate
from fbn_plugin.engine.classification.model import create_model
from fbn_plugin.engine.classification.trainer import ClassificationTrainer
from fbn_plugin.engine.data.image_data import Images, load_image_data
from fbn_plugin.engine.data.sampling import InfiniteSampler, SeededDataset
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.checkpoint import load_file
from fbn_plugin.engine.run.config import load_config
from fbn_plugin.engine.run.logging import TrainingLog, read_metrics
from fbn_plugin.layers.filtered_batch_norm import FilteredBatchNormMixin

CONFIGS = Path(__file__).parents[3] / "configs"
FOLDERS = ("CIFAR10", "Digits", "ImageNet", "MNIST", "TinyImageNet20")
CPU = torch.device("cpu")


def config(output_dir="unused", file="Digits/test_resnet_FBN.yaml", **overrides):
    """A config file's values, with overrides such as SOLVER__MAX_ITER=3."""
    flat = [x for key, value in overrides.items() for x in (key.replace("__", "."), str(value))]
    return load_config(classification_config(), CONFIGS / file, [*flat, "OUTPUT_DIR", str(output_dir)])


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet", "mobilenetv3_small_050"])
def test_fbn_model_starts_as_the_bn_model(name):
    """Same keys, same initial values and, as evaluation is plain batch normalization, same logits."""
    torch.manual_seed(0)
    plain = create_model(name, num_classes=7).eval()
    torch.manual_seed(0)
    filtered = create_model(name, "FBN(t_sigma=2.5)", num_classes=7).eval()
    norms = [m for m in filtered.modules() if isinstance(m, _BatchNorm)]
    assert norms and all(isinstance(m, FilteredBatchNormMixin) and m.t_sigma == 2.5 for m in norms)
    assert len(norms) == sum(isinstance(m, _BatchNorm) for m in plain.modules())
    state, other = plain.state_dict(), filtered.state_dict()
    assert list(state) == list(other) and all(torch.equal(state[key], other[key]) for key in state)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(filtered(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["GN(num_groups=4)", "FGN(num_groups=4, t_sigma=2)", "LN", "FIN"])
def test_no_batch_norm_is_left(norm):
    model = create_model("test_efficientnet", norm, num_classes=3)
    assert not any(isinstance(m, _BatchNorm) for m in model.modules())
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_own_norm():
    assert any(type(m) is nn.BatchNorm2d for m in create_model("test_resnet").modules())
    with pytest.raises(ValueError, match="test_vit has no batch normalization that FBN could replace"):
        create_model("test_vit", "FBN")


def test_norms_that_cannot_be_replaced_are_an_error(monkeypatch):
    class WhitenedBatchNorm(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    monkeypatch.setattr(timm, "create_model", lambda name: nn.Sequential(nn.BatchNorm2d(3), WhitenedBatchNorm(3)))
    with pytest.warns(UserWarning, match="left"), pytest.raises(ValueError, match="1 norm of odd.*WhitenedBatchNorm"):
        create_model("odd", "FBN")


def test_unknown_models_and_norms():
    with pytest.raises(ValueError, match=r"Unknown model \(resnet5\); did you mean 'resnet50'"):
        create_model("resnet5")
    with pytest.raises(ValueError, match=r"Invalid pretrained tag \(best\) for resnet18"):
        create_model("resnet18.best")
    with pytest.raises(ValueError, match="did you mean 'FBN'"):
        create_model("test_resnet", "FBM")


# --- the configs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS)
def test_configs_name_models_that_can_be_built(folder):
    for file in sorted((CONFIGS / folder).glob("[!B]*.yaml")):
        cfg = load_config(classification_config(), file)
        check_config(cfg)
        with torch.device("meta"):
            create_model(cfg.MODEL.NAME, cfg.MODEL.NORM, in_chans=len(cfg.INPUT.FORMAT))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"SOLVER__IMS_PER_BATCH": 0}, "SOLVER.IMS_PER_BATCH must be 1 or more, and 1048576 or less, got 0"),
        ({"SOLVER__OPTIMIZER": "adahessian"}, "SOLVER.OPTIMIZER must be .*got 'adahessian'"),
        (
            {"MODEL__NAME": "lenet5", "INPUT__SIZE": 3},
            r"INPUT.SIZE must be one that lenet5 takes \(LeNet5 takes images .*3$",
        ),
        ({"SOLVER__MOMENTUM": 1}, "SOLVER.MOMENTUM must be from 0 to less than 1, got 1.0"),
        ({"SOLVER__GAMMA": 0}, "SOLVER.GAMMA must be above 0, and 10 or less, got 0.0"),
        ({"SOLVER__STEPS": (3, 3)}, r"SOLVER.STEPS must be increasing epochs, from 1 on, got \(3, 3\)"),
        ({"SOLVER__MIN_LR": 9}, "SOLVER.MIN_LR must be from 0 to SOLVER.BASE_LR, 0.05, got 9.0"),
        ({"SOLVER__LABEL_SMOOTHING": 1}, "SOLVER.LABEL_SMOOTHING must be from 0 to less than 1, got 1.0"),
        ({"MODEL__DROP_RATE": 1}, "MODEL.DROP_RATE must be from 0 to less than 1, got 1.0"),
        ({"INPUT__SIZE": 10**9}, "INPUT.SIZE must be 1 or more, and 8192 or less, got 1000000000"),
        ({"INPUT__MIXUP": 1e300}, r"INPUT.MIXUP must be 0, or from 0.001 to 1000, got 1e\+300"),
        ({"SOLVER__WARMUP_EPOCHS": 8}, "SOLVER.WARMUP_EPOCHS must .* got 8"),
        ({"SOLVER__LR_SCHEDULER_NAME": "cosin"}, "SOLVER.LR_SCHEDULER_NAME must be .*'cosine', .* got 'cosin'"),
        ({"SOLVER__OPTIMIZER": "sdg"}, "SOLVER.OPTIMIZER must be .*got 'sdg'; did you mean 'sgd'"),
        ({"INPUT__TRAIN_CROP": "rrc"}, "INPUT.TRAIN_CROP must be .*'padded', .*got 'rrc'"),
        ({"INPUT__AUTO_AUGMENT": "rnd-m9"}, "INPUT.AUTO_AUGMENT must .*got 'rnd-m9'"),
        ({"INPUT__FORMAT": "RGB"}, "MODEL.PIXEL_MEAN must .*INPUT.FORMAT 'RGB'"),
        ({"INPUT__FORMAT": "BGR"}, "INPUT.FORMAT must be one of 'RGB', 'L', got 'BGR'"),
        ({"MODEL__PIXEL_STD": "[0.0]"}, r"MODEL.PIXEL_STD must .*got \(0.0,\)"),
        ({"INPUT__RATIO": "(1.0,)"}, "INPUT.RATIO must be two ratios .*got .1.0,"),
        ({"INPUT__COLOR_JITTER": -1}, "INPUT.COLOR_JITTER must be 0 or more, and 10 or less, got -1.0"),
        ({"MODEL__NAME": "resnet5"}, "MODEL.NAME: timm cannot build 'resnet5': .*did you mean 'resnet50'"),
        ({"MODEL__NAME": "test_vit", "INPUT__SIZE": 160}, "MODEL.NORM: test_vit has no batch normalization that FBN"),
        ({"INPUT__CROP_PCT": 1.5}, "INPUT.CROP_PCT must .*got 1.5"),
        ({"SOLVER__SCALE_LR_DIVISOR": -2}, "SOLVER.SCALE_LR_DIVISOR must be 0, or from 0.001 to 1000000, got -2.0"),
        (
            {"SOLVER__SCALE_LR_DIVISOR": 9, "SOLVER__FILTER_BIAS_AND_BN": False},
            "SOLVER.FILTER_BIAS_AND_BN must be True with SCALE_LR_DIVISOR.* got False",
        ),
        ({"INPUT__NORM_GAMMA_INIT": 2}, "INPUT.NORM_GAMMA_INIT must be from 0 to 1, got 2.0"),
        (
            {"MODEL__REVISED_INIT": True, "MODEL__PRETRAINED": True},
            "MODEL.PRETRAINED must be False with REVISED_INIT.* got True",
        ),
        ({"INPUT__MIXUP": 0.2, "SOLVER__IMS_PER_BATCH": 31}, "SOLVER.IMS_PER_BATCH must be .*MIXUP.* got 31"),
        ({"SOLVER__IMS_PER_BATCH": 5000}, "SOLVER.IMS_PER_BATCH must be 1437, .* or less, got 5000"),
        ({"SEED": -1}, "SEED must be 0 or more, .*got -1"),
        ({"DATASETS__NAME": "digit"}, "DATASETS.NAME must be .*, got 'digit'"),
        ({"DATASETS__NAME": "mnist", "DATASETS__ROOT": "nowhere"}, "DATASETS.ROOT 'nowhere' does not exist"),
        ({"MODEL__WEIGHTS": "nothing.pth"}, "MODEL.WEIGHTS: checkpoint nothing.pth is not there"),
        ({"MODEL__NORM": "FBM"}, "MODEL.NORM must be the spec of a norm, got 'FBM': .*did you mean 'FBN'"),
    ],
)
def test_bad_values_are_named_before_anything_is_written(tmp_path, overrides, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        ClassificationTrainer(config(tmp_path / "out", **overrides))
    assert not (tmp_path / "out").exists()


def test_norms_by_the_batch_may_have_one_pixel_of_an_image(tmp_path):
    """Which has one value a channel, and a batch has more."""
    ClassificationTrainer(config(tmp_path / "out", MODEL__NORM="FBN(track_running_stats=False)"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="it can be used on a GPU")
def test_an_optimizer_that_cannot_be_used_here():
    with pytest.raises(ValueError, match=r"SOLVER.OPTIMIZER must be one that can be used here \(.+\), got 'fusedadam'"):
        ClassificationTrainer(config(SOLVER__OPTIMIZER="fusedadam"))


def test_synchronized_batch_norm_that_trains_on_a_cpu(tmp_path):
    trainer = ClassificationTrainer(config(tmp_path, MODEL__NORM="SyncFBN(t_sigma=inf)", MODEL__DEVICE="cpu"))
    norms = [m for m in trainer.model.modules() if isinstance(m, SyncFilteredBatchNorm)]
    assert norms and all(math.isinf(norm.t_sigma) for norm in norms)


def test_synchronized_batch_norm_needs_gpus_only_where_processes_train(monkeypatch):
    cfg = config(MODEL__NORM="SyncBN", MODEL__DEVICE="cpu")
    ClassificationTrainer(cfg)  # alone, it is plain batch norm
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"MODEL.NORM must be .*SyncFBN.* got 'SyncBN'"):
        ClassificationTrainer(cfg)


def test_a_batch_is_shared_out_evenly(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(ValueError, match=r"SOLVER.IMS_PER_BATCH must be .* number of processes \(3\), got 32"):
        ClassificationTrainer(config())


# --- the data --------------------------------------------------------------------------------------------------------


def ramp_images(count: int, size: int = 8) -> Images:
    """Image i is a ramp that starts at i, so that each pixel says which image and which place it is."""
    ramp = np.arange(size * size, dtype=np.uint8).reshape(size, size)
    return Images([(ramp + np.uint8(i), i) for i in range(count)], "L")


def data_config(**overrides):
    return config(MODEL__PIXEL_MEAN="[51.0]", MODEL__PIXEL_STD="[102.0]", INPUT__SIZE=8, **overrides)


def test_without_crop_images_are_only_normalized():
    cfg = data_config(INPUT__TRAIN_CROP="none", INPUT__HFLIP=0.5, SOLVER__IMS_PER_BATCH=4)
    images, labels = next(build_train_loader(cfg, ramp_images(8), CPU))
    for image, label in zip(images, labels):
        raw = np.asarray(ramp_images(8)[int(label)][0], np.float32)
        np.testing.assert_allclose(image[0].numpy(), (raw - 51) / 102, atol=1e-6)


def test_padded_crop_takes_a_window_of_the_padded_image():
    cfg = data_config(INPUT__TRAIN_CROP="padded", INPUT__PADDING=2, INPUT__HFLIP=0.0)
    transform = build_train_transform(cfg, prefetch=False)
    image = np.arange(1, 65, dtype=np.uint8).reshape(8, 8)
    padded = np.pad(image, 2)
    windows = {padded[i : i + 8, j : j + 8].tobytes(): (i, j) for i in range(5) for j in range(5)}
    seen = {
        windows[(transform(Image.fromarray(image))[0] * 102 + 51).round().byte().numpy().tobytes()] for _ in range(300)
    }
    assert len(seen) > 15  # of 25 places


@pytest.mark.parametrize("crop", ["none", "padded", "random_resized"])
def test_what_a_gpu_normalizes_is_the_same_image(crop):
    """timm's PrefetchLoader gets bytes and normalizes them on its device; that may be the CPU."""
    statistics = {"MODEL__PIXEL_MEAN": "[51.0, 60.0, 70.0]", "MODEL__PIXEL_STD": "[102.0, 80.0, 90.0]"}
    augmentation = {"INPUT__TRAIN_CROP": crop, "INPUT__HFLIP": 0.5, "INPUT__COLOR_JITTER": 0.4}
    cfg = config(**statistics, **augmentation, INPUT__FORMAT="RGB", INPUT__SIZE=8)
    data = Images(ramp_images(8).samples, "RGB")
    stream = {"batch_size": 8, "sampler": InfiniteSampler(8, seed=0)}
    batches = []
    for prefetch in (False, True):
        data.transform = build_train_transform(cfg, prefetch)
        loader = DataLoader(SeededDataset(data, 0), **stream, collate_fn=fast_collate if prefetch else None)
        if prefetch:
            loader = PrefetchLoader(loader, **pixel_statistics(cfg), device=CPU)
        batches.append(next(iter(loader)))
    torch.testing.assert_close(batches[0][0], batches[1][0], rtol=0, atol=1e-5)
    assert torch.equal(batches[0][1], batches[1][1])


def test_a_stream_of_epochs_that_may_start_anywhere():
    cfg = data_config(SOLVER__IMS_PER_BATCH=5, INPUT__COLOR_JITTER=0.4, INPUT__HFLIP=0.5)
    loader = build_train_loader(cfg, ramp_images(15), CPU)
    batches = [next(loader) for _ in range(9)]
    labels = torch.cat([labels for _, labels in batches]).tolist()
    for epoch in (0, 15, 30):
        assert sorted(labels[epoch : epoch + 15]) == list(range(15))
    assert labels[:15] != labels[15:30]
    later = build_train_loader(cfg, ramp_images(15), CPU, start=4)
    for batch in batches[4:]:
        assert all(map(torch.equal, next(later), batch))


# --- the metrics -----------------------------------------------------------------------------------------------------


class Scores(nn.Module):
    """Logits that depend on the mean of the image alone; it has a norm, whose statistics evaluation must not touch."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x):
        self.norm(x)
        place = x.mean((1, 2, 3)) * 102 + 51.3  # image i is constant i
        return torch.stack([-((place / 10 - k) ** 2) for k in range(8)], 1)


def test_accuracies_and_loss_against_numpy():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 8, 70)
    data = Images([(np.full((8, 8), i, np.uint8), label) for i, label in enumerate(labels)], "L")
    cfg = data_config(INPUT__CROP_PCT=1.0, TEST__IMS_PER_BATCH=32)
    model = Scores().train()
    result = evaluate(model, build_val_loader(cfg, data, CPU), CPU)

    logits = -(((np.arange(70)[:, None] + 0.3) / 10 - np.arange(8)) ** 2)
    rank = (logits > logits[np.arange(70), labels][:, None]).sum(1)
    log_sum = np.log(np.exp(logits).sum(1))
    assert result["top1"] == pytest.approx(100 * np.mean(rank < 1))
    assert result["top5"] == pytest.approx(100 * np.mean(rank < 5))
    assert result["loss"] == pytest.approx(np.mean(log_sum - logits[np.arange(70), labels]), rel=1e-4)
    assert model.training and model.norm.num_batches_tracked == 0
    assert set(evaluate(model, build_val_loader(cfg, data, CPU), CPU, top_k=(1,))) == {"loss", "top1"}


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["BN", "FBN"])
def test_learns_digits(tmp_path, norm):
    result = ClassificationTrainer(config(tmp_path, f"Digits/test_resnet_{norm}.yaml", SOLVER__MAX_EPOCH=3)).train()
    assert result["top1"] > 90
    rows = [row for row in read_metrics(tmp_path / "metrics.json") if "val/top1" in row]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["top1"] == rows[-1]["val/top1"] == result["top1"] and record["top5"] == result["top5"]
    assert (record["train_images"], record["val_images"], record["norm"]) == (1437, 360, norm)
    assert (record["epochs"], record["iterations"]) == (3, 3 * 44)
    assert list(tmp_path.glob("events.out.tfevents.*"))
    # The last two of the periodic checkpoints are kept.
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == [
        "model_0000087.pth",
        "model_0000131.pth",
        "model_final.pth",
    ]


EXACT = {
    # 32 iterations an epoch, and a remainder; everything that draws random numbers is on.
    "SOLVER__IMS_PER_BATCH": 44,
    "SOLVER__MAX_EPOCH": 2,
    "SOLVER__WARMUP_EPOCHS": 1,
    "INPUT__MIXUP": 0.4,
    "INPUT__CUTMIX": 0.4,
    "INPUT__HFLIP": 0.5,
    "INPUT__COLOR_JITTER": 0.4,
    "MODEL__DROP_RATE": 0.3,
    "TEST__EVAL_PERIOD": 0,
}


def everything(folder) -> dict:
    return load_file(folder / "model_final.pth")


def assert_equal(one, other, path="checkpoint"):
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_equal(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for i, pair in enumerate(zip(one, other)):
            assert_equal(*pair, f"{path}.{i}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other, path


def test_interrupted_and_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    exact = EXACT | {"SOLVER__MAX_ITER": 38, "SOLVER__CHECKPOINT_PERIOD": 3}
    ClassificationTrainer(config(tmp_path / "whole", **exact)).train()

    class Interrupted(Exception):
        pass

    def interrupt(self, iteration, **values):
        if iteration == 34:
            raise Interrupted
        step(self, iteration, **values)

    step = TrainingLog.step
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(TrainingLog, "step", interrupt)
        ClassificationTrainer(config(tmp_path / "parts", **exact)).train()
    assert (tmp_path / "parts/last_checkpoint").read_text() == "model_0000032.pth"
    # Another number of workers: the data must not depend on it.
    resumed = ClassificationTrainer(config(tmp_path / "parts", **exact, DATALOADER__NUM_WORKERS=2), resume=True)
    assert resumed.start_iter == 33
    resumed.train()

    assert_equal(everything(tmp_path / "parts"), everything(tmp_path / "whole"))
    rows = [
        [
            {k: v for k, v in row.items() if "time" not in k and "_second" not in k and "loss" in row}
            for row in read_metrics(f)
        ]
        for f in (tmp_path / "whole/metrics.json", tmp_path / "parts/metrics.json")
    ]
    assert [row.get("val/top1") for row in read_metrics(tmp_path / "whole/metrics.json")][-1] is not None
    assert rows[0] == rows[1]


def test_stopping_early_keeps_the_schedule(tmp_path):
    """MAX_ITER is an interruption: going on afterwards is the run without it."""
    ClassificationTrainer(config(tmp_path / "whole", **EXACT, SOLVER__MAX_ITER=8)).train()
    ClassificationTrainer(config(tmp_path / "parts", **EXACT, SOLVER__MAX_ITER=5)).train()
    ClassificationTrainer(config(tmp_path / "parts", **EXACT, SOLVER__MAX_ITER=8), resume=True).train()
    assert_equal(everything(tmp_path / "parts"), everything(tmp_path / "whole"))
    assert (tmp_path / "whole/log.txt").read_text().count("norms: 15 FBN(t_sigma=5), 0 BN\n") == 1
    # And with nothing left to train, the result is still told.
    result = ClassificationTrainer(config(tmp_path / "parts", **EXACT, SOLVER__MAX_ITER=8), resume=True).train()
    assert result == {k: v for k, v in json.loads((tmp_path / "whole/results.json").read_text()).items() if k in result}


def rates(tmp_path, monkeypatch, **overrides) -> list[float]:
    seen = []
    monkeypatch.setattr(TrainingLog, "step", lambda self, iteration, **values: seen.append(values["lr"]))
    monkeypatch.setattr(ClassificationTrainer, "evaluate", lambda self: {"top1": 0.0, "top5": 0.0, "loss": 0.0})
    linear = nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 10))
    monkeypatch.setattr(model, "create_model", lambda *args, **kwargs: linear)
    ClassificationTrainer(config(tmp_path, SOLVER__IMS_PER_BATCH=400, SOLVER__BASE_LR=0.8, **overrides)).train()
    return seen


def test_cosine_with_warmup(tmp_path, monkeypatch):
    seen = rates(tmp_path, monkeypatch, SOLVER__MAX_EPOCH=4, SOLVER__WARMUP_FACTOR=0.25)  # 3 iterations an epoch
    warmup = [0.8 * (0.25 + 0.75 * i / 3) for i in range(3)]
    assert seen == pytest.approx(warmup + [0.4 * (1 + math.cos(math.pi * i / 12)) for i in range(3, 12)])


def test_multistep(tmp_path, monkeypatch):
    steps = {"SOLVER__LR_SCHEDULER_NAME": "multistep", "SOLVER__STEPS": "[1, 2]", "SOLVER__GAMMA": 0.5}
    seen = rates(tmp_path, monkeypatch, SOLVER__MAX_EPOCH=3, SOLVER__WARMUP_EPOCHS=0, **steps)
    # timm takes each step one iteration early.
    assert seen == pytest.approx([0.8] * 2 + [0.4] * 3 + [0.2] * 4)


def test_constant_after_warmup(tmp_path, monkeypatch):
    constant = {"SOLVER__LR_SCHEDULER_NAME": "constant", "SOLVER__STEPS": "[1]", "SOLVER__WARMUP_FACTOR": 0.25}
    seen = rates(tmp_path, monkeypatch, SOLVER__MAX_EPOCH=3, **constant)
    assert seen == pytest.approx([0.8 * (0.25 + 0.75 * i / 3) for i in range(3)] + [0.8] * 6)


@pytest.mark.parametrize("filtered", [True, False])
def test_weight_decay_of_norms(filtered):
    trainer = ClassificationTrainer(config(SOLVER__FILTER_BIAS_AND_BN=filtered, SOLVER__WEIGHT_DECAY=0.01))
    decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    norms = [m for m in trainer.model.modules() if isinstance(m, FilteredBatchNormMixin)]
    assert norms and all(decay[id(m.weight)] == decay[id(m.bias)] == (0 if filtered else 0.01) for m in norms)
    assert decay[id(trainer.model.fc.weight)] == 0.01


def test_the_papers_training(tmp_path, monkeypatch):
    """Small scales that learn slowly through warm-up and cosine, an input norm, and weights drawn by fan-in."""
    paper = {
        "MODEL__NORM": "ScaledBN(gamma_init=0.25)",
        "MODEL__REVISED_INIT": True,
        "INPUT__NORM_GAMMA_INIT": 0.25,
        "INPUT__SIZE": 16,
        "SOLVER__SCALE_LR_DIVISOR": 50,
        "SOLVER__MAX_EPOCH": 2,
        "SOLVER__IMS_PER_BATCH": 200,
        "SOLVER__WARMUP_FACTOR": 0.5,
        "SOLVER__MIN_LR": 0.01,
    }
    trainer = ClassificationTrainer(config(tmp_path, **paper))
    model, groups = trainer.model, trainer.optimizer.param_groups
    scales = {name: m.weight for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    assert len(scales) > 5
    for name, scale in scales.items():  # the last of each block too, which timm sets to 0
        assert torch.allclose(scale, torch.tensor(0.58 * 0.25 if name == "input_norm" else 0.25)), name
    stem = model.conv1[0] if isinstance(model.conv1, nn.Sequential) else model.conv1
    assert stem.weight.std().item() == pytest.approx(math.sqrt(2 / stem.weight[0].numel()), rel=0.3)
    assert {p for group in groups for p in group["params"] if group["lr"] < groups[0]["lr"]} == set(scales.values())
    seen = []
    step = trainer.optimizer.step
    monkeypatch.setattr(trainer.optimizer, "step", lambda *a: (seen.append([g["lr"] for g in groups]), step(*a)))
    raw = np.mean([np.asarray(image) for image, _ in trainer.data.train]) / 255
    trainer.train()
    rates = [first for first, *_ in seen]
    assert all(last == pytest.approx(first / 50) for first, *_, last in seen)
    assert rates[0] == pytest.approx(0.025) and max(rates) > 0.025 and rates[-1] == pytest.approx(0.01, rel=0.1)
    norm = model.input_norm
    assert norm.num_batches_tracked == len(seen) and norm.bias is None
    inside = (1 - 20 / 9 / 16) ** 2  # share of a padded crop that is image, on average
    assert norm.running_mean.item() == pytest.approx(raw * inside * (1 - 0.9 ** len(seen)), rel=0.15)
    again = ClassificationTrainer(config(tmp_path, **paper), resume=True)
    assert_equal(again.model.state_dict(), model.state_dict())
    assert [group["lr_scale"] for group in again.optimizer.param_groups] == pytest.approx([1, 1, 1 / 50])


def test_pretrained_scales_are_kept(monkeypatch):
    trained = timm.create_model("test_resnet", num_classes=3)
    torch.nn.init.constant_(trained.bn1.weight, 0.75)
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: trained)
    model = create_model("test_resnet", "ScaledBN(gamma_init=0.25)", pretrained=True)
    assert (model.bn1.weight == 0.75).all()
    assert (create_model("test_resnet", "ScaledBN(gamma_init=0.25)").bn1.weight == 0.25).all()


def test_a_norm_without_gamma_init_leaves_the_scales_that_timm_sets():
    model = create_model("test_resnet", "FBN", num_classes=3)
    last = [block.bn3 if hasattr(block, "bn3") else block.bn2 for block in model.layer1]
    assert all((norm.weight == 0).all() for norm in last)


def test_mixed_precision_keeps_float32_weights(tmp_path):
    amp = {"SOLVER__AMP__ENABLED": True, "SOLVER__MAX_ITER": 50}
    trainer = ClassificationTrainer(config(tmp_path, "Digits/test_resnet_BN.yaml", **amp))
    seen = set()
    trainer.model.layer1[0].conv1.register_forward_hook(lambda m, x, y: seen.add(y.dtype) if m.training else None)
    result = trainer.train()
    assert seen == {torch.bfloat16} and result["top1"] > 20
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_a_diverged_loss_ends_the_run_and_leaves_the_last_checkpoint(tmp_path):
    ClassificationTrainer(config(tmp_path, SOLVER__WARMUP_EPOCHS=0, SOLVER__MAX_ITER=2)).train()
    before = (tmp_path / "model_final.pth").read_bytes()
    cfg = config(tmp_path, SOLVER__BASE_LR=1e30, SOLVER__WARMUP_EPOCHS=0, SOLVER__MAX_ITER=8)
    with pytest.raises(
        FloatingPointError, match=r"not finite at iteration \d \(total_loss (nan|inf)\); lower SOLVER.BASE_LR"
    ):
        ClassificationTrainer(cfg, resume=True).train()
    assert (tmp_path / "model_final.pth").read_bytes() == before


def test_weights_to_evaluate_and_to_start_from(tmp_path):
    result = ClassificationTrainer(config(tmp_path, SOLVER__MAX_ITER=30)).train()
    final = tmp_path / "model_final.pth"
    # BN and FBN have the same keys and the same evaluation.
    for file in ("Digits/test_resnet_FBN.yaml", "Digits/test_resnet_BN.yaml"):
        trainer = ClassificationTrainer(config(tmp_path / "new", file, MODEL__WEIGHTS=final), eval_only=True)
        assert trainer.evaluate() == pytest.approx(result, rel=1e-5)
    # A plain state dict does as well.
    torch.save(load_file(final)["model"], tmp_path / "weights.pth")
    cfg = config(tmp_path / "new", MODEL__WEIGHTS=tmp_path / "weights.pth")
    assert ClassificationTrainer(cfg, eval_only=True).evaluate() == result
    assert ClassificationTrainer(cfg).evaluate() == result and not (tmp_path / "new").exists()

    with pytest.raises(ValueError, match=r"model_final.pth is of another model: \d+ entries"):
        ClassificationTrainer(config(MODEL__NAME="test_byobnet", MODEL__WEIGHTS=final), eval_only=True)
    for changed, words in {
        "MODEL__NAME": ("test_byobnet", "MODEL.NAME must be 'test_resnet' as in the run that OUTPUT_DIR"),
        "MODEL__NORM": ("BN", "MODEL.NORM must be 'FBN' .*, got 'BN'"),
        "SOLVER__MAX_ITER": (29, "SOLVER.MAX_ITER must be enough for the 30 iterations .*, got 29"),
    }.items():
        before = (tmp_path / "config.yaml").read_text()
        with pytest.raises(ValueError, match=words[1]):
            ClassificationTrainer(config(tmp_path, **{changed: words[0]}), resume=True)
        assert (tmp_path / "config.yaml").read_text() == before
    with pytest.raises(ValueError, match="nothing to evaluate"):
        ClassificationTrainer(config(tmp_path / "new"), eval_only=True)
    with pytest.raises(ValueError, match="holds a run; add --resume"):
        ClassificationTrainer(config(tmp_path))
    torch.save({"model": load_file(final)["model"]}, final)
    with pytest.raises(ValueError, match=r"it has no optimizer"):
        ClassificationTrainer(config(tmp_path), resume=True)


def test_a_run_is_resumed_by_as_many_processes(tmp_path, monkeypatch):
    """With fewer the same batch would be normalized in other parts."""
    cfg = config(tmp_path, SOLVER__IMS_PER_BATCH=32, SOLVER__MAX_ITER=2)
    ClassificationTrainer(cfg).train()
    again = config(tmp_path, SOLVER__IMS_PER_BATCH=32, SOLVER__MAX_ITER=4)
    info = json.loads((tmp_path / "run_info.json").read_text())
    (tmp_path / "run_info.json").write_text(json.dumps(info | {"processes": 2}))
    with pytest.raises(ValueError, match="holds was made by 2 processes, got 1: resume it with as many"):
        ClassificationTrainer(again, resume=True)
    assert ClassificationTrainer(again, resume=True, eval_only=True).evaluate()  # which may be shared by any number
    (tmp_path / "run_info.json").unlink()
    assert ClassificationTrainer(again, resume=True).start_iter == 2


def test_weights_that_do_not_fit_at_all_are_refused(tmp_path):
    """As the detectors refuse them; a file that fits in part is taken."""
    torch.save({f"bert.{n}.weight": torch.ones(2) for n in range(2)}, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match="MODEL.WEIGHTS: .*foreign.pth has no weight of this model; .* bert.0.weight"):
        ClassificationTrainer(config(MODEL__WEIGHTS=tmp_path / "foreign.pth"))
    source = timm.create_model("test_resnet", num_classes=3, in_chans=1)
    torch.save(source.state_dict(), tmp_path / "other_head.pth")
    trainer = ClassificationTrainer(config(MODEL__WEIGHTS=tmp_path / "other_head.pth", MODEL__RESET_CLASSIFIER=True))
    assert torch.equal(trainer.model.conv1[0].weight, source.conv1[0].weight)


@pytest.mark.parametrize("form", ["timm", "timm without an average", "wrapped", "safetensors"])
def test_weights_of_timms_own_training(tmp_path, form, caplog):
    """Of its averaged weights and the others, what timm itself takes."""
    sources = [timm.create_model("test_resnet", num_classes=10, in_chans=1) for _ in range(2)]
    plain, average = (source.state_dict() for source in sources)
    file = tmp_path / "model_best.pth.tar"
    if form == "safetensors":
        file = tmp_path / "model.safetensors"
        save_safetensors(plain, file)
    elif form == "wrapped":
        torch.save({f"module._orig_mod.{name}": value for name, value in plain.items()}, file)
    else:
        content = {
            "epoch": 3,
            "arch": "test_resnet",
            "state_dict": plain,
            "optimizer": {},
            "version": 2,
            "metric": 71.5,
        }
        content |= {"args": argparse.Namespace(lr=0.1, model="test_resnet")}
        torch.save(content | ({"state_dict_ema": average} if form == "timm" else {}), file)
    with caplog.at_level("INFO", "fbn_plugin"):
        trainer = ClassificationTrainer(config(MODEL__WEIGHTS=file), eval_only=True)
    expected = load_timm(str(file))
    assert all(torch.equal(value, expected[name]) for name, value in trainer.model.state_dict().items())
    said = {"timm": "of state_dict_ema; not those of state_dict\n", "timm without an average": "those of state_dict\n"}
    assert said.get(form, "entries of the model loaded") in caplog.text


def test_the_best_model_is_kept(tmp_path):
    """By the metric of the config, over an interruption; it is evaluated to the value that it was kept for."""
    options = {"SOLVER__BEST_CHECKPOINT_METRIC": "top1", "SOLVER__MAX_EPOCH": 3, "SOLVER__BASE_LR": 0.01}
    ClassificationTrainer(config(tmp_path, **options, SOLVER__MAX_ITER=44)).train()
    ClassificationTrainer(config(tmp_path, **options), resume=True).train()
    rows = [row for row in read_metrics(tmp_path / "metrics.json") if "val/top1" in row]
    best = max(rows, key=lambda row: row["val/top1"])
    saved = load_file(tmp_path / "model_best.pth")
    assert (saved["metric"], saved["value"], saved["iteration"]) == ("top1", best["val/top1"], best["iteration"])
    trainer = ClassificationTrainer(
        config(tmp_path / "new", MODEL__WEIGHTS=tmp_path / "model_best.pth"), eval_only=True
    )
    assert trainer.evaluate()["top1"] == saved["value"]
    with pytest.raises(ValueError, match="BEST_CHECKPOINT_METRIC must be one of top1, top5, loss, got 'top2'"):
        ClassificationTrainer(config(SOLVER__BEST_CHECKPOINT_METRIC="top2"))


def test_pretrained_weights_reach_the_filtered_model(tmp_path):
    """timm's own loading, from a folder in its hub format."""
    torch.manual_seed(1)
    source = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    timm.models.save_for_hf(source, tmp_path, safe_serialization=False)
    name = f"local-dir:{tmp_path}"
    trainer = ClassificationTrainer(config(MODEL__NAME=name, MODEL__PRETRAINED=True), eval_only=True)
    assert any(isinstance(m, FilteredBatchNormMixin) for m in trainer.model.modules())
    state = trainer.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in source.state_dict().items())


def test_labelled_with_what_it_was_measured_on():
    trainer = ClassificationTrainer(config())
    line = trainer.describe({"top1": 97.5, "top5": 100.0, "loss": 0.12345})
    assert line == (
        "test_resnet with FBN on handwritten digits (scikit-learn): "
        "top-1 97.50 %, top-5 100.00 %, loss 0.1235 (360 validation images)"
    )


def test_balanced_batches_from_a_config(tmp_path):
    cfg = config(tmp_path, DATALOADER__IMAGES_PER_CLASS=2, SOLVER__IMS_PER_BATCH=20, DATALOADER__NUM_WORKERS=0)
    data = load_image_data("digits", mode="L")
    _, targets = next(build_train_loader(cfg, data.train, CPU))
    assert targets.bincount().tolist() == [2] * 10
    cfg = config(tmp_path, DATALOADER__IMAGES_PER_CLASS=2, SOLVER__IMS_PER_BATCH=32)
    sentence = "SOLVER.IMS_PER_BATCH must be 20, DATALOADER.IMAGES_PER_CLASS 2 of 10 classes .*, got 32"
    with pytest.raises(ValueError, match=sentence):
        ClassificationTrainer(cfg)
