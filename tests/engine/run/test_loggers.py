"""Where figures go besides metrics.json: a CSV file that an interruption leaves no line in twice, Weights & Biases."""

import csv
import json
import sys

import pytest

from fbn_plugin.engine.run.loggers import check_loggers
from fbn_plugin.engine.run.logging import TrainingLog, read_metrics


def table(folder):
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def as_text(row, columns):
    """A line of metrics.json as the table should have it."""
    return {name: "" if row.get(name) is None else str(row[name]) for name in columns}


def test_the_table_has_each_line_of_metrics_json_once(tmp_path):
    def train(start, stop, loggers=("csv",)):
        with TrainingLog(tmp_path, 8, start, 2, loggers=loggers) as log:
            for iteration in range(start, stop):
                log.step(iteration, total_loss=0.5 + iteration, lr=0.1, time=1.0, data_time=0.5)
                if iteration % 3 == 0:
                    log.write(iteration, {"val/top1": 10.0 * iteration, "val/loss": float("nan")})

    train(0, 2, loggers=())  # from its middle on, a run is logged so
    assert not (tmp_path / "metrics.csv").exists() and not list(tmp_path.glob("events*"))
    train(2, 7)
    train(4, 8)  # killed behind the checkpoint of iteration 3
    rows, found = read_metrics(tmp_path / "metrics.json"), table(tmp_path)
    assert next(iter(found[0])) == "iteration" and {"val/top1", "val/loss", "total_loss", "lr"} < set(found[0])
    assert found == [as_text(row, found[0]) for row in rows]
    assert [row["iteration"] for row in found if row["total_loss"]] == ["1", "3", "5", "7"]
    assert [row["iteration"] for row in found if row["val/top1"]] == ["0", "3", "6"]


WANDB = """
import json, os

class errors:
    class Error(Exception):
        pass

def Settings(**options):
    return options

class Run:
    def __init__(self, **options):
        self.file = open(os.path.join(options["dir"], "said.jsonl"), "a")
        self.say({name: options[name] for name in ("id", "name", "config", "resume")})
    def say(self, what):
        self.file.write(json.dumps(what) + "\\n")
    def log(self, values, step):
        self.say({"step": step, **values})
    def finish(self):
        self.file.close()

def init(**options):
    if os.environ.get("WANDB_MODE") != "offline":
        raise errors.Error("api_key not configured (no-tty).\\n  Run wandb login")
    return Run(**options)
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A package of that name that writes down what it is told."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_NAME", raising=False)
    sys.modules.pop("wandb", None)
    yield
    sys.modules.pop("wandb", None)


def test_a_resumed_run_is_the_same_one_there(tmp_path, wandb, monkeypatch):
    folder = tmp_path / "fbn-1"
    folder.mkdir()
    for start, stop in ((0, 2), (2, 4)):
        with TrainingLog(folder, 4, start, 2, loggers=("wandb",), config={"SEED": 3}) as log:
            for iteration in range(start, stop):
                log.step(iteration, total_loss=1.0, lr=0.1, time=1.0)
            log.write(stop - 1, {"val/top1": 5.0, "val/loss": float("nan")})
    said = [json.loads(line) for line in (folder / "said.jsonl").read_text().splitlines()]
    runs, lines = ([each for each in said if ("id" in each) is new] for new in (True, False))
    assert len(runs) == 2 and runs[0] == runs[1] and runs[0]["name"] == "fbn-1" and runs[0]["config"] == {"SEED": 3}
    assert [(line["step"], line.get("val/top1")) for line in lines] == [(1, None), (1, 5.0), (3, None), (3, 5.0)]
    assert "val/loss" not in lines[1]
    # Another run in the same place is another one there.
    TrainingLog(folder, 4, 0, 2, loggers=("wandb",), config={}).close()
    assert json.loads((folder / "said.jsonl").read_text().splitlines()[-1])["id"] != runs[0]["id"]
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ValueError, match=r"LOGGERS: wandb: api_key not configured \(no-tty\). Run wandb login$"):
        TrainingLog(folder, 4, 0, 2, loggers=("wandb",))


def test_what_is_there_and_what_is_not(monkeypatch, wandb):
    check_loggers(("csv", "wandb", "tensorboard"))
    check_loggers(())
    for names in (("cvs",), ("csv", "csv")):
        with pytest.raises(ValueError, match="LOGGERS must be some of 'csv', 'tensorboard', 'wandb', each once, got "):
            check_loggers(names)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"whose package is not installed \(pip install wandb\)"):
        check_loggers(("wandb",))
