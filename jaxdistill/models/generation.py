"""Text from a causal model, one token at a time, with what was read kept in a KV cache: sampled, or greedy.

A row's tokens follow from the key, its number and its prompt alone: the other rows of the batch change nothing.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxdistill import UserError
from jaxdistill.models import kv_cache


class Generated(NamedTuple):
    """tokens: what was generated, the end of text included; 0 after it. mask: which of them there are. log_probs: natural
    logarithm of the probability that the model itself (temperature 1, every id below `vocab`) gives each; 0 where there is none."""

    tokens: Int[Array, "batch new"]
    mask: Bool[Array, "batch new"]
    log_probs: Float[Array, "batch new"]


def aligned(prompts: Sequence[Sequence[int]], width: int = 0) -> dict[str, np.ndarray]:
    """Prompts of unlike lengths -> {tokens, segments, positions} int32 [prompts, width], padded on the left. width: 0 for the
    longest prompt's."""
    width = width or max(map(len, prompts))
    rows = {name: np.zeros((len(prompts), width), np.int32) for name in ("tokens", "segments", "positions")}
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= width:
            raise UserError(f"prompt {i}: found {len(prompt)} tokens; accepted: from 1 to {width}")
        rows["tokens"][i, width - len(prompt) :] = prompt
        rows["segments"][i, width - len(prompt) :] = 1
        rows["positions"][i, width - len(prompt) :] = range(len(prompt))
    return rows


@functools.partial(jax.jit, static_argnames=("module", "new", "temperature", "top_p", "vocab"))
def generate(
    module: Any,
    params: dict,
    tokens: Int[Array, "batch prompt"],
    *,
    new: int,
    key: Key[Array, ""],
    segments: Int[Array, "batch prompt"] | None = None,
    positions: Int[Array, "batch prompt"] | None = None,
    rows: Int[Array, " batch"] | None = None,
    temperature: int | float = 1.0,
    top_p: int | float = 1.0,
    eos: int | Int[Array, ""] | None = None,
    vocab: int | None = None,
) -> Generated:
    """Continues every prompt by at most `new` tokens.

    Args:
      module: a GPT2 or Llama of `params`.
      tokens, segments, positions: the prompts, as the module takes them (None: one whole document a row). What is generated
        belongs to the segment of the row's last token; where that is padding (0), nothing is.
      key: token t of a row is drawn with fold_in(fold_in(key, the row's number), t).
      rows: numbers of the rows; None: 0, 1, 2...
      temperature: of the distribution that is drawn from; 0: the likeliest token (and of equals the first).
      top_p: draws from the likeliest tokens that together have this share (Holtzman et al. 2020, arXiv 1904.09751), ties in.
      eos: the id that ends a row; None: nothing does.
      vocab: number of real ids, where the model's head holds more; the others are never drawn.

    Raises:
      UserError: a temperature below 0, a share that is none, or more tokens than the model has positions.
    """
    if not temperature >= 0:
        raise UserError(f"temperature: found {temperature}; accepted: 0 or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p: found {top_p}; accepted: above 0, and at most 1")
    batch, width = tokens.shape
    slots = width + new - 1  # the last token is drawn, but not read
    if new < 1 or slots > module.config.length:
        raise UserError(f"new: found {new} after prompts of {width} tokens; accepted: from 1 to {module.config.length - width + 1} "
                        f"(the model has {module.config.length} positions)")
    segments = jnp.ones_like(tokens) if segments is None else segments
    positions = jnp.broadcast_to(jnp.arange(width), tokens.shape) if positions is None else positions
    rows = jnp.arange(batch) if rows is None else rows
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)

    def read(cache, tokens, segments, positions):
        logits, features = module.apply({"params": params}, tokens, segments=segments, positions=positions, cache=cache)
        return logits[:, -1, :vocab], kv_cache.extended(cache, features, segments)

    cache = kv_cache.empty(module, batch, slots)
    if width > 1:  # all but the last token, whose logits are the first that are wanted
        _, cache = read(cache, tokens[:, :-1], segments[:, :-1], positions[:, :-1])

    def unfinished(state):
        t, _, _, alive, _ = state
        return (t < new) & jnp.any(alive)

    def step(state):
        t, last, cache, alive, out = state
        segment = jnp.where(alive, segments[:, -1], 0)
        logits, cache = read(cache, last[:, None], segment[:, None], positions[:, -1:] + t)
        chosen = _draw(logits, keys, t, temperature, top_p)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[:, None], axis=1)[:, 0]
        found = Generated(jnp.where(alive, chosen, 0), alive, jnp.where(alive, log_prob, 0.0))
        out = jax.tree.map(lambda all, one: jax.lax.dynamic_update_slice_in_dim(all, one[:, None], t, axis=1), out, found)
        return t + 1, found.tokens, cache, alive if eos is None else alive & (chosen != eos), out

    nothing = Generated(*(jnp.zeros((batch, new), dtype) for dtype in (tokens.dtype, bool, jnp.float32)))
    start = jnp.zeros((), jnp.int32), tokens[:, -1], cache, segments[:, -1] > 0, nothing
    return jax.lax.while_loop(unfinished, step, start)[-1]


def _draw(logits: Float[Array, "batch vocab"], keys, t, temperature, top_p) -> Int[Array, " batch"]:
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / temperature
    if top_p < 1:
        ranked = -jnp.sort(-logits, axis=-1)
        share = jax.nn.softmax(ranked)
        kept = jnp.cumsum(share, axis=-1) - share < top_p  # what comes before it is not enough
        least = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, t), logits.shape[1:]))(keys)
    return jnp.argmax(logits + noise, axis=-1)
