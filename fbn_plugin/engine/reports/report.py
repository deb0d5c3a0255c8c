"""A page that compares detection runs: their AP, their curves, and what they detect. One HTML file that needs no
other."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fbn_plugin.analysis.canvas import COLORS, new_figure, to_png
from fbn_plugin.engine.data.coco_data import CocoDataset
from fbn_plugin.engine.reports.evaluation import read_detections
from fbn_plugin.engine.reports.page import (
    heading,
    listing,
    machine,
    note,
    paragraph,
    picture,
    table,
    write_page,
)
from fbn_plugin.engine.reports.pictures import draw_detections
from fbn_plugin.engine.run.evaluation_names import METRICS
from fbn_plugin.engine.run.logging import read_metrics


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


def plot_curves(runs: Mapping[str, Path]) -> bytes:
    """PNG of training loss and of AP against the iteration, a colour for each run."""
    figure, (loss_axes, ap_axes) = new_figure(11, 3.8, ncols=2)
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
    return to_png(figure)


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
    path = Path(path)
    body = [*map(paragraph, facts)]
    body += [heading("Average precision on the validation images"), table(ap_table(runs))]
    body += [heading("Training"), picture(path, "curves.png", plot_curves(runs), "training loss and AP curves")]
    body += [heading("Detections"), note("Validation images; detections with a score of at least 50 %.")]
    drawn = plot_detections(data, runs)
    body += [picture(path, "detections.png", drawn, "ground truth and detections on validation images")]
    body += [heading("Commands"), listing("\n".join(commands)), note(machine())]
    write_page(path, title, body)
