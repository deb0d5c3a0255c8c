"""A page on how classifiers were evaluated, and its pictures: confusion matrices, calibration, accuracy by class."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fbn_plugin.analysis.canvas import COLORS, new_figure, to_png
from fbn_plugin.engine.classification.final_evaluation import Conditional
from fbn_plugin.engine.classification.measures import Measures, Reliability
from fbn_plugin.engine.files.disk import remove_numbered
from fbn_plugin.engine.reports.conditional import plot_relabelling, plot_walks
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

__all__ = ["plot_by_class", "plot_confusion", "plot_reliability", "summary_rows", "write_classifier_report"]

_INK = "#222222"
_ANNOTATED = 20  # classes whose every cell is written out
_NAMED = 60  # classes that have their name at the axis
_CELLS = 250  # rows that a picture can show


def plot_confusion(confusion: np.ndarray, classes: Sequence[str], title: str) -> bytes:
    """PNG of a confusion matrix (true, predicted), each row as shares of its images.

    Up to 20 classes every cell has its number; of more than 60, only some are named, and of more than 250 several
    classes are one cell.

    Args:
        confusion: number of images (C, C).
        classes: names (C).
        title: of the picture.
    """
    from matplotlib.colors import PowerNorm

    count = len(classes)
    cells, step = _joined(confusion)
    rows = cells.sum(axis=1, keepdims=True)
    shares = 100 * np.divide(cells, rows, out=np.zeros(cells.shape), where=rows > 0)
    side = min(11.0, 4.5 + 0.28 * min(count, _NAMED))
    figure, axes = new_figure(side + 1.6, side + 0.6)
    figure.set_layout_engine("compressed")  # the axes are square, and what stands beside them is to be whole
    # The root shows a share of a few percent, too.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    if count <= _ANNOTATED:
        for row, column in np.argwhere(cells):
            color = "white" if shares[row, column] > 35 else _INK
            axes.text(column, row, f"{cells[row, column]:,}", ha="center", va="center", color=color, fontsize=8)
    _name_classes(axes, classes, step)
    what = "class" if step == 1 else f"class (a cell is {step} classes)"
    axes.set(xlabel=f"predicted {what}", ylabel=f"true {what}", title=_wrapped(title, side))
    bar = figure.colorbar(image, ax=axes, fraction=0.045, label="share of the true class (%)")
    bar.set_ticks([0, 1, 5, 10, 25, 50, 75, 100])
    return to_png(figure)


def _joined(confusion: np.ndarray) -> tuple[np.ndarray, int]:
    """Neighbouring classes summed up so that there are no more than ``_CELLS``; how many are one."""
    step = -(-len(confusion) // _CELLS)
    starts = np.arange(0, len(confusion), step)
    return np.add.reduceat(np.add.reduceat(confusion, starts, axis=0), starts, axis=1), step


def _name_classes(axes, classes: Sequence[str], step: int) -> None:
    from matplotlib.ticker import MaxNLocator

    count = len(classes)
    if count <= _NAMED:
        places, names = range(count), [textwrap.shorten(name, 24, placeholder="…") or name[:23] for name in classes]
        size = 9 if count <= _ANNOTATED else 6.5
        axes.set_xticks(places, names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=size)
        axes.set_yticks(places, names, fontsize=size)
        return
    numbers = [int(number) for number in MaxNLocator(10, integer=True).tick_values(0, count - 1) if number < count]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([number / step for number in numbers], [str(number) for number in numbers])


def _wrapped(text: str, inches: float) -> str:
    return textwrap.fill(text, int(inches * 9))


def plot_reliability(entries: Mapping[str, Reliability]) -> bytes:
    """PNG of reliability diagrams side by side: accuracy by confidence, and below it how many images are in a bin.

    Args:
        entries: title -> the bins.
    """
    columns = min(3, len(entries))
    rows = -(-len(entries) // columns)
    grid = {"nrows": 2 * rows, "ncols": columns, "squeeze": False, "height_ratios": [3, 1] * rows, "sharex": True}
    figure, axes = new_figure(4.4 * columns + 0.6, 5.1 * rows + 0.4, **grid)
    for number, (title, bins) in enumerate(entries.items()):
        row, column = divmod(number, columns)
        _draw_reliability(axes[2 * row, column], axes[2 * row + 1, column], title, bins)
    for number in range(len(entries), rows * columns):
        row, column = divmod(number, columns)
        axes[2 * row, column].set_axis_off()
        axes[2 * row + 1, column].set_axis_off()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return to_png(figure)


def _draw_reliability(top, bottom, title: str, bins: Reliability) -> None:
    edges = np.linspace(0, 1, len(bins.images) + 1)
    centres, width = (edges[:-1] + edges[1:]) / 2, edges[1]
    there = bins.images > 0
    x, accuracy, confidence = centres[there], bins.accuracy[there], bins.confidence[there]
    top.bar(x, accuracy, width, color=COLORS[0], edgecolor="white", label="accuracy")
    gap = {
        "facecolor": "none",
        "edgecolor": COLORS[1],
        "hatch": "////",
        "label": "gap between accuracy and confidence",
    }
    top.bar(x, np.abs(confidence - accuracy), width, np.minimum(confidence, accuracy), **gap)
    top.plot([0, 1], [0, 1], "--", color=_INK, linewidth=1, label="accuracy as confidence says")
    title = f"{_wrapped(title, 3.9)}\nECE {100 * bins.error:.2f} %"
    top.set(xlim=(0, 1), ylim=(0, 1.01), ylabel="accuracy")
    top.set_title(title, fontsize=11)
    top.tick_params(labelbottom=False)
    bottom.bar(centres, 100 * bins.images / bins.images.sum(), width, color="#999999", edgecolor="white")
    bottom.set(xlabel="confidence", ylabel="images (%)", ylim=(0, 100))
    bottom.tick_params(labelbottom=True)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)


def plot_by_class(entries: Mapping[str, Sequence[float | None]], classes: Sequence[str]) -> bytes:
    """PNG of the accuracy of each class: a dot for each entry; of more than 60 classes, curves from the worst to the
    best.

    Args:
        entries: title -> accuracy in percent (C), None of a class without images.
        classes: names (C).
    """
    known = {title: np.array(values, dtype=float) for title, values in entries.items()}
    many = len(classes) > _NAMED
    figure, axes = new_figure(9, 4.5 if many else max(2.6, 1.2 + 0.26 * len(classes)))
    for number, (title, values) in enumerate(known.items()):
        color, label = COLORS[number % len(COLORS)], textwrap.shorten(title, 60, placeholder="…")
        if many:
            axes.plot(np.sort(values[~np.isnan(values)]), color=color, label=label)
        else:
            shift = 0.5 * (number - (len(known) - 1) / 2) / len(known)
            axes.plot(values, np.arange(len(classes)) + shift, "o", color=color, markersize=5, label=label)
            axes.axvline(np.nanmean(values), color=color, linewidth=1, alpha=0.5, linestyle="--")
    if many:
        axes.set(xlabel="classes, from the worst to the best", ylabel="accuracy (%)", ylim=(0, 101))
    else:
        axes.set_yticks(range(len(classes)), [textwrap.shorten(name, 30, placeholder="…") for name in classes])
        axes.set(xlabel="accuracy (%); dashed: the mean over classes", xlim=(None, 100.5))
        axes.set_ylim(len(classes) - 0.4, -0.6)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    axes.spines[["top", "right"]].set_visible(False)
    return to_png(figure)


def summary_rows(entries: Mapping[str, Measures]) -> list[list[str]]:
    """Rows of text, header first: an entry a row, its accuracies, loss and calibration error."""
    names = list(next(iter(entries.values())).figures)
    titles = {"top1": "top-1 (%)", "top5": "top-5 (%)", "loss": "loss", "ece": "ECE (%)"}
    digits = {"loss": 4}
    body = [[title, *(f"{m.figures[name]:.{digits.get(name, 2)}f}" for name in names)] for title, m in entries.items()]
    return [["", *(titles[name] for name in names)], *body]


def write_classifier_report(
    path: Path,
    title: str,
    facts: Sequence[str],
    classes: Sequence[str],
    entries: Mapping[str, Measures],
    command: str,
    shown: Mapping[str, Conditional] | None = None,
) -> list[Path]:
    """Write the page, and its pictures beside it: ``reliability.png``, ``by_class.png`` and ``confusion_1.png``, ...

    Args:
        path: the HTML file.
        title: its heading.
        facts: paragraphs that say what was evaluated, and how the figures are to be read.
        classes: their names.
        entries: title -> what was measured.
        command: the command line.
        shown: title -> what balanced batches show of a checkpoint.

    Returns:
        the page and its pictures.
    """
    path, pictures = Path(path), []

    def picture_of(name: str, png: bytes, text: str) -> str:
        pictures.append(path.with_name(name))
        return picture(path, name, png, text)

    body = [*map(paragraph, facts), table(summary_rows(entries))]
    drawn = plot_reliability({name: measures.reliability for name, measures in entries.items()})
    body += [heading("Calibration"), picture_of("reliability.png", drawn, "reliability diagrams")]
    body += [note("ECE: the expected calibration error, the mean distance of accuracy and confidence in 15 bins.")]
    drawn = plot_by_class({name: measures.by_class for name, measures in entries.items()}, classes)
    body += [heading("Accuracy by class"), picture_of("by_class.png", drawn, "accuracy of each class")]
    for number, (name, measures) in enumerate(entries.items(), start=1):
        body.append(heading(f"Confusion: {name}"))
        drawn = plot_confusion(measures.confusion, classes, name)
        body.append(picture_of(f"confusion_{number}.png", drawn, f"confusion matrix of {name}"))
        if mistakes := measures.mistakes(classes):
            rows = [["true class", "predicted", "images"], *([true, said, f"{n:,}"] for true, said, n in mistakes)]
            body += [note("The most frequent confusions:"), table(rows)]
    relabelled = {name: each.relabel for name, each in (shown or {}).items() if each.relabel}
    if relabelled:
        png = plot_relabelling(relabelled)
        body += [heading("Balanced by predictions"), picture_of("relabelling.png", png, "error over the rounds")]
    for number, (name, each) in enumerate((shown or {}).items(), start=1):
        if (png := plot_walks(each.grids)) is not None:
            body += [heading(f"Walks through a balanced batch: {name}")]
            body += [picture_of(f"walks_{number}.png", png, f"classes that {name} predicts")]
    body += [heading("Command"), listing(command), note(machine())]
    write_page(path, title, body)
    remove_numbered(path.parent, "confusion_{}.png", len(entries))
    remove_numbered(path.parent, "walks_{}.png", len(shown or {}))
    return [path, *pictures]
