"""What is measured inside the step: per group norms, and which leaves had a gradient. Plain arrays in and out."""

import jax
import jax.numpy as jnp
import optax


def group_norms(grads, updates, params, groups) -> dict:
    """Group name -> gradient norm (before the clip), parameter norm, and update / parameter norm.

    All trees hold the trainable leaves only; `groups` is the tree of their Group."""
    members: dict[str, list[int]] = {}
    for index, group in enumerate(jax.tree.leaves(groups)):
        members.setdefault(group.name, []).append(index)
    leaves = [jax.tree.leaves(tree) for tree in (grads, updates, params)]
    found = {}
    for name, indices in members.items():
        grad, update, param = (optax.tree.norm([tree[index] for index in indices]) for tree in leaves)
        ratio = jnp.where(param > 0, update / jnp.maximum(param, 1e-30), 0.0)
        found[name] = {"grad_norm": grad, "param_norm": param, "update_ratio": ratio}
    return found


def moved(grads) -> jax.Array:
    """bool [leaves]: which leaves have a gradient that is not all zero, in the order of jax.tree.leaves."""
    return jnp.stack([jnp.any(leaf != 0) for leaf in jax.tree.leaves(grads)])


@jax.jit
def fingerprint(tree) -> jax.Array:
    """uint32 checksum of every bit of every leaf, the same on any mesh.

    A position-weighted sum in modular arithmetic: its order does not matter, so shards may add up in any order."""

    def one(leaf):
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if leaf.dtype == jnp.bool_ or leaf.dtype.itemsize == 1:
            bits = leaf.astype(jnp.uint8).astype(jnp.uint32)
        elif leaf.dtype.itemsize == 2:
            bits = jax.lax.bitcast_convert_type(leaf, jnp.uint16).astype(jnp.uint32)
        else:
            bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
        bits = bits.ravel()
        place = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(2654435761) + jnp.uint32(1)
        return jnp.sum((bits ^ (bits >> 15)) * (place | 1), dtype=jnp.uint32)

    mixed = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(tree):
        mixed = mixed * jnp.uint32(16777619) + one(leaf)
    return mixed
