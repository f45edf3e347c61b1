"""Divergences between two categorical distributions given by logits: per token, unreduced, in float32.

A logit of -inf on either side means that the token is outside the shared vocabulary: the union is left out, in
value and gradient. None of them carries the factor T^2; the loss that uses a temperature multiplies by it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

OUTSIDE = -1e30  # finite, so that 0 * (log p - log q) stays 0 and no gradient is NaN


def _prepare(teacher_logits, student_logits, temperature):
    """Both in float32, divided by T, with what is outside either vocabulary outside both."""
    teacher, student = teacher_logits.astype(jnp.float32), student_logits.astype(jnp.float32)
    outside = jnp.isneginf(teacher) | jnp.isneginf(student)
    return jnp.where(outside, OUTSIDE, teacher / temperature), jnp.where(outside, OUTSIDE, student / temperature)


def forward_kl(
    teacher_logits: Float[Array, "*batch vocab"],
    student_logits: Float[Array, "*batch vocab"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """KL(teacher || student) in nats at temperature T (Hinton et al., arXiv 1503.02531), without T^2.

    where: tokens that count; the others give 0 and no gradient. Zero iff both distributions are equal."""
    teacher, student = _prepare(teacher_logits, student_logits, temperature)
    if where is not None:  # before the arithmetic: a non-finite logit of a masked token must not reach a gradient
        teacher, student = (jnp.where(where[..., None], logits, 0.0) for logits in (teacher, student))
    gap = jnp.sum(jax.nn.softmax(teacher) * (teacher - student), axis=-1)
    return gap - jax.nn.logsumexp(teacher, axis=-1) + jax.nn.logsumexp(student, axis=-1)
