"""Batches of images: shuffled epochs or identities by K, each image's augmentation, partners, all of it a function of the seed.

Batch k is the same whatever the number of processes, workers and threads: the order comes from (seed, epoch), an image's
augmentation from (seed, epoch, image, copy), or of `Views` from (their seed, view, image), the partners from (seed, k).
"""

import functools
import logging
import sys
from collections.abc import Callable
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from jaxdistill import UserError
from jaxdistill.data import augment
from jaxdistill.data.pictures import Arrays, Corrupt

logger = logging.getLogger(__name__)
# First number of each seed. Without it (seed, epoch) and (seed, epoch, 0, 0) would be one stream.
ORDER, AUGMENT, PARTNER, IDENTITY, COPIES, VIEW = range(1, 7)


class Views(NamedTuple):
    """So many augmented views of each training image, in place of ever new ones: epochs (and copies within one) take them in turn.
    seed: of their augmentation, not the run's: so that what was once said of a view can be said of it again."""

    count: int
    seed: int


class _Batches:
    """Batch k as one process sees it, with what could not be read on the way: a random-access source for grain."""

    def __init__(self, split, config, batch: int, seed: int, training: bool, mine: slice):
        self.split, self.config, self.batch, self.seed, self.training, self.mine = split, config, batch, seed, training, mine
        self.identities, self.micro, self.pairs = 0, 1, False
        self.views, self.beside = None, None

    def __repr__(self):
        return f"Batches({len(self.split)} images, {self.batch} at once)"

    def __len__(self):
        return sys.maxsize if self.training else -(-len(self.split) // self.batch)

    def __getitem__(self, k):
        """(batch, ((image, reason), ...)): the second for `_Counted`, since workers are other processes."""
        row = np.arange(self.batch, dtype=np.int32)
        batch, damaged = self.gather(*(column[self.mine] for column in self._chosen(int(k))))
        return batch | {"row": row[self.mine], "partner": self._partners(int(k), row)[self.mine]}, damaged

    def gather(self, epoch: np.ndarray, index: np.ndarray, copy: np.ndarray) -> tuple[dict, tuple]:
        """(the images `index`, ((image, reason), ...)) of these epochs and copies."""
        damaged, images, kept = {}, [], []
        for at in zip(epoch.tolist(), index.tolist(), copy.tolist(), strict=True):
            image, i = self._image(*at, damaged)
            images.append(image)
            kept.append(i)
        kept = np.asarray(kept)
        batch = {
            "image": np.stack(images),
            "label": self.split.labels[kept],
            "camera": self.split.cameras[kept],
            "gallery": self.split.gallery[kept],
            "valid": kept >= 0,
        }
        for name in ("label", "camera", "gallery"):
            batch[name] = np.where(batch["valid"], batch[name], np.zeros((), batch[name].dtype))
        if self.beside:
            batch |= self.beside(np.where(kept < 0, len(self.split), kept), epoch + copy)
        return batch, tuple(damaged.items())

    def _chosen(self, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(epoch, image, copy) of each row of the global batch; image -1 is padding."""
        n = len(self.split)
        place = np.arange(k * self.batch, (k + 1) * self.batch)
        if not self.training:
            return np.zeros_like(place), np.where(place < n, place, -1), np.zeros_like(place)
        if self.identities:
            return self._by_identity(k)
        epoch, index = np.divmod(place, n)
        for each in np.unique(epoch):  # one or two; more only where a batch is larger than the data
            here = epoch == each
            index[here] = _order(n, (ORDER, self.seed, int(each)))[index[here]]
        return epoch, index, np.zeros_like(place)

    def _by_identity(self, k: int):
        """P identities, K images of each, one identity after another."""
        members, images = self.split.members, self.batch // self.identities
        steps = -(-len(members) // self.identities)
        epoch, step = divmod(k, steps)
        order = _order(len(members), (IDENTITY, self.seed, epoch))
        place = np.arange(step * self.identities, (step + 1) * self.identities)
        index, copy = [], []
        for again, identity in zip(place // len(members), order[place % len(members)], strict=True):
            mine = members[identity]
            shuffled = mine[np.random.default_rng((COPIES, self.seed, epoch, int(identity))).permutation(len(mine))]
            turn = again * images + np.arange(images)  # an identity that is served twice goes on where it was
            index.append(shuffled[turn % len(mine)])
            copy.append(turn // len(mine))
        return np.full(self.batch, epoch), np.concatenate(index), np.concatenate(copy)

    def _image(self, epoch: int, i: int, copy: int, damaged: dict) -> tuple[np.ndarray, int]:
        """(image i, i), or the one that stands in for it; an evaluation has none to stand in: (zeros, -1)."""
        for other in self._candidates(i):
            try:
                picture = self.split.picture(other)
            except Corrupt as error:
                damaged[other] = str(error)
                if len(damaged) > self.config.corrupt:
                    break  # `_Counted` raises
                continue
            if not self.training:
                return augment.centred(picture, self.config), other
            numbers = (AUGMENT, self.seed, epoch, i, copy)
            if self.views:
                numbers = (VIEW, self.views.seed, (epoch + copy) % self.views.count, other)
            rng = np.random.default_rng(numbers)
            return augment.training(picture, self.config, rng), other
        return np.zeros((*self.config.size, self.config.channels), np.uint8), -1

    def _candidates(self, i: int):
        """i and, in training, those that may stand in for it: the next of its label, then the next of any."""
        if i < 0:
            return
        yield i
        if self.training:
            n, labels = len(self.split), self.split.labels
            after = np.arange(i + 1, i + n) % n
            same = labels[after] == labels[i]
            yield from np.concatenate([after[same], after[~same]]).tolist()

    def _partners(self, k: int, row: np.ndarray) -> np.ndarray:
        """Each row's partner is the row `shift` below it, a multiple of `micro`: micro-batch j holds the rows i with
        i % micro == j, and so both of them."""
        if not self.pairs:
            return row
        shift = self.micro * int(np.random.default_rng((PARTNER, self.seed, k)).integers(1, self.batch // self.micro))
        return (row + np.int32(shift)) % np.int32(self.batch)


@functools.lru_cache(maxsize=8)  # the epoch at hand and the next, for a few iterators
def _order(n: int, seed: tuple) -> np.ndarray:
    return np.random.default_rng(seed).permutation(n)


class _Counted:
    """(batch, damaged) -> batch, in the process that trains: each unreadable image is named once, and they are counted."""

    def __init__(self, split, limit: int, training: bool):
        self.split, self.limit, self.training = split, limit, training

    def __call__(self, element):
        batch, found = element
        seen = self.split.damaged
        for index, reason in found:
            name = self.split.names[int(index)]
            if name in seen:
                continue
            seen[name] = reason
            if len(seen) > self.limit:
                raise UserError(
                    f"config key data.corrupt: found {self.limit}, and {len(seen)} image(s) that cannot be read, the last {name} "
                    f"({reason}); accepted: as many or more, or images that can all be read"
                )
            logger.warning("image %s cannot be read (%s) and is left out: %d of at most %d", name, reason, len(seen), self.limit)
        if self.training and not batch["valid"].all():
            raise UserError(f"data.path {self.split.config.path!r}: no training image can be read; accepted: one or more")
        return batch


def rows(split, config, index: np.ndarray, *, views: Views | None = None, view: int = 0) -> dict[str, np.ndarray]:
    """The images `index` int [B] as `batches` has them, in view number `view` of `views`, or as evaluation shows them; numbers past
    the end are padding."""
    source = _Batches(split, config, len(index), 0, views is not None, slice(None))
    source.views = views
    known = np.where(index < len(split), index, -1)
    batch, damaged = source.gather(np.full(len(index), view), known, np.zeros(len(index), int))
    return _Counted(split, config.corrupt, False)((batch, damaged))


def batches(
    split, config, *, batch: int, seed: int, training: bool, micro: int = 1, identities: int = 0, pairs: bool = False,
    views: Views | None = None, beside: Callable | None = None, process_index: int = 0, process_count: int = 1,
) -> grain.DatasetIterator:  # fmt: skip
    """Iterator over dicts of arrays of B = batch / process_count examples: `image` uint8 [B, h, w, channels]; `label`, `camera`
    int32 [B]; `gallery`, `valid` bool [B]; `row`, `partner` int32 [B], places in the global batch (partner is row without `pairs`).

    Training is endless: epochs follow one another without a gap, each shuffled anew, no image is dropped, and a batch may span
    two. Evaluation goes through once in order without augmentation; zeros that are not `valid` fill the last batch.

    With `identities` = P a batch holds P identities and K = batch / P images of each, different ones first (PK sampler; Hermans et
    al. 2017, arXiv 1703.07737). An epoch serves every identity once, in random order; where P does not divide them, the
    first of the epoch come again to fill its last batch.

    An unreadable image is logged once, as a warning, and left out: in training the next readable one of its label stands in (of any
    label, where there is none), in evaluation its row is not `valid`. Each process counts those that it met, over all splits.

    The state (`get_state`, `set_state`) is the number of batches taken and restores exactly, also under threads. With
    `config.workers` > 0 (processes of grain's `mp_prefetch`; else threads) the batches are the same, but the state belongs
    to that number of workers: another number cannot restore it.

    Args:
      split: an `images.Split`.
      config: the ImageConfig; its augmentation is applied in training.
      batch: examples in the global batch.
      micro: parts that a batch is cut into, row i going to part i % micro.
      pairs: draw partners: one shift a batch, within 1 to batch - 1 and a multiple of `micro`. No row is its own partner.
      views: in training, those that are shown instead of new ones.
      beside: (images int [B], their epochs int [B]) -> more arrays [B, ...], a function of both alone; the number of images
        stands for what is not valid. Of `views`, view (epoch mod their count) is the one that is shown.
      process_index, process_count: this process gets rows [index * B, (index + 1) * B) of the global batch.

    Raises:
      UserError: sizes that do not divide; too few rows for partners; too few identities; more unreadable images than `config.corrupt`.
    """
    if batch < 1 or batch % process_count:
        raise UserError(f"config key train.batch: found {batch}; accepted: a positive multiple of the {process_count} processes")
    if pairs and (batch % micro or batch // micro < 2):
        raise UserError(f"config key train.batch: found {batch} in train.micro {micro} parts, and partners are asked for; accepted: a "
                        "multiple of train.micro, at least twice as large")  # fmt: skip
    each = batch // process_count
    source = _Batches(split, config, batch, seed, training, slice(process_index * each, (process_index + 1) * each))
    source.beside = beside
    if training:
        source.identities, source.micro, source.pairs, source.views = identities, micro, pairs, views
        if identities and (batch % identities or batch // identities < 2):
            raise UserError(f"config key train.batch: found {batch} for {identities} identities; accepted: a multiple of them, at least "
                            "twice as large (a triplet needs two images of an identity)")  # fmt: skip
        if identities > len(split.members):
            raise UserError(f"config key loss.identities: found {identities}; accepted: at most the {len(split.members)} that train")
    dataset = grain.MapDataset.source(source)
    if config.workers:
        if not flags.FLAGS.is_parsed():  # in a notebook; grain's workers ask
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=2))
    else:
        # Decoding a file gives the interpreter free, so that two threads are twice as fast; of arrays, two only wait for each other.
        threads = 1 if isinstance(split.source, Arrays) else 2
        dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4))
    return iter(dataset.map(_Counted(split, config.corrupt, training)))
