"""Batches of arrays: every example once an epoch, the same whatever reads them, and a state that restores exactly."""

import dataclasses

import numpy as np
import pytest

from jaxdistill import UserError
from jaxdistill.data.array_batches import batches


@dataclasses.dataclass
class Numbers:
    """Example i is the number i, twice."""

    count: int
    broken: int = -1

    def __len__(self):
        return self.count

    def take(self, indices):
        if self.broken in indices:
            raise UserError(f"example {self.broken}: cannot be read")
        x = np.asarray(indices, np.float32)
        return {"x": np.stack([x, x], 1), "label": np.asarray(indices, np.int32)}


def take(iterator, count: int) -> list[dict]:
    return [next(iterator) for _ in range(count)]


def assert_equal(found: list[dict], wanted: list[dict]):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


def test_a_batch():
    batch = next(batches(Numbers(10), batch=4, seed=0, training=True))
    assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
        "x": ("float32", (4, 2)), "label": ("int32", (4,)), "valid": ("bool", (4,)), "row": ("int32", (4,)),
    }  # fmt: skip
    assert batch["row"].tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(batch["x"][:, 0], batch["label"])


@pytest.mark.parametrize("batch", [4, 10, 25])  # 25: more than there are
def test_each_epoch_holds_every_example_once_in_an_order_of_its_own(batch):
    found = take(batches(Numbers(10), batch=batch, seed=3, training=True), 100 // batch)
    assert all(each["valid"].all() for each in found)
    served = np.concatenate([each["label"] for each in found])
    epochs = [served[at : at + 10].tolist() for at in range(0, 100, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 10
    other = np.concatenate([each["label"] for each in take(batches(Numbers(10), batch=batch, seed=4, training=True), 100 // batch)])
    assert served.tolist() != other.tolist()


def test_the_order_of_an_epoch_is_the_same_whatever_the_batch():
    small, large = (
        np.concatenate([each["label"] for each in take(batches(Numbers(7), batch=size, seed=1, training=True), 42 // size)])
        for size in (2, 21)
    )
    np.testing.assert_array_equal(small, large)


def test_an_evaluation_goes_through_once_in_order_and_fills_its_last_batch():
    found = list(batches(Numbers(10), batch=4, seed=0, training=False))
    assert [each["label"].tolist() for each in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]
    assert [each["valid"].tolist() for each in found] == [[True] * 4, [True] * 4, [True, True, False, False]]
    assert all(each["row"].tolist() == [0, 1, 2, 3] for each in found)


@pytest.mark.parametrize("training", [True, False])
def test_processes_hold_the_slices_of_one_global_batch(training):
    options = {"batch": 8, "seed": 1, "training": training}
    whole = take(batches(Numbers(10), **options), 2)
    parts = [take(batches(Numbers(10), **options, process_index=p, process_count=4), 2) for p in range(4)]
    joined = [{name: np.concatenate([part[k][name] for part in parts]) for name in whole[0]} for k in range(2)]
    assert_equal(whole, joined)


def test_processes_end_an_evaluation_together():
    parts = [list(batches(Numbers(9), batch=8, seed=0, training=False, process_index=p, process_count=4)) for p in range(4)]
    assert [len(part) for part in parts] == [2] * 4


def test_the_state_is_the_number_of_batches_and_restores_exactly():
    iterator = batches(Numbers(10), batch=4, seed=0, training=True)
    take(iterator, 7)
    state = iterator.get_state()
    assert list(state.values()) == [7]
    wanted = take(iterator, 6)
    again = batches(Numbers(10), batch=4, seed=0, training=True)
    again.set_state(state)
    assert_equal(take(again, 6), wanted)
    iterator.set_state(state)  # also one that is under way
    assert_equal(take(iterator, 6), wanted)


@pytest.mark.parametrize(("options", "message"), [
    ({"batch": 0}, "train.batch: found 0; accepted: a positive multiple of the 1 processes"),
    ({"batch": 6, "process_count": 4}, "train.batch: found 6; accepted: a positive multiple of the 4 processes"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_one_line(options, message):
    with pytest.raises(UserError, match=message):
        batches(Numbers(10), seed=0, training=True, **options)


def test_a_split_without_examples():
    with pytest.raises(UserError, match="found a split without examples; accepted: one or more"):
        batches(Numbers(0), batch=2, seed=0, training=False)


def test_what_a_split_cannot_read_is_its_own_error():
    found = batches(Numbers(10, broken=5), batch=4, seed=0, training=False)
    next(found)
    with pytest.raises(UserError) as caught:
        next(found)
    assert str(caught.value) == "example 5: cannot be read"
