"""Next-token cross-entropy and distillation from hidden states and heads, without ever holding [batch, time, vocab].

The sequence is walked in parts, so that the batch axis stays whole and a part's logits stay near the core. The gradient
is formed in the forward pass, while the logits are there: no second pass over the head, no residuals but the gradient
itself. On a mesh every device walks its own tokens, and the head's gradient is summed once, after the walk.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.losses.classification import cross_entropy
from jaxdistill.losses.divergences import ALPHA, BETA, TOP_K, Temperature, divergence, forward_kl
from jaxdistill.losses.mesh import cuts
from jaxdistill.losses.softmax import log_sum_exp
from jaxdistill.losses.targets import MIXTURES, Mixture, Samples, TopK, buckets, masked, mixed, sampled_cross_entropy
from jaxdistill.recipe import Term, probed

CHUNK = 256  # tokens (batch x positions) whose logits exist at a time, on each device
# The numbers in a head up to which its gradient is added up as [width, rows]: XLA:CPU then multiplies up to 1.6 times as fast, but
# takes longer above.
SMALL = 2**22


class _Static(NamedTuple):
    kind: str
    options: tuple[tuple[str, float], ...]
    softcap: float | None
    teachers: tuple[str, tuple[float | None, ...]]  # what of them is averaged, their softcaps
    temperature: float | None  # None: traced
    smoothing: float
    vocab: int | None
    chunk: int
    probe: bool  # whether any update is probed


class _Model(NamedTuple):
    """What logits are made of; also the gradients to it, and whether they are wanted."""

    hidden: Any
    head: Any
    bias: Any


class _Teachers(NamedTuple):
    """A mixture of models, or the one."""

    models: tuple[_Model, ...]
    weights: tuple


def fused_vocab_loss(
    hidden: Float[Array, "batch time width"],
    head: Float[Array, "rows width"],
    labels: Int[Array, "batch time"],
    *,
    scale: dict,
    where: Bool[Array, "batch time"],
    teacher: tuple | Mixture | TopK | Samples | None = None,
    kd_where: Bool[Array, "batch time"] | None = None,
    head_bias: Float[Array, " rows"] | None = None,
    softcap: int | float | None = None,
    temperature: Temperature = 1.0,
    kind: str = "forward_kl",
    alpha: int | float = ALPHA,
    beta: int | float = BETA,
    top_k: int = TOP_K,
    smoothing: int | float = 0.0,
    vocab: int | None = None,
    chunk: int = CHUNK,
    probe: Any = False,
) -> tuple[Float[Array, ""], dict[str, Term], dict[str, tuple]]:
    """total = scale["lm"] * sum CE + scale["kd"] * sum T^2 divergence(teacher, student at T), in nats.

    Args:
      hidden, head: the student's final states and output embedding; logits are hidden @ head.T (+ head_bias), in hidden's
        dtype with float32 accumulation.
      scale: weight / count of the whole batch, for each of "lm" and "kd" that is wanted. Traced; not differentiated.
      where: tokens that count in lm; the others give nothing, whatever they hold. kd_where: the same for kd (where).
      teacher: (hidden, head[, bias[, softcap]]) of the teacher, whose width may differ; or several (`targets.Mixture`), or what
        was kept of one: TopK, whose divergence is `targets.coarse_kl`, or Samples, with `targets.sampled_cross_entropy`. A target,
        gets no gradient.
      softcap: c, for logits that are c tanh(logits / c) (Gemma 2, arXiv 2408.00118).
      temperature: of kd. A Python number is compiled in, an array may move.
      kind: of kd: a name in `divergences.KINDS`, with alpha, beta or top_k (its k) where it takes one; of TopK and Samples
        forward_kl.
      smoothing: of lm, as in `classification.cross_entropy`, over the real ids.
      vocab: the number of real ids, where heads hold more rows: the rest is padding, which takes no probability.
      chunk: tokens whose logits exist at a time on a device; any value gives the same result to float rounding.
      probe: whether to look at the distributions, too: a bool, or a traced one (where it is False, the cost is next to nothing).

    Returns:
      total, differentiable in hidden, head and head_bias; the Terms that scale names, kd's sum with its T^2; the probes, as
      (sum, count), or {} where probe is False itself. Terms and probes are to be looked at: differentiating their sums is a
      TypeError at trace. Of probes, over where: entropy, spread, correct, logit_abs_max, with smoothing nll; with a teacher, over
      kd_where: teacher_entropy, teacher_kl (forward KL at T = 1), top1_agreement (the teacher's first choice is the student's),
      and over both masks teacher_nll; defined as in `diagnosis.probes.of_logits`. Of TopK top1_agreement alone, of Samples none:
      the others need what was not kept.

    The definitions are those of `classification` and `divergences`, which are called here on each part.
    """
    _check(head, scale, teacher, vocab, kind)
    options = {"alpha": alpha, "beta": beta, "k": top_k}
    divergence(kind, **options)  # a wrong name is refused also where kd is not wanted
    target, teachers = teacher, ("", ())
    if teacher and not isinstance(teacher, (TopK, Samples)):
        models, weights, of = _several(teacher)
        models = [(*model, None, None)[:4] for model in models]
        target, teachers = _Teachers(tuple(_Model(*model[:3]) for model in models), tuple(weights)), (of, tuple(m[3] for m in models))
        options["finite"] = head_bias is None and all(bias is None for _, _, bias, _ in models)  # a product of states and a head is
    constant = float(temperature) if isinstance(temperature, (int, float)) else None
    looks = probe is not False
    static = _Static(kind, tuple(options.items()), softcap, teachers, constant, smoothing, vocab, chunk, looks)
    target = target if looks or "kd" in scale else None
    masks = {"lm": where, "kd": where if kd_where is None else kd_where}
    fixed = jax.lax.stop_gradient((target, scale, jnp.asarray(temperature, jnp.float32), jnp.asarray(probe)))
    total, sums, seen = _fused(static, _Model(hidden, head, head_bias), labels, masks, *fixed)
    counts = {name: jnp.sum(mask, dtype=jnp.float32) for name, mask in masks.items()}
    terms = {name: Term(value, counts[name]) for name, value in sums.items()}
    if looks:  # (an update that is not looked at has sums and counts of 0)
        hidden, count = seen["entropy"]
        mean = seen.pop("mean") / jnp.maximum(count, 1.0)
        seen["spread"] = count * -jnp.sum(jax.scipy.special.xlogy(mean, mean)) - hidden, count
    return total, terms, seen


def _check(head, scale: dict, teacher: tuple | None, vocab: int | None, kind: str) -> None:
    accepted = ("lm", "kd") if teacher else ("lm",)
    if not scale.keys() <= set(accepted):
        raise ValueError(f"scale: found {', '.join(scale)}; accepted: {', '.join(accepted)} (kd where there is a teacher)")
    sparse = isinstance(teacher, (TopK, Samples))
    if sparse and kind != "forward_kl":
        raise ValueError(f"kind: found {kind!r} with a teacher of {type(teacher).__name__}; accepted: forward_kl")
    rows = [head.shape[0], *(model[1].shape[0] for model in ([] if sparse or not teacher else _several(teacher).models))]
    if vocab is None and len(set(rows)) > 1:
        raise ValueError(f"teacher: found heads of {rows} rows; accepted: the same number, or `vocab`, the ids that both hold")
    if vocab is not None and not 0 < vocab <= min(rows):
        raise ValueError(f"vocab: found {vocab} with heads of {rows} rows; accepted: from 1 to {min(rows)}")


def _several(teacher: tuple) -> Mixture:
    """One model as a mixture of one."""
    if not isinstance(teacher, Mixture):
        return Mixture((teacher,), (1.0,))
    if len(teacher.models) != len(teacher.weights) or not teacher.models:
        found = f"{len(teacher.weights)} weights for {len(teacher.models)} models"
        raise ValueError(f"teacher: found {found}; accepted: one for each")
    if teacher.of not in MIXTURES:
        raise ValueError(f"teacher: found a mixture of {teacher.of!r}; accepted: {', '.join(MIXTURES)}")
    return teacher


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(static, student, *rest):
    found, _ = _spread(static, _Model(False, False, False), student, *rest)
    return found


def _forward(static, student, *rest):
    wanted = _Model(*(leaf is not None and leaf.perturbed for leaf in student))
    student, rest = jax.tree.map(lambda x: x.value, (student, rest), is_leaf=lambda x: hasattr(x, "perturbed"))
    found, gradients = _spread(static, wanted, student, *rest)
    return found, _Model(*(None if g is None else g.astype(x.dtype) for g, x in zip(gradients, student, strict=True)))


def _backward(static, gradients, cotangents):
    total, *others = cotangents
    zero = lambda x: isinstance(x, SymbolicZero)  # noqa: E731
    if not all(zero(leaf) for leaf in jax.tree.leaves(others, is_leaf=zero)):
        raise TypeError("fused_vocab_loss: only the total can be differentiated; its gradient already carries every scale")
    if zero(total):
        return (None,) * 7
    return jax.tree.map(lambda g: (total * g.astype(jnp.float32)).astype(g.dtype), gradients), *(None,) * 6


_fused.defvjp(_forward, _backward, symbolic_zeros=True)


def _spread(static, wanted, student, labels, masks, target, scale, temperature, probe):
    """`_walk`, by each device of the mesh over its own tokens, with the sums and the head's gradient added up at the end.
    (Left to itself, XLA's partitioner adds up the head's gradient in every part.)"""
    mesh, batch, positions = cuts(labels)
    args = student, labels, masks, target, scale, temperature, probe
    if not batch + positions:
        return _walk(static, wanted, *args)

    def local(*args):
        found, gradients = _walk(static, wanted, *args)
        found, shared = jax.lax.psum((found, gradients[1:]), batch + positions)
        return found, _Model(gradients.hidden, *shared)

    tokens, whole = PartitionSpec(batch, positions), PartitionSpec()
    model = _Model(tokens, whole, whole)
    of_target = _Teachers((model,) * len(target.models), whole) if isinstance(target, _Teachers) else target and tokens
    specs = model, tokens, tokens, of_target, whole, whole, whole
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(whole, model), check_vma=False)(*args)


def _walk(static, wanted, student, labels, masks, target, scale, temperature, probe):
    """((total, sums, what probes are made of), the gradients of total that are wanted, to head and bias in float32)."""
    count, part = parts(labels.shape, static.chunk)
    matrix = student.head.astype(student.hidden.dtype)
    if isinstance(target, _Teachers):
        target = target._replace(models=tuple(one._replace(head=one.head.astype(one.hidden.dtype)) for one in target.models))
    given = temperature if static.temperature is None else static.temperature
    turned = matrix.size <= SMALL
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def body(gradients, index):
        start, take, fresh = part(index)
        flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731  ([tokens, ...]: XLA transposes for a sum over two axes)
        counted = {name: flat(take(mask) & fresh) for name, mask in masks.items()}
        rows = _keep(counted["lm"] | counted["kd"], flat(take(student.hidden)))
        if isinstance(target, _Teachers):
            theirs_raw = [_multiply(_keep(counted["kd"], flat(take(one.hidden))), one.head) for one in target.models]
        else:
            theirs_raw = jax.tree.map(lambda x: flat(take(x)), target)
        ours = lambda raw: _finish(raw, student.bias, static.softcap, static.vocab)  # noqa: E731
        theirs = functools.partial(_theirs, static, target)
        aims = flat(take(labels))

        def share(raw):
            return _share(static, ours(raw), theirs(theirs_raw, given), aims, counted, scale, given)

        raw = _multiply(rows, matrix)
        seen = probed(static.probe and probe, lambda a, b: _look(static, ours(a), theirs(b, 1.0), aims, counted), raw, theirs_raw)
        if not any(wanted):
            return gradients, (*share(raw), seen)
        found, d_raw = jax.value_and_grad(share, has_aux=True)(raw)
        d_hidden, d_head, d_bias = gradients
        if wanted.bias:
            d_bias = d_bias + jnp.sum(d_raw, axis=0)
        d_raw = d_raw.astype(rows.dtype)
        if wanted.hidden:
            d_rows = product("nv,vd->nd", d_raw, matrix).astype(rows.dtype)
            before = take(d_hidden)
            d_hidden = jax.lax.dynamic_update_slice_in_dim(d_hidden, before + d_rows.reshape(before.shape), start, axis=1)
        if wanted.head:
            d_head = d_head + (product("nd,nv->dv", rows, d_raw) if turned else product("nv,nd->vd", d_raw, rows))
        return _Model(d_hidden, d_head, d_bias), (*found, seen)

    dtypes = student.hidden.dtype, jnp.float32, jnp.float32
    shapes = student._replace(head=matrix.T) if turned else student
    zeros = _Model(*(jnp.zeros(x.shape, dtype) if want else None for x, dtype, want in zip(shapes, dtypes, wanted, strict=True)))
    gradients, found = jax.lax.scan(body, zeros, jnp.arange(count))
    if wanted.head and turned:
        gradients = gradients._replace(head=gradients.head.T)
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), found), gradients


def _theirs(static, target, raw, temperature):
    """The target of one part: logits at this temperature, or what is there of a sparse one."""
    if not isinstance(target, _Teachers):
        return raw
    of, softcaps = static.teachers
    logits = [_finish(x, one.bias, cap, static.vocab) for x, one, cap in zip(raw, target.models, softcaps, strict=True)]
    return mixed(logits, target.weights, of, temperature=temperature)


def _share(static, logits, target, labels, where, scale, temperature):
    """One part's share of the total, with its sums."""
    sums, whole = {}, None
    total = lambda where, values: jnp.sum(jnp.where(where, values, 0.0))  # noqa: E731
    if "kd" in scale:
        if isinstance(target, TopK):
            theirs, ours = buckets(masked(target, where["kd"]), logits, temperature)
            values = forward_kl(theirs, ours)
            whole = log_sum_exp(ours) if static.temperature == 1 else None
        elif isinstance(target, Samples):
            values = sampled_cross_entropy(masked(target, where["kd"]), logits, temperature=temperature)
        else:
            distance = divergence(static.kind, **dict(static.options))
            values = distance(target, logits, temperature=temperature)
        sums["kd"] = temperature**2 * total(where["kd"], values)
    if "lm" in scale:
        sums["lm"] = total(where["lm"], cross_entropy(logits, labels, smoothing=static.smoothing, whole=whole))
    return sum((scale[name] * value for name, value in sums.items()), jnp.zeros((), jnp.float32)), sums


def _look(static, logits, target, labels, where):
    """One part's probes as (sum, count), and `mean`, the sum of its tokens' distributions [vocab]."""
    def over(mask, values):
        return jnp.sum(jnp.where(mask, values, 0.0), dtype=jnp.float32), jnp.sum(mask, dtype=jnp.float32)

    # Of each side its softmax is held, and nothing else of that size; hence not by way of `divergences`, which hold more.
    lm, kd, first = where["lm"], where["kd"], jnp.argmax(logits, axis=-1)
    whole = jax.nn.logsumexp(logits, axis=-1)
    p = jnp.exp(logits - whole[:, None])
    hidden = whole - jnp.sum(p * logits, axis=-1)
    middle = jnp.mean(logits, axis=-1)  # which no softmax sees
    largest = jnp.maximum(jnp.max(logits, axis=-1) - middle, middle - jnp.min(logits, axis=-1))
    seen = {
        "mean": jnp.sum(jnp.where(lm[:, None], p, 0.0), axis=0), "entropy": over(lm, hidden), "correct": over(lm, first == labels),
        "logit_abs_max": over(lm, largest),
    }
    if static.smoothing:
        seen["nll"] = over(lm, cross_entropy(logits, labels, where=lm))
    if isinstance(target, TopK):
        seen["top1_agreement"] = over(kd, target.choice == first)
    elif target is not None and not isinstance(target, Samples):
        theirs = jax.nn.logsumexp(target, axis=-1)
        q = jnp.exp(target - theirs[:, None])
        seen |= {
            "teacher_entropy": over(kd, theirs - jnp.sum(q * target, axis=-1)),
            "teacher_kl": over(kd, jnp.sum(q * (target - logits), axis=-1) - theirs + whole),
            "top1_agreement": over(kd, jnp.argmax(target, axis=-1) == first),
            "teacher_nll": over(kd & lm, cross_entropy(target, labels, where=kd & lm)),
        }
    return seen


def parts(shape: tuple[int, int], chunk: int) -> tuple[int, Callable]:
    """[batch, time] in parts of about `chunk` tokens, all rows in each: (their count, part), for a loop over the index.

    part(index) -> (start, take, fresh): take([batch, time, ...]) gives the positions from `start` on. The last part is moved
    back so as to end where the sequence does; fresh [1, positions] is False where an earlier part held them."""
    batch, time = shape
    size = max(1, min(chunk // batch, time))

    def part(index):
        start = jnp.minimum(index * size, time - size)
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)  # noqa: E731
        return start, take, (start + jnp.arange(size) >= index * size)[None]

    return -(-time // size), part


def teacher_logits(teacher: tuple | Mixture, take: Callable, vocab: int | None = None) -> Float[Array, "*tokens vocab"]:
    """Float32 logits of T = 1 of a model, or of a mixture, at the positions that take([batch, time, ...]) gives."""
    models, weights, of = _several(teacher)
    return mixed([vocab_logits(take(hidden), *rest, vocab=vocab) for hidden, *rest in models], weights, of)


def vocab_logits(
    rows: Float[Array, "*tokens width"],
    head: Float[Array, "rows width"],
    bias: Float[Array, " rows"] | None = None,
    softcap: int | float | None = None,
    vocab: int | None = None,
) -> Float[Array, "*tokens vocab"]:
    """[*tokens, width] -> float32 logits: softcap(rows @ head.T + bias), in rows' dtype, of the first `vocab` ids."""
    return _finish(_multiply(rows, head.astype(rows.dtype)), bias, softcap, vocab)


def _multiply(rows, matrix):
    return jnp.einsum("...d,vd->...v", rows, matrix, preferred_element_type=jnp.float32)


def _finish(raw, bias, softcap, vocab):
    logits = raw[..., :vocab]
    if bias is not None:
        logits = logits + jnp.broadcast_to(bias[:vocab].astype(jnp.float32), logits.shape)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _keep(where, rows):
    """A token that does not count must not reach a sum as 0 * inf."""
    return jnp.where(where[..., None], rows, 0)
