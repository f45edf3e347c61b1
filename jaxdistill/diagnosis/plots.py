"""What all pictures share, the validation curves of a job, and a recipe's attention maps. No display is needed."""

from collections.abc import Mapping

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#1f6fb4", "#d1495b", "#2e8b57", "#8d6cab", "#e08e2b", "#5b6770")
STYLES = ("-", "--", ":")
GREY, DASHES = "#5b6770", ((0, (4, 2)), (0, (1, 2)), (0, (6, 2, 1, 2)))  # of what did not train, so that it is no run's curve


def new_figure(
    width: float = 7.2, height: float = 3.4, panels: int = 1, rows: int = 1, height_ratios=None, layout: str | None = "constrained"
):
    """(figure, its rows x panels axes, row by row)."""
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, panels, squeeze=False, height_ratios=height_ratios).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def validation(axis, curves: Mapping[str, tuple], levels: Mapping[str, float]) -> None:
    """Draws a metric of the validation split over the updates. curves: run -> (steps, values), arrays [evaluations]: a line for each run,
    and for one of several seeds their mean with each seed behind it. levels: runs that did not train: a horizontal line each, unless it is
    far from all curves."""
    for index, (name, runs) in enumerate(_by_name(curves).items()):
        look = style(index)
        seen = [dict(zip(steps.tolist(), values.tolist(), strict=True)) for steps, values in runs.values()]
        if len(seen) > 1:
            for curve in seen:
                axis.plot(*zip(*curve.items(), strict=True), linewidth=0.6, alpha=0.4, **look)
            common = sorted(set.intersection(*map(set, seen)))
            axis.plot(common, [sum(curve[step] for curve in seen) / len(seen) for step in common], marker="o", markersize=3,
                      label=f"{name} (mean of {len(seen)})", **look)
        elif seen:
            axis.plot(*zip(*seen[0].items(), strict=True), marker="o", markersize=3, label=next(iter(runs)), **look)
    low, high = axis.get_ylim()
    for index, (name, runs) in enumerate(_by_name(levels).items()):
        value = sum(runs.values()) / len(runs)
        if low - (high - low) <= value <= high + (high - low):  # others would flatten it
            text = f"{name if len(runs) > 1 else next(iter(runs))} (not trained)"
            axis.axhline(value, linestyle=DASHES[index % len(DASHES)], linewidth=1, color=GREY, label=text)
    axis.set_xlabel("updates")


def style(index: int) -> dict:
    """Of the line `index`: no two of the first eighteen look alike."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[index // len(COLOURS) % len(STYLES)]}


def _by_name(runs: dict) -> dict[str, dict]:
    """{"kd-0": a, "kd-1": b} -> {"kd": {"kd-0": a, "kd-1": b}}."""
    groups: dict[str, dict] = {}
    for run, value in runs.items():
        groups.setdefault(run.rsplit("-", 1)[0], {})[run] = value
    return groups


def attention(images, names: list[str], maps: dict, queries, grid: tuple[int, int]) -> Figure:
    """A row an image: the image, each of `maps` ({title: [images, patches], or None}) over it, and the patches that were chosen.

    images: uint8 [images, height, width, channels]. queries: int [images, chosen], patches of the grid (rows, columns); or None."""
    maps = {title: values for title, values in maps.items() if values is not None}
    columns = 1 + len(maps) + (queries is not None)
    figure = Figure(figsize=(1.5 * columns, 1.5 * len(images) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(images), columns, squeeze=False)
    height, width = images.shape[1:3]
    for row, image in zip(range(len(images)), images, strict=True):
        picture = image if image.shape[-1] == 3 else image[..., 0]
        for axis in axes[row]:
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
        axes[row][0].set_ylabel(names[row], fontsize=9, rotation=0, labelpad=10)
        for axis, values in zip(axes[row][1:], maps.values(), strict=False):
            axis.imshow(values[row].reshape(grid), cmap="inferno", alpha=0.6, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        if queries is not None:
            chosen = np.zeros(grid[0] * grid[1])
            chosen[queries[row]] = 1
            axes[row][-1].imshow(np.where(chosen, np.nan, 1.0).reshape(grid), cmap="gray", alpha=0.8, vmin=0, vmax=1,
                                 extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    for axis, title in zip(axes[0], ["image", *maps, *(["queries of GLCA"] if queries is not None else [])], strict=True):
        axis.set_title(title, fontsize=8)
    return figure
