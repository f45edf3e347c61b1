"""Procedural cities: what can be walked to from an address, told from a map with gaps and a survey of the neighbours.

Smooth fields (density, income, age, ...) say where services of each kind stand. People walk along a grid of streets. The target of an
address is how its walks divide among the kinds of services: p_k proportional to exp(-d_k / 200 m), where d_k is the walking distance to
the nearest of kind k. What is known of an address is itself and its neighbourhood, a square of a kilometre: demographics with noise, the
services that the map shows (`withheld` of them it does not, the others it places inexactly), and of some of the other addresses how often
their people were seen at each kind. Nothing known crosses the border of a neighbourhood, so that splitting by neighbourhood shares no
node between training and test.

Everything is drawn from (seed, city) by numpy's PCG64: the same numbers on every machine, but for the last bits of exp and cos.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

KINDS = ("school", "grocery", "pharmacy", "cafe", "bus stop", "park", "library", "clinic")
FIELDS = ("density", "income", "age", "students", "cars", "rent", "jobs", "children")
BUILDING = ("surveyed", "street spacing", "main street", "storeys", "floor area", "year built", "land value", "centre distance")
COLUMNS = (*KINDS, "address", *FIELDS, *(f"visits to {kind}" for kind in KINDS), *BUILDING)  # 33
EDGES = ("along", "across", "distance", "same street")  # lengths in units of WALK, in the frame of the streets
WALK = 200.0  # metres: what a walk is worth falls by e over them

SIDE, BLOCK = 4000.0, 1000.0  # metres: of a city, of a neighbourhood
BLOCKS = int(SIDE / BLOCK)
FARTHEST = 2 * BLOCK / WALK
DENSITY = (3.0, 4.0, 5.0, 6.0, 4.0, 5.0, 3.0, 6.0)  # services of each kind in a square kilometre
WAVES, LENGTH = 12, 2500.0  # a field is so many waves, of about this length in metres
PULL = 0.8  # how strongly the fields attract services
AGAIN = 6  # places that are drawn for one that a service takes
VISITS, SPREAD = 30.0, 0.8  # people that a survey met at an address: the median, and the deviation of their logarithm
FIELD_NOISE = 0.3  # of a demographic number, beside fields of deviation 1


@dataclasses.dataclass(frozen=True)
class CityConfig:
    """withheld: share of the services that the map does not show. jitter: metres by which it misplaces the others. surveyed: share of
    the addresses whose visits are known to their neighbours. neighbours: at most, the nearest."""

    cities: int = 40
    addresses: int = 30  # of a neighbourhood on the average, each a target
    neighbours: int = 32
    withheld: float = 0.5
    surveyed: float = 0.5
    jitter: float = 20.0
    seed: int = 0


class Stars(NamedTuple):
    """N star graphs over P nodes.

    x: float32 [N, 33], what is known of the target node (its own visits are not). target: float64 [N, 8]. group: int32 [N],
    the neighbourhood. nodes: float32 [P, 33]. index: int32 [N, M], the neighbours, nearest first; 0 where `mask` [N, M] is False.
    edges: float32 [N, M, 4]. distance: float64 [N, 8] metres, which no model sees. node_group: int32 [P]."""

    x: np.ndarray
    target: np.ndarray
    group: np.ndarray
    nodes: np.ndarray
    index: np.ndarray
    edges: np.ndarray
    mask: np.ndarray
    distance: np.ndarray
    node_group: np.ndarray


def draw(config: CityConfig) -> Stars:
    """All cities, one after another: city i is the same whatever their number."""
    found = [_city(config, i) for i in range(config.cities)]
    starts = np.cumsum([0, *(len(city.nodes) for city in found)])
    placed = (
        city._replace(
            group=city.group + i * BLOCKS**2, node_group=city.node_group + i * BLOCKS**2,
            index=np.where(city.mask, city.index + np.int32(start), 0),
        )
        for i, (city, start) in enumerate(zip(found, starts, strict=False))
    )  # fmt: skip
    return Stars(*map(np.concatenate, zip(*placed, strict=True)))


def flatten(x: np.ndarray, neighbours: np.ndarray, edges: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A star as one row, for models that read rows: float64 [N, 33 + 33 + 4 + 8]. What is known of the target, the means over its
    neighbours and over its edges, and the walking distance to the nearest service of each kind that the map shows (where it shows none,
    as far as a neighbourhood is wide both ways): with every service on the map and no error, softmax regression on it would be exact."""
    there, count = mask[..., None], np.maximum(mask.sum(1), 1)[:, None]
    means = [np.where(there, each, 0.0).sum(1, dtype=np.float64) / count for each in (neighbours, edges)]
    walk = np.abs(edges[..., :2]).sum(-1, dtype=np.float64)
    kind = there & (neighbours[..., : len(KINDS)] > 0)
    nearest = np.where(kind, walk[..., None], FARTHEST).min(1, initial=FARTHEST)
    return np.concatenate([x.astype(np.float64), *means, nearest], axis=1)


def _city(config: CityConfig, number: int) -> Stars:
    rng = np.random.default_rng((config.seed, number))
    fields, turn, spacing = _fields(rng), _rotation(rng.uniform(0, np.pi / 2)), rng.uniform(80, 160)

    def on_street(places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(places in the frame of the streets, moved to the nearest one of a direction drawn; that direction; the street's number)."""
        turned, way, rows = places @ turn, rng.integers(0, 2, len(places)), np.arange(len(places))
        street = np.rint(turned[rows, way] / spacing)
        turned[rows, way] = street * spacing
        return turned, way, street

    kinds = np.repeat(np.arange(len(KINDS)), [round(density * (SIDE / 1000) ** 2) for density in DENSITY])
    services = np.concatenate([_attracted(rng, fields, kind, int((kinds == kind).sum())) for kind in range(len(KINDS))])
    stand, *service_street = on_street(services)
    live, *address_street = on_street(rng.uniform(0, SIDE, (config.addresses * BLOCKS**2, 2)))
    homes = live @ turn.T
    distance = np.stack([_nearest(live, stand[kinds == kind]) for kind in range(len(KINDS))], axis=1)
    target = np.exp(-(distance - distance.min(1, keepdims=True)) / WALK)
    target /= target.sum(1, keepdims=True)

    shown = np.flatnonzero(rng.random(len(services)) >= config.withheld)
    x = np.zeros((len(homes), len(COLUMNS)), np.float32)
    x[:, len(KINDS)] = 1
    x[:, 9:17] = fields(homes) + FIELD_NOISE * rng.normal(size=(len(homes), len(FIELDS)))
    x[:, 26:] = _building(rng, fields, homes, address_street, spacing)
    asked = rng.random(len(homes)) < config.surveyed
    people = VISITS * np.exp(SPREAD * rng.normal(size=len(homes)))
    seen = x.copy()
    seen[:, 17:25] = np.where(asked[:, None], rng.poisson(people[:, None] * target), 0)
    seen[:, 25] = asked
    known = np.zeros((len(shown), len(COLUMNS)), np.float32)
    known[np.arange(len(shown)), kinds[shown]] = 1
    known[:, 9:17] = fields(services[shown]) + FIELD_NOISE * rng.normal(size=(len(shown), len(FIELDS)))

    places = np.concatenate([live, stand[shown] + config.jitter * rng.normal(size=(len(shown), 2))])
    streets = np.stack([np.concatenate([a, b[shown]]) for a, b in zip(address_street, service_street, strict=True)], axis=1)
    node_group = _block(np.concatenate([homes, services[shown]]))
    index, edges, mask = _stars(places, streets, node_group, len(homes), config.neighbours)
    return Stars(x, target, node_group[: len(homes)], np.concatenate([seen, known]), index, edges, mask, distance, node_group)


def _fields(rng: np.random.Generator):
    """places [n, 2] in metres -> [n, fields], each a sum of waves, with mean 0 and deviation 1."""
    waves = rng.normal(size=(2, len(FIELDS) * WAVES)) * (2 * np.pi / LENGTH)
    phase, height = rng.uniform(0, 2 * np.pi, len(FIELDS) * WAVES), rng.normal(size=len(FIELDS) * WAVES) * np.sqrt(2 / WAVES)

    def fields(places: np.ndarray) -> np.ndarray:
        return (height[None] * np.cos(places @ waves + phase[None])).reshape(len(places), len(FIELDS), WAVES).sum(-1)

    return fields


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _attracted(rng: np.random.Generator, fields, kind: int, count: int) -> np.ndarray:
    """`count` places where the fields call for services of this kind, which is the same call in every city."""
    taste = PULL * np.random.default_rng((7, kind)).normal(size=len(FIELDS))
    places = rng.uniform(0, SIDE, (AGAIN * count, 2))
    score = fields(places) @ taste + rng.gumbel(size=len(places))  # the best of them: a draw without replacement by exp(fields . taste)
    return places[np.argsort(-score, kind="stable")[:count]]


def _nearest(here: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Walking distance from each place to the nearest of the others: along one direction of the streets, then along the other."""
    from scipy.spatial import cKDTree

    return cKDTree(there).query(here, p=1)[0]


def _building(rng: np.random.Generator, fields, homes: np.ndarray, street: list[np.ndarray], spacing: float) -> np.ndarray:
    """[n, 7]: what BUILDING names after "surveyed"."""
    local, noise = fields(homes), rng.normal(size=(len(homes), 4))
    centre = np.hypot(*(homes - SIDE / 2).T) / 1000
    return np.stack([
        np.full(len(homes), spacing), street[1] % 5 == 0, np.exp(1.0 + 0.4 * local[:, 0] + 0.3 * noise[:, 0]),
        90 * np.exp(0.3 * local[:, 1] + 0.3 * noise[:, 1]), 1960 + 12 * local[:, 2] + 15 * noise[:, 2],
        local[:, 1] + local[:, 5] - 0.3 * centre + 0.5 * noise[:, 3], centre,
    ], axis=1)  # fmt: skip


def _block(places: np.ndarray) -> np.ndarray:
    column, row = np.clip((places // BLOCK).astype(np.int32), 0, BLOCKS - 1).T  # a street may lie just beyond the edge
    return column * np.int32(BLOCKS) + row


def _stars(places, streets, groups, targets: int, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(index, edges, mask) of the first `targets` nodes: the nearest `most` others of the same neighbourhood."""
    index, mask = np.zeros((targets, most), np.int32), np.zeros((targets, most), bool)
    edges = np.zeros((targets, most, len(EDGES)), np.float32)
    for group in np.unique(groups[:targets]):
        around = np.flatnonzero(groups == group)
        for chunk in np.array_split(mine := around[around < targets], -(-len(mine) // 256)):
            offset = places[around][None] - places[chunk][:, None]
            length = np.where(around[None] == chunk[:, None], np.inf, np.hypot(offset[..., 0], offset[..., 1]))
            order = np.argsort(length, axis=1, kind="stable")[:, : min(most, len(around) - 1)]
            near = np.take_along_axis(length, order, axis=1)
            same = (streets[around][order] == streets[chunk][:, None]).all(-1)
            width = order.shape[1]
            index[chunk, :width], mask[chunk, :width] = around[order], True
            along = np.take_along_axis(offset, order[..., None], axis=1) / WALK
            edges[chunk, :width] = np.concatenate([along, near[..., None] / WALK, same[..., None]], axis=-1)
    return index, edges, mask
