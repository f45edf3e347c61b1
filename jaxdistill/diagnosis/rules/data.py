"""Rules about the data: scale, splits, and what is learned by heart."""

import numpy as np

from jaxdistill.diagnosis.finding import Finding
from jaxdistill.diagnosis.records import Job, Run
from jaxdistill.diagnosis.rules.series import curve, epochs, nll, parts

WIDE = 10.0  # deviation of an input column from which it is not scaled; standardised ones have 1
FAR = 20.0  # an input beyond it is an outlier where columns are standardised


def inputs_unscaled(run: Run, job: Job) -> Finding | None:
    """The first training batch enters the model with a column whose deviation is above 10, or with a mean size above 5 (preflight): a
    warning before any update, an error where 20 updates or more have not lowered the loss by 5 %. A few values beyond 20 are a note.

    Not saturation by a high rate: that begins with inputs of size 1."""
    told = run.preflight.get("input") or {}
    if not told or told.get("abs_max") is None:
        return None
    wide, size, far = told.get("std_max") or 0.0, told.get("mean_abs") or 0.0, told["abs_max"]
    numbers = f"in the first batch inputs are up to {far:.4g}, {size:.3g} on average, a column's deviation up to {wide:.4g}"
    if wide <= WIDE and size <= WIDE / 2:
        if far <= 5 * FAR:
            return None
        return Finding(
            "inputs_unscaled", "note",
            numbers,
            "outliers: most columns are scaled",
            "look at the columns they are in",
        )
    loss = parts(curve(run))
    stuck = len(run.steps) >= 20 and loss[0] - loss[-1] < 0.05 * abs(loss[0])
    cure = (f"standardise them: {job.flag(run, 'soft.standardise', True)}" if run.get("soft") is not None else
            "standardise them on the training split (Recipe.calibrate, as recipes/reservoir.py does)")  # fmt: skip
    return Finding(
        "inputs_unscaled", "error" if stuck else "warning",
        numbers,
        "inputs enter the model in their own units: logits are as large, and the softmax saturates on whatever column is largest",
        cure,
        "experiments/soft_label_document_002/README.md",
    )


def classes_disjoint(run: Run, job: Job) -> Finding | None:
    """Classes are tested that never train (preflight): known before the first update; accuracy on them is exactly 0.

    Not a hard task, whose accuracy is above 0."""
    missing = run.preflight.get("unseen_classes") or []
    if not missing:
        return None
    named = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
    return Finding(
        "classes_disjoint", "error",
        f"{len(missing)} classes of validation or test never train: {named}",
        "the split was made by class, or class by class in order",
        f"split by group or at random within classes: {job.flag(run, 'data.split', 'stratified')}",
        "experiments/reservoir_document_000/README.md",
    )


def groups_leak(run: Run, job: Job) -> Finding | None:
    """Rows, documents or groups that two splits share (preflight): what is measured was trained on.

    Not a good result: nothing else tells them apart."""
    shared = run.preflight.get("leaks") or []
    if not shared:
        return None
    named = ", ".join(map(str, shared[:5])) + (f" and {len(shared) - 5} more" if len(shared) > 5 else "")
    return Finding(
        "groups_leak", "error",
        f"two splits share {len(shared)} rows or groups: {named}",
        "the split is not by group, or duplicates are on both sides",
        "split by group (data.split, data.group), and drop duplicates",
    )


def memorised_leak(run: Run, job: Job) -> Finding | None:
    """After 5 epochs or more training examples are known by heart (nll below half of the test's), and validation as well as they
    (within 30 %), and the test is not: validation holds training examples. Needs a finished run.

    Not overfitting, in which validation is as bad as the test; not a test that is only harder, where training is below validation."""
    if run.row is None or not len(run.steps):
        return None
    seen, held_out, trained = epochs(run, int(run.steps[-1])), run.evaluation("validation/nll"), nll(run)
    test = run.row.get("nll")
    if seen is None or seen < 5 or not len(held_out) or len(trained) < 5 or test is None:
        return None
    here, validation = float(np.median(trained.values[-5:])), float(held_out.values[-1])
    if not (here < 0.5 * test and validation < 1.3 * here and validation < 0.5 * test):
        return None
    return Finding(
        "memorised_leak", "warning",
        f"after {seen:.1f} epochs training costs {here:.3g} nats, validation {validation:.3g}, the test {test:.3g}",
        "validation rows (or their duplicates) are in the training split: they are remembered, not predicted",
        "look for duplicates and shared groups between training and validation (data.split, data.group)",
    )


def overfitting(run: Run, job: Job) -> Finding | None:
    """The monitored value was better by 2 % at an earlier evaluation (4 at least), while the training loss went on falling: a note, as the
    best checkpoint is kept; a warning where it ends worse by 10 % than at the first evaluation.

    Not divergence, in which the training loss rises too; not a few examples of a small validation split (two standard errors of an
    accuracy), nor a choice that changes while the cost of the labels stays."""
    monitor = run.get("monitor", "")
    found, sign = run.evaluation(monitor), 1 if run.get("minimize", True) else -1
    if len(found) < 4 or not np.isfinite(found.values).all() or not len(run.steps):
        return None
    cost = sign * found.values
    best = int(np.argmin(cost))
    size = abs(cost[best])
    if best == len(cost) - 1 or cost[-1] - cost[best] < max(0.02 * size, _two_errors(run, found.values[best])):
        return None
    price = run.evaluation("validation/nll").values
    if sign < 0 and len(price) and price[-1] < 1.01 * price.min():
        return None
    trained = curve(run)
    before, after = (trained[: max(1, round(len(trained) * at))][-5:] for at in ((best + 1) / len(cost), 1.0))
    if not np.median(after) < np.median(before):
        return None
    worse = cost[-1] - cost[0] > 0.1 * size
    return Finding(
        "overfitting", "warning" if worse else "note",
        f"{monitor} was best at update {found.steps[best]} ({found.values[best]:.4g}) and is {found.values[-1]:.4g} at "
        f"{found.steps[-1]}, while the training loss fell from {np.median(before):.4g} to {np.median(after):.4g}",
        "the training examples are learned by heart",
        f"the better checkpoint is kept (`best` in results.json); fewer updates ({job.flag(run, 'train.steps', int(found.steps[best]))}), "
        "early stopping (react.patience), more data, or a teacher",
    )


def _two_errors(run: Run, value: float) -> float:
    """Two standard errors of a share of the validation examples; 0 of anything else."""
    count = (run.preflight.get("splits") or {}).get("validation")
    if run.get("minimize", True) or not count or not 0 <= value <= 1:
        return 0.0
    return 2 * float(np.sqrt(value * (1 - value) / count))
