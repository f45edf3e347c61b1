"""Uncertainty weights: values against torch.clamp, where they settle, and which way they go outside their bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.losses.weighting import factor, prior

LOSSES = np.array([0.05, 0.3, 1.0, 4.0, 60.0], np.float32)


def total(w, losses, bounds=None):
    return jnp.sum(factor(w, bounds) * losses) + prior({"a": w[:2], "b": w[2:]}, bounds)


@pytest.mark.parametrize("bounds", [None, (-2.0, 2.0), (-0.5, 0.1)])
def test_the_total_is_its_definition_with_clamped_weights(bounds):
    torch = pytest.importorskip("torch")
    w = np.linspace(-3, 3, 5, dtype=np.float32)
    clamped = torch.tensor(w, dtype=torch.float64) if bounds is None else torch.clamp(torch.tensor(w, dtype=torch.float64), *bounds)
    wanted = 0.5 * (torch.exp(-clamped) * torch.tensor(LOSSES) + clamped).sum()
    with jax.numpy_dtype_promotion("strict"):
        found = jax.jit(total, static_argnums=2)(jnp.asarray(w), jnp.asarray(LOSSES), bounds)
    np.testing.assert_allclose(found, wanted.item(), rtol=1e-6)


@pytest.mark.parametrize("bounds", [(-2.0, 2.0), (-0.5, 0.1)])
def test_within_its_bounds_the_gradient_is_that_without(bounds):
    w = jnp.asarray(np.linspace(*bounds, 5), jnp.float32)  # the bounds themselves included
    gradient = jax.jit(jax.grad(total), static_argnums=2)
    np.testing.assert_allclose(gradient(w, LOSSES, bounds), gradient(w, LOSSES, None), rtol=1e-6)


@pytest.mark.parametrize("bounds", [None, (-5.0, 5.0), (-2.0, 2.0)])
def test_weights_settle_at_the_log_of_a_fixed_loss(bounds):
    def step(w, _):
        return w - 0.2 * jax.grad(total)(w, LOSSES, bounds), None

    w = jax.jit(lambda: jax.lax.scan(step, jnp.zeros(5), None, 600)[0])()
    wanted = np.log(LOSSES) if bounds is None else np.clip(np.log(LOSSES), *bounds)
    free = np.isclose(wanted, np.log(LOSSES))
    np.testing.assert_allclose(w[free], wanted[free], atol=1e-4)
    at = wanted[~free]  # a bound: w stays within one step of it, to either side
    assert np.all(np.abs(w[~free] - at) <= 0.2 * np.maximum(0.5, 0.5 * np.abs(1 - LOSSES[~free] * np.exp(-at))))
    if bounds is None:
        np.testing.assert_allclose(total(w, LOSSES), 0.5 * np.sum(1 + np.log(LOSSES)), rtol=1e-5)
        assert total(w, 0.01 * LOSSES) < total(w, LOSSES)


def test_the_total_may_be_negative():
    small = np.full(2, 0.01, np.float32)
    assert float(total(jnp.asarray(np.log(small)), small)) == pytest.approx(1 + np.log(0.01), rel=1e-5)


def test_outside_its_bounds_a_weight_comes_back_whatever_its_loss():
    """A plain clip has no gradient there and never returns; passing the gradient straight through runs on without end."""
    bounds, w = (-1.0, 1.0), jnp.asarray([-1.5, -1.5, 1.5, 1.5])
    for losses in (np.array([0.01, 9.0, 0.01, 9.0], np.float32), np.full(4, 1e-4, np.float32)):
        gradient = np.asarray(jax.jit(jax.grad(total), static_argnums=2)(w, losses, bounds))
        assert np.all(np.sign(gradient) == [-1, -1, 1, 1])
    adam = optax.adam(0.05, b2=0.9)

    def step(carry, loss):
        w, state = carry
        updates, state = adam.update(jax.grad(total)(w, loss, bounds), state)
        return (w + updates, state), w

    losses = np.repeat(np.array([[200.0], [1.5]], np.float32), 400, axis=0)  # far above e^1, then within
    start = jnp.zeros(1)
    (w, _), path = jax.jit(lambda losses: jax.lax.scan(step, (start, adam.init(start)), losses))(losses)
    assert 0.9 < float(path[399, 0]) < 1.2
    np.testing.assert_allclose(w, np.log(1.5), atol=0.02)
