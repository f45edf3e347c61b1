"""Pictures of a job from its records: {run id: list of metrics.jsonl objects}. No display is needed."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#1f6fb4", "#d1495b", "#2e8b57", "#8d6cab", "#e08e2b", "#5b6770")
STYLES = ("-", "--", ":")
GREY, DASHES = "#5b6770", ((0, (4, 2)), (0, (1, 2)), (0, (6, 2, 1, 2)))  # of what did not train, so that it is no run's curve


def _figure(width: float = 7.2, height: float = 3.4, panels: int = 1, rows: int = 1, height_ratios=None):
    """(figure, its rows x panels axes, row by row)."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, panels, squeeze=False, height_ratios=height_ratios).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def validation(records: dict, metric: str, label: str, levels: dict[str, float]) -> Figure:
    """`metric` of every evaluation over the updates: a line for each run, and for one of several seeds their mean with each
    seed behind it. `levels` are runs that did not train: a horizontal line each, unless it is far from all curves."""
    figure, (axis,) = _figure()
    for index, (name, runs) in enumerate(_by_name(records).items()):
        look = _look(index)
        seen = ([line for line in lines if metric in line.get("evaluation", {})] for lines in runs.values())
        curves = [{line["step"]: line["evaluation"][metric] for line in lines} for lines in seen if lines]
        if len(curves) > 1:
            for curve in curves:
                axis.plot(*zip(*curve.items(), strict=True), linewidth=0.6, alpha=0.4, **look)
            common = sorted(set.intersection(*map(set, curves)))
            axis.plot(common, [sum(curve[step] for curve in curves) / len(curves) for step in common], marker="o", markersize=3,
                      label=f"{name} (mean of {len(curves)})", **look)
        elif curves:
            axis.plot(*zip(*curves[0].items(), strict=True), marker="o", markersize=3, label=next(iter(runs)), **look)
    low, high = axis.get_ylim()
    for index, (name, runs) in enumerate(_by_name(levels).items()):
        value = sum(runs.values()) / len(runs)
        if low - (high - low) <= value <= high + (high - low):  # others would flatten it
            text = f"{name if len(runs) > 1 else next(iter(runs))} (not trained)"
            axis.axhline(value, linestyle=DASHES[index % len(DASHES)], linewidth=1, color=GREY, label=text)
    axis.set(xlabel="updates", ylabel=label, title=f"{label} on the validation split")
    if axis.get_legend_handles_labels()[0]:  # no run of the job may have a validation split
        axis.legend(fontsize=8, frameon=False)
    return figure


def _look(index: int) -> dict:
    """Of the line `index`: no two of the first eighteen look alike."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[index // len(COLOURS) % len(STYLES)]}


def _by_name(runs: dict) -> dict[str, dict]:
    """{"kd-0": a, "kd-1": b} -> {"kd": {"kd-0": a, "kd-1": b}}."""
    groups: dict[str, dict] = {}
    for run, value in runs.items():
        groups.setdefault(run.rsplit("-", 1)[0], {})[run] = value
    return groups


def terms(run: str, lines: list[dict]) -> Figure:
    """The ledger of one run: every active term, raw and weighted."""
    figure, axes = _figure(panels=2, height=3.0)
    lines = _thin([line for line in lines if "terms" in line])
    names = [name for name in lines[-1]["terms"] if any(line["terms"][name]["count"] for line in lines)] if lines else []
    for axis, kind in zip(axes, ("raw", "weighted"), strict=True):
        for index, name in enumerate(names):
            axis.plot([line["step"] for line in lines], [_number(line["terms"][name][kind]) for line in lines],
                      linewidth=1, label=name, **_look(index))
        axis.set(xlabel="updates", title=f"{run}: loss terms, {kind}")
        axis.legend(fontsize=7, frameon=False, ncols=1 + len(names) // 5)
    return figure


def schedules(run: str, lines: list[dict]) -> Figure:
    """Weights and knobs, and the learning rate of each group."""
    figure, axes = _figure(panels=2, height=3.0)
    lines = _thin([line for line in lines if "terms" in line])
    steps = [line["step"] for line in lines]
    curves = {f"weight of {name}": [line["terms"][name]["weight"] for line in lines] for name in (lines[-1]["terms"] if lines else {})}
    curves = {name: values for name, values in curves.items() if any(values)}
    curves |= {name: [line["knobs"][name] for line in lines] for name in (lines[-1]["knobs"] if lines else {})}
    for index, (name, values) in enumerate(curves.items()):
        axes[0].plot(steps, values, linewidth=1.2, label=name, **_look(index))
    for index, group in enumerate(lines[-1]["groups"] if lines else {}):
        axes[1].plot(steps, [line["groups"][group]["lr"] for line in lines], linewidth=1.2,
                     color=COLOURS[index % len(COLOURS)], label=group, linestyle=STYLES[index % len(STYLES)])
    axes[0].set(xlabel="updates", title=f"{run}: weights and knobs")
    axes[1].set(xlabel="updates", title=f"{run}: learning rate by group")
    for axis in axes:
        axis.legend(fontsize=7, frameon=False, ncols=1 + len(axis.lines) // 6)
    return figure


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


def _thin(lines: list[dict], most: int = 1000) -> list[dict]:
    return lines[:: max(1, len(lines) // most)]


def _number(value) -> float:
    return float(value)  # non-finite numbers are written as strings
