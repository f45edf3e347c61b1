"""Several teachers, and targets of a few ids: their definitions in float64, what bounds them, and what their samples are on average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from jaxdistill.evaluators import language
from jaxdistill.losses import fused_vocab
from jaxdistill.losses.divergences import KINDS, divergence, forward_kl, topk_kl
from jaxdistill.losses.fused_vocab import fused_vocab_loss
from jaxdistill.losses.targets import MIXTURES, Mixture, Samples, TopK, coarse_kl, mixed, sample, top_k

SHAPE, ROWS, VOCAB = (3, 11), 65, 60
SCALE = {"lm": jnp.float32(0.3), "kd": jnp.float32(0.7)}


def normal(seed: int, *shape, by=1.0):
    return by * jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(scope="module")
def student():
    """hidden, head, bias; logits are capped at 6."""
    return normal(0, *SHAPE, 8), normal(1, ROWS, 8, by=0.7), normal(2, ROWS)


@pytest.fixture(scope="module")
def models():
    """Three teachers of unlike widths, one with a bias, one capped too."""
    widths = (12, 8, 5)
    both = [(normal(10 + w, *SHAPE, w), normal(20 + w, ROWS, w, by=0.6)) for w in widths]
    return (*both[0], normal(30, ROWS)), both[1], (*both[2], None, 4.0)


@pytest.fixture(scope="module")
def where():
    return jax.random.bernoulli(jax.random.key(3), 0.8, SHAPE)


def logits_of(hidden, head, bias=None, softcap=None):
    logits = jnp.einsum("btd,vd->btv", hidden, head) + (0 if bias is None else bias[None, None])
    return (logits if softcap is None else softcap * jnp.tanh(logits / softcap))[..., :VOCAB]


def fused(student, target, where, *, wrt=(0, 1, 2), temperature=1.0, chunk=7, scale=SCALE, **more):
    """((total, (terms, probes)), gradients)."""
    labels = jax.random.randint(jax.random.key(4), SHAPE, 0, VOCAB)

    def loss(hidden, head, bias):
        total, *rest = fused_vocab_loss(
            hidden, head, labels, scale=scale, where=where, teacher=target, head_bias=bias, softcap=6.0, temperature=temperature,
            vocab=VOCAB, chunk=chunk, **more)
        return total, rest

    return jax.jit(jax.value_and_grad(loss, wrt, has_aux=True))(*student)


def close(found, wanted, tolerance=1e-6):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(float(jnp.abs(b).max()), 1e-3))


class TestMixture:
    @pytest.mark.parametrize("of", MIXTURES)
    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    def test_the_definition_in_float64(self, models, of, temperature):
        weights = 0.5, 0.3, 0.2
        all_logits = [logits_of(*model) for model in models]
        found = jax.nn.softmax(mixed(all_logits, weights, of, temperature=temperature) / temperature)
        exact = [np.asarray(logits, np.float64) / temperature for logits in all_logits]
        if of == "logits":
            wanted = scipy.special.softmax(sum(w * z for w, z in zip(weights, exact, strict=True)), axis=-1)
        else:
            wanted = sum(w * scipy.special.softmax(z, axis=-1) for w, z in zip(weights, exact, strict=True))
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-9)

    @pytest.mark.parametrize(("of", "kind"), [("probabilities", "forward_kl"), ("logits", "jsd"), ("probabilities", "topk_kl")])
    def test_the_walk_equals_the_dense_form(self, student, models, where, of, kind):
        weights = 0.5, 0.3, 0.2
        found = fused(student, Mixture(models, weights, of), where, temperature=2.0, kind=kind, top_k=5, scale={"kd": SCALE["kd"]})
        target = mixed([logits_of(*model) for model in models], weights, of, temperature=2.0)
        distance = divergence(kind, alpha=0.1, beta=0.5, k=5)

        def dense(hidden, head, bias):
            values = distance(target, logits_of(hidden, head, bias, 6.0), temperature=2.0, where=where)
            return SCALE["kd"] * 4 * jnp.sum(values)

        wanted = jax.jit(jax.value_and_grad(dense, (0, 1, 2)))(*student)
        close((found[0][0], found[1]), wanted)

    def test_one_teacher_is_the_plain_path(self, student, models, where):
        """By itself to the bit; twice, or beside one of no weight, to rounding."""
        plain = fused(student, models[0], where, temperature=2.0, probe=True)
        jax.tree.map(np.testing.assert_array_equal, fused(student, Mixture(models[:1], (1.0,)), where, temperature=2.0, probe=True), plain)
        for other in (Mixture((models[0], models[0]), (0.25, 0.75), "logits"), Mixture(models[:2], (1.0, 0.0))):
            close(fused(student, other, where, temperature=2.0, probe=True), plain)

    def test_probes_and_evaluation_look_at_the_mixture(self, student, models, where):
        mixture = Mixture(models, (0.2, 0.2, 0.6))
        (_, (_, probes)), _ = fused(student, mixture, where, temperature=3.0, kind="jsd", probe=True)
        labels = jax.random.randint(jax.random.key(4), SHAPE, 0, VOCAB)
        sums = language.chunked_sums((*student, 6.0), labels, where, jnp.ones(VOCAB, jnp.int32), mixture, vocab=VOCAB, chunk=9)
        np.testing.assert_allclose(probes["teacher_kl"], (sums["kl"], sums["tokens"]), rtol=1e-5)
        np.testing.assert_allclose(probes["top1_agreement"][0], sums["top1"])
        p = mixed([logits_of(*model) for model in models], mixture.weights, "probabilities")
        entropy = scipy.stats.entropy(np.exp(np.asarray(p, np.float64)), axis=-1)
        np.testing.assert_allclose(probes["teacher_entropy"][0], np.sum(np.where(where, entropy, 0)), rtol=1e-5)

    @pytest.mark.parametrize(("change", "said"), [
        (dict(weights=(0.5, 0.5)), "teacher: found 2 weights for 3 models; accepted: one for each"),
        (dict(of="votes"), "teacher: found a mixture of 'votes'; accepted: probabilities, logits"),
    ])
    def test_what_is_refused(self, student, models, where, change, said):
        with pytest.raises(ValueError, match=said):
            fused(student, Mixture(models, (0.2, 0.2, 0.6))._replace(**change), where)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("of", ["states", "top 7", "draws"])
@pytest.mark.parametrize("small", [0, fused_vocab.SMALL])
def test_both_terms_and_their_gradients_in_float64(where, of, temperature, small, monkeypatch):
    """Whatever they share of one softmax, and whichever way round the head's gradient is added up."""
    monkeypatch.setattr(fused_vocab, "SMALL", small)
    student = normal(40, *SHAPE, 8), normal(41, VOCAB, 8)
    teacher = normal(42, *SHAPE, 12, by=0.6), normal(43, VOCAB, 12)
    labels = jax.random.randint(jax.random.key(4), SHAPE, 0, VOCAB)
    theirs = logits_of(*teacher)
    target = {"states": teacher, "top 7": top_k(theirs, 7, temperature=temperature),
              "draws": sample(jax.random.key(5), theirs, 9, temperature=temperature, gamma=0.5)}[of]

    def loss(hidden, head):
        return fused_vocab_loss(hidden, head, labels, scale=SCALE, where=where, teacher=target, temperature=temperature, chunk=7)[0]

    found = jax.jit(jax.value_and_grad(loss, (0, 1)))(*student)
    hidden, head, mask = (np.asarray(x, np.float64) for x in (*student, where))
    log_q, log_q_hot, log_p = (scipy.special.log_softmax(np.asarray(z, np.float64) / t, axis=-1)
                               for z, t in ((hidden @ head.T, 1), (hidden @ head.T, temperature), (theirs, temperature)))
    onehot = np.eye(VOCAB)
    p, q = np.exp(log_p), np.exp(log_q_hot)
    if of == "draws":
        p = np.einsum("btn,btnv->btv", target.weights, onehot[target.ids])
        kd, slope = -np.sum(p * log_q_hot, axis=-1), p.sum(axis=-1, keepdims=True) * q - p
    elif of == "states":
        kd, slope = np.sum(p * (log_p - log_q_hot), axis=-1), q - p
    else:
        kept = onehot[target.ids].sum(axis=-2)
        tails = [np.sum((1 - kept) * x, axis=-1, keepdims=True) for x in (p, q)]
        kd = np.sum(kept * p * (log_p - log_q_hot), axis=-1) + (tails[0] * np.log(tails[0] / tails[1]))[..., 0]
        slope = np.where(kept, q - p, q * (1 - tails[0] / tails[1]))
    lm = -np.sum(onehot[labels] * log_q, axis=-1)
    total = np.sum(mask * (SCALE["lm"] * lm + SCALE["kd"] * temperature**2 * kd))
    d = mask[..., None] * (SCALE["lm"] * (np.exp(log_q) - onehot[labels]) + SCALE["kd"] * temperature * slope)
    close(found, (total, (d @ head, np.einsum("btv,btd->vd", d, hidden))), 2e-6)


class TestTopK:
    @pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (7, 2.5), (VOCAB, 2.5)])
    def test_the_walk_is_the_coarse_kl_of_all_logits(self, student, models, where, temperature, k):
        """`divergences.topk_kl`, which sees all of the teacher's logits; at k = vocab forward KL."""
        theirs = logits_of(*models[0])
        found = fused(student, top_k(theirs, k, temperature=temperature), where, temperature=temperature, scale={"kd": SCALE["kd"]})

        def dense(hidden, head, bias):
            ours = logits_of(hidden, head, bias, 6.0)
            of_all = forward_kl if k == VOCAB else lambda *args, **options: topk_kl(*args, k=k, **options)
            return SCALE["kd"] * temperature**2 * jnp.sum(of_all(theirs, ours, temperature=temperature, where=where))

        close((found[0][0], found[1]), jax.jit(jax.value_and_grad(dense, (0, 1, 2)))(*student))

    def test_any_chunk_gives_the_same(self, student, models, where):
        target = top_k(logits_of(*models[0]), 7)
        close(fused(student, target, where, chunk=1, probe=True), fused(student, target, where, chunk=999, probe=True))

    def test_at_most_the_full_kl(self):
        teacher, ours = 4 * normal(0, 2, 500, VOCAB)
        compare = jax.jit(lambda k: coarse_kl(top_k(teacher, k), ours), static_argnums=0)
        full, coarse = forward_kl(teacher, ours), [compare(k) for k in (1, 5, VOCAB)]
        for fewer, more in zip(coarse, [*coarse[1:], full], strict=True):
            assert np.all(fewer <= more + 1e-6 * full)
        np.testing.assert_allclose(coarse[-1], full, rtol=1e-6)
        assert np.median(coarse[0] / full) < 0.95

    def test_a_small_tail_is_exact(self):
        """Of mass 1e-9 (1 less what the k have would be 0 or 1e-7), on both sides: what pulls the student's up by so much."""
        teacher, ours = (np.r_[np.array([12.0, 11.0, 10.0]), np.full(VOCAB - 3, low)] for low in (-12.0, -14.0))
        p, q = (scipy.special.softmax(z) for z in (teacher, ours))
        assert 1e-10 < q[3:].sum() < p[3:].sum() < 1e-8
        target = top_k(jnp.asarray(teacher, jnp.float32), 3)
        gradient = jax.grad(lambda x: coarse_kl(target, x))(jnp.asarray(ours, jnp.float32))
        np.testing.assert_allclose(gradient[3:], q[3:] * (1 - p[3:].sum() / q[3:].sum()), rtol=1e-4)

    @pytest.mark.parametrize("low", [-300.0, -jnp.inf])
    def test_a_tail_of_no_mass_still_counts_for_the_student(self, low):
        """What the student has outside the ids is in its denominator, and is pushed down."""
        target = TopK(jnp.array([[4, 1]]), jnp.array([[1.0, 0.0]]), jnp.array([low]))
        ours = normal(5, 1, 9)
        value, gradient = jax.value_and_grad(lambda x: coarse_kl(target, x)[0])(ours)
        p, q = np.zeros(9), scipy.special.softmax(np.asarray(ours[0], np.float64))
        p[[4, 1]] = scipy.special.softmax([1.0, 0.0])
        np.testing.assert_allclose(value, np.sum(scipy.special.rel_entr(p, q)), rtol=1e-6)
        np.testing.assert_allclose(gradient[0], q - p, atol=1e-7)

    def test_ids_below_zero_hold_nothing(self, student, models, where):
        target = top_k(logits_of(*models[0]), 7)
        pad = lambda x, value: jnp.concatenate([x, jnp.full((*SHAPE, 3), value, x.dtype)], axis=-1)  # noqa: E731
        padded = target._replace(ids=pad(target.ids, -1), logits=pad(target.logits, jnp.nan))
        close(fused(student, padded, where, probe=True), fused(student, target, where, probe=True))

    def test_masked_tokens_give_nothing_whatever_they_hold(self, student, models, where):
        target = top_k(logits_of(*models[0]), 7)
        clean = fused(student, target, where)
        bad = TopK(jnp.where(where[..., None], target.ids, 10**6),
                   *(jnp.where(where.reshape(*SHAPE, *[1] * (x.ndim - 2)), x, jnp.nan) for x in target[1:]))
        dirty = fused(student, bad, where)
        jax.tree.map(np.testing.assert_array_equal, dirty, clean)

    def test_probes_show_what_can_be_known(self, student, models, where):
        (_, (_, whole)), _ = fused(student, models[0], where, probe=True)
        (_, (_, probes)), _ = fused(student, top_k(logits_of(*models[0]), 5), where, probe=True)
        teachers = {"teacher_entropy", "teacher_kl", "teacher_nll"}
        assert probes.keys() == whole.keys() - teachers
        close(probes, {name: whole[name] for name in probes})


class TestSamples:
    @pytest.mark.parametrize(("gamma", "temperature"), [(1.0, 1.0), (0.6, 2.0)])
    def test_on_average_they_are_the_distribution(self, gamma, temperature):
        """Chi-square of the mean over 10,000 draws of 8 ids: all probabilities at once, so nothing is tested many times."""
        logits, draws = normal(6, 37, by=2.0), 10_000
        found = sample(jax.random.key(0), jnp.broadcast_to(logits, (draws, 37)), 8, temperature=temperature, gamma=gamma)
        estimates = np.asarray(jnp.sum(jax.nn.one_hot(found.ids, 37) * found.weights[..., None], axis=1), np.float64)
        p = scipy.special.softmax(np.asarray(logits, np.float64) / temperature)
        assert off(estimates[:, :-1] if gamma == 1 else estimates, p[:-1] if gamma == 1 else p) > 0.003

    def test_their_mean_gradient_is_that_of_the_full_kl(self):
        """10,000 draws at T = 2: the mean gradient to the hidden states, through the walk, against the exact one as one vector
        (Hotelling's statistic), and each of its 4 coordinates within 3 standard errors. A renormalised top-k is far outside."""
        draws, n, width, temperature = 10_000, 8, 4, 2.0
        hidden, head = normal(7, width), normal(8, 41, width, by=0.8)
        teacher = normal(9, 41, by=1.5)
        spread = jnp.broadcast_to(hidden, (100, 100, width))
        wide = jnp.broadcast_to(teacher, (100, 100, 41))

        def gradient(target):
            loss = lambda h: fused_vocab_loss(  # noqa: E731
                h, head, jnp.zeros((100, 100), jnp.int32), scale={"kd": jnp.float32(1.0)}, where=jnp.ones((100, 100), bool),
                teacher=target, temperature=temperature, chunk=2_000)[0]
            return np.asarray(jax.jit(jax.grad(loss))(spread), np.float64).reshape(draws, width)

        exact = jax.grad(lambda h: temperature**2 * forward_kl(teacher, head @ h, temperature=temperature))(hidden)
        found = gradient(sample(jax.random.key(1), wide, n, temperature=temperature, gamma=0.7))
        assert off(found, exact) > 0.003
        errors = found.std(axis=0, ddof=1) / np.sqrt(draws)
        assert np.all(np.abs(found.mean(axis=0) - exact) < 3 * errors)
        kept = top_k(wide, n)
        renormalised = gradient(Samples(kept.ids, jax.nn.softmax(kept.logits / temperature, axis=-1)))
        assert np.any(np.abs(renormalised.mean(axis=0) - exact) > 30 * errors)

    def test_the_value_is_the_weighted_cross_entropy(self, student, models, where):
        target = sample(jax.random.key(2), logits_of(*models[0]), 5, temperature=2.0, gamma=0.5)
        found = fused(student, target, where, temperature=2.0, chunk=5, scale={"kd": SCALE["kd"]})

        def dense(hidden, head, bias):
            log_q = jax.nn.log_softmax(logits_of(hidden, head, bias, 6.0) / 2.0)
            taken = jnp.sum(jax.nn.one_hot(target.ids, VOCAB) * log_q[..., None, :], axis=-1)
            return SCALE["kd"] * 4 * jnp.sum(jnp.where(where, -jnp.sum(target.weights * taken, axis=-1), 0))

        close((found[0][0], found[1]), jax.jit(jax.value_and_grad(dense, (0, 1, 2)))(*student))

    def test_a_draw_of_every_id_with_its_probability_is_the_full_kl(self, student, models, where):
        theirs = logits_of(*models[0])
        every = Samples(jnp.broadcast_to(jnp.arange(VOCAB), theirs.shape), jax.nn.softmax(theirs))
        found, wanted = fused(student, every, where), fused(student, models[0], where)
        close(found[1], wanted[1])
        p = np.asarray(theirs, np.float64)
        entropy = np.sum(np.where(where, scipy.stats.entropy(scipy.special.softmax(p, axis=-1), axis=-1), 0))
        np.testing.assert_allclose(found[0][0] - wanted[0][0], SCALE["kd"] * entropy, rtol=1e-5)

    def test_padding_and_masked_tokens_give_nothing(self, student, models, where):
        target = sample(jax.random.key(3), logits_of(*models[0]), 5)
        clean = fused(student, target, where, probe=True)
        assert not clean[0][1][1].keys() & {"teacher_entropy", "teacher_kl", "teacher_nll", "top1_agreement"}
        pad = lambda x, value: jnp.concatenate([x, jnp.full((*SHAPE, 3), value, x.dtype)], axis=-1)  # noqa: E731
        padded = Samples(pad(target.ids, -1), pad(target.weights, jnp.nan))
        padded = padded._replace(weights=jnp.where(where[..., None], padded.weights, jnp.nan))
        dirty = fused(student, padded, where, probe=True)
        close(dirty, clean)

    def test_a_draw_depends_on_its_key_alone(self):
        logits = normal(6, 5, 37)
        a, b, c = (sample(jax.random.key(key), logits, 8) for key in (0, 0, 1))
        jax.tree.map(np.testing.assert_array_equal, a, b)
        assert np.any(np.asarray(a.ids) != np.asarray(c.ids))
        np.testing.assert_allclose(a.weights, 1 / 8, rtol=1e-6)
        masked = sample(jax.random.key(0), logits.at[:, 20:].set(-jnp.inf), 50, gamma=0.5)
        assert np.asarray(masked.ids).max() < 20
        assert np.all(np.isfinite(masked.weights))


def off(draws: np.ndarray, exact) -> float:
    """The probability of a mean as far from `exact` as that of these draws [count, coordinates], if that is their mean."""
    count, width = draws.shape
    gap = draws.mean(axis=0) - np.asarray(exact, np.float64)
    statistic = count * gap @ np.linalg.solve(np.cov(draws, rowvar=False), gap)
    return scipy.stats.f.sf(statistic * (count - width) / (width * (count - 1)), width, count - width)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "forward_kl"])
@pytest.mark.parametrize("sparse", ["TopK", "Samples"])
def test_other_kinds_are_refused(student, models, where, sparse, kind):
    logits = logits_of(*models[0])
    target = top_k(logits, 3) if sparse == "TopK" else sample(jax.random.key(0), logits, 3)
    with pytest.raises(ValueError, match=f"kind: found '{kind}' with a teacher of {sparse}; accepted: forward_kl"):
        fused(student, target, where, kind=kind)


def test_they_get_no_gradient(student, models, where):
    logits = logits_of(*models[0])
    def loss(z, make):
        teacher, labels = make(z), jnp.zeros(SHAPE, jnp.int32)
        return fused_vocab_loss(*student[:2], labels, scale=SCALE, where=where, teacher=teacher, vocab=VOCAB)[0]

    for make in (lambda z: TopK(jnp.zeros((*SHAPE, 1), int), z[..., :1], z[..., 1]),
                 lambda z: Mixture((models[0], (z, jnp.eye(ROWS, VOCAB))), (0.5, 0.5))):
        assert np.all(np.asarray(jax.grad(loss)(logits, make)) == 0)
