"""Rules about what the student is asked to become: labels, teachers, projectors, and targets out of reach."""

import numpy as np

from jaxdistill.diagnosis.finding import Finding
from jaxdistill.diagnosis.records import Job, Run, Series
from jaxdistill.diagnosis.rules.series import applied, epochs, late, nll, uniform

TOKEN_METRICS = ("validation/bits_per_byte", "validation/perplexity")  # measured where the next token is predicted


def labels_not_shifted(run: Run, job: Job) -> Finding | None:
    """Next-token training whose loss is far below what the same model has on validation text, before any example could be learned by
    heart: 40 % and half a nat below within two epochs (20 updates); or text predicted at less than 0.2 nats a token on validation.

    Not overfitting or a leak, which need repetition; not counted padding, whose loss stays in proportion to validation's."""
    if not _predicts_tokens(run) or applied(run).sum() < 20:
        return None
    gap = _gap(run)
    if gap is None:
        return None
    step, train, held_out = gap
    seen = epochs(run, step)
    inspect = "inspect recipes/lm.py: next_token: the label of position t is token t + 1"
    known = f"{seen:.2g} epochs" if seen is not None else f"{step} updates"
    if held_out < 0.2 and (uniform(run) or 5.0) > 3:
        return Finding(
            "labels_not_shifted", "error",
            f"validation text costs {held_out:.3g} nats a token at update {step}, after {known}: no model predicts text that well",
            "the label is (nearly) the input: the model copies its own token",
            inspect,
        )
    if seen is not None and seen <= 2 and train < 0.6 * held_out and held_out - train > 0.5 and not _pads(run):
        return Finding(
            "labels_not_shifted", "error",
            f"training labels cost {train:.3g} nats a token and validation text {held_out:.3g} at update {step}, after {known}: "
            "nothing can be learned by heart in so few",
            "training labels can be copied from the input: they are not shifted by one (or the attention is not causal)",
            inspect,
        )
    return None


def padding_counted(run: Run, job: Job) -> Finding | None:
    """A term divides by more positions than hold a label: its count is above valid x positions of the batch by 2 % or more in every
    probed update (3 at least), or more positions count than the data's first batch has labels.

    Not rows that are full, whose data have none."""
    steps, valid = run.probe("valid")
    positions = run.get("train.batch", 0) * run.get("data.length", 0)
    if len(steps) < 3 or not positions or not _predicts_tokens(run):
        return None
    here = np.isin(run.steps, steps)
    for name in [name for name in ("lm", "kd") if name in run.terms]:
        count, weight = run.term(name, "count")[here], run.term(name, "weight")[here]
        if (weight > 0).all() and (count > 1.02 * valid * positions).all():
            return Finding(
                "padding_counted", "error",
                f"{name} is divided by {np.median(count):.0f} positions of a batch, of which {np.median(valid * positions):.0f} hold a "
                f"label: its value is {np.median(count / (valid * positions)):.3g} times too small",
                "padding is in the divisor",
                "inspect the count of the Term: it is where.sum()",
            )
    if _pads(run):
        share = run.preflight["valid"]
        return Finding(
            "padding_counted", "error",
            f"{run.probe('valid').values[0]:.0%} of the positions of the first batch count as labels, of which its data have {share:.0%}",
            "padding is predicted, which costs nothing once it is learned, and dilutes the rest",
            "inspect recipes/lm.py: next_token: `where` leaves out padding",
        )
    return None


def teacher_misaligned(run: Run, job: Job) -> Finding | None:
    """The teacher does far worse on the student's labels than on its own test: by a quarter and half a nat, in the very first update and in
    the first probed ones.

    Not a teacher that is bad by itself (teacher_no_better), whose own row is as bad; not labels that are wrong for the student too."""
    found = run.probe("teacher_nll")
    told = (run.preflight.get("teacher") or {}).get("nll")
    if (not len(found) and told is None) or run.get("kd.mode", "logits") != "logits":
        return None
    # The first update's too: a teacher that is trained along may leave its place within a few.
    seen = float(min(found.values[0], np.median(found.values[:3]))) if len(found) else float(told)
    row = next((row for row in job.rows if row["name"] == "teacher" and "nll" in row), None)
    if row is None or not seen > 1.25 * row["nll"] + 0.5:
        return None
    worst = uniform(run)
    return Finding(
        "teacher_misaligned", "error",
        f"on the student's labels the teacher costs {seen:.3g} nats, on its own test {row['nll']:.3g}"
        + (f"; knowing nothing costs {worst:.3g}" if worst else ""),
        "what the teacher says is compared with another position, class or token than it speaks of",
        "inspect where teacher and student outputs meet (recipes/teachers.py: outputs; recipes/lm.py: next_token; data/alignment.py "
        "for two tokenizers), and the order of the classes of both",
    )


def teacher_follows_student(run: Run, job: Job) -> Finding | None:
    """A teacher that is supposed to stand still drifts: its own entropy, or its likelihood of the labels, moves by 10 % between the
    first and the last two fifths of the probes, 5 standard errors at least (8 probes), or by more from the first look to all others. Or
    distillation is met in training (below a fifth of the KL that validation measures) within two epochs.

    Not a projected teacher, which learns; not overfitting, which takes repetition; not a good student, whose validation KL falls too."""
    if "kd" not in run.terms or not (run.term("kd", "weight") > 0).any() or run.get("kd.mode", "logits") != "logits":
        return None
    for name, what in (("teacher_entropy", "the teacher's entropy"), ("teacher_nll", "the teacher's cost of the labels")):
        drift = _drift(run.probe(name))
        if drift is not None:
            (first, last, sure), steps = drift, run.probe(name).steps
            return Finding(
                "teacher_follows_student", "error",
                f"{what} went from {first:.3g} to {last:.3g} nats between updates {steps[0]} and {steps[-1]} ({sure:.0f} standard "
                "errors), where a frozen teacher would stay",
                "the teacher is trained: the distillation loss is met by moving the target to the student",
                "put the teacher in Recipe.frozen and its outputs under jax.lax.stop_gradient",
            )
    held_out, trained = run.evaluation("validation/teacher_kl"), run.probe("teacher_kl")
    if len(held_out) and len(trained) >= 3:
        step, measured = held_out.steps[-1], held_out.values[-1]
        here, seen = float(np.median(late(trained))), epochs(run, int(step))
        if measured > 0.2 and here < 0.2 * measured and seen is not None and seen <= 2:
            return Finding(
                "teacher_follows_student", "error",
                f"the KL to the teacher is {here:.3g} in training and {measured:.3g} on validation at update {step}, after {seen:.2g} "
                "epochs",
                "the target in training is not the teacher: it moves to meet the student",
                "put the teacher's outputs under jax.lax.stop_gradient in the recipe's loss",
            )
    return None


def projector_uninformative(run: Run, job: Job) -> Finding | None:
    """A projected teacher that predicts no better than knowing nothing, 50 updates or more into training: an error where `kd` is open
    (the student learns noise, and its KL is small because the target is flat), a warning where the gate kept it closed to the end.

    Not the first updates, in which every projector is uninformative; not a projector that still gets better."""
    found = run.evaluation("validation/projector_nll")
    if not len(found) or len(run.steps) == 0 or run.steps[-1] < 50:
        return None
    worst, best = uniform(run), float(found.values.min())
    opened = run.term("kd", "weight")[-max(1, len(run.steps) // 4) :] > 0
    improves = len(found) >= 3 and found.values[-1] < 0.98 * found.values[-2]
    cure = (f"fit it at the start ({job.flag(run, 'projector.init', 'lstsq')}), give it a faster rate "
            f"({job.flag(run, 'projector.lr_mult', 10.0)}) and keep the gate ({job.flag(run, 'projector.gate', True)})")  # fmt: skip
    if worst is not None and best > 0.95 * worst and opened.any() and not improves:
        kd = float(np.nanmedian(run.term("kd")[-10:]))
        return Finding(
            "projector_uninformative", "error",
            f"the projected teacher costs {found.values[-1]:.4g} nats a token on validation at update {found.steps[-1]}; knowing "
            f"nothing costs {worst:.4g}. kd, at {kd:.3g}, is small only because the target says nothing",
            "the projector maps the teacher's states to nothing in the student's space",
            cure,
        )
    if not opened.any() and not (run.term("kd", "weight") > 0).any() and run.row is not None and _wanted(run):
        return Finding(
            "projector_uninformative", "warning",
            f"kd never opened in {run.steps[-1]} updates: at the last evaluation the projected teacher costs {found.values[-1]:.4g} "
            "nats a token, no less than token frequencies do",
            "the projector did not learn to speak in the student's words, and its gate kept kd closed",
            cure,
        )
    return None


def target_unreachable(run: Run, job: Job) -> Finding | None:
    """An option bounds what can be predicted below what the training targets ask (preflight): known before the first update. An error
    where a probability is out of reach, a warning where an entropy floor punishes right predictions.

    Not saturation, its opposite; not slow training: the loss stops at a level that no training passes."""
    told = run.preflight.get("reachable")
    guards = f"with the guards on, such a bound is refused before training: {job.flag(run, 'soft.guards', True)}"
    if told and told["largest"] < told["target"]:
        return Finding(
            "target_unreachable", "error",
            f"no probability can be above {told['largest']:.3g}, and 1 % of the training targets have {told['target']:.3g} or more",
            "the length of the logits (soft.norm_cap, soft.logit_norm) and the temperature bound every prediction",
            f"no bound ({job.flag(run, 'soft.norm_cap', 0.0)}), or a temperature of 1; {guards}",
        )
    if told and told["floor"] > told["target_entropy"]:
        return Finding(
            "target_unreachable", "warning",
            f"predictions of an entropy below {told['floor']:.3g} nats are punished, and right ones have less: the targets' own goes "
            f"down to {told['target_entropy']:.3g} (its 5th percentile in training)",
            "the entropy floor is above what right answers have",
            f"a floor that nearly all right answers pass ({job.flag(run, 'soft.entropy_floor', round(told['target_entropy'], 2))}); "
            + guards,
        )
    return None


def teacher_no_better(run: Run, job: Job) -> Finding | None:
    """The job's teacher row is no better than the untouched student or a constant prediction, or has gone less than a fifth of the way from
    there to the same student trained without it (an error); or it is no better than that student (a warning): runs of fewer than 20 updates
    are not judged, and teachers of fewer than 100 that have learned something are only noted.

    Not a misaligned teacher, whose own row is good."""
    if not _wanted(run) or len(run.steps) == 0 or run.steps[-1] < 20:
        return None
    metric, sign = job.results.get("metric"), 1 if job.results.get("minimize", True) else -1
    rows = {row["name"]: row for row in job.rows if row["seed"] in (run.seed, 0) and metric in row}
    teacher = rows.get("teacher")
    if teacher is None:
        return None
    value = teacher[metric]
    for name in ("untouched", "constant"):
        begun = rows[name][metric] if name in rows else None
        way = sign * (begun - rows["ce_only"][metric]) if begun is not None and "ce_only" in rows else 0.0
        if begun is not None and sign * (begun - value) < max(0.02 * abs(begun), 0.2 * way):
            return Finding(
                "teacher_no_better", "error",
                f"the teacher's {metric} on the test split is {value:.4g}, that of {name} {begun:.4g}"
                + (f" and of the student without a teacher {rows['ce_only'][metric]:.4g}" if way else ""),
                "the teacher knows nothing of these data: it is not trained, of another domain, or its file was not what was meant",
                _better_teacher(job, teacher),
            )
    if "ce_only" in rows:
        best = rows["ce_only"].get("best", rows["ce_only"]).get(metric, rows["ce_only"][metric])
        if sign * (value - best) >= 0:
            severity = "warning" if teacher["steps"] == 0 or teacher["steps"] >= 100 else "note"
            return Finding(
                "teacher_no_better", severity,
                f"the teacher's {metric} on the test split is {value:.4g}, that of the student without a teacher (ce_only) {best:.4g}",
                "the teacher has nothing to teach: what distillation gains then is regularisation at best",
                f"{_better_teacher(job, teacher)}, or less data for the student (data.train_tokens)",
            )
    return None


def _predicts_tokens(run: Run) -> bool:
    return "lm" in run.terms or any(metric in run.metrics() for metric in TOKEN_METRICS)


def _pads(run: Run) -> bool:
    """Whether positions are predicted that have no label: the first update counts more of them than the data's first batch has (preflight),
    which is the same batch; or all updates count all."""
    (steps, valid), known = run.probe("valid"), run.preflight.get("valid") or 1.0
    return bool(len(valid) and known < 0.98 and ((steps[0] == 1 and valid[0] > known + 0.02) or (valid >= 1).all()))


def _wanted(run: Run) -> bool:
    """Whether the config asks this run for distillation at some time."""
    knots = run.get("kd.weight", ())
    return "kd" in run.terms and (any(value for _, value in knots) if isinstance(knots, (list, tuple)) else bool(knots))


def _better_teacher(job: Job, row: dict) -> str:
    trained = job.runs.get(f"teacher-{row['seed']}")
    if trained is None or not row["steps"]:
        return "give another teacher: teacher.path"
    longer = job.flag(trained, "train.steps", max(400, 10 * row["steps"]))
    return f"train the teacher longer: {longer}, or give another: teacher.path"


def _gap(run: Run) -> tuple[int, float, float] | None:
    """(update, training, validation) nats at the last evaluation: training is the median of the fifth of the updates before it."""
    held_out, trained = run.evaluation("validation/nll"), nll(run)
    if not len(held_out) or not len(trained):
        return None
    step = int(held_out.steps[-1])
    near = trained.values[(trained.steps <= step) & (trained.steps > 0.8 * step)]
    return (step, float(np.median(near)), float(held_out.values[-1])) if len(near) else None


def _drift(series: Series) -> tuple[float, float, float] | None:
    """(mean of the first two fifths, of the last, difference in standard errors) where they differ by 10 % and 5 standard errors; or the
    first value, the mean of the others and their difference in standard deviations, where it is 15 % and 8 of them: a drift that is over
    before the second look."""
    size = 2 * len(series) // 5
    if len(series) < 8 or not np.isfinite(series.values).all():
        return None
    first, last = series.values[:size], series.values[-size:]
    error = np.sqrt((np.var(first, ddof=1) + np.var(last, ddof=1)) / size)
    gap = abs(last.mean() - first.mean())
    if gap >= max(0.1 * abs(first.mean()), 5 * error):
        return float(first.mean()), float(last.mean()), float(gap / max(error, 1e-12))
    begun, rest = series.values[0], series.values[1:]
    deviation = 1.4826 * np.median(np.abs(np.diff(rest))) / np.sqrt(2)  # of neighbours, which a drift among the others leaves alone
    gap = abs(begun - rest.mean())
    if gap >= max(0.15 * abs(begun), 8 * deviation):
        return float(begun), float(rest.mean()), float(gap / max(deviation, 1e-12))
    return None

