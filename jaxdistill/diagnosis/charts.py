"""Charts of what a classifier says: confusion, reliability, both collapses; and of a reservoir: its memory, its activations' shapes.

Each takes arrays and gives a matplotlib figure, for a recipe's `figures`. No display is needed.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from jaxdistill.diagnosis.plots import COLOURS, GREY, new_figure, style

NAMED = 24  # classes whose names fit on an axis
SURE = 10  # rows of a bin that is not pale
COUNTED = 12  # classes whose counts fit into the cells


def confusion(table: np.ndarray, names: Sequence[str] | None = None, worst: int = 8) -> Figure:
    """table: int [classes, classes], how many of class i (down) were taken for j (across). Colour is the share of the class's own rows,
    so that rare classes are seen; the `worst` confusions are listed beside it, as no one reads them off fifty names."""
    classes = len(table)
    names = [str(i) for i in range(classes)] if names is None else list(names)
    rows = table.sum(axis=1)
    share = table / np.maximum(rows, 1)[:, None]
    figure, axes = new_figure(width=8.6, height=5.0, panels=2)
    axis, words = axes
    figure.get_layout_engine().set(wspace=0.05)
    axis.grid(visible=False)
    image = axis.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0, 1))  # the root: a confusion of 5 % is to be seen
    if classes <= COUNTED:
        for (i, j), value in np.ndenumerate(table):
            if value:
                axis.text(j, i, f"{value}", ha="center", va="center", fontsize=7, color="white" if share[i, j] > 0.3 else "black")
    step = 1 if classes <= NAMED else math.ceil(classes / 10)
    ticks = range(0, classes, step)
    labels = names if classes <= NAMED else [str(i) for i in ticks]
    axis.set_xticks(ticks, labels, rotation=90 if classes <= NAMED else 0, fontsize=7)
    axis.set_yticks(ticks, labels, fontsize=7)
    axis.set(xlabel="taken for", ylabel="class")
    right = np.trace(table) / max(table.sum(), 1)
    axis.set_title(f"{right:.1%} of {table.sum():,} are right", fontsize=10)
    figure.colorbar(image, ax=axis, shrink=0.7, label="share of the class")
    wrong = [(int(table[i, j]), i, j) for i in range(classes) for j in range(classes) if i != j and table[i, j]]
    wrong.sort(key=lambda one: (-one[0], one[1], one[2]))
    recall = [(share[i, i], i) for i in range(classes) if rows[i]]
    lines = ["most frequent confusions", ""]
    lines += [f"{count:4d} of {rows[i]:<4d} {names[i]} → {names[j]}" for count, i, j in wrong[:worst]] or ["none"]
    lines += ["", "classes with the lowest recall", ""]
    lines += [f"{value:6.1%}  {names[i]} ({rows[i]})" for value, i in sorted(recall)[:worst]]
    words.axis("off")
    words.text(0, 1, "\n".join(lines), fontsize=7.5, family="monospace", va="top", transform=words.transAxes)
    return figure


def shapes(
    grid: np.ndarray, curves: np.ndarray, target: np.ndarray | None = None, density: np.ndarray | None = None, most: int = 12
) -> Figure:
    """Learned activations, each f over `grid`. grid: [points], curves: [units, points]; of many units `most`, spread evenly over how far
    they moved from the target (without one, from the mean unit). target: [points], what all began as, dashed. density: [points], how
    often inputs lie there, shaded: a shape beyond what comes in means nothing."""
    moved = np.sqrt(np.mean(np.square(curves - (np.mean(curves, axis=0) if target is None else target)[None]), axis=1))
    order = np.argsort(moved)
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(most, len(order))).round().astype(int))]
    columns = min(4, len(chosen))
    figure, axes = new_figure(width=2.1 * columns + 0.4, height=1.7 * math.ceil(len(chosen) / columns) + 0.5, panels=columns,
                              rows=math.ceil(len(chosen) / columns))
    drawn = curves[chosen] if target is None else np.concatenate([curves[chosen], target[None]])
    low, high = drawn.min(), drawn.max()
    pad = 0.05 * max(high - low, 1e-6)
    for axis, unit in zip(axes, chosen, strict=False):
        if density is not None and density.max() > 0:
            axis.fill_between(grid, low - pad, low - pad + (high - low) * density / density.max(), color=GREY, alpha=0.18, linewidth=0)
        if target is not None:
            axis.plot(grid, target, color=GREY, linestyle="--", linewidth=1)
        axis.plot(grid, curves[unit], color=COLOURS[0], linewidth=1.4)
        axis.set_ylim(low - pad, high + pad)
        axis.set_title(f"unit {unit}" + (f", moved {moved[unit]:.2f}" if target is not None else ""), fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes[len(chosen) :]:
        axis.axis("off")
    words = {"activation f(s)": True, "dashed: at the start": target is not None, "grey: where inputs lie": density is not None}
    figure.suptitle(", ".join(word for word, shown in words.items() if shown), fontsize=9)
    return figure


def reliability(found: Mapping[str, tuple]) -> Figure:
    """name -> (count, confidence, correct), each [bins], as evaluators.calibration.reliability gives them: a panel each with what was
    so (bars), how far that is from what was claimed (red), and below how many rows each bin has: bars of fewer than 10 are pale."""
    figure, axes = new_figure(width=3.2 * len(found) + 0.6, height=4.2, panels=len(found), rows=2, height_ratios=(3, 1))
    for column, (name, (count, confidence, correct)) in enumerate(found.items()):
        upper, lower = axes[column], axes[len(found) + column]
        edges, here, total = np.linspace(0, 1, len(count) + 1), count > 0, max(count.sum(), 1)
        width = 1 / len(count)
        for bars, alpha in ((count >= SURE, 0.85), ((count > 0) & (count < SURE), 0.25)):
            upper.bar(edges[:-1][bars], correct[bars], width, align="edge", color=COLOURS[0], alpha=alpha, edgecolor="white", linewidth=0.5)
        upper.vlines(confidence[here], correct[here], confidence[here], color=COLOURS[1], linewidth=2)
        upper.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
        gap = float(count @ np.abs(confidence - correct) / total)
        upper.set(xlim=(0, 1), ylim=(0, 1))
        upper.set_title(f"{name}\nECE {gap:.4f}, {total:,} rows", fontsize=9)
        lower.bar(edges[:-1], count / total, width, align="edge", color=GREY, alpha=0.6, edgecolor="white", linewidth=0.5)
        for edge, number in zip(edges[:-1], count, strict=True):
            if number:
                lower.text(edge + width / 2, number / total, f" {_short(int(number))}", rotation=90, fontsize=6, ha="center", va="bottom")
        lower.set(xlim=(0, 1), ylim=(0, 1.45 * max((count / total).max(), 1e-9)), xlabel="confidence")
        if not column:
            upper.set_ylabel("share that is right")
            lower.set_ylabel("share of rows")
    return figure


def memory(delays: np.ndarray, curves: Mapping[str, np.ndarray]) -> Figure:
    """Memory curve of a reservoir (Jaeger 2001). delays: int [steps]; curves: name -> [steps], the squared correlation of the input that
    many steps ago with its best linear readout from the state now, 0 to 1; the legend has its sum, the memory capacity."""
    figure, (axis,) = new_figure()
    for index, (name, values) in enumerate(curves.items()):
        axis.plot(delays, values, marker="o", markersize=2.5, linewidth=1.2, label=f"{name} (capacity {values.sum():.1f})", **style(index))
    axis.set(xlabel="delay in steps", ylabel="r² of the input recalled", ylim=(-0.03, 1.03), title="memory of the reservoir")
    axis.legend(fontsize=8, frameon=False)
    return figure


def collapse(points: Mapping[str, tuple[float, float]], classes: int, target: tuple[float, float] | None = None) -> Figure:
    """name -> (entropy, spread) in nats: mean H(p) of a prediction against H(mean p) - mean H(p). target: the true distributions' own.

    Entropy + spread = H(mean p), log classes at most, so that all lies below the diagonal; at its left upper end predictions are
    one-hot (saturation), at the bottom all are alike, whatever they say (no variation)."""
    figure, (axis,) = new_figure(width=6.6, height=4.6)
    top = math.log(classes)
    corners(axis, top)
    axis.text(0.30 * top, 0.72 * top, f"H(mean p) = log {classes}", rotation=-45, transform_rotates_text=True, fontsize=8, color=GREY,
              rotation_mode="anchor")
    axis.text(0, 0.52 * top, "saturated: every prediction one-hot", fontsize=8, color=COLOURS[1], rotation=90, va="center", ha="center")
    axis.text(0.1 * top, -0.028 * top, "no variation: the same for all examples", fontsize=8, color="#9a5c10", va="center")
    for index, (name, point) in enumerate(points.items()):
        axis.plot(*point, marker="osD^vP"[index % 6], markersize=7, linestyle="none", label=name, color=COLOURS[index % len(COLOURS)])
    if target is not None:
        axis.plot(*target, marker="*", markersize=13, linestyle="none", color="black", label="the targets")
    axis.set(xlabel="entropy of a prediction, mean H(p), nats", ylabel="spread, H(mean p) − mean H(p), nats",
             title="entropy of predictions, and their spread")
    axis.legend(fontsize=8, frameon=True, framealpha=0.9, edgecolor="none", loc="upper right")
    return figure


def corners(axis, top: float, *, line: bool = True) -> None:
    """Marks both collapses in the plane of entropy and spread, whose sum is at most `top`: at the left saturation (red), at the bottom no
    variation (orange). line: with the bound itself, beyond which nothing lies."""
    least, most = -0.06 * top, 1.06 * top
    if line:
        axis.fill_between([least, most], [top - least, top - most], most, color=GREY, alpha=0.12, linewidth=0)
        axis.plot([0, top], [top, 0], color=GREY, linewidth=1)
    axis.axvspan(least, 0.06 * top, ymax=0.9, color=COLOURS[1], alpha=0.10, linewidth=0)
    axis.axhspan(least, 0.03 * top, color=COLOURS[4], alpha=0.16, linewidth=0)
    axis.set(xlim=(least, most), ylim=(least, most))


def _short(number: int) -> str:
    return f"{number:,}" if number < 10_000 else f"{number / 1000:.0f}k"
