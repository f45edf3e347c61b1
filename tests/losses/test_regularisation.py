"""Penalties on confidence: definitions in float64, gradients, limits, masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxdistill.losses import regularisation as reg

PENALTIES = {
    "entropy": reg.entropy,
    "linear": lambda z, **where: reg.entropy_floor(z, 1.5, **where),
    "quadratic": lambda z, **where: reg.entropy_floor(z, 1.5, kind="quadratic", **where),
    "confidence": reg.confidence_penalty,
    "max": reg.max_suppression,
    "margin": lambda z, **where: reg.margin_smoothing(z, 1.0, **where),
}


def logits(seed=0, size=9, classes=8):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(size, classes)) * np.geomspace(0.2, 6, size)[:, None], jnp.float32)  # unsure to sure


def by_definition(z):
    z = np.asarray(z, np.float64)
    found = {name: np.zeros(len(z)) for name in PENALTIES}
    for i, row in enumerate(z):
        p = np.exp(row - row.max())
        p /= p.sum()
        h = -sum(q * np.log(q) for q in p if q > 0)
        found["entropy"][i], found["confidence"][i] = h, np.log(len(p)) - h
        found["linear"][i], found["quadratic"][i] = max(0, 1.5 - h), max(0, 1.5 - h) ** 2
        found["max"][i] = row.max() - row.mean()
        found["margin"][i] = sum(max(0, row.max() - value - 1.0) for value in row)
    return found


@pytest.mark.parametrize("name", PENALTIES)
def test_definition_gradient_and_mask(name):
    z, penalty = logits(), PENALTIES[name]
    with jax.numpy_dtype_promotion("strict"):
        found = penalty(z)
    np.testing.assert_allclose(found, by_definition(z)[name], rtol=1e-5, atol=1e-6)
    assert found.dtype == jnp.float32
    half = z.astype(jnp.bfloat16)
    np.testing.assert_allclose(penalty(half), by_definition(half.astype(jnp.float32))[name], rtol=1e-5, atol=1e-6)
    slope = jax.jit(jax.value_and_grad(lambda z, where: penalty(z, where=where).sum()))
    where = jnp.ones(9, bool).at[4].set(False)
    value, gradient = slope(z, where)
    dirty = slope(z.at[4].set(jnp.nan), where)
    np.testing.assert_array_equal(dirty[0], value)
    np.testing.assert_array_equal(dirty[1], gradient)
    assert not np.any(gradient[4])
    kept = np.delete(np.arange(9), 4)
    wide = np.asarray(z, np.float64)
    for i, k in ((0, 1), (5, 0), (8, 7), (8, int(np.argmax(z[8])))):
        step = np.zeros(z.shape)
        step[i, k] = 1e-5
        ends = [by_definition(wide + s * step)[name][kept].sum() for s in (1, -1)]
        assert float(gradient[i, k]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-5)


def test_ends_of_the_entropy():
    even, sure, closed = jnp.zeros((1, 8)), jnp.zeros((1, 8)).at[0, 2].set(500.0), jnp.zeros((1, 8)).at[0, 2:].set(-jnp.inf)
    np.testing.assert_allclose(reg.entropy(even), np.log(8), rtol=1e-6)  # 2.079: what "uniform over 8" reads
    np.testing.assert_allclose(reg.entropy(closed), np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(reg.entropy(sure), 0.0)
    np.testing.assert_allclose(reg.confidence_penalty(even), 0.0, atol=1e-6)
    slope = jax.jit(jax.grad(lambda z: reg.entropy(z).sum()))
    assert np.all(np.isfinite(slope(closed)))
    for kind in reg.KINDS:  # the softmax has saturated: nothing pulls it back, however large the weight
        gradient = jax.grad(lambda z, kind=kind: 1e3 * reg.entropy_floor(z, 1.5, kind=kind).sum())(sure)
        np.testing.assert_array_equal(gradient, 0.0)
    assert np.abs(jax.grad(lambda z: reg.max_suppression(z).sum())(sure)).max() > 0.5  # these still do
    assert np.abs(jax.grad(lambda z: reg.margin_smoothing(z, 1.0).sum())(sure)).max() > 0.5


def test_the_square_is_weaker_below_one_nat_and_its_pull_below_half_a_nat():
    z = logits(3, size=60)
    missing = 1.5 - np.asarray(reg.entropy(z))
    linear, square = (np.asarray(reg.entropy_floor(z, 1.5, kind=kind)) for kind in ("linear", "quadratic"))
    pull = {kind: np.abs(jax.grad(lambda z, kind=kind: reg.entropy_floor(z, 1.5, kind=kind).sum())(z)).sum(1) for kind in reg.KINDS}
    below = missing > 0
    assert {True, False} == set(missing[below] < 0.5)
    np.testing.assert_array_equal((square < linear)[below], (missing < 1)[below])
    np.testing.assert_array_equal((pull["quadratic"] < pull["linear"])[below], (missing < 0.5)[below])
    with pytest.raises(ValueError, match="kind: found 'cubic'"):
        reg.entropy_floor(z, 1.5, kind="cubic")


def test_ties_share_the_pull():
    z = jnp.asarray([[2.0, 2.0, 0.0, 0.0]])
    np.testing.assert_allclose(jax.grad(lambda z: reg.max_suppression(z).sum())(z), [[0.25, 0.25, -0.25, -0.25]])
    np.testing.assert_allclose(reg.margin_smoothing(z, 0), 4.0)
    np.testing.assert_array_equal(reg.margin_smoothing(z, 2), 0.0)


def test_logit_norm():
    z = logits(1)
    found = np.asarray(reg.logit_norm(z, 0.25))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 4.0, rtol=1e-5)
    np.testing.assert_allclose(found, reg.logit_norm(100 * z, 0.25), rtol=1e-5)
    wide = np.asarray(z, np.float64)
    np.testing.assert_allclose(found, wide / np.linalg.norm(wide, axis=1, keepdims=True) / 0.25, rtol=1e-5)
    gradient = jax.grad(lambda z: jnp.sum(reg.logit_norm(z, 0.25)[:, 0]))(z)
    np.testing.assert_allclose(np.sum(np.asarray(gradient) * wide, 1), 0.0, atol=1e-5)  # length is free: no pull along z
    zero = jax.grad(lambda z: jnp.sum(reg.logit_norm(z, 0.25, epsilon=1e-3)[:, 0]))(jnp.zeros((2, 8)))
    np.testing.assert_allclose(zero, np.eye(8)[[0, 0]] / 0.25 / 1e-3, rtol=1e-5)


@pytest.mark.parametrize(("length", "classes"), [(1.0, 8), (4.0, 3), (25.0, 8), (0.0, 5)])
def test_the_largest_probability_is_what_a_search_finds(length, classes):
    def minus(z):
        z = length * z / max(np.linalg.norm(z), 1e-12)
        return -np.exp(z[0]) / np.exp(z).sum()

    starts = np.random.default_rng(0).normal(size=(5, classes))
    best = -min(scipy.optimize.minimize(minus, z, tol=1e-12).fun for z in starts)
    assert reg.largest_probability(length, classes) == pytest.approx(best, rel=1e-5)
