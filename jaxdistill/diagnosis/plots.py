"""Pictures of a job from its records: {run id: list of metrics.jsonl objects}. No display is needed."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#1f6fb4", "#d1495b", "#2e8b57", "#8d6cab", "#e08e2b", "#5b6770")


def _figure(width: float = 7.2, height: float = 3.4, panels: int = 1):
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def validation(records: dict, metric: str, label: str, levels: dict[str, float]) -> Figure:
    """`metric` of every evaluation over the updates, one line a run; `levels` are runs that did not train: a
    horizontal line each, unless it is far from all curves."""
    figure, (axis,) = _figure()
    for index, (run, lines) in enumerate(records.items()):
        points = [(line["step"], line["evaluation"][metric]) for line in lines if metric in line.get("evaluation", {})]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=COLOURS[index % len(COLOURS)], label=run)
    low, high = axis.get_ylim()
    near = {run: value for run, value in levels.items() if low - (high - low) <= value <= high + (high - low)}  # others would flatten it
    for index, (run, value) in enumerate(near.items()):
        axis.axhline(value, linestyle=(0, (4, 2)), linewidth=1, color=COLOURS[-1 - index % len(COLOURS)], label=f"{run} (not trained)")
    axis.set(xlabel="updates", ylabel=label, title=f"{label} on validation text")
    axis.legend(fontsize=8, frameon=False)
    return figure


def terms(run: str, lines: list[dict]) -> Figure:
    """The ledger of one run: every active term, raw and weighted."""
    figure, axes = _figure(panels=2, height=3.0)
    lines = _thin([line for line in lines if "terms" in line])
    names = [name for name in lines[-1]["terms"] if any(line["terms"][name]["count"] for line in lines)] if lines else []
    for axis, kind in zip(axes, ("raw", "weighted"), strict=True):
        for index, name in enumerate(names):
            axis.plot([line["step"] for line in lines], [_number(line["terms"][name][kind]) for line in lines],
                      linewidth=1, color=COLOURS[index % len(COLOURS)], label=name)
        axis.set(xlabel="updates", title=f"{run}: loss terms, {kind}")
        axis.legend(fontsize=8, frameon=False)
    return figure


def schedules(run: str, lines: list[dict]) -> Figure:
    """Weights and knobs, and the learning rate of each group."""
    figure, axes = _figure(panels=2, height=3.0)
    lines = _thin([line for line in lines if "terms" in line])
    steps = [line["step"] for line in lines]
    curves = {f"weight of {name}": [line["terms"][name]["weight"] for line in lines] for name in (lines[-1]["terms"] if lines else {})}
    curves |= {name: [line["knobs"][name] for line in lines] for name in (lines[-1]["knobs"] if lines else {})}
    for index, (name, values) in enumerate(curves.items()):
        axes[0].plot(steps, values, linewidth=1.2, color=COLOURS[index % len(COLOURS)], label=name)
    for index, group in enumerate(lines[-1]["groups"] if lines else {}):
        axes[1].plot(steps, [line["groups"][group]["lr"] for line in lines], linewidth=1.2,
                     color=COLOURS[index % len(COLOURS)], label=group, linestyle=("-", "--", ":")[index % 3])
    axes[0].set(xlabel="updates", title=f"{run}: weights and knobs")
    axes[1].set(xlabel="updates", title=f"{run}: learning rate by group")
    for axis in axes:
        axis.legend(fontsize=8, frameon=False)
    return figure


def _thin(lines: list[dict], most: int = 1000) -> list[dict]:
    return lines[:: max(1, len(lines) // most)]


def _number(value) -> float:
    return float(value)  # non-finite numbers are written as strings
