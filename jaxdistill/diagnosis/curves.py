"""Charts of one axis over a run's updates, small enough for a phone: lines, stacked shares, the plane of both collapses.

Each is a figure without words of the user's in it, and without a legend: the page sets names, where they wrap and never overlap.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from jaxdistill.diagnosis.charts import corners
from jaxdistill.diagnosis.plots import COLOURS, GREY, new_figure, style
from jaxdistill.diagnosis.records import Series

WIDTH, HEIGHT = 3.4, 2.1  # inches: a phone's width at the size that text is read at
MARGINS = dict(left=0.135, right=0.965, top=0.97, bottom=0.18)  # fixed: to measure the text of every chart takes twice as long as it all
BUCKETS = 120  # of a curve: each keeps its least and its largest value, so that no spike is lost
DECADES = 1e8  # of a logarithmic axis, at most
RANGE = 20  # of positive values, from which on the axis is logarithmic


class Chart(NamedTuple):
    """title and note: above it. alt: what it shows, for those who do not see it. figure: one axis, its artists labelled."""

    title: str
    note: str
    alt: str
    figure: Figure


def lines(
    title: str, curves: Mapping[str, Series], note: str = "", *, limits: tuple[float, float] | None = None, sizes: bool = False
) -> Chart:
    """A line each, over the updates; one for several that are the same. What is not finite is a gap in the line and a cross at the upper
    edge. limits: of the axis. sizes: numbers of which the order of magnitude counts: on a logarithmic axis where they are far apart, on
    which 0 lies at the lower edge; others are on one where all are above 0."""
    figure, axis = small()
    merged = _merged(curves)
    finite = {name: curve.values[np.isfinite(curve.values)] for _, name, curve in merged}
    every = np.concatenate([*finite.values(), np.zeros(0)])
    for index, name, curve in merged:
        steps, values = envelope(curve)
        few = np.isfinite(values).sum() < 2  # no line to be seen
        axis.plot(steps, np.where(np.isfinite(values), values, np.nan), label=name, linewidth=1.3, marker="o" if few else None,
                  markersize=3, **style(index))
    bad = np.unique(np.concatenate([curve.steps[~np.isfinite(curve.values)] for curve in curves.values()] or [np.zeros(0)]))
    if len(bad):
        shown = bad[:: max(1, len(bad) // BUCKETS)]
        axis.plot(shown, np.ones(len(shown)), transform=axis.get_xaxis_transform(), linestyle="none", marker="x", markersize=4,
                  color=COLOURS[1], clip_on=False, label="not finite")
    positive = every[every > 0]
    if limits:
        axis.set_ylim(limits)
    elif len(every) and every.min() == every.max() != 0:  # as far from 0 as from the edge: its last digits are no news
        axis.set_ylim(sorted((0.0, 2 * every[0])))
    elif len(positive) and (sizes or len(positive) == len(every)) and positive.max() > RANGE * positive.min():
        axis.set_yscale("log")
        axis.set_ylim(0.7 * max(positive.min(), positive.max() / DECADES), 1.4 * positive.max())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
    _updates(axis)
    told = "; ".join(f"{name} from {values[0]:.3g} to {values[-1]:.3g}" for name, values in finite.items() if len(values))
    told = (told or "no finite value") + (f"; {len(bad)} updates not finite" if len(bad) else "")
    return Chart(title, note, f"{title} over the updates: {told}", figure)


def shares(title: str, steps: np.ndarray, parts: Mapping[str, np.ndarray], note: str = "") -> Chart:
    """Stacked shares of a whole over the updates. parts: name -> [points], of which absolute values are taken; not finite counts as 0."""
    figure, axis = small()
    sizes = np.abs(np.nan_to_num(np.stack(list(parts.values())), nan=0.0, posinf=0.0, neginf=0.0))
    cuts = np.unique(np.linspace(0, len(steps), min(BUCKETS, len(steps)) + 1).astype(int))[:-1]
    counts = np.diff(np.append(cuts, len(steps)))
    sizes, at = np.add.reduceat(sizes, cuts, axis=1) / counts, np.add.reduceat(steps, cuts) / counts
    share = sizes / np.maximum(sizes.sum(axis=0), 1e-30)
    if len(at) == 1:  # a bar's width for one moment
        at, share = np.array([at[0] - 0.5, at[0] + 0.5]), np.repeat(share, 2, axis=1)
    looks = [dict(facecolor=COLOURS[i % len(COLOURS)], alpha=(0.9, 0.55, 0.3)[i // len(COLOURS) % 3]) for i in range(len(parts))]
    below = np.zeros(len(at))
    for name, part, look in zip(parts, share, looks, strict=True):
        axis.fill_between(at, below, below + part, label=name, linewidth=0, **look)
        below = below + part
    axis.set_ylim(0, 1)
    axis.margins(x=0)
    _updates(axis)
    told = "; ".join(f"{name} from {part[0]:.0%} to {part[-1]:.0%}" for name, part in zip(parts, share, strict=True))
    return Chart(title, note, f"{title}, stacked, over the updates: {told}", figure)


def plane(entropy: Series, spread: Series, top: float | None) -> Chart:
    """Where the predictions of a run went: entropy against spread in nats, with the corners of both collapses. top: log of the number of
    classes, which bounds their sum; None: not known."""
    figure, axis = small(2.5)
    x, y = (curve.values for curve in (entropy, spread))
    good = np.isfinite(x) & np.isfinite(y)
    x, y, steps = x[good], y[good], entropy.steps[good]
    bound = top or 1.15 * float(np.max(x + y, initial=1e-3))
    corners(axis, bound, line=top is not None)
    chosen = np.unique(np.linspace(0, max(len(x) - 1, 0), min(len(x), BUCKETS)).astype(int))
    axis.plot(x[chosen], y[chosen], color=COLOURS[0], linewidth=1, alpha=0.6)
    if len(x):
        point = dict(color=COLOURS[0], marker="o", markersize=5, linestyle="none")
        axis.plot(x[0], y[0], markerfacecolor="none", label=f"update {steps[0]}", **point)
        axis.plot(x[-1], y[-1], label=f"update {steps[-1]}", **point)
    axis.set(xlabel="entropy, mean H(p), nats", ylabel="H(mean p) − mean H(p), nats")
    told = f"from {x[0]:.3g} and {y[0]:.3g} to {x[-1]:.3g} and {y[-1]:.3g} nats" if len(x) else "no finite value"
    title = "entropy and spread of predictions"
    return Chart(title, "red: each is one-hot; orange: all are alike", f"{title}: {told}", figure)


def align(charts: Sequence[Chart]) -> None:
    """Gives charts of the same thing the same axes, so that they can be compared by eye; not where one of them is logarithmic alone."""
    axes = [chart.figure.axes[0] for chart in charts]
    if len({axis.get_yscale() for axis in axes}) > 1:
        return
    ends = np.array([[axis.get_xlim(), axis.get_ylim()] for axis in axes])  # [charts, 2, 2]
    for axis in axes:
        axis.set(xlim=(ends[:, 0, 0].min(), ends[:, 0, 1].max()), ylim=(ends[:, 1, 0].min(), ends[:, 1, 1].max()))


def envelope(curve: Series) -> Series:
    """`curve` in at most 2 x BUCKETS points: of each stretch of updates the least and the largest value, in their order."""
    if len(curve.steps) <= 2 * BUCKETS:
        return curve
    cuts = np.linspace(0, len(curve.steps), BUCKETS + 1).astype(int)
    kept = []
    for start, end in zip(cuts, cuts[1:], strict=False):
        part = curve.values[start:end]
        good = np.isfinite(part)
        most = np.where(good, part, -np.inf).argmax() if good.all() else np.argmin(good)  # a gap is to be seen too
        kept += sorted({start + int(np.where(good, part, np.inf).argmin()), start + int(most)})
    return Series(curve.steps[kept], curve.values[kept])


def _merged(curves: Mapping[str, Series]) -> list[tuple[int, str, Series]]:
    """Curves that are the same as one, with all their names: one would hide the others. Each with the place of the first of them, so that a
    name has one colour in all charts of the same names."""
    same: dict[tuple, list[int]] = {}
    for index, curve in enumerate(curves.values()):
        same.setdefault((curve.steps.tobytes(), curve.values.tobytes()), []).append(index)
    names = list(curves)
    return [(places[0], ", ".join(names[place] for place in places), curves[names[places[0]]]) for places in same.values()]


def small(height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure of one axis in the size of these charts."""
    figure, (axis,) = new_figure(WIDTH, height, layout=None)
    figure.subplots_adjust(**MARGINS | dict(bottom=MARGINS["bottom"] * HEIGHT / height))
    axis.tick_params(labelsize=7, length=2, color=GREY)
    axis.xaxis.label.set_size(7)
    axis.yaxis.label.set_size(7)
    return figure, axis


def _updates(axis) -> None:
    axis.set_xlabel("updates")
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
