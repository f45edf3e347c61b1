"""Classification: accuracy, top-5, NLL, Brier score, calibration, of each branch and of all together; against a teacher, KL at T = 1
and agreement; of small test sets with host arrays also each class by itself.

Pure in parameters and data: no loss weight, temperature schedule, label smoothing or step is seen here. A label is a class index,
or a distribution over classes (soft labels), whose largest probability is then what accuracy asks for.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.special import softmax

from jaxdistill.evaluators import calibration
from jaxdistill.evaluators.calibration import BINS
from jaxdistill.evaluators.intervals import group_interval
from jaxdistill.losses.divergences import forward_kl

KEYS = ("logits", "label", "valid", "group")  # of a batch for `finish_logits`: [B, K], int [B], bool [B], and, where there are, int [B]


def fused(outputs: Mapping[str, Float[Array, "batch classes"]]) -> Float[Array, "batch classes"]:
    """log of the mean of the branches' probabilities: logits of what they say together, which is the sum p_SA + p_GLCA of DCAL
    (arXiv 2205.02151) made a distribution. Not the mean of logits, which is another classifier."""
    logs = jnp.stack([jax.nn.log_softmax(logits.astype(jnp.float32)) for logits in outputs.values()])
    return jax.nn.logsumexp(logs, axis=0) - jnp.log(jnp.float32(len(logs)))


def sums(
    outputs: Mapping[str, Float[Array, "batch classes"]],
    labels: Int[Array, " batch"] | Float[Array, "batch classes"],
    where: Bool[Array, " batch"],
    teacher_logits: Float[Array, "batch classes"] | None = None,
) -> dict[str, Float[Array, "..."]]:
    """Sums over the valid examples of one batch, for `finish`.

    outputs: logits of each branch. The names of all together (of the only one) stand alone; where there are several, each
    branch's own begin with its name, as in `sa_correct`. teacher_logits: with them kl and agree, of all together."""
    joint = fused(outputs)
    found = {"count": jnp.sum(where, dtype=jnp.float32)} | _sums(joint, labels, where)
    if len(outputs) > 1:
        for branch, logits in outputs.items():
            found |= {f"{branch}_{name}": value for name, value in _sums(logits, labels, where).items()}
    if teacher_logits is not None:
        agree = place(joint, jnp.argmax(teacher_logits, axis=-1)) == 0
        found |= {"kl": jnp.sum(jnp.where(where, forward_kl(teacher_logits, joint, where=where), 0.0)),
                  "agree": jnp.sum(where & agree, dtype=jnp.float32)}
    return found


def finish(stacked: dict[str, np.ndarray]) -> dict[str, float]:
    """Stacked sums of all batches -> accuracy (the headline), top5, nll (nats an example; of soft labels their cross-entropy), brier
    (squared distance to the label's distribution, 0 to 2), ece15 (expected calibration error over 15 bins of equal width), all as
    fractions and not percents; with a teacher teacher_kl and top1_agreement. Branches as in `sums`, `sa_accuracy`."""
    total = {name: np.sum(values, axis=0, dtype=np.float64) for name, values in stacked.items()}
    count = max(float(total["count"]), 1.0)
    found = {}
    for prefix in [name.removesuffix("correct") for name in total if name.endswith("correct")]:
        bins = total[f"{prefix}bins"]
        found |= {f"{prefix}{public}": float(total[f"{prefix}{name}"]) / count
                  for public, name in (("accuracy", "correct"), ("top5", "top5"), ("nll", "nll"), ("brier", "brier"))}
        found[f"{prefix}ece15"] = float(np.sum(np.abs(bins[1] - bins[0]))) / count
    if "kl" in total:
        found |= {"teacher_kl": float(total["kl"]) / count, "top1_agreement": float(total["agree"]) / count}
    return found


def confusion(
    labels: Int[np.ndarray, " rows"], predicted: Int[np.ndarray, " rows"], classes: int
) -> Int[np.ndarray, "classes classes"]:
    """How many rows of class i (down) were taken for class j (across)."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def decisions(table: Int[np.ndarray, "classes classes"]) -> dict[str, float]:
    """A confusion matrix -> accuracy; macro_recall, macro_precision and macro_f1: plain means over the classes that have rows, each
    class counting alike (a class that is never predicted has precision 0; macro_f1 is the mean of F1, not the F1 of means); and
    balanced_accuracy, which is macro_recall's other name: the accuracy if all classes were equally frequent."""
    right, rows, taken = np.diag(table).astype(np.float64), table.sum(axis=1), table.sum(axis=0)
    here = rows > 0
    mean = lambda bottom: float(np.mean((right / np.maximum(bottom, 1))[here])) if here.any() else 0.0  # noqa: E731
    recall = mean(rows)
    return {"accuracy": float(right.sum() / max(rows.sum(), 1)), "balanced_accuracy": recall, "macro_recall": recall,
            "macro_precision": mean(taken), "macro_f1": mean((rows + taken) / 2)}


def finish_logits(stacked: dict[str, np.ndarray], seed: int = 0) -> dict[str, float]:
    """`KEYS` of all batches -> `decisions`, and top5, nll, brier, ece15 as `finish` defines them. With `group` (a subject, a speaker)
    accuracy_low and accuracy_high, its 95 % interval by a bootstrap over whole groups, where there are two or more.

    As everywhere, equal logits count for the first class alone, and what is not finite is right for none."""
    valid = np.asarray(stacked["valid"]).reshape(-1).astype(bool)
    rows = {key: np.asarray(stacked[key]) for key in KEYS if key in stacked}
    rows = {key: value.reshape(-1, *value.shape[2:])[valid] for key, value in rows.items()}
    logits, labels = rows["logits"].astype(np.float64), rows["label"].astype(np.int64)
    if not len(labels):
        return {}
    place, p = calibration.place(logits, labels), softmax(logits, axis=1)
    first = np.argmax(np.where(np.isnan(logits), -np.inf, logits), axis=1)
    predicted = np.where((place > 0) & (first == labels), (labels + 1) % logits.shape[1], first)  # of NaN: any but the right one
    found = decisions(confusion(labels, predicted, logits.shape[1])) | {
        "top5": float(np.mean(place < 5)), "nll": calibration.nll(logits, labels), "ece15": calibration.ece(p, labels),
        "brier": float(np.mean(np.sum(np.square(p - np.eye(logits.shape[1])[labels]), axis=1))),
    }
    if "group" in rows and (ends := group_interval((place == 0).astype(np.float64), rows["group"], seed=seed)) is not None:
        found |= dict(zip(("accuracy_low", "accuracy_high"), ends, strict=True))
    return found


def place(logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
    """The label's place in falling order, 0 for the largest logit. Equal logits are placed by class, so that a constant output is not
    right every time; where any comparison is with NaN, the label comes last."""
    labels = labels[..., None]
    classes = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    own = classes == labels
    chosen = jnp.sum(jnp.where(own, logits, 0.0), axis=-1, keepdims=True)
    after = (logits < chosen) | ((logits == chosen) & (classes > labels))
    return jnp.sum(~after & ~own, axis=-1)


def _sums(logits, labels, where) -> dict[str, Float[Array, "..."]]:
    logits = jnp.where(where[:, None], logits.astype(jnp.float32), 0.0)
    log_p = jax.nn.log_softmax(logits)
    p = jnp.exp(log_p)
    if labels.ndim == 1:
        known = (labels >= 0) & (labels < logits.shape[-1])  # what is no class has no loss, and is not to be had for nothing
        target = jnp.where(known[:, None], jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32), jnp.nan)
    else:
        labels, target = jnp.argmax(labels, axis=-1), labels.astype(jnp.float32)
    at = place(logits, labels)
    confidence = jnp.max(p, axis=-1)
    index = jnp.nan_to_num(jnp.clip(jnp.ceil(confidence * BINS) - 1, 0, BINS - 1), nan=BINS - 1)
    bins = where[None, :] & (index[None, :] == jnp.arange(BINS, dtype=jnp.float32)[:, None])
    sum_of = lambda values: jnp.sum(jnp.where(where, values.astype(jnp.float32), 0.0))  # noqa: E731
    in_bins = lambda values: jnp.sum(jnp.where(bins, values[None, :], 0.0), axis=-1)  # noqa: E731
    return {
        "correct": sum_of(at == 0), "top5": sum_of(at < 5),
        "nll": sum_of(-jnp.sum(jnp.where(target == 0, 0.0, target * log_p), axis=-1)),
        "brier": sum_of(jnp.sum(jnp.square(p - target), axis=-1)),
        "bins": jnp.stack([in_bins(confidence), in_bins((at == 0).astype(jnp.float32))]),
    }
