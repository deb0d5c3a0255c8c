"""The pictures: they are PNG of the right size, with what was measured at their axes."""

import io

import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("matplotlib")
from fbn_plugin.analysis.activation_figures import bands_figure, kernel_figure
from fbn_plugin.analysis.bands import measure_bands
from fbn_plugin.analysis.layer_names import LayerName


def measured(value=1.0):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(36, 2))
    x = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * value
    return measure_bands(model, [x], kernels=[LayerName("0", 1)])


def test_bands(monkeypatch):
    drawn = []
    monkeypatch.setattr("fbn_plugin.analysis.activation_figures.to_png", lambda canvas: drawn.append(canvas) or b"")
    found = measured()
    bands_figure(found, "A title")
    (axes,) = drawn[0].axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "1", "3"]
    assert "standard deviations" in axes.get_ylabel() and axes.get_title(loc="left") == "A title"
    lines = {tuple(line.get_ydata()) for line in axes.lines}
    for end in (0, 1):
        assert tuple(layer.bands[98][end] for layer in found.layers) in lines
    assert {tuple(layer.minimum for layer in found.layers), tuple(layer.maximum for layer in found.layers)} <= lines
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sum("no norm" in label for label in labels) == 1 and "50 %" in labels


def test_files():
    found = measured()
    with Image.open(io.BytesIO(bands_figure(found))) as picture:
        assert picture.format == "PNG" and picture.width > 500
    kernel = found.kernels[0]
    bare, with_images = (
        kernel_figure(kernel, 1.0, [Image.new("L", (8, 6))] * count, "A title")
        for count in (0, min(9, len(kernel.passing(1.0))))
    )
    assert len(kernel.passing(1.0)) and Image.open(io.BytesIO(with_images)).height > Image.open(io.BytesIO(bare)).height


def test_a_constant_kernel_and_one_without_a_value():
    assert kernel_figure(measured(0.0).kernels[0], 14.0)
    nothing = measured(torch.nan)
    with pytest.raises(ValueError, match="unit 1 of layer '0' has no finite activation"):
        kernel_figure(nothing.kernels[0], 14.0)
    with pytest.raises(ValueError, match="no layer has a finite activation"):
        bands_figure(nothing)
