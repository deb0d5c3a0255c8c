"""timm's and detectron2's own scripts by ``python -m fbn_plugin``, where TIMM_CHECKOUT and DETECTRON2_CHECKOUT name
checkouts of theirs."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from documentation import snippets
from PIL import Image
from tiny_detectron2 import CONFIG, TINY

ROOT = Path(__file__).parents[2]

DATA = """
from detectron2.data.datasets import register_coco_instances

register_coco_instances("shapes", {{}}, "{folder}/annotations/instances_train.json", "{folder}/train")
"""

LAZY = """
from detectron2 import model_zoo
from detectron2.config import LazyCall
from fvcore.common.param_scheduler import LinearParamScheduler

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
dataloader = model_zoo.get_config("common/data/coco.py").dataloader
optimizer = model_zoo.get_config("common/optim.py").SGD
train = model_zoo.get_config("common/train.py").train
lr_multiplier = LazyCall(LinearParamScheduler)(start_value=1.0, end_value=1.0)

body = model.backbone.bottom_up
body.stages.norm = body.stem.norm = "FBN(t_sigma=4)"
body.freeze_at = 0
model.roi_heads.num_classes = 2
dataloader.train.dataset.names = "shapes"
dataloader.train.total_batch_size = 2
dataloader.train.num_workers = 0
dataloader.train.mapper.instance_mask_format = "bitmask"
dataloader.train.mapper.augmentations = []
train.update(device="cpu", max_iter=1, eval_period=100, init_checkpoint="", output_dir="{out}")
del dataloader.test, dataloader.evaluator, body
"""


def checkout(variable: str) -> Path:
    path = Path(os.environ.get(variable, "")).absolute()
    if not os.environ.get(variable) or not path.is_dir():
        pytest.skip(f"{variable} names no checkout")
    return path


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "fbn_plugin", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("norm", ["fbn4", "fbn(t_sigma=4)"])
def test_timms_train(norm, tmp_path):
    pytest.importorskip("timm")
    folder = checkout("TIMM_CHECKOUT")
    if "=" in norm and "split('=')" in (folder / "timm" / "utils" / "misc.py").read_text():
        pytest.skip("timm before 1.0.30 splits the values of --model-kwargs at every =")
    noise = np.random.default_rng(0)
    for split in ("train", "validation"):
        for number, label in enumerate("ab" * 4):
            (tmp_path / split / label).mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(noise.integers(0, 256, (40, 40, 3), dtype=np.uint8))
            image.save(tmp_path / split / label / f"{number}.png")
    named = next(each.values[0] for each in snippets(ROOT / "docs" / "timm.md") if "def FBN4" in each.values[0])
    (tmp_path / "my_norms.py").write_text(named)
    options = ["--import", tmp_path / "my_norms.py", folder / "train.py", tmp_path]
    options += ["--model", "test_resnet", "--model-kwargs", f"norm_layer={norm}", "--num-classes", 2]
    options += ["--img-size", 32, "--epochs", 1, "-b", 4, "--device", "cpu", "--workers", 1]
    run(*options, "--output", tmp_path / "out")
    assert list(tmp_path.glob("out/*/last.pth.tar"))


@pytest.mark.detectron2
class TestDetectron2:
    @pytest.fixture
    def given(self, shapes, tmp_path):
        pytest.importorskip("detectron2", reason="detectron2 is not installed")
        (tmp_path / "someones_data.py").write_text(DATA.format(folder=shapes))
        return "--import", tmp_path / "someones_data.py"

    def test_train_net_and_export_model(self, given, tmp_path, shapes):
        tools, out = checkout("DETECTRON2_CHECKOUT") / "tools", tmp_path / "out"
        options = [*TINY, "DATASETS.TRAIN", "('shapes',)", "DATASETS.TEST", "()", "MODEL.ROI_HEADS.NUM_CLASSES", "2"]
        options += ["INPUT.MASK_FORMAT", "bitmask", "SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "2"]
        said = run(*given, tools / "train_net.py", "--config-file", CONFIG, *options, "OUTPUT_DIR", out)
        assert "FilteredBatchNorm2d" in said and (out / "model_final.pth").exists()

        pytest.importorskip("cv2", reason="detectron2's export_model.py wants OpenCV")
        export = [tools / "deploy" / "export_model.py", "--config-file", out / "config.yaml", "--format", "torchscript"]
        weights = ["MODEL.WEIGHTS", out / "model_final.pth", "MODEL.DEVICE", "cpu"]
        for method in ("tracing", "scripting"):
            how = ["--export-method", method, "--sample-image", shapes / "train" / "0.png"]
            run(*export, *how, "--output", tmp_path / method, *weights)
            assert (tmp_path / method / "model.ts").exists()

    def test_lazyconfig_train_net(self, given, tmp_path):
        pytest.importorskip("detectron2.model_zoo", reason="detectron2's model zoo wants setuptools below 81")
        script = checkout("DETECTRON2_CHECKOUT") / "tools" / "lazyconfig_train_net.py"
        (tmp_path / "lazy.py").write_text(LAZY.format(out=tmp_path / "out"))
        assert "FilteredBatchNorm2d" in run(*given, script, "--config-file", tmp_path / "lazy.py")
        assert (tmp_path / "out" / "model_final.pth").exists()
