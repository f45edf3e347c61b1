"""The objective: schedules evaluated at a step, and the ledger in which every loss term is a line."""

import jax.numpy as jnp

from jaxdistill.recipe import Rest, Schedule, Term


def learning_rate(lr: float, warmup: float, final: float, steps: int) -> Schedule:
    """Linear from 0 over the first `warmup` share of the updates, then half a cosine down to `final` x lr.

    The first update has a rate above 0: an update at rate 0 would look like an optimizer that does not step."""
    steps = max(steps, 1)
    rise = min(max(round(warmup * steps), 1), max(steps - 1, 1))
    return Schedule(((-1.0, 0.0), (rise - 1.0, lr), (float(steps), final * lr)), cosine=(1,))


def weights_at(weights: dict, controls: dict, step) -> dict:
    """Each term's weight at `step`; constant zeros are left out."""
    now = {name: curve(step) * controls.get(name, 1.0) for name, curve in weights.items() if isinstance(curve, Schedule) and not curve.off}
    rest = {name: 1.0 - now.get(curve.of, jnp.zeros(())) for name, curve in weights.items() if isinstance(curve, Rest) and not curve.off}
    return now | {name: jnp.maximum(value, 0.0) * controls.get(name, 1.0) for name, value in rest.items()}


def check_terms(weights: dict, found) -> None:
    """Names of weights = names of terms, or the trace fails: a weight that no term uses goes unnoticed otherwise."""
    wanted = {name for name, schedule in weights.items() if not schedule.off}
    if wanted != set(found):
        raise ValueError(
            f"weights name the terms {sorted(wanted)}, but loss and whole return {sorted(found)}: "
            "a term needs a weight, and a weight that is not the constant 0 needs a term"
        )


def ledger(terms: dict[str, Term], weights: dict, schedules: dict, total) -> tuple[dict, jnp.ndarray]:
    """Term -> {raw, weight, weighted, count}, and the gap |total - sum(weighted)| / sum|weighted|.

    raw is the masked mean of the term; a term that is left out has count 0."""
    zero = jnp.zeros((), jnp.float32)
    lines = {}
    for name in schedules:
        if name not in terms:
            lines[name] = {"raw": zero, "weight": zero, "weighted": zero, "count": zero}
            continue
        term, weight = terms[name], weights[name]
        raw = term.sum / jnp.maximum(term.count, 1)
        weighted = weight * term.factor * raw
        lines[name] = {"raw": raw, "weight": weight, "weighted": weighted, "count": term.count.astype(jnp.float32)}
    total_of_lines = sum((line["weighted"] for line in lines.values()), zero)
    size = sum((jnp.abs(line["weighted"]) for line in lines.values()), zero)
    return lines, jnp.abs(total - total_of_lines) / jnp.maximum(size, 1e-30)
