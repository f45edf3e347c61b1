"""One update: micro-batches, skipping, the moving average, the teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.recipe import Dials, Term
from jaxdistill.training import objective, optim, state
from jaxdistill.training.metrics import record
from jaxdistill.training.optim import cut, join
from tests import jobs, toy

RAGGED = {"train.lr": 0.1, "optimizer.name": "sgd", "optimizer.clip": 0.0}


def job(**keys):
    config = jobs.toy(kd=((0.0, 0.5), (1.0, 0.7)))
    config.update_from_flattened_dict(keys)
    return config


def copy(tree):
    """A tree that survives the donation of the original."""
    return jax.tree.map(jnp.copy, tree)


def batch(size: int = 16, seed: int = 0) -> dict:
    """Rows sorted by length: the micro-batches of any cut hold different numbers of valid positions."""
    rows = toy.rows(seed)
    order = np.argsort(rows["where"].sum(1))[:size]
    return {name: jnp.asarray(value[order]) for name, value in rows.items()}


def gap(a, b) -> float:
    return float(optax.tree.norm(optax.tree.sub(a, b)) / optax.tree.norm(b))


def gradients(ready, micro: int, rows: dict):
    """(grads, total, terms, probes, extra) of `rows`, as one update forms them."""
    s, recipe = ready.state, ready.built.recipe
    weights = objective.weights_at(recipe.weights, {}, jnp.asarray(0))
    run = jax.jit(state.make_gradients(recipe, ready.groups, micro))
    return run(s.params, s.extra, ready.frozen, rows, weights, {}, jax.random.key(0))


@pytest.fixture(scope="module")
def sgd():
    return jobs.ready(job(**RAGGED))


@pytest.fixture(scope="module")
def one(sgd):
    return gradients(sgd, 1, batch())


@pytest.fixture(scope="module")
def adam():
    return jobs.ready(job(**{"toy.poison": 63}))


@pytest.fixture
def start(adam):
    return copy(adam.state)


class TestMicroBatches:
    @pytest.mark.parametrize("micro", [2, 4])
    def test_k_micro_batches_are_one_batch(self, sgd, one, micro):
        grads, total, terms, probes, extra = gradients(sgd, micro, batch())
        assert gap(grads, one[0]) < 3e-6
        assert abs(total / one[1] - 1) < 3e-6
        assert gap(extra, one[4]) < 3e-6
        assert probes["valid"][0] == one[3]["valid"][0]
        counts = {name: float(term.count) for name, term in terms.items()}
        assert counts == {name: float(term.count) for name, term in one[2].items()}
        assert len(set(counts.values())) == 3  # the case is only worth testing where the terms count different things

    def test_updated_parameters_agree(self, sgd):
        # SGD: Adam divides rounding noise by itself where a gradient is near 0.
        other = jobs.ready(job(**RAGGED, **{"train.micro": 4}))
        a, _ = sgd.step(copy(sgd.state), sgd.frozen, sgd.place(batch()))
        b, _ = other.step(other.state, other.frozen, other.place(batch()))
        assert gap(b.params, a.params) < 3e-6

    def test_a_mean_of_micro_means_would_be_wrong(self, sgd, one):
        parts = state.strided(batch(), 4)
        means = [gradients(sgd, 1, jax.tree.map(lambda x: x[i], parts))[0] for i in range(4)]  # noqa: B023
        naive = jax.tree.map(lambda *g: sum(g) / 4, *means)
        assert gap(naive, one[0]) > 1e-2

    def test_the_gradient_is_that_of_the_total(self, sgd, one):
        """Also what reaches the parameters through the examples' arrays that the terms of the whole batch are made of."""
        s, recipe = sgd.state, sgd.built.recipe
        weights = objective.weights_at(recipe.weights, {}, jnp.asarray(0))
        rest = cut(s.params, sgd.groups, frozen=True)

        @jax.jit
        def total(train):
            params = join(train, rest)
            scale = weights | {name: weights[name] / one[2][name].count for name in ("fit", "kd")}
            share, aux = recipe.loss(params, s.extra, sgd.frozen, batch(), Dials(scale, {}), jax.random.key(0))
            contrast = recipe.whole(params, s.extra, aux.stats, {})[0]["contrast"]
            return share + weights["contrast"] * contrast.sum / contrast.count

        value, grads = jax.value_and_grad(total)(cut(s.params, sgd.groups))
        assert abs(one[1] / value - 1) < 3e-6
        assert gap(one[0], grads) < 3e-6

    @pytest.mark.parametrize("micro", [1, 2, 4])
    def test_whole_sees_every_example_once_in_order(self, micro):
        def change(recipe):
            def loss(params, extra, frozen, batch, dials, key):
                total, aux = recipe.loss(params, extra, frozen, batch, dials, key)
                return total, aux._replace(stats=aux.stats | {"index": batch["index"]})

            def whole(params, extra, stats, knobs):
                return recipe.whole(params, extra, stats, knobs)[0], {"seen": stats["index"]}

            return recipe._replace(loss=loss, whole=whole)

        rows = batch()
        np.testing.assert_array_equal(gradients(jobs.ready(job(), change), micro, rows)[4]["seen"], rows["index"])

    def test_strided_and_merged_are_inverse(self):
        rows = {"x": jnp.arange(24).reshape(12, 2)}
        parts = state.strided(rows, 3)
        np.testing.assert_array_equal(parts["x"][1, :, 0] // 2, [1, 4, 7, 10])  # example i -> part i % k
        np.testing.assert_array_equal(state.merged(parts)["x"], rows["x"])

    def test_counts_do_not_depend_on_parameters(self, sgd):
        lost = copy(sgd.state)
        lost = lost.replace(params=jax.tree.map(lambda x: x * jnp.nan, lost.params))
        _, sick = sgd.step(lost, sgd.frozen, sgd.place(batch()))
        _, well = sgd.step(copy(sgd.state), sgd.frozen, sgd.place(batch()))
        count = lambda metrics: {name: float(line["count"]) for name, line in metrics["terms"].items()}  # noqa: E731
        assert not sick["finite"]
        assert count(sick) == count(well)

    @pytest.mark.parametrize("micro", [1, 2])
    def test_an_all_masked_batch_is_zero_with_zero_gradients(self, micro):
        ready = jobs.ready(jobs.toy(kd=((0.0, 0.0),), contrast=0.0))
        rows = batch()
        rows["where"] = jnp.zeros_like(rows["where"])
        grads, total, terms, *_ = gradients(ready, micro, rows)
        assert total == 0
        assert terms["fit"].count == 0
        assert all(jnp.all(g == 0) for g in jax.tree.leaves(grads))


class TestSkip:
    def test_a_non_finite_update_changes_nothing_but_the_counters(self, adam, start):
        good, bad = batch(), batch()
        bad["index"] = bad["index"].at[3].set(63)
        good["index"] = jnp.zeros_like(good["index"])
        before, _ = adam.step(start, adam.frozen, adam.place(good))
        kept = jax.device_get((before.params, before.opt, before.extra, before.ema, before.ema_weight))
        after, metrics = adam.step(before, adam.frozen, adam.place(bad))
        same = (after.params, after.opt, after.extra, after.ema, after.ema_weight)
        for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(kept), strict=True):
            assert np.asarray(a).tobytes() == b.tobytes()
        assert not metrics["finite"]
        assert (int(after.step), int(after.skipped), int(after.streak)) == (2, 1, 1)
        assert {(float(group["changed"]), float(group["update_ratio"])) for group in metrics["groups"].values()} == {(0.0, 0.0)}
        again, _ = adam.step(after, adam.frozen, adam.place(bad))
        assert (int(again.step), int(again.skipped), int(again.streak)) == (3, 2, 2)
        final, metrics = adam.step(again, adam.frozen, adam.place(good))
        assert metrics["finite"]
        assert (int(final.step), int(final.skipped), int(final.streak)) == (4, 2, 0)
        assert not np.array_equal(final.params["body"]["kernel"], kept[0]["body"]["kernel"])
        # The schedule counts attempts: a skipped update moves it on.
        train = adam.built.train
        rate = objective.learning_rate(train.lr, train.warmup, train.final_lr, train.steps)
        assert metrics["lr"] == rate(jnp.asarray(3))

    def test_a_non_finite_extra_is_skipped_too(self):
        def change(recipe):
            return recipe._replace(whole=lambda *args: (recipe.whole(*args)[0], {"mean": jnp.full(toy.WIDTH, jnp.inf)}))

        ready = jobs.ready(job(), change)
        after, metrics = ready.step(ready.state, ready.frozen, ready.place(batch()))
        assert metrics["loss"] < jnp.inf
        assert not metrics["finite"]
        assert jnp.all(jnp.isfinite(after.extra["mean"]))


    def test_parameters_that_would_not_be_finite_are_not_written(self):
        """Though loss and gradients are: the rate times the multiplier of a group is beyond float32."""
        ready = jobs.ready(job(**{"train.lr": 3e38, "train.warmup": 0.0}))
        after, metrics = ready.step(ready.state, ready.frozen, ready.place(batch()))
        assert jnp.isfinite(metrics["loss"])
        assert jnp.isfinite(metrics["grad_norm"])
        assert not metrics["finite"]
        assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((after.params, after.opt, after.ema)))


class TestAverage:
    def test_it_is_the_weighted_mean_of_the_history(self, adam, start):
        now, decay, history = start, adam.built.train.ema, []
        np.testing.assert_array_equal(state.deployed(now)["body"]["kernel"], now.params["body"]["kernel"])
        for seed in range(10):
            rows = batch(seed=seed)
            rows["index"] = jnp.where(seed == 4, 63, 0) * jnp.ones_like(rows["index"])  # one of them is skipped
            now, _ = adam.step(now, adam.frozen, adam.place(rows))
            if seed != 4:
                history.append(np.asarray(now.params["body"]["kernel"], np.float64))
        weights = decay ** np.arange(len(history))[::-1]
        wanted = np.tensordot(weights / weights.sum(), np.stack(history), 1)
        deployed = state.deployed(now)
        np.testing.assert_allclose(deployed["body"]["kernel"], wanted, rtol=1e-6, atol=1e-7)
        assert np.abs(wanted - history[-1]).max() > 1e-3
        np.testing.assert_array_equal(deployed["still"]["kernel"], now.params["still"]["kernel"])  # frozen: as it is

    def test_off(self):
        ready = jobs.ready(job(**{"train.ema": 0.0}))
        now, _ = ready.step(ready.state, ready.frozen, ready.place(batch()))
        assert now.ema is None
        assert state.deployed(now) is now.params


def test_an_update_is_of_its_step():
    """Of SGD with decay and two micro-batches, three times: parameters less the rate of this step, times the gradient at the weights and
    with the draws of this step. Not of the step before, of every other call, or of a count of micro-batches."""

    def change(recipe):
        def loss(params, extra, frozen, batch, dials, key):
            noise = 0.1 * jax.random.normal(key, batch["x"].shape)
            return recipe.loss(params, extra, frozen, batch | {"x": batch["x"] + noise}, dials, key)

        return recipe._replace(loss=loss)

    one = jobs.ready(job(**RAGGED, **{"optimizer.momentum": 0.0, "train.micro": 2}), change)
    recipe, train, now = one.built.recipe, one.built.train, one.state
    form = jax.jit(state.make_gradients(recipe, one.groups, train.micro))
    rate = objective.learning_rate(train.lr, train.warmup, train.final_lr, train.steps)
    for number in range(3):
        at = jnp.asarray(number)
        weights = {name: schedule(at) for name, schedule in recipe.weights.items()}
        key = jax.random.fold_in(now.rng, number)
        grads = form(now.params, now.extra, one.frozen, batch(), weights, {}, key)[0]
        before, grads = jax.device_get((now.params, grads))
        now, metrics = one.step(now, one.frozen, one.place(batch()))
        assert float(metrics["lr"]) == pytest.approx(float(rate(at)))
        for part, leaf, group in (("body", "kernel", (1, 0.1)), ("body", "bias", (1, 0)), ("projector", "kernel", (5, 0.1))):
            mult, decay = group
            moved = float(rate(at)) * mult * (grads[part][leaf] + decay * before[part][leaf])
            assert np.abs(moved).max() > 1e-4
            np.testing.assert_allclose(before[part][leaf] - now.params[part][leaf], moved, rtol=1e-3, atol=1e-6)


class TestRecord:
    def test_groups_tell_what_the_update_really_changed(self, adam, start):
        before = jax.device_get(start.params)
        after, metrics = adam.step(start, adam.frozen, adam.place(batch()))
        norm = lambda tree: np.sqrt(sum(float(np.sum(np.square(leaf, dtype=np.float64))) for leaf in jax.tree.leaves(tree)))  # noqa: E731
        kernels = [jax.tree.map(np.asarray, {name: each[name]["kernel"] for name in ("body", "head")}) for each in (before, after.params)]
        ratio = norm(jax.tree.map(np.subtract, kernels[1], kernels[0])) / norm(kernels[0])
        assert float(metrics["groups"]["body"]["update_ratio"]) == pytest.approx(ratio, rel=1e-5)
        assert float(metrics["groups"]["body"]["changed"]) == 1
        assert "still" not in metrics["groups"]

    @pytest.mark.parametrize("keys", [{"optimizer.clip": 0.01}, {"optimizer.clip": 0.01, "optimizer.clip_value": 1e-4},
                                      {"optimizer.clip": 1e9}, {"optimizer.clip": 0.0}])
    def test_what_the_clip_leaves(self, keys):
        config = job(**keys).optimizer
        grads = {"a": jnp.asarray([0.3, -1.0]), "b": None}
        norm = optax.tree.norm(grads)
        clip, value = config.clip, config.clip_value or np.inf
        length = np.linalg.norm(np.clip([0.3, -1.0], -value, value))
        wanted = min(1.0, clip / length) if clip else 1.0
        assert float(optim.left_by_clip(config, grads, norm)) == pytest.approx(wanted, rel=1e-6)

    def test_the_first_and_every_third_update_are_looked_at(self):
        ready = jobs.ready(job(**{"probes.every": 3}))
        now, probed = ready.state, []
        for number in range(1, 8):
            now, metrics = ready.step(now, ready.frozen, ready.place(batch(seed=number)))
            line = record(number, jax.device_get(metrics))
            assert bool(line["probes"]) == bool(metrics["probing"])
            probed += [number] if line["probes"] else []
        assert probed == [1, 3, 6]
        assert ready.step._cache_size() == 1


def test_nothing_recompiles_while_schedules_and_controls_move(adam, start):
    before = adam.step._cache_size()
    now = start
    for seed in range(3):
        now, _ = adam.step(now, adam.frozen, adam.place(batch(seed=seed)))
        now = now.replace(controls={
            name: jax.device_put(jnp.asarray(0.5 + seed, old.dtype), old.sharding) for name, old in now.controls.items()
        })
    assert adam.step._cache_size() == max(before, 1)


def test_no_gradient_flows_into_the_teacher(sgd):
    s, recipe, rows = sgd.state, sgd.built.recipe, batch()
    weights = objective.weights_at(recipe.weights, {}, jnp.asarray(0))

    def total(frozen):
        return state.make_gradients(recipe, sgd.groups, 1)(s.params, s.extra, frozen, rows, weights, {}, jax.random.key(0))[1]

    total, pull = jax.jit(jax.value_and_grad(total))(sgd.frozen)
    assert all(jnp.all(g == 0) for g in jax.tree.leaves(pull))
    other = jax.tree.map(lambda x: x + 1, sgd.frozen)
    assert abs(gradients(dataclasses.replace(sgd, frozen=other), 1, rows)[1] - total) > 1e-3  # though the loss depends on it


def test_a_learned_factor_keeps_the_ledger_whole():
    """An uncertainty weight: the term reports its factor, and the lines still add up to the total."""

    def change(recipe):
        def loss(params, extra, frozen, batch, dials, key):
            _, aux = recipe.loss(params, extra, frozen, batch, dials, key)
            factor = jnp.exp(-params["body"]["bias"][0]) / 2
            terms = aux.terms | {"fit": aux.terms["fit"]._replace(factor=factor)}
            return sum(dials.scale[n] * t.factor * t.sum for n, t in terms.items()), aux._replace(terms=terms)

        def whole(params, extra, stats, knobs):
            terms, wrote = recipe.whole(params, extra, stats, knobs)
            nce = terms["contrast"]
            return {"contrast": Term(nce.sum, nce.count, jnp.exp(params["body"]["bias"][1]))}, wrote

        return recipe._replace(loss=loss, whole=whole)

    one, four = jobs.ready(job(**RAGGED), change), jobs.ready(job(**RAGGED, **{"train.micro": 4}), change)
    a, metrics = one.step(one.state, one.frozen, one.place(batch()))
    b, others = four.step(four.state, four.frozen, four.place(batch()))
    assert metrics["gap"] < 1e-6
    assert others["gap"] < 1e-6
    fit = metrics["terms"]["fit"]
    np.testing.assert_allclose(fit["weighted"], 0.5 * fit["raw"], rtol=1e-6)
    assert gap(b.params, a.params) < 3e-6
