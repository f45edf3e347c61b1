"""The graph transformer: its arithmetic in float64, and what a star must not notice: order, padding, other stars."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from jaxdistill import UserError
from jaxdistill.models.graph_transformer import GraphConfig, GraphTransformer

CONFIG = GraphConfig(width=12, depth=2, heads=3, inner=2)
CLASSES, BATCH, MOST, INPUTS, EDGES = 4, 5, 6, 7, 4
RNG = np.random.default_rng(0)


def stars():
    """A target without a neighbour, one with all, the rest between; NaN where there is none."""
    there = np.asarray([0, 1, 3, 5, MOST])
    mask = np.arange(MOST)[None] < there[:, None]
    mask[3] = [True, False, True, True, True, True]  # padding need not come last
    shapes = (BATCH, INPUTS), (BATCH, MOST, INPUTS), (BATCH, MOST, EDGES)
    x, neighbours, edges = (RNG.normal(size=shape).astype(np.float32) for shape in shapes)
    neighbours[~mask], edges[~mask] = np.nan, np.nan
    return x, neighbours, edges, mask


STARS = stars()


@functools.cache
def fresh(config: GraphConfig = CONFIG):
    """(module, params far from any initialisation, its jitted apply)."""
    module = GraphTransformer(CLASSES, config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *STARS)["params"]
    params = jax.tree.map(lambda leaf: 0.6 * RNG.normal(size=leaf.shape).astype(np.float32), shapes)
    return module, params, jax.jit(lambda p, *star, key=None: module.apply({"params": p}, *star, key=key))


# -- in float64, one star at a time and one neighbour after another ------------------------------------------------------------


def dense(p, x):
    return x @ np.float64(p["kernel"]) + (np.float64(p["bias"]) if "bias" in p else 0)


def norm(p, x):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6) * p["scale"] + p["bias"]


def gelu(x):
    return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def softmax(scores):
    p = np.exp(np.asarray(scores) - max(scores))
    return p / p.sum()


def attend(p, reader, read, towards, heads):
    """What `reader` takes of `read`: (state, edge or None) of each, itself first. towards: which half of the edge biases."""
    q = dense(p["query"], reader).reshape(heads, -1)
    parts, weights = [], []
    for head in range(heads):
        scores, values = [], []
        for state, edge in read:
            score = q[head] @ dense(p["key"], state).reshape(heads, -1)[head] / np.sqrt(q.shape[1])
            value = dense(p["value"], state).reshape(heads, -1)[head]
            if edge is not None:
                score += dense(p["edge_bias"], edge)[head + (0 if towards else heads)]
                value = value + dense(p["edge_value"], edge).reshape(heads, -1)[head]
            scores.append(score)
            values.append(value)
        weights.append(softmax(scores))
        parts.append(weights[-1] @ np.asarray(values))
    return dense(p["out"], np.concatenate(parts)), np.mean(weights, axis=0)


def by_hand(params, x, neighbours, edges, config):
    """(logits, the attention of each block) of one star without padding."""
    x, neighbours, edges = (np.asarray(each, np.float64) for each in (x, neighbours, edges))
    edges = [gelu(dense(params["embed"]["edge"], edge)) for edge in edges]
    target = dense(params["embed"]["target"], x)
    others = [dense(params["embed"]["neighbour"], each) + edge for each, edge in zip(neighbours, edges, strict=True)]
    seen = []
    for i in range(config.depth):
        p, a = params[f"block_{i}"], params[f"block_{i}"]["attention"]
        t, n = norm(p["ln_1"], target), [norm(p["ln_1"], each) for each in others]
        read, weights = attend(a, t, [(t, None), *zip(n, edges, strict=True)], True, config.heads)
        seen.append(weights)
        target = target + read
        target = target + dense(p["mlp"]["down"], gelu(dense(p["mlp"]["up"], norm(p["ln_2"], target))))
        if i + 1 < config.depth:
            reads = [attend(a, each, [(each, None), (t, edge)], False, config.heads)[0] for each, edge in zip(n, edges, strict=True)]
            others = [each + read for each, read in zip(others, reads, strict=True)]
            others = [each + dense(p["mlp"]["down"], gelu(dense(p["mlp"]["up"], norm(p["ln_2"], each)))) for each in others]
    return dense(params["head"], norm(params["ln_f"], target)), seen


def test_it_is_what_numpy_computes():
    _, params, see = fresh()
    logits, features = see(params, *STARS)
    x, neighbours, edges, mask = STARS
    for i in range(BATCH):
        there = mask[i]
        wanted, attention = by_hand(params, x[i], neighbours[i][there], edges[i][there], CONFIG)
        np.testing.assert_allclose(logits[i], wanted, rtol=1e-5, atol=1e-5)
        for block, weights in enumerate(attention):
            found = np.asarray(features[f"attention_{block}"][i])
            np.testing.assert_allclose(found[[True, *there]], weights, atol=1e-6)
            assert not found[[False, *~there]].any()


# -- what a star must not notice -----------------------------------------------------------------------------------------------


def test_neighbours_have_no_order():
    _, params, see = fresh()
    order = RNG.permutation(MOST)
    x, neighbours, edges, mask = STARS
    logits, features = see(params, *STARS)
    permuted, states = see(params, x, neighbours[:, order], edges[:, order], mask[:, order])
    np.testing.assert_allclose(permuted, logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(states["neighbours"], features["neighbours"][:, order], rtol=1e-5, atol=1e-6)
    swapped, _ = see(params, x, neighbours[:, order], edges, mask)  # but a neighbour belongs to its edge
    assert np.abs(swapped[4] - logits[4]).max() > 1e-3


def test_padding_changes_nothing():
    """Neither more of it nor what it holds, NaN included, in value or in gradient."""
    _, params, see = fresh()
    x, neighbours, edges, mask = STARS
    wider = [np.concatenate([each, np.full((BATCH, 3, each.shape[-1]), 1e9, np.float32)], axis=1) for each in (neighbours, edges)]
    more = np.concatenate([mask, np.zeros((BATCH, 3), bool)], axis=1)
    np.testing.assert_allclose(see(params, x, *wider, more)[0], see(params, *STARS)[0], rtol=1e-6, atol=1e-6)
    clean = [np.where(mask[..., None], each, np.float32(0)) for each in (neighbours, edges)]
    slope = jax.jit(jax.grad(lambda p, *star: jnp.sum(jnp.square(see(p, *star)[0]))))
    jax.tree.map(np.testing.assert_array_equal, slope(params, *STARS), slope(params, x, *clean, mask))


def test_a_target_alone():
    """It attends to itself, whatever the places beside it hold; also where there is no place at all."""
    _, params, see = fresh()
    logits, features = see(params, *STARS)
    assert features["attention_0"][0].tolist() == [1.0] + [0.0] * MOST
    x = STARS[0][:1]
    none, _ = see(params, x, np.zeros((1, 0, INPUTS), np.float32), np.zeros((1, 0, EDGES), np.float32), np.zeros((1, 0), bool))
    np.testing.assert_allclose(none[0], logits[0], rtol=1e-5, atol=1e-6)


def test_stars_do_not_see_each_other():
    _, params, see = fresh()
    logits, _ = see(params, *STARS)
    for i in (0, 4):
        alone, _ = see(params, *(each[i : i + 1] for each in STARS))
        np.testing.assert_allclose(alone[0], logits[i], rtol=1e-5, atol=1e-6)


# -- what it must notice -------------------------------------------------------------------------------------------------------


def test_every_leaf_and_every_edge_has_a_gradient():
    module, params, _ = fresh()
    x, neighbours, edges, mask = map(jnp.asarray, STARS)

    def total(params, edges):
        return jnp.sum(jnp.sin(module.apply({"params": params}, x, neighbours, edges, mask)[0]))

    grads, along = jax.jit(jax.grad(total, argnums=(0, 1)))(params, jnp.nan_to_num(edges))
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    found = {name(path): float(jnp.abs(leaf).max()) for path, leaf in jax.tree.leaves_with_path(grads)}
    assert {name for name, size in found.items() if size < 1e-5} == set()
    assert "block_1/attention/edge_bias/kernel" in found
    assert (jnp.abs(along).max(-1) > 1e-6).tolist() == mask.tolist()


def test_neighbours_hear_the_target_and_not_each_other():
    """In the first block; the last reads them as it found them."""
    _, params, see = fresh()
    x, neighbours, edges, mask = STARS
    before = np.asarray(see(params, *STARS)[1]["neighbours"])
    moved = np.abs(np.asarray(see(params, x + np.float32(1), neighbours, edges, mask)[1]["neighbours"]) - before).max(-1)
    assert (moved > 1e-3).tolist() == mask.tolist()
    other = neighbours.copy()
    other[4, 2] += 1
    moved = np.abs(np.asarray(see(params, x, other, edges, mask)[1]["neighbours"]) - before).max(-1)
    assert np.argwhere(moved > 1e-3).tolist() == [[4, 2]]


def test_dropout_needs_a_key():
    module, params, see = fresh(GraphConfig(width=12, depth=2, heads=3, dropout=0.5))
    _, same, plain = fresh()
    np.testing.assert_allclose(see(same, *STARS)[0], plain(same, *STARS)[0], rtol=1e-6, atol=1e-6)
    first, second = (see(same, *STARS, key=jax.random.key(i))[0] for i in (0, 1))
    assert np.abs(first - second).max() > 1e-2


def test_bfloat16_is_of_the_computation_alone():
    module, _, _ = fresh(GraphConfig(width=12, depth=2, heads=3, dtype="bfloat16"))
    _, params, plain = fresh()
    logits, features = jax.jit(module.apply)({"params": params}, *STARS)
    assert (logits.dtype, features["final"].dtype, features["attention_0"].dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    wanted = plain(params, *STARS)[0]
    assert 1e-5 < float(jnp.abs(logits - wanted).max() / jnp.abs(wanted).max()) < 0.1


@pytest.mark.parametrize(("options", "said"), [
    (dict(heads=5), r"heads: found 5; accepted: a divisor of width \(64\)"),
    (dict(depth=0), "depth: found 0; accepted: an integer of at least 1"),
    (dict(dropout=-0.1), "dropout: found -0.1"), (dict(dtype="half"), "dtype: found 'half'; accepted: float32, bfloat16"),
])  # fmt: skip
def test_user_errors(options, said):
    with pytest.raises(UserError, match=said):
        GraphConfig(**options)
