"""Representation and readout against their definitions in float64, and that no example sees another."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from jaxdistill import UserError
from jaxdistill.models.kaf import KAFConfig
from jaxdistill.models.readout import Readout, ReadoutConfig, Representation, ReservoirClassifier, dropout, largest, statistics
from jaxdistill.models.reservoir import ReservoirConfig

CONFIG = ReadoutConfig(kernels=(3, 5), filters=4, pooling=6, hidden=8, pieces=3, width=6, activation="gelu")
LENGTHS = jnp.asarray([7, 1, 4], jnp.int32)


def states(seed: int = 0, time: int = 7, width: int = 5):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(3, time, width)), jnp.float32)


def in_double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def layer_norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def vectors(x, lengths, p, config):
    """The representation, one example after another."""
    rows = []
    for one, length in zip(np.asarray(x, np.float64), np.asarray(lengths), strict=True):
        one = one[:length]
        row = [one.mean(0), one.max(0), one.std(0)]
        for size in config.kernels:
            wide = np.pad(one, ((size // 2, size // 2), (0, 0)))
            conv = [np.einsum("kw,kwf->f", wide[t : t + size], p[f"conv_{size}"]["kernel"]) for t in range(length)]
            row.append(np.maximum(np.array(conv) + p[f"conv_{size}"]["bias"], 0).max(0))
        scores = np.tanh(one @ p["attention"]["kernel"] + p["attention"]["bias"]) @ p["score"]["kernel"][:, 0]
        weights = np.exp(scores) / np.exp(scores).sum()
        rows.append(np.concatenate([*row, weights @ one]))
    return np.stack(rows)


def test_the_representation_is_its_definition():
    module, x = Representation(CONFIG), states()
    params = module.init(jax.random.key(0), x, LENGTHS)["params"]
    found, features = jax.jit(module.apply)({"params": params}, x, LENGTHS)
    p = in_double(params)
    wanted = vectors(x, LENGTHS, p, CONFIG)
    assert wanted.shape == (3, 3 * 5 + 2 * 4 + 5)
    np.testing.assert_allclose(found, layer_norm(wanted, p["norm"]), atol=1e-5)
    np.testing.assert_allclose(features["attention"].sum(1), 1, atol=1e-6)
    assert np.all((np.asarray(features["attention"]) > 0) == (np.arange(7) < np.asarray(LENGTHS)[:, None]))
    bare = Representation(dataclasses.replace(CONFIG, norm=False))
    np.testing.assert_allclose(jax.jit(bare.apply)({"params": params}, x, LENGTHS)[0], wanted, atol=1e-5)


def test_the_largest_sends_its_gradient_to_one():
    """Of ties to the first; along any axis; not a number where anything is none."""
    x = jnp.asarray([[[1.0, -2.0], [3.0, -2.0], [3.0, -5.0]], [[-np.inf, 0.0], [-1.0, 0.5], [-np.inf, 0.25]]])
    pull = jnp.asarray([[2.0, 3.0], [5.0, 7.0]])
    value, slope = jax.value_and_grad(lambda x: jnp.sum(largest(x, 1) * pull))(x)
    assert value == np.sum(np.max(x, axis=1) * pull)
    np.testing.assert_array_equal(slope, [[[0, 3], [2, 0], [0, 0]], [[0, 0], [5, 7], [0, 0]]])
    for axis in (0, 2, -1):
        np.testing.assert_array_equal(largest(x, axis), np.max(x, axis=axis))
    assert np.isnan(largest(x.at[0, 0, 0].set(np.nan), 1)[0, 0])


def test_parts_are_those_that_were_asked_for():
    x = states()
    for part, width in (("statistics", 15), ("convolution", 8), ("attention", 5)):
        module = Representation(dataclasses.replace(CONFIG, parts=(part,)))
        shape = jax.eval_shape(lambda module=module: module.init_with_output(jax.random.key(0), x, LENGTHS)[0][0])
        assert shape.shape == (3, width)


def test_statistics_are_their_definitions():
    """In the order that was asked for, over the frames that count alone; of one frame there is no step."""
    x = states()
    where = jnp.arange(7)[None] < LENGTHS[:, None]
    kinds = ("step", "min", "std", "max", "mean")
    found = jax.jit(lambda x: statistics(x, where, kinds))(jnp.where(where[..., None], x, 99.0))
    for row, one, length in zip(found, np.asarray(x, np.float64), LENGTHS.tolist(), strict=True):
        one = one[:length]
        step = np.abs(np.diff(one, axis=0)).mean(0) if length > 1 else np.zeros(5)
        np.testing.assert_allclose(row, np.concatenate([step, one.min(0), one.std(0), one.max(0), one.mean(0)]), atol=1e-6)


def test_padding_changes_nothing():
    """More of it, and anything in it; neither value nor gradient to the states that count, and none to those that do not."""
    module, x = Representation(dataclasses.replace(CONFIG, statistics=("mean", "max", "std", "min", "step"))), states()
    params = module.init(jax.random.key(0), x, LENGTHS)
    more = jnp.concatenate([x, jnp.full((3, 4, 5), jnp.nan)], axis=1)
    more = jnp.where((jnp.arange(11)[None] < LENGTHS[:, None])[..., None], more, jnp.nan)
    f = jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(module.apply(params, x, LENGTHS)[0]))))
    (a, slope), (b, other) = f(x), f(more)
    assert a == pytest.approx(float(b), abs=1e-5)
    np.testing.assert_allclose(other[:, :7], slope, atol=1e-5)
    assert np.all(np.asarray(other)[np.arange(11)[None] >= np.asarray(LENGTHS)[:, None]] == 0)


def test_the_deviation_has_a_gradient_everywhere():
    """Also of one frame, of a constant channel, and of one that hardly varies; where it varies, that of the definition."""
    x = np.array(states(width=3))
    x[0, :, 0] = 2.0  # constant
    x[2, :, 1] = 1e-20 * np.arange(7)  # its variance is 0 in float32
    where = jnp.arange(7)[None] < LENGTHS[:, None]
    value, slope = jax.jit(jax.value_and_grad(lambda x: jnp.sum(statistics(x, where)[:, 6:])))(jnp.asarray(x))
    assert np.isfinite(value)
    assert np.all(np.isfinite(slope))
    assert np.all(slope[0, :, 0] == 0)
    assert np.all(slope[1] == 0)
    for i, length in ((0, 7), (2, 4)):
        one = x[i, :length, 2].astype(np.float64)
        np.testing.assert_allclose(slope[i, :length, 2], (one - one.mean()) / (length * one.std()), atol=1e-5)
    found = np.asarray(statistics(jnp.asarray(x), where))
    np.testing.assert_allclose(found[1], np.concatenate([x[1, 0], x[1, 0], np.zeros(3)]), atol=1e-7)


@pytest.mark.parametrize(("activation", "norm"), [("kaf", True), ("relu", True), ("elu", False), ("gelu", False)])
def test_the_readout_is_its_definition(activation, norm):
    config = dataclasses.replace(CONFIG, activation=activation, norm=norm)
    module, x = Readout(config, KAFConfig(init="random"), 4), states(width=9)[:, 0]
    params = module.init(jax.random.key(3), x)["params"]
    found, features = jax.jit(module.apply)({"params": params}, x)
    p = in_double(params)
    y = np.asarray(x, np.float64) @ p["maxout"]["linear"]["kernel"] + p["maxout"]["linear"]["bias"]
    y = np.max([y[:, 8 * k : 8 * (k + 1)] for k in range(3)], axis=0)
    y = layer_norm(y, p["norm_1"]) if norm else y
    s = y @ p["linear"]["kernel"] + p["linear"]["bias"]
    points, gamma = np.linspace(-3, 3, 20), 19**2 / 6**3
    y = {
        "relu": lambda: np.maximum(s, 0), "elu": lambda: np.where(s > 0, s, np.expm1(s)),
        "gelu": lambda: s * (1 + erf(s / np.sqrt(2))) / 2,
        "kaf": lambda: np.sum(p["kaf"]["alpha"][None] * np.exp(-gamma * (s[:, None] - points[None, :, None]) ** 2), axis=1),
    }[activation]()  # fmt: skip
    y = layer_norm(y, p["norm_2"]) if norm else y
    np.testing.assert_allclose(found, y @ p["out"]["kernel"] + p["out"]["bias"], atol=1e-5)
    np.testing.assert_allclose(features["preactivation"], s, atol=1e-5)
    names = {"norm_1": norm, "norm_2": norm, "kaf": activation == "kaf"}
    assert set(params) == {"maxout", "linear", "out"} | {name for name, there in names.items() if there}
    if activation == "kaf":
        np.testing.assert_allclose(features["beyond"], np.mean(np.abs(s) > 3, axis=1), atol=1e-6)
    else:
        assert "beyond" not in features


def test_a_norm_in_front_keeps_inputs_within_the_dictionary():
    x = 100 * states(width=9)[:, 0]
    far, near = (Readout(dataclasses.replace(CONFIG, activation="kaf", norm=False, front=front), KAFConfig(), 4) for front in (False, True))
    look = lambda module: jax.jit(lambda: module.init_with_output(jax.random.key(0), x)[0][1]["beyond"])()  # noqa: E731
    assert look(far).mean() > 0.8
    assert look(near).max() == 0


def test_dropout_keeps_the_mean_and_needs_a_key():
    x = jnp.ones((200, 100))
    kept = np.asarray(dropout(x, 0.3, jax.random.key(0)))
    assert np.mean(kept == 0) == pytest.approx(0.3, abs=0.02)
    assert kept.mean() == pytest.approx(1, abs=0.02)
    np.testing.assert_array_equal(dropout(x, 0.3, None), x)


@pytest.fixture(scope="module")
def whole():
    """(module, variables, x, lengths): everything. (Random coefficients: those of a fit are large and cancel, and what float32 leaves of
    that, 1e-5, the norm behind makes more of.)"""
    module = ReservoirClassifier(ReservoirConfig(units=10, density=1.0, trained=True, fusion="convex"),
                                 dataclasses.replace(CONFIG, activation="kaf"), KAFConfig(init="random", gamma="trained", bypass=True), 4)
    x = states(time=7, width=2)
    return module, jax.jit(module.init)(jax.random.key(0), x, LENGTHS), x, LENGTHS


def test_no_example_sees_another(whole):
    """f(batch)[i] is f(x_i), in any order, also among very different examples."""
    module, variables, x, lengths = whole
    f = jax.jit(lambda x, lengths: module.apply(variables, x, lengths)[0])
    found = f(x, lengths)
    for i in range(3):
        alone = [jnp.broadcast_to(value[i : i + 1], value.shape) for value in (x, lengths)]
        np.testing.assert_array_equal(f(*alone)[i], found[i])
    np.testing.assert_allclose(f(x[::-1], lengths[::-1])[::-1], found, atol=1e-6)
    np.testing.assert_allclose(f(x[:1], lengths[:1]), found[:1], atol=1e-6)
    np.testing.assert_allclose(f(x.at[1:].multiply(1e3), lengths)[0], found[0], atol=1e-6)


def test_every_parameter_gets_a_gradient_of_its_own_example_alone(whole):
    """With dropout on: the loss of one example has no gradient to the others, and one to every parameter, of the reservoir too."""
    module, variables, x, lengths = whole

    def total(params, x):
        return jnp.sum(jnp.sin(module.apply(variables | {"params": params}, x, lengths, key=jax.random.key(1))[0][0]))

    to_params, to_x = jax.jit(jax.grad(total, (0, 1)))(variables["params"], x)
    for path, leaf in jax.tree.leaves_with_path(to_params):
        assert float(jnp.abs(leaf).max()) > 1e-7, jax.tree_util.keystr(path)
        assert np.all(np.isfinite(leaf)), jax.tree_util.keystr(path)
    assert np.all(to_x[0] != 0)
    assert np.all(to_x[1:] == 0)


def test_pairs_of_channels():
    module, x = Readout(dataclasses.replace(CONFIG, activation="kaf2d"), KAFConfig(), 4), states(width=9)[:, 0]

    def grads():
        params = module.init(jax.random.key(0), x)["params"]
        return jax.grad(lambda p: jnp.sum(jnp.sin(module.apply({"params": p}, x)[0])))(params)

    found = jax.jit(grads)()
    assert found["kaf"]["alpha"].shape == (10, 10, 3)
    assert found["out"]["kernel"].shape == (3, 4)
    assert all(float(jnp.abs(leaf).max()) > 1e-7 for leaf in jax.tree.leaves(found))


def test_features_have_stable_names(whole):
    module, variables, x, lengths = whole
    _, features = jax.eval_shape(lambda: module.apply(variables, x, lengths))
    assert {name: value.shape for name, value in features.items()} == {
        "states": (3, 7, 10), "statistics": (3, 30), "representation": (3, 48), "attention": (3, 7),
        "preactivation": (3, 6), "beyond": (3,), "final": (3, 6),
    }  # fmt: skip


@pytest.mark.parametrize(("change", "said"), [
    ({"hidden": 0}, "hidden: found 0; accepted: 1 or more"),
    ({"parts": ()}, "parts: found (); accepted: some of statistics, convolution, attention, each once"),
    ({"parts": ("mean",)}, "parts: found ('mean',); accepted: some of statistics, convolution, attention, each once"),
    ({"statistics": ("median",)}, "statistics: found ('median',); accepted: some of mean, max, std, min, step, each once"),
    ({"statistics": ("mean", "mean")}, "statistics: found ('mean', 'mean'); accepted: some of mean, max, std, min, step, each once"),
    ({"parts": ("attention",), "statistics": ("mean",)},
     "statistics: found ('mean',); accepted: ('mean', 'max', 'std') without 'statistics' in readout.parts"),
    ({"parts": ("attention",), "standardise": True}, "standardise: found True; accepted: False without 'statistics' in readout.parts"),
    ({"kernels": (4,)}, "kernels: found (4,); accepted: odd whole numbers, as in (3, 5, 7)"),
    ({"activation": "swish"}, "activation: found 'swish'; accepted: kaf, kaf2d, relu, elu, gelu"),
    ({"activation": "kaf2d", "width": 5}, "width: found 5; accepted: an even number with readout.activation 'kaf2d'"),
    ({"dropout": (0.3, 1.0)}, "dropout: found (0.3, 1.0); accepted: two rates, each 0 or more and below 1"),
])  # fmt: skip
def test_a_config_that_is_refused(change, said):
    with pytest.raises(UserError) as stop:
        ReadoutConfig(**change)
    assert str(stop.value) == f"config key readout.{said}"
