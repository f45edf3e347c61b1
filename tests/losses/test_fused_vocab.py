"""The fused loss equals the dense form in value and gradient, whatever the chunk, and holds none of its arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.diagnosis.probes import of_logits
from jaxdistill.evaluators import language
from jaxdistill.losses.classification import cross_entropy
from jaxdistill.losses.divergences import KINDS, divergence, forward_kl
from jaxdistill.losses.fused_vocab import fused_vocab_loss

SCALE = {"lm": jnp.float32(0.3), "kd": jnp.float32(0.7)}
OPTIONS = dict(alpha=0.2, beta=0.3)


@dataclasses.dataclass(frozen=True)
class Case:
    rows: int = 65  # of both heads
    vocab: int | None = None
    chunk: int = 7
    kind: str = "forward_kl"
    temperature: float = 1.0
    smoothing: float = 0.0
    bias: bool = False
    softcaps: tuple = (None, None)
    kd_where: bool = False
    top_k: int = 5
    shape: tuple = (3, 11)


class Arrays:
    def __init__(self, case: Case, seed: int = 0):
        draw = iter(jax.random.split(jax.random.key(seed), 9))
        normal = lambda *shape, by=1.0: by * jax.random.normal(next(draw), shape)  # noqa: E731
        self.student = [normal(*case.shape, 8), normal(case.rows, 8, by=0.5)]
        self.teacher = [normal(*case.shape, 12), normal(case.rows, 12, by=0.5)]
        if case.bias:
            self.student.append(normal(case.rows))
            self.teacher.append(normal(case.rows))
        self.labels = jax.random.randint(next(draw), case.shape, 0, case.vocab or case.rows)
        self.where = jax.random.bernoulli(next(draw), 0.8, case.shape)
        self.kd_where = jax.random.bernoulli(next(draw), 0.5, case.shape) if case.kd_where else None


def fused(case: Case, arrays: Arrays, *student, scale=SCALE, temperature=None, **more):
    hidden, head, *bias = student
    teacher = tuple(arrays.teacher) + ((None, case.softcaps[1]) if not bias else (case.softcaps[1],)) * (case.softcaps[1] is not None)
    return fused_vocab_loss(
        hidden, head, arrays.labels, scale=scale, where=arrays.where, teacher=teacher, kd_where=arrays.kd_where,
        head_bias=bias[0] if bias else None, softcap=case.softcaps[0], kind=case.kind, top_k=case.top_k, smoothing=case.smoothing,
        temperature=case.temperature if temperature is None else temperature, vocab=case.vocab, chunk=case.chunk, **OPTIONS, **more,
    )


def multiplied(case: Case, model, softcap, outside):
    hidden, head, *bias = model
    logits = jnp.einsum("btd,vd->btv", hidden, head)
    if bias:
        logits = logits + bias[0][None, None]
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    return jnp.where(jnp.arange(case.rows) < (case.vocab or case.rows), logits, outside)


def dense(case: Case, arrays: Arrays, *student):
    """All logits at once; padding is -inf on both sides."""
    theirs = multiplied(case, arrays.teacher, case.softcaps[1], -jnp.inf)
    ours = multiplied(case, student, case.softcaps[0], -jnp.inf)
    kd_where = arrays.where if arrays.kd_where is None else arrays.kd_where
    lm = cross_entropy(ours[..., :case.vocab], arrays.labels, smoothing=case.smoothing, where=arrays.where).sum()
    distance = divergence(case.kind, k=case.top_k, **OPTIONS)
    kd = case.temperature**2 * distance(theirs, ours, temperature=case.temperature, where=kd_where).sum()
    return SCALE["lm"] * lm + SCALE["kd"] * kd, {"lm": (lm, arrays.where.sum()), "kd": (kd, kd_where.sum())}


CASES = [
    *(Case(kind=kind, temperature=2.0, smoothing=0.1 * (i % 2), chunk=1 + 5 * i, vocab=60 if i % 3 else None, bias=i % 2 == 0,
           kd_where=i > 3) for i, kind in enumerate(KINDS)),
    *(Case(kind=kind, temperature=0.5, smoothing=0.1 * (1 - i % 2), softcaps=(5.0, 3.0), bias=i % 2 == 1, chunk=999)
      for i, kind in enumerate(KINDS)),
    Case(rows=1001), Case(rows=1001, smoothing=0.2, temperature=2.0, vocab=1000, softcaps=(None, 4.0)),
    Case(rows=50257, shape=(2, 5), chunk=4), Case(rows=50257, shape=(2, 5), chunk=4, kind="jsd", temperature=2.0, smoothing=0.1),
    Case(rows=50304, vocab=50257, shape=(2, 5), chunk=4, bias=True), Case(rows=50176, shape=(2, 5), kind="skew_kl", softcaps=(30.0, None)),
    Case(rows=50176, shape=(2, 5), kind="topk_kl", top_k=64),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rows}-{case.kind}-{case.temperature}")
def test_it_equals_the_dense_form(case):
    arrays = Arrays(case)
    spread = tuple(range(len(arrays.student)))
    with jax.numpy_dtype_promotion("strict"):
        call = lambda *student: (lambda total, *rest: (total, rest))(*fused(case, arrays, *student))  # noqa: E731
        (total, (terms, _)), gradients = jax.jit(jax.value_and_grad(call, spread, has_aux=True))(*arrays.student)
        alone, _ = jax.jit(call)(*arrays.student)  # the path without a gradient
    (wanted, parts), theirs = jax.jit(jax.value_and_grad(lambda *s: dense(case, arrays, *s), spread, has_aux=True))(*arrays.student)
    np.testing.assert_allclose([total, alone], [wanted, wanted], rtol=1e-6)
    for name, term in terms.items():
        np.testing.assert_allclose((term.sum, term.count), parts[name], rtol=1e-6)
    for ours, other in zip(gradients, theirs, strict=True):
        assert np.all(np.isfinite(ours))
        np.testing.assert_allclose(ours, other, rtol=0, atol=1e-6 * float(jnp.abs(other).max()))


def test_the_temperature_may_move_without_a_new_program():
    case = Case(kind="jsd", temperature=2.0)
    arrays = Arrays(case)
    step = jax.jit(jax.grad(lambda h, T, s: fused(case, arrays, h, arrays.student[1], temperature=T, scale=s)[0]))
    constant = jax.grad(lambda h: fused(case, arrays, h, arrays.student[1])[0])(arrays.student[0])
    np.testing.assert_allclose(step(arrays.student[0], jnp.float32(2.0), SCALE), constant, rtol=1e-5, atol=1e-7)
    step(arrays.student[0], jnp.float32(3.0), {"lm": jnp.float32(0.0), "kd": jnp.float32(1.0)})
    assert step._cache_size() == 1


def test_without_a_teacher_or_with_a_frozen_head():
    arrays = Arrays(Case())
    lm = lambda h, w: fused_vocab_loss(h, w, arrays.labels, scale={"lm": SCALE["lm"]}, where=arrays.where)  # noqa: E731
    wanted = SCALE["lm"] * cross_entropy(jnp.einsum("btd,vd->btv", *arrays.student), arrays.labels, where=arrays.where).sum()
    total, terms, probes = lm(*arrays.student)
    np.testing.assert_allclose(total, wanted, rtol=1e-6)
    assert (set(terms), probes) == ({"lm"}, {})
    both, frozen = (jax.grad(lambda h, w: lm(h, w)[0], which) for which in ((0, 1), 0))
    np.testing.assert_allclose(frozen(*arrays.student), both(*arrays.student)[0], rtol=1e-6)
    flops = [jax.jit(g).lower(*arrays.student).compile().cost_analysis()["flops"] for g in (both, frozen, lambda h, w: lm(h, w)[0])]
    assert flops[1] < 0.85 * flops[0]  # the head's gradient is not even formed
    assert flops[2] < 0.7 * flops[1]  # no gradient at all


def test_only_what_scale_names_is_computed():
    case = Case()
    arrays = Arrays(case)
    kd = fused(case, arrays, *arrays.student, scale={"kd": SCALE["kd"]})
    np.testing.assert_allclose(kd[0], SCALE["kd"] * dense(case, arrays, *arrays.student)[1]["kd"][0], rtol=1e-6)
    assert set(kd[1]) == {"kd"}


@pytest.mark.parametrize("vocab", [None, 40])
def test_probes_are_what_evaluation_measures(vocab):
    case = Case(temperature=3.0, kind="reverse_kl", vocab=vocab, kd_where=True, bias=True, softcaps=(None, 2.0))
    arrays = Arrays(case)
    _, terms, probes = fused(case, arrays, *arrays.student, probe=True)
    model = tuple(arrays.student), (*arrays.teacher, 2.0)
    found = language.chunked_sums(model[0], arrays.labels, arrays.kd_where, jnp.ones(vocab or 65, jnp.int32), model[1], vocab=vocab,
                                  chunk=9)
    np.testing.assert_allclose(probes["teacher_kl"], (found["kl"], found["tokens"]), rtol=1e-6)
    np.testing.assert_allclose(probes["top1_agreement"], (found["top1"], found["tokens"]), rtol=1e-6)
    assert found["tokens"] == terms["kd"].count
    theirs, ours = (multiplied(case, model, softcap, -jnp.inf) for model, softcap in ((arrays.teacher, 2.0), (arrays.student, None)))
    np.testing.assert_allclose(found["kl"], forward_kl(theirs, ours, where=arrays.kd_where).sum(), rtol=1e-6)
    nll = cross_entropy(ours[..., :vocab], arrays.labels, where=arrays.kd_where).sum()
    np.testing.assert_allclose(found["nll"], nll, rtol=1e-6)


@pytest.mark.parametrize("vocab", [None, 40])
def test_probes_are_those_of_the_logits(vocab):
    """Of the whole batch, however it is walked: `diagnosis.probes.of_logits` of all tokens as rows."""
    case = Case(smoothing=0.1, vocab=vocab, kd_where=True, bias=True, softcaps=(None, 2.0))
    arrays = Arrays(case)
    _, _, found = fused(case, arrays, *arrays.student, probe=True)
    ours, theirs = (multiplied(case, model, cap, 0.0)[..., :vocab].reshape(33, -1)
                    for model, cap in ((arrays.student, None), (arrays.teacher, 2.0)))
    lm, kd = (where.reshape(33) for where in (arrays.where, arrays.kd_where))
    labels = arrays.labels.reshape(33)
    wanted = of_logits(ours, lm, labels=labels)
    wanted = {name: wanted[name] for name in ("entropy", "spread", "correct", "logit_abs_max", "nll")}
    taught = of_logits(ours, kd, labels=labels, teacher=theirs)
    wanted |= {name: taught[name] for name in ("teacher_entropy", "teacher_kl", "top1_agreement")}
    wanted["teacher_nll"] = of_logits(ours, kd & lm, labels=labels, teacher=theirs)["teacher_nll"]
    assert found.keys() == wanted.keys()
    for name, pair in wanted.items():
        np.testing.assert_allclose(found[name], pair, rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_traced_probe_changes_no_bit_and_shows_nothing_while_it_is_off():
    case = Case()
    arrays = Arrays(case)

    @jax.jit
    def step(probe):
        def loss(*student):
            total, terms, probes = fused(case, arrays, *student, probe=probe)
            return total, (terms, probes)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(*arrays.student)

    ((on, (terms, seen)), gradients), ((off, (same, unseen)), others) = step(jnp.asarray(True)), step(jnp.asarray(False))
    for a, b in zip(jax.tree.leaves((on, terms, gradients)), jax.tree.leaves((off, same, others)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert all(count > 0 for _, count in seen.values())
    assert {float(x) for x in jax.tree.leaves(unseen)} == {0.0}


def test_heads_with_unlike_padding():
    case = Case(vocab=50)
    arrays = Arrays(case)
    wanted = fused(case, arrays, *arrays.student)[0]
    arrays.teacher[1] = jnp.concatenate([arrays.teacher[1], jnp.full((7, 12), jnp.nan)])
    np.testing.assert_array_equal(fused(case, arrays, *arrays.student)[0], wanted)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_bias_of_minus_infinity_is_outside_both_vocabularies(side):
    arrays = Arrays(Case(bias=True))
    biases = getattr(arrays, side)
    biases[2] = biases[2].at[-7:].set(-jnp.inf)
    kd = lambda case, arrays: jax.value_and_grad(  # noqa: E731
        lambda h, *rest: fused(case, arrays, h, *rest, scale={"kd": SCALE["kd"]})[0])(*arrays.student)
    found = kd(Case(bias=True), arrays)
    np.testing.assert_allclose(found[0], kd(Case(bias=True, vocab=58), arrays)[0], rtol=1e-6)
    assert np.all(np.isfinite(found[1]))


def test_masked_tokens_give_nothing_and_the_teacher_gets_no_gradient():
    case = Case()
    arrays = Arrays(case)
    arrays.where = arrays.where.at[0, 3].set(False)
    bad, hidden = arrays.student[0].at[0, 3].set(jnp.nan), arrays.teacher[0]

    def call(student, teacher):
        return fused_vocab_loss(student, arrays.student[1], arrays.labels, scale=SCALE, where=arrays.where,
                                teacher=(teacher, arrays.teacher[1]))[0]

    clean, dirty = (jax.value_and_grad(call)(*args) for args in ((arrays.student[0], hidden), (bad, hidden.at[0, 3].set(jnp.inf))))
    np.testing.assert_array_equal(clean[0], dirty[0])
    np.testing.assert_array_equal(clean[1], dirty[1])
    assert np.all(np.asarray(jax.grad(call, 1)(arrays.student[0], hidden)) == 0)
    arrays.where = jnp.zeros_like(arrays.where)
    nothing = jax.value_and_grad(lambda h: fused(case, arrays, h, arrays.student[1])[0])(bad)
    assert nothing[0] == 0
    assert np.all(np.asarray(nothing[1]) == 0)


def test_bfloat16_states_with_a_float32_head():
    case = Case(kind="jsd", bias=True)
    arrays = Arrays(case)
    hidden, *rest = arrays.student
    low = hidden.astype(jnp.bfloat16)
    arrays.teacher[0] = arrays.teacher[0].astype(jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        gradients = jax.grad(lambda *s: fused(case, arrays, *s)[0], (0, 1, 2))(low, *rest)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]
    arrays.teacher[0] = arrays.teacher[0].astype(jnp.float32)
    theirs = jax.grad(lambda *s: dense(case, arrays, *s)[0], (0, 1, 2))(low.astype(jnp.float32), *rest)
    for ours, other in zip(gradients, theirs, strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), other, rtol=0, atol=0.02 * float(jnp.abs(other).max()))


@pytest.mark.parametrize("look", [lambda r: r[1]["kd"].sum, lambda r: r[0] + r[2]["teacher_kl"][0]])
def test_sums_and_probes_cannot_be_differentiated(look):
    arrays = Arrays(Case())
    with pytest.raises(TypeError, match="only the total"):
        jax.grad(lambda h: look(fused(Case(), arrays, h, arrays.student[1], probe=True)))(arrays.student[0])


@pytest.mark.parametrize(("change", "message"), [
    (dict(kind="kl"), "kind: found 'kl'; accepted: forward_kl"),
    (dict(vocab=66), "vocab: found 66 with heads of .*; accepted: from 1 to 65"),
    (dict(teacher=None), "scale: found lm, kd; accepted: lm "),
    (dict(teacher=(jnp.zeros((3, 11, 4)), jnp.zeros((64, 4)))), r"teacher: found heads of \[65, 64\] rows; accepted: the same number"),
    (dict(kind="jsd", beta=1.5), "beta: found 1.5; accepted: from 0 to 1"),
])
def test_what_is_refused(change, message):
    arrays = Arrays(Case())
    given = dict(scale=SCALE, where=arrays.where, teacher=tuple(arrays.teacher)) | change
    with pytest.raises(ValueError, match=message):
        fused_vocab_loss(*arrays.student, arrays.labels, **given)


@pytest.mark.parametrize(("kind", "probe"), [("forward_kl", False), ("jsd", False), ("forward_kl", True)])
def test_it_never_holds_the_logits(kind, probe):
    """Temporary memory at [8192, 50257] stays far below one such array in float32; nothing is allocated to find out. probe: the
    update may be looked at."""
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    n, vocab = (8, 1024), 50257
    scale = {"lm": shape(), "kd": shape()}

    def call(h, w, y, m, t, s, looked):
        total, _, seen = fused_vocab_loss(h, w, y, scale=s, where=m, teacher=t, kind=kind, chunk=128, probe=probe and looked)
        return total, seen

    lowered = jax.jit(jax.grad(call, (0, 1), has_aux=True)).lower(
        shape(*n, 768), shape(vocab, 768), shape(*n, dtype=jnp.int32), shape(*n, dtype=jnp.bool_),
        (shape(*n, 1600), shape(vocab, 1600)), scale, shape(dtype=jnp.bool_))
    assert lowered.compile().memory_analysis().temp_size_in_bytes <= 0.13 * 4 * n[0] * n[1] * vocab
