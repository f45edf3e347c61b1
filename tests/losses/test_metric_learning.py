"""Batch-hard triplets against a loop over all pairs in float64, torch's gradient, masks and the collapsed model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.losses import metric_learning

batch_hard_triplet = jax.jit(metric_learning.batch_hard_triplet, static_argnames="margin")
hardest = jax.jit(metric_learning.hardest)


@functools.partial(jax.jit, static_argnames="margin")
def summed(features, labels, margin=0.3, where=None):
    """(value, gradient) of the sum over anchors."""
    return jax.value_and_grad(lambda f: batch_hard_triplet(f, labels, margin=margin, where=where)[0].sum())(features)


def batch(seed=0, size=14, width=9, identities=4):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(size, width)), jnp.float32), jnp.asarray(rng.integers(0, identities, size), jnp.int32)


def by_definition(features, labels, where, margin):
    features, labels, where = (np.asarray(x) for x in (features.astype(jnp.float32), labels, where))
    values, counts = np.zeros(len(labels)), np.zeros(len(labels), bool)
    for a in range(len(labels)):
        far, near = [], []
        for b in range(len(labels)):
            if a != b and where[a] and where[b]:
                distance = np.sqrt(np.sum((features[a].astype(np.float64) - features[b]) ** 2))
                (far if labels[a] == labels[b] else near).append(distance)
        if far and near:
            gap = max(far) - min(near)
            values[a], counts[a] = np.log1p(np.exp(gap)) if margin is None else max(0.0, gap + margin), True
    return values, counts


@pytest.mark.parametrize("margin", [0.3, 0.0, None])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_its_definition(seed, margin):
    features, labels = batch(seed, identities=3 + 3 * seed)  # the more identities, the more anchors without a positive
    where = jnp.asarray(np.random.default_rng(seed + 50).random(14) < 0.8)
    features = features.at[2].set(features[5])
    with jax.numpy_dtype_promotion("strict"):
        values, counts = batch_hard_triplet(features, labels, margin=margin, where=where)
    wanted, count = by_definition(features, labels, where, margin)
    np.testing.assert_array_equal(counts, count)
    np.testing.assert_allclose(values, wanted, rtol=1e-6, atol=1e-6)
    assert values.dtype == jnp.float32


def test_near_pairs_far_from_the_origin_keep_their_order():
    """Distances of 0.001 at a norm of 1,000, which |a|^2 + |b|^2 - 2ab in float32 cannot see."""
    place = jnp.asarray([0.0, 1.0, 3.0, 8.0, 4.0])[:, None] * 2**-10
    features = jnp.broadcast_to(1000.0 + place, (5, 4))
    found = hardest(features, jnp.asarray([0, 0, 0, 1, 1]))
    np.testing.assert_allclose(found.positive, 2 * np.array([3, 2, 3, 4, 4]) / 2**10)
    np.testing.assert_allclose(found.negative, 2 * np.array([4, 3, 1, 5, 1]) / 2**10)


@pytest.mark.parametrize("margin", [0.3, None])
def test_the_gradient_equals_torch(margin):
    torch = pytest.importorskip("torch")
    features, labels = batch(3)
    theirs = torch.tensor(np.asarray(features), requires_grad=True)
    same = torch.tensor(np.asarray(labels)[:, None] == np.asarray(labels)[None])
    distances = (theirs[:, None] - theirs[None]).square().sum(-1)
    distances = torch.where(torch.eye(14, dtype=torch.bool), torch.ones(()), distances).sqrt()
    far = torch.where(same & ~torch.eye(14, dtype=torch.bool), distances, -torch.inf).amax(1)
    near = torch.where(same, torch.inf, distances).amin(1)
    loss = (torch.nn.functional.softplus(far - near) if margin is None else torch.relu(far - near + margin)).sum()
    loss.backward()
    value, gradient = summed(features, labels, margin)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("margin", [0.3, None])
def test_a_collapsed_model_gives_the_margin_and_a_finite_gradient(margin):
    features, labels = jnp.ones((8, 5)), jnp.repeat(jnp.arange(4), 2)
    value, gradient = summed(features, labels, margin)
    assert float(value) / 8 == pytest.approx(np.log(2) if margin is None else margin, rel=1e-6)
    np.testing.assert_array_equal(gradient, 0)
    found = hardest(features, labels)
    assert (float(found.positive.sum()), float(found.negative.sum()), int(found.counts.sum())) == (0, 0, 8)


def test_the_same_image_twice_keeps_the_gradient_finite():
    features, labels = batch(2)
    features, labels = jnp.concatenate([features, features]), jnp.concatenate([labels, labels + 1])  # also across identities
    assert np.all(np.isfinite(summed(features, labels, None)[1]))
    pairs = jnp.tile(jnp.arange(14), 2)  # each anchor's only positive is its copy
    assert np.all(np.isfinite(summed(features, pairs, 0.3)[1]))


def test_masked_examples_give_nothing_whatever_they_hold():
    features, labels = batch(4)
    where = jnp.ones(14, bool).at[jnp.asarray([1, 9])].set(False)
    clean = summed(features, labels, where=where)
    dirty = summed(features.at[1].set(jnp.nan).at[9].set(jnp.inf), labels, where=where)
    assert np.any(clean[1])
    assert not np.any(dirty[1][jnp.asarray([1, 9])])
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    kept = np.flatnonzero(where)
    np.testing.assert_allclose(batch_hard_triplet(features, labels, where=where)[0][kept],
                               batch_hard_triplet(features[kept], labels[kept])[0], rtol=1e-6)
    for nothing in (jnp.zeros(14, bool), jnp.arange(14) == 3):
        values, counts = batch_hard_triplet(features, labels, where=nothing)
        assert not np.any(values)
        assert not np.any(counts)


def test_a_valid_example_that_is_not_finite_is_not_hidden():
    features, labels = batch(4)
    assert np.isnan(summed(features.at[1, 0].set(jnp.nan), labels)[0])


def test_anchors_without_a_positive_or_without_a_negative_do_not_count():
    features, _ = batch(5, size=5)
    for labels, wanted in (([0, 0, 1, 2, 2], [1, 1, 0, 1, 1]), ([7] * 5, [0] * 5), ([0, 1, 2, 3, 4], [0] * 5)):
        values, counts = batch_hard_triplet(features, jnp.asarray(labels), margin=5.0)
        np.testing.assert_array_equal(counts, wanted)
        np.testing.assert_array_equal(values > 0, wanted)


def test_it_does_not_depend_on_the_order_and_bfloat16_is_cast_first():
    features, labels = batch(6)
    order = np.random.default_rng(0).permutation(14)
    values, _ = batch_hard_triplet(features, labels)
    np.testing.assert_allclose(batch_hard_triplet(features[order], labels[order])[0], values[order], rtol=1e-6)
    half = features.astype(jnp.bfloat16)
    wanted, _ = by_definition(half, labels, np.ones(14, bool), 0.3)
    np.testing.assert_allclose(batch_hard_triplet(half, labels)[0], wanted, rtol=1e-6, atol=1e-6)
