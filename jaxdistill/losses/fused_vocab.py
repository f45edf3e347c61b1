"""Next-token cross-entropy and distillation from hidden states and heads, without ever holding [batch, time, vocab].

The sequence is scanned in chunks, so that the batch axis stays sharded and a chunk's logits stay near the core. The
gradient is formed in the forward pass, while the logits are there: no second pass over the head, no residuals but the
gradient itself.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

CHUNK = 256  # tokens (batch x positions) whose logits exist at a time


class _Static(NamedTuple):
    chunk: int
    smoothing: float
    temperature: float | None  # None: traced


def fused_vocab_loss(
    hidden: Float[Array, "batch time width"],
    head: Float[Array, "vocab width"],
    labels: Int[Array, "batch time"],
    *,
    scale: dict,
    where: Bool[Array, "batch time"],
    teacher: tuple[Float[Array, "batch time teacher_width"], Float[Array, "vocab teacher_width"]] | None = None,
    temperature: float | Float[Array, ""] = 1.0,
    smoothing: float = 0.0,
    chunk: int = CHUNK,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """total = scale["lm"] * sum CE + scale["kd"] * sum T^2 KL(teacher^T || student^T), and the two sums by name.

    Args:
      hidden, head: the student's final states and output embedding; logits are hidden @ head.T, in hidden's dtype with
        float32 accumulation.
      scale: weight / count of the whole batch, for each of "lm" and "kd" that is wanted. Traced; not differentiated.
      where: tokens that count; the others give nothing, whatever they hold.
      teacher: the teacher's (hidden, head) of the same vocabulary; a target, gets no gradient.
      temperature: of kd. A Python float is compiled in (1.0 spares a softmax), an array may move.
      smoothing: of lm, as in `classification.cross_entropy`.
      chunk: tokens whose logits exist at a time; any value gives the same result to float rounding.

    Returns:
      total, differentiable in hidden and head; the sums, to be looked at: differentiating them is a TypeError at trace.

    The definitions are `classification.cross_entropy` and `divergences.forward_kl`, to which the tests hold this.
    """
    static = _Static(chunk, smoothing, temperature if isinstance(temperature, (int, float)) else None)
    fixed = jax.lax.stop_gradient((scale, teacher if "kd" in scale else None, jnp.asarray(temperature, jnp.float32)))
    return _fused(static, hidden, head, labels, where, *fixed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(static, hidden, head, labels, where, scale, teacher, temperature):
    total, sums, _, _ = _scan(static, (False, False), hidden, head, labels, where, scale, teacher, temperature)
    return total, sums


def _forward(static, hidden, head, *rest):
    wanted = hidden.perturbed, head.perturbed
    rest = jax.tree.map(lambda x: x.value, rest, is_leaf=lambda x: hasattr(x, "perturbed"))
    total, sums, d_hidden, d_head = _scan(static, wanted, hidden.value, head.value, *rest)
    return (total, sums), (d_hidden, d_head)


def _backward(static, gradients, cotangents):
    total, sums = cotangents
    if any(not isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(sums, is_leaf=lambda x: isinstance(x, SymbolicZero))):
        raise TypeError("fused_vocab_loss: only the total can be differentiated; its gradient already carries every scale")
    if isinstance(total, SymbolicZero):
        return (None,) * 7
    d_hidden, d_head = (None if g is None else (total * g.astype(jnp.float32)).astype(g.dtype) for g in gradients)
    return d_hidden, d_head, None, None, None, None, None


_fused.defvjp(_forward, _backward, symbolic_zeros=True)


def _scan(static, wanted, hidden, head, labels, where, scale, teacher, temperature):
    """(total, sums, gradient of hidden or None, gradient of head or None)."""
    batch, time, width = hidden.shape
    parts = cut((hidden, labels, where, None if teacher is None else teacher[0]), static.chunk)
    count, _, size = parts[1].shape
    matrix = head.astype(hidden.dtype)
    teacher_matrix = None if teacher is None else teacher[1].astype(teacher[0].dtype)
    names = sorted(scale)

    def body(carry, part):
        sums, d_head = carry
        rows, labels, where, teacher_rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), part)
        rows = jnp.where(where[:, None], rows, 0)  # a token that does not count must not reach a sum as 0 * inf
        logits = _logits(rows, matrix)
        teacher_logits = None
        if teacher_rows is not None:
            teacher_logits = _logits(jnp.where(where[:, None], teacher_rows, 0), teacher_matrix)
        values, d_logits = _chunk(static, logits, labels, where, teacher_logits, scale, temperature, any(wanted))
        sums = {name: sums[name] + values[name] for name in names}
        d_rows = None
        if d_logits is not None:
            d_logits = d_logits.astype(rows.dtype)
        if wanted[0]:
            d_rows = jnp.einsum("nv,vd->nd", d_logits, matrix, preferred_element_type=jnp.float32)
            d_rows = d_rows.astype(hidden.dtype).reshape(batch, size, width)
        if wanted[1]:
            d_head = d_head + jnp.einsum("nv,nd->vd", d_logits, rows, preferred_element_type=jnp.float32)
        return (sums, d_head), d_rows

    start = {name: jnp.zeros((), jnp.float32) for name in names}, jnp.zeros(head.shape, jnp.float32) if wanted[1] else None
    (sums, d_head), d_rows = jax.lax.scan(body, start, parts)
    d_hidden = None
    if wanted[0]:
        d_hidden = jnp.moveaxis(d_rows, 0, 1).reshape(batch, count * size, width)[:, :time]
    total = sum((scale[name] * sums[name] for name in names), jnp.zeros((), jnp.float32))
    return total, sums, d_hidden, None if d_head is None else d_head.astype(head.dtype)


def cut(tree, chunk: int):
    """[batch, time, ...] -> [chunks, batch, positions, ...] of every leaf, so that a part holds about `chunk` tokens and the
    batch axis stays whole; padded with zeros, which in `where` are tokens that do not count."""

    def one(x):
        batch, time = x.shape[:2]
        size = max(1, min(chunk // batch, time))
        count = -(-time // size)
        x = jnp.pad(x, [(0, 0), (0, count * size - time), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    return jax.tree.map(one, tree)


def _logits(rows, matrix):
    return jnp.einsum("nd,vd->nv", rows, matrix, preferred_element_type=jnp.float32)


def _chunk(static, logits, labels, where, teacher_logits, scale, temperature, gradient: bool):
    """Sums of one chunk, and the gradient of its share of the total to the logits [tokens, vocab]."""
    vocab = logits.shape[-1]
    count = lambda x: jnp.sum(jnp.where(where, x, 0.0))  # noqa: E731
    values, d_logits = {}, 0.0
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    if "lm" in scale:
        hit = labels[:, None] == jax.lax.broadcasted_iota(labels.dtype, logits.shape, 1)
        chosen = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        loss = log_sum - chosen
        if static.smoothing:
            loss = loss + static.smoothing * (chosen - jnp.mean(logits, axis=-1))
        values["lm"] = count(loss)
        if gradient:
            target = jnp.where(hit, 1.0 - static.smoothing, 0.0) + static.smoothing / vocab
            d_logits = scale["lm"] * (jnp.exp(logits - log_sum[:, None]) - target)
    if "kd" in scale:
        if static.temperature != 1.0:
            logits, teacher_logits = logits / temperature, teacher_logits / temperature
            log_sum = jax.nn.logsumexp(logits, axis=-1)
        teacher_log_sum = jax.nn.logsumexp(teacher_logits, axis=-1)
        p = jnp.exp(teacher_logits - teacher_log_sum[:, None])
        divergence = jnp.sum(p * (teacher_logits - logits), axis=-1) - teacher_log_sum + log_sum
        values["kd"] = temperature**2 * count(divergence)
        if gradient:
            d_logits = d_logits + scale["kd"] * temperature * (jnp.exp(logits - log_sum[:, None]) - p)
    return values, jnp.where(where[:, None], d_logits, 0.0) if gradient else None
