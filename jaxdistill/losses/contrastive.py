"""Contrast of whole examples: which of the teacher's vectors in the batch belongs to this student's vector?"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

EPSILON = 1e-6


def normalised(x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    """x / |x| in float32; 0 for 0, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + EPSILON**2)


def mean_pool(states: Float[Array, "batch time width"], where: Bool[Array, "batch time"]) -> Float[Array, "batch width"]:
    """Mean over the valid tokens of each example, in float32; 0 where there is none."""
    total = jnp.sum(jnp.where(where[..., None], states.astype(jnp.float32), 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(where, axis=1, dtype=jnp.float32), 1.0)[:, None]


def info_nce(
    student: Float[Array, "examples width"],
    teacher: Float[Array, "examples width"],
    *,
    temperature: float = 0.07,
    where: Bool[Array, " examples"] | None = None,
) -> Float[Array, " examples"]:
    """-log softmax of cosine / temperature at the own teacher's vector, in nats (van den Oord et al., arXiv 1807.03748; as a
    distillation loss Tian et al., arXiv 1910.10699). log(examples) where nothing is told apart.

    where: examples that count: the others are neither queries nor negatives, and give 0."""
    if where is None:
        where = jnp.ones(student.shape[:1], bool)
    student, teacher = (jnp.where(where[:, None], normalised(jnp.where(where[:, None], x, 0.0)), 0.0) for x in (student, teacher))
    scores = jnp.where(where[None, :], student @ teacher.T / temperature, -jnp.inf)
    scores = jnp.where(where[:, None], scores, 0.0)  # a row without any candidate has no softmax
    return jnp.where(where, jax.nn.logsumexp(scores, axis=-1) - jnp.diagonal(scores), 0.0)
