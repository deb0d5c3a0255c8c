"""A page that compares detection runs: their AP, their curves, and what they detect. One HTML file that needs no
other."""

import base64
import html
import io
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fbn_plugin.engine.data.coco_data import CocoDataset
from fbn_plugin.engine.files.disk import atomic_write
from fbn_plugin.engine.reports.evaluation import read_detections
from fbn_plugin.engine.reports.pictures import draw_detections
from fbn_plugin.engine.run.evaluation_names import METRICS
from fbn_plugin.engine.run.logging import read_metrics
from fbn_plugin.engine.run.run_info import hardware

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")


def final_metrics(run_dir: Path) -> dict[str, float]:
    """The last value of each ``bbox/...`` and ``segm/...`` entry of a run's ``metrics.json``."""
    rows = read_metrics(Path(run_dir) / "metrics.json")
    return {key: value for row in rows for key, value in row.items() if key.startswith(("bbox/", "segm/"))}


def ap_table(runs: Mapping[str, Path]) -> list[list[str]]:
    """Rows of text, header first: one run a row; box and mask AP in percent; ``-`` where COCO has no such objects."""
    header = ["norm"] + [f"{kind} {metric}" for kind in ("box", "mask") for metric in METRICS[:3]]
    rows = [header]
    for label, run_dir in runs.items():
        metrics = final_metrics(run_dir)
        values = [metrics.get(f"{kind}/{metric}") for kind in ("bbox", "segm") for metric in METRICS[:3]]
        rows.append([label, *("-" if value is None else f"{value:.1f}" for value in values)])
    return rows


def _figure(*size: float, **grid):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**grid)


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def plot_curves(runs: Mapping[str, Path]) -> bytes:
    """PNG of training loss and of AP against the iteration, a colour for each run."""
    figure, (loss_axes, ap_axes) = _figure(11, 3.8, ncols=2)
    for color, (label, run_dir) in zip(COLORS, runs.items()):
        rows = read_metrics(Path(run_dir) / "metrics.json")
        losses = [(row["iteration"] + 1, row["total_loss"]) for row in rows if "total_loss" in row]
        loss_axes.plot(*zip(*losses), color=color, label=label)
        for kind, style, name in (("bbox", "-", "box"), ("segm", "--", "mask")):
            points = [(row["iteration"] + 1, row[f"{kind}/AP"]) for row in rows if row.get(f"{kind}/AP") is not None]
            if points:
                ap_axes.plot(*zip(*points), style, marker="o", markersize=4, color=color, label=f"{label}, {name}")
    loss_axes.set(xlabel="iteration", ylabel="training loss", ylim=(0, None))
    ap_axes.set(xlabel="iteration", ylabel="AP on the validation images (%)", ylim=(0, None))
    for axes in (loss_axes, ap_axes):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def plot_detections(data: CocoDataset, runs: Mapping[str, Path], num_images: int = 6, threshold: float = 0.5) -> bytes:
    """PNG with the ground truth and each run's detections on the first images of ``data`` that have objects.

    Args:
        data: the validation set.
        runs: label -> run folder, which holds ``inference/coco_instances_results.json``.
        num_images: rows.
        threshold: least score of a detection that is drawn.
    """
    detections = {
        label: read_detections(Path(run_dir) / "inference" / "coco_instances_results.json", data)
        for label, run_dir in runs.items()
    }
    with_objects = {each["image_id"] for each in data.annotations if not each["iscrowd"]}
    images = [image for image in data.images if image["id"] in with_objects][:num_images]
    return draw_detections(data, detections, images, threshold, side=320)


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }}
table {{ border-collapse: collapse; margin: 1em 0; }}
th, td {{ padding: .35em .9em; text-align: right; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; }}
img {{ max-width: 100%; }} pre {{ background: #f5f5f5; padding: 1em; overflow-x: auto; font-size: 13px; }}
.note {{ color: #555; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def write_report(
    path: Path,
    title: str,
    facts: Sequence[str],
    data: CocoDataset,
    runs: Mapping[str, Path],
    commands: Sequence[str],
) -> None:
    """Write the page, and its two pictures beside it as ``curves.png`` and ``detections.png``.

    Args:
        path: the HTML file.
        title: its heading.
        facts: paragraphs that say what was run and how the figures are to be read.
        data: the validation set.
        runs: label -> run folder of the detection engine.
        commands: command lines that made the runs.
    """
    header, *rows = ap_table(runs)

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    def picture(name: str, png: bytes, text: str) -> str:
        atomic_write(Path(path).with_name(name), png)
        return f'<p><img alt="{html.escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>'

    body = [f"<p>{html.escape(fact)}</p>" for fact in facts]
    body += ["<h2>Average precision on the validation images</h2>", "<table>", line(header, "th")]
    body += [*(line(row, "td") for row in rows), "</table>"]
    body += ["<h2>Training</h2>", picture("curves.png", plot_curves(runs), "training loss and AP curves")]
    body += ["<h2>Detections</h2>", '<p class="note">Validation images; detections with a score of at least 50 %.</p>']
    body += [picture("detections.png", plot_detections(data, runs), "ground truth and detections on validation images")]
    body += ["<h2>Commands</h2>", f"<pre>{html.escape(chr(10).join(commands))}</pre>"]
    machine = f"{hardware()}; torch {torch.__version__}, Python {platform.python_version()}"
    body += [f'<p class="note">{html.escape(machine)}</p>']
    atomic_write(path, _PAGE.format(title=html.escape(title), body="\n".join(body)).encode())
