"""The recipe floors: a row of the table without an update."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxdistill import UserError
from jaxdistill.data import distributions, images, sequences
from jaxdistill.evaluators import floors
from jaxdistill.training import preflight
from jaxdistill.training.defaults import defaults
from jaxdistill.training.loop import run

KINDS = ("constant", "nearest", "logistic")


def job() -> ConfigDict:
    config = defaults()
    config.mesh, config.headline = (1, 1, 1), "logistic"
    config.monitor, config.minimize = "validation/accuracy", False
    config.data = ConfigDict(dict(source="glyphs", classes=12, per_class=24, test_per_class=7, test_families=("stix",), size=(16, 16)))
    config.floor = ConfigDict(dict(metric="euclidean"))
    config.train.update(dict(steps=0, batch=32))
    config.runs = KINDS
    config.run = ConfigDict({kind: dict(recipe="floors", once=True, floor=dict(kind=kind)) for kind in KINDS})
    return config


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run(job(), tmp_path_factory.mktemp("floors"))


def test_rows_are_the_floors_of_the_images(results):
    """The loop's batches, masks and shardings change nothing: against the arrays themselves."""
    splits = images.load(images.ImageConfig(**job().data.to_dict())).splits
    arrays = {}
    for name, split in splits.items():
        arrays[name] = np.stack([split.read(i) for i in range(len(split))]).reshape(len(split), -1).astype(np.float32) / 255, split.labels
    rows = {row["name"]: row for row in results["rows"]}
    assert rows.keys() == set(KINDS)
    for kind, row in rows.items():
        predict = floors.FITS[kind](*arrays["train"], **({"metric": "euclidean"} if kind == "nearest" else {}))
        assert row["accuracy"] == floors.accuracy(predict(arrays["test"][0]), arrays["test"][1])
        assert row["validation"]["validation/accuracy"] == floors.accuracy(predict(arrays["validation"][0]), arrays["validation"][1])
        assert (row["steps"], row["parameters"]) == (0, 0)
    assert len(arrays["test"][0]) % 32 > 0  # the last batch was padded
    assert rows["constant"]["accuracy"] == pytest.approx(1 / 12)
    assert min(rows["nearest"]["accuracy"], rows["logistic"]["accuracy"]) > 0.15


def test_same_on_several_devices(results, tmp_path):
    config = job()
    config.mesh, config.runs = (2, 2, 1), ("nearest", "logistic")
    config.run = ConfigDict({kind: config.run[kind] for kind in config.runs})
    assert jax.device_count() >= 4
    found = {row["name"]: row["accuracy"] for row in run(config, tmp_path)["rows"]}
    assert found == {row["name"]: row["accuracy"] for row in results["rows"] if row["name"] in found}


def test_one_fit_serves_all_splits(monkeypatch, tmp_path):
    fits = []
    monkeypatch.setitem(floors.FITS, "constant", lambda x, y: fits.append(len(x)) or floors.constant(x, y))
    config = job()
    config.runs, config.headline, config.floor = ("constant",), "constant", ConfigDict()
    config.run = ConfigDict(dict(constant=dict(recipe="floors", floor=dict(kind="constant"))))
    run(config, tmp_path)
    assert fits == [12 * 22]  # the whole training split, without validation


def test_dry_run(capsys):
    preflight.dry_run(job())
    assert "not trained: only measured" in capsys.readouterr().out


def table(data: str, section: dict, kinds: tuple[str, ...]) -> ConfigDict:
    config = defaults()
    config.mesh, config.headline = (1, 1, 1), kinds[-1]
    config.monitor, config.minimize = ("validation/kl", True) if data == "distributions" else ("validation/accuracy", False)
    config.data, config.floor = ConfigDict(section), ConfigDict(dict(data=data, metric="euclidean"))
    config.train.update(dict(steps=0, batch=32))
    config.runs = kinds
    config.run = ConfigDict({kind: dict(recipe="floors", once=True, floor=dict(kind=kind)) for kind in kinds})
    return config


def test_floors_of_sequences(tmp_path):
    section = dict(source="actions", classes=5, subjects=6, takes=2)
    rows = {row["name"]: row for row in run(table("sequences", section, KINDS), tmp_path)["rows"]}
    splits = sequences.load(sequences.SequenceConfig(**section)).splits
    (x, y), (test, labels) = (sequences.features(splits[name]) for name in ("train", "test"))
    x, test = (x - x.mean(0)) / x.std(0), (test - x.mean(0)) / x.std(0)
    for kind, row in rows.items():
        found = floors.FITS[kind](x, y, **({"metric": "euclidean"} if kind == "nearest" else {}))(test)
        assert row["accuracy"] == np.mean(found == labels)
        recall = [np.mean(found[labels == k] == k) for k in range(5)]
        assert row["balanced_accuracy"] == row["macro_recall"] == pytest.approx(np.mean(recall))
        assert {"macro_precision", "macro_f1"} <= row.keys()
    assert len(labels) % 32 > 0
    assert rows["constant"]["accuracy"] == pytest.approx(0.2)
    assert rows["constant"]["macro_f1"] == pytest.approx(np.mean([2 * 0.2 / 1.2, 0, 0, 0, 0]))
    assert rows["logistic"]["accuracy"] > 0.3


def test_floors_of_distributions(tmp_path):
    section = dict(source="cities", cities=6, addresses=12, neighbours=8, test=0.3, validation=0.2)
    kinds = ("constant", "nearest", "softmax")
    rows = {row["name"]: row for row in run(table("distributions", section, kinds), tmp_path)["rows"]}
    splits = distributions.load(distributions.DistributionConfig(**section)).splits
    (x, t), (test, truth) = (distributions.features(splits[name]) for name in ("train", "test"))
    deviation = x.std(0)
    x, test = ((rows - x.mean(0)) / np.where(deviation > 0, deviation, np.inf) for rows in (x, test))
    for kind, row in rows.items():
        p = floors.SOFT_FITS[kind](x, t, **({"metric": "euclidean"} if kind == "nearest" else {}))(test)
        kl = np.sum(truth * (np.log(np.maximum(truth, 1e-300)) - np.log(np.where(p == 0, 1e-12, p))), axis=1)
        assert row["kl"] == pytest.approx(np.mean(kl), rel=1e-6)
        assert row["brier"] == pytest.approx(np.mean(np.sum((p - truth) ** 2, axis=1)), rel=1e-6)
        assert row["kl_gain"] == pytest.approx(rows["constant"]["kl"] - row["kl"], abs=1e-9)
        assert {"chebyshev", "clark", "canberra", "cosine", "intersection", "ece15", "top3", "entropy", "spread"} <= row.keys()
    assert len(truth) % 32 > 0
    constant = rows["constant"]
    assert (constant["spread"], constant["classes_predicted"], constant["kl_gain_low"]) == (pytest.approx(0, abs=1e-12), 1, 0)
    assert rows["softmax"]["kl_gain_low"] > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(train=dict(steps=3)), r"train.steps: found 3; accepted: 0"),
        (dict(floor=dict(kind="forest")), r"floor.kind: found 'forest'; accepted: constant \| nearest \| logistic"),
        (dict(floor=dict(metric="manhattan")), r"floor.metric: found 'manhattan'"),
        (dict(floor=dict(data="sounds")), r"floor.data: found 'sounds'; accepted: images \| sequences \| distributions"),
        (dict(floor=dict(data="distributions")), r"floor.kind: found 'logistic'; accepted: constant \| nearest \| softmax"),
        (dict(floor=dict(strength=-1.0)), r"floor.strength: found -1.0"),
        (dict(floor=dict(kind="nearest", strength=0.1)), r"floor.strength: found 0.1; accepted: 0.0 with floor.kind 'nearest'"),
        (dict(floor=dict(metric="euclidean")), r"floor.metric: found 'euclidean'; accepted: 'cosine' with floor.kind 'logistic'"),
        (dict(data=dict(task="reid")), r"data.task: found 'reid'"),
    ],
)
def test_user_errors(change, said, tmp_path):
    config = job()
    config.runs, config.floor.kind = ("logistic",), "logistic"
    config.run = ConfigDict(dict(logistic=dict(recipe="floors")))
    for section, keys in change.items():
        config[section].update(keys)
    with pytest.raises(UserError, match=said):
        run(config, tmp_path)
