"""Cross-entropy and its relatives, against labels or distributions: per example, unreduced, in nats and float32.

A target is a class (int) or a distribution over classes (float, adding up to 1). `where` names the examples that count; the others
give 0 and no gradient, whatever they hold.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.losses.softmax import log_sum_exp

WEIGHTS = ("none", "inverse", "effective")


def cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    *,
    smoothing: float = 0.0,
    where: Bool[Array, "*batch"] | None = None,
    whole: Float[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """-log p[label] in nats; with smoothing a, the target is (1 - a) onehot + a / classes (Szegedy et al., arXiv
    1512.00567). where: examples that count; the others give 0 and no gradient. whole: `softmax.log_sum_exp` of the logits, where
    the caller has it."""
    logits = logits.astype(jnp.float32)
    if where is not None:
        logits = jnp.where(where[..., None], logits, 0.0)
    chosen = _chosen(logits, labels)
    loss = (log_sum_exp(logits) if whole is None else whole) - chosen
    if smoothing:
        loss = loss + smoothing * (chosen - jnp.mean(logits, axis=-1))
    return loss if where is None else jnp.where(where, loss, 0.0)


@jax.custom_jvp
def _chosen(logits, labels):
    """The label's logit."""
    return jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]


@_chosen.defjvp
def _chosen_jvp(primals, tangents):
    """By comparison: the gradient of a gather is a scatter over [batch, classes]."""
    (logits, labels), (slope, _) = primals, tangents
    classes = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    return _chosen(logits, labels), jnp.sum(jnp.where(labels[..., None] == classes, slope, 0.0), axis=-1)


def smoothed(target: Float[Array, "*batch classes"], smoothing: int | float) -> Float[Array, "*batch classes"]:
    """(1 - a) t + a / classes. What is smoothed is the target alone: with soft targets the optimum itself moves there."""
    return (1 - smoothing) * target + smoothing / target.shape[-1]


def soft_cross_entropy(
    logits: Float[Array, "*batch classes"],
    target: Float[Array, "*batch classes"],
    *,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """-sum_k t_k log p_k: the target's entropy at least, and that iff p = t. A class of target 0 costs nothing, whatever its logit."""
    logits, target = _counted(logits, target, where)
    return _total(target, -jax.nn.log_softmax(logits), where)


def soft_kl(
    logits: Float[Array, "*batch classes"],
    target: Float[Array, "*batch classes"],
    *,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """KL(t || p) = sum_k t_k (log t_k - log p_k) with 0 log 0 = 0: soft cross-entropy less the target's entropy. 0 iff p = t."""
    logits, target = _counted(logits, target, where)
    return _total(target, jnp.log(jnp.where(target > 0, target, 1.0)) - jax.nn.log_softmax(logits), where)


def focal(
    logits: Float[Array, "*batch classes"],
    target: Int[Array, "*batch"] | Float[Array, "*batch classes"],
    *,
    gamma: int | float = 2.0,
    class_weights: Float[Array | np.ndarray, " classes"] | None = None,
    smoothing: int | float = 0.0,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """sum_k w_k t_k (1 - p_k)^gamma (-log p_k): focal loss (Lin et al., arXiv 1708.02002) of a softmax, for labels and distributions.

    gamma 0 without weights is cross-entropy exactly. smoothing is of the target; (1 - p_k) is always taken of the prediction. gamma
    and smoothing are static. A vector of weights, not Lin's one alpha, which is for two classes. The sum over examples is to be
    divided by their number: torch's `cross_entropy(weight=)` divides by sum_i w[y_i], so that there a batch of one has no weight.
    Of distributions, w_k moves the optimum from t to w_k t_k / sum_j w_j t_j; `sample_weights` does not. gamma > 0 moves it too
    (towards uniform: focal loss is not proper)."""
    if gamma < 0:
        raise ValueError(f"gamma: found {gamma}; accepted: 0 or more")
    if target.ndim < logits.ndim:
        if not gamma and class_weights is None:
            return cross_entropy(logits, target, smoothing=smoothing, where=where)
        classes = jax.lax.broadcasted_iota(target.dtype, logits.shape, logits.ndim - 1)
        target = (target[..., None] == classes).astype(jnp.float32)
    if smoothing:
        target = smoothed(target.astype(jnp.float32), smoothing)
    logits, target = _counted(logits, target, where)
    if class_weights is not None:
        target = target * jnp.broadcast_to(jnp.asarray(class_weights, jnp.float32), target.shape)
    if not gamma:
        return _total(target, -jax.nn.log_softmax(logits), where)
    log_p, log_rest = _logs(logits)
    return _total(target, -jnp.exp(gamma * log_rest) * log_p, where)


def class_weights(
    counts: Float[np.ndarray, " classes"] | Int[np.ndarray, " classes"], kind: str, beta: int | float = 0.999
) -> Float[np.ndarray, " classes"]:
    """float32 weights of classes of which the training split holds `counts` examples (or, of distributions, summed probability).

    kind: none (ones) | inverse (1 / n) | effective ((1 - beta) / (1 - beta^n), Cui et al., arXiv 1901.05555: ones at beta 0, nearly
    1 / n where beta^n is nearly 1). Scaled to the mean 1 over the training examples, sum_k n_k w_k / sum_k n_k, so that weights leave
    the loss at the size it had (Cui: mean 1 over the classes)."""
    counts = np.asarray(counts, np.float64)
    if kind not in WEIGHTS:
        raise ValueError(f"kind: found {kind!r}; accepted: {', '.join(WEIGHTS)}")
    if not 0 <= beta < 1:
        raise ValueError(f"beta: found {beta}; accepted: 0 or more, and below 1")
    if kind == "none":
        return np.ones(len(counts), np.float32)
    if not np.all(counts > 0):
        raise ValueError(f"counts: found {counts[~(counts > 0)][0]:g} of class {np.argmin(counts > 0)}; accepted: more than 0 of each")
    effective = np.expm1(counts * np.log(beta)) / (beta - 1) if beta else np.ones_like(counts)
    weights = 1 / (counts if kind == "inverse" else effective)
    return (weights * (counts.sum() / (counts @ weights))).astype(np.float32)


def sample_weights(
    target: Float[Array, "*batch classes"], class_weights: Float[Array | np.ndarray, " classes"]
) -> Float[Array, "*batch"]:
    """sum_k t_k w_k: the weight of each example, which multiplies its whole loss, so that the best prediction stays t."""
    weights = jnp.broadcast_to(jnp.asarray(class_weights, jnp.float32), target.shape)
    return jnp.sum(target.astype(jnp.float32) * weights, axis=-1)


def adjusted(
    logits: Float[Array, "*batch classes"], prior: Float[Array | np.ndarray, " classes"], tau: int | float = 1.0
) -> Float[Array, "*batch classes"]:
    """z + tau log prior, float32 (Menon et al., arXiv 2007.07314): what the training loss sees. Predictions are then made of z as it is,
    and at tau 1 are best by balanced accuracy. prior: shares of the classes in the training split, each above 0."""
    shift = tau * jnp.log(jnp.asarray(prior, jnp.float32))
    return logits.astype(jnp.float32) + jnp.broadcast_to(shift, logits.shape)


def _counted(logits, target, where):
    """Both in float32; of what does not count, zeros, before any arithmetic: NaN must not reach a gradient."""
    logits, target = logits.astype(jnp.float32), target.astype(jnp.float32)
    if where is None:
        return logits, target
    return [jnp.where(where[..., None], x, 0.0) for x in (logits, target)]


def _total(target, costs, where):
    """sum_k t_k costs_k, also where a cost is infinite and t_k = 0."""
    total = jnp.sum(jnp.where(target == 0, 0.0, target * costs), axis=-1)
    return total if where is None else jnp.where(where, total, 0.0)


def _logs(logits):
    """(log p, log(1 - p)) of every class, each to full relative precision at both ends: where p rounds to 1, 1 - p is not 0. For the
    largest class from the odds of all others against it; the p of the others is 1/2 at most."""
    classes = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    largest = classes == jnp.argmax(logits, axis=-1)[..., None].astype(jnp.int32)
    top = jnp.sum(jnp.where(largest, logits, 0.0), axis=-1, keepdims=True)
    odds = jax.nn.logsumexp(jnp.where(largest, -jnp.inf, logits), axis=-1, keepdims=True) - top  # log((1 - p_top) / p_top)
    log_top, log_others = -jax.nn.softplus(odds), -jax.nn.softplus(-odds)
    log_p = jnp.where(largest, log_top, logits - top + log_top)
    small = jnp.where(largest, 0.0, jnp.exp(log_p))
    return log_p, jnp.where(largest, log_others, jnp.log1p(-small))
