"""Label distributions from files and cities: what is read, split, left out and told of. (What is refused: test_bad_distributions.)"""

import csv
import dataclasses
import logging

import numpy as np
import pytest

from jaxdistill.data import array_batches, cities, distribution_checks, distributions
from jaxdistill.data.distribution_files import FERPLUS
from jaxdistill.data.distributions import DistributionConfig, load

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 5)) * 10 + 3
TARGET = RNG.dirichlet(np.ones(4), 60)
GROUP = np.repeat(np.arange(12), 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import pyarrow
    import pyarrow.parquet
    import scipy.io

    root = tmp_path_factory.mktemp("sets")
    np.savez(root / "plain.npz", x=X, target=TARGET)
    np.savez(root / "grouped.npz", x=X, target=TARGET, group=GROUP, place=np.asarray([f"p{i % 3}" for i in GROUP]))
    np.savez(root / "given.npz", x=X, target=TARGET, split=np.asarray(["train"] * 40 + ["Test"] * 20))
    scipy.io.savemat(root / "set.mat", {"features": X, "labels": TARGET})
    columns = {f"f{i}": X[:, i] for i in range(5)} | {f"t{i}": TARGET[:, i] for i in range(4)}
    columns |= {"town": [f"town {i}" for i in GROUP], "note": ["some text"] * 60}
    pyarrow.parquet.write_table(pyarrow.table(columns), root / "table.parquet")
    return root


def rows_of(found) -> dict:
    return {name: len(split) for name, split in found.splits.items()}


def groups_of(found) -> dict:
    return {name: set(split.rows["group"].tolist()) for name, split in found.splits.items()}


def whole(found) -> dict:
    """All rows of all splits, in an order of their own."""
    parts = [split.take(np.arange(len(split))) for split in found.splits.values()]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort(joined["x"].T)
    return {name: values[order] for name, values in joined.items()}


SORTED = np.lexsort(X.astype(np.float32).T)


# -- sources ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    dict(source="table", path="plain.npz"), dict(source="mat", path="set.mat"),
    dict(source="table", path="table.parquet", target=("t0", "t1", "t2", "t3"), features=("f0", "f1", "f2", "f3", "f4"), group="town"),
], ids=lambda change: change["path"])  # fmt: skip
def test_rows_are_those_of_the_file(change, folder):
    found = load(DistributionConfig(**change | dict(path=str(folder / change["path"]))))
    rows = whole(found)
    np.testing.assert_array_equal(rows["x"], X[SORTED].astype(np.float32))
    np.testing.assert_allclose(rows["target"], TARGET[SORTED], rtol=1e-6)
    assert {name: values.dtype for name, values in rows.items()} == {"x": np.float32, "target": np.float32, "group": np.int32}
    assert (found.width, found.edge_width, found.neighbours, len(found.classes)) == (5, 0, 0, 4)
    if "target" in change:
        assert found.classes == change["target"]
        assert found.columns == change["features"]
        assert {name: len(groups) for name, groups in groups_of(found).items()} == {"train": 9, "validation": 1, "test": 2}
    else:
        assert rows_of(found) == {"train": 43, "validation": 5, "test": 12}
    x, target = distributions.features(found.splits["test"])
    assert (x.dtype, target.dtype) == (np.float64, np.float64)


def test_votes_are_cleaned_as_ferplus_says(tmp_path):
    """Two files, row for row; single votes dropped; rows for no class and without votes left out and counted."""
    header = ["Usage", "Image name", *FERPLUS, "unknown", "NF"]
    usage = ["Training"] * 6 + ["PublicTest"] * 2 + ["PrivateTest"] * 2
    votes = [[5, 5, 0, 0, 0, 0, 0, 0, 0, 0], [8, 1, 1, 0, 0, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0, 0, 0, 7, 1],
             [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0, 10], [0, 3, 6, 0, 0, 0, 0, 0, 1, 0],
             [0, 0, 0, 4, 6, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 10, 0, 0, 0, 0],
             [0, 0, 0, 0, 0, 0, 9, 1, 0, 0], [0, 4, 0, 0, 0, 0, 0, 4, 2, 0]]  # fmt: skip
    pixels = RNG.integers(0, 256, (10, 9))
    with open(tmp_path / "fer2013new.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *([use, f"fer{i}.png", *row] for i, (use, row) in enumerate(zip(usage, votes, strict=True)))])
    with open(tmp_path / "fer2013.csv", "w", newline="") as file:
        rows = zip(pixels.tolist(), usage, strict=True)
        csv.writer(file).writerows([["emotion", "pixels", "Usage"], *([3, " ".join(map(str, row)), use] for row, use in rows)])
    paths = dict(path=str(tmp_path / "fer2013new.csv"), inputs=str(tmp_path / "fer2013.csv"))
    config = DistributionConfig(source="votes", **paths, drop_single=True, reject=("unknown", "NF"))
    found = load(config)
    assert found.classes == FERPLUS
    assert rows_of(found) == {"train": 3, "validation": 2, "test": 2}
    assert (found.facts["without_votes"], found.facts["rejected"]) == (2, 1)  # rows 3 and 4 have no vote left, 2 most for unknown
    train = found.splits["train"].rows
    np.testing.assert_array_equal(train["x"], pixels[[0, 1, 5]])
    np.testing.assert_allclose(train["target"][:, :3], [[0.5, 0.5, 0], [1, 0, 0], [0, 1 / 3, 2 / 3]], rtol=1e-6)
    np.testing.assert_allclose(found.splits["test"].rows["target"][1, [1, 7]], [0.5, 0.5])
    kept = load(dataclasses.replace(config, drop_single=False, reject=()))
    assert rows_of(kept)["train"] == 5
    assert kept.facts["without_votes"] == 1
    np.testing.assert_allclose(kept.splits["train"].rows["target"][1, :3], [0.8, 0.1, 0.1], rtol=1e-6)


def test_votes_beside_their_features(tmp_path):
    counts = RNG.integers(0, 9, (60, 4))
    counts[7] = 0
    with open(tmp_path / "votes.csv", "w", newline="") as file:
        rows = ([*x, *count, f"s{group}"] for x, count, group in zip(X.tolist(), counts.tolist(), GROUP.tolist(), strict=True))
        csv.writer(file).writerows([[*"abcde", "yes", "no", "maybe", "never", "subject"], *rows])
    said = ("yes", "no", "maybe", "never")
    by_name = load(DistributionConfig(source="votes", path=str(tmp_path / "votes.csv"), target=said, group="subject"))
    np.savez(tmp_path / "votes.npz", x=X, votes=counts, group=GROUP)
    by_array = load(DistributionConfig(source="votes", path=str(tmp_path / "votes.npz")))
    assert by_name.facts["without_votes"] == by_array.facts["without_votes"] == 1
    a, b = whole(by_name), whole(by_array)
    np.testing.assert_array_equal(a["x"], b["x"])
    kept = [i for i in SORTED if i != 7]
    np.testing.assert_allclose(a["target"], counts[kept] / counts[kept].sum(1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(b["target"], a["target"])


def test_cities_are_graphs():
    found = load(DistributionConfig(cities=2, addresses=4, neighbours=5))
    assert (found.width, found.edge_width, found.neighbours, found.classes) == (33, 4, 5, cities.KINDS)
    split = found.splits["train"]
    batch = split.take(np.asarray([3, 3, 0]))
    assert {name: (values.shape, values.dtype) for name, values in batch.items()} == {
        "x": ((3, 33), np.float32), "target": ((3, 8), np.float32), "group": ((3,), np.int32), "neighbours": ((3, 5, 33), np.float32),
        "edges": ((3, 5, 4), np.float32), "mask": ((3, 5), bool),
    }  # fmt: skip
    np.testing.assert_array_equal(batch["neighbours"][0], batch["neighbours"][1])
    assert not batch["neighbours"][~batch["mask"]].any()
    batch["x"][:] = 99  # a copy
    assert split.take(np.asarray([3]))["x"].max() != 99
    np.testing.assert_allclose(batch["target"].sum(1), 1, rtol=1e-6)
    groups = groups_of(found)
    assert sum(map(len, groups.values())) == len(set().union(*groups.values())) > 16
    nodes = [set(split.rows["index"][split.rows["mask"]].tolist()) for split in found.splits.values()]
    assert sum(map(len, nodes)) == len(set().union(*nodes))  # nothing that is seen is seen in two splits
    rows, target = distributions.features(split)
    assert rows.shape == (len(split), 78)
    np.testing.assert_array_equal(target, split.rows["target"].astype(np.float64))


# -- splits -------------------------------------------------------------------------------------------------------------------


def test_groups_stay_whole(folder):
    path = str(folder / "grouped.npz")
    found = load(DistributionConfig(source="table", path=path, test=0.25, validation=0.2))
    groups = groups_of(found)
    assert {name: len(group) for name, group in groups.items()} == {"train": 7, "validation": 2, "test": 3}
    assert rows_of(found) == {"train": 35, "validation": 10, "test": 15}
    assert groups["train"].isdisjoint(groups["test"] | groups["validation"])
    assert groups["validation"].isdisjoint(groups["test"])
    coarse = load(DistributionConfig(source="table", path=path, group="place", test=0.34, validation=0.5))
    assert {name: len(group) for name, group in groups_of(coarse).items()} == {"train": 1, "validation": 1, "test": 1}
    again = load(DistributionConfig(source="table", path=path, test=0.25, validation=0.2, seed=1))
    assert groups_of(again) != groups
    assert groups_of(load(DistributionConfig(source="table", path=path, test=0.25, validation=0.0)))["test"] == groups["test"]


def test_folds_are_each_row_once(folder):
    path = str(folder / "set.mat")
    every = [load(DistributionConfig(source="mat", path=path, folds=7, fold=i)) for i in range(7)]
    tests = [found.splits["test"].rows["group"].tolist() for found in every]
    assert sorted(sum(tests, [])) == list(range(60))
    assert {len(test) for test in tests} == {8, 9}
    for found in every:
        assert sum(rows_of(found).values()) == 60
        assert set().union(*groups_of(found).values()) == set(range(60))
    by_seed = load(DistributionConfig(source="mat", path=path, folds=7, fold=-1), 9)
    assert by_seed.splits["test"].rows["group"].tolist() == tests[2]
    assert by_seed.facts == every[2].facts
    assert every[1].facts != every[2].facts


def test_folds_of_groups(folder):
    found = [load(DistributionConfig(source="table", path=str(folder / "grouped.npz"), folds=3, fold=i)) for i in range(3)]
    tests = [groups_of(each)["test"] for each in found]
    assert [len(test) for test in tests] == [4, 4, 4]
    assert set().union(*tests) == set(range(12))


def test_validation_folds_are_each_training_row_once(folder):
    """A fifth of the rows that are not the test, another for each validation_fold; the test stays what it is."""
    path = str(folder / "set.mat")
    every = [load(DistributionConfig(source="mat", path=path, folds=6, fold=1, validation=0.2, validation_fold=i)) for i in range(5)]
    held = [found.splits["validation"].rows["group"].tolist() for found in every]
    test = groups_of(every[0])["test"]
    assert [len(rows) for rows in held] == [10] * 5
    assert sorted(sum(held, [])) == sorted(set(range(60)) - test)
    assert all(groups_of(found)["test"] == test and sum(rows_of(found).values()) == 60 for found in every)


def test_a_file_that_splits_itself(folder):
    found = load(DistributionConfig(source="table", path=str(folder / "given.npz"), validation=0.25))
    assert rows_of(found) == {"train": 30, "validation": 10, "test": 20}
    assert found.splits["test"].rows["group"].tolist() == list(range(40, 60))


# -- what is left out, what is told of ----------------------------------------------------------------------------------------


def test_constant_columns_are_named_and_dropped(tmp_path, caplog):
    """As the training split sees them."""
    x = np.concatenate([X, np.full((60, 2), 7.0)], axis=1)
    x[-1, 5] = 8  # of a test row: it does not vary in training
    np.savez(tmp_path / "a.npz", x=x, target=TARGET, split=np.asarray(["train"] * 40 + ["test"] * 20))
    with caplog.at_level(logging.WARNING):
        found = load(DistributionConfig(source="table", path=str(tmp_path / "a.npz")))
    assert found.facts["constant"] == ["column 5", "column 6"]
    assert "2 of 7 columns are constant in the training split and left out: column 5, column 6" in caplog.text
    assert (found.width, found.columns) == (5, tuple(f"column {i}" for i in range(5)))
    assert found.splits["test"].take(np.arange(20))["x"].shape == (20, 5)


def test_what_is_far_out_is_told_of(tmp_path, caplog):
    x = X.copy()
    x[55, 2] = 25_000
    np.savez(tmp_path / "a.npz", x=x, target=TARGET, split=np.asarray(["train"] * 40 + ["test"] * 20))
    with caplog.at_level(logging.WARNING):
        found = load(DistributionConfig(source="table", path=str(tmp_path / "a.npz")))
    assert found.facts["far"] == {"train": 0, "validation": 0, "test": 1}
    assert "1 test numbers lie more than 20 standard deviations from the training mean, the farthest in 'column 2' of row 55" in caplog.text
    assert found.splits["test"].rows["x"][15, 2] == 25_000  # told of, and left


def test_copies_of_training_rows_are_told_of(tmp_path, caplog):
    x = X.copy()
    x[45] = x[3]
    np.savez(tmp_path / "a.npz", x=x, target=TARGET, split=np.asarray(["train"] * 40 + ["test"] * 20))
    with caplog.at_level(logging.WARNING):
        found = load(DistributionConfig(source="table", path=str(tmp_path / "a.npz"), validation=0.0))
    assert found.facts["copies"] == {"test": 1}
    assert "rows with the very inputs of a training row: test 1" in caplog.text


def test_sums_that_are_nearly_one_become_one(tmp_path):
    np.savez(tmp_path / "a.npz", x=X, target=TARGET * 1.0005)
    found = load(DistributionConfig(source="table", path=str(tmp_path / "a.npz")))
    np.testing.assert_allclose(whole(found)["target"], TARGET[SORTED], rtol=1e-6)


def test_facts_tell_sets_apart(folder, tmp_path):
    """The content of the file, and the split, whatever its name."""
    config = DistributionConfig(source="table", path=str(folder / "plain.npz"))
    np.savez(tmp_path / "same.npz", x=X, target=TARGET)
    np.savez(tmp_path / "other.npz", x=X + np.eye(60, 5) * 1e-3, target=TARGET)
    same, other = (load(dataclasses.replace(config, path=str(tmp_path / f"{name}.npz"))).facts for name in ("same", "other"))
    assert same == load(config).facts
    assert other != same
    assert load(dataclasses.replace(config, seed=1)).facts != same
    drawn = DistributionConfig(cities=1, addresses=2, neighbours=2)
    assert load(drawn).facts != load(dataclasses.replace(drawn, jitter=0.0)).facts


# -- what recipes are given ---------------------------------------------------------------------------------------------------


def test_moments_are_of_what_there_is():
    found = load(DistributionConfig(cities=2, addresses=4, neighbours=40))
    split = found.splits["train"]
    batch, got = split.take(np.arange(len(split))), distributions.moments(split)
    assert not batch["mask"].all()
    for name, values in (("x", batch["x"]), ("neighbours", batch["neighbours"][batch["mask"]]), ("edges", batch["edges"][batch["mask"]])):
        values = values.astype(np.float64)
        np.testing.assert_allclose(got[name]["mean"], values.mean(0), rtol=1e-4, atol=1e-6)
        std = values.std(0)
        np.testing.assert_allclose(got[name]["std"], np.where(std > 1e-5, std, 1), rtol=1e-4)
    assert got["x"]["std"][8] == 1  # all targets are addresses
    mean, std = distribution_checks.moments(np.full((5, 1), 0.1, np.float32))
    assert (mean[0], std[0]) == (np.float32(0.1), 1)


def test_joined_is_one_after_the_other():
    found = load(DistributionConfig(cities=2, addresses=4, neighbours=5))
    a, b = found.splits["validation"], found.splits["test"]
    both = distributions.joined(a, b)
    assert len(both) == len(a) + len(b)
    order = np.asarray([len(a), 0, len(both) - 1])
    batch = both.take(order)
    assert batch["first"].tolist() == [False, True, False]
    np.testing.assert_array_equal(batch["neighbours"][0], b.take(np.asarray([0]))["neighbours"][0])
    np.testing.assert_array_equal(batch["x"][2], b.rows["x"][-1])
    np.testing.assert_array_equal(batch["x"][1], a.rows["x"][0])


def test_batches_of_it():
    found = load(DistributionConfig(cities=1, addresses=4, neighbours=5))
    batches = array_batches.batches(found.splits["test"], batch=8, seed=0, training=False)
    seen = [dict(batch) for batch in batches]
    assert sum(int(batch["valid"].sum()) for batch in seen) == len(found.splits["test"])
    text = distributions.describe(seen[0], found.classes)
    assert "8 rows of 33 inputs" in text
    assert "graphs of up to 5 neighbours" in text
    likeliest = found.classes[int(seen[0]["target"][0].argmax())]
    assert f"neighbours: {likeliest} {seen[0]['target'][0].max():.3f}" in text
