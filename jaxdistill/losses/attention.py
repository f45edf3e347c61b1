"""Attention rows compared between models: per query, unreduced, in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

TINY = 1e-30  # a probability below it counts as 0: the key is masked, or beyond float32's exponents


def attention_kl(
    teacher: Float[Array, "*batch heads query key"],
    student: Float[Array, "*batch heads query key"],
    *,
    where: Bool[Array, "*batch query"] | None = None,
) -> Float[Array, "*batch query"]:
    """KL(teacher row || student row) in nats, mean over heads. Both are probabilities already (a softmax over them would
    flatten both; cf. MiniLM, Wang et al., arXiv 2002.10957), over the same keys. A key to which either side gives nothing
    adds nothing. where: queries that count; the others give 0 and no gradient, whatever they hold."""
    teacher, student = teacher.astype(jnp.float32), student.astype(jnp.float32)
    if where is not None:
        teacher, student = (jnp.where(where[..., None, :, None], x, 0.0) for x in (teacher, student))
    seen = (teacher > TINY) & (student > TINY)
    logs = (jnp.log(jnp.where(seen, x, 1.0)) for x in (teacher, student))
    ours, theirs = next(logs), next(logs)
    return jnp.mean(jnp.sum(teacher * (ours - theirs), axis=-1), axis=-2)
