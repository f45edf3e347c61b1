"""Hidden states compared between models: per token, unreduced, in float32, blind to the scale of either side.

Both follow FitNets (Romero et al., arXiv 1412.6550), with the student projected into the teacher's space and never the
other way: a trained projection of the teacher could meet the student at a constant.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

EPSILON = 1e-8


def layer_map(student_depth: int, teacher_depth: int) -> tuple[int, ...]:
    """The teacher's block for each student's block s: ceil((s + 1) * teacher / student) - 1; the last matches the last."""
    return tuple(-(-(s + 1) * teacher_depth // student_depth) - 1 for s in range(student_depth))


def rms_normalised(x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    """Divided by its own root mean square: what is left is the direction."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPSILON)


def _masked(x, where):
    """float32, and ones where a token does not count: a norm there has a gradient, and a NaN no way out."""
    x = x.astype(jnp.float32)
    return x if where is None else jnp.where(where[..., None], x, 1.0)


def rms_distance(
    student: Float[Array, "*batch width"], teacher: Float[Array, "*batch width"], *, where: Bool[Array, "*batch"] | None = None
) -> Float[Array, "*batch"]:
    """Mean squared difference after each side is divided by its own root mean square: 0 iff they point the same way, 2 for
    unrelated states, 4 for opposite ones. where: tokens that count; the others give 0 and no gradient."""
    student, teacher = (rms_normalised(_masked(x, where)) for x in (student, teacher))
    distance = jnp.mean((student - teacher) ** 2, axis=-1)
    return distance if where is None else jnp.where(where, distance, 0.0)


def cosine_distance(
    student: Float[Array, "*batch width"], teacher: Float[Array, "*batch width"], *, where: Bool[Array, "*batch"] | None = None
) -> Float[Array, "*batch"]:
    """1 - cosine, from 0 to 2: half of `rms_distance` (up to its epsilon)."""
    return 0.5 * rms_distance(student, teacher, where=where)


DISTANCES = {"rms": rms_distance, "cosine": cosine_distance}
