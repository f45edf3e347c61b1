"""Label distributions: what to read, what is refused in it, how it is split.

`load` checks every number, splits so that groups (neighbourhoods, subjects) stay whole, and gives RAW values: what is fitted on the
training split (the scaler) is the recipe's to keep.
"""

import dataclasses
import functools
import logging
import math

import numpy as np

from jaxdistill import UserError
from jaxdistill.data import cache, cities, distribution_checks, distribution_files

logger = logging.getLogger(__name__)

SOURCES = ("cities", *distribution_files.SOURCES)
# Keys of some sources only: with another they would be silently without effect.
ONLY = {
    **dict.fromkeys(("cities", "addresses", "neighbours", "withheld", "surveyed", "jitter"), ("cities",)),
    **dict.fromkeys(("target", "features", "group"), ("table", "votes")), **dict.fromkeys(("inputs", "drop_single", "reject"), ("votes",)),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DistributionConfig:
    """The section `data`. Hashable: `load` remembers what it loaded."""

    source: str = "cities"  # cities | table | votes | mat
    path: str = ""  # a file, of the sources that read one
    test: float = 0.2  # share of the groups (of the rows, where there are none) that are the test; of a file that does not split itself
    validation: float = 0.1  # share of the others that choose; 0: no validation split
    validation_fold: int = 0  # which such share, counted from 0: with a validation of 0.2 there are five
    folds: int = 0  # the test is one of so many parts instead of a share (k-fold cross-validation); 0: a share
    fold: int = 0  # which of them, counted from 0; -1: that of the run's seed
    seed: int = 0  # of the drawing of cities and of splits: the data set, not the run
    tolerance: float = 1e-3  # by which the sum of a distribution may differ from 1; it is then divided by it
    # table and votes
    target: tuple = ()  # columns that hold the distribution (the votes; (): the eight emotions of FER+); of files with named columns
    features: tuple = ()  # columns that are inputs; (): all others
    group: str = ""  # column, or array of an .npz, that tells what belongs together; "": an array `group`, where an .npz has one
    # votes
    inputs: str = ""  # another .csv that holds the inputs, row for row
    drop_single: bool = False  # a class with one vote has none (FER+)
    reject: tuple = ()  # columns of votes for no class: a row where one of them has the most is left out
    # cities
    cities: int = 40
    addresses: int = 30  # of a neighbourhood, on the average
    neighbours: int = 32  # of an address, at most
    withheld: float = 0.5  # share of the services that the map does not show
    surveyed: float = 0.5  # share of the addresses whose visits their neighbours know
    jitter: float = 20.0  # metres by which the map misplaces services

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if not (type(value) is kind or (kind is float and type(value) is int)):
                self.refuse(field.name, kind.__name__)
        if self.source not in SOURCES:
            self.refuse("source", " | ".join(SOURCES))
        if bool(self.path) == (self.source == "cities"):
            self.refuse("path", "none with data.source 'cities'" if self.path else f"a file with data.source {self.source!r}")
        for name, sources in ONLY.items():
            if self.source not in sources and getattr(self, name) != getattr(type(self), name):
                self.refuse(name, f"{getattr(type(self), name)!r} with data.source {self.source!r}; it is of {' and '.join(sources)}")
        shares = int(1 / self.validation + 1e-9) if self.validation else 1
        for name, least, most in (
            ("test", 0, 0.9), ("validation", 0, 0.9), ("validation_fold", 0, max(shares - 1, 0)), ("folds", 0, math.inf),
            ("fold", -1, max(self.folds - 1, 0)), ("seed", 0, 2**31 - 1),
            ("tolerance", 0, 0.1), ("cities", 1, 10_000), ("addresses", 2, 10_000), ("neighbours", 1, 512), ("withheld", 0, 1),
            ("surveyed", 0, 1), ("jitter", 0, 1000),
        ):  # fmt: skip
            if not least <= getattr(self, name) <= most:
                self.refuse(name, f"{least} or more" if most == math.inf else f"{least} to {most}")
        if self.folds == 1:
            self.refuse("folds", "0, or 2 or more")
        for name in ("target", "features", "reject"):
            if any(type(value) is not str for value in getattr(self, name)):
                self.refuse(name, "names of columns")

    def refuse(self, name: str, accepted: str):
        raise UserError(f"config key data.{name}: found {getattr(self, name)!r}; accepted: {accepted}")


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """One split. rows: arrays [N, ...]: x, target, group, and of graphs index, edges, mask. nodes: float32 [P, F], which `index` is into,
    or None."""

    rows: dict[str, np.ndarray]
    nodes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows["x"])

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """int [B] -> {"x": float32 [B, F], "target": float32 [B, K], sums 1, "group": int32 [B]} and of graphs "neighbours": float32
        [B, M, F], "edges": float32 [B, M, E], "mask": bool [B, M]; 0 where there is no neighbour. Raw values."""
        found = {name: values[indices] for name, values in self.rows.items()}
        if self.nodes is not None:
            found["neighbours"] = np.where(found["mask"][..., None], self.nodes[found.pop("index")], np.float32(0))
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class DistributionSet:
    """Distributions, ready to train on.

    Attributes:
      splits: "train", "validation" (unless data.validation is 0 and the file has none), "test" -> Split.
      classes, columns: names of the K classes and of the F inputs that are left.
      width: F. edge_width, neighbours: E and M of graphs, 0 of tables.
      facts: JSON-able identity and size of what was read, and what was left out of it.
    """

    splits: dict[str, Split]
    classes: tuple[str, ...]
    columns: tuple[str, ...]
    width: int
    edge_width: int
    neighbours: int
    facts: dict


@functools.lru_cache(maxsize=16)  # the runs of one job share a set, or one of each fold
def load(config: DistributionConfig, seed: int = 0) -> DistributionSet:
    """Reads, checks and splits. seed: the run's, which chooses the fold where data.fold is -1.

    Raises:
      UserError: whatever of the user's does not fit, in one line."""
    if config.fold < 0:
        if not config.folds:
            config.refuse("fold", "0 or more without data.folds")
        config = dataclasses.replace(config, fold=seed % config.folds)
    found = _cities(config) if config.source == "cities" else _table(config)
    logger.info("data: %s", ", ".join(f"{name} {len(split)}" for name, split in found.splits.items()))
    return found


def features(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """A split as rows, for floors: (float64 [N, W], target float64 [N, K]). A table is itself, a star `cities.flatten`."""
    if split.nodes is None:
        return split.rows["x"].astype(np.float64), split.rows["target"].astype(np.float64)
    chunks = [split.take(np.arange(at, min(at + 4096, len(split)))) for at in range(0, len(split), 4096)]
    flat = [cities.flatten(*(chunk[name] for name in ("x", "neighbours", "edges", "mask"))) for chunk in chunks]
    return np.concatenate(flat), split.rows["target"].astype(np.float64)


def moments(split: Split) -> dict[str, dict[str, np.ndarray]]:
    """{"x": {"mean", "std"}} float32 [F], of graphs also of "neighbours" and "edges", of those that there are; a column that is the same
    everywhere has the std 1."""
    values = {"x": split.rows["x"]}
    if split.nodes is not None:
        mask = split.rows["mask"]
        values |= {"neighbours": split.nodes[split.rows["index"][mask]], "edges": split.rows["edges"][mask]}
    return {name: dict(zip(("mean", "std"), distribution_checks.moments(each), strict=True)) for name, each in values.items()}


def joined(first: Split, second: Split) -> Split:
    """Both, one after the other; `first` bool [B] tells which of them a row is of."""
    rows = {name: np.concatenate([first.rows[name], second.rows[name]]) for name in first.rows}
    return Split(rows | {"first": np.arange(len(rows["x"])) < len(first)}, first.nodes)


def describe(batch: dict[str, np.ndarray], classes: tuple[str, ...], rows: int = 8) -> str:
    """A batch for people: its shape, and of the first rows the group, the neighbours, and the classes by probability."""
    x, target = batch["x"], batch["target"]
    graph = f", graphs of up to {batch['mask'].shape[1]} neighbours" if "mask" in batch else ""
    lines = [f"{len(x)} rows of {x.shape[1]} inputs, values {x.min():g} to {x.max():g}{graph}, {batch['valid'].sum()} valid"]
    for i in range(min(rows, len(x))):
        order = np.argsort(-target[i], kind="stable")[:4]
        near = f", {batch['mask'][i].sum()} neighbours" if "mask" in batch else ""
        likeliest = ", ".join(f"{classes[k]} {target[i, k]:.3f}" for k in order)
        lines.append(f"row {batch['row'][i]}: group {batch['group'][i]}{near}: {likeliest}")
    return "\n".join(lines) + "\n"


# -- sources ------------------------------------------------------------------------------------------------------------------


def _cities(config: DistributionConfig) -> DistributionSet:
    names = [field.name for field in dataclasses.fields(cities.CityConfig)]
    stars = cities.draw(cities.CityConfig(**{name: getattr(config, name) for name in names}))
    parts = distribution_checks.split(config, "data.source 'cities'", len(stars.x), stars.group, None)
    rows = {name: getattr(stars, name) for name in ("x", "group", "index", "edges", "mask")} | {"target": stars.target.astype(np.float32)}
    splits = {part: Split({name: values[at] for name, values in rows.items()}, stars.nodes) for part, at in parts.items()}
    drawn = cache.key("cities 1", *(f"{name} {getattr(config, name)}" for name in names))  # not of the numbers: their last bits may differ
    return DistributionSet(splits, cities.KINDS, cities.COLUMNS, len(cities.COLUMNS), len(cities.EDGES), config.neighbours,
                           _facts(config, splits, drawn))  # fmt: skip


def _table(config: DistributionConfig) -> DistributionSet:
    found = distribution_files.SOURCES[config.source](config)
    target = distribution_checks.distributions(found, config.tolerance)
    distribution_checks.finite(found)
    if any(found.dropped.values()):
        logger.warning("data: rows left out: %d without votes, %d with most of them for no class", *found.dropped.values())
    parts = distribution_checks.split(config, found.where, len(found.x), found.group, found.part)
    varies = distribution_checks.varying(found, parts["train"])
    x, columns = found.x[:, varies], tuple(name for name, kept in zip(found.columns, varies, strict=True) if kept)
    group = np.arange(len(x)) if found.group is None else np.unique([str(name) for name in found.group.tolist()], return_inverse=True)[1]
    rows = {"x": x.astype(np.float32), "target": target.astype(np.float32), "group": group.astype(np.int32)}
    splits = {part: Split({name: values[at] for name, values in rows.items()}) for part, at in parts.items()}
    content = cache.key(*(np.ascontiguousarray(values).tobytes() for values in rows.values()), *columns, *found.classes)
    facts = _facts(config, splits, content) | found.dropped | {
        "constant": [name for name in found.columns if name not in columns],
        "far": distribution_checks.far(x, columns, parts, found.row), "copies": distribution_checks.copies(rows["x"], parts),
    }  # fmt: skip
    return DistributionSet(splits, found.classes, columns, x.shape[1], 0, 0, facts)


def _facts(config: DistributionConfig, splits: dict[str, Split], content: str) -> dict:
    def of(group: np.ndarray) -> dict:
        return {"rows": len(group), "groups": len(np.unique(group)), "sha256": cache.key(content, group.tobytes())}

    return {"source": config.source, "splits": {part: of(split.rows["group"]) for part, split in splits.items()}}
