"""What a student can learn from beside one teacher's states: several teachers, and the few ids that were kept of one.

`fused_vocab_loss(teacher=)` takes each of them. The comparisons are per token, unreduced, in nats and float32, without the
factor T^2; `where` names the tokens that count, the others give 0 and no gradient, whatever they hold.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxdistill.losses.divergences import OUTSIDE, Temperature, forward_kl
from jaxdistill.losses.softmax import log_sum_exp

MIXTURES = ("probabilities", "logits")


class Mixture(NamedTuple):
    """Several teachers as one. models: (hidden [batch, time, width], head [rows, width], and perhaps bias [rows], softcap) of each.
    weights: as many, 0 or more, that add up to 1. of: what is averaged at temperature T, "probabilities" (the target is
    sum_i w_i softmax(z_i / T)) or "logits" (softmax(sum_i w_i z_i / T), their normalised geometric mean)."""

    models: Sequence[tuple]
    weights: Any
    of: str = "probabilities"


class TopK(NamedTuple):
    """A teacher's k largest logits, and how much lies outside them. `top_k` makes it of all logits.

    ids: an id below 0 holds nothing. logits: those of ids, as the model gave them (of T = 1): any temperature can be taken of
    them. log_tail: log sum exp(logit / T) over all other ids, at the temperature T at which the target is used, so that it goes
    with that one alone; -inf where there is no other. (Of the tail and not of all ids: 1 - the sum of the k would lose a small
    tail to rounding.)"""

    ids: Int[Array, "*batch k"]
    logits: Float[Array, "*batch k"]
    log_tail: Float[Array, "*batch"]

    @property
    def choice(self) -> Int[Array, "*batch"]:
        """The id of the largest logit."""
        logits = jnp.where(self.ids < 0, -jnp.inf, self.logits)
        return jnp.take_along_axis(self.ids, jnp.argmax(logits, axis=-1)[..., None], axis=-1)[..., 0]


class Samples(NamedTuple):
    """Ids drawn of a teacher's distribution p. `sample` makes it of all logits.

    ids: an id below 0 holds nothing; one may come twice. weights: for each p(id) / (n q(id)), of n draws by q: then
    sum_i weights_i [ids_i = v] is p(v) on average. p is at the temperature T at which the target is used, so that it goes with
    that one alone."""

    ids: Int[Array, "*batch n"]
    weights: Float[Array, "*batch n"]


def mixed(
    logits: Sequence[Float[Array, "*batch vocab"]], weights: Any, of: str, *, temperature: Temperature = 1.0
) -> Float[Array, "*batch vocab"]:
    """Each model's logits -> logits whose softmax at this temperature is the mixture's (see `Mixture`)."""
    if len(logits) == 1:
        return logits[0]
    if of == "logits":
        return sum(weight * z for weight, z in zip(weights, logits, strict=True))
    parts = [jnp.log(jnp.asarray(w, jnp.float32)) + jax.nn.log_softmax(z / temperature) for w, z in zip(weights, logits, strict=True)]
    total = parts[0]
    for part in parts[1:]:  # one after another: a stack would hold as many arrays at a time
        total = jnp.logaddexp(total, part)
    return temperature * total


def top_k(logits: Float[Array, "*batch vocab"], k: int, *, temperature: Temperature = 1.0) -> TopK:
    """The target of a teacher's logits, largest first; ids whose logit is -inf are left out."""
    logits = logits.astype(jnp.float32)
    values, ids = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    rest = jnp.put_along_axis(logits, ids, -jnp.inf, axis=-1, inplace=False)
    return TopK(jnp.where(jnp.isneginf(values), -1, ids), values, jax.nn.logsumexp(rest / temperature, axis=-1))


def coarse_kl(
    target: TopK,
    student_logits: Float[Array, "*batch vocab"],
    *,
    temperature: Temperature = 1.0,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """`divergences.topk_kl` of what was kept: forward KL between the ids of `target`, each by itself, and ONE bucket of all others.

    At most the full KL (data processing inequality), and equal to it where the ids are the whole vocabulary."""
    if where is not None:
        target, student_logits = masked(target, where), jnp.where(where[..., None], student_logits, 0.0)
    return forward_kl(*buckets(target, student_logits, temperature))


def buckets(
    target: TopK, student_logits: Float[Array, "*batch vocab"], temperature: Temperature
) -> tuple[Float[Array, "*batch buckets"], Float[Array, "*batch buckets"]]:
    """Logits, the teacher's and the student's, of the ids of `target` and, last, of all others together. They hold all there is: their
    `log_sum_exp` is that of all the student's logits at this temperature."""
    logits, ids, known = _scaled(target.ids, student_logits, temperature)
    # Finite, unlike what is outside: a teacher's tail of no mass takes nothing of the student's from its denominator.
    tail = jnp.maximum(target.log_tail.astype(jnp.float32), OUTSIDE)
    theirs = jnp.where(known, target.logits.astype(jnp.float32) / temperature, -jnp.inf)
    kept = jnp.put_along_axis(jnp.zeros(logits.shape, bool), ids, True, axis=-1, inplace=False, mode="drop")
    rest = log_sum_exp(jnp.where(kept, OUTSIDE, logits))
    both = (theirs, tail), (_taken(logits, ids), rest)
    return tuple(jnp.concatenate([ids, others[..., None]], axis=-1) for ids, others in both)


def sample(
    key: PRNGKeyArray, logits: Float[Array, "*batch vocab"], count: int, *, temperature: Temperature = 1.0, gamma: float = 1.0
) -> Samples:
    """`count` draws for each token from q, proportional to p^gamma (Random Sampling KD, arXiv 2503.16870): at gamma 1 from p itself,
    all weights equal; below, rare ids come more often and weigh less. Pure in logits and key.

    Not self-normalised: weights that are made to add up to 1 are no longer unbiased."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    log_q = jax.nn.log_softmax(gamma * log_p)
    # First a block of ids, then one within it: a draw over all of them would take as many random numbers as there are ids.
    vocab = logits.shape[-1]
    side = max(1, round(vocab**0.5))
    padded = jnp.pad(log_q, [(0, 0)] * (log_q.ndim - 1) + [(0, -vocab % side)], constant_values=-jnp.inf)
    blocks = padded.reshape(*log_q.shape[:-1], -1, side)
    first, second = jax.random.split(key)
    draw = lambda key, logits: jax.random.categorical(key, logits[..., None, :], axis=-1, shape=(*log_q.shape[:-1], count))  # noqa: E731
    block = draw(first, jax.nn.logsumexp(blocks, axis=-1))
    ids = block * side + jax.random.categorical(second, jnp.take_along_axis(blocks, block[..., None], axis=-2), axis=-1)
    taken = [jnp.take_along_axis(log, ids, axis=-1) for log in (log_p, log_q)]
    return Samples(ids, jnp.exp(taken[0] - taken[1]) / count)


def sampled_cross_entropy(
    target: Samples,
    student_logits: Float[Array, "*batch vocab"],
    *,
    temperature: Temperature = 1.0,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """-sum_i weights_i log student(ids_i) at this temperature. Over draws its mean is forward KL plus the teacher's entropy, and the
    mean of its gradient forward KL's: unbiased, where a renormalised top-k is not (arXiv 2503.16870)."""
    if where is not None:
        target, student_logits = masked(target, where), jnp.where(where[..., None], student_logits, 0.0)
    logits, ids, known = _scaled(target.ids, student_logits, temperature)
    weights = jnp.where(known, target.weights.astype(jnp.float32), 0.0)
    log_probs = jnp.where(known, _taken(logits, ids), 0.0) - log_sum_exp(logits)[..., None]
    return -jnp.sum(weights * log_probs, axis=-1)


def masked(target: TopK | Samples, where: Bool[Array, "*batch"]) -> TopK | Samples:
    """The target that holds nothing for a token that does not count: no loss, and no gradient."""
    target = target._replace(ids=jnp.where(where[..., None], target.ids, -1))
    return target if isinstance(target, Samples) else target._replace(log_tail=jnp.where(where, target.log_tail, 0.0))


def _scaled(ids, logits, temperature):
    """(the student's logits at T, ids with those that hold nothing moved past the end, which ids hold something)."""
    known = (ids >= 0) & (ids < logits.shape[-1])
    return logits.astype(jnp.float32) / temperature, jnp.where(known, ids, logits.shape[-1]), known


def _taken(logits, ids):
    """The logits of ids; -inf past the end."""
    return jnp.take_along_axis(logits, ids, axis=-1, mode="fill", fill_value=-jnp.inf)
