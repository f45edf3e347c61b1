"""Predictions by rank and by confidence: does a probability of 0.7 mean seven in ten. Bins, expected calibration error, and the one
temperature that repairs most of it. On the host, in float64; of labels (classes) and of distributions over classes."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy.optimize import brentq
from scipy.special import log_softmax, softmax

BINS = 15  # of confidence, equally wide (Guo et al., arXiv 1706.04599)
COLDEST, HOTTEST = 0.01, 100.0  # temperatures that are looked at
ZERO = 1e-12  # what a probability of exactly 0 is counted as, where its logarithm is asked for


class Reliability(NamedTuple):
    """Of each bin of confidence: its rows, and the means there of what was claimed and of what was so (0 where it has no rows)."""

    count: Int[np.ndarray, " bins"]
    confidence: Float[np.ndarray, " bins"]
    correct: Float[np.ndarray, " bins"]


def logs(p: Float[np.ndarray, "rows classes"]) -> Float[np.ndarray, "rows classes"]:
    """Logits of probabilities that come without: log p, -inf for 0, which stays 0 at every temperature."""
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(p, np.float64))


def log_probabilities(logits: Float[np.ndarray, "rows classes"]) -> Float[np.ndarray, "rows classes"]:
    """log softmax, and log 1e-12 for a logit of -inf: one zero where something was so would make every mean infinite. What is finite,
    as of any trained model, is not cut off, however small."""
    log_p = log_softmax(np.asarray(logits, np.float64), axis=1)
    return np.where(np.isneginf(log_p), np.log(ZERO), log_p)


def place(logits: Float[np.ndarray, "rows classes"], labels: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    """How many classes come before the label: 0 is right, below k is among the top k. Equal logits are placed by class, so that a
    constant output is not right every time; where any comparison is with NaN, the label comes last."""
    chosen, classes = logits[np.arange(len(logits)), labels][:, None], np.arange(logits.shape[1])[None]
    after = (logits < chosen) | ((logits == chosen) & (classes > labels[:, None]))
    return np.sum(~after & (classes != labels[:, None]), axis=1)


def reliability(p: Float[np.ndarray, "rows classes"], target: Shaped[np.ndarray, "rows *classes"], bins: int = BINS) -> Reliability:
    """Rows by confidence max_k p_k in (i / bins, (i + 1) / bins].

    target: a class of each row, or a distribution over them, and then a claim is right with the target's own probability of the
    class claimed, t[argmax p]. Against argmax t, the true distribution itself would be called uncalibrated."""
    p = np.asarray(p, np.float64)
    claimed, confidence = np.argmax(p, axis=1), np.max(p, axis=1, initial=0.0)
    right = (claimed == target) if target.ndim == 1 else target[np.arange(len(p)), claimed]
    place = np.clip(np.nan_to_num(np.ceil(confidence * bins) - 1, nan=bins - 1), 0, bins - 1).astype(int)
    count, claims, hits = (np.bincount(place, weights, bins) for weights in (None, confidence, np.asarray(right, np.float64)))
    rows = np.maximum(count, 1)
    return Reliability(count, claims / rows, hits / rows)


def ece(p: Float[np.ndarray, "rows classes"], target: Shaped[np.ndarray, "rows *classes"], bins: int = BINS) -> float:
    """Expected calibration error (Naeini et al. 2015): |confidence - correct| of each bin, by its share of the rows."""
    found = reliability(p, target, bins)
    return float(found.count @ np.abs(found.confidence - found.correct) / max(len(p), 1))


def nll(logits: Float[np.ndarray, "rows classes"], target: Shaped[np.ndarray, "rows *classes"], temperature: float = 1.0) -> float:
    """Mean -log p[label] in nats at that temperature; of distributions the mean soft cross-entropy."""
    log_p = log_probabilities(np.asarray(logits, np.float64) / temperature)
    return float(-np.mean(np.sum(_distributions(target, log_p) * log_p, axis=1)))


def fit_temperature(logits: Float[np.ndarray, "rows classes"], target: Shaped[np.ndarray, "rows *classes"]) -> float:
    """The T between 0.01 and 100 with the smallest `nll` (temperature scaling, Guo et al., arXiv 1706.04599). To be fitted on rows that
    are neither trained on nor reported.

    In beta = 1 / T the mean is convex, and its slope, mean(E_p z - E_t z), is 0 once: the root is exact, where a line search in T
    may stop early on a flat floor. Logits that are right on every row want T = 0 and get 0.01; equal logits have no slope and get 1.
    What is so although its logit is -inf costs the same at every T, and has no part in it."""
    z = np.asarray(logits, np.float64)
    z = z - z.max(axis=1, keepdims=True)  # the softmax does not see it; large products would lose digits
    possible = ~np.isneginf(z)
    finite, target = np.where(possible, z, 0.0), np.where(possible, _distributions(target, z), 0.0)
    if not np.any(finite):
        return 1.0
    share, wanted = target.sum(axis=1), np.sum(target * finite, axis=1)
    slope = lambda log_beta: float(np.mean(share * np.sum(softmax(np.exp(log_beta) * z, axis=1) * finite, axis=1) - wanted))  # noqa: E731
    ends = -np.log(HOTTEST), -np.log(COLDEST)
    if slope(ends[0]) >= 0:
        return HOTTEST
    if slope(ends[1]) <= 0:
        return COLDEST
    return float(np.exp(-brentq(slope, *ends, xtol=1e-12)))


def _distributions(target, like) -> np.ndarray:
    return np.eye(like.shape[1])[target] if target.ndim == 1 else np.asarray(target, np.float64)
