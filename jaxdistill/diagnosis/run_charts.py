"""Which charts a run has: of the ledger, the optimizer, the predictions, the router, each where its records hold it."""

from collections.abc import Iterator

import numpy as np

from jaxdistill.diagnosis.curves import Chart, lines, plane, shares
from jaxdistill.diagnosis.records import Run, Series

NATS = ("nll", "entropy", "target_entropy", "teacher_nll", "teacher_entropy", "teacher_kl")
SHARES = ("correct", "top1_agreement", "valid", "classes_predicted", "beyond")
LOGITS = ("logit_std", "logit_abs_max", "input_abs_max")
LOAD = "router/load_"


def charts(run: Run) -> Iterator[Chart]:
    """In the order in which they are read: what is minimised, by what steps, and what the model then says."""
    if len(run.steps):
        yield from _ledger(run)
        yield from _optimizer(run)
    yield from _predictions(run)
    yield from _samples(run)
    yield from _router(run)
    yield from _deep(run)


def _ledger(run: Run) -> Iterator[Chart]:
    active = [name for name in run.terms if np.any(run.term(name, "count") > 0)]
    weights = {name: run.term(name, "weight") for name in active}
    knobs = {name: run.updates[f"knobs/{name}"] for name in run.knobs}
    still = {name: values[0] for name, values in knobs.items() if np.all(values == values[0])}
    counted = {name: run.term(name, "count") != 0 for name in active}  # where a term counts nothing, its 0 is 0/0
    raw = {name: Series(run.steps[there], run.term(name)[there]) for name, there in counted.items()}
    if len(active) == 1 and np.all(weights[active[0]] == 1):  # raw, weighted and sum are one
        yield lines("loss", raw, "".join(f"{name} stays {value:g} " for name, value in still.items()))
    elif active:
        yield shares("loss ledger", run.steps, {name: run.term(name, "weighted") for name in active}, "share of each weighted term")
        yield lines("raw terms", raw, "before their weights")
        weighted = {name: Series(run.steps, run.term(name, "weighted")) for name in active}
        yield lines("loss", weighted | {"sum of the terms": Series(run.steps, run.updates["loss"])}, "and each term with its weight")
        yield lines("weights", {name: Series(run.steps, values) for name, values in weights.items()},
                    "by schedule and reaction" + "".join(f"; {name} stays {value:g}" for name, value in still.items()))
    moving = {name: Series(run.steps, values) for name, values in knobs.items() if name not in still}
    if moving:
        yield lines("knobs", moving, "by schedule")


def _optimizer(run: Run) -> Iterator[Chart]:
    def of_groups(field: str, relative: bool = False) -> dict[str, Series]:
        columns = {name: run.group(name, field) for name in run.groups}
        if relative:
            columns = {name: values / values[0] for name, values in columns.items() if values[0] > 0}
        return {name: Series(run.steps, values) for name, values in columns.items()}

    yield lines("learning rate", of_groups("lr"), "of each group")
    norms = of_groups("grad_norm")
    if len(norms) > 1:
        norms["all"] = Series(run.steps, run.updates["grad_norm"])
    yield lines("gradient norm", norms, "of each group, before the clip", sizes=True)
    yield lines("update / parameter", of_groups("update_ratio"), "ratio of their norms", sizes=True)
    yield lines("parameter norm", of_groups("param_norm", relative=True), "over the first one")
    if np.any(run.updates["clip"] < 1):
        left = Series(run.steps, run.updates["clip"])
        yield lines("share left by the clip", {"of the gradient": left}, "1: not clipped", limits=(0, 1.03))


def _predictions(run: Run) -> Iterator[Chart]:
    if _has(run, "entropy") and _has(run, "spread"):
        entropy, spread = run.probe("entropy"), run.probe("spread")
        _, here, there = np.intersect1d(entropy.steps, spread.steps, return_indices=True)
        bound = run.preflight.get("uniform_nll")
        yield plane(Series(*(column[here] for column in entropy)), Series(*(column[there] for column in spread)), bound)
    nats = {name: run.probe(name) for name in NATS if _has(run, name)}
    if len(run.evaluation("validation/nll")):
        nats["nll of validation"] = run.evaluation("validation/nll")
    if nats:
        yield lines("distributions", nats, "nats")
    for title, names, limits in (("shares", SHARES, (-0.03, 1.03)), ("sizes of logits and inputs", LOGITS, None)):
        found = {name: run.probe(name) for name in names if _has(run, name)}
        if found:
            yield lines(title, found, "of positions or examples" if limits else "", limits=limits, sizes=not limits)
    learned = {name: run.probe(name) for name in run.probes if name.startswith("w_") and _has(run, name)}
    if learned:
        yield lines("learned loss weights w", learned, "a term counts exp(-w) / 2")


def _samples(run: Run) -> Iterator[Chart]:
    """Of what the student wrote: its own nats fall and repetition rises where it collapses into loops."""
    log_prob, repetition = run.sample("log_prob"), run.sample("repetition")
    found = {"the student's nats": Series(log_prob.steps, -log_prob.values), "teacher_kl": run.sample("teacher_kl")}
    if any(map(len, found.values())):
        yield lines("what the student writes", {name: series for name, series in found.items() if len(series)}, "nats a token")
    if len(repetition):
        yield lines("repetition", {"of 4-grams": repetition}, "share of a row that was in it before", limits=(-0.03, 1.03))


def _router(run: Run) -> Iterator[Chart]:
    loads = {name.removeprefix(LOAD): run.updates[f"probes/{name}"] for name in run.probes if name.startswith(LOAD)}
    if loads:
        there = np.any([~np.isnan(values) for values in loads.values()], axis=0)
        yield shares("router load", run.steps[there], {f"expert {name}": values[there] for name, values in loads.items()},
                     "share of the tokens that each expert gets")
    rest = {name: run.probe(f"router/{name}") for name in ("entropy", "target_variance") if _has(run, f"router/{name}")}
    if rest:
        yield lines("router", rest, "entropy in nats")


def _deep(run: Run) -> Iterator[Chart]:
    steps = np.asarray([step for step, _ in run.log.deep], int)
    deep = [values for _, values in run.log.deep]

    def columns(found: list[dict]) -> dict[str, np.ndarray]:
        names = dict.fromkeys(name for values in found for name in values)
        return {name: np.asarray([values.get(name, np.nan) for values in found], float) for name in names}

    norms = columns([{name: term["grad_norm"] for name, term in (values.get("terms") or {}).items()} for values in deep])
    cosines = columns([values.get("cosines") or {} for values in deep])
    if norms:
        yield shares("gradient of each term", steps, norms, "share of the sum of their norms")
    if cosines:
        pairs = {name.replace("|", " and "): Series(steps, values) for name, values in cosines.items()}
        yield lines("angle between gradients", pairs, "cosine; below 0 two terms pull apart", limits=(-1.05, 1.05))


def _has(run: Run, probe: str) -> bool:
    return f"probes/{probe}" in run.updates and bool(np.any(~np.isnan(run.updates[f"probes/{probe}"])))
