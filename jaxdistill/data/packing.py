"""Documents in rows of fixed length, without waste: every token but a document's prefix is predicted exactly once.

Documents, each after one prefix token (so that its first token is predicted as well), form one stream. Row r holds the
`length + 1` tokens that start at r * length: consecutive rows share one token, the last of a row being the first input
of the next. The label of place t is `tokens[t + 1]`, and counts iff `segments[t] == segments[t + 1] != 0`; where a document
ends, training has the end of text as a label beside these (`recipes.lm.next_token`).

Only the stream is stored (4 bytes a token); rows are gathered, and their segments and positions worked out, when asked for.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence

import grain
import numpy as np

from jaxdistill import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """A split as rows.

    Attributes:
      stream: int32 [T], documents one after another, each after its prefix token.
      starts: int64 [documents], where in the stream each prefix stands.
      length: labels in a row.
    """

    stream: np.ndarray
    starts: np.ndarray
    length: int

    def __len__(self) -> int:
        """Number of rows."""
        return -(-(len(self.stream) - 1) // self.length)

    @property
    def predicted(self) -> int:
        """Number of labels that count, over all rows."""
        return len(self.stream) - len(self.starts)

    @property
    def labels(self) -> np.ndarray:
        """int32 [predicted]: the tokens that are predicted, in order."""
        return np.delete(self.stream, self.starts)

    def rows(self, index) -> dict[str, np.ndarray]:
        """The rows `index` [B] as int32 [B, length + 1] `tokens`, `segments` and `positions`.

        `segments` counts 1, 2, ... within a row, 0 is padding; `positions` starts at 0 in every piece, also in one that
        the row before began. Rows past the end are all padding (zeros).
        """
        index = np.asarray(index)
        place = index[:, None] * self.length + np.arange(self.length + 1)
        real = (place < len(self.stream)) & (index < len(self))[:, None]
        place = np.where(real, place, 0)
        document = np.searchsorted(self.starts, place, side="right") - 1
        segments = document - document[:, :1] + 1
        positions = place - np.maximum(self.starts[document], place[:, :1])
        rows = {"tokens": self.stream[place], "segments": segments, "positions": positions}
        return {name: np.where(real, array, 0).astype(np.int32) for name, array in rows.items()}

    @property
    def tokens(self) -> np.ndarray:
        """int32 [N, length + 1], all rows; a new array at every call, as are `segments` and `positions`."""
        return self.rows(np.arange(len(self)))["tokens"]

    @property
    def segments(self) -> np.ndarray:
        return self.rows(np.arange(len(self)))["segments"]

    @property
    def positions(self) -> np.ndarray:
        return self.rows(np.arange(len(self)))["positions"]


def concatenate(documents: Sequence[np.ndarray], prefix: int, limit: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(stream, starts) of `Packed` from each document's ids, in the order given.

    Args:
      documents: int [tokens] each, none empty.
      prefix: id put before every document.
      limit: keep the first documents, the last one cut, so that exactly `limit` tokens are predicted; 0: all. There must
        be as many.
    """
    sizes = np.array([len(ids) for ids in documents], np.int64)
    if limit:
        after = np.cumsum(sizes)
        last = int(np.searchsorted(after, limit))
        sizes = sizes[: last + 1]
        sizes[last] -= after[last] - limit
    starts = np.concatenate([[0], np.cumsum(sizes + 1)])
    stream = np.empty(starts[-1], np.int32)
    for ids, start, size in zip(documents, starts, sizes, strict=False):  # cut documents and the end of the last are left over
        stream[start] = prefix
        stream[start + 1 : start + 1 + size] = ids[:size]
    return stream, starts[:-1]


class _Batches:
    """Batch k of the rows, as one process sees it: a random-access source for grain.

    A batch is gathered at once: grain's own shuffle, repeat and batch cost about 13 us a row, ten times the gather.
    """

    def __init__(self, packed: Packed, batch: int, seed: int, repeat: bool, shuffle: bool, mine: slice, beside):
        self.packed, self.batch, self.seed, self.repeat, self.shuffle, self.mine = packed, batch, seed, repeat, shuffle, mine
        self.beside = beside

    def __repr__(self):
        return f"Batches({len(self.packed)} rows, {self.batch} at once)"

    def __len__(self):
        return sys.maxsize if self.repeat else -(-len(self.packed) // self.batch)

    def __getitem__(self, k):
        n = len(self.packed)
        place = np.arange(k * self.batch, (k + 1) * self.batch)[self.mine]
        epoch, row = np.divmod(place, n)
        if self.shuffle:
            for each in np.unique(epoch):  # one or two; more only where a batch is larger than the data
                here = epoch == each
                row[here] = _order(n, self.seed, int(each))[row[here]]
        if not self.repeat:
            row = np.where(epoch == 0, row, n)  # past the end: padding
        more = self.beside(row, epoch) if self.beside else {}
        return self.packed.rows(row) | {"valid": row < n} | more


@functools.lru_cache(maxsize=4)  # the epoch at hand and the next, for two iterators
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def batches(
    packed: Packed, *, batch: int, seed: int, repeat: bool, shuffle: bool, process_index: int = 0, process_count: int = 1,
    beside: Callable | None = None,
) -> grain.DatasetIterator:
    """Iterator of {tokens, segments, positions: int32 [B, length + 1]; valid: bool [B]}, B = batch / process_count; of
    `alignment.Paired`, which is taken too, with its other arrays.

    With `repeat`, endless: epochs follow one another without a gap, each shuffled anew, and a batch may span two. Without,
    once through; the last batch is filled up with rows of zeros that are not `valid`. The global batch k is the same for
    every `process_count`; process p has its rows [p * B, (p + 1) * B), and all processes have equally many batches.

    The state (`get_state`, `set_state`) is the number of batches taken; restoring it is exact.

    Args:
      beside: (rows int [B], epochs int [B]) -> more arrays [B, ...] of these rows, a function of both alone; the number of
        rows stands for padding.

    Raises:
      UserError: `batch` is not a positive multiple of `process_count`.
    """
    if batch < 1 or batch % process_count:
        raise UserError(f"batch {batch}: not a positive multiple of the {process_count} processes")
    each = batch // process_count
    mine = slice(process_index * each, (process_index + 1) * each)
    dataset = grain.MapDataset.source(_Batches(packed, batch, seed, repeat, shuffle, mine, beside))
    # No threads: a gather takes tens of microseconds, less than handing it over would.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
