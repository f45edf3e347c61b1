"""Charts hold what they were given, also at the ends: no class, one class, empty bins."""

import numpy as np
import pytest

from jaxdistill.diagnosis import charts
from jaxdistill.evaluators import calibration


def drawn(figure) -> str:
    """All words of a figure that can be drawn."""
    figure.canvas.draw()
    words = [text.get_text() for axis in figure.axes for text in [*axis.texts, axis.title, *axis.get_xticklabels()]]
    words += [text.get_text() for axis in figure.axes if axis.get_legend() for text in axis.get_legend().get_texts()]
    return "\n".join([*words, figure._suptitle.get_text() if figure._suptitle else ""])


@pytest.mark.parametrize("classes", [1, 3, 40])
def test_confusion(classes):
    rng = np.random.default_rng(0)
    table = rng.integers(0, 4, (classes, classes)) + 20 * np.eye(classes, dtype=int)
    table[0, 1 % classes] += 30
    table[classes // 2] = 0 if classes > 2 else table[classes // 2]  # a class without rows
    names = [f"class {i}" for i in range(classes)]
    figure = charts.confusion(table, names)
    said = drawn(figure)
    assert f"{np.trace(table) / table.sum():.1%} of {table.sum():,} are right" in said
    if classes == 1:
        assert "none" in said
    else:
        assert f"{table[0, 1]:4d} of {table[0].sum():<4d} class 0 → class 1" in said
    image = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(image, table / np.maximum(table.sum(1, keepdims=True), 1))
    assert "0.0% of 0 are right" in drawn(charts.confusion(np.zeros((2, 2), int)))


@pytest.mark.parametrize("units", [1, 5, 256])
def test_shapes(units):
    grid = np.linspace(-3, 3, 50)
    curves = np.tanh(grid)[None] + np.arange(units)[:, None] / units
    said = drawn(charts.shapes(grid, curves, np.tanh(grid), np.exp(-(grid**2))))
    assert said.count("moved") == min(units, 12)
    assert f"unit {units - 1}, moved {(units - 1) / units:.2f}" in said  # the one that moved most is always shown
    assert "dashed" in said
    assert "dashed" not in drawn(charts.shapes(grid, curves))


def test_reliability():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), 200)
    found = calibration.reliability(p, rng.integers(0, 3, 200))
    assert found.count[0] == 0  # empty bins too
    figure = charts.reliability({"before": found, "after": found})
    said = drawn(figure)
    assert said.count("200 rows") == 2
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    np.testing.assert_allclose(sorted(heights), sorted(found.correct[found.count > 0]))


def test_memory_and_collapse():
    said = drawn(charts.memory(np.arange(1, 5), {"radius 0.9": np.array([1.0, 0.75, 0.5, 0.25])}))
    assert "radius 0.9 (capacity 2.5)" in said
    figure = charts.collapse({"model": (1.0, 0.5), "constant": (2.0, 0.0)}, 8, (0.5, 1.0))
    assert {"model", "constant", "the targets"} <= set(drawn(figure).split("\n"))
    points = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in figure.axes[0].lines}
    assert (points["model"], points["constant"], points["the targets"]) == ((1.0, 0.5), (2.0, 0.0), (0.5, 1.0))
