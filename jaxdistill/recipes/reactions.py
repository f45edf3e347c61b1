"""What a run does after an evaluation: pure functions on the host, whose memory (JSON) is in the checkpoint.

Each is a `Reaction`; `together` makes one `react` of several, as a Recipe takes it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

from jaxdistill import UserError

DECAY = 0.5  # of the running means that `balance` divides by
BALANCE = "_balance"  # router_balance is the router's
OWN = ("lm", "kd", "anchor")  # share 1 among themselves, or train alone: never balanced
WIDEST = 1e3  # `balance` multiplies no weight by more, nor by less than its inverse


@dataclasses.dataclass(frozen=True)
class ReactConfig:
    """The section `react`: what an evaluation may change. patience: evaluations without a better validation score after which
    the run stops; 0: never. balance: the term to whose raw size all feature terms are brought, so that weights are shares; "": none."""

    patience: int = 0
    balance: str = ""

    def __post_init__(self):
        if self.patience < 0:
            raise UserError(f"config key react.patience: found {self.patience}; accepted: 0 (never) or more")


class Reaction(NamedTuple):
    """memory: the first one. controls: the multipliers that it moves, as they begin. react: (memory, step, metrics) ->
    (memory, controls, stop reason | None)."""

    memory: dict
    controls: dict
    react: Callable


def early_stopping(metric: str, patience: int) -> Reaction:
    """Stops after `patience` evaluations in a row without a smaller `metric`."""

    def react(memory, step, metrics):
        best = math.inf if memory["best"] is None else memory["best"]
        if metrics[metric] < best:  # (a first NaN is no best: nothing would ever be better)
            return {"best": metrics[metric], "waited": 0}, {}, None
        waited = memory["waited"] + 1
        why = f"{metric} has not fallen below {best:.4f} for {waited} evaluations" if waited >= patience else None
        return {**memory, "waited": waited}, {}, why

    return Reaction({"best": None, "waited": 0}, {}, react)


def open_below(term: str, metric: str, bound: float) -> Reaction:
    """Keeps `term` closed until `metric` is below `bound`; once open, it stays so."""

    def react(memory, step, metrics):
        opened = memory["opened_at"] if memory["opened_at"] is not None else (step if metrics[metric] < bound else None)
        return {"opened_at": opened}, {term: 0.0 if opened is None else 1.0}, None

    return Reaction({"opened_at": None}, {term: 0.0}, react)


def balance(reference: str, terms: tuple[str, ...], within: tuple[str, ...] = ()) -> Reaction:
    """Multiplies each of `terms` so that raw value times multiplier is that of `reference`: weights are then shares. Raw
    values are running means over evaluations; a term that is 0 (not on yet, or met) keeps its multiplier. within: those that are a
    share of a term's own weight, TERM_balance, and move with it."""

    def react(memory, step, metrics):
        means = dict(memory["means"])
        for name in (reference, *terms):
            raw = metrics[f"train/{name}"]
            if raw > 0 and math.isfinite(raw):
                means[name] = raw if name not in means else DECAY * means[name] + (1 - DECAY) * raw
        known = [name for name in terms if name in means] if reference in means else []
        moved = {name: min(max(means[reference] / means[name], 1 / WIDEST), WIDEST) for name in known}
        moved |= {f"{name}{BALANCE}": value for name, value in moved.items() if f"{name}{BALANCE}" in within}
        return {"means": means}, moved, None

    return Reaction({"means": {}}, dict.fromkeys((*terms, *within), 1.0), react)


def together(reactions: dict[str, Reaction]) -> Reaction:
    """One reaction of several, by name. Two that move the same control multiply. The first reason to stop is the reason."""

    def react(memory, step, metrics):
        kept, controls, stop = {}, {}, None
        for name, one in reactions.items():
            kept[name], moved, why = one.react(memory[name], step, metrics)
            for control, value in moved.items():
                controls[control] = controls.get(control, 1.0) * value
            stop = stop or why
        return kept, controls, stop

    start: dict = {}
    for one in reactions.values():
        for control, value in one.controls.items():
            start[control] = start.get(control, 1.0) * value
    return Reaction({name: one.memory for name, one in reactions.items()}, start, react)


def chosen(config: ReactConfig, weights: dict, *, gate: float | None = None) -> Reaction:
    """What follows an evaluation of a language model. gate: nats a token that a projected teacher must beat for `kd` to open."""
    found = {}
    if config.patience:
        found["stopping"] = early_stopping("validation/bits_per_byte", config.patience)
    if gate is not None:
        found["gate"] = open_below("kd", "validation/projector_nll", gate)
    if config.balance:
        every = [name for name, weight in weights.items() if not weight.off]
        on = [name for name in every if not name.endswith(BALANCE)]
        if config.balance not in on:
            raise UserError(f"config key react.balance: found {config.balance!r}; accepted: '' or one of {', '.join(on)}")
        terms = tuple(name for name in on if name not in (config.balance, *OWN))
        within = tuple(name for name in every if name not in on and name.removesuffix(BALANCE) in terms)
        found["balance"] = balance(config.balance, terms, within)
    return together(found)
