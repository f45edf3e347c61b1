"""Every check, of soft_label on graphs with every term on; and of the MLP with a focal loss, those that differ there."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxdistill.training import plan, prepare, sharding
from jaxdistill.training.defaults import defaults
from tests.invariants import checks
from tests.invariants.checks import Case, Invariants

DATA = dict(cities=1, addresses=6, neighbours=4, validation=0.2, test=0.2)
EVERY = dict(
    smoothing=0.1, temperature=2.0, norm_cap=3.0, entropy_weight=0.7, entropy_floor=2.05, entropy_kind="quadratic", confidence_weight=0.3,
    max_suppression=0.2, margin_weight=0.4, margin=0.1, class_weights="effective", beta=0.9, final_decay=0.01, guards=False,
)  # fmt: skip


def config(kind: str, **changes) -> ConfigDict:
    c = defaults()
    c.mesh, c.monitor = (1, 1, 1), "validation/kl"
    c.data, c.soft = ConfigDict(DATA), ConfigDict(EVERY)
    c.model = ConfigDict({"kind": kind} | {kind: dict(mlp=dict(hidden=(8,), norm="layer"), graph=dict(width=8, depth=2, heads=2))[kind]})
    c.optimizer.update(dict(name="sgd", clip=0.0))
    c.train.update(dict(steps=6, batch=16, lr=1e-2, eval_every=3, checkpoint_every=3))
    c.runs, c.run = ("soft",), ConfigDict(dict(soft=dict(recipe="soft_label")))
    for name, change in changes.items():
        c[name] = ConfigDict(change)
    return c


def ready(kind: str, mesh=(1, 1, 1), **changes) -> prepare.Prepared:
    c = config(kind, **changes)
    c.mesh = mesh
    return prepare.prepare(prepare.build(plan.expand(c)[0]), sharding.make_mesh(mesh))


def case(kind: str, **changes) -> Case:
    one = ready(kind, **changes)
    batch = dict(next(one.built.recipe.data("train", 0)))
    batch["valid"] = np.arange(16) % 4 != 3
    return Case(ready=one, batch=batch, remade=lambda mesh: ready(kind, mesh, **changes), padded=padded,
                masked=lambda batch: batch | {"valid": np.zeros_like(batch["valid"])})  # fmt: skip


def padded(batch: dict) -> dict:
    """Rows more, and other content in those that do not count."""
    more = {name: np.concatenate([value, value]) for name, value in batch.items()}
    more["row"] = np.arange(len(more["row"]), dtype=np.int32)
    more["valid"][len(batch["row"]) :] = False
    more["x"] = np.where(more["valid"][:, None], more["x"], -more["x"])
    more["target"] = np.where(more["valid"][:, None], more["target"], more["target"][:, ::-1])
    return more


class TestEveryTerm(Invariants):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls):
        return case("graph")

    def test_it_has_every_term(self, case):
        found = checks.measure(case)
        assert set(found.terms) == {"kl", "entropy_floor", "confidence", "max_suppression", "margin"}
        assert all(value > 1e-5 for value in found.raw.values()), found.raw
        assert {"logit_max", "logit_min", "logit_range", "logit_norm"} < set(found.probes)

    @pytest.mark.parametrize("micro", [4])  # 2 is below: each costs a program
    def test_micro_batches_are_one_batch(self, case, micro):
        checks.micro_batches_are_one_batch(case, micro)


class TestFocal(Invariants):
    """An MLP, whose target node is all that it sees; LogitNorm instead of a cap."""

    @pytest.fixture(scope="class")
    @classmethod
    def case(cls):
        return case("mlp", soft=dict(focal=2.0, logit_norm=0.3))

    def test_it_has_one_term(self, case):
        assert set(checks.measure(case).terms) == {"focal"}

    @pytest.mark.parametrize("micro", [2])
    def test_micro_batches_are_one_batch(self, case, micro):
        checks.micro_batches_are_one_batch(case, micro)

    @pytest.mark.parametrize("mesh", [(2, 2, 2)], ids=str)
    def test_meshes_agree(self, case, mesh):
        checks.meshes_agree(case, mesh)
