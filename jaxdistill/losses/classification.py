"""Cross-entropy against integer labels: per example, unreduced, in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    *,
    smoothing: float = 0.0,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """-log p[label] in nats; with smoothing a, the target is (1 - a) onehot + a / classes (Szegedy et al., arXiv
    1512.00567). where: examples that count; the others give 0 and no gradient.

    The label's logit is picked by comparison and not by a gather, whose gradient is a scatter over [batch, classes]."""
    logits = logits.astype(jnp.float32)
    if where is not None:
        logits = jnp.where(where[..., None], logits, 0.0)
    classes = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    chosen = jnp.sum(jnp.where(labels[..., None] == classes, logits, 0.0), axis=-1)
    loss = jax.nn.logsumexp(logits, axis=-1) - chosen
    if smoothing:
        loss = loss + smoothing * (chosen - jnp.mean(logits, axis=-1))
    return loss if where is None else jnp.where(where, loss, 0.0)
