"""The contract's own helpers: recipes by name, weights that lean on each other, terms that cost nothing while closed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import UserError
from jaxdistill.recipe import Rest, Schedule, load, probed, while_on
from jaxdistill.training import objective
from tests import toy


class TestWeights:
    def at(self, step, **controls):
        weights = {"lm": Rest("kd"), "kd": Schedule.ramp(((0.0, 0.0), (1.0, 0.8)), 10)}
        return {name: float(value) for name, value in objective.weights_at(weights, controls, step).items()}

    def test_the_rest_is_what_the_other_leaves_of_1(self):
        assert self.at(0) == {"kd": 0.0, "lm": 1.0}
        assert self.at(10) == pytest.approx({"kd": 0.8, "lm": 0.2})

    def test_while_the_other_is_closed_it_is_all(self):
        assert self.at(10, kd=0.0) == {"kd": 0.0, "lm": 1.0}

    def test_it_is_never_below_0(self):
        assert self.at(10, kd=3.0)["lm"] == 0

    def test_the_other_may_be_off(self):
        weights = {"lm": Rest("kd"), "kd": Schedule(((0.0, 0.0),))}
        assert {name: float(value) for name, value in objective.weights_at(weights, {}, 0).items()} == {"lm": 1.0}


class TestRamp:
    @pytest.mark.parametrize("points", [((0.0, 1.5),), ((0.0, 0.5), (1.0, -0.1)), ((0.0, float("nan")),), ((0.5, 0.1), (0.2, 0.1)), 3])
    def test_values_out_of_bounds_and_nonsense(self, points):
        with pytest.raises(UserError, match=r"^config key kd\.weight: found"):
            Schedule.ramp(points, 10, "config key kd.weight", least=0.0, most=1.0)

    def test_times(self):
        curve = Schedule.ramp(((0.0, 1.0), (1.0, 3.0)), 10)
        np.testing.assert_allclose(curve.times(0.5)(jnp.asarray(5)), 0.5 * curve(jnp.asarray(5)))


class TestWhileOn:
    CURVE = Schedule.ramp(((0.0, 0.0), (1.0, 1.0)), 10)

    def test_zeros_until_it_opens(self):
        compute = lambda: {"value": jnp.arange(3.0) + 1, "count": jnp.asarray(2)}  # noqa: E731
        run = jax.jit(lambda scale: while_on(self.CURVE, scale, compute))
        np.testing.assert_array_equal(run(0.5)["value"], [1, 2, 3])
        closed = run(0.0)
        np.testing.assert_array_equal(closed["value"], 0)
        assert closed["count"] == 0

    def test_a_closed_term_sends_no_nan_back(self):
        term = lambda x, scale: scale * while_on(self.CURVE, scale, lambda: jnp.sqrt(x).sum())  # noqa: E731
        np.testing.assert_array_equal(jax.jit(jax.grad(term))(jnp.zeros(3), 0.0), 0)  # the root's own gradient is infinite there


class TestLoad:
    def test_by_dotted_path(self):
        assert load("tests.toy") is toy.make

    def test_a_module_without_make(self):
        with pytest.raises(UserError, match="'tests.jobs', which has no `make`"):
            load("tests.jobs")

    def test_no_such_module(self):
        with pytest.raises(UserError, match="'tests.nosuch'"):
            load("tests.nosuch")

    @pytest.mark.parametrize("name", ["", ".", "..", "a b", "tests..toy", ".toy"])
    def test_nonsense(self, name):
        with pytest.raises(UserError, match="recipe: "):
            load(name)

    def test_what_the_recipe_itself_lacks_surfaces(self, tmp_path, monkeypatch):
        package = tmp_path / "mine"
        package.mkdir()
        (package / "lacks.py").write_text("import nosuchpackage\n")
        (package / "short.py").write_text("import mi\n")
        (package / "typo.py").write_text("import jax\njax.nosuch\n")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ModuleNotFoundError, match="nosuchpackage"):
            load("mine.lacks")
        with pytest.raises(ModuleNotFoundError, match="'mi'"):
            load("mine.short")
        with pytest.raises(AttributeError, match="nosuch"):
            load("mine.typo")


class TestProbed:
    def test_it_is_zeros_while_nobody_looks_and_one_program_serves_both(self):
        program = jax.jit(lambda on, x: probed(on, lambda x: {"sum": (jnp.sum(x), jnp.ones(()))}, x))
        seen, unseen = (program(jnp.asarray(on), jnp.arange(3.0)) for on in (True, False))
        assert jax.tree.map(float, (seen, unseen)) == ({"sum": (3.0, 1.0)}, {"sum": (0.0, 0.0)})
        assert program._cache_size() == 1
        assert "cond" in str(jax.make_jaxpr(lambda x: probed(jnp.asarray(True), lambda x: {"sum": jnp.sum(x)}, x))(1.0))

    def test_where_nobody_ever_looks_nothing_is_traced(self):
        assert probed(False, lambda: pytest.fail("it was asked")) == {}

    def test_it_is_cut_off_from_the_gradient(self):
        def loss(x):
            return jnp.sum(x) + sum(probed(jnp.asarray(True), lambda x: {"square": jnp.sum(x * x)}, x).values())

        assert jax.grad(loss)(jnp.arange(3.0)).tolist() == [1.0, 1.0, 1.0]
