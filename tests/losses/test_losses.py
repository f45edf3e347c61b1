"""Divergences and cross-entropy against their definitions in float64, and against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.losses.classification import cross_entropy
from jaxdistill.losses.divergences import forward_kl
from jaxdistill.losses.fused_vocab import fused_vocab_loss

SHAPES = [(3, 7), (2, 5, 33), (1, 1, 1001)]


def logits(shape, seed=0, scale=3.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_forward_kl_is_its_definition(shape, temperature):
    t, s = logits(shape, 0), logits(shape, 1)
    p, q = (softmax(np.asarray(z, np.float64) / temperature) for z in (t, s))
    with jax.numpy_dtype_promotion("strict"):
        found = forward_kl(t, s, temperature=temperature)
    np.testing.assert_allclose(found, (p * np.log(p / q)).sum(-1), rtol=2e-6, atol=2e-6)


def test_forward_kl_equals_torch_with_its_gradient():
    torch = pytest.importorskip("torch")
    t, s = logits((6, 50), 0), logits((6, 50), 1)
    theirs = torch.tensor(np.asarray(s), requires_grad=True)
    target = torch.softmax(torch.tensor(np.asarray(t)) / 2, -1)
    loss = torch.nn.functional.kl_div(torch.log_softmax(theirs / 2, -1), target, reduction="batchmean")
    loss.backward()
    ours, grad = jax.value_and_grad(lambda s: forward_kl(t, s, temperature=2.0).mean())(s)
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-6)
    np.testing.assert_allclose(grad, theirs.grad.numpy(), rtol=1e-5, atol=1e-8)


def test_forward_kl_is_zero_iff_equal_and_not_symmetric():
    t, s = logits((4, 9), 0), logits((4, 9), 1)
    np.testing.assert_array_equal(forward_kl(t, t, temperature=2.0), np.zeros(4))
    assert np.all(np.asarray(forward_kl(t, s)) > 1e-2)
    assert np.abs(np.asarray(forward_kl(t, s)) - np.asarray(forward_kl(s, t))).max() > 1e-2


def test_the_gradient_keeps_its_size_times_t_squared():
    """Hinton et al.: without T^2 the gradient falls as 1 / T^2 (for logits that are small beside T)."""
    t, s = logits((4, 50), 0, scale=0.1), logits((4, 50), 1, scale=0.1)
    gradient = lambda T: T**2 * jax.grad(lambda s: forward_kl(t, s, temperature=T).sum())(s)  # noqa: E731
    norm = [float(jnp.linalg.norm(gradient(T))) for T in (1.0, 8.0)]
    assert norm[1] == pytest.approx(norm[0], rel=0.1)


def test_tokens_outside_either_vocabulary_are_outside_both():
    t, s = logits((3, 12), 0), logits((3, 12), 1)
    padded_t, padded_s = t.at[:, 10:].set(-jnp.inf), s.at[:, 11:].set(-jnp.inf)
    np.testing.assert_allclose(forward_kl(padded_t, padded_s), forward_kl(t[:, :10], s[:, :10]), rtol=1e-6)
    gradient = jax.grad(lambda s: forward_kl(padded_t, s).sum())(padded_s)
    assert np.all(np.isfinite(gradient))
    assert np.all(np.asarray(gradient)[:, 10:] == 0)


@pytest.mark.parametrize("loss", [forward_kl, lambda t, s, where: cross_entropy(s, jnp.zeros(3, jnp.int32), where=where)])
def test_masked_tokens_give_nothing_whatever_they_hold(loss):
    t, s = logits((3, 8), 0), logits((3, 8), 1)
    where = jnp.asarray([True, False, True])
    bad = s.at[1].set(jnp.nan)
    value, gradient = jax.value_and_grad(lambda s: loss(t, s, where=where).sum())(bad)
    clean = jax.grad(lambda s: loss(t, s, where=where).sum())(s)
    assert np.isfinite(value)
    np.testing.assert_array_equal(gradient, clean)
    assert np.all(np.asarray(gradient)[1] == 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_torch_with_its_gradient(smoothing):
    torch = pytest.importorskip("torch")
    z, labels = logits((5, 40)), np.arange(5) * 7
    theirs = torch.tensor(np.asarray(z), requires_grad=True)
    loss = torch.nn.functional.cross_entropy(theirs, torch.tensor(labels), label_smoothing=smoothing)
    loss.backward()
    with jax.numpy_dtype_promotion("strict"):
        ours, grad = jax.value_and_grad(lambda z: cross_entropy(z, jnp.asarray(labels), smoothing=smoothing).mean())(z)
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-6)
    np.testing.assert_allclose(grad, theirs.grad.numpy(), rtol=1e-5, atol=1e-8)


def test_bfloat16_logits_are_summed_in_float32():
    t, s = (logits((4, 4096), seed).astype(jnp.bfloat16) for seed in (0, 1))
    found = forward_kl(t, s)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, forward_kl(t.astype(jnp.float32), s.astype(jnp.float32)), rtol=1e-6)


# The fused form


def fused_case(vocab: int, seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 6)
    hidden, head = jax.random.normal(keys[0], (3, 11, 8)), 0.3 * jax.random.normal(keys[1], (vocab, 8))
    labels, where = jax.random.randint(keys[2], (3, 11), 0, vocab), jax.random.bernoulli(keys[3], 0.8, (3, 11))
    return hidden, head, labels, where, (jax.random.normal(keys[4], (3, 11, 12)), 0.3 * jax.random.normal(keys[5], (vocab, 12)))


SCALE = {"lm": jnp.float32(0.3), "kd": jnp.float32(0.7)}


def dense(hidden, head, labels, where, teacher, temperature, smoothing):
    student = jnp.einsum("btd,vd->btv", hidden, head)
    lm = cross_entropy(student, labels, smoothing=smoothing, where=where).sum()
    kd = temperature**2 * forward_kl(jnp.einsum("btd,vd->btv", *teacher), student, temperature=temperature, where=where).sum()
    return SCALE["lm"] * lm + SCALE["kd"] * kd, {"lm": lm, "kd": kd}


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(("vocab", "temperature", "smoothing", "chunk"), [(1001, 1.0, 0.0, 7), (50, 2.0, 0.1, 8), (333, 0.5, 0.0, 999)])
def test_fused_equals_dense_for_any_chunk(vocab, temperature, smoothing, chunk, traced):
    hidden, head, labels, where, teacher = fused_case(vocab)
    given = jnp.float32(temperature) if traced else temperature

    def fused(hidden, head):
        return fused_vocab_loss(hidden, head, labels, scale=SCALE, where=where, teacher=teacher, temperature=given,
                                smoothing=smoothing, chunk=chunk)

    with jax.numpy_dtype_promotion("strict"):
        (total, sums), gradient = jax.jit(jax.value_and_grad(fused, (0, 1), has_aux=True))(hidden, head)
        alone, _ = jax.jit(fused)(hidden, head)  # the path without a gradient
    (wanted, parts), theirs = jax.value_and_grad(lambda h, w: dense(h, w, labels, where, teacher, temperature, smoothing), (0, 1),
                                                 has_aux=True)(hidden, head)
    np.testing.assert_allclose([total, alone], [wanted, wanted], rtol=1e-6)
    for name in parts:
        np.testing.assert_allclose(sums[name], parts[name], rtol=1e-6)
    for a, b in zip(gradient, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(jnp.abs(b).max()))


def test_fused_without_a_teacher_or_with_a_frozen_head():
    hidden, head, labels, where, teacher = fused_case(65)
    lm = lambda h, w: fused_vocab_loss(h, w, labels, scale={"lm": SCALE["lm"]}, where=where)[0]  # noqa: E731
    wanted = SCALE["lm"] * cross_entropy(jnp.einsum("btd,vd->btv", hidden, head), labels, where=where).sum()
    np.testing.assert_allclose(lm(hidden, head), wanted, rtol=1e-6)
    both, frozen = jax.grad(lm, (0, 1))(hidden, head), jax.grad(lm)(hidden, head)
    np.testing.assert_allclose(frozen, both[0], rtol=1e-6)
    flops = [jax.jit(jax.grad(lm, which)).lower(hidden, head).compile().cost_analysis()["flops"] for which in ((0, 1), 0)]
    assert flops[1] < 0.85 * flops[0]  # the head's gradient is not even formed


def test_fused_ignores_what_masked_tokens_hold_and_gives_the_teacher_no_gradient():
    hidden, head, labels, where, teacher = fused_case(40)
    where = where.at[0, 3].set(False)
    bad, bad_teacher = hidden.at[0, 3].set(jnp.nan), (teacher[0].at[0, 3].set(jnp.inf), teacher[1])
    call = lambda h, t: fused_vocab_loss(h, head, labels, scale=SCALE, where=where, teacher=t)[0]  # noqa: E731
    clean, dirty = jax.value_and_grad(call)(hidden, teacher), jax.value_and_grad(call)(bad, bad_teacher)
    np.testing.assert_array_equal(clean[0], dirty[0])
    np.testing.assert_array_equal(clean[1], dirty[1])
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(jax.grad(call, 1)(hidden, teacher)))


def test_fused_sums_cannot_be_differentiated():
    hidden, head, labels, where, teacher = fused_case(40)
    with pytest.raises(TypeError, match="only the total"):
        jax.grad(lambda h: fused_vocab_loss(h, head, labels, scale=SCALE, where=where, teacher=teacher)[1]["kd"])(hidden)


def test_fused_never_holds_the_logits():
    """Temporary memory at [8192, 50257] stays far below one such array in float32; nothing is allocated to find out."""
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    n, vocab = (8, 1024), 50257
    scale = {"lm": shape(), "kd": shape()}
    call = lambda h, w, y, m, t, s: fused_vocab_loss(h, w, y, scale=s, where=m, teacher=t, chunk=128)[0]  # noqa: E731
    lowered = jax.jit(jax.grad(call, (0, 1))).lower(
        shape(*n, 768), shape(vocab, 768), shape(*n, dtype=jnp.int32), shape(*n, dtype=jnp.bool_),
        (shape(*n, 1600), shape(vocab, 1600)), scale)
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.3 * 4 * n[0] * n[1] * vocab
