"""Configs at random: mutated files of ``configs/``, mutated overrides, and every key with values that make no sense,
for each engine. All is accepted or refused in one sentence, in bounded time and memory, and what is accepted has an
optimizer and a schedule."""

import functools
import importlib.util
import random
import string
import tempfile
from pathlib import Path

import pytest
import yaml
from limited_process import assert_sound, outcomes
from torch import nn

from fbn_plugin.engine.classification import optimization
from fbn_plugin.engine.classification.config import check_config, classification_config
from fbn_plugin.engine.run.config import load_config, read_config
from fbn_plugin.engine.run.detection_keys import detection_config
from fbn_plugin.engine.run.detection_rules import dependent_rules
from fbn_plugin.engine.run.rules import check_norms, check_values
from fbn_plugin.engine.run.schedule import eval_iterations
from fbn_plugin.engine.torchvision import model as detector
from fbn_plugin.engine.torchvision.config import load_detection_config

# Here, as the process of the cases has its limit when it calls a function.
HAS_DETECTRON2 = importlib.util.find_spec("detectron2") is not None
if HAS_DETECTRON2:
    from detectron2.config import get_cfg
    from detectron2.engine import DefaultTrainer

    from fbn_plugin.engine.detectron2.augmentation import check_augmentation
    from fbn_plugin.engine.detectron2.config import load_config as load_detectron2_config
    from fbn_plugin.engine.detectron2.model import build_optimizer as build_detectron2_optimizer
    from fbn_plugin.engine.detectron2.rules import RULES, input_rules
    from fbn_plugin.engine.detectron2.values import check_types
    from fbn_plugin.frameworks.detectron2 import check_norm

ROOT = Path(__file__).parents[2]
CONFIGS = {
    "classification": ("CIFAR10", "Digits", "ImageNet", "MNIST", "TinyImageNet20"),
    "torchvision": ("COCO-InstanceSegmentation", "Demo", "experiments"),
    "detectron2": ("COCO-Detection", "COCO-Keypoints", "COCO-PanopticSegmentation", "Demo", "Misc"),
}
ENGINES = [
    "classification",
    "torchvision",
    pytest.param(
        "detectron2",
        marks=[
            pytest.mark.detectron2,
            pytest.mark.skipif(not HAS_DETECTRON2, reason="detectron2 is not installed"),
        ],
    ),
]
# As they stand in a file.
VALUES = [
    *("0", "-1", "1", "2.5", "1e-300", "1.0e+300", "1.0e+400", ".nan", "-.inf", "9" * 400, "0x" + "f" * 99, "-" * 300),
    *("''", "x" * 5000, "'" + "[" * 300 + "'", "'(1, (2, (3,)))'", "'-9'", '"\\0"', "010", "1:30", "2020-01-01", "~"),
    *(
        "true",
        "off",
        "[]",
        "[[]]",
        "{}",
        "[0]",
        "[-1, 1]",
        "[[0.0]]",
        "[a, {b: c}]",
        "{a: {b: c}}",
        "[" * 40 + "]" * 40,
    ),
    *(
        "!!python/name:os.system",
        "!!set {a}",
        "*a",
        "&a [*a]",
        "&a 1",
        "FBN(t_sigma=0)",
        "FBN(" + "(" * 900,
        "1000000000",
    ),
]


@functools.cache
def _linear() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def load_and_check(case: tuple[str, bytes, list[str]]) -> str:
    """One engine's settings from a file's content and overrides, with what it checks before it looks at data."""
    engine, content, overrides = case
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        file.write(content)
        file.flush()
        {"classification": _classification, "torchvision": _torchvision, "detectron2": _detectron2}[engine](
            file.name, overrides
        )
    return ""


def _classification(file: str, overrides: list[str]) -> None:
    cfg = load_config(classification_config(), file, overrides)
    check_config(cfg)
    if cfg.SOLVER.OPTIMIZER in ("momentum", "sgd"):
        optimization.build_scheduler(cfg, optimization.build_optimizer(cfg, _linear()), 10).step_update(1)


def _torchvision(file: str, overrides: list[str]) -> None:
    cfg = load_detection_config(file, overrides)
    optimizer = detector.build_optimizer(cfg, _linear())
    scheduler = detector.build_scheduler(cfg, optimizer)
    optimizer.step()
    scheduler.step()


def _detectron2(file: str, overrides: list[str]) -> None:
    cfg = load_detectron2_config(file, overrides)
    check_types(cfg)
    check_values(cfg, RULES)
    check_values(cfg, {**input_rules(cfg), **dependent_rules(cfg)})
    check_augmentation(cfg)
    check_norms({"MODEL.RESNETS.NORM": cfg.MODEL.RESNETS.NORM}, check_norm)
    eval_iterations(cfg.TEST.EVAL_ITERATIONS, cfg.SOLVER.MAX_ITER)
    DefaultTrainer.build_lr_scheduler(cfg, build_detectron2_optimizer(cfg, _linear()))


def _files(engine: str) -> list[Path]:
    files = (file for folder in CONFIGS[engine] for file in sorted((ROOT / "configs" / folder).glob("*.yaml")))
    return [file for file in files if "\nTOOL:" not in file.read_text()]  # which a study has


def _text(file: Path) -> str:
    """With the path of its base, so that it may stand anywhere."""
    base = yaml.safe_load(file.read_text()).get("_BASE_")
    text = file.read_text()
    return text.replace(base, str((file.parent / base).resolve())) if base else text


def _whole_text(file: Path) -> str:
    """With all that its bases say, in the place of their names."""
    tree: dict = {}
    for key, value in read_config(file).items():
        *groups, name = key.split(".")
        functools.reduce(lambda node, group: node.setdefault(group, {}), groups, tree)[name] = value
    return yaml.safe_dump(tree)


def _mutated(rng: random.Random, text: str) -> bytes:
    """A text with another value, other bytes or another structure, up to three times."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        lines = text.splitlines() or [""]
        i, kind = rng.randrange(len(lines)), rng.randrange(10)
        key, colon, _ = lines[i].partition(":")
        if kind < 5 and colon:
            lines[i] = f"{key}: {rng.choice((rng.choice(VALUES), str(rng.randrange(9)), str(rng.random())))}"
        elif kind == 5:
            lines[i] = " " * rng.randrange(5) + lines[i].lstrip()
        elif kind == 6:
            lines.insert(rng.randrange(len(lines) + 1), lines[i])
        elif kind == 7:
            lines[i] = rng.choice(("- ", "? ", "<<: ", "--- ", "%", "\t", "_BASE_: ", "[", "{", "& ", "* ")) + lines[i]
        elif kind == 8:
            del lines[i]
        else:
            at = rng.randrange(len(lines[i]) + 1)
            lines[i] = lines[i][:at] + rng.choice(string.printable + "\0é\ufeff\x85\u2028") + lines[i][at + 1 :]
        text = "\n".join(lines)
    content = bytearray(text.encode())
    if content and rng.random() < 0.2:
        for _ in range(rng.randrange(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def _mutated_overrides(rng: random.Random, keys: list[str]) -> list[str]:
    given = []
    for _ in range(rng.randrange(4)):
        value = rng.choice((*VALUES, "".join(rng.choices(string.printable, k=rng.randrange(30)))))
        given += [rng.choice(keys), value.strip("'")]
    if given and rng.random() < 0.2:
        given.insert(rng.randrange(len(given)), rng.choice(("--resume", "", "MODEL", "_BASE_", "K" * 999)))
    return given


def _keys(engine: str) -> list[str]:
    def keys_of(node, prefix=""):
        for name, value in node.items():
            yield from keys_of(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]

    if engine == "detectron2":
        return list(keys_of(get_cfg()))
    return list(keys_of(classification_config() if engine == "classification" else detection_config()))


def _mutations(engine: str, number: int, seed: int = 0) -> list[tuple[str, bytes, list[str]]]:
    """The first is a file as it stands, which is accepted; every second one of the others is of a whole text, where a
    change meets a value more often than the syntax."""
    rng = random.Random(f"{engine} {seed}")
    files, keys = _files(engine), _keys(engine)
    cases = [(engine, _text(files[0]).encode(), [])]
    for i in range(1, number):
        text = (_text, _whole_text)[i % 2](rng.choice(files))
        cases += [(engine, _mutated(rng, text), _mutated_overrides(rng, keys) if rng.random() < 0.5 else [])]
    return cases


def _each_key(engine: str, number: int, seed: int = 0) -> dict[tuple[str, str], tuple[str, bytes, list[str]]]:
    """Key and value -> a case that sets it; each key has 0, -1, not a number, and so many others of ``VALUES``."""
    rng = random.Random(f"{engine} {seed}")
    cases = {}
    for key in _keys(engine):
        *groups, name = key.split(".")
        for value in ("0", "-1", ".nan", *rng.sample(VALUES, number)):
            text = "".join(f"{' ' * i}{part}:\n" for i, part in enumerate(groups))
            text += f"{' ' * len(groups)}{name}: {value}\n"
            if engine == "detectron2":
                text = f"_BASE_: {ROOT / 'configs' / 'Base-RCNN-FPN.yaml'}\n{text}"
            cases[key, value] = engine, text.encode(), []
    return cases


def sweep(engine: str, mutations: int, values: int, seed: int = 0) -> None:
    """Both, in one process."""
    mutated, each_key = _mutations(engine, mutations, seed), _each_key(engine, values, seed)
    cases = [*mutated, *each_key.values()]
    ended = outcomes(load_and_check, cases, seconds=20, mebibytes=200)
    assert_sound(ended, cases)
    assert {"done", "refused"} == {each.kind for each in ended[:mutations]}
    assert max(len(each.text) for each in ended) < 3000
    silent = [
        (key, value, each.text)
        for (key, value), each in zip(each_key, ended[mutations:])
        if each.kind == "refused" and key.rpartition(".")[2] not in each.text and "config file" not in each.text
    ]
    assert not silent, silent[:5]


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_but_sentences(engine):
    sweep(engine, mutations=100, values=2)
