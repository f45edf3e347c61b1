"""DCAL's three streams against a re-derivation in torch, and what the definition says must hold between them."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxdistill import UserError
from jaxdistill.models import vit
from jaxdistill.models.dcal import DCAL, PLAIN, Branches

SMALL = vit.ViTConfig(image=(16, 32), patch=8, width=24, depth=2, heads=3, classes=5, inner=40)
PARTNER = jnp.asarray([2, 0, 1])


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


@functools.cache
def made(branches=Branches(queries=0.4), sizes=SMALL, **fields):  # noqa: B008  (frozen)
    """A module and large random weights, so that no attention is flat."""
    module, rng = DCAL(sizes, branches, **fields), np.random.default_rng(1)
    draw = lambda path, shape: jnp.asarray(rng.normal(path.endswith("scale"), 0.25, shape), jnp.float32)  # noqa: E731
    return module, unflatten_dict({path: draw(path, shape) for path, shape in vit.shapes(module).items()}, sep="/")


@functools.cache
def forward(module):
    return jax.jit(module.apply)


def run(module, params, images, **inputs):
    return forward(module)({"params": params}, images, **inputs)


def images_for(count=3, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, *SMALL.image, 3)), jnp.float32)


def in_torch(params, images, partner, branches):
    """The three streams written from the paper, image by image. Returns logits by stream, and the queries."""
    torch = pytest.importorskip("torch")
    c, f = SMALL, torch.nn.functional
    p = {path: torch.tensor(np.asarray(leaf), requires_grad=True) for path, leaf in flatten_dict(params, sep="/").items()}

    def linear(x, name):
        return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]

    def norm(x, name):
        return f.layer_norm(x, (c.width,), p[f"{name}/scale"], p[f"{name}/bias"], eps=c.eps)

    def heads(x):
        return x.reshape(len(x), c.heads, -1).transpose(0, 1)

    def keys_values(x, at):
        x = norm(x, f"{at}/ln_1")
        return linear(x, f"{at}/attention/k"), linear(x, f"{at}/attention/v")

    def block(x, at, queries=None, pair=None):
        k, v = keys_values(x, at)
        if pair:
            k, v = torch.cat([k, pair[0]]), torch.cat([v, pair[1]])
        x = x if queries is None else x[queries]
        q = linear(norm(x, f"{at}/ln_1"), f"{at}/attention/q")
        s = torch.softmax(heads(q) @ heads(k).transpose(1, 2) / (c.width / c.heads) ** 0.5, -1)
        x = x + linear((s @ heads(v)).transpose(0, 1).reshape(len(x), -1), f"{at}/attention/out")
        return x + linear(f.gelu(linear(norm(x, f"{at}/ln_2"), f"{at}/mlp/up")), f"{at}/mlp/down"), s.mean(0)

    def embed(image):
        pixels = torch.tensor(np.asarray(image)).reshape(2, 8, 4, 8, 3).permute(0, 2, 3, 1, 4).reshape(8, -1)
        patches = pixels @ p["vit/embed/patch/kernel"].reshape(-1, c.width) + p["vit/embed/patch/bias"]
        return torch.cat([p["vit/embed/cls"][0], patches]) + p["vit/embed/position"][0]

    def sa(image):  # the inputs of every block and the output of the last; the maps
        states, maps = [embed(image)], []
        for i in range(c.depth):
            x, s = block(states[-1], f"vit/block_{i}")
            states.append(x)
            maps.append(s)
        return states, maps

    streams = [sa(image) for image in images]
    logits, chosen = {"sa": [], "glca": [], "pwca": []}, []
    for i, other in enumerate(partner):
        states, maps = streams[i]
        logits["sa"].append(linear(norm(states[-1], "vit/ln_f")[0], "vit/head"))
        attach, product = branches.attach or c.depth, torch.eye(1 + c.patches)
        for s in maps[:attach]:
            product = (0.5 * s + 0.5 * torch.eye(1 + c.patches)) @ product
        seen = product if branches.select == "rollout" else maps[attach - 1]
        top = seen[0, 1:].detach().argsort(descending=True)[: int(branches.queries * c.patches)]
        chosen.append(top)
        queries = torch.cat([torch.zeros(1, dtype=torch.long), top + 1]) if branches.cls_query else top + 1
        local, _ = block(states[attach], "glca_block", queries)
        local = norm(local, "glca_ln_f")
        logits["glca"].append(linear(local[0] if branches.readout == "cls" else local.mean(0), "glca_head"))
        x = states[0]
        for depth in range(c.depth):
            x, _ = block(x, f"vit/block_{depth}", pair=keys_values(streams[other][0][depth], f"vit/block_{depth}"))
        logits["pwca"].append(linear(norm(x, "vit/ln_f")[0], "pwca_head" if branches.pwca == "own" else "vit/head"))
    return {name: torch.stack(rows) for name, rows in logits.items()}, torch.stack(chosen), p


@pytest.mark.parametrize(("branches", "partner"), [
    (Branches(queries=0.4), PARTNER),
    (Branches(queries=0.4, cls_query=False, attach=1, pwca="own"), PARTNER),
    (Branches(queries=0.7, select="last", readout="cls"), PARTNER),
    (Branches(queries=0.4), jnp.asarray([2, 2])),  # the third image is a partner only
], ids=["default", "other", "last", "distractor"])  # fmt: skip
def test_parity_with_three_streams_in_torch(branches, partner):
    torch = pytest.importorskip("torch")
    module, params = made(branches)
    images = images_for()

    outputs, features = run(module, params, images, partner=partner)
    want, queries, leaves = in_torch(params, images, partner, branches)
    assert outputs.keys() == want.keys() == {"sa", "glca", "pwca"}
    for name, theirs in want.items():
        np.testing.assert_allclose(outputs[name], theirs.detach().numpy(), atol=1e-5, rtol=0, err_msg=name)
    assert jnp.abs(outputs["pwca"] - outputs["sa"]).max() > 0.1
    np.testing.assert_array_equal(features["queries"], queries)
    if branches != Branches(queries=0.4) or len(partner) < len(images):
        return  # the gradients of one case are enough: the others differ in what was seen forward

    def loss(params):
        outputs, _ = module.apply({"params": params}, images, partner=partner)
        return sum(-jax.nn.log_softmax(x)[:, i].mean() for i, (_, x) in enumerate(sorted(outputs.items())))

    grads = jax.jit(jax.grad(loss))(params)
    sum(-torch.log_softmax(want[name], -1)[:, i].mean() for i, name in enumerate(sorted(want))).backward()
    for path, grad in flatten_dict(grads, sep="/").items():
        np.testing.assert_allclose(grad, leaves[path].grad.numpy(), atol=1e-5, rtol=1e-4, err_msg=path)


def streams_equal(features):
    """SA's and PWCA's states after every block; after the last there is only CLS of PWCA."""
    for i in range(SMALL.depth):
        ours = features[f"pwca_block_{i}"]
        np.testing.assert_allclose(ours, features[f"block_{i}"][:, : ours.shape[1]], atol=2e-5, err_msg=str(i))


def test_a_pair_that_is_the_image_itself_changes_nothing():
    module, params = made()
    outputs, features = run(module, params, images_for(), partner=jnp.arange(3))
    np.testing.assert_allclose(outputs["pwca"], outputs["sa"], atol=2e-5)
    streams_equal(features)
    _, features = run(module, params, images_for(), partner=PARTNER)
    with pytest.raises(AssertionError):
        streams_equal(features)


def test_a_pair_whose_keys_are_masked_changes_nothing(monkeypatch):
    """One more dimension of every head adds -1e9 to the scores of the pair's keys, which come after the 9 own."""
    attend = vit.attend

    def masked(q, k, v):
        d = q.shape[-1]
        widen = lambda x, fill: jnp.concatenate([x, jnp.broadcast_to(fill, (*x.shape[:3], 1))], axis=-1)  # noqa: E731
        theirs = jnp.where(jnp.arange(k.shape[1]) < 9, 0.0, -1e9)[None, :, None, None]
        out, attention = attend(((d + 1) / d) ** 0.5 * widen(q, jnp.float32(d**0.5)), widen(k, theirs), widen(v, jnp.float32(0)))
        return out[..., :-1], attention

    module, params = made()
    monkeypatch.setattr(vit, "attend", masked)
    outputs, features = jax.jit(lambda params: module.apply({"params": params}, images_for(), partner=PARTNER))(params)  # traced anew
    np.testing.assert_allclose(outputs["pwca"], outputs["sa"], atol=2e-5)
    streams_equal(features)


def test_the_pair_reaches_pwca_alone_and_from_any_depth():
    module, params = made()
    images = images_for()
    base = run(module, params, images, partner=PARTNER)[0]
    moved = run(module, params, images.at[2].add(0.5), partner=PARTNER)[0]  # the partner of example 0
    for name in ("sa", "glca"):
        np.testing.assert_allclose(moved[name][:2], base[name][:2], atol=1e-6)
    assert jnp.abs(moved["pwca"][0] - base["pwca"][0]).max() > 1e-2
    np.testing.assert_allclose(moved["pwca"][1], base["pwca"][1], atol=1e-6)

    def perturb(call, args, kwargs, context):
        if isinstance(context.module, vit.Block) and context.module.name == "block_1" and args[2] is not None:
            args = (*args[:2], (args[2][0] + jnp.flip(args[2][0], 1), args[2][1]), *args[3:])
        return call(*args, **kwargs)

    with nn.intercept_methods(perturb):
        late = jax.jit(lambda params: module.apply({"params": params}, images, partner=PARTNER)[0])(params)
    assert jnp.abs(late["pwca"] - base["pwca"]).max() > 1e-3
    np.testing.assert_allclose(late["sa"], base["sa"], atol=1e-6)


def test_ablations_change_the_parameter_tree_and_nothing_else():
    sizes = dataclasses.replace(SMALL, depth=1)
    part = lambda branches: set(vit.shapes(DCAL(sizes, branches)))  # noqa: E731
    plain = part(PLAIN)
    assert plain == {f"vit/{path}" for path in vit.shapes(vit.ViT(sizes))}
    assert part(Branches(glca=False)) == plain
    glca = part(Branches(pwca="")) - plain
    assert glca == part(Branches()) - plain
    assert {path.split("/")[0] for path in glca} == {"glca_block", "glca_ln_f", "glca_head"}
    assert part(Branches(glca=False, pwca="own")) - plain == {"pwca_head/kernel", "pwca_head/bias"}
    block = {path.replace("glca_block", "block_0") for path in glca if "block" in path}
    assert block == {path.removeprefix("vit/") for path in plain if "block_0" in path}
    one, other = (vit.initialise(DCAL(sizes, branches), jax.random.key(0))["vit"] for branches in (Branches(), PLAIN))
    jax.tree.map(np.testing.assert_array_equal, one, other)  # so that ablations begin alike


def test_plain_is_the_vit():
    module, params = made(PLAIN)
    outputs, features = run(module, params, images_for(), partner=PARTNER)  # which is of no use to it
    want, theirs = run(vit.ViT(SMALL), params["vit"], images_for())
    assert outputs.keys() == {"sa"}
    np.testing.assert_allclose(outputs["sa"], want, atol=1e-5)
    np.testing.assert_allclose(features["sa"], theirs["final"][:, 0], atol=1e-5)


def test_inference_holds_no_pair_and_unused_streams_cost_nothing():
    def program(branches, *names, **inputs):
        module, params = made(branches, dataclasses.replace(SMALL, depth=3))
        call = lambda params: [module.apply({"params": params}, images_for(), **inputs)[0][name] for name in names]  # noqa: E731
        return jax.jit(call).lower(params)

    def flops(program):
        return program.cost_analysis()["flops"]

    both = Branches(queries=0.4)
    full, sa, all_three = program(both, "sa", "glca"), program(both, "sa"), program(both, "sa", "glca", "pwca", partner=PARTNER)
    assert flops(full) == flops(program(dataclasses.replace(both, pwca=""), "sa", "glca"))
    assert flops(sa) == flops(program(PLAIN, "sa"))
    full, sa, all_three = (flops(program.compile()) for program in (full, sa, all_three))
    assert sa < full < 1.4 * sa
    # less than twice: PWCA's first queries, keys and values are SA's, and of its last block only CLS is computed
    assert all_three > 1.4 * full


@pytest.mark.parametrize("readout", ["mean", "cls"])
def test_which_patches_are_chosen_matters_to_the_mean_and_never_to_cls(readout):
    """In one block no query sees another: a classifier of CLS alone, as the paper and others after it write, does not use them."""
    chosen = {select: Branches(queries=0.2, pwca="", readout=readout, select=select) for select in ("rollout", "random")}
    _, params = made(chosen["rollout"])
    found = {select: run(made(branches)[0], params, images_for()) for select, branches in chosen.items()}
    assert (np.sort(found["rollout"][1]["queries"]) != np.sort(found["random"][1]["queries"])).any()
    gap = np.abs(found["rollout"][0]["glca"] - found["random"][0]["glca"]).max()
    assert gap > 1e-3 if readout == "mean" else gap < 1e-6


@pytest.mark.parametrize(("cls_query", "readout"), [(True, "cls"), (True, "mean"), (False, "mean")])
def test_glca_of_all_tokens_is_a_plain_block(cls_query, readout):
    module, params = made(Branches(queries=1.0, pwca="", cls_query=cls_query, readout=readout))
    outputs, features = run(module, params, images_for())
    assert (jnp.sort(features["queries"], axis=1) == jnp.arange(8)[None]).all()
    block = vit.Block(SMALL, 0.0, jnp.float32)
    x, _, _ = run(block, params["glca_block"], features["block_1"])
    x = run(vit.LayerNorm(SMALL.eps, jnp.float32), params["glca_ln_f"], x)
    state = x[:, 0] if readout == "cls" else x.mean(1) if cls_query else x[:, 1:].mean(1)
    np.testing.assert_allclose(features["glca"], state, atol=1e-5)
    assert outputs["glca"].shape == (3, 5)


def test_the_count_of_queries():
    counts = [((0.1, 784), 78), ((0.3, 128), 38), ((0.29, 100), 29), ((0.1, 5), 1), ((1.0, 49), 49)]
    assert [Branches(queries=share).count(patches) for (share, patches), _ in counts] == [count for _, count in counts]


def test_queries_are_where_cls_looks():
    """The patches that the rollout gives most, the most first."""
    module, params = made()
    _, features = run(module, params, images_for())
    rollout = np.asarray(features["rollout"])
    np.testing.assert_array_equal(features["queries"], np.argsort(-rollout, axis=1)[:, :3])
    assert np.all(np.diff(np.sort(rollout, axis=1), axis=1) > 0)


def test_queries_carry_no_gradient_and_do_not_depend_on_the_batch():
    module, params = made()
    images = images_for()
    grads = jax.jit(jax.grad(lambda params: module.apply({"params": params}, images)[1]["rollout"].sum()))(params)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))
    outputs, features = run(module, params, images)
    alone, same = run(module, params, jnp.repeat(images[1:2], 3, axis=0))
    np.testing.assert_array_equal(same["queries"][0], features["queries"][1])
    np.testing.assert_allclose(alone["glca"][0], outputs["glca"][1], atol=1e-5)


def test_random_queries_need_a_key_to_differ():
    module, params = made(Branches(queries=0.4, pwca="", select="random"))
    queries = jax.jit(lambda key: module.apply({"params": params}, images_for(), key=key)[1]["queries"])
    first, second = (queries(jax.random.key(i)) for i in (0, 1))
    assert (first != second).any()
    assert (first[0] != first[1]).any() or (first[0] != first[2]).any()
    fixed = queries(None)
    assert (fixed == fixed[:1]).all()
    assert all(len(set(row)) == 3 for row in np.asarray(jnp.concatenate([first, fixed])))


def test_drop_path_differs_between_streams_and_is_deterministic():
    module, params = made(sizes=dataclasses.replace(SMALL, drop_path=0.5))
    images, key = images_for(), jax.random.key(4)
    outputs, _ = run(module, params, images, partner=jnp.arange(3), key=key)
    assert jnp.abs(outputs["pwca"] - outputs["sa"]).max() > 1e-2
    again, _ = run(module, params, images, partner=jnp.arange(3), key=key)
    jax.tree.map(np.testing.assert_array_equal, outputs, again)
    plain = run(made()[0], params, images)[0]
    jax.tree.map(np.testing.assert_array_equal, run(module, params, images)[0], plain)


def test_bfloat16_and_remat():
    """bfloat16 may choose other queries; with all of them chosen only rounding is left."""
    everything, images = dict(branches=Branches(queries=1.0), sizes=dataclasses.replace(SMALL, depth=1)), images_for()
    module, params = made(**everything)
    params = jax.tree.map(lambda x: 0.5 * x, params)

    def size(module, params):
        outputs = module.apply({"params": params}, images, partner=PARTNER)[0]
        return sum((x**2).sum() for x in outputs.values()), outputs

    programs = [jax.jit(jax.grad(functools.partial(size, m), has_aux=True)).lower(params).compile() for m in
                (module, made(**everything, remat=True)[0])]  # fmt: skip
    (one, want), (other, _) = (program(params) for program in programs)
    half, features = run(made(**everything, dtype=jnp.bfloat16)[0], params, images, partner=PARTNER)
    for name, logits in half.items():
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, want[name], atol=0.02)
    assert features["pwca"].dtype == jnp.bfloat16
    assert features["rollout"].dtype == jnp.float32
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), one, other)
    plain, again = (program.cost_analysis()["flops"] for program in programs)
    assert again > 1.1 * plain


@pytest.mark.parametrize(("change", "said"), [
    ({"pwca": "both"}, "pwca: found 'both'; accepted: '', 'shared', 'own'"),
    ({"select": "best"}, "select: found 'best'; accepted: 'rollout', 'last', 'random'"),
    ({"queries": 0.0}, "queries: found 0.0; accepted: a share of the patches, above 0 and at most 1"),
    ({"attach": -1}, "attach: found -1; accepted: a block counted from 1, or 0 for the last"),
    ({"attach": 4}, "attach: found 4; accepted: at most the depth (2)"),
])  # fmt: skip
def test_branches_that_are_none_are_refused(change, said):
    with pytest.raises(UserError, match=re.escape(said)):
        DCAL(SMALL, Branches(**change))
