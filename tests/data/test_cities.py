"""Procedural cities: what is drawn is what the words say, and it is worth learning."""

import dataclasses

import numpy as np
import pytest

from jaxdistill.data import cities
from jaxdistill.evaluators import floors

SMALL = cities.CityConfig(cities=3, addresses=6, neighbours=8)


@pytest.fixture(scope="module")
def stars():
    return cities.draw(SMALL)


def neighbours(stars):
    return np.where(stars.mask[..., None], stars.nodes[stars.index], 0)


def test_shapes_and_types(stars):
    n, p = 3 * 16 * 6, len(stars.nodes)
    assert stars.x.shape == (n, 33) == (n, len(cities.COLUMNS))
    assert stars.target.shape == stars.distance.shape == (n, 8)
    assert stars.index.shape == stars.mask.shape == (n, 8)
    assert stars.edges.shape == (n, 8, 4) == (n, 8, len(cities.EDGES))
    assert (stars.x.dtype, stars.nodes.dtype, stars.edges.dtype, stars.index.dtype) == (np.float32, np.float32, np.float32, np.int32)
    assert np.isin(stars.group, range(48)).all()
    assert len(np.unique(stars.group)) > 40
    assert stars.node_group.shape == (p,)
    assert all(np.isfinite(each).all() for each in (stars.x, stars.nodes, stars.edges, stars.target))


def test_the_target_is_what_a_walk_is_worth(stars):
    worth = np.exp(-stars.distance / 200)
    np.testing.assert_allclose(stars.target, worth / worth.sum(1, keepdims=True), rtol=1e-12)
    assert stars.distance.min() >= 0
    assert 100 < np.median(stars.distance) < 500


def test_the_same_again_and_of_another_seed_another():
    again, other = cities.draw(SMALL), cities.draw(dataclasses.replace(SMALL, seed=1))
    more = cities.draw(dataclasses.replace(SMALL, cities=4))
    first = cities.draw(SMALL)
    for name in ("x", "target", "group", "nodes", "index", "edges", "mask"):
        a, b, c = (getattr(each, name) for each in (first, again, more))
        np.testing.assert_array_equal(a, b, err_msg=name)
        np.testing.assert_array_equal(a, c[: len(a)], err_msg=name)  # a city is the same whatever their number
    assert np.abs(first.target - other.target).max() > 0.1


def test_nothing_crosses_the_border_of_a_neighbourhood(stars):
    """A neighbour, and so every node that a target sees, is of its own neighbourhood; the target itself is not among them."""
    rows, places = np.nonzero(stars.mask)
    assert (stars.node_group[stars.index[rows, places]] == stars.group[rows]).all()
    assert (stars.edges[rows, places, 2] > 0).all()
    seen = {group: set(stars.index[(stars.group == group)[:, None] & stars.mask].tolist()) for group in range(48)}
    assert sum(len(nodes) for nodes in seen.values()) == len(set().union(*seen.values()))


def test_edges_are_what_lies_between(stars):
    along, across, length, same = np.moveaxis(stars.edges[stars.mask].astype(np.float64), -1, 0)
    np.testing.assert_allclose(np.hypot(along, across), length, rtol=1e-5)
    assert (np.diff(np.where(stars.mask, stars.edges[..., 2], np.inf), axis=1)[stars.mask[:, 1:]] >= 0).all()  # the nearest first
    assert (stars.edges[~stars.mask] == 0).all()
    assert 0.005 < same.mean() < 0.3


def test_what_a_node_tells(stars):
    """Services have a kind and no visits; addresses that were asked have visits; a target's own are not told."""
    kind, visits = stars.nodes[:, :8].sum(1), stars.nodes[:, 17:25]
    address, asked = stars.nodes[:, 8] == 1, stars.nodes[:, 25] == 1
    np.testing.assert_array_equal(kind, ~address)
    assert not visits[~asked].any()
    assert visits[asked].sum(1).mean() > 20
    assert (visits == np.rint(visits)).all()
    assert not stars.x[:, 17:26].any()
    assert (stars.x[:, 8] == 1).all()
    assert 0.4 < asked[address].mean() < 0.6


def test_what_is_withheld(stars):
    total = 3 * sum(round(density * 16) for density in cities.DENSITY)
    services = lambda drawn: int((drawn.nodes[:, 8] == 0).sum())  # noqa: E731
    assert 0.4 < services(stars) / total < 0.6
    everything = cities.draw(dataclasses.replace(SMALL, withheld=0.0, surveyed=0.0, jitter=0.0))
    assert services(everything) == total
    assert services(cities.draw(dataclasses.replace(SMALL, withheld=1.0))) == 0
    np.testing.assert_array_equal(everything.group, stars.group)


def test_walks_are_along_the_streets():
    """With every service on the map and in its place, the nearest one that is seen is the nearest there is, unless it lies beyond the
    border: then, and only then, it is nearer than what is seen."""
    drawn = cities.draw(cities.CityConfig(cities=1, addresses=4, neighbours=200, withheld=0.0, jitter=0.0))
    near = cities.flatten(drawn.x, neighbours(drawn), drawn.edges, drawn.mask)[:, -8:] * cities.WALK
    seen = near < 2000
    assert (near >= drawn.distance - 1e-2)[seen].all()
    assert 0.6 < np.isclose(near, drawn.distance, atol=1e-2).mean() < 1


def test_flattening_ignores_order_and_padding(stars):
    near = neighbours(stars)
    flat = cities.flatten(stars.x, near, stars.edges, stars.mask)
    assert flat.shape == (len(stars.x), 33 + 33 + 4 + 8)
    turned = [each[:, ::-1] for each in (near, stars.edges, stars.mask)]
    np.testing.assert_allclose(cities.flatten(stars.x, *turned), flat, rtol=1e-9, atol=1e-9)
    wider = [np.concatenate([each, np.full_like(each[:, :2], 7)], axis=1) for each in (near, stars.edges)]
    more = np.concatenate([stars.mask, np.zeros((len(flat), 2), bool)], axis=1)
    np.testing.assert_allclose(cities.flatten(stars.x, *wider, more), flat, rtol=1e-9)
    alone = cities.flatten(stars.x, near, stars.edges, np.zeros_like(stars.mask))
    assert (alone[:, -8:] == 10).all()
    assert not alone[:, 33:-8].any()


def test_distance_alone_does_not_give_the_answer_away():
    """Linear and nearest-neighbour floors are right in 20 to 80 %, also on the distances alone, and both above a constant. Were all
    services on the map, the distances would say more."""

    def score(drawn, columns=slice(None), fit=floors.softmax_regression):
        flat, held = cities.flatten(drawn.x, neighbours(drawn), drawn.edges, drawn.mask)[:, columns], drawn.group % 4 == 0
        scale = floors.standardiser(flat[~held])
        predicted = fit(scale(flat[~held]), drawn.target[~held])(scale(flat[held]))
        return float(np.mean(predicted.argmax(1) == drawn.target[held].argmax(1)))

    drawn = cities.draw(cities.CityConfig(cities=4))
    linear, nearest, distance = score(drawn), score(drawn, fit=floors.nearest), score(drawn, slice(-8, None))
    constant = score(drawn, fit=floors.mean_target)
    assert constant < 0.25 < nearest < linear < 0.8
    assert 0.2 < distance < 0.6
    shown = cities.draw(cities.CityConfig(cities=4, neighbours=64, withheld=0.0, jitter=0.0))
    assert score(shown, slice(-8, None)) > distance + 0.05
