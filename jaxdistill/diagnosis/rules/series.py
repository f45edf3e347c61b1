"""How the rules look at a curve: in parts, and at what a loss is when its weights stand still."""

import numpy as np

from jaxdistill.diagnosis.records import Run, Series

MAIN = ("lm", "loss", "kl", "focal", "sa", "ce")  # the term that says how well the labels are predicted, by its usual names


def parts(values: np.ndarray, most: int = 10) -> np.ndarray:
    """Medians of consecutive parts of the finite values: at most `most`, fewer where there are fewer values."""
    values = values[np.isfinite(values)]
    return np.asarray([np.median(part) for part in np.array_split(values, min(most, len(values)))]) if len(values) else values


def late(series: Series, share: float = 0.25) -> np.ndarray:
    """The last values: a share of them, and at least two where there are as many."""
    return series.values[-max(2, round(share * len(series))) :]


def total(run: Run, values: np.ndarray) -> float:
    """Sum over all updates so far of what is logged at some of them."""
    return float(np.nansum(values * np.diff(run.steps, prepend=0)))


def applied(run: Run) -> np.ndarray:
    """bool [updates]: those that were finite, and so changed something."""
    return run.updates["finite"] == 1


def comparable(run: Run) -> np.ndarray:
    """bool [updates]: the applied ones whose losses are one curve. Of a run that also trains on what the student itself writes, those on
    text."""
    on_text = applied(run) & (run.updates["sampled"] != 1)
    return on_text if on_text.any() else applied(run)


def alive(run: Run, name: str) -> np.ndarray:
    """bool [updates]: those of `comparable` in which a term had a weight and examples."""
    return (run.term(name, "weight") != 0) & (run.term(name, "count") > 0) & comparable(run)


def throughout(run: Run) -> list[str]:
    """The terms that are alive in (nearly) all of these updates."""
    count = comparable(run).sum()
    return [name for name in run.terms if count and alive(run, name).sum() >= 0.95 * count]


def main_term(run: Run) -> str | None:
    """The term that fits the labels; where none has a usual name, the one with the largest part of the loss at the end."""
    names = throughout(run)
    for name in MAIN:
        if name in names:
            return name
    return max(names, key=lambda name: abs(np.nanmedian(run.term(name, "weighted")[-10:])), default=None)


def curve(run: Run) -> np.ndarray:
    """The loss of the applied updates with every weight as it is at the end: what is left when schedules are taken out.

    Terms that are not there throughout are left out; learned factors too."""
    ok, names = comparable(run), throughout(run)
    if not names:
        return run.updates["loss"][ok]
    return sum(float(np.nanmedian(run.term(name, "weight")[ok][-10:])) * run.term(name)[ok] for name in names)


def nll(run: Run) -> Series:
    """The student's negative log-likelihood of the training labels, in nats: the probe, or the main term where it is nothing else."""
    if len(found := run.probe("nll")):
        return found
    name, ok = main_term(run), comparable(run)
    if name not in MAIN or run.get("lm.smoothing" if name == "lm" else "loss.smoothing", 0):
        return Series(np.zeros(0, int), np.zeros(0))
    return Series(run.steps[ok], run.term(name)[ok])


def epochs(run: Run, step: int) -> float | None:
    """How often each training example has been seen by update `step`; None where nobody wrote how many there are."""
    rows = run.preflight.get("train_rows")
    return step * run.get("train.batch", 0) / rows if rows else None


def progress(run: Run) -> float:
    """The share of the planned updates that are done, 0 to 1."""
    planned = run.get("train.steps", 0)
    return min(float(run.steps[-1]) / planned, 1.0) if planned and len(run.steps) else 0.0


def uniform(run: Run) -> float | None:
    """log K: the nats of a prediction that knows nothing, of K classes or ids."""
    value = run.preflight.get("uniform_nll")
    if value is None and (classes := run.preflight.get("classes")):
        value = float(np.log(classes))
    return value
