"""Attention rows compared between models: per query, unreduced, in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

TINY = 1e-30  # of the teacher a probability below it counts as 0, as of a masked key; of the student it counts as this


def attention_kl(
    teacher: Float[Array, "*batch heads query key"],
    student: Float[Array, "*batch heads query key"],
    *,
    where: Bool[Array, "*batch query"] | None = None,
) -> Float[Array, "*batch query"]:
    """KL(teacher row || student row) in nats, mean over heads. Both are probabilities already (a softmax over them would
    flatten both; cf. MiniLM, Wang et al., arXiv 2002.10957), over the same keys. A key to which the teacher gives
    nothing adds nothing. where: queries that count; the others give 0 and no gradient, whatever they hold."""
    teacher, student = teacher.astype(jnp.float32), student.astype(jnp.float32)
    if where is not None:
        teacher, student = (jnp.where(where[..., None, :, None], x, 0.0) for x in (teacher, student))
    seen = teacher > TINY
    theirs, ours = (jnp.log(jnp.where(seen, jnp.maximum(x, TINY), 1.0)) for x in (teacher, student))
    return jnp.mean(jnp.sum(teacher * (theirs - ours), axis=-1), axis=-2)
