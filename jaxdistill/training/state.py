"""The state, one update of it, and the deployed student.

`state.step` counts update attempts, one a batch. A non-finite update advances it and changes nothing else.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxdistill.diagnosis import probes
from jaxdistill.recipe import Dials, Recipe, Schedule, Variables
from jaxdistill.training import objective
from jaxdistill.training.optim import cut, join


@flax.struct.dataclass
class TrainState:
    """step: attempts = batches consumed; applied = step - skipped. opt and ema hold trainable leaves only.

    ema starts at zero and is deployed divided by `ema_weight`, the sum of its weights so far (exact where a
    division by float32 1 - d^n is not). streak: non-finite updates in a row."""

    step: jax.Array
    params: Any
    opt: Any
    extra: Any
    ema: Any
    ema_weight: jax.Array
    skipped: jax.Array
    streak: jax.Array
    controls: dict
    rng: jax.Array


def fresh(variables: Variables, groups, tx, controls: dict, rng, *, ema: bool) -> TrainState:
    """A new state. Every counter is an array of its own: shared or aliased buffers cannot be donated."""
    train = cut(variables.params, groups)
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=variables.params, opt=tx.init(train), extra=variables.extra,
        ema=jax.tree.map(jnp.zeros_like, train) if ema else None, ema_weight=jnp.zeros((), jnp.float32),
        skipped=jnp.zeros((), jnp.int32), streak=jnp.zeros((), jnp.int32),
        controls={name: jnp.asarray(value, jnp.float32) for name, value in ({"lr": 1.0} | controls).items()},
        rng=rng,
    )


def deployed(state: TrainState):
    """The parameters that are evaluated and exported: the bias-corrected EMA, or the parameters where there is
    none (yet)."""
    if state.ema is None:
        return state.params
    begun = state.ema_weight > 0
    weight = jnp.where(begun, state.ema_weight, 1.0)
    return jax.tree.map(
        lambda ema, param: param if ema is None else jnp.where(begun, (ema / weight).astype(param.dtype), param),
        state.ema, state.params, is_leaf=lambda leaf: leaf is None,
    )


def strided(batch, parts: int):
    """[batch, ...] -> [parts, batch / parts, ...]; example i goes to part i % parts, so that shards stay put."""
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), batch
    )


def merged(stats):
    """The inverse of `strided`: [parts, batch / parts, ...] -> [batch, ...]."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), stats)


def _split_floats(tree):
    """(differentiable leaves, the others), each with None for what it lacks."""
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)  # noqa: E731
    return (
        jax.tree.map(lambda x: x if floating(x) else None, tree),
        jax.tree.map(lambda x: None if floating(x) else x, tree),
    )


def make_gradients(recipe: Recipe, groups, micro: int, gather: Callable = lambda tree: tree) -> Callable:
    """(params, extra, frozen, batch, weights, knobs, key, probing=False) -> (grads, total, terms, probes, extra).

    `weights` maps each active term to its weight now. k micro-batches give the gradients of one batch, also when
    they hold different numbers of valid tokens: the counts of the whole batch are surveyed first. gather: what is
    done to parameters and teachers before they are computed with (sharding.gathering)."""

    def gradients(params, extra, frozen, batch, weights, knobs, key, probing=False):
        train, rest = cut(params, groups), cut(params, groups, frozen=True)
        parts, keys = strided(batch, micro), jax.random.split(key, micro)

        def loss(train, part, key, scale, probing=False):
            return recipe.loss(gather(join(train, rest)), extra, gather(frozen), part, Dials(scale, knobs, probing), key)

        # 1 Survey: the same loss, of which only counts and stats are kept; XLA deletes the rest.
        def survey(part_and_key):
            _, aux = loss(train, *part_and_key, weights)
            return {name: jnp.asarray(term.count) for name, term in aux.terms.items()}, aux.stats

        if micro == 1:  # outside any loop, so that the survey's forward pass is the training's
            counts, stats = jax.tree.map(lambda x: x[None], survey((jax.tree.map(lambda x: x[0], parts), keys[0])))
        else:
            counts, stats = jax.lax.map(survey, (parts, keys))
        # (A term without a weight is told by check_terms, once the terms of `whole` are known too.)
        scale = weights | {name: weights.get(name, 0.0) / jnp.maximum(count.sum(), 1) for name, count in counts.items()}
        scale = jax.lax.stop_gradient(scale)

        # 2 The terms of the whole batch, with their gradient to the parameters and to every example's stats.
        active, fixed = _split_floats(merged(stats))

        def whole(train, active):
            terms, wrote = recipe.whole(gather(join(train, rest)), extra, join(active, fixed), knobs)
            objective.check_terms(recipe.weights, [*counts, *terms])
            shares = (weights[n] * t.factor * t.sum / jnp.maximum(t.count, 1) for n, t in terms.items())
            return sum(shares, jnp.zeros((), jnp.float32)), (terms, wrote)

        (total, (whole_terms, wrote)), (grads, pull) = jax.value_and_grad(whole, (0, 1), has_aux=True)(train, active)

        # 3 Accumulate: each part's loss, plus the pull of the whole batch on its stats.
        def accumulate(grads, part_key_pull):
            part, key, pull = part_key_pull

            def part_loss(train):
                share, aux = loss(train, part, key, scale, probing)
                active, _ = _split_floats(aux.stats)
                pulled = jax.tree.map(lambda p, s: jnp.sum(p * s, dtype=jnp.float32), pull, active)
                return share + sum(jax.tree.leaves(pulled), jnp.zeros((), jnp.float32)), (share, aux.terms, aux.probes)

            (_, out), more = jax.value_and_grad(part_loss, has_aux=True)(train)
            return jax.tree.map(jnp.add, grads, more), out

        pulls = strided(pull, micro)
        if micro == 1:
            first = jax.tree.map(lambda x: x[0], (parts, keys, pulls))
            grads, out = accumulate(grads, first)
            out = jax.tree.map(lambda x: jnp.asarray(x)[None], out)
        else:
            grads, out = jax.lax.scan(accumulate, grads, (parts, keys, pulls))
        shares, terms, seen = out
        terms = {
            name: term._replace(sum=term.sum.sum(), count=term.count.sum(), factor=jnp.asarray(term.factor)[0])
            for name, term in terms.items()
        } | whole_terms
        return grads, total + shares.sum(), terms, jax.tree.map(jnp.sum, seen), wrote

    return gradients


def make_train_step(
    recipe: Recipe, groups, tx, lr: Schedule, *, micro: int, ema: float, gather: Callable = lambda tree: tree,
    left: Callable = lambda grads, norm: jnp.ones(()), every: int = 0,
) -> Callable:
    """train_step(state, frozen, batch) -> (state, metrics), to be jitted with `state` donated.

    left: (gradients, their norm) -> the share of them that the clip leaves. every: updates from one that is probed to the next,
    beside the first; 0: none is.
    metrics: loss, gap, finite, lr, grad_norm, clip, skipped, streak, terms (the ledger), knobs, groups (norms), probing, probes
    ((sum, count) pairs, of a probed update), moved (bool [trainable leaves])."""
    if unknown := recipe.controls.keys() - {"lr", *recipe.weights}:
        raise ValueError(f"controls {sorted(unknown)} multiply nothing; a control is 'lr' or the name of a weight")
    gradients = make_gradients(recipe, groups, micro, gather)
    trainable = jax.tree.map(lambda group: None if group.frozen else group, groups)

    def train_step(state: TrainState, frozen, batch):
        weights = objective.weights_at(recipe.weights, state.controls, state.step)
        knobs = {name: schedule(state.step) for name, schedule in recipe.knobs.items()}
        key = jax.random.fold_in(state.rng, state.step)
        number = state.step + 1  # as people count them
        probing = (number == 1) | (number % every == 0) if every else False
        grads, total, terms, seen, extra = gradients(state.params, state.extra, frozen, batch, weights, knobs, key, probing)
        lines, gap = objective.ledger(terms, weights, recipe.weights, total)

        # 4 One optax chain, scaled by the rate of this step.
        train = cut(state.params, groups)
        rate = lr(state.step) * state.controls["lr"]
        updates, opt = tx.update(grads, state.opt, train)
        updates = optax.tree.scale(rate, updates)
        moved_to = join(optax.apply_updates(train, updates), state.params)

        # 5 All of it or nothing of it. (optax.apply_if_finite applies the NaN in the end.)
        norm = optax.tree.norm(grads)
        written = [x for x in jax.tree.leaves((extra, cut(moved_to, groups))) if jnp.issubdtype(x.dtype, jnp.inexact)]
        good = jnp.stack([jnp.all(jnp.isfinite(x)) for x in written]
                         + [jnp.isfinite(total), jnp.isfinite(norm)]).all()
        average, weight = state.ema, state.ema_weight
        if average is not None:
            average = jax.tree.map(lambda e, p: ema * e + (1 - ema) * p, average, cut(moved_to, groups))
            weight = ema * weight + (1 - ema)
        old = (state.params, state.opt, state.extra, state.ema, state.ema_weight)
        new = (moved_to, opt, extra, average, weight)
        params, opt, extra, average, weight = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
        streak = jnp.where(good, 0, state.streak + 1)
        after = state.replace(
            step=state.step + 1, params=params, opt=opt, extra=extra, ema=average, ema_weight=weight,
            skipped=state.skipped + jnp.where(good, 0, 1), streak=streak,
        )
        norms = probes.group_norms(grads, train, cut(params, groups), trainable)  # of what really happened, not of what was meant to
        for group in jax.tree.leaves(trainable):
            norms[group.name]["lr"] = rate * group.lr_mult
        metrics = {
            "loss": total, "gap": gap, "finite": good, "lr": rate, "grad_norm": norm, "clip": left(grads, norm), "skipped": after.skipped,
            "streak": streak, "terms": lines, "knobs": knobs, "groups": norms, "probing": jnp.asarray(probing), "probes": seen,
            "moved": probes.moved(grads),
        }
        return after, metrics

    return train_step


def make_eval_step(evaluator, gather: Callable) -> Callable:
    """eval_step(params, extra, frozen, batch) -> arrays; params are the deployed student's."""

    def eval_step(params, extra, frozen, batch):
        params = gather(params)
        return evaluator.measure(params, Variables(params, extra), gather(frozen), batch)

    return eval_step
