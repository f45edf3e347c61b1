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
from jaxdistill.losses.fused_vocab import parts, teacher_logits, vocab_logits
from jaxdistill.losses.targets import Mixture

CHUNK = 512  # tokens (batch x positions) whose logits exist at a time


def sums(
    logits: Float[Array, "batch time vocab"],
    labels: Int[Array, "batch time"],
    where: Bool[Array, "batch time"],
    token_bytes: Int[Array, " vocab"],
    teacher: Float[Array, "batch time vocab"] | None = None,
) -> dict[str, Float[Array, ""]]:
    """Sums over the valid tokens of one batch: tokens, bytes, nll, and with a teacher kl, top1, top5."""
    count = lambda hits: jnp.sum(jnp.where(where, hits, 0), dtype=jnp.float32)  # noqa: E731
    found = {
        "tokens": count(1.0), "bytes": count(token_bytes[labels]),
        "nll": jnp.sum(cross_entropy(logits, labels, where=where)),
    }
    if teacher is not None:
        choice = jnp.argmax(teacher, axis=-1)[..., None]
        above = jnp.sum(logits > jnp.take_along_axis(logits, choice, axis=-1), axis=-1)
        found |= {
            "kl": jnp.sum(forward_kl(teacher, logits, where=where)),
            "top1": count(above == 0), "top5": count(above < 5),
        }
    return found


def chunked_sums(
    student: tuple,
    labels: Int[Array, "batch time"],
    where: Bool[Array, "batch time"],
    token_bytes: Int[Array, " vocab"],
    teacher: tuple | Mixture | None = None,
    *,
    vocab: int | None = None,
    chunk: int = CHUNK,
) -> dict[str, Float[Array, ""]]:
    """`sums`, from (hidden [batch, time, width], head [rows, width][, bias [rows][, softcap]]) of the student and of the
    teacher, or a Mixture: the sequence is walked in parts, and [batch, time, vocab] never held. vocab: ids that are real, of heads
    with more rows."""
    count, part = parts(labels.shape, chunk)

    def one(index):
        _, take, fresh = part(index)
        logits = vocab_logits(take(student[0]), *student[1:], vocab=vocab)
        return sums(logits, take(labels), take(where) & fresh, token_bytes, teacher and teacher_logits(teacher, take, vocab))

    return jax.tree.map(jnp.sum, jax.lax.map(one, jnp.arange(count)))


def finish(stacked: dict[str, np.ndarray]) -> dict[str, float]:
    """Stacked sums of all batches -> bits_per_byte (the headline: comparable between tokenizers), nll (nats a token),
    perplexity (exp of it), and teacher_kl (nats a token), top1_agreement, top5_agreement: how often the teacher's
    first choice is the student's, or among its first five; of a projected teacher projector_nll (nats an aligned token)."""
    total = {name: float(np.sum(values, dtype=np.float64)) for name, values in stacked.items()}
    tokens = max(total["tokens"], 1.0)
    nll = total["nll"] / tokens
    found = {
        "bits_per_byte": total["nll"] / math.log(2) / max(total["bytes"], 1.0),
        "nll": nll, "perplexity": math.inf if nll >= 700 else math.exp(nll),
    }
    if "kl" in total:
        found |= {"teacher_kl": total["kl"] / tokens, "top1_agreement": total["top1"] / tokens,
                  "top5_agreement": total["top5"] / tokens}
    if "projector_nll" in total:
        found["projector_nll"] = total["projector_nll"] / max(total["projector_tokens"], 1.0)
    return found


def unigram_nll(train: np.ndarray, held_out: np.ndarray, vocab: int) -> float:
    """Nats a token of the ids `held_out` by the frequencies of the ids `train` (plus one each): what knowing nothing of the
    context gives, the best constant predictor."""
    counts = np.bincount(train, minlength=vocab) + 1.0
    return float(-np.mean(np.log(counts / counts.sum())[held_out]))
