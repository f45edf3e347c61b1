"""Retrieval, as re-identification measures it: mAP, CMC, mINP, and k-reciprocal re-ranking. On the host, in float64.

For each query the gallery is ranked by distance. Left out of a query's ranking: images of its own identity from its own camera.
Left out of everything: junk, label < 0. Any other image of another identity, distractors included, is wrong. A camera < 0 is
unknown, and equal to none. Queries that have no match left are left out, and counted.

Equal distances are ranked by place in the gallery, the earlier first; images with the same features have the same distance, whatever
rounding a matrix product does. Distances are held a block of rows at a time: memory is linear in the number of images.
"""

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np
import scipy.sparse

from jaxdistill import UserError

HELD = 2**22  # distances that exist at a time: 32 MiB
RANKS = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class Rerank:
    """k-reciprocal re-ranking: k1 neighbours, k2 of query expansion (1: none), weight of the first distance (lambda)."""

    k1: int = 20
    k2: int = 6
    weight: int | float = 0.3

    def __post_init__(self):
        for key in ("k1", "k2"):
            if type(getattr(self, key)) is not int or getattr(self, key) < 1:
                raise UserError(f"rerank.{key}: found {getattr(self, key)!r}; accepted: an integer of at least 1")
        if not 0 <= self.weight <= 1:
            raise UserError(f"rerank.weight: found {self.weight!r}; accepted: a number from 0 to 1")


def finish(stacked: dict[str, np.ndarray], *, metric: str = "cosine", rerank: Rerank | None = None) -> dict[str, float]:
    """`evaluate`, from the arrays of all batches: features [batches, B, width]; label, camera, gallery, valid [batches, B], where
    rows that are not valid are padding. With `rerank` the figures after re-ranking too, as in `reranked_mAP`."""
    valid = stacked["valid"].reshape(-1).astype(bool)
    features = stacked["features"].reshape(len(valid), -1)[valid]
    label, camera, gallery = (stacked[name].reshape(-1)[valid] for name in ("label", "camera", "gallery"))
    found = evaluate(features, label, camera, gallery.astype(bool), metric=metric)
    if rerank is not None:
        again = evaluate(features, label, camera, gallery.astype(bool), metric=metric, rerank=rerank)
        found |= {f"reranked_{name}": again[name] for name in again if name not in ("queries", "left_out")}
    return found


def evaluate(
    features: np.ndarray,
    label: np.ndarray,
    camera: np.ndarray,
    gallery: np.ndarray,
    *,
    metric: str = "cosine",
    rerank: Rerank | None = None,
) -> dict[str, float]:
    """Every image that is not of the gallery is a query.

    Args:
      features [images, width] float; label, camera [images] int; gallery [images] bool.
      metric: "cosine", or "euclidean".

    Returns:
      mAP: mean over queries of the mean precision at the places of the matches. (Market-1501's own script takes the trapezoid
        between them, which is a little less.) rank1, rank5, rank10 (CMC): share of queries with a match among the first k. mINP
        (Ye et al., arXiv 2001.04193): mean of matches / place of the last one. As fractions, NaN if any feature is not finite.
      queries: how many these are means over; left_out: queries without a match.

    Raises:
      UserError: no query has a match, or no such metric.
    """
    if metric not in ("cosine", "euclidean"):
        raise UserError(f"metric: found {metric!r}; accepted: cosine, euclidean")
    query, gallery = (label >= 0) & ~gallery, (label >= 0) & gallery
    x, y = (_points(features[which], metric) for which in (query, gallery))
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return dict.fromkeys(_summary(1, np.ones(1)), np.nan) | {"queries": np.nan, "left_out": np.nan}
    blocks = _squared(x, y) if rerank is None else _reranked(x, y, rerank)
    rows = (row for block in blocks for row in block)
    label_y, camera_y = label[gallery], camera[gallery]
    each = []
    for row, identity, place in zip(rows, label[query], camera[query], strict=True):
        match = label_y == identity
        if place >= 0:
            own = match & (camera_y == place)
            row[own] = np.inf
            match &= ~own
        if match.any():
            each.append(_summary(*_places(row, match)))
    if not each:
        raise UserError(f"retrieval: found no match in a gallery of {len(y)} images for any of {len(x)} queries; accepted: images of "
                        "the same label there, from another camera")
    means = {name: float(np.mean([one[name] for one in each])) for name in each[0]}
    return means | {"queries": float(len(each)), "left_out": float(len(x) - len(each))}


def _places(distances: np.ndarray, match: np.ndarray) -> tuple[int, np.ndarray]:
    """(matches, their places from 1 on, rising) in the order of (distance, index)."""
    wanted, rising = distances[match], np.sort(distances)
    nearer = np.searchsorted(rising, wanted, side="left")
    for k in np.flatnonzero(np.searchsorted(rising, wanted, side="right") - nearer > 1):
        index = np.flatnonzero(match)[k]
        nearer[k] += np.count_nonzero(distances[:index] == wanted[k])
    return len(wanted), np.sort(nearer) + 1


def _summary(matches: int, places: np.ndarray) -> dict[str, float]:
    found = {"mAP": np.mean(np.arange(1, matches + 1) / places)}
    return found | {f"rank{k}": float(places[0] <= k) for k in RANKS} | {"mINP": matches / places[-1]}


def _points(features: np.ndarray, metric: str) -> np.ndarray:
    """float64, for cosine of length 1 (0 stays 0): half of their squared distance is then 1 - cosine."""
    points = features.astype(np.float64)
    if metric == "cosine":
        points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return points


def _squared(x: np.ndarray, y: np.ndarray) -> Iterator[np.ndarray]:
    """Squared distances of x [n, width] to y [m, width], in blocks of rows that are the reader's own."""
    number: dict[bytes, int] = {}  # rows of y that are equal are compared once: a product may round each differently
    where = np.array([number.setdefault(hashlib.blake2b(row, digest_size=16).digest(), len(number)) for row in y], np.int64)
    repeated = len(number) < len(y)
    if repeated:
        y = y[np.unique(where, return_index=True)[1]]
    of_x, of_y = (np.einsum("nd,nd->n", points, points) for points in (x, y))
    step = max(1, HELD // max(len(where), 1))
    for start in range(0, len(x), step):
        block = x[start : start + step] @ y.T
        block *= -2.0
        block += of_y
        block += of_x[start : start + step, None]
        np.maximum(block, 0.0, out=block)
        yield block[:, where] if repeated else block


def _reranked(x: np.ndarray, y: np.ndarray, chosen: Rerank) -> Iterator[np.ndarray]:
    """(1 - weight) x Jaccard + weight x first distance (Zhong et al., CVPR 2017), in blocks of rows as `_squared`.

    Where paper and the authors' code differ it is the code, by which figures were published: the first distance is the squared one
    over the largest of its row; k neighbours are counted beside the point itself; a candidate's set joins if more than 2/3 of it is
    shared; encodings add up to 1."""
    points = np.concatenate([x, y])
    count, half = len(points), round(chosen.k1 / 2)
    near, largest = np.empty((count, min(max(chosen.k1 + 1, chosen.k2), count)), np.int64), np.empty(count)
    for i, row in enumerate(row for block in _squared(points, points) for row in block):
        near[i], largest[i] = _nearest(row, near.shape[1]), max(row.max(), np.finfo(np.float64).tiny)

    def reciprocal(i: int, k: int) -> np.ndarray:
        """Those of i's k neighbours that have i among theirs, i itself included."""
        forward = near[i, : k + 1]
        return forward[(near[forward, : k + 1] == i).any(axis=1)]

    mutual = [reciprocal(i, half) for i in range(count)]
    members, weights = [], []
    for i in range(count):
        first = reciprocal(i, chosen.k1)
        joined = [mutual[j] for j in first if 3 * np.isin(mutual[j], first).sum() > 2 * len(mutual[j])]
        members.append(np.unique(np.concatenate([first, *joined])))
        weight = np.exp(-np.sum((points[members[i]] - points[i]) ** 2, axis=1) / largest[i])
        weights.append(weight / weight.sum())
    ends = np.cumsum([0, *map(len, members)])
    encoded = scipy.sparse.csr_array((np.concatenate(weights), np.concatenate(members), ends), shape=(count, count))
    k2 = min(chosen.k2, count)
    expansion = (np.full(count * k2, 1 / k2), near[:, :k2].ravel(), np.arange(0, count * k2 + 1, k2))
    encoded = scipy.sparse.csr_array(expansion, shape=(count, count)) @ encoded
    having = encoded[len(x) :].tocsc()  # member -> the gallery images whose encoding has it
    done = 0
    for block in _squared(x, y):
        for row in block:
            row *= chosen.weight / largest[done]
            row += (1 - chosen.weight) * _jaccard(encoded, done, having, len(y))
            done += 1
        yield block


def _jaccard(encoded, i: int, having, size: int) -> np.ndarray:
    """1 - sum min / sum max of encoding i with each of the gallery's; as both add up to 1, sum max is 2 - sum min."""
    shared = np.zeros(size)
    span = slice(*encoded.indptr[i : i + 2])
    for member, weight in zip(encoded.indices[span], encoded.data[span], strict=True):
        column = slice(*having.indptr[member : member + 2])
        shared[having.indices[column]] += np.minimum(weight, having.data[column])  # no image twice in a column
    return 1 - shared / (2 - shared)


def _nearest(row: np.ndarray, k: int) -> np.ndarray:
    """The first k of a row in the order of (distance, index)."""
    within = np.flatnonzero(row <= np.partition(row, k - 1)[k - 1])
    return within[np.argsort(row[within], kind="stable")][:k]
