"""What the figures show: bands and lines are the values that were given, with labelled axes."""

import math

import numpy as np
import pytest
from matplotlib.image import imread

from fbn_plugin.analysis import pictures
from fbn_plugin.analysis.landscape import Landscape
from fbn_plugin.analysis.moments import MomentDistance


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that were drawn."""
    figures, to_png = [], pictures.to_png

    def keep(figure):
        figures.append(figure)
        return to_png(figure)

    monkeypatch.setattr(pictures, "to_png", keep)
    return figures


def band(panel, number: int = 0) -> set[tuple[float, float]]:
    """The corners of a band."""
    (path,) = panel.collections[number].get_paths()
    return {tuple(point) for point in path.vertices.tolist()}


def labels(figure) -> list[str]:
    (legend,) = figure.legends  # one for all panels
    return [text.get_text() for text in legend.get_texts()]


def test_landscapes_are_bands_over_the_iterations(drawn, tmp_path):
    runs = {
        name: {
            "iteration": [10, 20, 30],
            "loss_min": [1.0 * scale, 0.8, math.nan],
            "loss_max": [2.0 * scale, 1.5, math.nan],
            "gradient_min": [0.1, 0.2, 0.3],
            "gradient_max": [0.4, 0.5, 0.6 * scale],
        }
        for name, scale in (("BN", 1), ("FBN", 2))
    }
    path = tmp_path / "figure.png"
    path.write_bytes(pictures.draw_landscapes(runs, "MNIST"))
    assert imread(path).shape[1] > 800
    loss, gradient = drawn[0].axes
    assert labels(drawn[0]) == ["BN", "FBN"]
    assert {(10.0, 2.0), (10.0, 4.0), (20.0, 1.5)} <= band(loss, 1) and (30.0, 1.2) in band(gradient, 1)
    assert (10.0, 1.0) in band(loss) and (30.0, 0.3) in band(gradient)
    assert (loss.get_xlabel(), loss.get_ylabel()) == ("iteration", "loss")
    assert gradient.get_ylabel() == "ℓ2 change of the gradient" and gradient.get_ylim()[0] == 0


def test_steps_begin_at_the_weights_themselves(drawn):
    one = Landscape((0.2, 0.1), loss=1.0, gradient_norm=1.0, losses=(0.6, 0.8), changes=(0.5, 0.3))
    other = Landscape((0.2, 0.1), loss=2.0, gradient_norm=1.0, losses=(1.6, 1.8), changes=(0.7, 0.5))
    pictures.draw_steps({"run": [one, other]})
    loss, gradient = drawn[0].axes
    np.testing.assert_allclose(loss.lines[0].get_xydata(), [(0, 1.5), (0.1, 1.3), (0.2, 1.1)])
    np.testing.assert_allclose(gradient.lines[0].get_xydata(), [(0, 0), (0.1, 0.4), (0.2, 0.6)])
    assert {(0.2, 0.6), (0.2, 1.6)} <= band(loss) and loss.get_xlabel() == "step size along the gradient"


def test_moments_have_a_row_for_each_run_and_a_line_for_each_norm(drawn):
    curve = {"iteration": [1, 2], "mean": [0.5, 0.4], "var": [0.3, 0.2]}
    runs = {"first": {"BN": curve, "FBN": {**curve, "var": [0.9, 0.8]}}, "second": {"FBN": curve}}
    pictures.draw_moments(runs, ["BN", "FBN"])
    panels = drawn[0].axes
    assert [panel.get_title() for panel in panels] == ["first", "first", "second", "second"]
    assert labels(drawn[0]) == ["BN", "FBN"] and [len(panel.lines) for panel in panels] == [2, 2, 1, 1]
    assert panels[1].lines[1].get_ydata().tolist() == [0.9, 0.8]
    assert panels[2].lines[0].get_color() == panels[0].lines[1].get_color()  # one colour for a norm
    assert panels[1].get_ylabel() == "difference of the variances" and panels[1].get_xlabel() == "iteration"


def test_distances_have_a_place_for_each_layer(drawn):
    def distances(scale: float) -> dict:
        one = MomentDistance(0.0, 0.0, 0.1 * scale, 0.2, 0.0, 0.0)
        return {"conv": {"BN": one}, "fc": {"BN": MomentDistance(0.0, 0.0, 0.3, 0.4, 0.0, 0.0)}}

    pictures.draw_distances({"run": [distances(1), distances(3)]}, ["BN", "FBN"])
    mean, var = drawn[0].axes
    np.testing.assert_allclose(mean.lines[0].get_ydata(), [0.2, 0.3])
    np.testing.assert_allclose(var.lines[0].get_ydata(), [0.2, 0.4])
    assert [text.get_text() for text in mean.get_xticklabels()] == ["conv", "fc"] and labels(drawn[0]) == ["BN"]
    assert "in deviations" in mean.get_ylabel() and "in variances" in var.get_ylabel()
