"""Reservoirs against a re-derivation in float64, and what must hold of any: radius, echo state, padding, direction, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from jaxdistill import UserError
from jaxdistill.models import reservoir
from jaxdistill.models.reservoir import Reservoir, ReservoirConfig, draw, memory_curve, radius

SMALL = ReservoirConfig(units=12, density=0.4, bias=0.3, leak=(0.3, 0.8))
LENGTHS = np.array([9, 4, 1, 9])


def sequences(seed: int = 0, batch: int = 4, time: int = 9, inputs: int = 3):
    return np.random.default_rng(seed).normal(size=(batch, time, inputs)).astype(np.float32)


def by_hand(matrices, leaks, x, lengths):
    """[2, batch, time, units]: one sequence, one direction, one frame after another, in float64."""
    matrices = {name: value.astype(np.float64) for name, value in matrices.items()}
    out = np.zeros((2, *x.shape[:2], matrices["w"].shape[-1]))
    for direction, leak in enumerate(leaks):
        w_in, w, bias = (matrices[name][direction] for name in ("w_in", "w", "bias"))
        for i, length in enumerate(lengths):
            state = np.zeros(len(w))
            frames = range(length) if direction == 0 else range(length - 1, -1, -1)
            for t in frames:
                state = (1 - leak) * state + leak * np.tanh(x[i, t].astype(np.float64) @ w_in + state @ w + bias)
                out[direction, i, t] = state
    return out


def applied(config, x, lengths, *, seed=0, change=lambda variables: variables, dtype=jnp.float32):
    """(states, variables)"""
    module, given = Reservoir(config, seed, dtype), (jnp.asarray(x), jnp.asarray(lengths, jnp.int32))
    variables = change(module.init(jax.random.key(0), *given))
    return np.asarray(jax.jit(module.apply)(variables, *given)), variables


def test_it_is_the_recurrence_in_both_directions():
    x = sequences()
    found, variables = applied(SMALL, x, LENGTHS)
    wanted = by_hand(draw(SMALL, 3, 0), SMALL.leak, x, LENGTHS)
    np.testing.assert_allclose(found, np.concatenate(wanted, axis=-1), atol=1e-5)
    assert set(variables) == {"constants"}  # nothing trains


def test_fusions():
    x, width = sequences(), SMALL.units
    forward, backward = by_hand(draw(SMALL, 3, 0), SMALL.leak, x, LENGTHS)
    rng = np.random.default_rng(1)

    def with_params(variables):
        return variables | {"params": {name: jnp.asarray(rng.normal(size=value.shape), jnp.float32)
                                       for name, value in variables["params"].items()}}

    found, variables = applied(ReservoirConfig(**vars(SMALL) | {"fusion": "convex"}), x, LENGTHS, change=with_params)
    share = 1 / (1 + np.exp(-np.asarray(variables["params"]["share"], np.float64)))
    assert share.shape == (width,)
    np.testing.assert_allclose(found, share * forward + (1 - share) * backward, atol=1e-5)

    found, variables = applied(ReservoirConfig(**vars(SMALL) | {"fusion": "attention"}), x, LENGTHS, change=with_params)
    scores = np.asarray(variables["params"]["scores"], np.float64)
    odds = np.exp(forward @ scores[0] - backward @ scores[1])[..., None]
    np.testing.assert_allclose(found, (odds * forward + backward) / (1 + odds), atol=1e-5)


@pytest.mark.parametrize(("units", "density"), [(20, 0.5), (120, 0.05), (80, 1.0)])
def test_the_radius_is_exact(units, density):
    """By all eigenvalues, of the float32 matrices that are used."""
    for wanted in (0.5, 1.3):
        config = ReservoirConfig(units=units, density=density, radius=wanted)
        for w in draw(config, 2, 3)["w"]:
            assert np.abs(np.linalg.eigvals(w.astype(np.float64))).max() == pytest.approx(wanted, rel=1e-5)
            assert np.mean(w != 0) == pytest.approx(density, abs=4 * np.sqrt(density * (1 - density)) / units)
            assert (w > 0).sum() == pytest.approx((w < 0).sum(), rel=0.4)  # signed


def test_power_iteration_would_be_off():
    """Why ARPACK: the norm's growth over 100 products of a real start vector is not the radius where the largest are a complex pair."""
    errors = []
    for seed in range(6):
        w = draw(ReservoirConfig(units=100, density=0.1), 1, seed)["w"][0].astype(np.float64)
        v = np.ones(100)
        for _ in range(100):
            grown = w @ v
            size, v = np.linalg.norm(grown) / np.linalg.norm(v), grown / np.linalg.norm(grown)
        errors.append(abs(size / 0.95 - 1))
        assert radius(w) == pytest.approx(0.95, rel=1e-5)
    assert max(errors) > 0.01


def test_the_radius_is_of_the_largest_also_where_it_is_one_of_many():
    """A rotation: all eigenvalues on one circle, the case that converges worst; and no eigenvalue but 0."""
    ring = np.roll(np.eye(100), 1, axis=1) * 0.7
    assert radius(ring) == pytest.approx(0.7)
    assert radius(scipy.sparse.csr_array(ring)) == pytest.approx(0.7)
    with pytest.raises(UserError, match="config key reservoir.density: found 0.001 with 10 units, of which W is nilpotent; accepted: more"):
        draw(ReservoirConfig(units=10, density=0.001), 1, 0)


def test_the_draw_is_of_the_seed_alone():
    a, b, c = (draw.__wrapped__(SMALL, 3, seed) for seed in (0, 0, 1))
    for name, value in a.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, b[name])
        assert not np.array_equal(value, c[name])
        assert not np.array_equal(value[0], value[1])  # directions have matrices of their own
    assert np.abs(a["w_in"]).max() <= 0.5
    assert np.abs(a["bias"]).max() <= 0.3


def test_the_state_forgets_how_it_began():
    """Echo state: from two initial states, with the same input, the same states in the end; not so with a radius of 3 and small input."""
    x = jnp.asarray(0.1 * sequences(time=300))
    where = jnp.ones((4, 300), bool)
    starts = jnp.asarray(np.random.default_rng(5).uniform(-1, 1, (2, 2, 4, 12)), jnp.float32)
    gaps = {}
    for size in (0.95, 3.0):
        config = ReservoirConfig(units=12, density=0.4, radius=size, bias=0.0)
        matrices = {name: jnp.asarray(value) for name, value in draw(config, 3, 0).items()}
        a, b = (reservoir.run(matrices, jnp.asarray([0.3, 0.8]), x, where, start) for start in starts)
        ends = jnp.stack([(a - b)[0, :, -1], (a - b)[1, :, 0]])
        assert jnp.abs((a - b)[0, :, 0]).max() > 0.1
        gaps[size] = float(jnp.abs(ends).max())
    assert gaps[0.95] < 1e-5
    assert gaps[3.0] > 0.01


def test_padding_changes_nothing():
    """More of it, and anything in it, NaN too; states are 0 there."""
    x = sequences()
    found, _ = applied(SMALL, x, LENGTHS)
    more = np.concatenate([x, np.full((4, 5, 3), np.nan, np.float32)], axis=1)
    for i, length in enumerate(LENGTHS):
        more[i, length:] = np.nan
    again, _ = applied(SMALL, more, LENGTHS)
    np.testing.assert_allclose(again[:, :9], found, atol=1e-6)
    assert np.all(again[:, 9:] == 0)
    for i, length in enumerate(LENGTHS):
        assert np.all(found[i, length:] == 0)
        assert np.all(found[i, :length] != 0)


def test_one_alone_is_as_in_a_batch():
    x = sequences()
    found, _ = applied(SMALL, x, LENGTHS)
    for i in range(4):
        alone, _ = applied(SMALL, x[i : i + 1], LENGTHS[i : i + 1])
        np.testing.assert_allclose(alone[0], found[i], atol=1e-6)


def test_backward_is_forward_of_the_sequence_reversed():
    """With the matrices and the leak of the backward direction as the forward one's."""
    x, matrices = sequences(), draw(SMALL, 3, 0)
    turned = x.copy()
    for i, length in enumerate(LENGTHS):
        turned[i, :length] = x[i, :length][::-1]
    swapped = ReservoirConfig(**vars(SMALL) | {"leak": SMALL.leak[::-1]})
    swap = lambda variables: {"constants": {name: jnp.flip(value, axis=0) for name, value in variables["constants"].items()}}  # noqa: E731
    found, _ = applied(SMALL, x, LENGTHS)
    other, _ = applied(swapped, turned, LENGTHS, change=swap)
    assert matrices["w"].shape == (2, 12, 12)
    for i, length in enumerate(LENGTHS):
        np.testing.assert_allclose(other[i, :length][::-1, :12], found[i, :length, 12:], atol=1e-6)
        np.testing.assert_allclose(other[i, :length][::-1, 12:], found[i, :length, :12], atol=1e-6)


def test_trained_it_begins_as_fixed_and_connections_that_are_not_there_stay_so():
    x, config = sequences(), ReservoirConfig(**vars(SMALL) | {"trained": True})
    fixed, _ = applied(SMALL, x, LENGTHS)
    found, variables = applied(config, x, LENGTHS)
    np.testing.assert_allclose(found, fixed, atol=1e-6)
    params, given = variables["params"], (jnp.asarray(x), jnp.asarray(LENGTHS, jnp.int32))
    f = lambda p: Reservoir(config).apply({**variables, "params": p}, *given)  # noqa: E731
    grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(f(p)))))(params)
    assert set(grads) == {"w_in", "w", "bias", "leak"}
    for name in ("w_in", "bias", "leak"):
        assert np.all(np.asarray(grads[name]) != 0), name
    wired = np.asarray(variables["constants"]["wired"])
    assert np.all((np.asarray(grads["w"]) != 0) == wired)
    filled = params | {"w": params["w"] + jnp.where(wired, 0.0, 9.0)}
    np.testing.assert_array_equal(jax.jit(f)(filled), jax.jit(f)(params))


def test_memory_curve():
    """A nearly linear reservoir (tiny input) recalls almost everything up to some delay, in all less than it has units, and nothing of
    long ago; with a radius of 0.3 it forgets soon."""
    long = draw(ReservoirConfig(units=40, density=0.5, radius=0.95, input_scale=0.01, bias=0.0), 1, 0)
    short = draw(ReservoirConfig(units=40, density=0.5, radius=0.3, input_scale=0.01, bias=0.0), 1, 0)
    curves = [memory_curve(matrices, 1.0, 60, steps=600) for matrices in (long, short)]
    assert all(curve.shape == (60,) and np.all((curve >= 0) & (curve <= 1)) for curve in curves)
    assert np.all(curves[0][:8] > 0.95)
    assert curves[0].sum() > 12
    assert curves[0].sum() < 40
    assert curves[1].sum() < curves[0].sum() / 2
    assert curves[0][50:].mean() < 0.1
    np.testing.assert_array_equal(curves[0], memory_curve(long, 1.0, 60, steps=600))


@pytest.mark.parametrize(("change", "said"), [
    ({"units": 1}, "units: found 1; accepted: 2 or more"),
    ({"density": 0.0}, "density: found 0.0; accepted: a share, above 0 and at most 1"),
    ({"radius": -1.0}, "radius: found -1.0; accepted: 0 or more"),
    ({"leak": (0.3,)}, "leak: found (0.3,); accepted: (forward, backward), each above 0 and at most 1"),
    ({"leak": (0.0, 0.3)}, "leak: found (0.0, 0.3); accepted: (forward, backward), each above 0 and at most 1"),
    ({"leak": (1.0, 0.3), "trained": True},
     "leak: found (1.0, 0.3); accepted: (forward, backward), each above 0 and below 1 with reservoir.trained"),
    ({"fusion": "sum"}, "fusion: found 'sum'; accepted: concat, convex, attention"),
])  # fmt: skip
def test_a_config_that_is_refused(change, said):
    with pytest.raises(UserError) as stop:
        ReservoirConfig(**change)
    assert str(stop.value) == f"config key reservoir.{said}"
