"""One update of the weights: what each option of speed and of the solver does to it, and what refuses them."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from every_norm import SPECS, layer
from torch import nn

from fbn_plugin.engine.classification.config import classification_config
from fbn_plugin.engine.classification.model import build_model
from fbn_plugin.engine.classification.optimization import build_optimizer, build_scheduler
from fbn_plugin.engine.classification.step import TrainingStep, build_average, build_scaler, place_model
from fbn_plugin.engine.classification.trainer import ClassificationTrainer
from fbn_plugin.engine.run.checkpoint import load_file
from fbn_plugin.engine.run.cli import UserError
from fbn_plugin.engine.run.config import load_config
from fbn_plugin.engine.run.logging import read_metrics
from fbn_plugin.engine.run.seeding import same_on_all_processes

CONFIGS = Path(__file__).parents[3] / "configs"
CPU = torch.device("cpu")
QUICK = {"SOLVER__MAX_ITER": 6, "SOLVER__WARMUP_EPOCHS": 0, "SOLVER__BASE_LR": 0.02, "DATALOADER__NUM_WORKERS": 0}


def config(file="Digits/test_resnet_FBN.yaml", output_dir="unused", **overrides):
    """A config file's values, with overrides such as SOLVER__MAX_ITER=3."""
    flat = [x for key, value in overrides.items() for x in (key.replace("__", "."), str(value))]
    return load_config(classification_config(), CONFIGS / file, [*flat, "OUTPUT_DIR", str(output_dir)])


def training_step(cfg, dtype=torch.float32) -> TrainingStep:
    """The step of a new model for the ten digits."""
    with same_on_all_processes(cfg.SEED):
        model = place_model(cfg, build_model(cfg, 10), CPU).to(dtype)
    optimizer = build_optimizer(cfg, model)
    scheduler = build_scheduler(cfg, optimizer, 40)
    scaler, average = build_scaler(cfg, CPU), build_average(cfg, model)
    return TrainingStep(cfg, model.train(), 10, optimizer, scheduler, scaler, average, CPU)


def batches(cfg, count=4, images=8):
    generator = torch.Generator().manual_seed(0)
    shape = (images, len(cfg.INPUT.FORMAT), cfg.INPUT.SIZE, cfg.INPUT.SIZE)
    return iter(
        [
            (torch.randn(shape, generator=generator), torch.randint(10, (images,), generator=generator))
            for _ in range(count)
        ]
    )


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- precision, layout, compilation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"SOLVER__AMP__DTYPE": "float32"}, "SOLVER.AMP.DTYPE must be one of '', 'float16', 'bfloat16', got 'float32'"),
        (
            {"SOLVER__AMP__DTYPE": "float16", "SOLVER__AMP__ENABLED": True},
            "SOLVER.AMP.DTYPE must be one of '', 'bfloat16' on a CPU, got 'float16'",
        ),
        (
            {"MODEL__GRAD_CHECKPOINTING": True, "MODEL__NAME": "lenet5"},
            "MODEL.GRAD_CHECKPOINTING must be False with lenet5, .* got True",
        ),
        (
            {"MODEL__GRAD_CHECKPOINTING": True, "MODEL__NAME": "dla34"},
            "MODEL.GRAD_CHECKPOINTING must be False with dla34, .* got True",
        ),
        ({"MODEL__EMA__DECAY": 1}, "MODEL.EMA.DECAY must be from 0 to less than 1, got 1.0"),
        ({"SOLVER__CLIP_GRADIENTS__CLIP_TYPE": "full"}, "CLIP_TYPE must be one of 'norm', 'value', 'agc', got 'full'"),
        ({"SOLVER__CLIP_GRADIENTS__CLIP_VALUE": 0}, "CLIP_VALUE must be above 0, and 1e.30 or less, got 0.0"),
        ({"SOLVER__ACCUMULATION_STEPS": 0}, "ACCUMULATION_STEPS must be 1 or more, and 1048576 or less, got 0"),
        ({"FLOAT32_PRECISION": "tf32"}, "FLOAT32_PRECISION must be one of '', 'highest', 'high', 'medium', got 'tf32'"),
        (
            {"SOLVER__BEST_CHECKPOINT_METRIC": "ema/top1"},
            "BEST_CHECKPOINT_METRIC must be one of top1, top5, loss, got 'ema/top1'",
        ),
    ],
)
def test_refused_before_anything_is_written(tmp_path, overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        ClassificationTrainer(config(output_dir=tmp_path / "out", MODEL__DEVICE="cpu", **overrides))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("dtype", "on_gpu"), [("", torch.float16), ("float16", torch.float16), ("bfloat16", None)])
def test_the_scaler_is_for_float16(dtype, on_gpu, monkeypatch):
    cfg = config(SOLVER__AMP__ENABLED=True, SOLVER__AMP__DTYPE=dtype)
    made = []
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: made.append((device, enabled)))
    build_scaler(cfg, torch.device("cuda")), build_scaler(config(), torch.device("cuda"))
    assert made == [("cuda", on_gpu is not None), ("cuda", False)]


def test_bfloat16_on_a_cpu():
    step = training_step(cfg := config(SOLVER__AMP__ENABLED=True, SOLVER__AMP__DTYPE="bfloat16"))
    seen = set()
    step.model.layer1[0].conv1.register_forward_hook(lambda m, x, y: seen.add(y.dtype))
    losses, _ = step(0, batches(cfg))
    assert seen == {torch.bfloat16} and math.isfinite(losses["total_loss"])
    assert {p.dtype for p in step.model.parameters()} == {torch.float32}


def test_channels_last_reaches_every_convolution():
    step = training_step(cfg := config(MODEL__CHANNELS_LAST=True))
    seen = []
    for module in step.model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
            module.register_forward_hook(
                lambda m, x, y: seen.append(y.is_contiguous(memory_format=torch.channels_last))
            )
    step(0, batches(cfg))
    assert len(seen) > 5 and all(seen)


def test_a_compiled_model_keeps_its_names_and_its_training(monkeypatch):
    """Through a backend that runs the captured graphs as they are: what compilers make of them is tested elsewhere."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="eager", fullgraph=True))
    cfg = config(MODEL__COMPILE=True)
    steps = training_step(cfg), training_step(config())
    for iteration in range(2):
        losses = [step(iteration, batches(cfg))[0]["total_loss"] for step in steps]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    states = [step.model.state_dict() for step in steps]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-6)


def test_no_compiler_is_a_sentence(monkeypatch):
    def fail(*args):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found in cxx: (None, 'g++')\n\nSet TORCH_LOGS")

    monkeypatch.setattr(torch, "compile", lambda model: fail)
    step = training_step(cfg := config(MODEL__COMPILE=True))
    with pytest.raises(UserError, match=r"^MODEL.COMPILE must be False here: No working C.*'g..'\)$"):
        step(0, batches(cfg))


def test_the_switches_of_the_backends(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    ClassificationTrainer(config(CUDNN_BENCHMARK=True))
    assert torch.backends.cudnn.benchmark
    ClassificationTrainer(config(CUDNN_BENCHMARK=False))
    assert not torch.backends.cudnn.benchmark


# --- recomputation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [spec for spec in SPECS if "Sync" not in spec and [*layer(spec).buffers()]])
def test_recomputed_activations_move_running_statistics_once(norm):
    """The backward pass computes them again by the same images."""
    results = []
    for checkpointing in (False, True):
        step = training_step(cfg := config(MODEL__NORM=norm, MODEL__GRAD_CHECKPOINTING=checkpointing))
        step(0, batches(cfg, images=4))
        results.append(step.model.state_dict())
    assert same(*results)


def test_activations_are_computed_again():
    step = training_step(cfg := config(MODEL__GRAD_CHECKPOINTING=True))
    calls = []
    step.model.layer1[0].bn1.register_forward_hook(lambda *_: calls.append(1))
    step(0, batches(cfg))
    assert len(calls) == 2


# --- accumulation, clipping, average ---------------------------------------------------------------------------------


class DrawsFromNumPy(nn.Identity):
    """A layer of another package's."""


@pytest.mark.parametrize(("mixup", "foreign"), [(0, False), (0.2, False), (0, True)])
def test_numpy_is_seeded_where_something_may_draw_from_it(mixup, foreign):
    cfg = config(INPUT__MIXUP=mixup)
    step = training_step(cfg)
    if foreign:
        step.model.drop_block = DrawsFromNumPy()
        step = TrainingStep(cfg, step.model, 10, step.optimizer, step.scheduler, step.scaler, None, CPU)
    drawn = []
    for before in (1, 2):
        np.random.seed(before)
        step(0, batches(cfg))
        drawn.append(np.random.rand())
    assert (drawn[0] == drawn[1]) == bool(mixup or foreign)


def test_a_loss_that_is_not_finite_leaves_the_weights():
    """In whichever step it is."""
    step = training_step(cfg := config(SOLVER__ACCUMULATION_STEPS=2, MODEL__EMA__ENABLED=True))
    before = {name: value.clone() for name, value in step.model.named_parameters()}
    given = list(batches(cfg, count=2))
    given[0][0][0] = math.inf
    with pytest.raises(FloatingPointError, match=r"not finite at iteration 3 \(total_loss nan\)"):
        step(3, iter(given))
    assert same(before, dict(step.model.named_parameters()))
    assert same(before, dict(step.average.module.named_parameters()))


def gradients(step) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in step.model.named_parameters()}


def test_gradients_are_clipped():
    def of(kind, value, **others):
        clip = {"ENABLED": True, "CLIP_TYPE": kind, "CLIP_VALUE": value, **others}
        cfg = config(**{f"SOLVER__CLIP_GRADIENTS__{key}": each for key, each in clip.items()})
        step = training_step(cfg)
        weights = {name: parameter.detach().clone() for name, parameter in step.model.named_parameters()}
        step(0, batches(cfg))
        return gradients(step), weights

    (plain_step := training_step(cfg := config()))(0, batches(cfg))
    plain = gradients(plain_step)
    norm = torch.cat([value.flatten() for value in plain.values()]).norm()
    clipped, weights = of("norm", 0.5 * norm.item())
    for name, value in plain.items():  # all by one factor
        torch.testing.assert_close(clipped[name], 0.5 * value, rtol=1e-4, atol=1e-8)
    clipped, _ = of("value", 1e-3)
    assert all(torch.equal(clipped[name], value.clamp(-1e-3, 1e-3)) for name, value in plain.items())
    clipped, _ = of("agc", 1e-3)
    assert all(torch.equal(clipped[name], plain[name]) for name in ("fc.weight", "fc.bias"))
    name = "conv1.0.weight"
    most = 1e-3 * weights[name].flatten(1).norm(dim=1).clamp(min=1e-3)
    assert (clipped[name].flatten(1).norm(dim=1) <= most * 1.001).all() and not torch.equal(clipped[name], plain[name])


def test_the_average_of_weights_and_statistics():
    """timm's, with its warm-up: the first update takes the weights as they are."""
    step = training_step(cfg := config(MODEL__EMA__ENABLED=True, MODEL__EMA__DECAY=0.5))
    given = batches(cfg)
    step(0, given)
    first = copy.deepcopy(step.model.state_dict())
    assert same(step.average.module.state_dict(), first)
    step(1, given)
    for name, value in step.model.state_dict().items():
        expected = 0.5 * (first[name] + value) if value.is_floating_point() else value
        torch.testing.assert_close(step.average.module.state_dict()[name], expected)
    warm = build_average(config(MODEL__EMA__ENABLED=True, MODEL__EMA__WARMUP=True), step.model)
    assert [warm.get_decay(updates) for updates in (1, 2, 10**9)] == pytest.approx([0, 1 - 2 ** (-2 / 3), 0.9999])
    assert build_average(config(), step.model) is None


ALL = {
    "MODEL__EMA__ENABLED": True,
    "MODEL__EMA__DECAY": 0.9,
    "MODEL__CHANNELS_LAST": True,
    "MODEL__GRAD_CHECKPOINTING": True,
    "MODEL__DROP_RATE": 0.3,
    "INPUT__MIXUP": 0.4,
    "SOLVER__ACCUMULATION_STEPS": 2,
    "SOLVER__CLIP_GRADIENTS__ENABLED": True,
    "SOLVER__AMP__ENABLED": True,
    "SOLVER__BEST_CHECKPOINT_METRIC": "ema/top1",
    "TEST__EVAL_PERIOD": 0,
}


def test_an_interrupted_run_with_all_of_it_ends_with_the_same_bits(tmp_path):
    options = {**QUICK, **ALL}
    whole = ClassificationTrainer(config(output_dir=tmp_path / "whole", **options)).train()
    ClassificationTrainer(config(output_dir=tmp_path / "parts", **options | {"SOLVER__MAX_ITER": 4})).train()
    assert ClassificationTrainer(config(output_dir=tmp_path / "parts", **options), resume=True).train() == whole
    ends = [load_file(tmp_path / name / "model_final.pth") for name in ("whole", "parts")]
    assert same(ends[0]["model"], ends[1]["model"]) and same(ends[0]["ema"], ends[1]["ema"])
    assert not same(ends[0]["model"], ends[0]["ema"])
    momenta = [end["optimizer"]["state"] for end in ends]
    assert all(torch.equal(momenta[0][k]["momentum_buffer"], momenta[1][k]["momentum_buffer"]) for k in momenta[0])

    # Which weights are where, and what they are evaluated to.
    row = read_metrics(tmp_path / "whole/metrics.json")[-1]
    assert row["val/top1"] == whole["top1"] and row["val/ema/top1"] == whole["ema/top1"]
    assert json.loads((tmp_path / "whole/results.json").read_text())["ema/loss"] == whole["ema/loss"] != whole["loss"]
    assert same(load_file(tmp_path / "whole/model_best.pth")["model"], ends[0]["ema"])
    assert same(load_file(tmp_path / "whole/model_ema.pth")["model"], ends[0]["ema"])

    def evaluated(file, **others):
        cfg = config(output_dir=tmp_path / "new", MODEL__WEIGHTS=tmp_path / "whole" / file, **options | others)
        return ClassificationTrainer(cfg, eval_only=True).evaluate()

    assert evaluated("model_final.pth") == whole
    alone = {name: whole[name] for name in ("top1", "top5", "loss")}
    averaged = {name: whole[f"ema/{name}"] for name in alone}
    assert evaluated("model_final.pth", MODEL__EMA__ENABLED=False, SOLVER__BEST_CHECKPOINT_METRIC="") == alone
    assert evaluated("model_ema.pth") == averaged


def test_an_average_starts_from_loaded_weights(tmp_path):
    torch.manual_seed(1)
    source = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    trainer = ClassificationTrainer(config(MODEL__WEIGHTS=tmp_path / "weights.pth", MODEL__EMA__ENABLED=True))
    assert same(trainer.average.module.state_dict(), source.state_dict())
