"""Floors against plain loops and cases whose answer is known."""

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
