"""Parameter groups by regex, and one optax chain over them.

Order: the clip of each number, one global clip, then each group's own moments, decoupled decay and learning-rate multiplier. No schedule
lives inside optax: the step scales the result by the rate of `state.step`, its only counter.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdistill import UserError
from jaxdistill.recipe import Group


def path_name(path) -> str:
    """A key path as 'block_0/attention/qkv/kernel', the form that every regex rule searches."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def group_tree(params: Any, rules: tuple[tuple[str, Group], ...]) -> Any:
    """A tree like `params` with the Group of each leaf. A leaf that no rule or more than one rule claims is
    an error: silently untrained or doubly trained parameters are how per-group rates go wrong."""
    groups: dict[str, Group] = {}
    for _, group in rules:
        if groups.setdefault(group.name, group) != group:
            raise UserError(f"optim_rules: two different groups are called {group.name!r}; accepted: one name, one group")

    def claim(path, leaf):
        name = path_name(path)
        claims = [(regex, group) for regex, group in rules if re.search(regex, name)]
        if len(claims) != 1:
            found = "no rule claims it" if not claims else f"claimed by {', '.join(repr(regex) for regex, _ in claims)}"
            raise UserError(f"optim_rules: parameter {name}: {found}; accepted: exactly one of the rules matches")
        return claims[0][1]

    return jax.tree.map_with_path(claim, params)


def cut(params: Any, groups: Any, *, frozen: bool = False) -> Any:
    """`params` with every frozen leaf None (with frozen=True: every trainable leaf None). None is no leaf to
    JAX, so frozen leaves have no gradient, no moments and no part in the clip's norm."""
    return jax.tree.map(lambda group, leaf: leaf if group.frozen == frozen else None, groups, params)


def join(train: Any, rest: Any) -> Any:
    """The inverse of `cut`."""
    return jax.tree.map(lambda a, b: b if a is None else a, train, rest, is_leaf=lambda x: x is None)


def optimizer(config, groups: Any) -> optax.GradientTransformation:
    """config: name ('adamw' | 'sgd'), b1, b2, eps, momentum, clip (global norm, 0 = off), clip_value (of each
    number, before it; 0 = off), decay ('decoupled', or 'coupled':
    L2, which Adam divides by the size of the gradients, so that weights with small ones vanish; SGD knows no difference but
    for the momentum).

    Returns updates to be scaled by the learning rate: they already carry the minus sign and lr_mult."""
    moments = {
        "adamw": lambda: optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        "sgd": lambda: optax.trace(decay=config.momentum) if config.momentum else optax.identity(),
    }
    if config.name not in moments:
        raise UserError(f"optimizer.name: found {config.name!r}; accepted: {', '.join(moments)}")
    if config.decay not in ("decoupled", "coupled"):
        raise UserError(f"optimizer.decay: found {config.decay!r}; accepted: decoupled, coupled")

    def chain(group: Group):
        decay = [optax.add_decayed_weights(group.weight_decay)] if group.weight_decay else []
        parts = [*decay, moments[config.name]()] if config.decay == "coupled" else [moments[config.name](), *decay]
        return optax.chain(*parts, optax.scale(-group.lr_mult))

    leaves = [group for group in jax.tree.leaves(groups) if not group.frozen]
    transforms = {group.name: chain(group) for group in leaves}
    labels = jax.tree.map(lambda group: None if group.frozen else group.name, groups)
    clip = [optax.clip(config.clip_value)] if config.clip_value else []
    clip += [optax.clip_by_global_norm(config.clip)] if config.clip else []
    return optax.chain(*clip, optax.partition(transforms, labels))


def left_by_clip(config, grads: Any, norm):
    """The share of the gradient's length that the global clip leaves: 1 where it does nothing, or is off.

    norm: of `grads`; where each number is clipped first, the clip sees another one."""
    if not config.clip:
        return jnp.ones((), jnp.float32)
    if config.clip_value:
        norm = optax.tree.norm(jax.tree.map(lambda g: jnp.clip(g, -config.clip_value, config.clip_value), grads))
    return jnp.minimum(1.0, config.clip / jnp.maximum(norm, 1e-30))


def table(params: Any, groups: Any) -> list[dict]:
    """One row a group: name, lr_mult, weight_decay, frozen, leaves, parameters (for people and the manifest)."""
    rows: dict[str, dict] = {}
    for group, leaf in zip(jax.tree.leaves(groups), jax.tree.leaves(params), strict=True):
        row = rows.setdefault(group.name, {
            "group": group.name, "lr_mult": group.lr_mult, "weight_decay": group.weight_decay,
            "frozen": group.frozen, "leaves": 0, "parameters": 0,
        })
        row["leaves"] += 1
        row["parameters"] += int(leaf.size)
    return list(rows.values())
