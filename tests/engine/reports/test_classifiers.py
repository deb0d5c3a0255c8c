"""The page on classifiers: pictures of every number of classes, and what stands in it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fbn_plugin.engine.classification.measures import measure
from fbn_plugin.engine.reports.classifiers import plot_by_class, plot_confusion, summary_rows, write_classifier_report
from fbn_plugin.engine.reports.conditional import plot_relabelling, plot_walks


def measured(classes: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3 * classes) % classes
    logits = torch.randn(len(labels), classes, generator=generator)
    logits[torch.arange(len(labels)), labels] += 2
    return measure(logits.softmax(1), labels)


@pytest.mark.parametrize("classes", [2, 30, 520])
def test_pictures_of_few_and_many_classes(classes):
    found, names = measured(classes), [f"a class with a name that is long, {number}" for number in range(classes)]
    drawn = plot_confusion(found.confusion, names, "a title")
    with Image.open(io.BytesIO(drawn)) as picture:
        assert 400 < picture.width < 1600 and 400 < picture.height < 1600
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20
    plot_by_class({"one": found.by_class, "other": [None, *found.by_class[1:]]}, names)


def test_a_page_with_all_entries(tmp_path):
    entries = {"<FBN>": measured(7), "BN": measured(7, seed=1)}
    names = ["<a>", *"bcdefg"]
    files = write_classifier_report(
        tmp_path / "report.html", "Title & more", ["one <fact>"], names, entries, "a command"
    )
    assert sorted(file.name for file in files) == sorted(path.name for path in tmp_path.iterdir())
    assert {"confusion_1.png", "confusion_2.png", "reliability.png", "by_class.png"} < {file.name for file in files}
    page = (tmp_path / "report.html").read_text()
    assert "Title &amp; more" in page and "&lt;FBN&gt;" in page and "one &lt;fact&gt;" in page and "<a>" not in page
    assert page.count("data:image/png;base64,") == 4 and "a command" in page
    for title, *cells in summary_rows(entries)[1:]:
        figures = entries[title].figures
        assert cells == [f"{figures[name]:.{4 if name == 'loss' else 2}f}" for name in ("top1", "top5", "loss", "ece")]
        assert all(f"<td>{cell}</td>" in page for cell in cells)


def test_walks_and_rounds():
    """A walker's cell is red, a mistake beside it blue, and what nobody walked through is no picture."""
    walk = {"rows": [[1, 0, 0], [1, 0, 1]], "walkers_at": [[0], [1]]}
    with Image.open(io.BytesIO(plot_walks({"weak": [walk], "strong": [], "pairs": [walk]}))) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    red, blue = (np.all(pixels == color, axis=1).sum() for color in ((244, 199, 195), (207, 216, 239)))
    assert red > 1000 and blue == 0
    walk = {"rows": [[1, 1, 0], [1, 0, 1]], "walkers_at": [[0], [1]]}
    with Image.open(io.BytesIO(plot_walks({"weak": [walk]}))) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert np.all(pixels == (207, 216, 239), axis=1).sum() > 1000
    assert plot_walks({}) is plot_walks({"weak": [], "strong": [], "pairs": []}) is None
    assert plot_relabelling({"a run": [90.0, 91.0], "another": [80.0, 80.0]}).startswith(b"\x89PNG")
