"""Layers that several models have."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


class LayerNorm(nn.Module):
    """LayerNorm over the last axis (Ba et al. 2016), in float32 with a two-pass variance; returns `dtype`. x: [..., width]."""

    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return (x * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(bias, x.shape)).astype(self.dtype)


def dropout(x: Float[Array, "*batch width"], rate: float, key: Key[Array, ""] | None) -> Float[Array, "*batch width"]:
    """Each number 0 with probability `rate`, else divided by 1 - rate (Srivastava et al. 2014); x as it is without a key."""
    if key is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), jnp.zeros((), x.dtype))
