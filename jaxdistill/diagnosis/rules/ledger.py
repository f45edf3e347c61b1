"""Rules about the ledger: whether it adds up, counts anything, and which of its lines moves the total."""

import numpy as np

from jaxdistill.diagnosis.finding import Finding
from jaxdistill.diagnosis.records import Job, Run
from jaxdistill.diagnosis.rules.series import alive, applied


def ledger_gap(run: Run, job: Job) -> Finding | None:
    """The terms add up to another number than the loss: one update is enough.

    Not float rounding, which is a hundred times below the bound; not an update that is not finite."""
    bound = run.get("gates.ledger_gap", 1e-4)
    gap = np.where(applied(run), run.updates["gap"], 0.0)
    if not (gap > bound).any():
        return None
    worst = int(np.argmax(gap))
    return Finding(
        "ledger_gap", "error",
        f"in {np.sum(gap > bound)} of {len(gap)} logged updates the terms do not add up to the loss; at update {run.steps[worst]} the "
        f"loss is {run.updates['loss'][worst]:.6g}, the relative gap {gap[worst]:.1e}",
        "the loss holds something that no term reports, reports what it does not hold, or scales a sum twice",
        "return every addend of the recipe's loss as a Term and multiply its sum by dials.scale[name] once",
    )


def non_finite(run: Run, job: Job) -> Finding | None:
    """Updates whose loss, gradient or outcome is not finite; they change nothing. An error where the run ended in them or most are, a
    warning from 5 % on, else a note: one overflow in a thousand updates is skipped and forgotten."""
    bad, logged = ~applied(run), len(run.steps)
    if not bad.any():
        return None
    skipped = int(np.nanmax(run.updates["skipped"]))
    streak = logged - (np.flatnonzero(~bad)[-1] + 1 if (~bad).any() else 0)
    share = max(skipped / max(int(run.steps[-1]), 1), float(bad.mean()))
    severity = "error" if streak >= min(run.get("gates.non_finite", 5), 3) or share > 0.5 else "warning" if share > 0.05 else "note"
    first = int(np.flatnonzero(bad)[0])
    terms = [name for name in run.terms if not np.isfinite(run.term(name)[first])]
    backward = not np.isfinite(run.updates["grad_norm"][first])
    where = (f"first in the term(s) {', '.join(terms)}" if terms else "the loss is finite there, its gradient is not" if backward else
             "loss and gradient are finite there, what the update would have written is not")  # fmt: skip
    early = first == 0
    cause = ("from the first update on: an input, a label or the mask is not what the loss expects" if early else
             "it came while training: a division by 0, a logarithm of 0 or an overflow")  # fmt: skip
    lr = float(run.updates["lr"][first])
    cure = "inspect " + (f"the term {terms[0]} of the recipe's loss" if terms else "the backward pass: 0 times infinity under a where"
                         if backward else "the section optimizer, the groups' rates and what `whole` carries")
    return Finding(
        "non_finite", severity,
        f"{skipped} of {run.steps[-1]} updates were not finite, the first logged one is {run.steps[first]}; {where}",
        cause,
        cure + ("" if early else f"; a lower rate often cures it: {job.flag(run, 'train.lr', f'{min(lr / 10, 1e-3):.1g}')}"),
    )


def all_masked(run: Run, job: Job) -> Finding | None:
    """A term with a weight that counts no example in 3 updates or more (fewer where a gate stopped the run) and in a twentieth of all: its
    0 is 0/0.

    Not a term whose weight is 0, which is off; not one that is met, whose count is above 0; not lm in batches that the student wrote, in
    which there is no text to count."""
    worst, least = None, 1 if run.gate("all_masked") else 3
    for name in run.terms:
        on = (run.term(name, "weight") != 0) & applied(run)
        on &= (name != "lm") | (run.updates["sampled"] != 1)
        empty = on & (run.term(name, "count") == 0)
        often = empty.sum() > 0.05 * on.sum() and empty.sum() >= least
        if often and (worst is None or empty.sum() > worst[1].sum()):
            worst = name, empty, on
    if worst is None:
        return None
    name, empty, on = worst
    steps = run.steps[empty]
    return Finding(
        "all_masked", "error" if empty.sum() > 0.5 * on.sum() else "warning",
        f"the term {name} counts nothing in {empty.sum()} of the {on.sum()} logged updates in which it has a weight ({steps[0]} to "
        f"{steps[-1]}): its value of 0 is 0/0, and not a term that is met",
        "the mask leaves no label: labels are all padding or all of another document, or the mask is inverted",
        "look at the first batch with its labels and mask (--dry_run), then at where the batch gets `valid` (of text: data/packing.py "
        "and recipes/lm.py: next_token)",
    )


def reweighted(run: Run, first: slice, last: slice) -> tuple[float, float, float] | None:
    """The loss in `first`, the loss in `last`, and what the loss would be with the raw values of `first` and the weights of `last`.

    Medians over both. A term that is off in `first` keeps its value of `last`: nothing is known of it before."""
    names = [name for name in run.terms if alive(run, name)[last].any()]
    median = lambda name, field, part: float(np.nanmedian(run.term(name, field)[part]))  # noqa: E731
    before = {name: median(name, "weighted", first) for name in run.terms}
    after = {name: median(name, "weighted", last) for name in names}
    held = 0.0
    for name in names:
        was, now = median(name, "weight", first), median(name, "weight", last)
        held += before[name] * now / was if was and alive(run, name)[first].any() else after[name]
    return (sum(before.values()), sum(after.values()), held) if names else None


def weight_schedule_mimics(run: Run, job: Job) -> Finding | None:
    """The loss moves by a quarter or more, and 70 % of that is the weights' doing: what it would have done with every raw value as at the
    start. A warning from 20 updates on, and only where raw values themselves do not improve (progress) or the loss doubles (explosion);
    otherwise a note, as every ramp does this a little.

    Not learning, in which raw values move; not a term that is switched on, whose value before is unknown."""
    logged = len(run.steps)
    if logged < 2 or not applied(run).all():
        return None
    size = max(1, logged // 10)
    found = reweighted(run, slice(0, size), slice(logged - size, logged))
    if found is None:
        return None
    before, after, held = found
    move, by_weights = after - before, held - before
    if move == 0 or abs(move) < 0.25 * abs(before) or not 0.7 <= by_weights / move <= 1.5:
        return None
    falls = move < 0
    serious = logged >= 20 and (after >= 0.97 * held if falls else after > 2 * before)
    steps = run.steps[size - 1], run.steps[logged - size]
    weights = {name: (np.nanmedian(run.term(name, "weight")[:size]), np.nanmedian(run.term(name, "weight")[-size:])) for name in run.terms}
    moved = {name: pair for name, pair in weights.items() if not np.isclose(*pair, rtol=0.02)}
    told = ", ".join(f"{name} {a:.3g} to {b:.3g}" for name, (a, b) in moved.items())
    return Finding(
        "weight_schedule_mimics", "warning" if serious else "note",
        f"the loss went from {before:.4g} (up to update {steps[0]}) to {after:.4g} (from update {steps[1]} on); with the change of the "
        f"weights alone ({told}) it would be {held:.4g}: {by_weights / move:.0%} of the move",
        f"the schedule of the weights makes the {'progress' if falls else 'explosion'}; the raw values tell what was learned",
        f"read the raw terms, or an evaluation, instead of the loss; to compare runs, hold the weight of {', '.join(moved)} constant",
        "experiments/claims/README.md",
    )


def term_dominates(run: Run, job: Job) -> Finding | None:
    """One of three or more terms holds over 90 % of the loss (in magnitude) in the last quarter of the updates though it has less than
    half of the weights, or over 90 % of the gradient (deep probe) though it has less than half of the loss. A warning from 20 updates
    on, below that a note.

    Not a loss with small penalties, where the large term has the large weight by design; not a term that led at the start only."""
    logged = len(run.steps)
    names = [name for name in run.terms if logged and alive(run, name)[-1]]
    if len(names) < 2:
        return None
    tail = slice(logged - max(1, logged // 4), logged)
    median = lambda name, field: float(np.nanmedian(np.abs(run.term(name, field)[tail])))  # noqa: E731
    weighted, weight = ({name: median(name, field) for name in names} for field in ("weighted", "weight"))
    whole, weights = sum(weighted.values()), sum(weight.values())
    top = max(names, key=weighted.get)
    severity = "warning" if logged >= 20 else "note"
    step, loss = int(run.steps[-1]), float(run.updates["loss"][-1])
    if whole > 0 and len(names) >= 3 and weighted[top] > 0.9 * whole and weight[top] < 0.5 * weights:
        raw, share = float(run.term(top)[-1]), weighted[top] / whole
        return Finding(
            "term_dominates", severity,
            f"{top} owns {share:.1%} of the loss ({loss:.7g} at update {step}; {top} {raw:.4g} times {weight[top]:.3g}), with "
            f"{weight[top] / weights:.0%} of the weights",
            f"the raw value of {top} is {_ratio(run, top, names, tail):.3g} times that of the others together: its unit, not its "
            "weight, decides what is learned",
            _balance(run, job, top, 2 * weighted[top] / (whole - weighted[top])),
        )
    shares = [(at, line["terms"]) for at, line in run.log.deep[-2:] if line.get("terms")]
    if whole > 0 and shares:
        top = max(shares[-1][1], key=lambda name: shares[-1][1][name]["share"])
        held = all(terms.get(top, {}).get("share", 0) > 0.9 for _, terms in shares)
        if held and len(shares[-1][1]) >= 3 and weighted.get(top, 0) < 0.5 * whole and weight.get(top, 0) < 0.5 * weights:
            return Finding(
                "term_dominates", severity,
                f"{top} owns {shares[-1][1][top]['share']:.1%} of the gradient at update {shares[-1][0]}, with "
                f"{weighted.get(top, 0) / whole:.0%} of the loss",
                f"the gradient of {top} is out of proportion to its value",
                _balance(run, job, top, 2 * shares[-1][1][top]["share"] / (1 - shares[-1][1][top]["share"])),
            )
    return None


def _ratio(run: Run, top: str, names: list[str], tail: slice) -> float:
    raw = {name: float(np.nanmedian(np.abs(run.term(name)[tail]))) for name in names}
    return raw[top] / max(sum(raw.values()) - raw[top], 1e-12)


def _balance(run: Run, job: Job, top: str, factor: float) -> str:
    """factor: by how much the weight is too large."""
    if run.get(f"{top}.weight") is None:
        return f"divide the weight of {top} in the recipe by {factor:.2g}, or normalise what it compares"
    lower = job.flag(run, f"{top}.weight", f"'((0.0, {run.term(top, 'weight')[-1] / factor:.1g}),)'")
    return f"bring its size to that of the others: {lower}" + (f", or {job.flag(run, 'react.balance', 'lm')}" if run.get("react") else "")
