"""Studies for tests: a study file on Digits, and tools of a few milliseconds in the place of those that train and
evaluate."""

from pathlib import Path

from fbn_plugin.engine.studies.jobs import EVALUATION
from fbn_plugin.engine.studies.study_file import StudyFile, read_study

ROOT = Path(__file__).parents[1]
BASE = ROOT / "configs/Digits/lenet5_convs_BN.yaml"

# "Trains" as SOLVER.MAX_ITER says: 1 gives figures, 2 fails as long as there is no file "mended" beside the study's
# folder, 3 waits to be stopped at its first attempt, and has figures at the second.
TOOL = """
import json, os, signal, sys, time

rest = sys.argv[sys.argv.index("auto") + 1 :]
values = dict(zip(rest[::2], rest[1::2]))
folder, what = values["OUTPUT_DIR"], values["SOLVER.MAX_ITER"]
print("threads", os.environ["OMP_NUM_THREADS"], "gpu", os.environ.get("CUDA_VISIBLE_DEVICES"))
if what == "2" and not os.path.exists(os.path.join(folder, "../../../../mended")):
    print("warning: not yet")
    sys.exit("error: " + os.path.join(folder, "nothing") + " is not there")
checkpoint = os.path.join(folder, "last_checkpoint")
if what == "3" and not os.path.exists(checkpoint):
    def stop(number, frame):
        open(checkpoint, "w").write("model_0.pth")
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    open(os.path.join(folder, "waits"), "w").close()
    time.sleep(60)
top1 = 90 + int(values["SEED"]) % 7
with open(os.path.join(folder, "metrics.json"), "w") as file:
    for row in ({"iteration": 0, "val/top1": 50.0}, {"iteration": 1, "val/top1": top1}):
        file.write(json.dumps(row) + "\\n")
json.dump({"top1": top1}, open(os.path.join(folder, "results.json"), "w"))
open(os.path.join(folder, "model_final.pth"), "w").close()
"""

# "Evaluates" checkpoints together; it fails where one is not there, and as long as there is a file "broken" beside the
# study's folder.
EVALUATE = """
import json, os, sys

rest = sys.argv[1:]
folder = rest[rest.index("--output") + 1]
paths = rest[: rest.index("--output")]
names = [rest[i + 1] for i, each in enumerate(rest) if each == "--name"]
missing = [path for path in paths if not os.path.exists(os.path.join(path, "model_final.pth"))]
if missing or os.path.exists(os.path.join(folder, "../../../../broken")):
    sys.exit("error: no checkpoint")
entries = [{"name": name, "metrics": {"top1": 50.0, "loss": 1.0}} for name in names]
if "--ensemble" in rest:
    entries.append({"name": f"ensemble of {len(names)}", "metrics": {"top1": 99.0, "loss": None}})
content = {"entries": entries, "crops": int(rest[rest.index("--crops") + 1]), "hardware": "a CPU", "versions": {}}
json.dump(content, open(os.path.join(folder, "evaluation.json"), "w"))
"""


def write_study(folder: Path, text: str) -> Path:
    """A study file of keys beside TOOL and BASE, in YAML."""
    path = folder / "study.yaml"
    path.write_text(f"TOOL: classification\nBASE: {BASE}\n{text}", encoding="utf-8")
    return path


def study(folder: Path, text: str = "", **variants: int) -> StudyFile:
    """A study of variants that differ in their number of iterations, see :data:`TOOL`."""
    rows = "".join(f"  {name}: {{SOLVER.MAX_ITER: {what}, MODEL.NORM: {name}}}\n" for name, what in variants.items())
    return read_study(write_study(folder, f"VARIANTS:\n{rows}{text or 'SEEDS: 1-2'}\n"), ROOT)


def tool(folder: Path) -> Path:
    """The tool as a file, with the one that evaluates beside it."""
    (folder / EVALUATION).write_text(EVALUATE, encoding="utf-8")
    path = folder / "train.py"
    path.write_text(TOOL, encoding="utf-8")
    return path
