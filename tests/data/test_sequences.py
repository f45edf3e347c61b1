"""What a split gives: raw values, padding, lengths, labels in one record; what is fitted is fitted on training alone."""

import dataclasses

import numpy as np
import pytest

from jaxdistill.data import array_batches
from jaxdistill.data.sequences import SequenceConfig, describe, features, load, resample

SMALL = dict(classes=6, subjects=5, takes=2, test=0.2, validation=0.25)


@pytest.fixture(scope="module")
def small():
    return load(SequenceConfig(**SMALL))


def whole(split) -> dict:
    return split.take(np.arange(len(split)))


@pytest.fixture
def ragged(tmp_path):
    """Ten subjects, two classes, sequences of 2 to 6 frames but one, of subject 9, of 9 frames; subject 9 is the test."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 9, 4, 3)).astype(np.float32)
    length = rng.integers(2, 7, 40)
    length[39], length[5] = 9, 6

    def write(name="a", **more):
        stored = {"x": x, "y": np.arange(40) % 2, "length": length, "subject": np.arange(40) // 4} | more
        np.savez(tmp_path / f"{name}.npz", **stored)
        return SequenceConfig(source="npz", path=str(tmp_path / f"{name}.npz"), test_groups=(9,))

    write.x, write.length = x, length
    return write


def test_the_embedded_default(small):
    assert {part: len(split) for part, split in small.splits.items()} == {"train": 36, "validation": 12, "test": 12}
    assert small.width == 75
    assert len(small.classes) == 6
    people = [set(split.subjects.tolist()) for split in small.splits.values()]
    assert sum(map(len, people)) == len(set.union(*people)) == 5
    batch = whole(small.splits["train"])
    assert {name: (array.dtype.name, array.shape[1:]) for name, array in batch.items()} == {
        "x": ("float32", (small.facts["frames"], 75)), "length": ("int32", ()), "label": ("int32", ()), "subject": ("int32", ()),
    }  # fmt: skip
    beyond = np.arange(batch["x"].shape[1])[None] >= batch["length"][:, None]
    assert beyond.any()
    assert (batch["x"][beyond] == 0).all()
    assert (np.abs(batch["x"][~beyond]).max(axis=1) > 0).all()
    assert batch["length"].min() >= 1
    assert batch["length"].max() == small.facts["frames"]


def test_take_is_a_copy_in_the_order_asked_for_and_may_repeat(small):
    split = small.splits["train"]
    all_of_it, some = whole(split), split.take(np.asarray([7, 2, 7], np.int64))
    for name, array in all_of_it.items():
        np.testing.assert_array_equal(some[name], array[[7, 2, 7]])
    some["x"][:] = 9
    some["label"][:] = 9
    for name, array in whole(split).items():
        np.testing.assert_array_equal(array, all_of_it[name])


def test_batches_of_sequences(small):
    batch = next(array_batches.batches(small.splits["train"], batch=4, seed=0, training=True))
    assert sorted(batch) == ["label", "length", "row", "subject", "valid", "x"]
    told = describe(batch, small.classes)
    assert told.startswith(f"4 sequences of {small.facts['frames']} x 75, 4 valid\nrow 0: label ")
    assert small.classes[batch["label"][0]] in told


def test_label_and_sequence_stay_together(ragged):
    """Each x is of the label and subject that the file gives it."""
    found = load(ragged(x=np.broadcast_to(np.arange(1, 41, dtype=np.float32)[:, None, None, None], (40, 9, 4, 3))))
    for split in found.splits.values():
        batch = whole(split)
        i = batch["x"][:, 0, 0].astype(int) - 1
        np.testing.assert_array_equal(batch["label"], i % 2)
        np.testing.assert_array_equal(batch["subject"], i // 4)
        assert split.names == tuple(f"sequence {each}" for each in i)


# Number of frames


def test_frames_are_those_of_the_longest_training_sequence(ragged):
    found = load(ragged())
    assert found.facts["frames"] == 6
    assert [each["resampled"] for each in found.facts["splits"].values()] == [0, 0, 1]
    batch = whole(found.splits["test"])
    assert batch["length"].tolist() == [*ragged.length[36:39].tolist(), 6]
    np.testing.assert_allclose(batch["x"][3], resample(ragged.x[39].reshape(9, 12), 6))
    np.testing.assert_array_equal(batch["x"][0, : ragged.length[36]], ragged.x[36, : ragged.length[36]].reshape(-1, 12))


def test_cut_and_stretch_and_a_given_length(ragged):
    config = ragged()
    cut = load(dataclasses.replace(config, fit="cut", length=4))
    assert cut.facts["splits"]["test"]["cut"] == (ragged.length[36:] > 4).sum()
    batch = whole(cut.splits["test"])
    np.testing.assert_array_equal(batch["x"][3], ragged.x[39, :4].reshape(4, 12))
    assert batch["length"].tolist() == np.minimum(ragged.length[36:], 4).tolist()
    stretched = whole(load(dataclasses.replace(config, fit="stretch")).splits["test"])
    assert stretched["length"].tolist() == [6] * 4
    np.testing.assert_allclose(stretched["x"][0], resample(ragged.x[36, : ragged.length[36]].reshape(-1, 12), 6), rtol=1e-6)
    longer = whole(load(dataclasses.replace(config, length=20)).splits["test"])
    assert longer["x"].shape[1] == 20
    assert longer["length"].tolist() == ragged.length[36:].tolist()


def test_resampling_keeps_the_ends_and_is_linear_between():
    x = np.asarray([[0.0], [1.0], [4.0]], np.float32)
    np.testing.assert_allclose(resample(x, 5)[:, 0], [0, 0.5, 1, 2.5, 4])
    np.testing.assert_array_equal(resample(x, 3), x)
    np.testing.assert_array_equal(resample(x[:1], 4), np.zeros((4, 1)))
    assert resample(np.zeros((7, 2, 3), np.float32), 4).shape == (4, 2, 3)


# What is fitted


@pytest.mark.parametrize("options", [dict(reduce="pca", components=3), dict(reduce="tucker", ranks=(0, 2, 2)),
                                     dict(reduce="tucker", ranks=(4, 2, 0), fit="stretch"), dict()])  # fmt: skip
def test_what_is_not_training_changes_no_fit(ragged, options):
    """Other values and lengths in validation and test: the training split is bit for bit the same."""
    one = load(dataclasses.replace(ragged(), **options))
    held = [int(name.split()[1]) for part in ("validation", "test") for name in one.splits[part].names]
    x, length = ragged.x.copy(), ragged.length.copy()
    x[held], length[held] = 100 * x[held] + 7, 9
    other = load(dataclasses.replace(ragged("b", x=x, length=length), **options))
    assert one.splits["train"].names == other.splits["train"].names
    for name, array in whole(one.splits["train"]).items():
        np.testing.assert_array_equal(array, whole(other.splits["train"])[name])
    assert one.facts["frames"] == other.facts["frames"]
    assert one.facts.get("reduced") == other.facts.get("reduced")
    assert one.facts["splits"]["train"] == other.facts["splits"]["train"]
    assert one.facts["splits"]["test"]["sha256"] != other.facts["splits"]["test"]["sha256"]


def test_reduced_examples(ragged):
    config = ragged()
    plain = load(config)
    frames = np.concatenate([x[:n] for x, n in zip(*(whole(plain.splits["train"])[key] for key in ("x", "length")), strict=True)])
    found = load(dataclasses.replace(config, reduce="pca", components=5))
    assert found.width == 5
    assert found.facts["reduced"]["by"] == "pca"
    batch, before = whole(found.splits["test"]), whole(plain.splits["test"])
    np.testing.assert_array_equal(batch["length"], before["length"])
    assert (batch["x"][np.arange(6)[None] >= batch["length"][:, None]] == 0).all()  # padding stays padding
    centred = frames - frames.mean(axis=0, keepdims=True)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:5].T
    n = batch["length"][0]
    wanted = (before["x"][0, :n] - frames.mean(axis=0, keepdims=True)) @ directions
    np.testing.assert_allclose(np.abs(batch["x"][0, :n]), np.abs(wanted), atol=1e-4)
    short = load(dataclasses.replace(config, reduce="tucker", ranks=(3, 2, 2), fit="stretch"))
    batch = whole(short.splits["validation"])
    assert batch["x"].shape[1:] == (3, 4)
    assert (batch["length"] == 3).all()
    assert len(short.facts["reduced"]["kept"]) == 3


# Features and facts


def test_features_are_moments_steps_and_parts(small):
    split = small.splits["test"]
    x, labels = features(split)
    assert x.dtype == np.float64
    assert x.shape == (12, 11 * 75)
    np.testing.assert_array_equal(labels, split.labels)
    one = split.read(4).astype(np.float64)
    wanted = [one.mean(0), one.std(0), np.abs(one[1:] - one[:-1]).mean(0), *(part.mean(0) for part in np.array_split(one, 8))]
    np.testing.assert_allclose(x[4], np.concatenate(wanted))


def test_features_of_short_sequences_and_of_tables(ragged, tmp_path):
    x, _ = features(load(ragged()).splits["train"])
    assert np.isfinite(x).all()
    assert x.shape[1] == 11 * 12
    values = np.random.default_rng(0).normal(size=(20, 3))
    np.savez(tmp_path / "table.npz", x=values, y=np.arange(20) % 2)
    split = load(SequenceConfig(source="npz", path=str(tmp_path / "table.npz"), time_axis=0)).splits["train"]
    x, _ = features(split)
    np.testing.assert_array_equal(x, values[[int(name.split()[1]) for name in split.names]].astype(np.float32))


def test_the_fingerprint_is_of_the_content(ragged):
    first = load(ragged()).facts["splits"]
    assert load(ragged("again")).facts["splits"] == first
    x = ragged.x.copy()
    x[0, 0, 0, 0] += 1
    changed = load(ragged("changed", x=x)).facts["splits"]
    part = next(part for part in first if "sequence 0" in load(ragged()).splits[part].names)
    assert [name for name in first if first[name] != changed[name]] == [part]


def test_the_first_classes_and_a_share_of_each(ragged):
    config = SequenceConfig(**(SMALL | {"classes": 4}))
    assert len(load(config).splits["test"]) == 8
    thin = load(dataclasses.replace(ragged(), per_class=8, validation=0.2))
    assert sum(len(thin.splits[part]) for part in ("train", "validation")) == 16
    assert len(thin.splits["test"]) == 4
