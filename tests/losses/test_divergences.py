"""Divergences against the definitions of their papers, re-derived in float64, and against torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.losses.divergences import (
    KINDS,
    divergence,
    forward_kl,
    jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    topk_kl,
    total_variation,
)

RANDOM = np.random.default_rng(7)
SHAPES = [(*RANDOM.integers(1, 5, RANDOM.integers(0, 3)), int(vocab)) for vocab in RANDOM.integers(2, 400, 20)]
ALL = {
    "forward_kl": forward_kl, "reverse_kl": reverse_kl, "total_variation": total_variation,
    **{f"jsd-{beta}": functools.partial(jsd, beta=beta) for beta in (0.0, 0.1, 0.5, 0.9, 1.0)},
    **{f"skew_kl-{alpha}": functools.partial(skew_kl, alpha=alpha) for alpha in (0.0, 0.1, 0.5, 1.0)},
    **{f"skew_reverse_kl-{alpha}": functools.partial(skew_reverse_kl, alpha=alpha) for alpha in (0.0, 0.1, 0.5, 1.0)},
    **{f"topk_kl-{k}": functools.partial(topk_kl, k=k) for k in (1, 5, 10**6)},
}
every = pytest.mark.parametrize("name", ALL)


def logits(shape, seed=0, scale=3.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def probabilities(z):
    z = np.asarray(z, np.float64)
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def kl(a, b):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(a > 0, a * np.log(a / b), 0.0).sum(-1)


def definition(name: str, teacher, student, temperature=1.0):
    """In float64, from the papers (jsd: beta 0 and 1 as TRL has them). Every id is of both vocabularies here."""
    p, q = (probabilities(np.asarray(z, np.float64) / temperature) for z in (teacher, student))
    kind, _, option = name.partition("-")
    share = float(option or 0)
    if kind == "topk_kl":
        order = np.argsort(-p, axis=-1, kind="stable")
        p, q = (np.take_along_axis(x, order, -1) for x in (p, q))
        k = min(int(option), p.shape[-1])
        p, q = (np.concatenate([x[..., :k], x[..., k:].sum(-1, keepdims=True)], -1) for x in (p, q))
    if kind == "reverse_kl" or (kind == "jsd" and share == 1):
        return kl(q, p)
    if kind == "jsd" and share > 0:
        m = share * p + (1 - share) * q
        return share * kl(p, m) + (1 - share) * kl(q, m)
    if kind == "skew_kl":
        return kl(p, share * p + (1 - share) * q)
    if kind == "skew_reverse_kl":
        return kl(q, share * q + (1 - share) * p)
    return np.abs(p - q).sum(-1) / 2 if kind == "total_variation" else kl(p, q)


def slope(name: str, teacher, student, temperature=1.0, step=1e-6):
    """Central differences in float64 of the sum over tokens, to the student's logits."""
    student, found = np.asarray(student, np.float64), np.zeros(student.shape)
    for index in np.ndindex(student.shape):
        ends = []
        for sign in (1, -1):
            moved = student.copy()
            moved[index] += sign * step
            ends.append(definition(name, teacher, moved, temperature).sum())
        found[index] = (ends[0] - ends[1]) / (2 * step)
    return found


@pytest.mark.parametrize("seed", range(len(SHAPES)))
def test_each_is_its_definition(seed):
    t, s = logits(SHAPES[seed], 2 * seed), logits(SHAPES[seed], 2 * seed + 1)
    temperature = (0.5, 1.0, 2.0)[seed % 3]
    with jax.numpy_dtype_promotion("strict"):
        found = jax.jit(lambda t, s: {name: of(t, s, temperature=temperature) for name, of in ALL.items()})(t, s)
    for name, value in found.items():
        assert value.shape == SHAPES[seed][:-1]
        np.testing.assert_allclose(value, definition(name, t, s, temperature), rtol=1e-6, atol=1e-6, err_msg=name)


@every
def test_its_gradient_is_the_slope(name):
    t, s = logits((2, 7), 0, 1.0), logits((2, 7), 1, 1.0)
    for temperature in (1.0, 2.0):
        with jax.numpy_dtype_promotion("strict"):
            found = jax.grad(lambda s: ALL[name](t, s, temperature=temperature).sum())(s)  # noqa: B023
        np.testing.assert_allclose(found, slope(name, t, s, temperature), atol=1e-6)


@every
def test_it_is_zero_with_no_slope_where_both_are_equal(name):
    t = logits((4, 9))
    value, gradient = jax.value_and_grad(lambda s: ALL[name](t, s).sum())(t)
    np.testing.assert_allclose(value, 0.0, atol=1e-6)
    np.testing.assert_allclose(gradient, np.zeros((4, 9)), atol=1e-6)


@every
def test_what_is_outside_either_vocabulary_is_outside_both(name):
    t, s = logits((3, 12), 0), logits((3, 12), 1)
    outside_t, outside_s = t.at[:, 10:].set(-jnp.inf), s.at[:, 0].set(-jnp.inf)
    value, gradients = jax.value_and_grad(lambda t, s: ALL[name](t, s).sum(), (0, 1))(outside_t, outside_s)
    np.testing.assert_allclose(value, ALL[name](t[:, 1:10], s[:, 1:10]).sum(), rtol=1e-5, atol=1e-6)
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
        assert np.all(np.asarray(gradient)[:, [0, 10, 11]] == 0)
    nothing = jnp.full((3, 12), -jnp.inf)
    value, gradient = jax.value_and_grad(lambda s: ALL[name](t, s).sum())(nothing)
    assert value == 0
    assert np.all(np.asarray(gradient) == 0)


@every
def test_one_hot_logits(name):
    """The teacher is sure, and the student of something else: large, finite, and right."""
    t, s = jnp.zeros((1, 6)).at[0, 2].set(60.0), jnp.zeros((1, 6)).at[0, 4].set(60.0)
    value, gradient = jax.value_and_grad(lambda s: ALL[name](t, s).sum())(s)
    np.testing.assert_allclose(value, definition(name, t, s).sum(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, slope(name, t, s, step=1e-5), atol=1e-5)
    inf = jnp.where(t > 0, 60.0, -jnp.inf)  # sure beyond doubt: one shared id is left, of which both are sure
    np.testing.assert_allclose(ALL[name](inf, s), [0.0], atol=1e-6)


@every
def test_masked_tokens_give_nothing_whatever_they_hold(name):
    t, s, where = logits((3, 8), 0), logits((3, 8), 1), jnp.asarray([True, False, True])
    call = lambda s, where: ALL[name](t, s, where=where)  # noqa: E731
    bad = s.at[1].set(jnp.nan)
    np.testing.assert_array_equal(call(bad, where), jnp.where(where, call(s, None), 0.0))
    gradient = jax.grad(lambda s: call(s, where).sum())
    np.testing.assert_array_equal(gradient(bad), gradient(s))
    assert np.all(np.asarray(gradient(bad))[1] == 0)
    assert np.all(np.asarray(call(jnp.full_like(s, jnp.inf), jnp.zeros(3, bool))) == 0)


def test_the_ends_of_the_options_are_other_divergences():
    t, s = logits((4, 33), 0), logits((4, 33), 1)
    same = np.testing.assert_array_equal
    for one in (jsd(t, s, beta=0), skew_kl(t, s, alpha=0)):
        same(one, forward_kl(t, s))
    for one in (jsd(t, s, beta=1), skew_reverse_kl(t, s, alpha=0)):
        same(one, reverse_kl(t, s))
    for one in (skew_kl(t, s, alpha=1), skew_reverse_kl(t, s, alpha=1)):
        same(one, np.zeros(4))
    np.testing.assert_allclose(topk_kl(t, s, k=33), forward_kl(t, s), rtol=1e-6)
    same(forward_kl(t, s), reverse_kl(s, t))


def test_coarse_kl_grows_with_k_to_the_full_one():
    t, s = logits((50, 30), 0), logits((50, 30), 1)
    found = np.stack([topk_kl(t, s, k=k) for k in (1, 2, 5, 15, 30)])
    assert np.all(np.diff(found, axis=0) > -1e-6)
    leaves = s - 20.0 * jax.nn.one_hot(jax.lax.top_k(t, 5)[1], 30).sum(1)  # off the top five, but even among them
    assert np.all(np.asarray(topk_kl(t, leaves, k=5)) > 3)


def test_top_k_takes_k_tokens_also_where_they_tie():
    t, s = jnp.zeros((1, 6)), jnp.asarray([[3.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(topk_kl(t, s, k=2)[0], definition("topk_kl-2", t, s)[0], rtol=1e-6)


def test_it_equals_torch_with_its_gradient():
    torch = pytest.importorskip("torch")
    t, s = logits((6, 50), 0), logits((6, 50), 1)
    log_p = torch.log_softmax(torch.tensor(np.asarray(t)).double() / 2, -1)

    def of(name, log_q):
        div = lambda target, of: torch.nn.functional.kl_div(of, target, reduction="batchmean", log_target=True)  # noqa: E731
        if name == "jsd":  # as trl.GKDTrainer.generalized_jsd_loss writes it, with beta 0.3
            beta = torch.tensor(0.3).double()
            log_m = torch.logsumexp(torch.stack([log_q + torch.log1p(-beta), log_p + torch.log(beta)]), dim=0)
            return beta * div(log_p, log_m) + (1 - beta) * div(log_q, log_m)
        return div(log_p, log_q) if name == "forward_kl" else div(log_q, log_p)

    for name in ("forward_kl", "reverse_kl", "jsd"):
        theirs = torch.tensor(np.asarray(s), requires_grad=True)
        loss = of(name, torch.log_softmax(theirs.double() / 2, -1))
        loss.backward()
        ours, grad = jax.value_and_grad(lambda s: divergence(name, beta=0.3)(t, s, temperature=2.0).mean())(s)  # noqa: B023
        np.testing.assert_allclose(ours, loss.item(), rtol=1e-6)
        np.testing.assert_allclose(grad, theirs.grad.numpy(), rtol=1e-5, atol=1e-8)


def test_the_gradient_keeps_its_size_times_t_squared():
    """Hinton et al.: without T^2 the gradient falls as 1 / T^2 (for logits that are small beside T)."""
    t, s = logits((4, 50), 0, scale=0.1), logits((4, 50), 1, scale=0.1)
    gradient = lambda T: T**2 * jax.grad(lambda s: forward_kl(t, s, temperature=T).sum())(s)  # noqa: E731
    norm = [float(jnp.linalg.norm(gradient(T))) for T in (1.0, 8.0)]
    assert norm[1] == pytest.approx(norm[0], rel=0.1)


@every
def test_bfloat16_logits_are_summed_in_float32(name):
    t, s = (logits((4, 4096), seed).astype(jnp.bfloat16) for seed in (0, 1))
    found = ALL[name](t, s)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, ALL[name](t.astype(jnp.float32), s.astype(jnp.float32)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_chosen_by_name_with_the_option_it_takes(kind):
    t, s = logits((2, 9), 0), logits((2, 9), 1)
    option = {"jsd": "-0.3", "skew_kl": "-0.2", "skew_reverse_kl": "-0.2", "topk_kl": "-4"}.get(kind, "")
    found = divergence(kind, alpha=0.2, beta=0.3, k=4)(t, s, temperature=2.0)
    np.testing.assert_allclose(found, definition(kind + option, t, s, 2.0), rtol=1e-5)


def test_what_is_refused():
    t = logits((2, 9))
    with pytest.raises(ValueError, match="kind: found 'kl'; accepted: forward_kl, reverse_kl, jsd, skew_kl"):
        divergence("kl")
    for wrong in (functools.partial(jsd, beta=1.5), functools.partial(skew_kl, alpha=-0.1), functools.partial(topk_kl, k=0)):
        with pytest.raises(ValueError, match="found .*; accepted: "):
            wrong(t, t)
