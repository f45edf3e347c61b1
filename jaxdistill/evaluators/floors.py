"""What a model must beat. Of labels: the commonest class, the nearest training example, logistic regression; of distributions over
classes: the mean, the nearest example's, softmax regression.

Each is a fit on host arrays, `fit(train_x, train_y)` -> `predict(test_x)` -> class (or distribution) of each row, and takes no account
of what the features are. The same arrays give the same answers, whatever the seed of a run.
"""

import logging
import warnings
from collections.abc import Callable

import numpy as np
import scipy.optimize
from jaxtyping import Float, Int, Shaped
from scipy.special import log_softmax, softmax

logger = logging.getLogger(__name__)

METRICS = ("cosine", "euclidean")
CHUNK = 512  # test rows whose similarities to all training rows exist at a time

Predict = Callable[[Float[np.ndarray, "test width"]], Shaped[np.ndarray, "test *classes"]]


def constant(train_x: Float[np.ndarray, "train width"], train_y: Int[np.ndarray, " train"]) -> Predict:
    """The most frequent training class, of equally frequent ones the smallest."""
    values, counts = np.unique(train_y, return_counts=True)
    most = values[np.argmax(counts)]
    return lambda test_x: np.full(len(test_x), most)


def nearest(
    train_x: Float[np.ndarray, "train width"], train_y: Shaped[np.ndarray, "train *classes"], *, metric: str = "cosine"
) -> Predict:
    """The class (or distribution) of the nearest training row, of equally near ones the first. metric: cosine (of the features as they
    are, not centred) | euclidean. A row of zeros has no direction: its cosine with every other is 0."""
    train = _directions(train_x) if metric == "cosine" else np.asarray(train_x, np.float32)
    # |a - b|^2 / 2 without what is the same for all b
    offset = np.zeros(len(train), np.float32) if metric == "cosine" else np.sum(train * train, axis=1) / 2

    def predict(test_x):
        test = _directions(test_x) if metric == "cosine" else np.asarray(test_x, np.float32)
        chunks = (test[at : at + CHUNK] for at in range(0, len(test), CHUNK))
        found = [np.argmax(rows @ train.T - offset[None], axis=1) for rows in chunks]
        return train_y[np.concatenate(found)] if found else train_y[:0]

    return predict


def logistic(
    train_x: Float[np.ndarray, "train width"], train_y: Int[np.ndarray, " train"],
    *, strength: float = 0.01, components: int = 256, iterations: int = 300,
) -> Predict:  # fmt: skip
    """Multinomial logistic regression (scikit-learn's, L2 with C = `strength`) on standardised features; wider ones are first
    reduced to their `components` principal components, unscaled, which costs a fifth and, on pixels, is the better classifier."""
    from sklearn.decomposition import PCA
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(train_y)) == 1:  # which scikit-learn refuses
        return constant(train_x, train_y)
    steps = [StandardScaler(), LogisticRegression(C=strength, max_iter=iterations)]
    if train_x.shape[1] > components:
        solver = "covariance_eigh" if train_x.shape[1] <= 4096 else "randomized"  # exact, while width x width is small
        steps.insert(1, PCA(min(components, len(train_x)), svd_solver=solver, random_state=0))
    model = make_pipeline(*steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said below, once
        model.fit(np.asarray(train_x, np.float32), train_y)
    if (took := int(model[-1].n_iter_.max())) >= iterations:
        logger.warning("floor: logistic regression stopped after %d iterations, before it converged", took)
    return lambda test_x: model.predict(np.asarray(test_x, np.float32)) if len(test_x) else train_y[:0]


def mean_target(train_x: Float[np.ndarray, "train width"], train_t: Float[np.ndarray, "train classes"]) -> Predict:
    """The mean distribution of the training rows: of all predictions that look at nothing, the one with the smallest KL there."""
    mean = np.mean(train_t, axis=0, dtype=np.float64)
    return lambda test_x: np.tile(mean, (len(test_x), 1))


def softmax_regression(
    train_x: Float[np.ndarray, "train width"], train_t: Float[np.ndarray, "train classes"],
    *, strength: float = 0.03, iterations: int = 2000,
) -> Predict:  # fmt: skip
    """p = softmax(W x + b) of standardised features, with the smallest sum of KL(t || p) + |W|^2 / (2 strength), b free: the maximum
    entropy model of label distribution learning (Geng, IEEE TKDE 2016, there unpenalised). float64, L-BFGS from zero; the loss is
    convex, so that there is one answer."""
    (rows, width), classes = train_x.shape, train_t.shape[1]
    scale = standardiser(train_x)
    x, t = scale(train_x), np.asarray(train_t, np.float64)

    def loss(flat):
        weights, bias = flat[:-classes].reshape(width, classes), flat[-classes:]
        log_p = log_softmax(x @ weights + bias[None], axis=1)
        gap = np.exp(log_p) * t.sum(axis=1, keepdims=True) - t
        slope = np.concatenate([(x.T @ gap + weights / strength).ravel(), gap.sum(axis=0)])
        return (np.sum(weights**2) / (2 * strength) - np.sum(t * log_p)) / rows, slope / rows

    options = dict(maxiter=iterations, maxfun=2 * iterations, gtol=1e-7, ftol=1e-15)
    found = scipy.optimize.minimize(loss, np.zeros((width + 1) * classes), jac=True, method="L-BFGS-B", options=options)
    if not found.success:
        logger.warning("floor: softmax regression stopped after %d iterations, before it converged", found.nit)
    weights, bias = found.x[:-classes].reshape(width, classes), found.x[-classes:]
    return lambda test_x: softmax(scale(test_x) @ weights + bias[None], axis=1)


def standardiser(train_x: Float[np.ndarray, "train width"]) -> Callable[[np.ndarray], np.ndarray]:
    """x -> (x - mean) / standard deviation of the training rows, float64. A feature that is the same in all of them (to rounding) says
    nothing and becomes 0, also where a test row differs."""
    x = np.asarray(train_x, np.float64)
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    rate = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 1e-12 * np.abs(x).max(axis=0, initial=0.0))
    return lambda test_x: (np.asarray(test_x, np.float64) - mean[None]) * rate[None]


def accuracy(predicted: Int[np.ndarray, " test"], labels: Int[np.ndarray, " test"]) -> float:
    """The share of rows that are right; 0 of no rows."""
    return float(np.mean(predicted == labels)) if len(labels) else 0.0


def _directions(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float32)
    length = np.sqrt(np.sum(x * x, axis=1, keepdims=True))
    return x / np.where(length > 0, length, 1)


FITS = {"constant": constant, "nearest": nearest, "logistic": logistic}  # of labels
SOFT_FITS = {"constant": mean_target, "nearest": nearest, "softmax": softmax_regression}  # of distributions
