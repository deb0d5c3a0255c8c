"""Matplotlib without a window."""

import io

__all__ = ["COLORS", "new_figure", "to_png"]

# Told apart by everybody (Paul Tol's "bright").
COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")


def new_figure(*size: float, **grid):
    """A matplotlib figure without a window, and its axes.

    Args:
        size: width and height in inches.
        grid: as ``Figure.subplots`` has it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**grid)


def to_png(figure) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
