"""The deep look: each term's own gradient, dead leaves, an example by itself, how far the moving average is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.recipe import Schedule
from jaxdistill.training import objective, state
from jaxdistill.training.deep import Deep, difference, gradients
from jaxdistill.training.prepare import compile_step
from tests import jobs, toy

ROWS = 16


def batch() -> dict:
    return {name: value[:ROWS] for name, value in toy.rows(0).items()}


def flat(tree) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def updated(config):
    """(a run, its state after one update, the gates)"""
    ready = jobs.ready(config)
    step, gates = compile_step(ready, ready.place(batch()))
    return ready, step(ready.state, ready.frozen, ready.place(batch()))[0], gates


@pytest.fixture(scope="module")
def seen():
    """(a run one update old, its state, what is seen)"""
    config = jobs.toy(dead=True, kd=((0.0, 0.5), (1.0, 0.9)))
    ready, now, gates = updated(config)
    return ready, now, Deep(ready, gates).look(now, ready.place(batch()))


def test_each_terms_gradient_is_that_of_the_term_alone(seen):
    ready, now, found = seen
    recipe = ready.built.recipe
    weights = objective.weights_at(recipe.weights, now.controls, now.step - 1)  # of the update that has just been
    run = jax.jit(state.make_gradients(recipe, ready.groups, 1))
    alone = {}
    for name in weights:
        mine = {other: weight if other == name else jnp.zeros(()) for other, weight in weights.items()}
        alone[name] = flat(run(now.params, now.extra, ready.frozen, batch(), mine, {}, jax.random.fold_in(now.rng, 0))[0])
    norms = {name: np.linalg.norm(grad) for name, grad in alone.items()}
    assert {name: term["grad_norm"] for name, term in found["terms"].items()} == pytest.approx(norms, rel=1e-5)
    assert found["terms"]["fit"]["share"] == pytest.approx(norms["fit"] / sum(norms.values()), rel=1e-5)
    cosine = alone["fit"] @ alone["kd"] / norms["fit"] / norms["kd"]
    pairs = {frozenset(pair.split("|")): value for pair, value in found["cosines"].items()}
    assert len(pairs) == 3
    assert pairs[frozenset(("fit", "kd"))] == pytest.approx(cosine, abs=1e-5)


def test_dead_leaves_are_named(seen):
    assert seen[2]["zero_gradient"] == ["dead/kernel"]


def test_a_leaf_may_rest_while_its_term_is_closed():
    """The projector, of the term `contrast` alone, whose weight has come to 0."""
    ready, now, gates = updated(jobs.toy())
    closed = ready.built.recipe.weights | {"contrast": Schedule(((0.0, 0.1), (1.0, 0.0)))}
    look = lambda: Deep(ready, gates).look(now.replace(step=jnp.asarray(9)), ready.place(batch()))  # noqa: E731
    assert look()["terms"]["contrast"]["grad_norm"] > 0
    ready.built.recipe = ready.built.recipe._replace(weights=closed)
    found = look()
    assert (found["terms"]["contrast"]["grad_norm"], found["zero_gradient"]) == (0, [])


def test_how_far_the_average_is(seen):
    """After one update the average is the parameters, and the update is how far both are from the beginning."""
    ready, now, found = seen
    before = ready.built.recipe.init(jax.random.fold_in(jax.random.key(0), 0)).params
    drop = lambda tree: {name: leaf for name, leaf in tree.items() if name != "still"}  # noqa: E731
    after, before = flat(drop(jax.device_get(now.params))), flat(drop(before))
    assert found["ema_distance"] == pytest.approx(0, abs=1e-6)
    assert found["ema_initial"] == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(after), rel=1e-4)
    assert found["ema_initial"] > 0.01


def test_without_what_it_needs_it_says_nothing(seen):
    assert seen[2]["batch_of_one"] is None  # the toy's batches do not say which rows are valid
    config = jobs.toy(contrast=0.0, kd=((0.0, 0.0),))
    config.train.ema = 0.0
    ready, now, gates = updated(config)
    found = Deep(ready, gates).look(now, ready.place(batch()))
    assert (found["ema_distance"], found["ema_initial"], found["cosines"]) == (None, None, {})
    assert found["terms"]["fit"]["share"] == 1


@pytest.mark.parametrize("sums", [False, True], ids=["rows", "sums"])
@pytest.mark.parametrize("statistics", [False, True], ids=["alone", "of the batch"])
def test_an_example_by_itself(statistics, sums):
    """Of an evaluator that gives a number an example, and of one that adds up; with statistics of the batch it tells."""
    def change(recipe):
        def measure(student, variables, frozen, batch):
            z = jnp.sum(batch["x"] @ student["body"]["kernel"], axis=(1, 2))
            z = (z - z.mean()) / (z.std() + 1e-3) if statistics else z
            if sums:
                return {"sum": jnp.sum(jnp.where(batch["valid"], z, 0.0)), "count": jnp.sum(batch["valid"], dtype=jnp.float32)}
            return {"z": z, "index": batch["index"], "valid": batch["valid"]}

        def data(split, seed, old=recipe.data):
            source = old(split, seed)
            return _With(source, valid=np.arange(ROWS) < ROWS - 3)

        evaluators = {name: one._replace(measure=measure) for name, one in recipe.evaluators.items()}
        return recipe._replace(evaluators=evaluators, data=data)

    ready = jobs.ready(jobs.toy(), change)
    found = Deep(ready, ready.gates)._batch_of_one(ready.state)
    assert (found > 0.1) if statistics else (found < 1e-5)


class _With:
    """Batches with a column more."""

    def __init__(self, source, **more):
        self.source, self.more = source, more

    def __next__(self):
        return next(self.source) | self.more

    def close(self):
        self.source.close()


def test_what_is_compared():
    rows = np.asarray([0, 2])
    among = {"z": np.asarray([[1.0, 5.0, 5.0], [5.0, 5.0, 4.0]]), "count": np.asarray([3.0, 2.0]), "label": np.asarray([[1, 2, 3]] * 2)}
    alone = {"z": np.asarray([[1.0], [3.5]]), "count": np.asarray([3.0, 7.0]), "label": np.asarray([[7], [7]])}
    assert difference(rows, among, alone) == pytest.approx(0.5 / 4)
    assert difference(rows, {"count": among["count"]}, {"count": alone["count"]}) is None


def test_a_term_without_gradient_has_no_cosine():
    found = gradients(("a", "b", "c"), np.asarray([[4.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 0.0]], np.float32))
    half = {"grad_norm": 2.0, "share": 0.5}
    assert found["terms"] == {"a": half, "b": half, "c": {"grad_norm": 0.0, "share": 0.0}}
    assert found["cosines"] == {"a|b": 0.5}
