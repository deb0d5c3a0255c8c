"""The report page, made from run folders as the engine leaves them."""

import base64
import io
import json
import re

import pytest
from PIL import Image

from fbn_plugin.engine.data.demo_data import make_digits_on_photos
from fbn_plugin.engine.data.named_sets import resolve_dataset
from fbn_plugin.engine.reports.report import ap_table, write_report
from fbn_plugin.engine.run.cli import format_table


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = make_digits_on_photos(tmp_path_factory.mktemp("report") / "digits", num_train=1, num_val=3)
    return resolve_dataset(f"{folder}:val")


@pytest.fixture
def runs(data, tmp_path):
    """Two runs with known figures; the second detects nothing, and COCO had no large objects to score."""
    folders = {"BN": tmp_path / "bn", "<FBN>": tmp_path / "fbn"}
    for offset, (label, folder) in enumerate(folders.items()):
        (folder / "inference").mkdir(parents=True)
        rows = [{"iteration": i, "total_loss": 3.0 - i / 10} for i in range(9)]
        rows += [{"iteration": 4, "bbox/AP": 10.0, "segm/AP": 8.0}]
        rows += [{"iteration": 8, "bbox/AP": 20.04 + offset, "bbox/AP50": 40.0, "bbox/AP75": None, "segm/AP": 18.0}]
        (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
        results = [{**each, "score": 0.9} for each in data.annotations] if label == "BN" else []
        (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(results))
    return folders


def test_table_holds_the_last_evaluation(runs):
    rows = ap_table(runs)
    assert rows[0] == ["norm", "box AP", "box AP50", "box AP75", "mask AP", "mask AP50", "mask AP75"]
    assert rows[1:] == [
        ["BN", "20.0", "40.0", "-", "18.0", "-", "-"],
        ["<FBN>", "21.0", "40.0", "-", "18.0", "-", "-"],
    ]
    lines = format_table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[1].startswith("|--")


def test_page_stands_alone_and_shows_everything(runs, data, tmp_path):
    page = tmp_path / "report.html"
    write_report(page, "A & B", ["reduced run"], data, runs, ["python tools/train_detection.py"])
    text = page.read_text()
    assert "A &amp; B" in text and "&lt;FBN&gt;" in text and "<FBN>" not in text
    assert "reduced run" in text and "<td>21.0</td>" in text and "python tools/train_detection.py" in text
    assert 'src="http' not in text and "<script" not in text and "<link" not in text
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", text)
    assert len(pictures) == 2
    for picture in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(picture)))
        assert min(image.size) > 200 and image.convert("L").getextrema()[0] < 100, "something is drawn"
