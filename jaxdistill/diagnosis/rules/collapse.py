"""Rules about predictions and units that have collapsed: one-hot, constant, dead, or all through one expert."""

import numpy as np

from jaxdistill.diagnosis.finding import Finding
from jaxdistill.diagnosis.records import Job, Run, Series
from jaxdistill.diagnosis.rules.series import alive, applied, late, main_term, nll, progress, throughout, uniform


def saturated(run: Run, job: Job) -> Finding | None:
    """Certain and wrong: predictions have less than a tenth of the possible entropy, and cost half a nat and a quarter of log K more than
    that; or less than half of it, and cost a quarter more than knowing nothing does: in the last quarter of the probes (3 at least, from 20
    updates).

    Not a confident good model, whose cost is as low as its entropy; not constant_predictor, whose predictions are all the same."""
    entropy, most = run.probe("entropy"), uniform(run)
    if len(entropy) < 3 or most is None or run.steps[-1] < 20:
        return None
    cost = nll(run)
    if not len(cost) and main_term(run) in ("kl", "focal"):
        cost = Series(run.steps, run.term(main_term(run)))
    if not len(cost):
        return None
    sure = float(np.median(late(entropy)))
    price = float(np.median(cost.values[cost.steps >= entropy.steps[-len(late(entropy))]]))
    one_hot = sure < 0.1 * most and price - sure > max(0.5, 0.25 * most)
    if not one_hot and not (sure < 0.5 * most and price > 1.25 * most):
        return None
    target, largest = run.probe("target_entropy"), run.probe("logit_abs_max")
    more = (f"; the targets have {np.median(late(target)):.3g}" if len(target) else "") + (
        f"; the largest |logit| is {np.median(late(largest)):.3g}" if len(largest) else "")  # fmt: skip
    return Finding(
        "saturated", "error",
        f"predictions have an entropy of {sure:.3g} nats (of {most:.3g} possible) and cost {price:.3g}{more} (updates "
        f"{late_from(entropy)} to {entropy.steps[-1]})",
        "the softmax is saturated: logits are so large that its gradient is gone, and no entropy penalty brings it back" if one_hot else
        "predictions are surer than they are right, and worse than none: something other than the labels makes them so",
        "look at the scale of the inputs first (preflight input), then at the last layer's initialisation and the rate; label "
        "smoothing and penalties come too late" if one_hot else
        "look for the term that falls while the fit to the labels gets worse: the sign of a penalty (losses/regularisation.py), or its "
        "weight",
        "experiments/soft_label_document_002/README.md",
    )


def constant_predictor(run: Run, job: Job) -> Finding | None:
    """The same prediction for every example: H(mean p) - mean H(p) below 1 % of log K in the last quarter of the probes (3 at least), from
    50 updates and two fifths of the run on. An error where the run is finished.

    Not an untrained model, which is nearly constant too; not saturation, in which predictions are one-hot but differ."""
    spread, most = run.probe("spread"), uniform(run)
    if len(spread) < 3 or most is None or run.steps[-1] < 50 or progress(run) < 0.4:
        return None
    varies = float(np.max(late(spread)))
    if varies > 0.01 * most:
        return None
    classes, deviation, entropy = (run.probe(name) for name in ("classes_predicted", "logit_std", "entropy"))
    more = [f"logits deviate by {np.median(late(deviation)):.2g} over the examples"] if len(deviation) else []
    more += [f"{np.median(late(classes)):.0%} of the classes are predicted"] if len(classes) else []
    more += [f"the entropy is {np.median(late(entropy)):.3g} of {most:.3g} nats"] if len(entropy) else []
    return Finding(
        "constant_predictor", "error" if run.row is not None else "warning",
        f"predictions do not depend on the example: their spread is {varies:.2g} nats (updates {late_from(spread)} to "
        f"{spread.steps[-1]}); {', '.join(more)}",
        "what the model reads is lost on the way to the logits (dead units, an underflow, inputs that are all alike), or labels have "
        "nothing to do with inputs",
        "look at zero_gradient leaves (deep lines of metrics.jsonl) from the inputs on, and at the first batch (--dry_run): does each "
        "row carry its own label?",
        "experiments/reservoir_document_000/README.md",
    )


def zero_gradient(run: Run, job: Job) -> Finding | None:
    """Parameters that an active term reaches have a gradient of exactly 0: found by the gate, or in two deep lines in a row, or a whole
    group's norm in 10 updates and more with every term on.

    Not parameters that no term reaches (preflight no_term), nor those of a term that has not begun, nor frozen ones."""
    gate = run.gate("zero_gradient")
    exempt = set(run.preflight.get("no_term") or ())
    inspect = (
        "inspect their forward pass in models/: an exponential of a large negative number (of a whole vector's norm, say), a ReLU "
        "that is never positive, or a stop_gradient; if it is meant, freeze them (Group(frozen=True))"
    )
    cause = "dead units, an underflow, or a stop_gradient where none belongs"
    if gate is not None:
        return gate._replace(severity="error", cure=inspect)
    ok = applied(run)
    deep = [(step, set(line["zero_gradient"]) - exempt) for step, line in run.log.deep if "zero_gradient" in line]
    every = len(throughout(run)) == sum(bool(alive(run, name).any()) for name in run.terms)
    if len(deep) >= 2 and every and (stuck := deep[-1][1] & deep[-2][1]):
        return Finding(
            "zero_gradient", "error",
            f"{len(stuck)} parameters have a gradient of exactly 0 at updates {deep[-2][0]} and {deep[-1][0]}: "
            f"{', '.join(sorted(stuck)[:5])}",
            cause,
            inspect,
        )
    if ok.sum() >= 10 and every and not exempt:
        stuck = [name for name in run.groups if (run.group(name, "grad_norm")[ok] == 0).all()]
        if stuck:
            return Finding(
                "zero_gradient", "error",
                f"the gradient of the group(s) {', '.join(stuck)} is exactly 0 in {ok.sum()} updates, in which every term is on",
                cause,
                inspect,
            )
    return None


def router_collapsed(run: Run, job: Job) -> Finding | None:
    """One of the router's features has over 95 % of the load in the last quarter of the probes (3 at least, from 30 updates).

    Not a router that is sure: its entropy falls by design, as the temperature does, while the load stays shared."""
    names = [name for name in run.probes if name.startswith("router/load_")]
    if len(names) < 2:
        return None
    loads = {name: run.probe(name) for name in names}
    on = run.steps[alive(run, "router")] if "router" in run.terms else run.steps
    loads = {name: Series(one.steps[np.isin(one.steps, on)], one.values[np.isin(one.steps, on)]) for name, one in loads.items()}
    count = min(map(len, loads.values()))
    if count < 3 or on[-1] - on[0] < 30:
        return None
    top = max(names, key=lambda name: np.median(late(loads[name])))
    if np.min(late(loads[top])) < 0.95:
        return None
    entropy, temperature = run.probe("router/entropy"), run.updates["knobs/router_temperature"]
    more = ""
    if len(entropy) and np.isfinite(temperature[-1]):
        more = f"; the entropy of routing is {late(entropy)[-1]:.2g} nats at a temperature of {temperature[-1]:.2g}"
    return Finding(
        "router_collapsed", "warning",
        f"{top} is {np.median(late(loads[top])):.1%} of the load of {len(names)} features (updates {late_from(loads[top])} to "
        f"{loads[top].steps[-1]}){more}",
        "all tokens go to one expert: the load balance is too weak for what the scores have learned",
        f"more balance: {job.flag(run, 'router.balance', 1.0)}, or a slower router: {job.flag(run, 'router.lr_mult', 0.5)}",
    )


def late_from(series) -> int:
    """The update at which the last quarter of a series begins."""
    return int(series.steps[-len(late(series))])
