"""What losses over a softmax are made of. All write it so: XLA then computes it once for all losses of the same logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def shifted(logits: Float[Array, "*batch classes"]) -> tuple[Float[Array, "*batch classes"], Float[Array, "*batch"]]:
    """(logits less their largest, the largest), the latter as a constant: of a softmax, and of a sum that it is added to again, no
    gradient sees it."""
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    return logits - largest[..., None], largest


def log_sum_exp(logits: Float[Array, "*batch classes"]) -> Float[Array, "*batch"]:
    """log sum exp(logits)."""
    rest, largest = shifted(logits)
    return jnp.log(jnp.sum(jnp.exp(rest), axis=-1)) + largest
