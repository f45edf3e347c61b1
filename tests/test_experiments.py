"""The configs of the studies, small: every run of them builds, and every key is one that a run reads."""

import numpy as np
import pytest

from experiments.dcal_ablation import ablation
from experiments.dcal_document_004 import document_004
from experiments.dcal_one_shot import one_shot
from jaxdistill.training import loop

SMALL = {
    "mesh": (1, 1, 1), "seeds": (0,), "train.batch": 32, "model.width": 8, "model.depth": 1, "model.heads": 2,
    "data.classes": 8, "data.size": (28, 28),
}
LETTERS = {"data.per_class": 4, "data.test_per_class": 2, "data.validation": 0.25, "model.patch": 14}


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    path = tmp_path_factory.mktemp("drawings") / "drawings.npz"
    label, drawer = np.divmod(np.arange(240), 20)
    image = np.random.default_rng(0).integers(0, 256, (240, 28, 28), np.uint8)
    np.savez(path, x=image, y=label, drawer=drawer + 1, alphabet=label // 2, class_names=np.asarray([f"letter {i}" for i in range(12)]))
    return {"data.path": str(path)}


@pytest.mark.parametrize(("config", "letters"), [
    (ablation.get_config("glyphs"), True), (ablation.get_config("omniglot"), False), (one_shot.get_config(), False),
    (document_004.get_config(), True),
], ids=["ablation", "ablation on omniglot", "one_shot", "document_004"])
def test_every_run_builds(config, letters, drawings, tmp_path):
    with config.unlocked():
        config.update_from_flattened_dict(SMALL | (LETTERS if letters else drawings))
    built = loop.check(config, tmp_path)
    assert {one.run.name for one in built} >= set(config.runs)
