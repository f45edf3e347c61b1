"""Which weight reaches which gradient, read off the program."""

import jax
import jax.numpy as jnp

from jaxdistill.diagnosis.reach import reach

PARAMS = {"a": jnp.ones(3), "b": jnp.ones(3), "c": jnp.ones(3)}
WEIGHTS = {"x": 1.0, "y": 1.0}
X, Y, BOTH, NONE = frozenset("x"), frozenset("y"), frozenset("xy"), frozenset()


def found(loss, **params) -> list[frozenset]:
    """Of a, b, c: the weights that their gradients depend on."""
    return reach(lambda weights, params: jax.grad(lambda p: loss(weights, p))(params), WEIGHTS, PARAMS | params)


def test_products():
    assert found(lambda w, p: w["x"] * jnp.sum(p["a"] * p["b"]) + w["y"] * jnp.sum(p["b"] ** 2)) == [X, BOTH, NONE]


def test_stop_gradient():
    assert found(lambda w, p: w["x"] * jnp.sum(p["a"] * jax.lax.stop_gradient(p["b"])) + w["y"] * p["c"][0]) == [X, NONE, Y]


def test_what_is_zero_in_numbers_is_reached_in_the_program():
    assert found(lambda w, p: w["x"] * jnp.sum(0.0 * p["a"]) + w["y"] * jnp.sum(jax.nn.relu(p["b"] - 9))) == [X, Y, NONE]


def test_jit():
    inner = jax.jit(lambda w, a, b: (w["x"] * jnp.sum(a), w["y"] * jnp.sum(b)))
    assert found(lambda w, p: sum(inner(w, p["a"], p["b"]))) == [X, Y, NONE]


def test_remat():
    inner = jax.checkpoint(lambda w, a, b: w["x"] * jnp.sum(jnp.sin(a)) + w["y"] * jnp.sum(jnp.sin(b)))
    assert found(lambda w, p: inner(w, p["a"], p["b"])) == [X, Y, NONE]


def test_scan():
    def loss(w, p):
        def body(carry, row):
            return carry + w["x"] * jnp.sum(row * p["a"]), w["y"] * jnp.sum(jnp.sin(row * p["b"]))

        total, rows = jax.lax.scan(body, 0.0, jnp.ones((4, 3)))
        return total + rows.sum()

    assert found(loss) == [X, Y, NONE]


def test_scan_whose_carry_feeds_the_next_round():
    def loss(w, p):
        def body(carry, _):
            a, b = carry
            return (p["c"] * b, w["x"] * a), None  # x comes into a only by way of b, one round later

        (a, _), _ = jax.lax.scan(body, (p["a"], p["b"]), None, length=3)
        return w["y"] * jnp.sum(a)

    assert found(loss) == [BOTH, BOTH, BOTH]


def test_cond():
    def loss(w, p):
        kd = jax.lax.cond(w["x"] > 0, lambda: jnp.sum(p["a"] ** 2), lambda: 0.0)
        return w["x"] * kd + w["y"] * jnp.sum(p["b"])

    assert found(loss) == [X, Y, NONE]


def test_cond_around_what_is_stopped():
    """Both branches hand back a zero for b; that is no reach."""

    def loss(w, p):
        inside = lambda a, b: jnp.sum(a * jax.lax.stop_gradient(b))  # noqa: E731
        return w["x"] * jax.lax.cond(w["x"] > 0, inside, lambda a, b: 0.0, p["a"], p["b"]) + w["y"] * jnp.sum(p["c"])

    assert found(loss) == [X, NONE, Y]


def test_while_is_taken_for_all_it_reads():
    def gradients(weights, params):
        _, a = jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * weights["x"]), (0, params["a"]))
        return {"a": a, "b": params["b"] * weights["y"], "c": params["c"]}

    assert reach(gradients, WEIGHTS, PARAMS) == [X, Y, NONE]


def test_custom_vjp():
    @jax.custom_vjp
    def double(a, b):
        return jnp.sum(a * b)

    double.defvjp(lambda a, b: (jnp.sum(a * b), (a, b)), lambda saved, pull: (pull * saved[1], jnp.zeros_like(saved[0])))
    assert found(lambda w, p: w["x"] * double(p["a"], p["b"]) + w["y"] * jnp.sum(p["c"])) == [X, NONE, Y]


def test_shapes_are_enough():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.float32), (WEIGHTS, PARAMS))
    assert reach(lambda w, p: {"a": w["x"] * p["a"]}, *shapes) == [X]
