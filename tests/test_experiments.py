"""The configs of the studies, small: every run of them builds, and every key is one that a run reads."""

import numpy as np
import pytest

from experiments.dcal_ablation import ablation
from experiments.dcal_document_004 import document_004
from experiments.dcal_one_shot import one_shot
from experiments.ldl import ldl, paired
from experiments.reservoir_document_000 import small
from experiments.soft_label_document_002 import remedies
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
        if config.data.task == "reid":
            config.loss.identities = 4  # of the 8 characters
    built = loop.check(config, tmp_path)
    assert {one.run.name for one in built} >= set(config.runs)


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    """An .npz of 10 classes x 20 pictures by 20 drawers, which are sequences of columns, and clips of 3 classes."""
    path, rng = tmp_path_factory.mktemp("sequences"), np.random.default_rng(0)
    label, drawer = np.divmod(np.arange(200), 20)
    np.savez(path / "drawings.npz", x=rng.integers(0, 256, (200, 28, 28), np.uint8), y=label, drawer=drawer + 1)
    for part, count in (("train", 36), ("test", 6)):
        clip = np.arange(count) + 100 * (part == "test")
        np.savez(path / f"{part}.npz", x=rng.normal(size=(count, 4, 6)), y=np.arange(count) % 3, clip=clip)
    return path


TINY = {"mesh": (1, 1, 1), "reservoir.units": 8, "reservoir.density": 0.5,
        "readout.filters": 2, "readout.hidden": 4, "readout.width": 4, "readout.pooling": 2}


@pytest.mark.parametrize(("variant", "changes"), [
    ("choose", {"data.path": ""}), ("esc50", {"data.path": ""}),
    ("omniglot", {"data.path": "drawings.npz", "data.classes": 10}),
    ("choose_omniglot", {"data.path": "drawings.npz", "data.classes": 10}), ("cnn", {"data.path": "drawings.npz", "data.classes": 10}),
])
def test_every_run_of_small_builds(variant, changes, sequences, tmp_path):
    config = small.get_config(variant)
    with config.unlocked():
        config.update_from_flattened_dict((TINY if variant != "cnn" else {"mesh": (1, 1, 1)}) | changes | {
            "data.path": str(sequences / changes["data.path"]), "seeds": (0,)})  # fmt: skip
    assert {one.run.name for one in loop.check(config, tmp_path)} >= set(config.runs)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("table") / "rows.npz"
    target = rng.dirichlet(np.full(8, 3.0), 400)
    np.savez(path, x=rng.normal(size=(400, 5)), target=target, group=np.arange(400) // 10)
    return str(path)


@pytest.mark.parametrize(("config", "source"), [
    (remedies.get_config(), "table"), (ldl.get_config("choose_1"), "table"), (ldl.get_config("final"), "table"),
    (remedies.get_config("graph"), "cities"),
], ids=["remedies", "ldl choose", "ldl final", "remedies of the graph"])
def test_every_run_of_soft_labels_builds(config, source, table, tmp_path):
    changes = {"data.source": "table", "data.path": table} if source == "table" else {"data.cities": 8, "data.addresses": 8}
    with config.unlocked():
        config.update_from_flattened_dict({"mesh": (1, 1, 1), "seeds": (0,)} | changes)
    assert {one.run.name for one in loop.check(config, tmp_path)} >= set(config.runs)


def test_the_setting_is_chosen_without_the_test():
    """Of each fold and family, by the mean of the validation KL over the inner folds, whatever the test says."""
    row = lambda name, fold, test, kl: {"name": name, "seed": fold, "kl": test, "validation": {"validation/kl": kl}}  # noqa: E731
    inner = [{0: {name: row(name, 0, 0.0, kl) for name, kl in job.items()}} for job in (
        {"softmax_1": 0.1, "mlp_a": 0.3, "mlp_b": 0.2}, {"softmax_1": 0.1, "mlp_a": 0.3, "mlp_b": 0.6})]  # fmt: skip
    final = {0: {name: row(name, 0, kl, 0.0) for name, kl in {"softmax_1": 0.5, "mlp_a": 0.9, "mlp_b": 0.1}.items()}}
    taken = lambda *choose: [found["name"] for found in paired.nested(final, list(choose), "mlp")]  # noqa: E731
    assert (taken(inner[0]), taken(*inner)) == (["mlp_b"], ["mlp_a"])
    low, high = paired.interval(np.asarray([1.0, 2.0, 3.0]))  # 2 -+ t(0.975, 2) sqrt((1/3 + 1/2) 1)
    assert (low, high) == pytest.approx((2 - 4.302653 * 0.912871, 2 + 4.302653 * 0.912871), abs=1e-5)
