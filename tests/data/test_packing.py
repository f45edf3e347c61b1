"""Rows against a plain loop, exact coverage, and batches whose order depends on the seed alone."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill import UserError
from jaxdistill.data.packing import Packed, batches, concatenate

PREFIX = 99


def pack(documents, length, limit=0):
    return Packed(*concatenate([np.array(ids, np.int32) for ids in documents], PREFIX, limit), length)


def by_loop(documents, length):
    """(tokens, segments, positions) of each row, one token at a time."""
    stream = [(token, number) for number, ids in enumerate(documents) for token in [PREFIX, *ids]]
    rows = []
    for first in range(0, len(stream) - 1, length):
        row, segment, position = [], 0, 0
        for place in range(first, first + length + 1):
            if place >= len(stream):
                row.append((0, 0, 0))
                continue
            token, number = stream[place]
            if place == first or number != stream[place - 1][1]:
                segment, position = segment + 1, 0
            row.append((token, segment, position))
            position += 1
        rows.append(row)
    return np.array(rows, np.int32).transpose(2, 0, 1)


DOCUMENTS = st.lists(st.lists(st.integers(0, 98), min_size=1, max_size=12), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(documents=DOCUMENTS, length=st.integers(1, 9))
def test_rows_equal_a_plain_loop(documents, length):
    packed = pack(documents, length)
    for found, wanted in zip((packed.tokens, packed.segments, packed.positions), by_loop(documents, length), strict=True):
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, wanted)


@settings(deadline=None, max_examples=60)
@given(documents=DOCUMENTS, length=st.integers(1, 9))
def test_every_token_but_the_prefix_is_predicted_once_and_in_order(documents, length):
    packed = pack(documents, length)
    tokens, segments = packed.tokens, packed.segments
    counted = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    assert tokens[:, 1:][counted].tolist() == [token for ids in documents for token in ids] == packed.labels.tolist()
    assert counted.sum() == packed.predicted


@settings(deadline=None, max_examples=60)
@given(documents=DOCUMENTS, share=st.floats(0.01, 1))
def test_a_limit_is_exact_and_keeps_the_first_documents_whole(documents, share):
    labels = [token for ids in documents for token in ids]
    limit = max(1, int(share * len(labels)))
    assert pack(documents, 5, limit).labels.tolist() == labels[:limit]


def test_rows_past_the_end_are_padding():
    packed = pack([[1, 2, 3, 4]], 2)  # 5 tokens, 2 rows of 2 labels: the stream ends on the place where row 2 would start
    assert len(packed) == 2
    assert not any(array.any() for array in packed.rows([2, 50]).values())


def numbered(rows, length=4):
    """Row r's first label is r + 1."""
    return pack([np.arange(rows * length) // length + 1], length)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def ids(batch):
    return (batch["tokens"][:, 1] - 1)[batch["valid"]].tolist()


def test_evaluation_goes_through_once_in_order_and_fills_the_last_batch():
    packed = numbered(10)
    found = list(batches(packed, batch=4, seed=0, repeat=False, shuffle=False))
    assert [batch["valid"].tolist() for batch in found] == [[True] * 4, [True] * 4, [True, True, False, False]]
    assert sum(map(ids, found), []) == list(range(10))
    assert not any(found[-1][name][2:].any() for name in ("tokens", "segments", "positions"))
    assert {name: (array.shape, array.dtype) for name, array in found[-1].items()} == {
        "tokens": ((4, 5), np.int32),
        "segments": ((4, 5), np.int32),
        "positions": ((4, 5), np.int32),
        "valid": ((4,), np.bool_),
    }


def test_training_shuffles_every_epoch_anew_and_drops_nothing():
    packed = numbered(10)
    found = sum(map(ids, take(batches(packed, batch=4, seed=3, repeat=True, shuffle=True), 15)), [])
    epochs = [found[start : start + 10] for start in range(0, 60, 10)]  # batches span them
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6
    again = sum(map(ids, take(batches(packed, batch=4, seed=3, repeat=True, shuffle=True), 15)), [])
    other = sum(map(ids, take(batches(packed, batch=4, seed=4, repeat=True, shuffle=True), 15)), [])
    assert found == again != other


def test_a_batch_may_be_larger_than_the_data():
    batch = next(batches(numbered(3), batch=8, seed=0, repeat=True, shuffle=True))
    assert batch["valid"].all()
    assert sorted(ids(batch)[:3]) == sorted(ids(batch)[3:6]) == [0, 1, 2]


@pytest.mark.parametrize(("repeat", "shuffle"), [(True, True), (False, False), (False, True), (True, False)])
def test_processes_hold_the_slices_of_one_global_batch(repeat, shuffle):
    packed = numbered(10)
    options = {"batch": 8, "seed": 1, "repeat": repeat, "shuffle": shuffle}
    whole = batches(packed, **options)
    parts = [batches(packed, **options, process_index=p, process_count=4) for p in range(4)]
    for _ in range(5 if repeat else 2):
        each = [next(part) for part in parts]
        for name, array in next(whole).items():
            np.testing.assert_array_equal(array, np.concatenate([part[name] for part in each]))
    if not repeat:
        assert all(not list(iterator) for iterator in [whole, *parts])  # equally many, also where a part is all padding


def test_state_is_tiny_and_restores_exactly():
    packed = numbered(10)
    iterator = batches(packed, batch=4, seed=0, repeat=True, shuffle=True)
    take(iterator, 7)
    state = iterator.get_state()
    wanted = take(iterator, 6)
    fresh = batches(packed, batch=4, seed=0, repeat=True, shuffle=True)
    fresh.set_state(state)
    assert len(state) == 1
    assert list(map(ids, take(fresh, 6))) == list(map(ids, wanted))


@pytest.mark.parametrize("batch", [0, 6])
def test_a_batch_that_processes_cannot_share_is_refused(batch):
    with pytest.raises(UserError, match=f"batch {batch}: not a positive multiple of the 4 processes"):
        batches(numbered(3), batch=batch, seed=0, repeat=True, shuffle=True, process_count=4)


def test_a_batch_takes_well_under_a_millisecond():
    iterator = batches(numbered(5000, 128), batch=16, seed=0, repeat=True, shuffle=True)
    next(iterator)
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        next(iterator)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1e-3
