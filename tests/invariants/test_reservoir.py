"""Every check, of reservoir with a trained reservoir and a KAF readout."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxdistill.training import plan, prepare, sharding
from jaxdistill.training.defaults import defaults
from tests.invariants import checks
from tests.invariants.checks import Case, Invariants

DATA = dict(source="actions", classes=4, subjects=6, takes=2, length=8, test=0.2, validation=0.2)


def ready(mesh=(1, 1, 1)) -> prepare.Prepared:
    """Without dropout, which micro-batches draw differently, and with random coefficients, of which float32 keeps more digits."""
    c = defaults()
    c.mesh, c.monitor, c.minimize = mesh, "validation/nll", True
    c.data = ConfigDict(DATA)
    c.reservoir = ConfigDict(dict(units=8, density=0.5, input_scale=0.1, trained=True, fusion="convex"))
    c.readout = ConfigDict(dict(kernels=(3,), filters=4, pooling=4, hidden=8, pieces=2, width=6, dropout=(0.0, 0.0)))
    c.kaf = ConfigDict(dict(init="random", gamma="trained", bypass=True, penalty=1e-3))
    c.loss = ConfigDict(dict(smoothing=0.1, gamma=1.0, weights="effective", tau=0.5))
    c.optimizer.update(dict(name="sgd", clip=0.0))
    c.train.update(dict(steps=6, batch=16, lr=1e-2, eval_every=3, checkpoint_every=3))
    c.runs, c.run = ("reservoir",), ConfigDict(dict(reservoir=dict(recipe="reservoir")))
    return prepare.prepare(prepare.build(plan.expand(c)[0]), sharding.make_mesh(mesh))


def padded(batch: dict) -> dict:
    """As many rows again that do not count, and frames beyond each length that hold something else."""
    more = {name: np.concatenate([value, value]) for name, value in batch.items()}
    more["row"] = np.arange(len(more["row"]), dtype=np.int32)
    more["valid"][len(batch["row"]) :] = False
    beyond = np.arange(more["x"].shape[1])[None] >= more["length"][:, None]
    more["x"] = np.where(beyond[..., None] | ~more["valid"][:, None, None], 1 - 3 * more["x"], more["x"]).astype(np.float32)
    return more


class TestReservoir(Invariants):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls):
        one = ready()
        batch = dict(next(one.built.recipe.data("train", 0)))
        batch["valid"] = np.arange(16) % 4 != 3
        batch["length"] = np.where(np.arange(16) % 3 == 0, 1 + np.arange(16) % 7, batch["length"]).astype(np.int32)
        return Case(ready=one, batch=batch, remade=ready, padded=padded,
                    masked=lambda batch: batch | {"valid": np.zeros_like(batch["valid"])}, maskable=("loss",))  # fmt: skip

    def test_it_has_both_terms(self, case):
        assert set(checks.measure(case).terms) == {"loss", "alpha"}

    @pytest.mark.parametrize("micro", [4])  # 2 would be one program more
    def test_micro_batches_are_one_batch(self, case, micro):
        checks.micro_batches_are_one_batch(case, micro)
