"""The fused loss on a mesh: one device's result, and no collective in its loop."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.losses.fused_vocab import fused_vocab_loss
from jaxdistill.losses.targets import Mixture, Samples, TopK, sample, top_k
from jaxdistill.recipe import Aux, Group, Recipe, Schedule
from jaxdistill.training import optim, sharding, state

MESHES = [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 1, 8)]
COLLECTIVE = re.compile(r" (?:all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute)(?:-start)?\(")
VOCAB, WIDTH = 331, 24
SCALE = {"lm": np.float32(0.3), "kd": np.float32(0.7)}
RULES = ((r"wte", jax.P(None, ("fsdp", "model"))),)


def looped(text: str) -> list[str]:
    """The collectives of an HLO module that are run in a loop: in a body of a while, or in what that calls."""
    computations = {}
    for block in re.split(r"\n\n", text):
        if name := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", block):
            computations[name[1]] = block
    todo, inside = re.findall(r"body=%?([\w.\-]+)", text), set()
    assert todo, "no loop was found"
    while todo:
        name = todo.pop()
        if name not in inside:
            inside.add(name)
            todo += [called for called in re.findall(r"%?([\w.\-]+)", computations[name]) if called in computations]
    return [line for name in sorted(inside) for line in computations[name].splitlines() if COLLECTIVE.search(line)]


@functools.cache
def arrays(batch=16, time=12):
    key = jax.random.split(jax.random.key(0), 6)
    return jax.device_get({
        "hidden": jax.random.normal(key[0], (batch, time, WIDTH)), "wte": jax.random.normal(key[1], (VOCAB, WIDTH)),
        "labels": jax.random.randint(key[2], (batch, time), 0, VOCAB), "where": jax.random.bernoulli(key[3], 0.7, (batch, time)),
        "theirs": jax.random.normal(key[4], (batch, time, 32)), "their_wte": jax.random.normal(key[5], (VOCAB, 32)),
    })


def loss(hidden, head, bias, a):
    teacher = a["theirs"], a["their_wte"]
    if "second" in a:
        teacher = Mixture((teacher, (a["second"], a["their_wte"][:, :8])), (0.4, 0.6))
    for kind in (TopK, Samples):
        if set(kind._fields) <= a.keys():
            teacher = kind(*(a[name] for name in kind._fields))
    total, terms, probes = fused_vocab_loss(
        hidden, head, a["labels"], scale=SCALE, where=a["where"], kd_where=a.get("kd_where"), teacher=teacher, head_bias=bias,
        temperature=2.0, chunk=4, probe=True,
    )
    return total, (terms, probes)


def run(a):
    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(a["hidden"], a["wte"], jnp.zeros(VOCAB), a)


def on(mesh, a):
    places = {name: sharding.shardings({name: x}, RULES, mesh)[name] if "wte" in name else sharding.batch_sharding(mesh)
              for name, x in a.items()}
    return jax.device_put(a, places)


@pytest.mark.parametrize("mesh", MESHES)
def test_no_collective_runs_in_the_loop_and_the_result_is_one_devices(mesh):
    compiled = jax.jit(run).lower(on(sharding.make_mesh(mesh), arrays())).compile()
    assert looped(compiled.as_text()) == []
    assert COLLECTIVE.search(compiled.as_text())  # it is summed, once
    found, wanted = compiled(on(sharding.make_mesh(mesh), arrays())), jax.jit(run)(arrays())
    for ours, one in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, one, rtol=0, atol=1e-6 * float(jnp.abs(one).max()))


def with_target(kind, batch) -> dict:
    """The arrays, with another target than one teacher: of the sparse ones some ids hold nothing, and kd counts other tokens than lm."""
    a = arrays(batch)
    if kind == "Mixture":
        return a | {"second": a["theirs"][..., 8:16]}
    logits = jnp.einsum("btd,vd->btv", a["theirs"], a["their_wte"])
    draw, drop, count = jax.random.split(jax.random.key(1), 3)
    target = top_k(logits, 9, temperature=2.0) if kind == "TopK" else sample(draw, logits, 9, temperature=2.0, gamma=0.6)
    target = target._replace(ids=jnp.where(jax.random.bernoulli(drop, 0.8, target.ids.shape), target.ids, -1))
    return a | jax.device_get(target._asdict() | {"kd_where": jax.random.bernoulli(count, 0.6, a["where"].shape)})


@pytest.mark.parametrize(("kind", "mesh", "batch"), [
    ("Mixture", (2, 2, 2), 16),
    *((kind, mesh, 16) for kind in ("TopK", "Samples") for mesh in [(8, 1, 1), (2, 4, 1), (2, 2, 2)]),
    ("TopK", (2, 2, 2), 4), ("Samples", (2, 2, 2), 4),  # too few rows for all devices: positions are cut too
])
def test_other_targets_are_cut_as_the_tokens_are(kind, mesh, batch):
    """Total, terms, probes and every gradient are one device's."""
    a, mesh = with_target(kind, batch), sharding.make_mesh(mesh)
    compiled = jax.jit(run).lower(on(mesh, a)).compile()
    assert looped(compiled.as_text()) == []
    for ours, one in zip(jax.tree.leaves(compiled(on(mesh, a))), jax.tree.leaves(jax.jit(run)(a)), strict=True):
        np.testing.assert_allclose(ours, one, rtol=0, atol=1e-6 * float(jnp.abs(one).max()))


def test_the_ambient_mesh_serves_where_shardings_are_given_to_jit():
    mesh = sharding.make_mesh((4, 2, 1))
    places = jax.tree.map(lambda x: x.sharding, on(mesh, arrays()))
    with jax.set_mesh(mesh):
        compiled = jax.jit(run, in_shardings=(places,)).lower(arrays()).compile()
    assert looped(compiled.as_text()) == []


def test_a_batch_that_no_axis_divides_is_computed_all_the_same():
    odd = arrays(3, 5)
    mesh = sharding.make_mesh((2, 2, 2))
    found = jax.jit(run)(jax.device_put(odd, sharding.replicate(mesh)))
    np.testing.assert_allclose(found[0][0], jax.jit(run)(odd)[0][0], rtol=1e-6)


def test_the_test_sees_a_collective_in_a_loop():
    mesh = sharding.make_mesh((8, 1, 1))
    over = jax.device_put(np.ones((8, 4), np.float32), jax.NamedSharding(mesh, jax.P("data")))
    step = lambda x: jax.lax.fori_loop(0, 3, lambda i, c: c + jnp.sum(jnp.sin(x * (1 + c)), axis=0, keepdims=True), jnp.zeros((1, 4)))  # noqa: E731
    assert looped(jax.jit(step).lower(over).compile().as_text())


@pytest.mark.parametrize("mesh", MESHES[:2])
def test_the_train_step_keeps_them_out_too(mesh):
    """A model of one tied embedding, cut over fsdp: the step finds the mesh from the batch that it is given."""
    def of(params, extra, frozen, batch, dials, key):
        hidden = params["wte"][batch["labels"]] + batch["hidden"]
        total, terms, _ = fused_vocab_loss(hidden, params["wte"], batch["labels"], scale=dials.scale, where=batch["where"],
                                           teacher=(batch["theirs"], frozen["their_wte"]), chunk=16)
        return total, Aux(terms)

    weights = {name: Schedule(((0.0, 0.5),)) for name in ("lm", "kd")}
    recipe = Recipe(init=None, loss=of, weights=weights, optim_rules=(("wte", Group("all")),), data=None)
    mesh = sharding.make_mesh(mesh)
    a = on(mesh, arrays())
    params, frozen = {"wte": a.pop("wte")}, {"their_wte": a.pop("their_wte")}
    groups = optim.group_tree(params, recipe.optim_rules)
    step = state.make_gradients(recipe, groups, 1, gather=sharding.gathering(RULES, mesh))
    half = dict.fromkeys(weights, jnp.float32(0.5))
    compiled = jax.jit(step).lower(params, {}, frozen, a, half, {}, jax.random.key(0)).compile()
    assert looped(compiled.as_text()) == []
