"""Divergences and cross-entropy against their definitions in float64, and against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.losses.classification import cross_entropy
from jaxdistill.losses.divergences import forward_kl

SHAPES = [(3, 7), (2, 5, 33), (1, 1, 1001)]


def logits(shape, seed=0, scale=3.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_forward_kl_is_its_definition(shape, temperature):
    t, s = logits(shape, 0), logits(shape, 1)
    p, q = (softmax(np.asarray(z, np.float64) / temperature) for z in (t, s))
    with jax.numpy_dtype_promotion("strict"):
        found = forward_kl(t, s, temperature=temperature)
    np.testing.assert_allclose(found, (p * np.log(p / q)).sum(-1), rtol=2e-6, atol=2e-6)


def test_forward_kl_equals_torch_with_its_gradient():
    torch = pytest.importorskip("torch")
    t, s = logits((6, 50), 0), logits((6, 50), 1)
    theirs = torch.tensor(np.asarray(s), requires_grad=True)
    loss = torch.nn.functional.kl_div(torch.log_softmax(theirs / 2, -1), torch.softmax(torch.tensor(np.asarray(t)) / 2, -1), reduction="batchmean")
    loss.backward()
    ours, grad = jax.value_and_grad(lambda s: forward_kl(t, s, temperature=2.0).mean())(s)
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-6)
    np.testing.assert_allclose(grad, theirs.grad.numpy(), rtol=1e-5, atol=1e-8)


def test_forward_kl_is_zero_iff_equal_and_not_symmetric():
    t, s = logits((4, 9), 0), logits((4, 9), 1)
    np.testing.assert_array_equal(forward_kl(t, t, temperature=2.0), np.zeros(4))
    assert np.all(np.asarray(forward_kl(t, s)) > 1e-2)
    assert np.abs(np.asarray(forward_kl(t, s)) - np.asarray(forward_kl(s, t))).max() > 1e-2


def test_the_gradient_keeps_its_size_times_t_squared():
    """Hinton et al.: without T^2 the gradient falls as 1 / T^2 (for logits that are small beside T)."""
    t, s = logits((4, 50), 0, scale=0.1), logits((4, 50), 1, scale=0.1)
    norm = [float(jnp.linalg.norm(T**2 * jax.grad(lambda s: forward_kl(t, s, temperature=T).sum())(s))) for T in (1.0, 8.0)]
    assert norm[1] == pytest.approx(norm[0], rel=0.1)


def test_tokens_outside_either_vocabulary_are_outside_both():
    t, s = logits((3, 12), 0), logits((3, 12), 1)
    padded_t, padded_s = t.at[:, 10:].set(-jnp.inf), s.at[:, 11:].set(-jnp.inf)
    np.testing.assert_allclose(forward_kl(padded_t, padded_s), forward_kl(t[:, :10], s[:, :10]), rtol=1e-6)
    gradient = jax.grad(lambda s: forward_kl(padded_t, s).sum())(padded_s)
    assert np.all(np.isfinite(gradient))
    assert np.all(np.asarray(gradient)[:, 10:] == 0)


@pytest.mark.parametrize("loss", [forward_kl, lambda t, s, where: cross_entropy(s, jnp.zeros(3, jnp.int32), where=where)])
def test_masked_tokens_give_nothing_whatever_they_hold(loss):
    t, s = logits((3, 8), 0), logits((3, 8), 1)
    where = jnp.asarray([True, False, True])
    bad = s.at[1].set(jnp.nan)
    value, gradient = jax.value_and_grad(lambda s: loss(t, s, where=where).sum())(bad)
    clean = jax.grad(lambda s: loss(t, s, where=where).sum())(s)
    assert np.isfinite(value)
    np.testing.assert_array_equal(gradient, clean)
    assert np.all(np.asarray(gradient)[1] == 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_torch_with_its_gradient(smoothing):
    torch = pytest.importorskip("torch")
    z, labels = logits((5, 40)), np.arange(5) * 7
    theirs = torch.tensor(np.asarray(z), requires_grad=True)
    loss = torch.nn.functional.cross_entropy(theirs, torch.tensor(labels), label_smoothing=smoothing)
    loss.backward()
    with jax.numpy_dtype_promotion("strict"):
        ours, grad = jax.value_and_grad(lambda z: cross_entropy(z, jnp.asarray(labels), smoothing=smoothing).mean())(z)
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-6)
    np.testing.assert_allclose(grad, theirs.grad.numpy(), rtol=1e-5, atol=1e-8)


def test_bfloat16_logits_are_summed_in_float32():
    t, s = (logits((4, 4096), seed).astype(jnp.bfloat16) for seed in (0, 1))
    found = forward_kl(t, s)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, forward_kl(t.astype(jnp.float32), s.astype(jnp.float32)), rtol=1e-6)
