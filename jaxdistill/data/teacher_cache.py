"""What a teacher says, on disk: it runs once, and training reads it with no teacher in memory.

    DIR/manifest.json      what the cache was made from, its tables, their shards with sizes and checksums; written last
    DIR/shards/            (data.shards) one table a split, by row number, and `constants`: what all rows share

Formats, of the split that trains; what is only measured on is always `hidden` (of a classifier `logits`), so that a metric means the same
whatever trains:
    hidden    the teacher's last states: with its head, which is in `constants`, exact at any temperature
    topk      the k likeliest ids with their log-probabilities, and the log of what all others weigh at some temperatures
    sampled   ids drawn of the teacher's distribution, with weights with which every sum over it is unbiased
    logits    of a classifier, for each view of an example
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdistill import UserError, read_json
from jaxdistill.data import shards
from jaxdistill.lock import only_writer

VERSION = 1
MANIFEST, BEGUN = "manifest.json", "begun.json"
FORMATS = ("hidden", "topk", "sampled", "logits")
DTYPES = ("float32", "bfloat16", "float16")
USED = {"k": ("topk",), "samples": ("sampled",), "draws": ("sampled",), "gamma": ("sampled",), "temperatures": ("topk", "sampled"),
        "seed": ("sampled", "logits")}  # option -> the formats that it counts in  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """How a teacher is stored, as the command's flags say it.

    format: "": hidden of a language model, logits of a classifier. dtype: of states, log-probabilities or logits (""; bfloat16,
    float16, float32). k: of topk. samples, draws, gamma: of sampled: ids for each token, how often they are drawn (epochs take the
    draws in turn), and the power of the teacher's probabilities by which. temperatures: of topk, at which the others are weighed; of
    sampled one, at which is drawn; (): that of kd.temperature. views: of augmented images: how many each is stored in, taken in
    turn. seed: of draws and views."""

    format: str = ""
    dtype: str = ""
    k: int = 64
    samples: int = 12
    draws: int = 1
    gamma: float = 1.0
    temperatures: tuple[float, ...] = ()
    views: int = 1
    seed: int = 0

    def __post_init__(self):
        for name, accepted in (("format", ("", *FORMATS)), ("dtype", ("", *DTYPES))):
            if getattr(self, name) not in accepted:
                raise UserError(f"--{name}: found {getattr(self, name)!r}; accepted: {', '.join(one or repr(one) for one in accepted)}")
        for name in ("k", "samples", "draws", "views"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}: found {getattr(self, name)}; accepted: 1 or more")
        if not 0 < self.gamma < math.inf:
            raise UserError(f"--gamma: found {self.gamma}; accepted: a number above 0")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"--seed: found {self.seed}; accepted: 0 or more, and below 2^31")
        if not all(0 < t < math.inf for t in self.temperatures):
            raise UserError(f"--temperatures: found {self.temperatures}; accepted: numbers above 0")

    def check_used(self) -> None:
        """Refuses an option that the format, which is chosen by now, would ignore."""
        for name, formats in USED.items():
            found, default = getattr(self, name), getattr(Options, name)
            if found != default and self.format not in formats:
                raise UserError(f"--{name}: found {found} with --format={self.format}; accepted: {default}, or "
                                f"--format={' or '.join(formats)}")


class Table(NamedTuple):
    """A table to write. make: (span of row numbers) -> {field: [rows, ...]}, the same whenever it is asked."""

    layout: shards.Layout
    rows: int
    make: Callable[[range], Mapping]


def write(folder: Path, made: dict, tables: dict[str, Table], *, machine: dict, step: int = 1, save: Callable = lambda folder: None,
          say=print) -> dict:
    """The cache of `tables` in `folder`, or the rest of it; returns its manifest.

    Killed at any moment and called again, it writes the same bytes as if it had not been. made: JSON, what the cache is made from; a
    folder in which another cache stands, or was begun, is refused. machine: JSON, packages and devices: an unfinished cache is
    finished with the same, as others round otherwise. step: a shard holds a multiple of so many rows. save: (folder) -> what readers
    need beside the tables."""
    folder = Path(folder)
    made, machine = _plain(made), _plain(machine)
    with only_writer(folder / ".lock", f"the cache in {folder}"):
        if (folder / MANIFEST).exists():
            found = _manifest(folder)
            _same(folder, found["made"], made, "a cache")
            return found
        if (folder / BEGUN).exists():
            found = read_json(folder / BEGUN)
            _same(folder, found.get("made", {}), made, "an unfinished cache")
            _same(folder, found.get("machine", {}), machine, "an unfinished cache")
        else:
            _write_json(folder / BEGUN, {"made": made, "machine": machine})
        save(folder)
        told = {}
        for name, table in tables.items():
            writer = shards.Writer(folder / "shards", name, table.layout, table.rows, step=step, size=shards.BYTES)
            kept = []
            for number in range(len(writer)):
                span = writer.span(number)
                there = writer.done(number)
                kept.append(there or writer.put(number, table.make(span)))
                say(f"{name}: {span.stop:,} of {table.rows:,} rows{' (already there)' * bool(there)}")
            told[name] = {"rows": table.rows, "per": writer.per, "fields": table.layout.fields, "shards": kept}
        manifest = _plain({"version": VERSION, "made": made, "tables": told, "machine": machine})
        _write_json(folder / MANIFEST, manifest | {"sha256": digest(manifest)})
        (folder / BEGUN).unlink(missing_ok=True)
    return _manifest(folder)


class Cache:
    """A finished cache in `folder`, which the config key `key` names. UserError where there is none.

    made: what it was made from. digest: of its manifest, hence of its contents: two of the same digest say the same."""

    def __init__(self, folder: str | Path, key: str = "teacher.cache"):
        self.folder, self.key = Path(folder).expanduser().absolute(), key
        accepted = "accepted: a folder that python -m jaxdistill.cache has filled"
        if not (self.folder / MANIFEST).is_file():
            begun = (self.folder / BEGUN).is_file()
            found = "an unfinished cache (the command that began it goes on with it)" if begun else f"no {MANIFEST}"
            raise UserError(f"config key {key}: found {found} in {folder}; {accepted}")
        manifest = _manifest(self.folder)
        if manifest["version"] != VERSION:
            raise UserError(f"config key {key}: found version {manifest['version']} in {folder}; accepted: {VERSION}")
        self.made, self.digest, self._tables = manifest["made"], manifest["sha256"], {}
        for name, table in manifest["tables"].items():
            layout = shards.Layout.from_json(table["fields"])
            files = [shards.Shard(*shard) for shard in table["shards"]]
            self._tables[name] = shards.Reader(self.folder / "shards", layout, table["rows"], table["per"], files)

    def check(self, wanted: dict) -> None:
        """Refuses the cache where it was made from anything else than `wanted` says, in the order of its keys."""
        for name, found, accepted in differences(self.made, _plain(wanted)):
            raise UserError(f"config key {self.key}: found {name} {_short(found)} in {self.folder}; accepted: {_short(accepted)}, as here")

    def rows(self, split: str, index: np.ndarray, epoch: np.ndarray) -> dict[str, np.ndarray]:
        """What is stored of the rows `index` [B], each as `cached_FIELD` [B, ...]: of several draws or views of a row, epoch int
        [B] takes them in turn. Rows past the end are zeros."""
        if split not in self._tables:
            raise UserError(f"config key {self.key}: found no split {split!r} in {self.folder}; accepted: {', '.join(self._tables)}")
        return {f"cached_{name}": array for name, array in self._tables[split].take(index, epoch).items()}

    def fields(self, split: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Of a split's rows as `rows` gives them: field -> (dtype, shape)."""
        return {name: (dtype, shape[1:]) for name, dtype, shape in self._tables[split].layout.fields}

    def constants(self) -> dict[str, np.ndarray]:
        """What all rows share."""
        return {name: array[0] for name, array in self._tables["constants"].take([0]).items()} if "constants" in self._tables else {}


def differences(found: Any, wanted: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, what is found, what is wanted) of each key of `wanted` at which `found` holds something else."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key, value in wanted.items():
            yield from differences(found.get(key, "nothing"), value, f"{path}.{key}" if path else key)
    elif found != wanted:
        yield path, found, wanted


def digest(value: Any) -> str:
    """sha256 (hex) of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _same(folder: Path, found: dict, wanted: dict, what: str) -> None:
    for name, there, now in (*differences(found, wanted), *((n, t, w) for n, w, t in differences(wanted, found))):
        raise UserError(f"{folder}: found {what} of {name} {_short(there)}, and {_short(now)} is asked for; accepted: the same, or another "
                        "--workdir")


def _manifest(folder: Path) -> dict:
    found = read_json(folder / MANIFEST)
    if "tables" not in found:  # a run has a file of that name too
        raise UserError(f"{folder / MANIFEST}: found no teacher cache's; accepted: a folder that python -m jaxdistill.cache has filled")
    seal = found.get("sha256")
    if digest({key: value for key, value in found.items() if key != "sha256"}) != seal:
        raise UserError(f"{folder / MANIFEST}: found contents that do not match their sha256; accepted: the file as it was written")
    return found


def _write_json(path: Path, value: dict) -> None:
    temporary = path.with_name(f".{path.name}.unfinished")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        shards.sync(file)
    shards.replace(temporary, path)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 64 else f"{text[:61]}..."
