"""Cross-entropy against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.losses.classification import cross_entropy


def logits(shape, seed=0):
    return jnp.asarray(3.0 * np.random.default_rng(seed).normal(size=shape), jnp.float32)


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


def test_masked_examples_give_nothing_whatever_they_hold():
    z, labels, where = logits((3, 8)), jnp.zeros(3, jnp.int32), jnp.asarray([True, False, True])
    loss = lambda z: cross_entropy(z, labels, where=where).sum()  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(z.at[1].set(jnp.nan))
    np.testing.assert_array_equal(value, loss(z))
    np.testing.assert_array_equal(gradient, jax.grad(loss)(z))
    assert np.all(np.asarray(gradient)[1] == 0)
