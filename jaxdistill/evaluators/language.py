"""Language-model evaluation: bits per UTF-8 byte, NLL, perplexity; against a teacher: KL at T = 1 and agreement.

Pure in parameters and data: no loss weight, temperature schedule, label smoothing or step is seen here.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.losses.classification import cross_entropy
from jaxdistill.losses.divergences import forward_kl
from jaxdistill.losses.fused_vocab import cut

CHUNK = 512  # tokens (batch x positions) whose logits exist at a time


def sums(
    logits: Float[Array, "batch time vocab"],
    labels: Int[Array, "batch time"],
    where: Bool[Array, "batch time"],
    token_bytes: Int[Array, " vocab"],
    teacher_logits: Float[Array, "batch time vocab"] | None = None,
) -> dict[str, Float[Array, ""]]:
    """Sums over the valid tokens of one batch: tokens, bytes, nll, and with a teacher kl, top1, top5."""
    count = lambda hits: jnp.sum(jnp.where(where, hits, 0), dtype=jnp.float32)  # noqa: E731
    found = {
        "tokens": count(1.0), "bytes": count(token_bytes[labels]),
        "nll": jnp.sum(cross_entropy(logits, labels, where=where)),
    }
    if teacher_logits is not None:
        choice = jnp.argmax(teacher_logits, axis=-1)[..., None]
        above = jnp.sum(logits > jnp.take_along_axis(logits, choice, axis=-1), axis=-1)
        found |= {
            "kl": jnp.sum(forward_kl(teacher_logits, logits, where=where)),
            "top1": count(above == 0), "top5": count(above < 5),
        }
    return found


def chunked_sums(hidden_and_head: tuple, labels, where, token_bytes, teacher: tuple | None = None, *, chunk: int = CHUNK) -> dict:
    """`sums`, from (hidden [batch, time, width], head [vocab, width]) of the student and of the teacher: the sequence is
    scanned, and [batch, time, vocab] never held."""
    heads = [pair and pair[1].astype(pair[0].dtype) for pair in (hidden_and_head, teacher)]

    def one(part):
        labels, where, *states = part
        logits = [None if rows is None else jnp.einsum("btd,vd->btv", rows, head, preferred_element_type=jnp.float32)
                  for rows, head in zip(states, heads, strict=True)]
        return sums(logits[0], labels, where, token_bytes, logits[1])

    parts = cut((labels, where, hidden_and_head[0], teacher and teacher[0]), chunk)
    return jax.tree.map(jnp.sum, jax.lax.map(one, parts))


def finish(stacked: dict[str, np.ndarray]) -> dict[str, float]:
    """Stacked sums of all batches -> bits_per_byte (the headline: comparable between tokenizers), nll (nats a token),
    perplexity (exp of it), and teacher_kl (nats a token), top1_agreement, top5_agreement: how often the teacher's
    first choice is the student's, or among its first five."""
    total = {name: float(np.sum(values, dtype=np.float64)) for name, values in stacked.items()}
    tokens = max(total["tokens"], 1.0)
    nll = total["nll"] / tokens
    found = {
        "bits_per_byte": total["nll"] / math.log(2) / max(total["bytes"], 1.0),
        "nll": nll, "perplexity": math.exp(nll) if nll < 700 else math.inf,
    }
    if "kl" in total:
        found |= {"teacher_kl": total["kl"] / tokens, "top1_agreement": total["top1"] / tokens,
                  "top5_agreement": total["top5"] / tokens}
    return found
