"""Divergences between two categorical distributions given by logits: per token, unreduced, in nats and float32.

p is the teacher's distribution at temperature T, q the student's. A logit of -inf on either side means that the token is
outside the shared vocabulary: the union is left out, in value and gradient, so that no direction is infinite. None of
them carries the factor T^2; the loss that uses a temperature multiplies by it. `where` names the tokens that count; the
others give 0 and no gradient, whatever they hold.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxdistill.losses.softmax import shifted

OUTSIDE = -1e30  # finite, so that 0 * (log p - log q) stays 0 and no gradient is NaN

ALPHA, BETA, TOP_K = 0.1, 0.5, 64  # where nothing is said: DistiLLM's skew, GKD's even mixture

Temperature = int | float | Float[Array, ""]


def forward_kl(
    teacher_logits: Float[Array, "*batch vocab"],
    student_logits: Float[Array, "*batch vocab"],
    *,
    temperature: Temperature = 1.0,
    where: Bool[Array, "*batch"] | None = None,
    finite: bool = False,
) -> Float[Array, "*batch"]:
    """KL(p || q) (Hinton et al., arXiv 1503.02531): the student covers what the teacher does. Zero iff both are equal.

    finite: the caller knows that no logit is -inf, so that none is looked for."""
    # Not by way of log-probabilities: exp once for each side serves the value and its gradient, which is most of the time. (The
    # student's of T = 1 is that of its cross-entropy, too.)
    (t, _), (s, _) = map(shifted, _logits(teacher_logits, student_logits, temperature, where, finite))
    p, q = jnp.exp(t), jnp.exp(s)
    p_sum, q_sum = jnp.sum(p, axis=-1), jnp.sum(q, axis=-1)
    return jnp.sum(p * (t - s), axis=-1) / p_sum - jnp.log(p_sum) + jnp.log(q_sum)


def reverse_kl(
    teacher_logits: Float[Array, "*batch vocab"],
    student_logits: Float[Array, "*batch vocab"],
    *,
    temperature: Temperature = 1.0,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """KL(q || p) (MiniLLM, arXiv 2306.08543): the student keeps to what the teacher finds likely."""
    return forward_kl(student_logits, teacher_logits, temperature=temperature, where=where)


def jsd(
    teacher_logits: Float[Array, "*batch vocab"],
    student_logits: Float[Array, "*batch vocab"],
    *,
    beta: int | float = BETA,
    temperature: Temperature = 1.0,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, the generalised Jensen-Shannon divergence
    (GKD, arXiv 2306.13649). beta is static; at exactly 0 it is forward KL and at 1 reverse KL, the limits of
    jsd / beta and jsd / (1 - beta), as TRL defines them."""
    _check_share("beta", beta)
    if beta in (0, 1):
        return (reverse_kl if beta else forward_kl)(teacher_logits, student_logits, temperature=temperature, where=where)
    log_p, log_q = _log_probs(teacher_logits, student_logits, temperature, where)
    log_m = _log_mixture(beta, log_p, log_q)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def skew_kl(
    teacher_logits: Float[Array, "*batch vocab"],
    student_logits: Float[Array, "*batch vocab"],
    *,
    alpha: int | float = ALPHA,
    temperature: Temperature = 1.0,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM, arXiv 2402.03898): forward KL at alpha 0, nothing at 1. alpha is static."""
    _check_share("alpha", alpha)
    if alpha == 0:
        return forward_kl(teacher_logits, student_logits, temperature=temperature, where=where)
    log_p, log_q = _log_probs(teacher_logits, student_logits, temperature, where)
    return _kl(log_p, _log_mixture(alpha, log_p, log_q))


def skew_reverse_kl(
    teacher_logits: Float[Array, "*batch vocab"],
    student_logits: Float[Array, "*batch vocab"],
    *,
    alpha: int | float = ALPHA,
    temperature: Temperature = 1.0,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """KL(q || alpha q + (1 - alpha) p) (DistiLLM, arXiv 2402.03898): reverse KL at alpha 0, nothing at 1. alpha is static."""
    _check_share("alpha", alpha)
    if alpha == 0:
        return reverse_kl(teacher_logits, student_logits, temperature=temperature, where=where)
    log_p, log_q = _log_probs(teacher_logits, student_logits, temperature, where)
    return _kl(log_q, _log_mixture(alpha, log_q, log_p))


def total_variation(
    teacher_logits: Float[Array, "*batch vocab"],
    student_logits: Float[Array, "*batch vocab"],
    *,
    temperature: Temperature = 1.0,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """sum |p - q| / 2, from 0 to 1 (f-distill, arXiv 2307.15190)."""
    log_p, log_q = _log_probs(teacher_logits, student_logits, temperature, where)
    return 0.5 * jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1)


def topk_kl(
    teacher_logits: Float[Array, "*batch vocab"],
    student_logits: Float[Array, "*batch vocab"],
    *,
    k: int = TOP_K,
    temperature: Temperature = 1.0,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """Forward KL between the teacher's k likeliest tokens and ONE bucket that holds the rest. k is static.

    At most the full KL (data processing inequality), and equal to it at k = vocab or more. Nothing is renormalised to
    the k tokens: that would leave what the student puts outside them unpunished."""
    if k < 1:
        raise ValueError(f"k: found {k}; accepted: 1 or more")
    log_p, log_q = _log_probs(teacher_logits, student_logits, temperature, where)
    _, chosen = jax.lax.top_k(log_p, min(k, log_p.shape[-1]))
    top = jnp.put_along_axis(jnp.zeros(log_p.shape, bool), chosen, True, axis=-1, inplace=False)
    tail = [jax.nn.logsumexp(jnp.where(top, OUTSIDE, log), axis=-1) for log in (log_p, log_q)]
    return jnp.sum(jnp.where(top, jnp.exp(log_p) * (log_p - log_q), 0.0), axis=-1) + jnp.exp(tail[0]) * (tail[0] - tail[1])


KINDS = {  # kind -> (divergence, the option it takes beside temperature and where)
    "forward_kl": (forward_kl, "finite"),
    "reverse_kl": (reverse_kl, None),
    "jsd": (jsd, "beta"),
    "skew_kl": (skew_kl, "alpha"),
    "skew_reverse_kl": (skew_reverse_kl, "alpha"),
    "total_variation": (total_variation, None),
    "topk_kl": (topk_kl, "k"),
}


def divergence(kind: str, **options) -> Callable:
    """The divergence of that name, with the one of `options` (finite, alpha, beta, k) that it takes; the others are for other kinds."""
    if kind not in KINDS:
        raise ValueError(f"kind: found {kind!r}; accepted: {', '.join(KINDS)}")
    function, option = KINDS[kind]
    return functools.partial(function, **{option: options[option]}) if option in options else function


def _logits(teacher_logits, student_logits, temperature, where, finite=False):
    """Both in float32, divided by T; what is outside either vocabulary is outside both, as is all of a token that does not count:
    two distributions that are even, and so equal."""
    teacher, student = teacher_logits.astype(jnp.float32), student_logits.astype(jnp.float32)
    if finite and where is None:
        return [x / temperature for x in (teacher, student)]
    outside = jnp.isneginf(teacher) | jnp.isneginf(student)
    if where is not None:  # before the arithmetic: a non-finite logit of a masked token must not reach a gradient
        outside = outside | ~where[..., None]
    return [jnp.where(outside, OUTSIDE, x) / temperature for x in (teacher, student)]


def _log_probs(*args):
    """(log p, log q) of `_logits`."""
    return [jax.nn.log_softmax(x, axis=-1) for x in _logits(*args)]


def _kl(log_a, log_b):
    return jnp.sum(jnp.exp(log_a) * (log_a - log_b), axis=-1)


def _log_mixture(share, log_a, log_b):
    """log(share a + (1 - share) b). Not by way of the probabilities: log(max(p, tiny)) has no gradient to trust."""
    if share == 1:
        return log_a
    return jnp.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def _check_share(name: str, value: int | float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: found {value}; accepted: from 0 to 1")
