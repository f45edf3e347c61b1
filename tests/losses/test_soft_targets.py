"""Losses of soft and hard targets against their definitions in float64, torch, and their limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.losses import classification
from jaxdistill.losses.classification import adjusted, class_weights, cross_entropy, sample_weights, smoothed, soft_cross_entropy, soft_kl

focal = jax.jit(classification.focal, static_argnames=("gamma", "smoothing"))


@functools.partial(jax.jit, static_argnames=("gamma", "smoothing"))
def slope(z, target, where=None, **options):
    return jax.value_and_grad(lambda z: classification.focal(z, target, where=where, **options).sum())(z)


def case(seed=0, size=6, classes=7, spread=3.0):
    rng = np.random.default_rng(seed)
    z = jnp.asarray(spread * rng.normal(size=(size, classes)), jnp.float32)
    soft = rng.dirichlet(np.full(classes, 0.3), size)
    soft[0, :3] = 0.0
    soft /= soft.sum(1, keepdims=True)
    labels, weights = rng.integers(0, classes, size), rng.uniform(0.2, 3, classes)
    return z, jnp.asarray(labels, jnp.int32), jnp.asarray(soft, jnp.float32), weights.astype(np.float32)


def by_definition(z, target, gamma, weights, smoothing):
    z = np.asarray(z, np.float64)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    target = np.eye(z.shape[1])[target] if target.ndim == 1 else np.asarray(target, np.float64)
    found = np.zeros(len(z))
    for i, k in np.ndindex(*z.shape):
        t = (1 - smoothing) * target[i, k] + smoothing / z.shape[1]
        found[i] -= weights[k] * t * (1 - p[i, k]) ** gamma * np.log(p[i, k])
    return found


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("gamma", "smoothing"), [(0, 0.0), (0, 0.2), (0.5, 0.0), (2.0, 0.0), (2.0, 0.2)])
def test_focal_is_its_definition(soft, gamma, smoothing):
    z, labels, distributions, weights = case()
    target = distributions if soft else labels
    with jax.numpy_dtype_promotion("strict"):
        found = focal(z, target, gamma=gamma, class_weights=weights, smoothing=smoothing)
    np.testing.assert_allclose(found, by_definition(z, np.asarray(target), gamma, weights, smoothing), rtol=2e-6, atol=1e-7)
    assert found.dtype == jnp.float32


@pytest.mark.parametrize("smoothing", [0.0, 0.15])
def test_gamma_zero_and_unit_weights_are_cross_entropy_exactly(smoothing):
    z, labels, soft, _ = case(1)
    plain = cross_entropy(z, labels, smoothing=smoothing)
    np.testing.assert_array_equal(classification.focal(z, labels, gamma=0.0, smoothing=smoothing), plain)
    np.testing.assert_allclose(focal(z, labels, gamma=0.0, class_weights=np.ones(7, np.float32), smoothing=smoothing), plain, rtol=1e-6)
    np.testing.assert_array_equal(classification.focal(z, soft, gamma=0, smoothing=smoothing),
                                  soft_cross_entropy(z, smoothed(soft, smoothing) if smoothing else soft))
    hard, corners = (focal(z, target, gamma=2.0, smoothing=smoothing) for target in (labels, jax.nn.one_hot(labels, 7)))
    np.testing.assert_allclose(corners, hard, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_gamma_zero_with_weights_is_torch_but_for_its_mean(soft, smoothing):
    torch = pytest.importorskip("torch")
    z, labels, distributions, weights = case(2)
    target = distributions if soft else labels
    their_z = torch.tensor(np.asarray(z), requires_grad=True)
    their_target = torch.tensor(np.asarray(target) if soft else np.asarray(labels, np.int64))
    options = dict(weight=torch.tensor(weights), label_smoothing=smoothing)
    theirs = functools.partial(torch.nn.functional.cross_entropy, their_z, their_target, **options)
    each = theirs(reduction="none")
    each.sum().backward()
    value, gradient = slope(z, target, gamma=0, class_weights=jnp.asarray(weights), smoothing=smoothing)
    np.testing.assert_allclose(focal(z, target, gamma=0, class_weights=weights, smoothing=smoothing), each.detach().numpy(), rtol=2e-6)
    np.testing.assert_allclose(gradient, their_z.grad.numpy(), rtol=1e-5, atol=1e-6)
    divisor = len(labels) if soft else weights[labels].sum()  # torch divides by the weights of labels, not of distributions
    np.testing.assert_allclose(theirs().item(), value / divisor, rtol=2e-6)


def test_smoothing_is_of_the_target_and_never_of_the_prediction():
    """Sure and right: (1 - p) is 0 for the label, so that only the smoothed share of the others costs. Taken from the smoothed target,
    the factor would be ((K - 1) a / K)^gamma, and a sure right answer would cost as much as an unsure one."""
    z, label = jnp.asarray([[30.0, 0.0, 0.0, 0.0]]), jnp.asarray([0], jnp.int32)
    np.testing.assert_allclose(focal(z, label, gamma=2.0, smoothing=0.2), 3 * 0.2 / 4 * 30, rtol=1e-6)
    np.testing.assert_allclose(focal(z, label, gamma=2.0), 0.0, atol=1e-30)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_gradient_equals_finite_differences_and_stays_finite_at_both_ends(gamma):
    z, labels, soft, weights = case(3, spread=1.0)
    for target in (labels, soft):
        _, gradient = slope(z, target, gamma=gamma, class_weights=jnp.asarray(weights), smoothing=0.1)
        for i, k in [(0, 0), (1, 3), (4, int(labels[4])), (5, 6)]:
            step = np.zeros(z.shape)
            step[i, k] = 1e-4
            ends = [by_definition(np.asarray(z, np.float64) + s * step, np.asarray(target), gamma, weights, 0.1).sum() for s in (1, -1)]
            assert float(gradient[i, k]) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-3, abs=1e-5)
    for far in (20.0, 100.0, 1000.0):  # p of the label rounds to 1, then of the other to 0
        z = jnp.asarray([[far, 0.0, 0.0], [0.0, far, 0.0]])
        value, gradient = slope(z, jnp.asarray([0, 0], jnp.int32), gamma=gamma)
        assert np.all(np.isfinite(gradient))
        assert float(gradient[1, 0]) == pytest.approx(-1.0, rel=1e-3)  # sure and wrong: all of cross-entropy's pull
        assert float(value) == pytest.approx(far, rel=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_a_sure_right_answer_keeps_its_digits(gamma):
    """At z = 20 the p of the label rounds to 1 in float32: loss and slope are still those of float64."""
    z = jnp.asarray([[20.0, 0.0, 1.0]])
    rest = (1 + np.e) * np.exp(-20.0)
    rest = rest / (1 + rest)
    value, gradient = slope(z, jnp.asarray([0], jnp.int32), gamma=gamma)
    np.testing.assert_allclose(value, rest**gamma * -np.log1p(-rest), rtol=1e-5)
    by_p = gamma * rest ** (gamma - 1) * np.log1p(-rest) - rest**gamma / (1 - rest)
    np.testing.assert_allclose(gradient[0, 0], by_p * (1 - rest) * rest, rtol=1e-5)


def test_equal_largest_logits_are_no_corner():
    z = jnp.zeros((1, 4))
    value, gradient = slope(z, jnp.asarray([2], jnp.int32), gamma=2.0)
    np.testing.assert_allclose(value, 0.75**2 * np.log(4), rtol=1e-6)
    wanted = (np.array([0, 0, 1, 0]) - 0.25) * (2 * 0.75 * 0.25 * np.log(0.25) - 0.75**2)
    np.testing.assert_allclose(gradient[0], wanted, rtol=1e-5)


def test_masked_examples_give_nothing_whatever_they_hold():
    z, labels, soft, _ = case(4)
    where = jnp.asarray([True, False, True, True, False, True])
    bad = z.at[1].set(jnp.nan).at[4].set(jnp.inf)
    for target, dirty in ((labels, labels), (soft, soft.at[1].set(jnp.nan))):
        for options in (dict(gamma=0), dict(gamma=2.0), dict(gamma=2.0, smoothing=0.1)):
            clean = slope(z, target, where=where, **options)
            found = slope(bad, dirty, where=where, **options)
            jax.tree.map(np.testing.assert_array_equal, clean, found)
            assert not np.any(found[1][jnp.asarray([1, 4])])
    for loss in (soft_cross_entropy, soft_kl):
        np.testing.assert_array_equal(loss(bad, soft, where=where), loss(z, soft, where=where))
        assert np.isnan(loss(bad, soft)[1])  # what counts and is not finite is not hidden


def test_soft_losses_are_their_definitions_and_a_class_of_target_zero_is_free():
    z, _, soft, _ = case(5)
    p, t = np.asarray(jax.nn.softmax(z), np.float64), np.asarray(soft, np.float64)
    entropy = -np.sum(np.where(t > 0, t * np.log(np.where(t > 0, t, 1)), 0), 1)
    np.testing.assert_allclose(soft_cross_entropy(z, soft), -np.sum(t * np.log(p), 1), rtol=1e-5)
    np.testing.assert_allclose(soft_kl(z, soft), -np.sum(t * np.log(p), 1) - entropy, rtol=1e-4, atol=1e-6)
    same = soft.at[0, :3].set(1e-8)
    np.testing.assert_allclose(soft_kl(jnp.log(same), same), 0.0, atol=1e-6)
    closed = z.at[0, 1].set(-jnp.inf)  # target 0 there
    value, gradient = jax.value_and_grad(lambda z: soft_cross_entropy(z, soft).sum())(closed)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    assert np.isinf(soft_cross_entropy(z.at[3, 1].set(-jnp.inf), soft)[3])


def test_weights_of_examples_leave_the_optimum_and_those_of_classes_move_it():
    t, w = jnp.asarray([[0.5, 0.3, 0.2]]), np.asarray([1.0, 2.0, 4.0], np.float32)
    optimum = jnp.log(t)
    by_class = jax.grad(lambda z: classification.focal(z, t, gamma=0, class_weights=w).sum())
    by_example = jax.grad(lambda z: (sample_weights(t, w) * soft_cross_entropy(z, t)).sum())
    np.testing.assert_allclose(by_example(optimum), 0.0, atol=1e-6)
    assert np.max(np.abs(by_class(optimum))) > 0.1
    np.testing.assert_allclose(by_class(jnp.log(w[None] * t)), 0.0, atol=1e-6)
    np.testing.assert_allclose(sample_weights(t, w), [0.5 + 0.6 + 0.8], rtol=1e-6)
    np.testing.assert_allclose(sample_weights(jnp.eye(3), w), w)


def test_class_weights():
    counts = np.array([1, 10, 500, 10_000])
    for kind in ("none", "inverse", "effective"):
        weights = class_weights(counts, kind)
        assert weights.dtype == np.float32
        assert counts @ weights == pytest.approx(counts.sum(), rel=1e-6)  # the mean over training examples is 1
        assert np.all(np.diff(weights) <= 0)
    inverse = class_weights(counts, "inverse")
    np.testing.assert_allclose(inverse * counts, inverse[0], rtol=1e-6)
    by_formula, found = np.array([(1 - 0.99) / (1 - 0.99 ** float(n)) for n in counts]), class_weights(counts, "effective", 0.99)
    np.testing.assert_allclose(found / found[3], by_formula / by_formula[3], rtol=1e-5)
    np.testing.assert_allclose(class_weights(counts, "effective", 0.0), 1.0)
    np.testing.assert_allclose(class_weights(counts, "effective", 1 - 1e-12), inverse, rtol=1e-4)  # each example is new
    np.testing.assert_allclose(class_weights(counts / 7, "inverse"), inverse, rtol=1e-6)  # of distributions: parts of examples
    for bad, said in ((dict(kind="sqrt"), "kind: found 'sqrt'"), (dict(kind="effective", beta=1.0), "beta: found 1.0"),
                      (dict(kind="inverse", counts=np.array([3, 0])), "found 0 of class 1")):
        with pytest.raises(ValueError, match=said):
            class_weights(**{"counts": counts, **bad})


def test_adjusted_logits_train_for_the_balanced_classifier():
    """Trained through them, z is the likelihood ratio: adding tau log prior gives back the posterior, and z alone is without prior."""
    prior, likelihood = np.array([0.9, 0.09, 0.01], np.float32), jnp.asarray([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
    posterior = jax.nn.softmax(adjusted(jnp.log(likelihood), prior))
    wanted = np.asarray(likelihood) * prior
    np.testing.assert_allclose(posterior, wanted / wanted.sum(1, keepdims=True), rtol=1e-5)
    z = jnp.asarray([[1.0, 2.0, 3.0]], jnp.bfloat16)
    np.testing.assert_array_equal(adjusted(z, prior, 0), z.astype(jnp.float32))
    np.testing.assert_allclose(adjusted(z, prior, 2)[0] - adjusted(z, prior)[0], np.log(prior), rtol=1e-5)


def test_gamma_below_zero_is_an_error():
    z, labels, _, _ = case()
    with pytest.raises(ValueError, match="gamma: found -1"):
        classification.focal(z, labels, gamma=-1)
