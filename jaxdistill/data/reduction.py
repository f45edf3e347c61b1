"""Fewer features a frame, fitted on training sequences alone: principal components, and Tucker's factors of whole tensors.

Each fit goes over `sequences()`, an iterable of [frames, ...] that it asks for more than once, and gives a Reduction. Computed in
float64; of a factor's two signs the one that makes its largest entry positive.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from jaxdistill import UserError

Sequences = Callable[[], Iterable[np.ndarray]]


class Reduction(NamedTuple):
    """apply: [frames, *shape] -> float32 [frames', width]. frames: frames' where they are reduced too, else 0. kept: of each reduced
    mode, the share of its variance in training that is kept."""

    apply: Callable[[np.ndarray], np.ndarray]
    width: int
    frames: int
    kept: tuple[float, ...]


def fit_pca(sequences: Sequences, components: int) -> Reduction:
    """The `components` principal components of the frames, each a vector of all its numbers.

    Raises:
      UserError: more components than a frame has numbers.
    """
    mean, shape = _mean(sequences)
    width = math.prod(shape)
    if not 1 <= components <= width:
        raise UserError(f"config key data.components: found {components}; accepted: 1 to {width}, the numbers of a frame")
    spread = np.zeros((width, width))
    for x in sequences():
        centred = (x - mean).reshape(len(x), width)
        spread += centred.T @ centred
    factor, kept = _largest(spread, components)
    flat = mean.reshape(1, width)
    return Reduction(lambda x: ((x.reshape(len(x), width) - flat) @ factor).astype(np.float32), components, 0, (kept,))


def fit_tucker(sequences: Sequences, ranks: tuple[int, ...]) -> Reduction:
    """Tucker's factors by HOSVD (De Lathauwer, De Moor, Vandewalle 2000): of the centred tensor [sequences, frames, *shape], the leading
    left singular vectors of each unfolding along frames and shape. The mode of the sequences is never reduced.

    Args:
      ranks: of (frames, *shape); 0 leaves a mode as it is. To reduce the frames, all sequences must have as many.

    Raises:
      UserError: ranks that are not one a mode, or beyond its size.
    """
    mean, shape = _mean(sequences)
    frames = {len(x) for x in sequences()} if ranks and ranks[0] else {0}
    if len(frames) > 1:
        raise UserError(f"config key data.ranks: found {ranks}, and sequences of {min(frames)} to {max(frames)} frames; accepted: 0 for "
                        "the frames, or data.fit 'stretch'")  # fmt: skip
    sizes = (*frames, *shape)
    if len(ranks) != len(sizes) or not all(0 <= rank <= (size or rank) for rank, size in zip(ranks, sizes, strict=True)) or not any(ranks):
        most = ", ".join(["the frames", *map(str, shape)])
        raise UserError(f"config key data.ranks: found {ranks}; accepted: one for each mode, at most ({most}), 0 as it is, not all 0")
    spreads = {mode: np.zeros((sizes[mode],) * 2) for mode, rank in enumerate(ranks) if rank}
    for x in sequences():
        centred = x - mean
        for mode, spread in spreads.items():
            unfolded = np.moveaxis(centred, mode, 0).reshape(sizes[mode], -1)
            spread += unfolded @ unfolded.T
    factors = {mode: _largest(spread, ranks[mode]) for mode, spread in spreads.items()}

    def apply(x: np.ndarray) -> np.ndarray:
        x = x - mean
        for mode, (factor, _) in factors.items():
            x = np.moveaxis(np.tensordot(x, factor, axes=(mode, 0)), -1, mode)
        return x.reshape(len(x), -1).astype(np.float32)

    width = math.prod(rank or size for rank, size in zip(ranks[1:], shape, strict=True))
    return Reduction(apply, width, ranks[0], tuple(kept for _, kept in factors.values()))


def _mean(sequences: Sequences) -> tuple[np.ndarray, tuple[int, ...]]:
    """(float64 [1, *shape], the mean frame; shape)."""
    total, count = 0.0, 0
    for x in sequences():
        total, count = total + x.sum(axis=0, keepdims=True, dtype=np.float64), count + len(x)
    return total / count, total.shape[1:]


def _largest(spread: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """(the eigenvectors [size, count] of the largest eigenvalues, their share of all of them)."""
    values, vectors = np.linalg.eigh(spread)
    vectors = vectors[:, ::-1][:, :count]
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(count)])
    total = values.sum()
    return vectors * signs[None], float(values[::-1][:count].sum() / total) if total > 0 else 1.0
