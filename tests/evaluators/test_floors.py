"""Floors against plain loops and cases whose answer is known."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.evaluators import floors


def blobs(rows: int, width: int, classes: int, apart: float, seed: int = 0):
    rng = np.random.default_rng(seed)
    middles = rng.normal(size=(classes, width))
    y = rng.integers(0, classes, rows)
    return (apart * middles[y] + rng.normal(size=(rows, width))).astype(np.float32), y


def test_constant_is_the_commonest_then_the_smallest():
    x = np.zeros((6, 2), np.float32)
    assert floors.constant(x, np.array([3, 1, 1, 3, 3, 0]))(x[:2]).tolist() == [3, 3]
    assert floors.constant(x, np.array([5, 2, 2, 5, 7, 0]))(x[:1]).tolist() == [2]
    assert floors.constant(x, np.arange(6))(x[:0]).tolist() == []


@pytest.mark.parametrize("metric", floors.METRICS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 12), width=st.integers(1, 5))
def test_nearest_is_the_plain_loop(metric, seed, rows, width):
    rng = np.random.default_rng(seed)
    train, test = (rng.integers(-3, 4, (n, width)).astype(np.float32) for n in (rows, 7))  # small integers: ties, zeros, exact squares
    labels = rng.integers(0, 4, rows)
    found = floors.nearest(train, labels, metric=metric)(test)
    for a, got in zip(test.astype(np.float64), found, strict=True):
        if metric == "euclidean":
            far = [np.sum((a - b) ** 2) for b in train.astype(np.float64)]
        else:
            lengths = [np.linalg.norm(a) * np.linalg.norm(b) for b in train.astype(np.float64)]
            far = [-a @ b / length if length else 0.0 for b, length in zip(train, lengths, strict=True)]
        allowed = np.flatnonzero(np.asarray(far) < min(far) + 1e-6)  # ties may be broken by rounding
        assert got in labels[allowed]
        if metric == "euclidean":  # exact here: the first of them
            assert got == labels[allowed[0]]


def test_cosine_takes_no_account_of_length_and_euclidean_does():
    train, labels = np.array([[10.0, 0], [1, 1]], np.float32), np.array([0, 1])
    test = np.array([[1, 0.1]], np.float32)
    assert floors.nearest(train, labels)(test).tolist() == [0]
    assert floors.nearest(train, labels, metric="euclidean")(test).tolist() == [1]


def test_nearest_in_chunks(monkeypatch):
    (train, y), (test, _) = blobs(60, 8, 5, 1.0), blobs(50, 8, 5, 1.0, seed=1)
    whole = floors.nearest(train, y)(test)
    monkeypatch.setattr(floors, "CHUNK", 7)
    assert np.array_equal(floors.nearest(train, y)(test), whole)
    assert np.array_equal(floors.nearest(train, y)(train), y)  # each is nearest to itself
    assert floors.nearest(train, y)(test[:0]).shape == (0,)


def test_logistic_reaches_the_best_that_there_is():
    """Two normal clouds of equal spread: the best rule is linear, and right with probability Phi(distance / 2)."""
    rng = np.random.default_rng(0)
    make = lambda n: (lambda y: (rng.normal(size=(n, 3)) + np.array([[1.2, 0.5, 0]]) * (2 * y - 1)[:, None], y))(rng.integers(0, 2, n))  # noqa: E731
    (x, y), (test, labels) = make(2000), make(20000)
    assert floors.accuracy(floors.logistic(x, y)(test), labels) == pytest.approx(0.9032, abs=0.01)  # Phi(1.3)


def test_logistic_is_the_minimum_of_its_loss():
    """Against Newton's method in float64, from the definition: sum of -log p + |w|^2 / (2 C), intercept free, standardised x."""
    x, y = blobs(200, 4, 2, 0.7)
    a = (x - x.mean(0)) / x.std(0)
    a, sign = np.c_[a.astype(np.float64), np.ones(len(a))], y.astype(np.float64)
    w, ridge = np.zeros(5), np.diag([100.0] * 4 + [0.0])
    for _ in range(50):
        p = 1 / (1 + np.exp(-a @ w))
        w -= np.linalg.solve((a * (p * (1 - p))[:, None]).T @ a + ridge, a.T @ (p - sign) + ridge @ w)
    far = np.abs(a @ w) > 1e-3
    assert np.array_equal(floors.logistic(x, y)(x)[far], (a @ w > 0)[far].astype(int))
    assert 0.6 < np.mean((a @ w > 0) == y) < 0.99


def test_logistic_keeps_labels_ignores_dead_features_and_wants_one_class_at_least():
    x, y = blobs(300, 6, 3, 3.0)
    names = np.array([4, 7, 40])[y]
    found = floors.logistic(x, names)(x)
    assert set(found) == {4, 7, 40}
    assert np.mean(found == names) > 0.95
    assert np.array_equal(floors.logistic(np.c_[x, np.ones((300, 2), np.float32)], names)(np.c_[x, np.ones((300, 2), np.float32)]), found)
    assert floors.logistic(x, np.full(300, 5))(x[:3]).tolist() == [5, 5, 5]
    assert floors.logistic(x, names)(x[:0]).shape == (0,)


def test_wide_features_are_reduced_and_the_fit_repeats():
    x, y = blobs(700, 400, 8, 0.3)
    x, y, test, labels = x[:400], y[:400], x[400:], y[400:]
    first, again = floors.logistic(x, y)(test), floors.logistic(x, y)(test)
    assert np.array_equal(first, again)
    assert floors.accuracy(first, labels) > 0.9
    assert floors.logistic(x[:40], y[:40], components=100)(test).shape == (300,)  # fewer rows than components


def test_fit_that_does_not_converge_says_so(caplog):
    x, y = blobs(300, 6, 3, 1.0)
    floors.logistic(x, y, iterations=2)(x)
    assert "before it converged" in caplog.text


def test_accuracy():
    assert floors.accuracy(np.array([1, 2, 3, 3]), np.array([1, 2, 0, 3])) == 0.75
    assert floors.accuracy(np.array([], int), np.array([], int)) == 0.0


def distributions(rows: int = 150, width: int = 4, classes: int = 3, seed: int = 0):
    """Features, and targets that are a softmax of them and of noise."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, width)) * np.array([1, 10, 0.01, 3]) + 5
    z = (x - 5) / np.array([1, 10, 0.01, 3]) @ rng.normal(size=(width, classes)) + rng.normal(size=(rows, classes))
    return x, np.exp(z) / np.exp(z).sum(1, keepdims=True)


def test_the_mean_target_is_the_best_constant():
    x, t = distributions()
    p = floors.mean_target(x, t)(x[:7])
    assert p == pytest.approx(np.tile(t.mean(0), (7, 1)))
    cost = lambda q: -np.mean(t @ np.log(q))  # noqa: E731
    rng = np.random.default_rng(1)
    assert all(cost(p[0]) < cost(q / q.sum()) for q in np.exp(0.05 * rng.normal(size=(50, 3))) * p[0])


def test_nearest_gives_the_neighbours_distribution():
    x, t = distributions()
    assert np.array_equal(floors.nearest(x, t, metric="euclidean")(x[5:9]), t[5:9])
    assert floors.nearest(x, t)(x[:0]).shape == (0, 3)


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_softmax_regression_is_the_minimum_of_its_loss(strength):
    """The gradient of the definition is 0 at what it found: targets and predictions have equal means, and equal cross-products with
    every feature but for the penalty."""
    x, t = distributions()
    p = floors.softmax_regression(x, t, strength=strength)(x)
    a = (x - x.mean(0)) / x.std(0)
    assert p.sum(1) == pytest.approx(np.ones(150))
    assert p.mean(0) == pytest.approx(t.mean(0), abs=1e-6)
    logits = np.log(p) - np.log(p).mean(1, keepdims=True)
    weights = np.linalg.lstsq(np.c_[a, np.ones(150)], logits, rcond=None)[0][:4]  # rows of W add up to 0 at the minimum
    assert a.T @ (p - t) == pytest.approx(-weights / strength, rel=1e-3, abs=1e-3)
    assert np.abs(weights).max() > 0.05


def test_softmax_regression_of_corners_is_scikit_learns():
    from sklearn.linear_model import LogisticRegression

    x, t = distributions()
    labels, a = t.argmax(1), (x - x.mean(0)) / x.std(0)
    theirs = LogisticRegression(C=0.5, tol=1e-8, max_iter=1000).fit(a, labels).predict_proba(a)
    assert floors.softmax_regression(x, np.eye(3)[labels], strength=0.5)(x) == pytest.approx(theirs, abs=1e-5)


def test_softmax_regression_finds_what_is_there_and_ignores_dead_features():
    (x, t), (test, _) = distributions(600), distributions(600, seed=1)
    kl = lambda t, p: np.mean(np.sum(t * np.log(t / p), 1))  # noqa: E731
    best, constant = floors.softmax_regression(x, t, strength=10.0), floors.mean_target(x, t)
    assert kl(t, best(x)) < 0.75 * kl(t, constant(x))
    assert floors.softmax_regression(x, t, strength=1e-6)(test) == pytest.approx(constant(test), abs=1e-3)  # penalised to nothing
    dead, other = (np.c_[rows, np.full(600, value)] for rows, value in ((x, 0.1), (test, 7.0)))  # the same for all that train
    assert floors.softmax_regression(dead, t, strength=10.0)(other) == pytest.approx(best(test), abs=1e-5)
    assert best(test[:0]).shape == (0, 3)


def test_softmax_regression_that_does_not_converge_says_so(caplog):
    x, t = distributions()
    floors.softmax_regression(x, t, strength=100.0, iterations=2)
    assert "before it converged" in caplog.text


def test_standardiser():
    x = np.array([[1.0, 0.1, -3e4], [3.0, 0.1, 5e4], [5.0, 0.1, 1e4]])
    scale = floors.standardiser(x)
    assert scale(x).mean(0) == pytest.approx(np.zeros(3), abs=1e-12)
    assert scale(x).std(0) == pytest.approx([1, 0, 1])
    assert scale(np.array([[3.0, 9.0, 1e4]])) == pytest.approx(np.zeros((1, 3)))


@pytest.mark.parametrize(("name", "decay", "constant", "regression"), [("SJAFFE", 0.1, "0.0732 0.193", "0.0423 0.539"),
                                                                       ("Painting", 0.1, "0.5557 0.257", "0.5150 0.304")])
def test_label_distributions_have_the_figures_known_of_them(name, decay, constant, regression):
    """KL and accuracy, means over ten folds, by experiments/ldl/anchors.py."""
    folder = Path(os.environ.get("JAXDISTILL_DATA", "/nowhere")) / "ldl"
    if not folder.is_dir():
        pytest.skip("JAXDISTILL_DATA names no folder with ldl/")
    spec = importlib.util.spec_from_file_location("anchors", Path(__file__).parents[2] / "experiments/ldl/anchors.py")
    anchors = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anchors)
    x, t = anchors.read(folder, name)
    outer = anchors.folds(len(x))
    means = (anchors.mean([anchors.measured(floors.mean_target(x[a], t[a])(x[b]), t[b]) for a, b in outer]),
             anchors.mean([anchors.regression(x, t, a, b, decay) for a, b in outer]))
    assert [f"{found['kl']:.4f} {found['accuracy']:.3f}" for found in means] == [constant, regression]
