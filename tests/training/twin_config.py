"""The jobs of two processes: python -m jaxdistill.main --config=tests/training/twin_config.py[:pair | :dcal | :cross@FOLDER]

FOLDER holds what the fixtures `job` and `other` of tests/recipes write."""

from pathlib import Path

from ml_collections import ConfigDict

from tests import jobs


def get_config(variant: str = ""):
    name, _, folder = variant.partition("@")
    config = {"": jobs.toy, "pair": lambda: jobs.pair(fit=True), "dcal": dcal, "cross": lambda: cross(Path(folder))}[name]()
    config.mesh = (4, 2, 1)
    return config


def dcal() -> ConfigDict:
    """Images, augmented, in identities by K, each with a partner; triplets of the whole batch; a ranking of the whole split."""
    from tests.invariants.test_dcal import config

    return config(data=dict(rotate=5.0, shift=0.1), dcal=dict(figures=2), train=dict(steps=4, eval_every=2, checkpoint_every=2))


def cross(folder: Path) -> ConfigDict:
    """A teacher of another tokenizer, whose tokens lie beside the student's; projected, by what is fitted first."""
    from tests.recipes.conftest import config

    c = config(folder)
    c.teacher.path, c.kd.mode = str(folder / "other"), "projector"
    c.optimizer.update(dict(name="sgd", clip=0.0))  # Adam would divide rounding noise by itself
    c.train.update(dict(steps=4, eval_every=2, checkpoint_every=2))
    return c
