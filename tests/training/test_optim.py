"""Parameter groups and the one optimizer chain, against arithmetic and against torch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import UserError
from jaxdistill.recipe import Group
from jaxdistill.training import optim
from jaxdistill.training.prepare import OptimizerConfig

ADAMW = OptimizerConfig(name="adamw", b1=0.9, b2=0.95, eps=1e-8, momentum=0.9, weight_decay=0.0, decay="decoupled", clip=0.0)
SGD = dataclasses.replace(ADAMW, name="sgd", momentum=0.0)
RULES = (
    (r"body/kernel", Group("body", 1.0, 0.1)), (r"body/bias", Group("bias")),
    (r"projector", Group("projector", 5.0)), (r"still", Group("still", frozen=True)),
)


def params(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"body": {"kernel": normal(4, 3), "bias": normal(3)}, "projector": {"kernel": normal(4, 3)}, "still": {"kernel": normal(2)}}


def trained(config, grads: list, lr: float = 0.1, tree=None):
    """(parameters, optimizer state) after one update for each of `grads`; the frozen leaves of these are dropped."""
    tree = tree or params()
    groups = optim.group_tree(tree, RULES)
    tx, now = optim.optimizer(config, groups), optim.cut(tree, groups)
    opt = tx.init(now)
    for grad in grads:
        updates, opt = tx.update(optim.cut(grad, groups), opt, now)
        now = optax.apply_updates(now, optax.tree.scale(lr, updates))
    return optim.join(now, tree), opt


class TestGroups:
    def test_a_leaf_that_no_rule_claims(self):
        with pytest.raises(UserError, match="body/bias: no rule claims it"):
            optim.group_tree(params(), ((r"kernel", Group("all")),))

    def test_a_leaf_that_two_rules_claim(self):
        with pytest.raises(UserError, match=r"body/kernel: claimed by 'body', 'kernel'"):
            optim.group_tree(params(), ((r"body", Group("body")), (r"kernel", Group("kernels"))))

    def test_two_groups_of_one_name(self):
        with pytest.raises(UserError, match="two different groups are called 'a'"):
            optim.group_tree(params(), ((r"body", Group("a")), (r"projector|still", Group("a", 2.0))))

    def test_cut_and_join(self):
        tree = params()
        groups = optim.group_tree(tree, RULES)
        train, rest = optim.cut(tree, groups), optim.cut(tree, groups, frozen=True)
        assert train["still"]["kernel"] is None
        assert rest["body"]["kernel"] is None
        assert optim.join(train, rest)["still"]["kernel"] is tree["still"]["kernel"]
        assert jax.tree.structure(optim.join(train, rest)) == jax.tree.structure(tree)

    def test_the_table_counts_every_parameter(self):
        rows = optim.table(params(), optim.group_tree(params(), RULES))
        assert {row["group"]: (row["leaves"], row["parameters"]) for row in rows} == {
            "body": (1, 12), "bias": (1, 3), "projector": (1, 12), "still": (1, 2)}


def test_lr_mult_multiplies_the_update():
    ones = jax.tree.map(jnp.ones_like, params())
    after, _ = trained(SGD, [ones])
    step = jax.tree.map(lambda a, b: a - b, params(), after)
    np.testing.assert_allclose(step["body"]["bias"], 0.1, rtol=1e-6)
    np.testing.assert_allclose(step["projector"]["kernel"], 0.5, rtol=1e-6)
    exact, _ = trained(SGD, [ones], 1.0, jax.tree.map(jnp.zeros_like, params()))
    np.testing.assert_array_equal(exact["projector"]["kernel"], 5 * exact["body"]["kernel"])  # from 0: not even rounding


def test_the_clip_sees_all_groups_and_no_frozen_leaf():
    grads = params(1)
    clipped, _ = trained(dataclasses.replace(SGD, clip=0.5), [grads])
    norm = np.sqrt(sum(np.sum(np.square(x)) for name in ("body", "projector") for x in grads[name].values()))
    assert norm > 0.5
    before = params()
    wanted = before["projector"]["kernel"] - 0.1 * 5 * grads["projector"]["kernel"] * (0.5 / norm)
    np.testing.assert_allclose(clipped["projector"]["kernel"], wanted, rtol=1e-6)  # lr_mult comes after the clip
    small = jax.tree.map(lambda g: 1e-3 * g, grads)
    free, _ = trained(SGD, [small])
    same, _ = trained(dataclasses.replace(SGD, clip=0.5), [small])
    np.testing.assert_array_equal(free["body"]["bias"], same["body"]["bias"])


def test_the_clip_of_each_number_comes_before_that_of_the_norm():
    grads = params(1)
    clipped, _ = trained(dataclasses.replace(SGD, clip_value=0.05, clip=0.1), [grads])
    cut = jax.tree.map(lambda g: np.clip(g, -0.05, 0.05), grads)
    norm = np.sqrt(sum(np.sum(np.square(x)) for name in ("body", "projector") for x in cut[name].values()))
    assert norm > 0.1
    wanted = params()["projector"]["kernel"] - 0.1 * 5 * cut["projector"]["kernel"] * (0.1 / norm)
    np.testing.assert_allclose(clipped["projector"]["kernel"], wanted, rtol=1e-6)


@pytest.mark.parametrize("config", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_decay_is_decoupled(config):
    before = params()
    after, _ = trained(config, [jax.tree.map(jnp.zeros_like, before)])
    np.testing.assert_allclose(after["body"]["kernel"], before["body"]["kernel"] * (1 - 0.1 * 0.1), rtol=1e-6)
    for name, leaf in (("body", "bias"), ("projector", "kernel"), ("still", "kernel")):
        np.testing.assert_array_equal(after[name][leaf], before[name][leaf])


def test_frozen_leaves_do_not_move_and_have_no_moments():
    before = params()
    after, opt = trained(ADAMW, [params(seed) for seed in range(1, 6)])
    np.testing.assert_array_equal(after["still"]["kernel"], before["still"]["kernel"])
    trainable = sum(x.size for name in ("body", "projector") for x in before[name].values())
    assert sum(x.size for x in jax.tree.leaves(opt) if x.ndim) == 2 * trainable


def test_momentum():
    grads = [params(seed) for seed in (1, 2)]
    after, _ = trained(dataclasses.replace(SGD, momentum=0.9), grads)
    g = [grad["body"]["bias"] for grad in grads]
    np.testing.assert_allclose(after["body"]["bias"], params()["body"]["bias"] - 0.1 * (1.9 * g[0] + g[1]), rtol=1e-5, atol=1e-6)


def test_an_unknown_optimizer():
    with pytest.raises(UserError, match=r"optimizer\.name: found 'lion'; accepted: adamw, sgd"):
        trained(dataclasses.replace(ADAMW, name="lion"), [])


@pytest.mark.parametrize(("config", "name"), [
    (ADAMW, "AdamW"), (dataclasses.replace(ADAMW, decay="coupled"), "Adam"),
    (dataclasses.replace(ADAMW, name="sgd", decay="coupled"), "SGD"),
], ids=["adamw", "adam with L2", "sgd with L2"])
def test_it_is_that_of_torch(config, name):
    torch = pytest.importorskip("torch")
    grads = [params(seed) for seed in range(1, 11)]
    after, _ = trained(config, grads, lr=1e-2)
    before = params()
    leaves = {"body/kernel": (before["body"]["kernel"], 0.1, 1.0), "body/bias": (before["body"]["bias"], 0.0, 1.0),
              "projector/kernel": (before["projector"]["kernel"], 0.0, 5.0)}
    tensors = {name: torch.nn.Parameter(torch.tensor(np.array(value))) for name, (value, _, _) in leaves.items()}
    options = dict(momentum=0.9) if name == "SGD" else dict(betas=(0.9, 0.95), eps=1e-8)
    theirs = getattr(torch.optim, name)(
        [{"params": [tensors[name]], "weight_decay": decay, "lr": 1e-2 * mult} for name, (_, decay, mult) in leaves.items()], **options,
    )
    for grad in grads:
        for name, tensor in tensors.items():
            part, leaf = name.split("/")
            tensor.grad = torch.tensor(np.array(grad[part][leaf]))
        theirs.step()
    for name, tensor in tensors.items():
        part, leaf = name.split("/")
        np.testing.assert_allclose(after[part][leaf], tensor.detach().numpy(), rtol=1e-6, atol=1e-6)


def test_coupled_decay_erases_what_has_small_gradients():
    """As in document 004: at the same decay and rate, a leaf whose gradients are small keeps its size where decay is decoupled,
    and loses a rate's worth at every update where it passes through Adam's division."""
    tiny = [jax.tree.map(lambda x, s=seed: 1e-4 * x * (-1) ** s, params(1)) for seed in range(50)]
    size = {decay: float(optax.tree.norm(trained(dataclasses.replace(ADAMW, decay=decay), tiny, lr=1e-2)[0]["body"]["kernel"]))
            for decay in ("decoupled", "coupled")}
    start = float(optax.tree.norm(params()["body"]["kernel"]))
    assert size["decoupled"] > 0.94 * start
    assert size["coupled"] < 0.7 * start


def test_an_unknown_decay():
    with pytest.raises(UserError, match=r"optimizer\.decay: found 'l2'; accepted: decoupled, coupled"):
        trained(dataclasses.replace(ADAMW, decay="l2"), [])
