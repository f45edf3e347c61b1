"""The MLP: its arithmetic in float64, its edges, its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from jaxdistill import UserError
from jaxdistill.models.layers import dropout
from jaxdistill.models.mlp import MLP, MLPConfig

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(5, 7)), jnp.float32)


def fresh(config: MLPConfig, classes: int = 4):
    module = MLP(classes, config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), X)["params"]
    return module, jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape).astype(np.float32), shapes)


def by_hand(params, x, config: MLPConfig):
    x = np.asarray(x, np.float64)
    for i in range(len(config.hidden)):
        x = x @ np.float64(params[f"block_{i}"]["kernel"]) + params[f"block_{i}"]["bias"]
        if config.norm == "layer":
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            x = x * params[f"norm_{i}"]["scale"] + params[f"norm_{i}"]["bias"]
        x = x * 0.5 * (1 + erf(x / np.sqrt(2)))
    return x @ np.float64(params["head"]["kernel"]) + params["head"]["bias"], x


@pytest.mark.parametrize("config", [MLPConfig((6, 5)), MLPConfig((6, 5), norm="layer"), MLPConfig(())], ids=str)
def test_it_is_what_numpy_computes(config):
    module, params = fresh(config)
    logits, features = jax.jit(module.apply)({"params": params}, X)
    wanted, final = by_hand(params, X, config)
    np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(features["final"], final, rtol=1e-5, atol=1e-5)
    assert set(features) == {*(f"block_{i}" for i in range(len(config.hidden))), "final"}
    alone, _ = module.apply({"params": params}, X[3:4])
    np.testing.assert_allclose(alone[0], logits[3], rtol=1e-6, atol=1e-6)


def test_every_leaf_has_a_gradient():
    module, params = fresh(MLPConfig((6, 5), norm="layer"))
    grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(module.apply({"params": p}, X)[0]))))(params)
    assert len(jax.tree.leaves(grads)) == 10
    assert all(float(jnp.abs(leaf).max()) > 1e-3 for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("config", [MLPConfig((6, 5), dropout=0.5), MLPConfig((6, 5), input_dropout=0.5), MLPConfig((), input_dropout=0.5)])
def test_dropout_keeps_the_mean_and_needs_a_key(config):
    x = jnp.ones((2000, 10))
    seen = np.asarray(jax.jit(dropout, static_argnums=1)(x, 0.3, jax.random.key(1)))
    assert set(np.unique(seen)) == {np.float32(0), np.float32(1 / 0.7)}
    assert seen.mean() == pytest.approx(1, abs=0.02)
    module, params = fresh(config)
    see = jax.jit(lambda key=None: module.apply({"params": params}, X, key=key)[0])
    np.testing.assert_allclose(see(), by_hand(params, X, module.config)[0], rtol=1e-5, atol=1e-5)
    assert np.abs(see(jax.random.key(0)) - see()).max() > 1e-2
    np.testing.assert_array_equal(see(jax.random.key(0)), see(jax.random.key(0)))


def test_bfloat16_is_of_the_computation_alone():
    module, params = fresh(MLPConfig((16,), dtype="bfloat16"))
    logits, features = module.apply({"params": params}, X)
    assert (logits.dtype, features["block_0"].dtype) == (jnp.float32, jnp.bfloat16)
    wanted, _ = by_hand(params, X, module.config)
    assert 1e-6 < np.abs(logits - wanted).max() / np.abs(wanted).max() < 0.03


@pytest.mark.parametrize(("options", "said"), [
    (dict(hidden=(8, 0)), r"hidden: found \(8, 0\); accepted: whole numbers"),
    (dict(norm="batch"), "norm: found 'batch'; accepted: none, layer"),
    (dict(dropout=1.0), "dropout: found 1.0; accepted: 0 or more, and below 1"), (dict(dtype="float8"), "dtype: found 'float8'"),
    (dict(input_dropout=-0.1), "input_dropout: found -0.1; accepted: 0 or more, and below 1"),
])  # fmt: skip
def test_user_errors(options, said):
    with pytest.raises(UserError, match=said):
        MLPConfig(**options)
