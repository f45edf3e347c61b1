"""Rules about what is evaluated and deployed, and about the numbers that evaluations give."""

import math

import numpy as np

from jaxdistill.diagnosis.finding import Finding
from jaxdistill.diagnosis.records import Job, Run
from jaxdistill.diagnosis.rules.series import applied, main_term, throughout

COSTS = ("nll", "perplexity", "loss", "kl", "bits", "error")  # parts of the names of metrics without an upper end


def frozen_moved(run: Run, job: Job) -> Finding | None:
    """The checksum of teachers and frozen parameters changed, as a gate saw it at an evaluation: one is enough, it covers every bit.

    Not teacher_follows_student, whose teacher was never declared frozen."""
    gate = run.gate("frozen_moved")
    return gate and gate._replace(severity="error")


def batch_statistics(run: Run, job: Job) -> Finding | None:
    """An example measured alone and in its batch gives different numbers, by more than rounding (deep probe; one is enough): 0.1 %, in
    bfloat16 5 %.

    Not dropout, which evaluation does not have."""
    found = [(step, line["batch_of_one"]) for step, line in run.log.deep if line.get("batch_of_one") is not None]
    bound = 0.05 if "bfloat16" in str(run.config) or "float16" in str(run.config) else 1e-3
    if not found or not found[-1][1] > bound:
        return None
    step, gap = found[-1]
    return Finding(
        "batch_statistics", "error",
        f"at update {step} an example alone and the same one in its batch differ by {gap:.2g} (relative)",
        "predictions depend on the other examples: a normalisation over the batch, at inference too, or rows that see each other",
        "normalise features and not the batch (LayerNorm), or carry running statistics in `extra` (Recipe.whole)",
        "experiments/reservoir_document_000/README.md",
    )


def ema_initial(run: Run, job: Job) -> Finding | None:
    """The average that is deployed is still where training began: its distance to the initial parameters is less than a tenth of that to
    the trained ones (deep probe, 50 updates or more).

    Not an average that lags: it has left the start. Not parameters that did not move themselves."""
    found = [(step, line) for step, line in run.log.deep if line.get("ema_initial") is not None and line.get("ema_distance") is not None]
    if not found or found[-1][0] < 50:
        return None
    step, line = found[-1]
    if not (line["ema_distance"] > 1e-3 and line["ema_initial"] < 0.1 * line["ema_distance"]):
        return None
    decay = run.get("train.ema", 0)
    return Finding(
        "ema_initial", "error",
        f"at update {step} the deployed average is {line['ema_initial']:.2g} (relative) from the initial parameters and "
        f"{line['ema_distance']:.2g} from the trained ones, with a decay of {decay:g} ({1 / max(1 - decay, 1e-9):.0f} updates)",
        "the average began at the initial parameters and is not corrected for it, or is hardly updated",
        "begin at 0 and divide by the sum of the weights (training/state.py: deployed), or a shorter average: "
        f"{job.flag(run, 'train.ema', _shorter(run))}",
    )


def ema_never_used(run: Run, job: Job) -> Finding | None:
    """An average is asked for, and what is deployed equals the parameters to the last bit although they move (deep probe).

    Not a run without an average (train.ema 0), nor one whose parameters stand still."""
    found = [(step, line) for step, line in run.log.deep if line.get("ema_distance") is not None]
    if not run.get("train.ema", 0) or not found or found[-1][0] < 2 or found[-1][1]["ema_distance"] != 0 or not moves(run):
        return None
    return Finding(
        "ema_never_used", "error",
        f"train.ema is {run.get('train.ema'):g}, and at update {found[-1][0]} the deployed parameters are the trained ones to the last "
        "bit",
        "the average is kept and never used (or never updated): evaluation and export see the raw parameters",
        "inspect training/state.py: deployed and make_train_step",
    )


def metric_clamped(run: Run, job: Job) -> Finding | None:
    """A metric at a bound and not at a value: its logarithm is a whole number of 5 or more to seven digits (exp(20) = 485,165,195.41), or
    it is infinite; one evaluation is enough. Or a metric stands at one round number in 5 evaluations, a term in 20 updates, while
    parameters move.

    Not an accuracy, a share or a number of classes, which take round values; not a model that does not change."""
    for name in run.metrics():
        steps, values = run.evaluation(name)
        if not any(part in name.lower() for part in COSTS):
            continue
        last = float(values[-1])
        if math.isinf(last):
            return _clamp(name, steps[-1], "infinite", "an exponential overflowed: read the quantity before it (nats), which is finite")
        power = math.log(last) if last > 100 else 0.0
        if power >= 5 and abs(power - round(power)) < 2e-7:  # float32, or printed with two digits
            cause = f"whatever is exponentiated was cut at {round(power)}: the true value is that or anything larger"
            return _clamp(name, steps[-1], f"{last:,.2f}, which is exp({round(power)})", cause)
        if len(values) >= 5 and _stands(values[-5:]) and moves(run):
            return _clamp(name, steps[-1], f"{last:g} in the last 5 evaluations", "a bound was reached, and the value is not measured")
    for name in run.terms:
        raw = run.term(name)[(run.term(name, "count") > 0) & applied(run)]
        if len(raw) >= 20 and _stands(raw[-20:]):
            cause = "its value is cut, and its gradient is 0 there"
            return _clamp(f"the term {name}", run.steps[-1], f"{raw[-1]:g} in its last 20 updates", cause)
    return None


def perplexity_of_total(run: Run, job: Job) -> Finding | None:
    """A perplexity that is not exp of the nats a token: it differs from exp(nll) of the same evaluation by 1 %, or (where no nll is
    written) is exp of the loss of several terms, to half a percent, at two evaluations.

    Not a clamp (metric_clamped); not a run with one term, whose loss is its nll."""
    names = [name for name in run.metrics() if name.endswith("perplexity")]
    for name in names:
        sibling = run.evaluation(name.removesuffix("perplexity") + "nll")
        steps, values = run.evaluation(name)
        told = dict(zip(sibling.steps, sibling.values, strict=True))
        off = [(step, value, told[step]) for step, value in zip(steps, values, strict=True)
               if step in told and 0 < value < math.inf and abs(math.log(value) - told[step]) > 0.01]  # fmt: skip
        if off:
            step, value, nats = off[-1]
            return _not_nll(name, step, value, f"while its nll is {nats:.4g} nats, which is {math.exp(min(nats, 700)):.4g}")
        several, term = throughout(run), main_term(run)
        if told or len(several) < 2 or term is None:
            continue
        loss = {int(step): value for step, value in zip(run.steps, run.updates["loss"], strict=True)}
        own = {int(step): value for step, value in zip(run.steps, run.term(term), strict=True)}
        logs = [(step, value, math.log(value)) for step, value in zip(steps, values, strict=True) if step in loss and 0 < value < math.inf]
        same = [(step, value) for step, value, log in logs
                if abs(log - loss[step]) < 0.005 * abs(loss[step]) + 0.01 and abs(log - own[step]) > 0.05]  # fmt: skip
        if len(same) >= 2:
            step, value = same[-1]
            why = f"exp of the loss of {len(several)} terms ({loss[step]:.4g}); {term} alone is {own[step]:.4g}"
            return _not_nll(name, step, value, why)
    return None


def moves(run: Run) -> bool:
    """Whether any parameter changes."""
    return any((run.group(name, "update_ratio") > 0).any() for name in run.groups)


def _stands(values: np.ndarray) -> bool:
    """All the same, and a number of at most two digits that is neither 0 nor 1."""
    first = float(values[0])
    return bool((values == first).all()) and math.isfinite(first) and first not in (0.0, 1.0) and float(f"{first:.1e}") == first


def _clamp(name: str, step: int, what: str, cause: str) -> Finding:
    return Finding(
        "metric_clamped", "warning",
        f"{name} at update {step} is {what}",
        cause,
        "report nats (nll) or bits per byte, which need no clamp, and let the exponential be infinite",
    )


def _not_nll(name: str, step: int, value: float, why: str) -> Finding:
    return Finding(
        "perplexity_of_total", "warning",
        f"{name} at update {step} is {value:,.4g}, {why}",
        "perplexity was taken of a loss that holds other terms, weights or smoothing: it tells nothing of text",
        "take exp of the nll of the labels alone (evaluators/language.py: finish)",
    )


def _shorter(run: Run) -> float:
    """A decay whose average is a fifth of the run."""
    return round(1 - 5 / max(run.get("train.steps", 0), 10), 4)
