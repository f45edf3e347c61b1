"""What is told of data before anything trains."""

import math

import numpy as np
import pytest

from jaxdistill.data import packing, preflight


def packed(*documents) -> packing.Packed:
    stream, starts = packing.concatenate([np.asarray(ids) for ids in documents], prefix=0)
    return packing.Packed(stream, starts, length=4)


def test_documents_that_two_splits_share():
    splits = {"train": packed([1, 2, 3], [4, 5]), "validation": packed([6]), "test": packed([4, 5], [7])}
    (line,) = preflight.documents(splits)
    assert line.startswith("train and test share 1 documents: ")
    assert preflight.documents(splits | {"test": packed([4, 5, 5])}) == []


def test_too_much_text_is_not_compared(monkeypatch):
    monkeypatch.setattr(preflight, "LARGEST", 3)
    assert preflight.documents({"train": packed([1, 2, 3]), "test": packed([1])}) is None


def test_classes_that_never_train():
    labels = {"train": np.asarray([0, 1]), "validation": np.asarray([1]), "test": np.asarray([2, 0, 3, 2])}
    assert preflight.unseen(labels, ("a", "b", "c", "d")) == ["c", "d"]


def test_scale():
    x, y = np.asarray([[1.0, -30.0], [3.0, 10.0]]), np.zeros((0, 3))
    assert preflight.scale(x, y) == {"abs_max": 30.0, "mean_abs": 11.0, "std_max": 20.0}


def test_told():
    found = preflight.told({"train": 5, "test": 2}, 8, [])
    assert found == {"classes": 8, "uniform_nll": pytest.approx(math.log(8)), "train_rows": 5, "splits": {"train": 5, "test": 2},
                     "leaks": [], "unseen_classes": []}  # fmt: skip
