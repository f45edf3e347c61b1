"""Schedules and the ledger."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import UserError
from jaxdistill.recipe import Schedule, Term
from jaxdistill.training import objective
from tests import jobs


def at(schedule, *steps) -> list[float]:
    run = jax.jit(schedule)
    return [round(float(run(jnp.asarray(step))), 6) for step in steps]


class TestSchedule:
    def test_linear(self):
        ramp = Schedule.ramp(((0.0, 0.1), (0.2, 0.7), (0.6, 0.5)), 100)
        assert at(ramp, 0, 10, 20, 40, 60, 100, 1000) == [0.1, 0.4, 0.7, 0.6, 0.5, 0.5, 0.5]

    def test_from_zero_and_late(self):
        ramp = Schedule.ramp(((0.5, 0.0), (1.0, 1.0)), 100)
        assert at(ramp, 0, 49, 50, 75, 100) == [0.0, 0.0, 0.0, 0.5, 1.0]
        assert not ramp.off  # it is 0 at first, and belongs to the program all the same

    def test_constant(self):
        ramp = Schedule.ramp(((0.0, 0.9),), 100)
        assert at(ramp, 0, 50, 100) == [0.9] * 3
        assert (ramp.constant, ramp.off) == (0.9, False)
        assert Schedule.ramp(((0.0, 0.0), (1.0, 0.0)), 100).off

    def test_cosine(self):
        wave = Schedule(((0.0, 0.0), (10.0, 1.0), (20.0, 0.5)), cosine=(1,))
        assert at(wave, 5, 10, 12, 15, 20) == [0.5, 1.0, round(0.75 + 0.25 * np.cos(0.2 * np.pi), 6), 0.75, 0.5]

    def test_no_steps(self):
        assert at(Schedule.ramp(((0.0, 0.3), (1.0, 0.6)), 0), 0) == [0.3]

    @pytest.mark.parametrize("points", [
        (), 0.5, "0.5", (0.0, 0.5), ((0.0, 0.5, 1.0),), ((0.5, 1.0), (0.2, 0.0)), ((0.2, 1.0), (0.2, 0.0)), ((-0.1, 1.0),),
        ((0.0, 1.0), (1.1, 0.0)), ((0.0, "high"),), ((float("nan"), 1.0),), ((0.0, float("nan")),), ((0.0, float("inf")),), None,
    ])
    def test_malformed(self, points):
        with pytest.raises(UserError, match=r"config key kd\.weight: found .*; accepted: \(\(fraction, value\)"):
            Schedule.ramp(points, 100, "config key kd.weight")


class TestLearningRate:
    def test_warm_up_then_cosine(self):
        rate = objective.learning_rate(1.0, 0.1, 0.1, 100)
        assert at(rate, 0, 4, 9) == [0.1, 0.5, 1.0]  # the first update has a tenth, the tenth has all
        half = 0.1 + 0.9 * (0.5 + 0.5 * np.cos(np.pi * 46 / 91))
        assert at(rate, 55, 100, 200) == [round(half, 6), 0.1, 0.1]

    def test_no_warm_up(self):
        assert at(objective.learning_rate(0.5, 0.0, 0.0, 10), 0, 10) == [0.5, 0.0]

    @pytest.mark.parametrize("steps", [1, 2, 3])
    @pytest.mark.parametrize("warmup", [0.0, 0.5, 0.99])
    def test_short_runs_always_learn(self, steps, warmup):
        rates = at(objective.learning_rate(0.5, warmup, 0.0, steps), *range(steps))
        assert all(0 < rate <= 0.5 for rate in rates)


class TestTerms:
    def weights(self, **values):
        return {name: Schedule(((0.0, value),)) for name, value in values.items()}

    def test_a_weight_without_a_term(self):
        with pytest.raises(ValueError, match=r"weights name the terms \['fit', 'kd'\], but loss and whole return \['fit'\]"):
            objective.check_terms(self.weights(fit=1.0, kd=0.5), ["fit"])

    def test_a_term_without_a_weight(self):
        with pytest.raises(ValueError, match=r"\['fit'\], but loss and whole return \['fit', 'kd'\]"):
            objective.check_terms(self.weights(fit=1.0), ["fit", "kd"])

    def test_a_term_of_weight_zero_is_left_out(self):
        objective.check_terms(self.weights(fit=1.0, kd=0.0), ["fit"])

    @pytest.mark.parametrize("change", [
        lambda recipe: recipe._replace(weights=recipe.weights | {"more": Schedule(((0.0, 1.0),))}),
        lambda recipe: recipe._replace(loss=lambda *a: with_term(recipe.loss(*a))),
        lambda recipe: recipe._replace(whole=lambda *a: ({"more": Term(jnp.ones(()), jnp.ones(()))} | recipe.whole(*a)[0], a[1])),
    ], ids=["weight", "term", "whole"])
    def test_the_trace_fails(self, change):
        ready = jobs.ready(jobs.toy(), change)
        with pytest.raises(ValueError, match="weights name the terms .*more"):
            ready.step.lower(ready.abstract, ready.frozen, ready.place(next(ready.built.recipe.data("train", 0))))

    def test_a_control_that_moves_nothing(self):
        with pytest.raises(ValueError, match="control.*kdd"):
            jobs.ready(jobs.toy(), lambda recipe: recipe._replace(controls={"kdd": 1.0}))

    def test_controls_multiply(self):
        weights = objective.weights_at(self.weights(fit=1.0, kd=0.5, off=0.0), {"kd": jnp.asarray(0.5), "lr": 1.0}, jnp.asarray(3))
        assert {name: float(value) for name, value in weights.items()} == {"fit": 1.0, "kd": 0.25}

    def test_the_ledger(self):
        schedules = self.weights(fit=1.0, kd=0.5, learned=2.0, off=0.0)
        terms = {"fit": Term(jnp.asarray(6.0), jnp.asarray(3)), "kd": Term(jnp.asarray(0.0), jnp.asarray(0), jnp.asarray(2.0)),
                 "learned": Term(jnp.asarray(8.0), jnp.asarray(2), jnp.asarray(0.25))}
        weights = objective.weights_at(schedules, {}, jnp.asarray(0))
        lines, gap = objective.ledger(terms, weights, schedules, jnp.asarray(4.0))
        plain = jax.tree.map(float, lines)
        assert plain["fit"] == {"raw": 2.0, "weight": 1.0, "weighted": 2.0, "count": 3.0}
        assert plain["kd"] == {"raw": 0.0, "weight": 0.5, "weighted": 0.0, "count": 0.0}
        assert plain["learned"] == {"raw": 4.0, "weight": 2.0, "weighted": 2.0, "count": 2.0}
        assert plain["off"] == {"raw": 0.0, "weight": 0.0, "weighted": 0.0, "count": 0.0}
        assert float(gap) == 0.0
        _, gap = objective.ledger(terms, weights, schedules, jnp.asarray(4.4))
        np.testing.assert_allclose(gap, 0.1, rtol=1e-5)

    def test_a_react_control_reaches_the_step(self):
        ready = jobs.ready(jobs.toy(), lambda recipe: recipe._replace(controls={"kd": 0.0}))
        batch = ready.place(next(ready.built.recipe.data("train", 0)))
        _, metrics = ready.step(ready.state, ready.frozen, batch)
        line = metrics["terms"]["kd"]
        assert (float(line["weight"]), float(line["weighted"]), float(line["count"])) == (0.0, 0.0, 96.0)
        assert line["raw"] > 0
        assert metrics["gap"] < 1e-6


def with_term(found):
    total, aux = found
    return total, aux._replace(terms=aux.terms | {"more": Term(jnp.ones(()), jnp.ones(()))})
