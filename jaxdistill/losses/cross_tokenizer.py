"""Distillation between different tokenizers: likelihoods of spans, sorted probabilities, states at aligned places.

What is aligned with what comes from `data.alignment`. In float32, unreduced; the teacher is a target and gets no gradient.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.losses.classification import cross_entropy
from jaxdistill.losses.fused_vocab import CHUNK, vocab_logits
from jaxdistill.losses.mesh import cuts

CERTAIN = -1e-6  # a log-probability nearer to 0 is rounding: log p is a difference of two float32 of about 10
SPANS = 128  # spans that are summed at a time
IMPOSSIBLE = -1e30  # finite, so that the difference of two is 0


def gather_aligned(
    states: Float[Array, "batch teacher_time width"], aligned: Int[Array, "batch time"]
) -> tuple[Float[Array, "batch time width"], Bool[Array, "batch time"]]:
    """The teacher's states at the student's places, and where there is one; elsewhere zeros.

    aligned: place in the teacher's row, or -1 (see `alignment.Paired`); the last token of a full row is a label only, has
    no state, and counts as none."""
    where = (aligned >= 0) & (aligned < states.shape[1])
    taken = jnp.take_along_axis(states, jnp.where(where, aligned, 0)[..., None], axis=1)
    return jnp.where(where[..., None], taken, 0.0), where


def token_log_probs(
    hidden: Float[Array, "batch time width"],
    head: Float[Array, "vocab width"],
    labels: Int[Array, "batch time"],
    *,
    where: Bool[Array, "batch time"],
    vocab: int | None = None,
    chunk: int = CHUNK,
) -> Float[Array, "batch time"]:
    """log p(label) in nats from final states and output embedding, without ever holding [batch, time, vocab].

    Differentiable in hidden and head; a chunk's logits are formed again for its gradient.

    Args:
      where: tokens that count; the others give 0 and no gradient, whatever they hold.
      vocab: the number of real ids, where the head holds more rows: the rest is padding, which takes no probability.
      chunk: tokens whose logits exist at a time; any value gives the same result to float rounding.
    """

    def body(head, hidden, labels, where):
        return -cross_entropy(_logits(hidden, head, where, vocab), labels, where=where)

    return _by_parts(body, head, (hidden, labels, where), chunk)


def alm(
    teacher_log_probs: Float[Array, "batch teacher_time"],
    log_probs: Float[Array, "batch time"],
    teacher_spans: Int[Array, "batch teacher_time"],
    spans: Int[Array, "batch time"],
    *,
    tau: int | float = 100.0,
) -> tuple[Float[Array, "batch span"], Bool[Array, "batch span"]]:
    """Approximate likelihood matching (Minixhofer et al., arXiv 2503.20083): per span, the binary KL divergence

        x log(x / y) + (1 - x) log((1 - x) / (1 - y)),      x = p_teacher^(1 / tau), y = p_student^(1 / tau),

    where p is the probability of the span's bytes as the model's own tokens. Zero iff both are equal. Without the factor
    tau: the value falls as 1 / tau for large ones.

    Args:
      teacher_log_probs, log_probs: log p of each label, in nats.
      teacher_spans, spans: the span of each label, or -1 for none (see `alignment.Paired`). Labels without one give
        nothing, whatever they hold.
      tau: the larger, the more improbable spans count: at 1 their x and y are all but 0, whatever the ratio of p.

    Returns:
      (values, the spans there are). A span has a label on both sides, so there are at most min(time, teacher_time).
    """
    count = min(log_probs.shape[1], teacher_log_probs.shape[1])
    target, there = _span_sums(jax.lax.stop_gradient(teacher_log_probs), teacher_spans, count)
    found, here = _span_sums(log_probs, spans, count)
    where = there & here
    x, y = (_within_range(jnp.where(where, total, -1.0)) / tau for total in (target, found))
    one_minus_x, one_minus_y = -jnp.expm1(x), -jnp.expm1(y)
    values = jnp.exp(x) * (x - y) + one_minus_x * jnp.log(one_minus_x / one_minus_y)
    return jnp.where(where, values, 0.0), where


def uld(
    teacher_logits: Float[Array, "*batch teacher_vocab"],
    logits: Float[Array, "*batch vocab"],
    *,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """Universal logit distillation (Boizard et al., arXiv 2402.12030): sum |p - q| over the probabilities of each side in
    falling order, the shorter vocabulary padded by zeros. It compares shapes, blind to which token is meant: a baseline.

    where: positions that count; the others give 0 and no gradient. From 0 (iff equal but for their order) to below 2."""
    size = max(teacher_logits.shape[-1], logits.shape[-1])

    def falling(logits):
        logits = logits.astype(jnp.float32)
        if where is not None:
            logits = jnp.where(where[..., None], logits, 0.0)
        p = -jnp.sort(-jax.nn.softmax(logits), axis=-1)
        return jnp.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, size - p.shape[-1])])

    gap = jnp.sum(jnp.abs(jax.lax.stop_gradient(falling(teacher_logits)) - falling(logits)), axis=-1)
    return gap if where is None else jnp.where(where, gap, 0.0)


def chunked_uld(
    teacher_hidden: Float[Array, "batch time teacher_width"],
    teacher_head: Float[Array, "teacher_vocab teacher_width"],
    hidden: Float[Array, "batch time width"],
    head: Float[Array, "vocab width"],
    *,
    where: Bool[Array, "batch time"],
    vocab: int | None = None,
    teacher_vocab: int | None = None,
    chunk: int = CHUNK,
) -> Float[Array, "batch time"]:
    """`uld` from final states and output embeddings, without ever holding [batch, time, vocab].

    teacher_hidden: the teacher's states at the student's places, as `gather_aligned` gives them. teacher_vocab: as vocab, of the teacher's
    head. Else as `token_log_probs`."""
    teacher_hidden, teacher_head = jax.lax.stop_gradient((teacher_hidden, teacher_head))

    def body(heads, teacher_hidden, hidden, where):
        return uld(_logits(teacher_hidden, heads[0], where, teacher_vocab), _logits(hidden, heads[1], where, vocab), where=where)

    return _by_parts(body, (teacher_head, head), (teacher_hidden, hidden, where), chunk)


def _by_parts(body: Callable, heads, tokens: tuple, chunk: int) -> Float[Array, "batch time"]:
    """body(heads, part of each array of `tokens`) -> [batch, positions], part by part along the time axis.

    On a mesh every device walks its own tokens, and the gradients of the heads are summed once, after the walk."""
    mesh, batch, positions = cuts(tokens[0])
    walk = functools.partial(_walk, jax.checkpoint(body, prevent_cse=False), chunk)  # a scan prevents it already
    if not batch + positions:
        return walk(heads, tokens)
    spec = PartitionSpec(batch, positions)
    return jax.shard_map(walk, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec, check_vma=False)(heads, tokens)


def _walk(body: Callable, chunk: int, heads, tokens: tuple) -> Float[Array, "batch time"]:
    batch, time = tokens[0].shape[:2]
    size = max(1, min(chunk // batch, time))
    count = -(-time // size)

    def cut(x):  # padded with zeros, which in `where` are tokens that do not count
        x = jnp.pad(x, [(0, 0), (0, count * size - time), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    _, values = jax.lax.scan(lambda _, part: (None, body(heads, *part)), None, jax.tree.map(cut, tokens))
    return jnp.moveaxis(values, 0, 1).reshape(batch, -1)[:, :time]


def _logits(hidden, head, where, vocab) -> Float[Array, "batch time vocab"]:
    """Of tokens that count; the others must not reach a sum as 0 * inf. The head is cast to hidden's dtype within the part,
    so that its gradient is summed over the parts in its own."""
    return vocab_logits(jnp.where(where[..., None], hidden, 0.0), head, vocab=vocab)


def _span_sums(log_probs, spans, count: int) -> tuple[Float[Array, "batch span"], Bool[Array, "batch span"]]:
    """Sum of the log-probabilities of each span, 0 to count - 1, and whether it has any.

    By comparison with every number, a block of them at a time: a scatter is slow on a TPU, and on a GPU adds in no fixed order."""
    shape = (*spans.shape, min(count, SPANS))
    log_probs = log_probs.astype(jnp.float32)

    @jax.checkpoint
    def block(first):
        belongs = spans[..., None] == first + jax.lax.broadcasted_iota(spans.dtype, shape, 2)
        return jnp.sum(jnp.where(belongs, log_probs[..., None], 0.0), axis=1), jnp.any(belongs, axis=1)

    blocks = jax.lax.map(block, jnp.arange(0, count, shape[2], dtype=spans.dtype))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(len(spans), -1)[:, :count], blocks)


def _within_range(log_p):
    """Between IMPOSSIBLE and CERTAIN. Above CERTAIN the gradient is the one there: an all but certain student whose teacher
    is less so is pulled back, and not let go."""
    log_p = jnp.maximum(log_p, IMPOSSIBLE)
    return log_p + jax.lax.stop_gradient(jnp.minimum(log_p, CERTAIN) - log_p)
