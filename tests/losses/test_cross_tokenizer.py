"""Losses between different tokenizers against their definitions in float64, their edges, and the chunked forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.losses.classification import cross_entropy
from jaxdistill.losses.cross_tokenizer import alm, chunked_uld, gather_aligned, token_log_probs, uld


def array(shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def model(vocab, seed=0, batch=3, time=11, width=8):
    return array((batch, time, width), seed), array((vocab, width), seed + 1, 0.5)


def mask(seed=9, batch=3, time=11):
    return jnp.asarray(np.random.default_rng(seed).random((batch, time)) < 0.7)


def gradient_too(call, weights, *given):
    """(values, gradients of their weighted sum to all that is given), compiled."""

    def both(*given):
        values, pull = jax.vjp(call, *given)
        return values, pull(weights)

    return jax.jit(both)(*given)


# States at aligned places


def test_gather_takes_the_aligned_states_and_nothing_else():
    states = array((2, 4, 3)).at[1, 3].set(jnp.nan)
    aligned = jnp.asarray([[0, -1, 2, 4, 3], [-1, -1, 1, 0, 2]])  # 4: the last token of a full row, without a state
    with jax.numpy_dtype_promotion("strict"):
        found, where = gather_aligned(states, aligned)
    np.testing.assert_array_equal(where, [[1, 0, 1, 0, 1], [0, 0, 1, 1, 1]])
    np.testing.assert_array_equal(found[0], np.stack([states[0, 0], np.zeros(3), states[0, 2], np.zeros(3), states[0, 3]]))
    np.testing.assert_array_equal(found[1], np.stack([np.zeros(3), np.zeros(3), states[1, 1], states[1, 0], states[1, 2]]))
    nothing, where = gather_aligned(states, jnp.full((2, 5), -1))
    assert not np.any(nothing)
    assert not np.any(where)
    assert gather_aligned(states.astype(jnp.bfloat16), aligned)[0].dtype == jnp.bfloat16


# Log-probabilities of labels


def dense_log_probs(hidden, head, labels, where):
    return -cross_entropy(jnp.einsum("btd,vd->btv", hidden, head), labels, where=where)


@pytest.mark.parametrize("chunk", [1, 7, 12, 999])
def test_log_probs_equal_dense_ones_with_their_gradient_for_any_chunk(chunk):
    hidden, head = model(53)
    labels, where, weights = jnp.asarray(np.random.default_rng(1).integers(0, 53, (3, 11))), mask(), array((3, 11), 5)
    with jax.numpy_dtype_promotion("strict"):
        found, ours = gradient_too(lambda h, w: token_log_probs(h, w, labels, where=where, chunk=chunk), weights, hidden, head)
    wanted, theirs = gradient_too(lambda h, w: dense_log_probs(h, w, labels, where), weights, hidden, head)
    z = np.einsum("btd,vd->btv", *(np.asarray(x, np.float64) for x in (hidden, head)))
    by_hand = np.take_along_axis(z, np.asarray(labels)[..., None], -1)[..., 0] - np.log(np.exp(z).sum(-1))
    np.testing.assert_allclose(found, np.where(where, by_hand, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(jnp.abs(b).max()))


def test_log_probs_of_bfloat16_states_sum_the_gradient_of_the_head_in_float32():
    hidden, head = model(53, time=64)
    labels, where = jnp.zeros((3, 64), jnp.int32), jnp.ones((3, 64), bool)
    total = lambda w, chunk: token_log_probs(hidden.astype(jnp.bfloat16), w, labels, where=where, chunk=chunk).sum()  # noqa: E731
    with jax.numpy_dtype_promotion("strict"):
        fine, whole = (jax.jit(jax.grad(total), static_argnums=1)(head, chunk) for chunk in (3, 999))
    assert fine.dtype == jnp.float32
    np.testing.assert_allclose(fine, whole, rtol=0, atol=4e-3 * float(jnp.abs(whole).max()))


@pytest.mark.parametrize("loss", ["token_log_probs", "chunked_uld"])
def test_masked_positions_give_nothing_whatever_they_hold(loss):
    (hidden, head), (teacher, teacher_head), where = model(31), model(40, 3), mask().at[0, 3].set(False)
    labels = jnp.ones((3, 11), jnp.int32)

    def total(hidden, head, teacher, labels):
        if loss == "token_log_probs":
            return token_log_probs(hidden, head, labels, where=where, chunk=6).sum()
        return chunked_uld(teacher, teacher_head, hidden, head, where=where, chunk=6).sum()

    both = jax.jit(jax.value_and_grad(total, (0, 1)))
    clean = both(hidden, head, teacher, labels)
    bad = (hidden.at[0, 3].set(jnp.nan), head, teacher.at[0, 3].set(jnp.inf), labels.at[0, 3].set(-7))
    dirty = both(*bad)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert not np.any(np.asarray(dirty[1][0])[~np.asarray(where)])


@pytest.mark.parametrize("loss", ["token_log_probs", "chunked_uld"])
def test_the_logits_are_never_held(loss):
    """Temporary memory at [4096, 50257], gradient included, stays far below one such array; nothing is allocated."""
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    n, vocab, teacher_vocab = (8, 512), 50257, 32000

    def total(hidden, head, teacher, teacher_head, labels, where):
        if loss == "token_log_probs":
            return token_log_probs(hidden, head, labels, where=where, chunk=64).sum()
        return chunked_uld(teacher, teacher_head, hidden, head, where=where, chunk=64).sum()

    given = (shape(*n, 256), shape(vocab, 256), shape(*n, 512), shape(teacher_vocab, 512))
    given += (shape(*n, dtype=jnp.int32), shape(*n, dtype=jnp.bool_))
    memory = jax.jit(jax.grad(total, (0, 1))).lower(*given).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.4 * 4 * n[0] * n[1] * vocab


# Approximate likelihood matching


def spans_of(sizes, time):
    """Spans of the given numbers of labels, one after another; a negative size is labels of no span."""
    numbers, span = [], 0
    for size in sizes:
        numbers += [span if size > 0 else -1] * abs(size)
        span += size > 0
    return numbers + [-1] * (time - len(numbers))


TEACHER_SPANS = jnp.asarray([spans_of([2, 1, -3, 4], 12), spans_of([-1, 1, 1, 1, 5], 12), spans_of([], 12)])
SPANS = jnp.asarray([spans_of([1, 3, -1, 2], 9), spans_of([1, -2, 1, 2, 1], 9), spans_of([], 9)])


def binary_kl(log_x, log_y):
    x = np.exp(log_x)
    return x * (log_x - log_y) + (1 - x) * (np.log(-np.expm1(log_x)) - np.log(-np.expm1(log_y)))


def by_definition(teacher_log_probs, log_probs, tau):
    found = []
    for row in range(len(SPANS)):
        for span in range(int(SPANS[row].max()) + 1):
            sums = [np.asarray(lp, np.float64)[row][np.asarray(at)[row] == span].sum()
                    for lp, at in ((teacher_log_probs, TEACHER_SPANS), (log_probs, SPANS))]
            found.append(binary_kl(*(total / tau for total in sums)))
    return np.array(found)


@pytest.mark.parametrize("tau", [1.0, 10.0, 100.0])
def test_alm_is_its_definition(tau):
    t, s = -jnp.abs(array((3, 12), 0, 3.0)), -jnp.abs(array((3, 9), 1, 3.0))
    with jax.numpy_dtype_promotion("strict"):
        values, where = jax.jit(lambda t, s: alm(t, s, TEACHER_SPANS, SPANS, tau=tau))(t, s)
    assert values.shape == where.shape == (3, 9)
    assert values.dtype == jnp.float32
    np.testing.assert_array_equal(where.sum(1), [3, 4, 0])
    np.testing.assert_allclose(values[where], by_definition(t, s, tau), rtol=2e-4, atol=1e-7)
    np.testing.assert_array_equal(np.asarray(values)[~np.asarray(where)], 0)
    gradient = jax.jit(jax.grad(lambda s: alm(t, s, TEACHER_SPANS, SPANS, tau=tau)[0].sum()))(s)
    step = 1e-5  # central differences in float64
    for row, place in ((0, 0), (0, 2), (1, 4)):
        ends = [by_definition(t, np.asarray(s, np.float64) + sign * step * (np.arange(27).reshape(3, 9) == 9 * row + place), tau).sum()
                for sign in (1, -1)]
        np.testing.assert_allclose(gradient[row, place], (ends[0] - ends[1]) / (2 * step), rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(gradient)[np.asarray(SPANS) < 0], 0)


def test_alm_is_zero_iff_equal_and_pulls_the_student_towards_the_teacher():
    t = -jnp.abs(array((3, 12), 0, 3.0))
    one_each = jnp.broadcast_to(jnp.arange(12), (3, 12))
    each = jax.jit(lambda s: alm(t, s, one_each, one_each)[0])
    gradient = jax.jit(jax.grad(lambda s: each(s).sum()))
    np.testing.assert_allclose(each(t), 0, atol=1e-7)
    np.testing.assert_allclose(gradient(t), 0, atol=1e-7)
    for factor, sign in ((1.1, -1), (0.9, 1)):  # a student less sure, or surer, than its teacher
        assert np.all(np.asarray(each(factor * t)) > 0)
        assert np.all(sign * np.asarray(gradient(factor * t)) > 0)


def test_alm_gives_the_teacher_no_gradient_and_looks_at_no_label_without_a_span():
    t, s = -jnp.abs(array((3, 12), 0)), -jnp.abs(array((3, 9), 1))
    both = jax.jit(jax.value_and_grad(lambda t, s: alm(t, s, TEACHER_SPANS, SPANS)[0].sum(), (0, 1)))
    assert not np.any(both(t, s)[1][0])
    bad = jnp.where(TEACHER_SPANS < 0, jnp.nan, t), jnp.where(SPANS < 0, jnp.nan, s)
    jax.tree.map(np.testing.assert_array_equal, both(t, s), both(*bad))


def test_alm_without_any_span_is_zero_with_no_gradient():
    nothing, s = jnp.full((3, 9), -1), -jnp.abs(array((3, 9), 1))
    values, where = alm(s, s, nothing, nothing)
    assert not np.any(values)
    assert not np.any(where)
    assert not np.any(jax.grad(lambda s: alm(s, s, nothing, nothing)[0].sum())(s))
    _, where = alm(s, s, nothing, jnp.zeros((3, 9), jnp.int32))  # a span on one side only
    assert not np.any(where)


@pytest.mark.parametrize("count", [128, 129, 300])
def test_alm_of_many_spans(count):
    t, s = -jnp.abs(array((2, count), 0, 3.0)), -jnp.abs(array((2, 2 * count), 1, 3.0))
    one_each = jnp.broadcast_to(jnp.arange(count), (2, count))
    pairs = jnp.repeat(one_each, 2, axis=1)
    values, where = jax.jit(alm)(t, s, one_each, pairs)
    assert values.shape == (2, count)
    assert np.all(where)
    wide = [np.asarray(x, np.float64) / 100 for x in (t, s)]
    np.testing.assert_allclose(values, binary_kl(wide[0], wide[1].reshape(2, count, 2).sum(-1)), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("tau", [1.0, 100.0])
def test_alm_is_finite_at_both_ends(tau):
    ends = np.array([0.0, 1e-7, -1e-12, -1e-7, -1e-6, -1e-3, -0.5, -20.0, -90.0, -1e4, -1e30, -np.inf], np.float32)
    t, s = (jnp.asarray(grid.reshape(-1, 1)) for grid in np.meshgrid(ends, ends))
    span = jnp.zeros(t.shape, jnp.int32)
    call = lambda s: alm(t, s, span, span, tau=tau)[0]  # noqa: E731
    each, gradient = gradient_too(call, jnp.ones(t.shape), s)
    assert np.all(np.isfinite(each))
    assert np.all(np.asarray(each) >= -1e-7)
    assert np.all(np.isfinite(gradient))
    x, y = (np.clip(np.asarray(v, np.float64), -1e30, -1e-6) / tau for v in (t, s))
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(each, binary_kl(x, y), rtol=1e-4, atol=2e-7)
    surer = (np.asarray(s) > -1e-6) & (np.asarray(t) < -1e-5) & np.isfinite(s)  # rounded to certainty: still pulled back
    assert np.all(np.asarray(gradient[0])[surer] > 0)


def test_alm_of_bfloat16_is_summed_in_float32():
    t = -jnp.abs(array((1, 512), 0, 3.0)).astype(jnp.bfloat16)
    s = -jnp.abs(array((1, 512), 1, 3.0)).astype(jnp.bfloat16)
    span = jnp.zeros((1, 512), jnp.int32)
    found, wanted = alm(t, s, span, span)[0], alm(t.astype(jnp.float32), s.astype(jnp.float32), span, span)[0]
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, wanted)


# Sorted probabilities


def uld_by_definition(teacher_logits, logits):
    p, q = (np.exp(np.asarray(z, np.float64)) for z in (teacher_logits, logits))
    p, q = (-np.sort(-z / z.sum(-1, keepdims=True), axis=-1) for z in (p, q))
    size = max(p.shape[-1], q.shape[-1])
    p, q = (np.concatenate([z, np.zeros((*z.shape[:-1], size - z.shape[-1]))], -1) for z in (p, q))
    return np.abs(p - q).sum(-1)


@pytest.mark.parametrize(("teacher_vocab", "vocab"), [(30, 17), (17, 30), (23, 23)])
def test_uld_is_its_definition(teacher_vocab, vocab):
    t, s = array((4, 5, teacher_vocab), 0, 2.0), array((4, 5, vocab), 1, 2.0)
    with jax.numpy_dtype_promotion("strict"):
        found = jax.jit(uld)(t, s)
    np.testing.assert_allclose(found, uld_by_definition(t, s), rtol=1e-5, atol=1e-6)
    no, gradient = jax.jit(jax.grad(lambda t, s: uld(t, s)[0, 0], (0, 1)))(t, s)
    assert not np.any(no)
    step, wide = 1e-6, np.asarray(s, np.float64)
    for token in (0, 7, 16):
        change = np.zeros_like(wide)
        change[0, 0, token] = step
        numeric = (uld_by_definition(t, wide + change) - uld_by_definition(t, wide - change))[0, 0] / (2 * step)
        np.testing.assert_allclose(gradient[0, 0, token], numeric, rtol=1e-3, atol=1e-6)


def test_uld_is_zero_for_any_order_of_equal_probabilities_and_ignores_masked_positions():
    t = array((6, 20), 0, 2.0)
    order = np.random.default_rng(3).permutation(20)
    for s in (t, t[:, order]):
        np.testing.assert_allclose(uld(t, s), 0, atol=1e-6)
    where = jnp.asarray([True, False, True, True, False, True])
    bad = t.at[1].set(jnp.nan).at[4, 3].set(jnp.inf)
    s = array((6, 25), 1)
    value, gradient = jax.jit(jax.value_and_grad(lambda s: uld(bad, s, where=where).sum()))(s.at[4].set(jnp.nan))
    np.testing.assert_allclose(value, uld_by_definition(t, s)[np.asarray(where)].sum(), rtol=1e-5)
    assert np.all(np.isfinite(gradient))
    assert not np.any(np.asarray(gradient)[~np.asarray(where)])


@pytest.mark.parametrize("chunk", [1, 7, 999])
def test_chunked_uld_equals_dense_with_its_gradient_for_any_chunk(chunk):
    (hidden, head), (teacher, teacher_head), where, weights = model(31), model(40, 3), mask(), array((3, 11), 5)
    with jax.numpy_dtype_promotion("strict"):
        found, ours = gradient_too(lambda h, w: chunked_uld(teacher, teacher_head, h, w, where=where, chunk=chunk), weights, hidden, head)
    logits = lambda h, w: jnp.einsum("btd,vd->btv", h, w)  # noqa: E731
    wanted, theirs = gradient_too(lambda h, w: uld(logits(teacher, teacher_head), logits(h, w), where=where), weights, hidden, head)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))
    gradient = jax.jit(jax.grad(lambda t, w: chunked_uld(t, w, hidden, head, where=where).sum(), (0, 1)))(teacher, teacher_head)
    assert not any(np.any(leaf) for leaf in gradient)


# Heads with rows that are no ids


@pytest.mark.parametrize("loss", ["token_log_probs", "chunked_uld"])
def test_rows_of_padding_take_no_probability(loss):
    (hidden, head), (teacher, teacher_head), where = model(31), model(40, 3), mask()
    labels = jnp.asarray(np.random.default_rng(1).integers(0, 31, (3, 11)))

    def total(head, teacher_head, vocab=None, teacher_vocab=None):
        if loss == "token_log_probs":
            return token_log_probs(hidden, head, labels, where=where, vocab=vocab).sum()
        return chunked_uld(teacher, teacher_head, hidden, head, where=where, vocab=vocab, teacher_vocab=teacher_vocab).sum()

    both = jax.jit(jax.value_and_grad(total), static_argnums=(2, 3))
    (wanted, slope), (found, ours) = both(head, teacher_head), both(*(
        jnp.concatenate([rows, array((5, 8), 7, 3.0)]) for rows in (head, teacher_head)), 31, 40)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_allclose(ours[:31], slope, rtol=1e-5, atol=1e-6)
    assert not np.any(ours[31:])


# On a mesh


@pytest.mark.parametrize("loss", ["token_log_probs", "chunked_uld"])
def test_devices_walk_their_own_tokens_and_add_up_the_gradient_of_the_head_once(loss):
    (hidden, head), (teacher, teacher_head) = model(31, batch=4, time=16), model(40, 3, batch=4, time=16)
    where, labels = mask(batch=4, time=16), jnp.ones((4, 16), jnp.int32)

    def total(hidden, head, teacher, labels, where):
        if loss == "token_log_probs":
            return token_log_probs(hidden, head, labels, where=where, chunk=4).sum()
        return chunked_uld(teacher, teacher_head, hidden, head, where=where, chunk=4).sum()

    both = jax.value_and_grad(total, (0, 1))
    alone = jax.jit(both)(hidden, head, teacher, labels, where)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4])
    rows = jax.NamedSharding(mesh, jax.P("data"))
    given = [jax.device_put(x, rows if x is not head else jax.NamedSharding(mesh, jax.P())) for x in (hidden, head, teacher, labels, where)]
    compiled = jax.jit(both).lower(*given).compile()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), compiled(*given), alone)
    loops, main = compiled.as_text().split("\nENTRY ")
    assert "while(" in main
    assert "all-reduce(" in main
    assert "all-reduce(" not in loops
