"""What a causal model has read so far: keys and values of every block, so that a further token costs one token's work.

A cache is an argument, never hidden state: `module.apply(..., cache=cache)` adds "keys_i" and "values_i" to the features, and
`extended` makes the next cache of them. Its slots are filled in order, the same ones in every row; rows of unlike length
are aligned on the right, with padding (segment 0) before them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class KVCache(NamedTuple):
    """keys, values: of each block, [batch, slots, kv_heads, head_dim] (after rotary positions, if any). segments: of the token
    in each slot, 0 in padding and in slots not filled yet. used: slots filled."""

    keys: tuple[Float[Array, "batch slots kv_heads head_dim"], ...]
    values: tuple[Float[Array, "batch slots kv_heads head_dim"], ...]
    segments: Int[Array, "batch slots"]
    used: Int[Array, ""]

    def block(self, i: int) -> tuple:
        """What block i is given: (its keys, its values, slots filled)."""
        return self.keys[i], self.values[i], self.used


def empty(module: Any, batch: int, slots: int) -> KVCache:
    """A cache of `slots` tokens for a GPT2 or Llama, with nothing read."""
    c = module.config
    blocks = tuple(jnp.zeros((batch, slots, c.kv_heads, c.head_dim), module.dtype) for _ in range(c.depth))
    return KVCache(blocks, blocks, jnp.zeros((batch, slots), jnp.int32), jnp.zeros((), jnp.int32))


def visible(cache: KVCache, segments: Int[Array, "batch time"]) -> Bool[Array, "batch 1 time slots"]:
    """Which slots each of the next tokens sees: its own, and earlier ones of its segment (padding sees padding), as without
    a cache."""
    slots = jnp.arange(cache.segments.shape[1])
    earlier = slots[None] <= cache.used + jnp.arange(segments.shape[1])[:, None]
    return (segments[:, None, :, None] == _append(cache.segments, segments, cache.used)[:, None, None]) & earlier[None, None]


def append(block: tuple, k: Float[Array, "batch time heads channels"], v: Float[Array, "batch time heads channels"]) -> tuple:
    """A block's keys and values with those of the next tokens in their slots."""
    keys, values, used = block
    return _append(keys, k, used), _append(values, v, used)


def extended(cache: KVCache, features: dict, segments: Int[Array, "batch time"]) -> KVCache:
    """The cache after tokens of these `segments` were read with it and gave these `features`."""
    keys, values = (tuple(features[f"{name}_{i}"] for i in range(len(cache.keys))) for name in ("keys", "values"))
    return KVCache(keys, values, _append(cache.segments, segments, cache.used), cache.used + segments.shape[1])


def _append(slots, new, used):
    return jax.lax.dynamic_update_slice_in_dim(slots, new, used, axis=1)
