"""Rules about what the optimizer does to the parameters: nothing, too little, too much, or away with them."""

import numpy as np

from jaxdistill.diagnosis.finding import Finding
from jaxdistill.diagnosis.records import Job, Run
from jaxdistill.diagnosis.rules.series import applied, curve, parts, total

ROUNDING = 1e-8  # a learning rate below it may change no bit of a float32


def lr_zero(run: Run, job: Job) -> Finding | None:
    """Gradients, and a rate of exactly 0 in all of 5 updates or more (fewer where a gate stopped the run), of the run or of a group with
    most of the parameters.

    Not optimizer_not_stepping, whose rate is above 0; not the last update of a schedule, which is only near 0."""
    lr, steps = run.updates["lr"], run.steps
    if len(lr) < (1 if run.gate("lr_zero") else 5):
        return None
    idle = [name for name in run.groups if (run.group(name, "lr") == 0).all()]
    if not (lr == 0).all() and not (idle and _share(run, idle) > 0.5):
        return None
    if run.get("train.lr", 0) == 0:
        cause, cure = "train.lr is 0", f"set a rate above 0: {job.flag(run, 'train.lr', 0.001)} (AdamW; 5e-5 for pretrained parameters)"
    elif (lr == 0).all():
        cause = f"train.lr is {run.get('train.lr'):g}, but a schedule or a control (Recipe.react) multiplies it by 0"
        cure = "inspect the recipe's react and training/objective.py: learning_rate"
    else:
        cause, cure = f"lr_mult of {', '.join(idle)} is 0", "give these groups an lr_mult above 0 in the recipe's optim_rules"
    grad = float(np.nanmedian(run.updates["grad_norm"]))
    return Finding(
        "lr_zero", "error",
        f"the learning rate is 0 in {len(lr)} logged updates ({steps[0]} to {steps[-1]}), while the gradient's norm is {grad:.3g}",
        cause,
        cure,
    )


def optimizer_not_stepping(run: Run, job: Job) -> Finding | None:
    """A rate above 0 and a gradient, and yet no parameter changes by a bit: in all of 5 updates or more (fewer where a gate stopped the
    run), in every second or third, or in one group only (10 updates).

    Not lr_zero; not frozen parameters, which are in no group here; not a rate so small that rounding swallows it (lr_too_small)."""
    lr, ok = run.updates["lr"], applied(run)
    ok &= (lr > ROUNDING) & (run.updates["grad_norm"] > 0)
    names = [name for name in run.groups if (run.group(name, "lr")[ok] > ROUNDING).all()]
    still = {name: _still(run, name)[ok] for name in names}
    known = ok.sum()
    if known < (1 if run.gate("optimizer_not_stepping") else 5) or not names:
        return None
    everywhere = np.all(list(still.values()), axis=0)
    share = float(everywhere.mean())
    inspect = "inspect what calls tx.update and apply_updates (training/state.py: make_train_step), and the chain in training/optim.py"
    if share == 1:
        return Finding(
            "optimizer_not_stepping", "error",
            f"no bit of any parameter changed in {known} updates, at rates up to {lr[ok].max():.3g} and a gradient of norm "
            f"{np.median(run.updates['grad_norm'][ok]):.3g}",
            "the update is computed and not applied, or applied to another copy",
            inspect,
        )
    if share >= 0.2 and everywhere.sum() >= 3 and known >= 10:
        every = 1 / (1 - share)
        return Finding(
            "optimizer_not_stepping", "error",
            f"no bit of any parameter changed in {everywhere.sum()} of {known} updates "
            f"({', '.join(map(str, run.steps[ok][everywhere][:5]))}, ...), though each had a gradient and a rate",
            f"the optimizer steps only in every {every:.2g}th update, as a wrapper that accumulates gradients does (optax.MultiSteps): "
            "micro-batches are already inside an update",
            f"use train.micro instead of a wrapper; {inspect}",
        )
    for name in names:
        if known >= 10 and still[name].all() and (run.group(name, "grad_norm")[ok] > 0).all():
            return Finding(
                "optimizer_not_stepping", "error",
                f"no bit of the group {name} changed in {known} updates, at rates up to {run.group(name, 'lr').max():.3g} and a "
                f"gradient of norm {np.median(run.group(name, 'grad_norm')[ok]):.3g}, while other groups move",
                f"the group {name} is not given its update",
                inspect,
            )
    return None


def lr_too_small(run: Run, job: Job) -> Finding | None:
    """All planned updates together can move no large group by more than 1 % of its norm, and the loss at constant weights fell by less
    than 2 % (of 0.1 % and 10 %, as batches differ): from 10 updates at half the highest rate or more. Or the schedule is over long
    before the run is (20 updates).

    Not fine-tuning at a small rate, which moves little and lowers the loss; not a warm-up, whose updates are left out."""
    lr, ok = run.updates["lr"], applied(run)
    if not ok.any() or not run.groups or not (lr[ok] > 0).any():
        return None
    high = ok & (lr >= 0.5 * lr[ok].max())
    if high.sum() >= 10:
        planned = max(run.get("train.steps", 0), int(run.steps[-1]))
        ratio = max(float(np.nanmean(run.group(name, "update_ratio")[high])) for name in _large(run))
        loss = parts(curve(run), 5)
        fell = (loss[0] - loss[-1]) / max(abs(loss[0]), 1e-12)
        if 0 < ratio * planned < 0.01 and fell < (0.1 if ratio * planned < 1e-3 else 0.02):
            return Finding(
                "lr_too_small", "error" if ratio * planned < 1e-3 else "warning",
                f"an update moves no group by more than {ratio:.1e} of its norm, all {planned} planned ones together by "
                f"{ratio * planned:.1e} of it at most; the loss only went from {loss[0]:.4g} to {loss[-1]:.4g}",
                f"the rate (up to {lr[ok].max():.3g}) is too small by orders of magnitude, as after a change of units",
                f"raise it: {job.flag(run, 'train.lr', 0.001)} (AdamW from scratch; 5e-5 for pretrained parameters)",
            )
    peak = int(np.nanargmax(lr))
    over = peak + np.flatnonzero(lr[peak:] < 1e-3 * lr[peak])
    if len(lr) >= 20 and len(over) and (run.steps[-1] - run.steps[over[0]]) > 0.2 * max(run.get("train.steps", 0), run.steps[-1]):
        return Finding(
            "lr_too_small", "warning",
            f"the rate fell to a thousandth of its highest value at update {run.steps[over[0]]} of "
            f"{max(run.get('train.steps', 0), int(run.steps[-1]))}, and stays there",
            "the schedule counts something else than updates (micro-batches, examples), or a plateau cut it too far",
            "count updates in the schedule (state.step); or raise plateau.least, or plateau.patience",
        )
    return None


def lr_too_large(run: Run, job: Job) -> Finding | None:
    """Parameters grow to several times their norm, and the loss at constant weights is no better than at the start, or has lost half of
    what it had gained, or was several times the start's for a while and is not far below it now: from 20 updates; from 5 where both have
    grown tenfold.

    The start is the first update by itself, which no step has touched yet: a rate that is far too large has done its work in a few.

    Not overfitting, where the training loss falls; not inputs_unscaled, which is seen before the first update; not learning, in which
    norms may grow while the loss falls."""
    ok = applied(run)
    loss = _from_the_first(curve(run))
    if ok.sum() < 5 or not run.groups or not len(loss):
        return None
    lr, jumped = float(run.updates["lr"][ok].max()), loss.max() / max(abs(loss[0]), 1e-12)
    norms = {name: _from_the_first(run.group(name, "param_norm")) for name in _large(run)}
    growth = {name: float(each.max() / each[0]) for name, each in norms.items() if len(each) and each[0] > 0}
    name = max(growth, key=growth.get, default=None)
    ratio = max(float(np.nanmedian(run.group(name, "update_ratio")[ok][: max(5, ok.sum() // 4)])) for name in _large(run))
    gained, lost = loss[0] - loss.min(), loss[-1] - loss.min()
    worse = lost > 0.5 * gained and lost > 0.02 * abs(loss[0]) or jumped > 3 and loss[-1] > 0.5 * loss[0]
    if name is None or not (worse or gained < 0.02 * abs(loss[0])) or not (growth[name] > 3 or (worse and ratio > 0.3)):
        return None
    if ok.sum() < 20 and not (growth[name] > 10 and jumped > 10):
        return None
    return Finding(
        "lr_too_large", "error",
        f"the parameters of {name} grew to {growth[name]:.3g} times their norm, an update moving a group by {ratio:.2g} of its norm, "
        f"while the loss at constant weights went from {loss[0]:.4g} to {loss[-1]:.4g} "
        f"(at worst {loss.max():.4g}, at best {loss.min():.4g})",
        f"updates are too long at a rate of {lr:.3g}",
        f"lower it: {job.flag(run, 'train.lr', _rounded(min(lr / 10, 1e-3)))}, or a longer warm-up (train.warmup)",
    )


def weights_decaying_away(run: Run, job: Job) -> Finding | None:
    """The norm of decayed parameters falls by 30 % or more and the loss stalls or rises: from 20 updates.

    Not learning with a strong decoupled decay, whose norm follows exp(-sum of lr x decay) while the loss falls. Coupled decay under Adam
    is told by a fall far beyond that: each weight with a small gradient loses about the rate an update, whatever the decay is."""
    ok = applied(run)
    groups = {row["group"]: row for row in run.manifest.get("groups", []) if row.get("weight_decay") and row["group"] in run.groups}
    if ok.sum() < 20 or not groups:
        return None
    norms = {name: parts(run.group(name, "param_norm")) for name in groups}
    falls = {name: each[-1] / each[0] for name, each in norms.items() if len(each) and each[0] > 0}
    if not falls:
        return None
    name = min(falls, key=falls.get)
    row, kept = groups[name], falls[name]
    loss = parts(curve(run))
    gained, lost = loss[0] - loss.min(), loss[-1] - loss.min()
    stalls = lost > 0.1 * gained or gained < 0.05 * abs(loss[0])
    if kept > 0.7 or not stalls:
        return None
    norm, moved = run.group(name, "param_norm"), total(run, run.group(name, "lr"))
    expected = float(np.exp(-moved * row["weight_decay"]))
    coupled = run.get("optimizer.decay") == "coupled" or -np.log(kept) > 3 * moved * row["weight_decay"] + 0.1
    size = np.sqrt(row["parameters"])
    rms = f"{norm[0] / size:.3g} to {norm[-1] / size:.3g}"
    cause = ("the decay goes through Adam's moments (L2, coupled): what it adds is divided by the gradient's own size, and weights with "
             "small gradients lose about the learning rate an update" if coupled else
             f"decay x rate x updates is {moved * row['weight_decay']:.2g}: the decay alone erases them")  # fmt: skip
    cure = (f"decouple it: {job.flag(run, 'optimizer.decay', 'decoupled')}" if run.get("optimizer.decay") == "coupled" else
            "the config says decoupled: inspect training/optim.py: optimizer" if coupled else
            f"less decay: {job.flag(run, 'optimizer.weight_decay', _rounded(row['weight_decay'] / 30))}")  # fmt: skip
    return Finding(
        "weights_decaying_away", "error" if kept < 0.5 else "warning",
        f"the norm of {name} fell from {norm[0]:.4g} to {norm[-1]:.4g} in {run.steps[-1]} updates (root mean square {rms}; sum of "
        f"the rates {moved:.3g}; a decoupled decay of {row['weight_decay']:g} would leave {expected:.0%}), and the loss at constant "
        f"weights went from {loss[0]:.4g} (at best {loss.min():.4g}) to {loss[-1]:.4g}",
        cause,
        cure,
        "experiments/dcal_document_004/README.md",
    )


def loss_weights_drift(run: Run, job: Job) -> Finding | None:
    """Learned loss weights that move by the learning rate an update, whatever the losses are: a note, from 2 probed updates 100 apart.

    It is Adam's step, which is the sign of a gradient that does not change sign; not a divergence, and in itself no fault."""
    names = [name for name in run.probes if name.startswith("w_")]
    lr = run.group("balance", "lr") if "balance" in run.groups else run.updates["lr"]
    found = {}
    for name in names:
        steps, values = run.probe(name)
        if len(steps) >= 2 and steps[-1] - steps[0] >= 100:
            since = (run.steps > steps[0]) & (run.steps <= steps[-1])
            rate = float(np.sum((lr * np.diff(run.steps, prepend=run.steps[0]))[since]))
            if rate and 0.7 < abs(values[-1] - values[0]) / rate < 1.3:
                found[name] = (values[0], values[-1], rate, steps[-1] - steps[0])
    if not found:
        return None
    name, (first, last, rate, count) = max(found.items(), key=lambda one: one[1][2])
    return Finding(
        "loss_weights_drift", "note",
        f"{name} went from {first:.4g} to {last:.4g} in {count} updates, whose learning rates add up to {rate:.4g}",
        "Adam's step is nearly the sign of the gradient: the weight moves by the rate an update until it has reached the logarithm of "
        "its loss",
        "nothing to cure; bounds far from where it is change nothing (dcal.bounds)",
        "experiments/dcal_document_004/README.md",
    )


def _still(run: Run, name: str) -> np.ndarray:
    """bool [updates]: no bit of the group changed; in logs without `changed`, no part of its norm."""
    changed, ratio = run.group(name, "changed"), run.group(name, "update_ratio")
    return np.where(np.isnan(changed), (ratio == 0) & (run.group(name, "param_norm") > 0), changed == 0)


def _from_the_first(values: np.ndarray) -> np.ndarray:
    """The first finite value, then the medians of parts."""
    values = values[np.isfinite(values)]
    return np.concatenate([values[:1], parts(values)])


def _large(run: Run) -> list[str]:
    """The groups with a tenth of the parameters or more: a few biases may grow from 0 as they like."""
    return [name for name in run.groups if _share(run, [name]) > 0.1] or run.groups


def _share(run: Run, names: list[str]) -> float:
    """Of the trainable parameters, how many are in these groups."""
    rows = [row for row in run.manifest.get("groups", []) if not row.get("frozen")]
    return sum(row["parameters"] for row in rows if row["group"] in names) / max(sum(row["parameters"] for row in rows), 1)


def _rounded(value: float) -> str:
    return f"{value:.1g}"
