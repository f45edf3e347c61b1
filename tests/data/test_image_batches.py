"""Batches whose content depends on the seed alone: whatever the processes, workers, threads and interruptions."""

import dataclasses
import logging

import numpy as np
import pytest
from PIL import Image

from jaxdistill import UserError
from jaxdistill.data.image_batches import batches
from jaxdistill.data.images import ImageConfig, load

AUGMENTED = {"rotate": 10.0, "shift": 0.1, "flip": True, "erasing": 0.3}


@pytest.fixture(autouse=True)
def fresh():
    load.cache_clear()
    yield
    load.cache_clear()


def make(tmp_path, count=40, labels=4, **options):
    """(training split of `count` images, its config); without augmentation image i is of grey i, of class i % labels."""
    image = np.repeat(np.arange(2 * count) % count, 64).astype(np.uint8).reshape(2 * count, 8, 8)
    split = np.repeat(["train", "test"], count)
    np.savez(tmp_path / "a.npz", x=image, y=np.arange(2 * count) % count % labels, split=split)
    config = ImageConfig(**{"source": "npz", "path": str(tmp_path / "a.npz"), "size": (8, 8), "validation": 0.0} | options)
    return load(config).splits["train"], config


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def greys(batch):
    return batch["image"][:, 0, 0, 0].tolist()


def assert_equal(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_evaluation_goes_through_once_in_order_and_fills_the_last_batch(tmp_path):
    split, config = make(tmp_path, 10, **AUGMENTED)  # which evaluation does not apply
    found = list(batches(split, config, batch=4, seed=0, training=False))
    assert sum((np.array(greys(batch))[batch["valid"]].tolist() for batch in found), []) == list(range(10))
    assert [batch["valid"].tolist() for batch in found] == [[True] * 4, [True] * 4, [True, True, False, False]]
    assert not any(found[-1][name][2:].any() for name in ("image", "label", "camera", "gallery"))
    assert all((batch["row"] == np.arange(4)).all() and (batch["partner"] == batch["row"]).all() for batch in found)
    assert {name: (array.shape, array.dtype) for name, array in found[-1].items()} == {
        "image": ((4, 8, 8, 1), np.uint8), "label": ((4,), np.int32), "camera": ((4,), np.int32), "gallery": ((4,), np.bool_),
        "valid": ((4,), np.bool_), "row": ((4,), np.int32), "partner": ((4,), np.int32),
    }  # fmt: skip


def test_training_shuffles_every_epoch_anew_and_drops_nothing(tmp_path):
    split, config = make(tmp_path, 10)
    found = take(batches(split, config, batch=4, seed=3, training=True), 15)
    assert all((batch["label"] == np.array(greys(batch)) % 4).all() and batch["valid"].all() for batch in found)
    images = sum(map(greys, found), [])
    epochs = [images[start : start + 10] for start in range(0, 60, 10)]  # batches span them
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6
    other = sum(map(greys, take(batches(split, config, batch=4, seed=4, training=True), 15)), [])
    assert images != other


def test_an_image_is_augmented_anew_in_each_epoch_and_alike_whatever_the_batch(tmp_path):
    split, config = make(tmp_path, 12, resize=(16, 16), jitter=0.5, erasing=1.0)

    def seen(batch, seed=0, epochs=2):
        found = take(batches(split, config, batch=batch, seed=seed, training=True), 12 * epochs // batch)
        return [image.tobytes() for each in found for image in each["image"]]

    small, large = seen(3), seen(6)
    assert small == large
    assert len(set(small)) == 24
    assert set(seen(3, seed=1)).isdisjoint(small)


@pytest.mark.parametrize("options", [{"pairs": True, "micro": 2}, {"identities": 4}, {}])
def test_processes_hold_the_slices_of_one_global_batch(tmp_path, options):
    split, config = make(tmp_path, 20, labels=5, **AUGMENTED)
    options = {"batch": 8, "seed": 1, "training": True} | options
    whole = batches(split, config, **options)
    parts = [batches(split, config, **options, process_index=p, process_count=4) for p in range(4)]
    for _ in range(6):
        each = [next(part) for part in parts]
        joined = {name: np.concatenate([part[name] for part in each]) for name in each[0]}
        assert_equal([next(whole)], [joined])


def test_processes_share_an_evaluation_and_end_together(tmp_path):
    split, config = make(tmp_path, 10)
    parts = [list(batches(split, config, batch=8, seed=0, training=False, process_index=p, process_count=4)) for p in range(4)]
    assert [len(part) for part in parts] == [2] * 4
    joined = [{name: np.concatenate([part[k][name] for part in parts]) for name in parts[0][k]} for k in range(2)]
    assert_equal(list(batches(split, config, batch=8, seed=0, training=False)), joined)


@pytest.mark.parametrize("options", [{"pairs": True}, {"identities": 2, "pairs": True}])
def test_state_is_the_number_of_batches_and_restores_exactly(tmp_path, options):
    split, config = make(tmp_path, **AUGMENTED)
    options = {"batch": 8, "seed": 0, "training": True} | options
    iterator = batches(split, config, **options)
    take(iterator, 7)
    state = iterator.get_state()
    assert list(state.values()) == [7]  # whatever the threads have read ahead
    wanted = take(iterator, 6)
    again = batches(split, config, **options)
    again.set_state(state)
    assert_equal(take(again, 6), wanted)
    take(iterator, 3)
    iterator.set_state(state)  # also one that is under way
    assert_equal(take(iterator, 6), wanted)


def test_workers_change_nothing_and_resume(tmp_path):
    split, config = make(tmp_path, **AUGMENTED)
    options = {"batch": 8, "seed": 0, "training": True, "pairs": True}
    wanted = take(batches(split, config, **options), 8)
    config = dataclasses.replace(config, workers=2)
    iterator = batches(split, config, **options)
    assert_equal(take(iterator, 4), wanted[:4])
    state = iterator.get_state()
    iterator.close()
    again = batches(split, config, **options)
    again.set_state(state)
    assert_equal(take(again, 4), wanted[4:])
    again.close()


# Partners


@pytest.mark.parametrize(("batch", "micro"), [(2, 1), (8, 1), (8, 4), (12, 3), (6, 2)])
def test_a_partner_is_another_row_of_the_same_part(tmp_path, batch, micro):
    split, config = make(tmp_path)
    shifts = set()
    for found in take(batches(split, config, batch=batch, seed=0, training=True, pairs=True, micro=micro), 60):
        row, partner = found["row"], found["partner"]
        assert (row == np.arange(batch)).all()
        assert (partner != row).all()
        assert (partner % micro == row % micro).all()
        assert sorted(partner.tolist()) == row.tolist()  # each row is a partner once
        shift = set(((partner - row) % batch).tolist())
        assert len(shift) == 1
        shifts |= shift
    assert shifts == set(range(micro, batch, micro))


def test_without_pairs_and_in_evaluation_each_row_is_its_own_partner(tmp_path):
    split, config = make(tmp_path)
    for options in ({"training": True}, {"training": False, "pairs": True}):
        found = next(batches(split, config, batch=8, seed=0, **options))
        np.testing.assert_array_equal(found["partner"], found["row"])


# Identities by K


def test_each_batch_holds_p_identities_k_times_with_different_images(tmp_path):
    split, config = make(tmp_path, 60, labels=10)  # 6 images of each of 10
    found = take(batches(split, config, batch=8, seed=0, training=True, identities=2), 10)
    for batch in found:
        labels, counts = np.unique(batch["label"], return_counts=True)
        assert counts.tolist() == [4, 4]
        assert len(set(greys(batch))) == 8
        assert (np.array(greys(batch)) % 10 == batch["label"]).all()
    served = [[int(label) for batch in found[start : start + 5] for label in np.unique(batch["label"])] for start in (0, 5)]
    assert [sorted(epoch) for epoch in served] == [list(range(10))] * 2  # once an epoch
    assert served[0] != served[1]


def test_identities_that_do_not_fill_the_last_batch_come_again_within_the_epoch(tmp_path):
    split, config = make(tmp_path, 42, labels=7)
    found = take(batches(split, config, batch=12, seed=0, training=True, identities=3), 30)  # 10 epochs of 3 batches
    assert all(len(np.unique(batch["label"])) == 3 for batch in found)
    for start in range(0, 30, 3):
        served = [int(label) for batch in found[start : start + 3] for label in np.unique(batch["label"])]
        assert set(served) == set(range(7))
        images = sum(map(greys, found[start : start + 3]), [])
        again = [label for label in set(served) if served.count(label) == 2]
        assert len(again) == 2
        for label in again:  # goes on where it was: all 6 images, then 2 of them once more
            mine = [image for image in images if image % 7 == label]
            assert (len(mine), len(set(mine))) == (8, 6)


def test_an_identity_with_few_images_repeats_them_augmented_anew(tmp_path):
    split, config = make(tmp_path, 6, labels=3, resize=(12, 12), erasing=1.0)
    batch = next(batches(split, config, batch=15, seed=0, training=True, identities=3))
    assert len({image.tobytes() for image in batch["image"]}) == 15
    plain = next(batches(split, dataclasses.replace(config, erasing=0.0), batch=15, seed=0, training=True, identities=3))
    for label in range(3):
        mine = [image for image in greys(plain) if image % 3 == label]
        assert sorted(mine.count(image) for image in set(mine)) == [2, 3]
        assert len(set(mine[:2])) == len(set(mine[2:4])) == 2  # different ones first


# What does not fit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "train.batch: found 0; accepted: a positive multiple of the 1 processes"),
        ({"batch": 6, "process_count": 4}, "train.batch: found 6; accepted: a positive multiple of the 4 processes"),
        ({"batch": 1, "pairs": True}, "train.batch: found 1 in train.micro 1 parts"),
        ({"batch": 4, "micro": 4, "pairs": True}, "train.batch: found 4 in train.micro 4 parts, and partners are asked for"),
        ({"batch": 10, "micro": 4, "pairs": True}, "train.batch: found 10 in train.micro 4 parts"),
        ({"batch": 8, "identities": 3}, "train.batch: found 8 for 3 identities; accepted: a multiple"),
        ({"batch": 4, "identities": 4}, "train.batch: found 4 for 4 identities; .*at least twice"),
        ({"batch": 16, "identities": 8}, "config key loss.identities: found 8; accepted: at most the 4 that train"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(tmp_path, options, message):
    split, config = make(tmp_path)
    with pytest.raises(UserError, match=message):
        batches(split, config, seed=0, training=True, **options)


# Unreadable images


def write_folder(root, count, bad):
    """`count` tiny JPEGs in four classes; those in `bad` are truncated, empty or no image at all."""
    for i in range(count):
        path = root / f"train/{i % 4}/{i:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i % 256).save(path)
        if i in bad:
            path.write_bytes([path.read_bytes()[:200], b"", b"no image"][bad.index(i) % 3])
    for i in range(4):
        path = root / f"test/{i}/{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 50 * i).save(path)
    return root


BAD = list(range(7, 1000, 50))  # 20


def folder(root, **options):
    return ImageConfig(**{"source": "folder", "path": str(root), "size": (8, 8), "validation": 0.0} | options)


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("thousand"), 1000, BAD)


@pytest.mark.parametrize("options", [{}, {"identities": 4}])
def test_a_thousand_images_with_twenty_unreadable_ones_train(thousand, caplog, options):
    config = folder(thousand, corrupt=20)
    split = load(config).splits["train"]
    iterator = batches(split, config, batch=40, seed=0, training=True, **options)
    with caplog.at_level(logging.WARNING):
        found = take(iterator, 25 if not options else 200)
    assert all(batch["valid"].all() and batch["image"].shape == (40, 8, 8, 1) for batch in found)
    assert len(split.damaged) == 20
    names = {f"train/{i % 4}/{i:04}.jpg" for i in BAD}
    assert set(split.damaged) == names
    messages = [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()]
    assert len(messages) == 20  # each once, with its name
    assert {message.split()[1] for message in messages} == names
    if options:  # what stands in is of the same identity
        assert all(np.bincount(batch["label"]).tolist() == [10] * 4 for batch in found)
    again = take(batches(split, config, batch=40, seed=0, training=True, **options), 5)
    assert_equal(again, found[:5])


def test_one_more_than_the_limit_is_an_error_at_the_same_batch(thousand, caplog):
    config = folder(thousand, corrupt=19)
    split, taken = load(config).splits["train"], []

    def drain():
        for _, _ in zip(range(30), batches(split, config, batch=40, seed=0, training=True), strict=False):
            taken[-1] += 1

    for _ in range(2):
        split.damaged.clear()
        taken.append(0)
        with pytest.raises(UserError, match=r"data.corrupt: found 19, and 20 image\(s\) that .*, the last train/\d/\d{4}.jpg \("):
            drain()
    assert taken[0] == taken[1] < 25


def test_the_default_is_that_none_may_be_unreadable(tmp_path):
    config = folder(write_folder(tmp_path, 40, [13]))
    iterator = batches(load(config).splits["train"], config, batch=40, seed=0, training=True)
    with pytest.raises(UserError, match=r"data.corrupt: found 0, and 1 image\(s\) .* the last train/1/0013.jpg") as caught:
        next(iterator)
    assert "\n" not in str(caught.value)


def test_an_evaluation_leaves_an_unreadable_image_out(tmp_path):
    write_folder(tmp_path, 40, [])
    (tmp_path / "test/2/2.jpg").write_bytes(b"")
    config = folder(tmp_path, corrupt=1)
    split = load(config).splits["test"]
    for _ in range(2):
        (batch,) = batches(split, config, batch=6, seed=0, training=False)
        assert batch["valid"].tolist() == [True, True, False, True, False, False]
        assert np.abs(np.array(greys(batch)) - [0, 50, 0, 150, 0, 0]).max() <= 2
    assert list(split.damaged) == ["test/2/2.jpg"]


def test_unreadable_images_are_counted_over_all_splits_and_workers(tmp_path):
    write_folder(tmp_path, 40, [3, 9])
    (tmp_path / "test/2/2.jpg").write_bytes(b"")
    config = folder(tmp_path, corrupt=2, workers=2)
    splits = load(config).splits
    iterator = batches(splits["train"], config, batch=8, seed=0, training=True)
    assert all(batch["valid"].all() for batch in take(iterator, 10))
    assert len(splits["test"].damaged) == 2
    with pytest.raises(UserError, match=r"found 2, and 3 image\(s\) that cannot be read, the last test/2/2.jpg"):
        list(batches(splits["test"], dataclasses.replace(config, workers=0), batch=4, seed=0, training=False))
    iterator.close()


def test_training_images_that_are_all_unreadable(tmp_path):
    config = folder(write_folder(tmp_path, 8, list(range(8))), corrupt=100)
    with pytest.raises(UserError, match="no training image can be read"):
        next(batches(load(config).splits["train"], config, batch=4, seed=0, training=True))
