"""Reading back what a detection run left in its OUTPUT_DIR, whether detectron2 or torchvision trained it: settings,
evaluations, weights, detections."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fbn_plugin.engine.run.config import read_config
from fbn_plugin.engine.run.evaluation_names import folder_name, metric_prefix
from fbn_plugin.engine.run.logging import is_figure, read_metrics
from fbn_plugin.engine.run.output_dir import holds_run, last_checkpoint
from fbn_plugin.engine.run.run_info import read_record, read_run_info
from fbn_plugin.frameworks.detectron2_keys import KEYS
from fbn_plugin.registry import NormSpec, norm_options, parse_spec

__all__ = [
    "INFO_KINDS",
    "NORM_KEYS",
    "Run",
    "RunFolder",
    "check_kinds",
    "is_classification",
    "named_checkpoint",
    "norm_label",
    "read_run",
    "run_titles",
]

# Where a config names a norm, the backbone's first.
NORM_KEYS = tuple(f"MODEL.{part}.NORM" for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"))

_NEEDED = {
    "MODEL.RESNETS.NORM": str,
    "DATASETS.TRAIN": list,
    "DATASETS.TEST": list,
    "SOLVER.IMS_PER_BATCH": int,
    "SOLVER.MAX_ITER": int,
    "SEED": int,
}

# Of ``run_info.json``, whichever engine wrote it.
INFO_KINDS = {"hardware": str, "processes": int, "train_images": dict, "test_images": dict}

# What `save_config` leaves out, as YAML has it.
_DEFAULTS = {key: list(value) if isinstance(value, tuple) else value for key, value in KEYS.items()}


@dataclass(frozen=True)
class RunFolder:
    """A run folder of any engine.

    Attributes:
        folder: OUTPUT_DIR.
        config: ``config.yaml``, each key written out with its dots, and the keys that are left out there.
        info: ``run_info.json``; empty where there is none.
    """

    folder: Path
    config: dict[str, Any]
    info: dict[str, Any]

    @property
    def is_evaluation(self) -> bool:
        """Whether nothing was trained in the folder, only evaluated."""
        return not (self.folder / "metrics.json").is_file() and (self.folder / "evaluation.json").is_file()

    @property
    def metrics_file(self) -> Path:
        """``metrics.json``; FileNotFoundError where there is none."""
        path = self.folder / "metrics.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.folder} is no run folder with evaluations: it has neither metrics.json nor evaluation.json"
            )
        return path


class Run(RunFolder):
    """A detection run's folder."""

    @property
    def engine(self) -> str:
        """``"detectron2"`` or ``"torchvision"``."""
        # detectron2 writes the settings of all of its models, the other engine those that it reads.
        guess = "detectron2" if "MODEL.RETINANET.NUM_CLASSES" in self.config else "torchvision"
        return self.info.get("engine", guess)

    @property
    def norm(self) -> str:
        """The backbone's norm, see ``norm_label``."""
        return norm_label(self.config["MODEL.RESNETS.NORM"])

    @property
    def seed(self) -> int | None:
        """SEED, or None for a run that drew its own."""
        return self.config["SEED"] if self.config["SEED"] >= 0 else None

    @property
    def images_per_batch(self) -> int:
        """Of all processes together."""
        return self.info.get("images_per_batch", self.config["SOLVER.IMS_PER_BATCH"])

    @property
    def max_iter(self) -> int:
        """Iterations of the whole run. Where the number of processes scaled the batch, it scaled them inversely."""
        return round(self.config["SOLVER.MAX_ITER"] * self.config["SOLVER.IMS_PER_BATCH"] / self.images_per_batch)

    @property
    def test_sets(self) -> list[str]:
        return self.config["DATASETS.TEST"]

    def evaluations(self, dataset: str) -> dict[int, dict[str, float | None]]:
        """AP in percent on a set of DATASETS.TEST: finished iterations -> ``{"bbox/AP": 31.2, ...}``, in order.

        None where COCO has no such objects. An iteration that was evaluated twice, as after an interruption, has the
        later figures. A folder of ``--eval-only`` has one evaluation, that of ``evaluation.json``.

        Raises:
            FileNotFoundError, ValueError: neither ``metrics.json`` nor ``evaluation.json`` is there, or it is not what
                it should be.
        """
        if self.is_evaluation:
            return self._one_evaluation(dataset)
        prefix = metric_prefix(dataset, self.test_sets)
        found: dict[int, dict[str, float | None]] = {}
        for row in read_metrics(self.metrics_file):
            values = {}
            for key, value in row.items():
                if key.startswith((f"{prefix}bbox/", f"{prefix}segm/")):
                    known = value is not None and not math.isnan(value)
                    values[key.removeprefix(prefix)] = float(value) if known else None
            if values:  # detectron2 counts the evaluation at the end one iteration further
                found.setdefault(min(row["iteration"] + 1, self.max_iter), {}).update(values)
        return dict(sorted(found.items()))

    @property
    def evaluated_weights(self) -> tuple[str, int | None]:
        """Of a folder of ``--eval-only``: which weights, and the iterations that they have behind them; None if they do
        not tell."""
        content = self._evaluation()
        iteration = content["iteration"]
        return str(content["weights"]), None if iteration is None else iteration + 1

    def _evaluation(self) -> dict[str, Any]:
        path = self.folder / "evaluation.json"
        content = read_record(path)
        kinds = {"iteration": int | None, "weights": str | None, "dataset": list, "metrics": dict}
        for key, kind in kinds.items():
            value = content.get(key, ...)
            if (
                not isinstance(value, kind)
                or isinstance(value, bool)
                or (key == "iteration" and not 0 <= (value or 0) < 2**63)
            ):
                raise ValueError(f"{path} is no evaluation: it has no {key!r} of the right type")
        return content

    def _one_evaluation(self, dataset: str) -> dict[int, dict[str, float | None]]:
        content = self._evaluation()
        prefix = metric_prefix(dataset, content["dataset"])
        if dataset not in content["dataset"]:
            return {}
        groups = (f"{prefix}bbox/", f"{prefix}segm/")
        values = {
            key.removeprefix(prefix): value for key, value in content["metrics"].items() if key.startswith(groups)
        }
        if wrong := [k for k, v in values.items() if not is_figure(v)]:
            raise ValueError(
                f"{self.folder / 'evaluation.json'}: {wrong[0]} must be a number or null, got {values[wrong[0]]!r:.80}"
            )
        return {self.evaluated_weights[1] or self.max_iter: values}

    def detects_nothing(self, dataset: str) -> bool:
        """Whether the file of the last evaluation's detections on a set is there, and empty."""
        try:
            path = self.detections(dataset)
        except FileNotFoundError:
            return False
        return path.stat().st_size < 10 and path.read_text().strip() == "[]"

    def weights(self, given: str | os.PathLike | None = None) -> Path:
        """The checkpoint to evaluate: ``given`` (a path, or a name in the folder), else ``model_final.pth``, else the
        one that ``last_checkpoint`` names.

        Raises:
            FileNotFoundError, ValueError: it is not there, or ``last_checkpoint`` names none.
        """
        if given is not None:
            return named_checkpoint(self.folder, given)
        found = self.folder / "model_final.pth"
        if not found.is_file():
            found = Path(last_checkpoint(self.folder)) if holds_run(self.folder) else None
        if found is None and self.is_evaluation:
            raise FileNotFoundError(
                f"{self.folder} has no checkpoint, as nothing was trained in it: name one by --weights, such as "
                f"{self.evaluated_weights[0]}"
            )
        if found is None:
            raise FileNotFoundError(f"{self.folder} has no checkpoint: neither model_final.pth nor a last_checkpoint")
        return found

    def detections(self, dataset: str) -> Path:
        """The detections of the run's last evaluation on a set.

        Raises:
            FileNotFoundError: there are none.
        """
        folder = self.folder / "inference"
        own = folder / folder_name(dataset)  # where DATASETS.TEST has more than one
        places = [own, folder] if len(self.test_sets) == 1 else [own]
        found = [path for path in (place / "coco_instances_results.json" for place in places) if path.is_file()]
        if not found:
            raise FileNotFoundError(f"{self.folder} has no detections on {dataset}: {places[-1]} has no "
                                    "coco_instances_results.json")  # fmt: skip
        return found[0]


def named_checkpoint(folder: Path, given: str | os.PathLike) -> Path:
    """A checkpoint by its path or its name in a run folder; FileNotFoundError where it is neither."""
    found = next((path for path in (Path(given), folder / given) if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"checkpoint {given} is not there, nor in {folder}")
    return found


def check_kinds(path: Path, content: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    """ValueError for the first of some keys whose value in a file is of another type; they may be absent."""
    for key, kind in kinds.items():
        if not isinstance(content.get(key, kind()), kind):
            raise ValueError(f"{path}: {key} must be of type {kind.__name__}, got {content[key]!r:.80}")


def is_classification(folder: str | os.PathLike) -> bool:
    """Whether a classification run is in a folder, by its ``run_info.json`` or else its ``config.yaml``.

    Raises:
        ValueError: a file there is none of a run's.
    """
    folder = Path(folder)
    if engine := read_run_info(folder).get("engine"):
        return engine == "classification"
    path = folder / "config.yaml"
    return path.is_file() and "MODEL.NAME" in read_config(path)


def read_run(folder: str | os.PathLike) -> Run:
    """Read a run folder's settings.

    Raises:
        FileNotFoundError, ValueError: it is not there, or lacks what a detection run writes; one sentence.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"run folder {folder} is not there")
    path = folder / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} is no run folder: it has no config.yaml")
    config = {**_DEFAULTS, **read_config(path)}
    for key in _NEEDED:
        if key not in config:
            raise ValueError(f"{folder} is no run folder of a detector: its config.yaml has no {key}")
    check_kinds(path, config, _NEEDED)
    for key in ("SOLVER.IMS_PER_BATCH", "SOLVER.MAX_ITER"):
        if config[key] < 1:
            raise ValueError(f"{path}: {key} must be 1 or more, got {config[key]}")
    info = read_run_info(folder)
    images = info.get("images_per_batch", 1)
    if not isinstance(images, int) or images < 1:
        raise ValueError(f"{folder / 'run_info.json'}: images_per_batch must be 1 or more, got {images!r}")
    check_kinds(folder / "run_info.json", info, {"engine": str, **INFO_KINDS, "imports": list})
    return Run(folder, config, info)


def norm_label(spec: str) -> str:
    """A norm's spec without the options that are the default, so that ``FBN(t_sigma=5.0)`` is ``FBN``."""
    try:
        parsed = parse_spec(spec)
    except ValueError:  # a name that detectron2 alone has, or none
        return spec or "no norm"
    defaults = norm_options(parsed.name)
    return str(NormSpec(parsed.name, {key: v for key, v in parsed.options.items() if v != defaults[key]}))


def run_titles(runs: Sequence[Run]) -> list[str]:
    """A short name for each run that no other has: its norm, with the seed, or its folder."""
    for title in (lambda run: run.norm, lambda run: f"{run.norm}, seed {run.seed}", lambda run: str(run.folder)):
        titles = [title(run) for run in runs]
        if len(set(titles)) == len(runs):
            return titles
    raise ValueError(f"a run folder is given more than once: {', '.join(titles)}")
