"""Small jobs that several tests run."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from jaxdistill.training import plan, sharding
from jaxdistill.training.defaults import defaults
from jaxdistill.training.prepare import Prepared, build, prepare


def toy(**toy_keys) -> ConfigDict:
    """One run `toy` of tests/toy.py."""
    config = defaults()
    config.mesh = (1, 1, 1)
    config.monitor, config.headline = "validation/error", "toy"
    keys = dict(contrast=0.1, kd=((0.0, 0.5),), poison=-1, stop=-1, dead=False, teacher="", start="", fit=False)
    config.toy = ConfigDict(keys | toy_keys)
    config.train.update(dict(steps=12, batch=16, lr=1e-2, eval_every=4, checkpoint_every=3, ema=0.9))
    config.probes.update(dict(every=1, deep=8))
    config.runs = ("toy",)
    config.run = ConfigDict(dict(toy=dict(recipe="tests.toy")))
    return config


def pair(**toy_keys) -> ConfigDict:
    """A teacher that is trained once, kept in the cache and exported, and a `toy` taught by it."""
    config = toy(**toy_keys)
    config.runs = ("teacher", "toy")
    config.run.teacher = dict(recipe="tests.toy", once=True, cached=True, fills="toy.teacher", given="toy.start",
                              toy=dict(kd=((0.0, 0.0),)), train=dict(steps=4))
    return config


def ready(config: ConfigDict, change=lambda recipe: recipe) -> Prepared:
    """The first run of `config`, ready to step on the config's mesh. change: recipe -> recipe."""
    built = build(plan.expand(config)[0])
    built.recipe = change(built.recipe)
    return prepare(built, sharding.make_mesh(config.mesh))


def changed(config, **keys) -> ConfigDict:
    """With more keys; of names with dots."""
    config.update_from_flattened_dict(keys)
    return config


def read(path: Path):
    return json.loads(path.read_text())
