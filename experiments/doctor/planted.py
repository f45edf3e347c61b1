"""Faults, planted one at a time into the recipes and the training of the library, which knows nothing of them.

`make` is a recipe of its own (recipe="experiments.doctor.planted"): that of `planted.base` with the fault `planted.fault` of RECIPES. What
is no recipe's (the optimizer, the average, a layer, a loader) is exchanged by `patched` while a job runs, from PATCHES.
"""

import contextlib
import dataclasses
import math
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill.data import distributions, sequences
from jaxdistill.models import kaf, matching
from jaxdistill.recipe import Group, Recipe, Schedule, Term, load
from jaxdistill.recipes import student_aware
from jaxdistill.recipes.lm import next_token
from jaxdistill.training import deep, loop, optim, prepare, state

PADDED = 0.5  # share of a row that is padding, where a fault needs some


def make(config) -> Recipe:
    planted = config.planted
    base, fault = planted.base, planted.fault
    return RECIPES[fault](load(base)(config))


def patched(fault: str):
    """A context in which the library has the fault, where it is one of PATCHES."""
    return PATCHES[fault]() if fault in PATCHES else contextlib.nullcontext()


# --- recipes ------------------------------------------------------------------------------------------------------------------------


def fed(recipe: Recipe, change, splits=("train",)) -> Recipe:
    """With batches of these splits changed."""

    def data(split, seed):
        found = recipe.data(split, seed)
        return Changed(found, change) if split in splits else found

    return recipe._replace(data=data)


class Changed:
    """A grain iterator whose batches are changed as they come."""

    def __init__(self, iterator, change):
        self.iterator, self.change = iterator, change

    def __iter__(self):
        return self

    def __next__(self):
        return self.change(dict(next(self.iterator)))

    def get_state(self):
        return self.iterator.get_state()

    def set_state(self, found):
        self.iterator.set_state(found)

    def close(self):
        self.iterator.close()


def losing(recipe: Recipe, change) -> Recipe:
    """change(total, aux, batch, dials) -> (total, aux), after the recipe's own loss."""

    def loss(params, extra, frozen, batch, dials, key):
        return change(*recipe.loss(params, extra, frozen, batch, dials, key), batch, dials)

    return recipe._replace(loss=loss)


def inside(recipe: Recipe, *patches) -> Recipe:
    """With (object, name, value) exchanged while the recipe's loss is traced, and not while anything is measured."""

    def loss(*args):
        with contextlib.ExitStack() as stack:
            for target, name, value in patches:
                stack.enter_context(mock.patch.object(target, name, value))
            return recipe.loss(*args)

    return recipe._replace(loss=loss)


def measured(recipe: Recipe, change) -> Recipe:
    """change(metrics) -> metrics, of every evaluation."""
    wrap = lambda one: one._replace(finish=lambda stacked: change(one.finish(stacked)))  # noqa: E731
    return recipe._replace(evaluators={name: wrap(one) for name, one in recipe.evaluators.items()})


def begun(recipe: Recipe, change) -> Recipe:
    """change(params) -> params, of those that training begins with."""

    def init(key):
        found = recipe.init(key)
        return found._replace(params=change(dict(found.params)))

    return recipe._replace(init=init)


def set_leaf(params: dict, path: str, change) -> dict:
    """`params` with the leaf at a path changed."""
    name, _, rest = path.partition("/")
    return params | {name: set_leaf(params[name], rest, change) if rest else change(params[name])}


def labels_not_shifted(recipe):
    def unshifted(batch, end=None):
        tokens, _, where, layout = next_token(batch, end)
        return tokens, tokens, where, layout

    return inside(recipe, (student_aware, "next_token", unshifted))


def padded(batch):
    """The end of each row is padding."""
    length = batch["tokens"].shape[1]
    keep = np.arange(length) < round((1 - PADDED) * length)
    return batch | {name: np.where(keep[None], batch[name], 0) for name in ("tokens", "segments", "positions")}


def padding_counted(recipe):
    """Sums over labels, divided by positions."""

    def change(total, aux, batch, dials):
        whole = jnp.asarray(batch["tokens"][:, 1:].size, jnp.float32)
        return total, aux._replace(terms={name: term._replace(count=whole) for name, term in aux.terms.items()})

    return losing(fed(recipe, padded), change)


def teacher_misaligned(recipe):
    own = student_aware.fused_vocab_loss

    def shifted(*args, teacher=None, **options):
        if teacher is not None:
            teacher = (jnp.roll(teacher[0], 3, axis=1), *teacher[1:])
        return own(*args, teacher=teacher, **options)

    return inside(recipe, (student_aware, "fused_vocab_loss", shifted))


def teacher_follows_student(recipe):
    """The teacher is among what is trained, and no gradient stops at it."""

    def init(key):
        found = recipe.init(key)
        return found._replace(params=found.params | {"teacher": recipe.frozen(None)["teacher"]})

    def loss(params, extra, frozen, batch, dials, key):
        with mock.patch.object(jax.lax, "stop_gradient", lambda x: x):
            return recipe.loss(params, extra, frozen | {"teacher": params["teacher"]}, batch, dials, key)

    return recipe._replace(init=init, loss=loss, optim_rules=(*recipe.optim_rules, (r"^teacher/", Group("teacher"))))


def with_term(recipe, weight: Schedule, size: float):
    """A term that nothing can lower."""

    def change(total, aux, batch, dials):
        count = jnp.sum(batch["valid"], dtype=jnp.float32)
        value = size * count + jnp.sum(jnp.where(batch["valid"], batch["x"][:, 0], 0.0))
        return total + dials.scale["regulariser"] * value, aux._replace(terms=aux.terms | {"regulariser": Term(value, count)})

    return losing(recipe._replace(weights=recipe.weights | {"regulariser": weight}), change)


def projector_frozen(recipe):
    """The projector stays as random as it was."""
    rules = tuple((regex, dataclasses.replace(group, frozen=group.name.startswith("projector"))) for regex, group in recipe.optim_rules)
    return recipe._replace(optim_rules=rules)


def perplexity_of_total(recipe):
    """Of cross-entropy and distillation together."""
    return measured(recipe, lambda found: found | {"perplexity": math.exp(0.1 * found["nll"] + 0.9 * found.get("teacher_kl", 0.0))})


def poisoned(recipe):
    """log 0 for the examples of one class."""

    def change(total, aux, batch, dials):
        return total + jnp.where(jnp.any(batch["label"] == 7), jnp.log(0.0), 0.0), aux

    return losing(recipe, change)


RECIPES = {
    "labels_not_shifted": labels_not_shifted,
    "padded": lambda recipe: fed(recipe, padded),  # no fault: what some need to show
    "padding_counted": padding_counted,
    "teacher_misaligned": teacher_misaligned,
    "teacher_follows_student": teacher_follows_student,
    "projector_uninformative": projector_frozen,
    "router_collapsed": lambda recipe: begun(recipe, lambda params: set_leaf(
        params, "match/router_scores/importance", lambda x: x.at[0].set(100.0))),
    "perplexity_of_total": perplexity_of_total,
    "metric_clamped": lambda recipe: measured(recipe, lambda found: found | {"perplexity": math.exp(min(64 * found["nll"], 20.0))}),
    "all_masked": lambda recipe: fed(recipe, lambda batch: batch | {"valid": np.zeros_like(batch["valid"])}),
    "weight_schedule_mimics": lambda recipe: with_term(recipe, Schedule(((0.0, 0.02), (200.0, 2.0))), 7.3),
    "ledger_gap": lambda recipe: losing(recipe, lambda total, aux, batch, dials: (1.02 * total, aux)),
    "saturated": lambda recipe: begun(recipe, lambda params: set_leaf(params, "head/kernel", lambda x: 3000 * x)),
    "inputs_unscaled": lambda recipe: fed(recipe, lambda batch: batch | {"x": 1000 * batch["x"]}, ("train", "validation", "test")),
    "constant_predictor": lambda recipe: fed(recipe, lambda batch: batch | {"image": np.full_like(batch["image"], 128)}),
    "non_finite": poisoned,
}  # fmt: skip


# --- training, layers and loaders ---------------------------------------------------------------------------------------------------


def chain(change):
    """The optimizer, changed: of training, and so of no recipe."""
    own = optim.optimizer
    return mock.patch.object(prepare.optim, "optimizer", lambda config, groups: change(own(config, groups)))


def every_other(tx):
    return optax.MultiSteps(tx, 2).gradient_transformation()


def of_the_vectors_norm():
    """exp(-gamma |s - d|^2) of the whole vector, for each neuron's own kernel."""

    def wrong(s, alpha, gamma, points):
        distance = jnp.stack([jnp.sum(jnp.square(s - point), axis=-1) for point in points], axis=-1)
        return jnp.exp(-gamma[0] * distance) @ alpha

    return mock.patch.object(kaf, "kaf", wrong)


class OverTheBatch(nn.Module):
    """In LayerNorm's place: every number by the mean and deviation of the batch."""

    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        x = (x - x.mean(axis=0, keepdims=True)) * jax.lax.rsqrt(x.var(axis=0, keepdims=True) + 1e-6)
        return x * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(bias, x.shape)


def training_from(module, change):
    """A loader whose training split is changed: change(sets) -> the places that are left, or that are others."""
    own = module.load

    def wrong(*args):
        return change(own(*args))

    return mock.patch.object(module, "load", wrong)


def without_half_of_the_classes(sets):
    train = sets.splits["train"]
    return dataclasses.replace(sets, splits=sets.splits | {"train": _sequences(train, np.flatnonzero(train.labels < 25))})


def _sequences(split, places):
    own = split.read
    return dataclasses.replace(split, names=tuple(split.names[i] for i in places), labels=split.labels[places],
                               subjects=split.subjects[places], read=lambda i: own(places[i]))  # fmt: skip


def validation_from_training(sets):
    """Validation is a part of the training split."""
    train = sets.splits["train"]
    some = distributions.Split({name: values[: len(values) // 8] for name, values in train.rows.items()}, train.nodes)
    return dataclasses.replace(sets, splits=sets.splits | {"validation": some})


def average_from_the_start():
    """The average begins at the initial parameters and not at 0, and nothing corrects for it."""
    own = state.fresh

    def wrong(variables, groups, tx, controls, rng, *, ema):
        found = own(variables, groups, tx, controls, rng, ema=ema)
        return found.replace(ema=jax.tree.map(jnp.copy, optim.cut(found.params, groups)), ema_weight=jnp.ones((), jnp.float32))

    return mock.patch.object(state, "fresh", wrong)


@contextlib.contextmanager
def average_unused():
    with contextlib.ExitStack() as stack:
        for module in (state, loop, deep):
            stack.enter_context(mock.patch.object(module, "deployed", lambda found: found.params))
        yield


PATCHES = {
    "optimizer_not_stepping": lambda: chain(lambda tx: optax.chain(tx, optax.set_to_zero())),
    "every_other": lambda: chain(every_other),
    "zero_gradient": of_the_vectors_norm,
    "batch_statistics": lambda: mock.patch.object(nn, "LayerNorm", lambda dtype=jnp.float32, name=None: OverTheBatch(dtype, name=name)),
    "classes_disjoint": lambda: training_from(sequences, without_half_of_the_classes),
    "groups_leak": lambda: training_from(distributions, validation_from_training),
    "ema_initial": average_from_the_start,
    "ema_never_used": average_unused,
    "term_dominates": lambda: mock.patch.dict(matching.DISTANCES, rms=_raw_squares),
}


def _raw_squares(ours, theirs, *, where):
    """Squares of states as they are, not of normalised ones, summed over the features and the positions of a row."""
    return jnp.where(where, where.shape[1] * jnp.sum(jnp.square(ours - theirs), axis=-1), 0.0)
