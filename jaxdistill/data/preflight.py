"""What can be told of data before anything trains: how the splits lie to each other, and how large the numbers are that enter a model."""

import hashlib
import math
from collections.abc import Hashable, Iterable

import numpy as np

from jaxdistill.data.group_splits import some

LARGEST = 20_000_000  # tokens of a split beyond which its documents are not compared: that would take a second or more


def told(sizes: dict[str, int], classes: int, leaks: list[str] | None, unseen: Iterable = ()) -> dict:
    """The part of a recipe's `preflight` that is of its splits. sizes: rows by split. classes: or tokens of the vocabulary."""
    return {"classes": classes, "uniform_nll": math.log(classes), "train_rows": sizes["train"], "splits": sizes, "leaks": leaks,
            "unseen_classes": list(unseen)}  # fmt: skip


def leaks(members: dict[str, Iterable[Hashable]], what: str) -> list[str]:
    """A line for each two splits that have members in common, which are called `what`."""
    sets = {part: set(each) for part, each in members.items()}
    parts = list(sets)
    both = {(one, other): sets[one] & sets[other] for i, one in enumerate(parts) for other in parts[i + 1 :]}
    found = {pair: sorted(map(str, names)) for pair, names in both.items() if names}
    return [f"{one} and {other} share {len(names)} {what}: {some(names, 3)}" for (one, other), names in found.items()]


def unseen(labels: dict[str, np.ndarray], classes: tuple[str, ...]) -> list[str]:
    """The classes of the other splits that no training row has. labels: of each split, class indices."""
    trained = set(labels["train"].tolist())
    return sorted({classes[i] for part, each in labels.items() if part != "train" for i in set(each.tolist()) - trained})


def documents(splits: dict) -> list[str] | None:
    """`leaks` of the documents of `packing.Packed` splits, by their tokens; None where there are too many."""
    packed = {part: getattr(split, "packed", split) for part, split in splits.items()}
    if max(len(split.stream) for split in packed.values()) > LARGEST:
        return None

    def digests(split):
        for tokens in np.split(split.stream, split.starts[1:]):
            yield hashlib.sha256(np.ascontiguousarray(tokens)).hexdigest()[:12]

    return leaks({part: digests(split) for part, split in packed.items()}, "documents")


def scale(*inputs: np.ndarray) -> dict[str, float]:
    """Of arrays [rows, columns] as they enter a model: the largest |number|, the mean |number|, the largest deviation of a column."""
    return {
        "abs_max": max(float(np.abs(x).max(initial=0.0)) for x in inputs),
        "mean_abs": sum(float(np.abs(x).sum(dtype=np.float64)) for x in inputs) / max(sum(x.size for x in inputs), 1),
        "std_max": max(float(x.std(axis=0, dtype=np.float64).max(initial=0.0)) if len(x) else 0.0 for x in inputs),
    }
