"""What a model must beat: the commonest class, the nearest training example, logistic regression.

Each is a fit on host arrays, `fit(train_x, train_y)` -> `predict(test_x)` -> class of each row, and takes no account of what the
features are. The same arrays give the same classes, whatever the seed of a run.
"""

import logging
import warnings
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

logger = logging.getLogger(__name__)

METRICS = ("cosine", "euclidean")
CHUNK = 512  # test rows whose similarities to all training rows exist at a time

Predict = Callable[[Float[np.ndarray, "test width"]], Int[np.ndarray, " test"]]


def constant(train_x: Float[np.ndarray, "train width"], train_y: Int[np.ndarray, " train"]) -> Predict:
    """The most frequent training class, of equally frequent ones the smallest."""
    values, counts = np.unique(train_y, return_counts=True)
    most = values[np.argmax(counts)]
    return lambda test_x: np.full(len(test_x), most)


def nearest(train_x: Float[np.ndarray, "train width"], train_y: Int[np.ndarray, " train"], *, metric: str = "cosine") -> Predict:
    """The class of the nearest training row, of equally near ones the first. metric: cosine (of the features as they are, not
    centred) | euclidean. A row of zeros has no direction: its cosine with every other is 0."""
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


def accuracy(predicted: Int[np.ndarray, " test"], labels: Int[np.ndarray, " test"]) -> float:
    """The share of rows that are right; 0 of no rows."""
    return float(np.mean(predicted == labels)) if len(labels) else 0.0


def _directions(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float32)
    length = np.sqrt(np.sum(x * x, axis=1, keepdims=True))
    return x / np.where(length > 0, length, 1)


FITS = {"constant": constant, "nearest": nearest, "logistic": logistic}
