"""Learned loss weights by uncertainty: 1/2 sum(exp(-w_i) L_i + w_i) (Kendall et al., arXiv 1705.07115, in the form of DCAL,
arXiv 2205.02151).

w_i is the log of a variance, free and 0 at the start. For a fixed L_i the minimum is at w_i = log L_i, where the term is
(1 + log L_i) / 2: the total is negative once losses are below 1/e, and that is as it should be. A mean of the losses is what
tells whether a run improves, not this total, which falls as w follows them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

Bounds = tuple[int | float, int | float] | None


def factor(w: Float[Array, "*terms"], bounds: Bounds = None) -> Float[Array, "*terms"]:
    """exp(-w) / 2, the multiplier of a loss. bounds (lo, hi): of w, in value exactly clip(w, lo, hi).

    Below lo the gradient is the one at lo, and for a loss above 0 it points back. Above hi it is 0, as it would point on."""
    return 0.5 * jnp.exp(-_clipped(w, bounds, lambda w, lo, hi: w <= hi))


def prior(ws: PyTree[Float[Array, "..."]], bounds: Bounds = None) -> Float[Array, ""]:
    """sum(w) / 2 over all leaves of `ws`; without it every w grows and every loss is switched off. bounds: as in `factor`.

    Above hi the gradient is 1/2 and points back; below lo it is 0. So a w outside always has a gradient, of `factor` or of
    this, and it always points back: w goes no further past a bound than one step, and leaves it when its loss moves. With a plain
    clip (torch.clamp) both gradients are 0 outside, and a w that once got there stays for good."""
    return 0.5 * sum((jnp.sum(_clipped(w, bounds, lambda w, lo, hi: w >= lo)) for w in jax.tree.leaves(ws)), jnp.zeros(()))


def _clipped(w, bounds: Bounds, moves):
    """clip(w) in value; its gradient 1 where moves(w, lo, hi), else 0."""
    w = w.astype(jnp.float32)
    if bounds is None:
        return w
    fixed = jax.lax.stop_gradient(w)
    return jnp.clip(fixed, *bounds) + jnp.where(moves(fixed, *bounds), w - fixed, 0.0)
