"""The trained maps between two models: router, projectors, head map, and what fits a projector."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxdistill import UserError
from jaxdistill.models import projector
from jaxdistill.models.matching import Matching, load_balance
from jaxdistill.models.router import Router, rank


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def routed():
    router = Router(width=8)
    given = normal(2, 5, 6), normal(2, 5, 12, seed=1), normal(2, 5, 4, 12, seed=2)
    params = router.init(jax.random.key(0), *given, k=1.0, temperature=1.0)
    return lambda k, temperature=1.0, key=None: router.apply(params, *given, k=k, temperature=temperature, key=key)


class TestRouter:
    @pytest.mark.parametrize(("k", "kept"), [(0.0, 1), (1.0, 1), (1.4, 1), (1.6, 2), (2.0, 2), (3.99, 4), (9.0, 4)])
    def test_the_k_best_are_kept(self, routed, k, kept):
        weights, probabilities = routed(k)
        np.testing.assert_array_equal((np.asarray(weights) > 0).sum(-1), kept)
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
        np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-6)
        best = np.argmax(probabilities, -1)
        assert np.all(np.take_along_axis(np.asarray(weights), best[..., None], -1) > 0)

    def test_k_and_temperature_are_traced(self, routed):
        counted = []

        @jax.jit
        def run(k, temperature):
            counted.append(1)
            return routed(k, temperature)[0]

        for k, temperature in ((1.0, 1.0), (2.5, 0.5), (4.0, 0.1)):
            run(jnp.float32(k), jnp.float32(temperature))
        assert len(counted) == 1

    def test_a_low_temperature_decides(self, routed):
        entropy = lambda p: -np.sum(np.asarray(p) * np.log(np.asarray(p) + 1e-30), -1).mean()  # noqa: E731
        assert entropy(routed(4.0, 0.1)[1]) < 0.7 * entropy(routed(4.0, 1.0)[1])

    def test_noise_only_with_a_key(self, routed):
        np.testing.assert_array_equal(routed(4.0)[1], routed(4.0)[1])
        assert np.any(np.asarray(routed(4.0, 1.0, jax.random.key(1))[1]) != np.asarray(routed(4.0)[1]))

    def test_ranks_of_equals(self):
        np.testing.assert_array_equal(rank(jnp.asarray([[1.0, 3.0, 3.0, 0.0]])), [[2, 0, 1, 3]])

    def test_the_load_balance(self):
        even, count = jnp.full((3, 4), 5 / 4), jnp.full(3, 5.0)
        assert float(load_balance(even, count)) < 1e-12
        one = jnp.zeros((3, 4)).at[:, 0].set(5.0)
        np.testing.assert_allclose(load_balance(one, count), ((1 - 0.25) ** 2 + 3 * 0.25**2) / 4, rtol=1e-6)


class TestProjector:
    def test_least_squares_finds_the_map(self):
        x, kernel, bias = normal(4, 50, 12), normal(12, 7, seed=1), normal(7, seed=2)
        y, where = x @ kernel + bias[None, None], jnp.ones((4, 50), bool).at[:, 40:].set(False)
        parts = [projector.moments(x[i : i + 2], jnp.where(where[i : i + 2, :, None], y[i : i + 2], jnp.nan), where[i : i + 2])
                 for i in (0, 2)]
        found = projector.fit(jax.tree.map(lambda *p: sum(p), *parts), 1e-8)
        np.testing.assert_allclose(found["out"]["kernel"], kernel, atol=1e-3)
        np.testing.assert_allclose(found["out"]["bias"], bias, atol=1e-3)
        assert jax.tree.structure(found) == jax.tree.structure(projector.Projector(7).init(jax.random.key(0), x)["params"])

    def test_a_dead_channel_is_no_matter_and_no_token_is_an_error(self):
        x, y = normal(4, 5, 12).at[..., 3].set(0.0), normal(4, 5, 7, seed=1)
        sums = lambda where: projector.moments(x, y, jnp.full((4, 5), where))  # noqa: E731
        assert np.isfinite(projector.fit(sums(True), 1e-3)["out"]["kernel"]).all()
        with pytest.raises(UserError, match="^config key projector.calibration: found no aligned token in its batches"):
            projector.fit(sums(False), 1e-3)

    def test_heads_give_the_teachers_logits_where_they_can(self):
        theirs = normal(50, 6)
        ours = theirs @ normal(6, 9, seed=1)  # the student's rows span the teacher's
        found = projector.from_heads(theirs, ours, 0.0 + 1e-10)["out"]["kernel"]
        h = normal(3, 6, seed=2)
        np.testing.assert_allclose(h @ found @ ours.T, h @ theirs.T, rtol=1e-2, atol=1e-3)

    def test_initialisations(self):
        start = {name: np.asarray(projector.Projector(32, start=name).init(jax.random.key(0), normal(1, 48))["params"]["out"]["kernel"])
                 for name in projector.INITS}
        np.testing.assert_allclose(start["orthogonal"].T @ start["orthogonal"], np.eye(32), atol=1e-5)
        assert start["normal"].std() == pytest.approx(0.01, rel=0.1)
        assert np.abs(start["kaiming_uniform"]).max() == pytest.approx(48**-0.5, rel=0.02)
        assert start["kaiming_uniform"].std() == pytest.approx(48**-0.5 / 3**0.5, rel=0.05)


@pytest.fixture(scope="module")
def pair():
    def features(depth, width, heads, seed):
        rows = jax.nn.softmax(jnp.where(jnp.tri(6, dtype=bool), normal(depth, 8, heads, 6, 6, seed=seed), -jnp.inf))
        found = {f"block_{i}": normal(8, 6, width, seed=seed + i) for i in range(depth)}
        return found | {f"attention_{i}": rows[i] for i in range(depth)} | {"final": normal(8, 6, width, seed=seed + 9)}

    return features(2, 8, 2, 0), features(3, 12, 4, 20), jnp.ones((8, 6), bool).at[:, 5].set(False)


@pytest.fixture(scope="module")
def match(pair):
    module = Matching(("hidden", "attention", "contrastive", "router"), depth=2, teacher_depth=3, width=12, heads=2)
    return module, module.init(jax.random.key(0), *pair)


class TestMatching:
    @pytest.mark.parametrize("name", ["hidden", "attention", "router"])
    def test_each_term_falls_when_it_is_trained(self, pair, match, name):
        module, params = match
        options = {"k": 2.0, "temperature": 1.0} if name == "router" else {}

        @jax.jit
        def step(student, params):
            value = lambda student, params: module.apply(params, student, pair[1], pair[2], method=name, **options)[0].mean()  # noqa: E731
            loss, gradients = jax.value_and_grad(value, (0, 1))(student, params)
            return loss, *jax.tree.map(lambda x, g: x - 0.3 * g, (student, params), gradients)

        # States are free to move; attention rows would leave the simplex, so only the head map moves.
        student, losses = pair[0], []
        for _ in range(30):
            loss, moved, params = step(student, params)
            student = {k: v if k.startswith("attention") else moved[k] for k, v in student.items()}
            losses.append(float(loss))
        assert losses[-1] < losses[0]

    def test_masked_tokens_change_nothing(self, pair, match):
        module, params = match
        student, teacher, valid = pair
        spoil = lambda x: {k: v.at[:, 5].set(9.0) if v.ndim == 3 else v.at[:, :, 5].set(0.2) for k, v in x.items()}  # noqa: E731
        for name, options in (("hidden", {}), ("attention", {}), ("router", {"k": 2.0, "temperature": 1.0}), ("contrastive", {})):
            clean = module.apply(params, student, teacher, valid, method=name, **options)
            dirty = module.apply(params, spoil(student), spoil(teacher), valid, method=name, **options)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), clean, dirty)

    def test_balance_of_layers(self, match):
        module, params = match
        assert float(module.apply(params, method="layer_balance")) < 1e-12
        layers = params["params"]["layers"] | {"scores": jnp.arange(2.0)}
        params = {"params": params["params"] | {"layers": layers}}
        assert float(module.apply(params, method="layer_balance")) > 0.01

    def test_the_router_by_hand(self, pair, match):
        """In float64: scores with the noise of training, the two best, and the distances of states and of attention rows."""
        module, params = match
        student, teacher, valid = pair
        router = params["params"]["router_scores"] | {"importance": jnp.asarray([0.4, -0.3, 0.1])}
        params, key = {"params": params["params"] | {"router_scores": router}}, jax.random.key(3)
        found, stats, _ = module.apply(params, student, teacher, valid, k=2.0, temperature=0.5, key=key, method="router")

        doubles = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)  # noqa: E731
        p, ours, theirs = doubles(params["params"]["router_scores"]), doubles(student), doubles(teacher)
        noise = doubles(jax.random.normal(key, (8, 6, 3)))
        dense = lambda x, part: x @ part["kernel"] + part.get("bias", 0)  # noqa: E731
        unit = lambda x: x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True))  # noqa: E731
        gelu = lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))  # noqa: E731
        features = unit(np.stack([theirs[f"block_{i}"] for i in range(3)], axis=2))
        projected = dense(ours["final"], doubles(params["params"]["router_into"]["out"]))
        gap = dense(unit(projected), p["gap_student"])[:, :, None] + dense(features, p["gap_teacher"])
        scores = 0.3 * dense(unit(ours["final"]), p["capacity"]) + 0.25 * dense(gelu(gap), p["gap"])[..., 0] + 0.25 * p["importance"]
        scores += 0.2 * (dense(unit(projected), p["gate"]) + 0.1 * noise)
        probabilities = scipy.special.softmax(scores / 0.5, axis=-1)
        kept = np.where(scores > scores.min(axis=-1, keepdims=True), probabilities, 0)
        kept /= kept.sum(axis=-1, keepdims=True)
        routed = np.einsum("bte,bted->btd", kept, features)
        wanted = np.mean((unit(projected) - unit(routed)) ** 2, axis=-1)
        rows = np.einsum("bte,ebtk->btk", kept, np.stack([theirs[f"attention_{i}"].mean(axis=1) for i in range(3)]))
        of_student = ours["attention_1"].mean(axis=1)
        wanted += np.sum(scipy.special.rel_entr(rows, of_student), axis=-1)
        np.testing.assert_allclose(np.asarray(found)[:, :5], wanted[:, :5], rtol=2e-5)
        np.testing.assert_allclose(stats["routing"], probabilities[:, :5].sum(axis=1), rtol=2e-5)

    def test_experts_are_routed_over_too(self, pair):
        student, teacher, valid = pair
        teacher = teacher | {"experts_2": normal(8, 6, 5, 12, seed=3)}
        module = Matching(("router",), depth=2, teacher_depth=3, width=12, heads=2, experts=("experts_2",))
        params = module.init(jax.random.key(0), student, teacher, valid)
        values, stats, probes = module.apply(params, student, teacher, valid, k=4.0, temperature=1.0, method="router")
        assert stats["routing"].shape == (8, 8)
        assert "router/load_7" in probes
        assert values.shape == (8, 6)
        np.testing.assert_allclose(stats["routing"].sum(-1), 5, rtol=1e-5)
