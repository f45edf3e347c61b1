"""Every check, of dcal: as a classifier that learns from another one, and in re-identification."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxdistill.data import images
from jaxdistill.models import classifier
from jaxdistill.training import plan, prepare, sharding
from jaxdistill.training.defaults import defaults
from tests.invariants.checks import Case, Invariants

DATA = dict(source="glyphs", size=(16, 16), classes=6, per_class=8, test_per_class=4)
MODEL = dict(patch=4, width=16, depth=2, heads=2)
OFF = 4  # rows i, i + 4, ... are partners: also in 4 micro-batches


def config(**changes) -> ConfigDict:
    c = defaults()
    c.mesh, c.monitor, c.minimize = (1, 1, 1), "validation/accuracy", False
    c.data, c.model, c.dcal, c.loss = ConfigDict(DATA), ConfigDict(MODEL), ConfigDict(dict(queries=0.3)), ConfigDict(dict(smoothing=0.1))
    c.optimizer.update(dict(name="sgd", clip=0.0))
    c.train.update(dict(steps=8, batch=16, lr=1e-2, eval_every=4, checkpoint_every=4))
    c.runs, c.run = ("dcal",), ConfigDict(dict(dcal=dict(recipe="dcal")))
    for name, change in changes.items():
        c[name] = ConfigDict(c.get(name, ConfigDict()).to_dict() | change) if isinstance(change, dict) else change
    return c


def ready(mesh=(1, 1, 1), **changes) -> prepare.Prepared:
    return prepare.prepare(prepare.build(plan.expand(config(mesh=mesh, **changes))[0]), sharding.make_mesh(mesh))


def case(**changes) -> Case:
    one = ready(**changes)
    batch = dict(next(one.built.recipe.data("train", 0)))
    batch["valid"] = np.arange(16) % OFF != 3
    batch["partner"] = ((batch["row"] + OFF) % 16).astype(np.int32)
    return Case(
        ready=one, batch=batch, remade=lambda mesh: ready(mesh, **changes), padded=padded,
        masked=lambda batch: batch | {"valid": np.zeros_like(batch["valid"])},
        inert=r"attention/k/bias$",  # it moves all scores of a query alike, and the softmax does not see it
        maskable=tuple(name for name, weight in one.built.recipe.weights.items() if name != "prior" and not weight.off),
    )


def padded(batch: dict) -> dict:
    more = {name: np.concatenate([value, value]) for name, value in batch.items()}
    more["row"] = np.arange(len(more["row"]), dtype=np.int32)
    more["partner"][len(batch["row"]):] = more["row"][len(batch["row"]):]
    more["valid"][len(batch["row"]):] = False
    more["image"] = np.where(more["valid"][:, None, None, None], more["image"], 255 - more["image"])
    return more


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a plain ViT, far from any student."""
    folder = tmp_path_factory.mktemp("dcal") / "teacher"
    sets = images.load(images.ImageConfig(**DATA))
    model = classifier.describe(classifier.ModelConfig(**MODEL), "teacher", image=(16, 16), channels=1, classes=sets.classes)
    model.save(jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(5))), folder)
    return str(folder)


class TestDistilled(Invariants):
    """SA, GLCA and PWCA with learned weights, and a teacher whose weight rises from 0."""

    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, teacher):
        kd = dict(kd=dict(weight=((0.0, 0.0), (0.5, 0.7)), temperature=((0.0, 2.0), (1.0, 1.5))), teacher=dict(path=teacher))
        found = case(**kd)
        found.zero = ("kd",)

        def taught():
            plain = ready(**kd, dcal=dict(mode="sa_only"), model=dict(path=teacher, head="stored", patch=0, width=0, depth=0, heads=0))
            return plain, plain.state.params

        found.taught = taught
        return found


class TestReID(Invariants):
    """Triplets of every branch, over the whole batch."""

    @pytest.fixture(scope="class")
    @classmethod
    def case(cls):
        return case(data=dict(task="reid", classes=12, test=0.25), loss=dict(identities=4), monitor="validation/mAP")
