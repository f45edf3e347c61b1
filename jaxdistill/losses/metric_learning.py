"""Batch-hard triplet loss: of each anchor's identity the farthest image, of all others the nearest. Per anchor, in float32.

Both need the whole batch: a term of `whole`, never of a micro-batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Hardest(NamedTuple):
    """Euclidean distances of each anchor to its hardest positive and negative; both 0 where `counts` is False: an anchor that
    lacks either."""

    positive: Float[Array, " batch"]
    negative: Float[Array, " batch"]
    counts: Bool[Array, " batch"]


def hardest(
    features: Float[Array, "batch width"], labels: Int[Array, " batch"], *, where: Bool[Array, " batch"] | None = None
) -> Hardest:
    """The farthest other example of the same label, and the nearest of another; of equally far ones the first.

    where: examples that count; the others are neither anchors nor compared with, whatever they hold. The gradient at
    distance 0 (the same image twice, a collapsed model) is 0: that of the square root alone is infinite there."""
    features = features.astype(jnp.float32)
    where = jnp.ones(labels.shape, bool) if where is None else where
    features = jnp.where(where[:, None], features, 0.0)
    pairs = where[:, None] & where[None, :]
    same = labels[:, None] == labels[None, :]
    positive, negative = pairs & same & ~jnp.eye(len(labels), dtype=bool), pairs & ~same
    counts = jnp.any(positive, axis=1) & jnp.any(negative, axis=1)

    # Chosen by differences, as |a|^2 + |b|^2 - 2ab loses what is near in rounding; only the chosen pairs are differentiated.
    fixed = jax.lax.stop_gradient(features)
    squared = jnp.sum(jnp.square(fixed[:, None, :] - fixed[None, :, :]), axis=-1)
    farthest = jnp.argmax(jnp.where(positive, squared, -jnp.inf), axis=1)
    nearest = jnp.argmin(jnp.where(negative, squared, jnp.inf), axis=1)
    return Hardest(_distance(features, farthest, counts), _distance(features, nearest, counts), counts)


def batch_hard_triplet(
    features: Float[Array, "batch width"],
    labels: Int[Array, " batch"],
    *,
    margin: int | float | None = 0.3,
    where: Bool[Array, " batch"] | None = None,
) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
    """max(0, margin + d(hardest positive) - d(hardest negative)) per anchor (Hermans et al., arXiv 1703.07737), with Euclidean
    distances, not squared; margin None: its soft form log(1 + exp(d+ - d-)).

    Returns (values, anchors that count): 0 for the others, which lack a positive or a negative. A model that maps all images to
    one point gives exactly the margin (log 2), and the gradient there is 0: a loss that stands still at the margin."""
    found = hardest(features, labels, where=where)
    gap = found.positive - found.negative
    values = jax.nn.softplus(gap) if margin is None else jnp.maximum(gap + margin, 0.0)
    return jnp.where(found.counts, values, 0.0), found.counts


def _distance(features, partner, counts) -> Float[Array, " batch"]:
    """|x_i - x_partner(i)|. Partners are taken by a product with 0 and 1, exact at the highest precision: the gradient of a
    gather is a scatter, which adds in no fixed order on a GPU."""
    chosen = jax.nn.one_hot(partner, len(features), dtype=jnp.float32)
    other = jnp.matmul(chosen, features, precision=jax.lax.Precision.HIGHEST)
    squared = jnp.where(counts, jnp.sum(jnp.square(features - other), axis=-1), 0.0)
    apart = squared != 0  # not `> 0`: NaN must stay NaN
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1.0)), 0.0)
