"""Penalties on confident outputs, and what replaces them: each of one example's logits, unreduced, in nats and float32.

All are functions of the prediction alone. What a softmax that has saturated gets from an entropy penalty is nothing: the entropy's
gradient is p (log p + H), 0 at a corner; of these, max_suppression and margin_smoothing are of the logits and still pull there.
`where` names the examples that count; the others give 0 and no gradient, whatever they hold.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

KINDS = ("linear", "quadratic")


def entropy(logits: Float[Array, "*batch classes"], *, where: Bool[Array, "*batch"] | None = None) -> Float[Array, "*batch"]:
    """H(p) = -sum_k p_k log p_k: from 0 (all on one class) to log classes (uniform)."""
    log_p = jax.nn.log_softmax(_counted(logits, where))
    return _kept(-jnp.sum(jnp.exp(log_p) * jnp.where(jnp.isneginf(log_p), 0.0, log_p), axis=-1), where)


def entropy_floor(
    logits: Float[Array, "*batch classes"],
    floor: int | float | Float[Array, ""],
    *,
    kind: str = "linear",
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """max(0, floor - H(p)), or its square. kind: linear | quadratic. Linear is the hinge of the confidence penalty (Pereyra et al.,
    arXiv 1701.06548). The square is the weaker of the two where less than 1 nat is missing, and its gradient where less than 1/2 is."""
    if kind not in KINDS:
        raise ValueError(f"kind: found {kind!r}; accepted: {', '.join(KINDS)}")
    missing = jnp.maximum(floor - entropy(logits, where=where), 0.0)
    return _kept(missing if kind == "linear" else jnp.square(missing), where)


def confidence_penalty(logits: Float[Array, "*batch classes"], *, where: Bool[Array, "*batch"] | None = None) -> Float[Array, "*batch"]:
    """log classes - H(p), which is KL(p || uniform): the penalty -H(p) of Pereyra et al. (arXiv 1701.06548), moved up by a constant
    so that it is 0 for a uniform prediction and never negative."""
    return _kept(math.log(logits.shape[-1]) - entropy(logits, where=where), where)


def max_suppression(logits: Float[Array, "*batch classes"], *, where: Bool[Array, "*batch"] | None = None) -> Float[Array, "*batch"]:
    """max_k z_k - mean_k z_k (MaxSup, Zhou et al., arXiv 2502.15798): what label smoothing does to the label's logit, done to the
    largest, be it right or wrong. The gradient is shared by equal largest logits."""
    logits = _counted(logits, where)
    return _kept(jnp.max(logits, axis=-1) - jnp.mean(logits, axis=-1), where)


def margin_smoothing(
    logits: Float[Array, "*batch classes"], margin: int | float, *, where: Bool[Array, "*batch"] | None = None
) -> Float[Array, "*batch"]:
    """sum_k max(0, max_j z_j - z_k - margin) (margin-based label smoothing, Liu et al., arXiv 2111.15430). Margin 0 is the penalty that
    label smoothing applies to all differences; above it, differences up to the margin are free. The authors' code takes the mean
    over classes instead of the sum: a weight a there is a / classes here."""
    logits = _counted(logits, where)
    over = jnp.max(logits, axis=-1, keepdims=True) - logits - margin
    return _kept(jnp.sum(jnp.maximum(over, 0.0), axis=-1), where)


def logit_norm(
    logits: Float[Array, "*batch classes"], temperature: int | float | Float[Array, ""], *, epsilon: float = 1e-7
) -> Float[Array, "*batch classes"]:
    """z / (T |z|), float32 (LogitNorm, Wei et al., arXiv 2205.09310): logits of a fixed length 1 / T, in training and where deployed.

    The length bounds what can be predicted: see `largest_probability`. All-zero logits stay 0 with the finite gradient 1 / (T epsilon),
    where that of |z| is NaN; it is huge, so that a head should not begin at zero."""
    logits = logits.astype(jnp.float32)
    length = jnp.sqrt(jnp.sum(jnp.square(logits), axis=-1, keepdims=True) + epsilon**2)
    return logits / (temperature * length)


def largest_probability(length: int | float, classes: int) -> float:
    """The largest probability that a softmax can give to one of `classes` when |z| is at most `length` (1 / T with LogitNorm, cap / T
    where logits are capped and divided by T): 1 / (1 + (K - 1) exp(-length sqrt(K / (K - 1)))), which all others share evenly."""
    spread = length * (classes / (classes - 1)) ** 0.5
    return 1 / (1 + (classes - 1) * math.exp(-spread))


def _counted(logits, where):
    """float32; of what does not count, zeros, before any arithmetic: NaN must not reach a gradient."""
    logits = logits.astype(jnp.float32)
    return logits if where is None else jnp.where(where[..., None], logits, 0.0)


def _kept(values, where):
    return values if where is None else jnp.where(where, values, 0.0)
