"""Predicted against true distributions: KL, the six measures of label distribution learning, calibration, and both collapses.

Two ways to collapse, two measures: every prediction is one-hot (`entropy` near 0), or all are the same (`spread` near 0). A mean over
examples hides both, and so each is reported beside what the best constant prediction would have.
Pure in the predictions: no loss weight, temperature schedule, smoothing or step is seen here. On the host, in float64.
"""

import numpy as np
from jaxtyping import Float
from scipy.special import softmax

from jaxdistill.evaluators import calibration
from jaxdistill.evaluators.intervals import group_interval

KEYS = ("logits", "target", "valid", "group")  # of a measured batch: [B, K] as deployed, [B, K], bool [B], int [B]
MEASURES = ("chebyshev", "clark", "canberra", "kl", "cosine", "intersection")


def measures(
    logits: Float[np.ndarray, "rows classes"], target: Float[np.ndarray, "rows classes"]
) -> dict[str, Float[np.ndarray, " rows"]]:
    """Of each row, p = softmax(logits) against t (Geng, IEEE TKDE 2016, table 1):

    chebyshev max |t - p|, clark sqrt(sum ((t - p) / (t + p))^2), canberra sum |t - p| / (t + p), kl sum t log(t / p) in nats (all 0 iff
    p = t, smaller is better); cosine t.p / (|t| |p|), intersection sum min(t, p) (1 iff p = t, larger is better). A class that both
    give nothing adds nothing (0 / 0, 0 log 0); in kl a p of exactly 0 where t is not counts as 1e-12.
    Also soft_ce = kl + H(t), brier |p - t|^2, and entropy H(p)."""
    t, log_p, p = np.asarray(target, np.float64), calibration.log_probabilities(logits), softmax(np.asarray(logits, np.float64), axis=1)
    gap, both = np.abs(t - p), t + p
    share = np.divide(gap, both, out=np.zeros_like(gap), where=both > 0)
    soft_ce = -np.sum(t * log_p, axis=1)
    return {
        "kl": soft_ce - _entropy(t), "soft_ce": soft_ce, "brier": np.sum(gap**2, axis=1),
        "chebyshev": np.max(gap, axis=1), "clark": np.sqrt(np.sum(share**2, axis=1)), "canberra": np.sum(share, axis=1),
        "cosine": np.sum(t * p, axis=1) / (np.linalg.norm(t, axis=1) * np.linalg.norm(p, axis=1)),
        "intersection": np.sum(np.minimum(t, p), axis=1), "entropy": _entropy(p),
    }  # fmt: skip


def spread(p: Float[np.ndarray, "rows classes"]) -> float:
    """H(mean p) - mean H(p) in nats: the mutual information of example and predicted class. 0 iff all rows are the same."""
    return float(_entropy(np.mean(p, axis=0, keepdims=True))[0] - np.mean(_entropy(p)))


def gathered(stacked: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The valid rows of all batches: `KEYS` [batches, B, ...] -> [rows, ...] without `valid`; float64."""
    valid = np.asarray(stacked["valid"]).reshape(-1).astype(bool)
    flat = {key: np.asarray(stacked[key]) for key in KEYS if key in stacked and key != "valid"}
    flat = {key: value.reshape(-1, *value.shape[2:])[valid] for key, value in flat.items()}
    return {key: value.astype(np.int64 if key == "group" else np.float64) for key, value in flat.items()}


def finish(stacked: dict[str, np.ndarray], constant: Float[np.ndarray, " classes"] | None = None, seed: int = 0) -> dict[str, float]:
    """`KEYS` of all batches -> means over the rows of `measures`; accuracy, top2, top3 (is the target's likeliest class, of equally
    likely ones the first, predicted first, among the first two, three); ece15 (against the target's own probabilities, see
    calibration.reliability); entropy of a prediction, spread (above), and classes_predicted, the number of classes that come first
    somewhere.

    constant: the mean target of the training split, the best prediction that looks at nothing. With it kl_constant, kl_gain =
    kl_constant - kl, and kl_gain_low, kl_gain_high, its 95 % interval by a bootstrap over whole groups (left out where there is
    only one): the model has learned something where the low end is above 0."""
    rows = gathered(stacked)
    logits, target = rows["logits"], rows["target"]
    if not len(logits):
        return {}
    each, p = measures(logits, target), softmax(logits, axis=1)
    rank = calibration.place(logits, np.argmax(target, axis=1))
    found = {name: float(np.mean(values)) for name, values in each.items()}
    found |= {"accuracy": float(np.mean(rank == 0)), "top2": float(np.mean(rank < 2)), "top3": float(np.mean(rank < 3)),
              "ece15": calibration.ece(p, target), "spread": spread(p), "classes_predicted": float(len(np.unique(np.argmax(p, axis=1))))}
    if constant is not None:
        gain = measures(np.broadcast_to(calibration.logs(constant[None]), target.shape), target)["kl"] - each["kl"]
        found |= {"kl_constant": float(np.mean(gain + each["kl"])), "kl_gain": float(np.mean(gain))}
        if (ends := group_interval(gain, rows["group"], seed=seed)) is not None:
            found |= dict(zip(("kl_gain_low", "kl_gain_high"), ends, strict=True))
    return found


def _entropy(p) -> np.ndarray:
    """-sum p log p of each row, with 0 log 0 = 0."""
    return -np.sum(p * np.log(np.where(p == 0, 1.0, p)), axis=1)
