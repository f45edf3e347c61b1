"""Every check, of dcal in re-identification with every term on; and as a classifier, those that differ there."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxdistill.data import images
from jaxdistill.models import classifier
from jaxdistill.training import plan, prepare, sharding
from jaxdistill.training.defaults import defaults
from tests.invariants import checks
from tests.invariants.checks import Case, Invariants

DATA = dict(source="glyphs", size=(16, 16), classes=12, per_class=8, test=0.25, task="reid")
MODEL = dict(patch=4, width=16, depth=1, heads=2)
OFF = 4  # rows i, i + 4, ... are partners: also in 4 micro-batches


def config(**changes) -> ConfigDict:
    c = defaults()
    c.mesh, c.monitor, c.minimize = (1, 1, 1), "validation/mAP", False
    c.data, c.model, c.dcal = ConfigDict(DATA), ConfigDict(MODEL), ConfigDict(dict(queries=0.3))
    c.loss = ConfigDict(dict(smoothing=0.1, identities=4))
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


def distilled(teacher) -> dict:
    """A weight that rises from 0, a temperature that falls."""
    return dict(kd=dict(weight=((0.0, 0.0), (0.5, 0.7)), temperature=((0.0, 2.0), (1.0, 1.5))), teacher=dict(path=teacher))


class TestEveryTerm(Invariants):
    """SA, GLCA and PWCA with learned weights, triplets of every branch over the whole batch, and a teacher."""

    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, teacher):
        found = case(**distilled(teacher))
        found.zero = ("kd",)

        def taught():
            same = dict(path=teacher, head="stored", patch=0, width=0, depth=0, heads=0)
            plain = ready(**distilled(teacher), dcal=dict(mode="sa_only"), model=same)
            return plain, plain.state.params

        found.taught = taught
        return found

    def test_it_has_every_term(self, case):
        branches = ("sa", "glca", "pwca")
        assert set(checks.measure(case).terms) == {*branches, *(f"{name}_triplet" for name in branches), "prior", "kd"}

    @pytest.mark.parametrize("micro", [4])  # 2 is below: each costs a program
    def test_micro_batches_are_one_batch(self, case, micro):
        checks.micro_batches_are_one_batch(case, micro)


class TestRecognition:
    """Classes instead of identities: the sampler draws single images, and no term but the prior is of the whole batch."""

    @pytest.fixture(scope="class")
    @classmethod
    def case(cls):
        return case(data=dict(task="classification", classes=6, test=0.0, test_per_class=4), monitor="validation/accuracy")

    def test_it_has_the_terms_of_the_paper_and_no_triplet(self, case):
        assert set(checks.measure(case).terms) == {"sa", "glca", "pwca", "prior"}

    def test_micro_batches_are_one_batch(self, case):
        checks.micro_batches_are_one_batch(case, 2)

    def test_every_trainable_leaf_is_reached_by_a_term(self, case):
        checks.every_trainable_leaf_is_reached_by_a_term(case)
