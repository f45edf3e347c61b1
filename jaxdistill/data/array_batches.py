"""Batches of whatever a split can take by number: sequences, tables, graphs. Shuffled epochs, a function of the seed alone.

Batch k is the same whatever the number of processes and threads: its order comes from (seed, epoch) and from nothing else.
"""

import functools
import sys
from typing import Protocol

import grain
import numpy as np

from jaxdistill import UserError


class Split(Protocol):
    """What batches are made of. `take` gives arrays [B, ...], copies, for indices int [B], which may repeat; it is called by threads."""

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]: ...


class _Batches:
    """Batch k as one process sees it: a random-access source for grain."""

    def __init__(self, split: Split, batch: int, seed: int, training: bool, mine: slice):
        self.split, self.batch, self.seed, self.training, self.mine = split, batch, seed, training, mine

    def __repr__(self):
        return f"Batches({len(self.split)} examples, {self.batch} at once)"

    def __len__(self):
        return sys.maxsize if self.training else -(-len(self.split) // self.batch)

    def __getitem__(self, k):
        k, n = int(k), len(self.split)
        place = np.arange(k * self.batch, (k + 1) * self.batch)[self.mine]
        valid = np.ones(len(place), bool) if self.training else place < n
        index = self._shuffled(place) if self.training else np.where(valid, place, 0)
        row = np.arange(self.batch, dtype=np.int32)[self.mine]
        return self.split.take(index) | {"valid": valid, "row": row}

    def _shuffled(self, place: np.ndarray) -> np.ndarray:
        n = len(self.split)
        epoch, index = np.divmod(place, n)
        for each in np.unique(epoch):  # one or two; more only where a batch is larger than the data
            here = epoch == each
            index[here] = _order(n, self.seed, int(each))[index[here]]
        return index


@functools.lru_cache(maxsize=8)  # the epoch at hand and the next, for a few iterators
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def batches(
    split: Split, *, batch: int, seed: int, training: bool, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Iterator over what `split.take` gives for B = batch / process_count examples, with `valid` bool [B] and `row` int32 [B], the
    place in the global batch.

    Training is endless: epochs follow one another without a gap, each shuffled anew, no example is dropped, and a batch may span two.
    Evaluation goes through once in order; example 0, not `valid`, fills the last batch.

    The state (`get_state`, `set_state`) is the number of batches taken and restores exactly.

    Args:
      batch: examples in the global batch.
      process_index, process_count: this process gets rows [index * B, (index + 1) * B) of the global batch.

    Raises:
      UserError: a batch that the processes do not divide; a split without an example; whatever `take` raises, when it is read.
    """
    if batch < 1 or batch % process_count:
        raise UserError(f"config key train.batch: found {batch}; accepted: a positive multiple of the {process_count} processes")
    if not len(split):
        raise UserError("data: found a split without examples; accepted: one or more")
    each = batch // process_count
    source = _Batches(split, batch, seed, training, slice(process_index * each, (process_index + 1) * each))
    dataset = grain.MapDataset.source(source)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))  # a gather takes less than a thread
