"""Retrieval against plain loops from the definitions, an example worked by hand, ties, and the memory it takes."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill import UserError
from jaxdistill.evaluators import retrieval
from jaxdistill.evaluators.retrieval import Rerank, evaluate

PUBLIC = {"mAP", "rank1", "rank5", "rank10", "mINP", "queries", "left_out"}


def case(seed, queries=12, gallery=60, identities=6, ties=False):
    """Random features around their identity, with junk, several cameras, identities of one side only; with ties small integers."""
    rng = np.random.default_rng(seed)
    size = queries + gallery
    label = rng.integers(-1, identities, size)
    if ties:
        features = rng.integers(0, 3, (size, 3)).astype(np.float32)
    else:
        features = (rng.normal(size=(identities + 1, 8))[label] + 0.8 * rng.normal(size=(size, 8))).astype(np.float32)
    features[-5:] = features[queries : queries + 5]  # the same picture twice, under whatever labels
    return features, label.astype(np.int32), rng.integers(0, 3, size).astype(np.int32), np.arange(size) >= queries


def distances(a, b, metric):
    a, b = a.astype(np.float64), b.astype(np.float64)
    if metric == "cosine":
        a, b = a / np.sqrt(np.sum(a * a)), b / np.sqrt(np.sum(b * b))
    return np.sum((a - b) ** 2)


def loop(table, query, gallery, label, camera):
    """The definition, one image at a time. table[i][j]: distance of query i to gallery image j."""
    found, left_out = [], 0
    for i, q in enumerate(query):
        ranking = [j for _, j in sorted((table[i][n], n) for n in range(len(gallery)))]
        right, precision, places, place = 0, [], [], 0
        for n in ranking:
            g = gallery[n]
            if label[g] == label[q] and camera[g] == camera[q]:
                continue
            place += 1
            if label[g] == label[q]:
                right += 1
                precision.append(right / place)
                places.append(place)
        if not places:
            left_out += 1
            continue
        found.append([sum(precision) / right, *(places[0] <= k for k in (1, 5, 10)), right / places[-1]])
    means = np.mean(found, axis=0)
    return dict(zip(("mAP", "rank1", "rank5", "rank10", "mINP"), means, strict=True)) | {"queries": len(found), "left_out": left_out}


def sides(label, gallery):
    return [[i for i in range(len(label)) if label[i] >= 0 and gallery[i] == side] for side in (False, True)]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("seed", range(20))
def test_every_figure_is_that_of_the_plain_loop(seed, metric):
    ties = seed % 4 == 3 and metric == "euclidean"
    features, label, camera, gallery = case(seed, ties=ties)
    query, shown = sides(label, gallery)
    table = [[distances(features[q], features[g], metric) for g in shown] for q in query]
    wanted = loop(table, query, shown, label, camera)
    found = evaluate(features, label, camera, gallery, metric=metric)
    assert set(found) == PUBLIC
    assert found == pytest.approx(wanted, rel=1e-12)


def rerank_loop(features, query, shown, metric, k1, k2, weight):
    """Zhong et al. by sets and dense vectors, one point at a time."""
    points = [*query, *shown]
    n = len(points)
    raw = np.array([[distances(features[a], features[b], metric) for b in points] for a in points])
    first = np.array([row / max(row) for row in raw])
    order = [sorted(range(n), key=lambda j, row=row: (row[j], j)) for row in raw]

    def mutual(i, k):
        return {j for j in order[i][: k + 1] if i in order[j][: k + 1]}

    encoded = np.zeros((n, n))
    for i in range(n):
        base = mutual(i, k1)
        grown = set(base)
        for j in base:
            more = mutual(j, round(k1 / 2))
            if len(more & base) > 2 / 3 * len(more):
                grown |= more
        for j in grown:
            encoded[i, j] = np.exp(-first[i, j])
        encoded[i] /= encoded[i].sum()
    encoded = np.array([np.mean([encoded[j] for j in order[i][:k2]], axis=0) for i in range(n)])
    table = np.zeros((len(query), len(shown)))
    for i in range(len(query)):
        for j in range(len(shown)):
            a, b = encoded[i], encoded[len(query) + j]
            jaccard = 1 - np.minimum(a, b).sum() / np.maximum(a, b).sum()
            table[i, j] = (1 - weight) * jaccard + weight * first[i, len(query) + j]
    return table


@pytest.mark.parametrize(("k1", "k2", "weight"), [(20, 6, 0.3), (5, 1, 0.1), (7, 3, 1.0), (3, 9, 0.5)])
@pytest.mark.parametrize("seed", range(5))
def test_reranking_is_that_of_the_plain_loop(seed, k1, k2, weight):
    features, label, camera, gallery = case(seed)
    metric = ("cosine", "euclidean")[seed % 2]
    query, shown = sides(label, gallery)
    table = rerank_loop(features, query, shown, metric, k1, k2, weight)
    x, y = (retrieval._points(features[which], metric) for which in (query, shown))
    np.testing.assert_allclose(np.concatenate(list(retrieval._reranked(x, y, Rerank(k1, k2, weight)))), table, rtol=1e-9, atol=1e-12)
    found = evaluate(features, label, camera, gallery, metric=metric, rerank=Rerank(k1, k2, weight))
    assert found == pytest.approx(loop(np.round(table, 12), query, shown, label, camera), rel=1e-12)


def test_an_example_by_hand():
    """One query at 0 of identity 1, camera 0. The ranking is x x 1 x 1, with the own camera's image and the junk passed over."""
    features = np.array([[0.0], [1], [2], [3], [4], [5], [6], [7]], np.float32)
    label = np.array([1, 1, 2, -1, 3, 1, 0, 1])
    camera = np.array([0, 0, 0, 1, 1, 1, 1, 2])
    found = evaluate(features, label, camera, np.arange(8) > 0, metric="euclidean")
    figures = {"mAP": (1 / 3 + 2 / 5) / 2, "rank1": 0, "rank5": 1, "rank10": 1, "mINP": 2 / 5}
    assert found == pytest.approx(figures | {"queries": 1, "left_out": 0})


def test_neither_the_order_of_the_gallery_nor_blocks_nor_junk_matter(monkeypatch):
    features, label, camera, gallery = case(1)
    features[-5:] += 0.01  # no ties
    order = np.random.default_rng(0).permutation(len(label))
    for rerank in (None, Rerank(6, 3)):
        whole = evaluate(features, label, camera, gallery, rerank=rerank)
        moved = evaluate(features[order], label[order], camera[order], gallery[order], rerank=rerank)
        assert moved == pytest.approx(whole, rel=1e-12)
        junk = np.where((label < 0)[:, None], np.float32(7), features)
        assert evaluate(junk, label, camera, gallery, rerank=rerank) == whole
        with monkeypatch.context() as patch:
            patch.setattr(retrieval, "HELD", 100)
            assert evaluate(features, label, camera, gallery, rerank=rerank) == pytest.approx(whole, rel=1e-12)


def test_equal_features_are_ranked_by_place_whatever_the_product_rounds():
    """A wide gallery of one vector, many times over: the match's place is its index, and no image of it is nearer."""
    vector = np.random.default_rng(0).normal(size=517).astype(np.float32)
    for size in (5, 97, 1003):
        for place in (0, 3, size - 1):
            label = np.where(np.arange(size + 1) - 1 == place, 1, 2)
            label[0] = 1
            found = evaluate(np.tile(vector, (size + 1, 1)), label, np.arange(size + 1), np.arange(size + 1) > 0)
            assert found["mAP"] == pytest.approx(1 / (place + 1))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from(["cosine", "euclidean"]))
def test_few_queries_scale_and_bounds(seed, queries, metric):
    features, label, camera, gallery = case(seed, queries=queries, gallery=25)
    label[:2], label[-1], camera[0], camera[-1] = 0, 0, 0, 1  # one query at least has a match
    found = evaluate(features, label, camera, gallery, metric=metric)
    assert found["queries"] + found["left_out"] == np.sum((label >= 0) & ~gallery)
    assert 0 < found["mAP"] <= 1
    assert 0 < found["mINP"] <= 1
    assert found["rank1"] <= found["rank5"] <= found["rank10"]
    assert evaluate(4 * features, label, camera, gallery, metric=metric) == pytest.approx(found)
    unknown = evaluate(features, label, np.full_like(camera, -1), gallery, metric=metric)
    assert unknown["left_out"] <= found["left_out"]


def test_queries_without_a_match_are_counted_and_if_there_is_no_other_it_is_an_error():
    features, label = np.eye(5, dtype=np.float32), np.array([0, 1, 2, 0, 3])
    gallery = np.array([False, False, False, True, True])
    found = evaluate(features, label, np.arange(5), gallery)
    assert (found["queries"], found["left_out"]) == (1, 2)
    for camera, labels in ((np.zeros(5, int), label), (np.arange(5), np.arange(5)), (np.arange(5), np.array([-1, 1, 2, -1, 3]))):
        with pytest.raises(UserError, match=r"found no match .* for any of .* accepted") as error:
            evaluate(features, labels, camera, gallery)
        assert "\n" not in str(error.value)


def test_reranking_of_a_collapsed_model_is_finite():
    _, label, camera, gallery = case(2)
    for features in (np.ones((72, 4), np.float32), np.zeros((72, 4), np.float32)):
        found = evaluate(features, label, camera, gallery, rerank=Rerank(4, 2))
        assert all(np.isfinite(value) for value in found.values())
        assert found == pytest.approx(evaluate(features, label, camera, gallery))


def test_features_that_are_not_finite_are_not_ranked():
    features, label, camera, gallery = case(0)
    features[20] = np.nan
    label[20] = 0
    assert all(np.isnan(value) for value in evaluate(features, label, camera, gallery).values())


def test_stacked_batches_give_the_same_without_their_padding():
    features, label, camera, gallery = case(3)
    flat = {"features": features, "label": label, "camera": camera, "gallery": gallery, "valid": np.ones(72, bool)}
    padded = {name: np.concatenate([array, array[:8]]) for name, array in flat.items()}
    padded["valid"][72:] = False
    padded["features"][72:] = np.nan
    stacked = {name: array.reshape(5, 16, *array.shape[1:]) for name, array in padded.items()}
    found = retrieval.finish(stacked, rerank=Rerank(5, 2))
    plain = evaluate(features, label, camera, gallery)
    again = evaluate(features, label, camera, gallery, rerank=Rerank(5, 2))
    figures = PUBLIC - {"queries", "left_out"}
    assert found == plain | {f"reranked_{name}": again[name] for name in figures}
    assert retrieval.finish(stacked, metric="euclidean") == evaluate(features, label, camera, gallery, metric="euclidean")


@pytest.mark.parametrize(("call", "named"), [
    (lambda: Rerank(k1=0), "rerank.k1"), (lambda: Rerank(k2=0), "rerank.k2"), (lambda: Rerank(weight=2.0), "rerank.weight"),
    (lambda: evaluate(*case(0), metric="manhattan"), "metric"),
])
def test_mistakes_are_one_line_with_what_is_accepted(call, named):
    with pytest.raises(UserError, match=rf"^{named}: found .*; accepted: [^\n]+$"):
        call()


def test_memory_is_linear_in_the_number_of_images():
    """4,000 x 4,000: all distances at once would be 128 MB, and the features are 4 MB."""
    script = """if True:
        import resource, numpy as np
        from jaxdistill.evaluators.retrieval import evaluate
        rng, n = np.random.default_rng(0), 4000
        features, label = rng.normal(size=(2 * n, 64)).astype(np.float32), rng.integers(0, 500, 2 * n)
        few = slice(0, None, 100)
        evaluate(features[few], label[few] % 3, np.arange(80), np.arange(80) >= 40)
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = peak()
        evaluate(features, label, np.arange(2 * n), np.arange(2 * n) >= n)
        print((peak() - before) / 1024)
    """
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 100  # MiB; two blocks of distances are 64
