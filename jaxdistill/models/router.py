"""The student-aware router: for every token, which of the teacher's features are worth the student's attention now?

scores = 0.3 capacity + 0.25 gap + 0.25 importance + 0.2 gate, softmax at a temperature that falls, and of it the top k, with k
growing (both traced, so that nothing recompiles).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdistill.losses.hidden import rms_normalised

SHARES = {"capacity": 0.3, "gap": 0.25, "importance": 0.25, "gate": 0.2}
NOISE = 0.1  # standard deviation on the gate, while training


class Router(nn.Module):
    """E teacher features (its blocks, and the experts of a mixture-of-experts teacher) -> routing weights for each token."""

    width: int = 32  # of the hidden layer that looks at the gap
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        student: Float[Array, "batch time width"],
        projected: Float[Array, "batch time teacher_width"],
        features: Float[Array, "batch time features teacher_width"],
        *,
        k: Float[Array, ""] | float,
        temperature: Float[Array, ""] | float,
        key: Any = None,
    ) -> tuple[Float[Array, "batch time features"], Float[Array, "batch time features"]]:
        """-> (weights, probabilities). `weights` are zero but for the k best and sum to 1; `probabilities` are the softmax over
        all, which the load balance needs: of one chosen feature the weight is 1 whatever the scores, and tells them nothing.

        projected: the student in the teacher's space. features: targets, under stop_gradient by the caller. key: of the noise;
        None, without."""
        count = features.shape[2]
        first, later = (rms_normalised(x.astype(self.dtype)) for x in (projected, features))
        parts = {
            "capacity": nn.Dense(count, dtype=self.dtype, name="capacity")(rms_normalised(student.astype(self.dtype))),
            "importance": self.param("importance", nn.initializers.zeros, (count,))[None, None],
            "gate": nn.Dense(count, dtype=self.dtype, name="gate")(first),
        }
        gap = nn.Dense(self.width, dtype=self.dtype, name="gap_student")(first)[:, :, None]
        gap = gap + nn.Dense(self.width, use_bias=False, dtype=self.dtype, name="gap_teacher")(later)
        parts["gap"] = nn.Dense(1, use_bias=False, dtype=self.dtype, name="gap")(nn.gelu(gap))[..., 0]
        if key is not None:
            parts["gate"] = parts["gate"] + NOISE * jax.random.normal(key, parts["gate"].shape, parts["gate"].dtype)
        scores = sum(share * parts[name].astype(jnp.float32) for name, share in SHARES.items())
        probabilities = jax.nn.softmax(scores / temperature, axis=-1)
        kept = jnp.where(rank(scores) < jnp.maximum(jnp.round(k), 1.0), probabilities, 0.0)
        return kept / jnp.sum(kept, axis=-1, keepdims=True), probabilities


def rank(scores: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
    """How many features stand before each one: 0 for the best; of equals, the first is before."""
    ahead = scores[..., None, :] > scores[..., :, None]
    earlier = jnp.tri(scores.shape[-1], k=-1, dtype=bool)  # [i, j]: j < i
    ties = (scores[..., None, :] == scores[..., :, None]) & jnp.broadcast_to(earlier, ahead.shape)
    return jnp.sum(ahead | ties, axis=-1).astype(jnp.float32)
