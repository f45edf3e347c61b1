"""The feature losses against their definitions in float64: hidden, attention, contrastive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.losses.attention import attention_kl
from jaxdistill.losses.contrastive import info_nce, mean_pool
from jaxdistill.losses.hidden import cosine_distance, layer_map, rms_distance


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def rows(*shape, seed=0):
    return jax.nn.softmax(jnp.where(jnp.tri(*shape[-2:], dtype=bool), 2 * normal(*shape, seed=seed), -jnp.inf))


class TestHidden:
    @pytest.mark.parametrize(("student", "teacher", "expected"), [
        (2, 3, (1, 2)), (3, 12, (3, 7, 11)), (6, 12, (1, 3, 5, 7, 9, 11)), (4, 4, (0, 1, 2, 3)), (4, 2, (0, 0, 1, 1)), (1, 5, (4,)),
    ])
    def test_the_map_of_layers(self, student, teacher, expected):
        assert layer_map(student, teacher) == expected

    def test_the_definitions(self):
        a, b = normal(3, 5, 16), normal(3, 5, 16, seed=1)
        unit = lambda x: x / np.sqrt((np.asarray(x, np.float64) ** 2).mean(-1, keepdims=True))  # noqa: E731
        with jax.numpy_dtype_promotion("strict"):
            np.testing.assert_allclose(rms_distance(a, b), ((unit(a) - unit(b)) ** 2).mean(-1), rtol=1e-5)
        cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        np.testing.assert_allclose(cosine_distance(a, b), 1 - cosine, rtol=1e-4, atol=1e-6)

    def test_zero_iff_proportional(self):
        a = normal(4, 16)
        np.testing.assert_allclose(rms_distance(a, 7 * a), 0, atol=1e-6)
        np.testing.assert_allclose(rms_distance(a, -a), 4, rtol=1e-4)
        assert np.all(np.asarray(rms_distance(a, a + 0.1 * normal(4, 16, seed=1))) > 1e-4)

    def test_the_size_of_neither_side_matters_nor_the_length(self):
        a, b = normal(4, 32), normal(4, 32, seed=1)
        np.testing.assert_allclose(rms_distance(100 * a, b), rms_distance(a, 0.01 * b), rtol=1e-3)
        longer = rms_distance(jnp.tile(a, (10, 1)), jnp.tile(b, (10, 1)))  # "MSE grows with length" does not hold for a mean
        np.testing.assert_allclose(longer.mean(), rms_distance(a, b).mean(), rtol=1e-5)

    def test_masked_tokens_give_nothing_whatever_they_hold(self):
        a, b, where = normal(4, 8), normal(4, 8, seed=1), jnp.asarray([True, False, True, False])
        bad = a.at[1].set(jnp.nan).at[3].set(0.0)
        value, gradient = jax.value_and_grad(lambda x: rms_distance(x, b, where=where).sum())(bad)
        np.testing.assert_allclose(value, rms_distance(a[::2], b[::2]).sum(), rtol=1e-6)
        assert np.all(np.isfinite(gradient))
        assert np.all(np.asarray(gradient)[1::2] == 0)


class TestAttention:
    def test_the_definition_takes_probabilities(self):
        p, q = rows(2, 3, 6, 6), rows(2, 3, 6, 6, seed=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(p > 0, np.float64(p) * np.log(np.float64(p) / np.float64(q)), 0.0)
        with jax.numpy_dtype_promotion("strict"):
            np.testing.assert_allclose(attention_kl(p, q), terms.sum(-1).mean(1), rtol=1e-5, atol=1e-6)
        twice = jax.nn.softmax(q)
        assert np.abs(np.asarray(attention_kl(p, twice) - attention_kl(p, q))).max() > 0.1  # a second softmax is another loss

    def test_zero_iff_equal(self):
        p = rows(2, 3, 6, 6)
        np.testing.assert_allclose(attention_kl(p, p), 0, atol=1e-6)
        assert np.all(np.asarray(attention_kl(p, rows(2, 3, 6, 6, seed=1)))[:, 1:] > 1e-3)  # the first row has one key

    def test_a_key_that_the_student_all_but_ignores_is_not_left_out(self):
        """Else the divergence would be negative there, and a student that is as wrong as can be the best one."""
        even = jnp.full((1, 1, 1, 2), 0.5)
        found = [float(attention_kl(even, jax.nn.softmax(jnp.asarray([[[[gap, 0.0]]]])))[0, 0]) for gap in (0.0, 60.0, 70.0, 200.0)]
        np.testing.assert_allclose(found[:2], [0, 29.3068528], rtol=1e-5, atol=1e-6)
        assert found == sorted(found)
        assert found[-1] > 30

    def test_masked_queries_and_masked_keys(self):
        p, q = rows(1, 2, 4, 4), rows(1, 2, 4, 4, seed=1)
        where = jnp.asarray([[True, True, False, True]])
        bad = q.at[:, :, 2].set(jnp.nan)
        value, gradient = jax.value_and_grad(lambda x: attention_kl(p, x, where=where).sum())(bad)
        np.testing.assert_allclose(value, np.asarray(attention_kl(p, q))[0, [0, 1, 3]].sum(), rtol=1e-5)
        assert np.all(np.isfinite(gradient))
        assert np.all(np.asarray(gradient)[:, :, 2] == 0)


class TestContrastive:
    def test_the_definition(self):
        a, b = normal(8, 16), normal(8, 16, seed=1)
        x, y = (np.float64(v) / np.linalg.norm(np.float64(v), axis=-1, keepdims=True) for v in (a, b))
        scores = x @ y.T / 0.07
        expected = np.log(np.exp(scores).sum(-1)) - np.diag(scores)
        with jax.numpy_dtype_promotion("strict"):
            np.testing.assert_allclose(info_nce(a, b), expected, rtol=1e-4, atol=1e-5)

    def test_told_apart_or_not(self):
        a = normal(8, 64)
        assert np.asarray(info_nce(a, a)).max() < 0.01
        same = jnp.broadcast_to(a[:1], a.shape)
        np.testing.assert_allclose(info_nce(a, same), np.log(8), rtol=1e-5)

    def test_examples_that_do_not_count_are_no_negatives(self):
        a, b = normal(8, 16), normal(8, 16, seed=1)
        where = jnp.arange(8) < 5
        bad = a.at[6].set(jnp.nan)
        value, gradient = jax.value_and_grad(lambda x: info_nce(x, b, where=where).sum())(bad)
        np.testing.assert_allclose(value, info_nce(a[:5], b[:5]).sum(), rtol=1e-5)
        assert np.all(np.isfinite(gradient))
        assert np.all(np.asarray(gradient)[5:] == 0)

    def test_no_example_at_all(self):
        value, gradient = jax.value_and_grad(lambda x: info_nce(x, normal(4, 8), where=jnp.zeros(4, bool)).sum())(normal(4, 8))
        assert value == 0
        assert np.all(np.asarray(gradient) == 0)

    def test_the_pool_sees_valid_tokens_only(self):
        x, where = normal(2, 4, 8), jnp.asarray([[True, True, False, False], [False] * 4])
        np.testing.assert_allclose(mean_pool(x, where)[0], x[0, :2].mean(0), rtol=1e-5)
        np.testing.assert_array_equal(mean_pool(x, where)[1], 0)
