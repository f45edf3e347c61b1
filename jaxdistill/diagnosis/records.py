"""A workdir as records: of each run its config, manifest and row, and what it logged as columns of numbers.

Works on a running, finished or crashed job, and needs neither JAX nor an accelerator. Lines of plain numbers are read by pyarrow,
100,000 of them in a second or two; lines that hold a 'nan' or 'inf', which JSON can only write as a string, one by one.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdistill import UserError, read_json
from jaxdistill.diagnosis.finding import Finding

STRINGS = (b'"nan"', b'"inf"', b'"-inf"')  # numbers as training.metrics.plain_json writes them
BLOCK = 1 << 22  # bytes that pyarrow takes at a time; no line may be longer


class Series(NamedTuple):
    """What was measured at some updates only. steps: int [n]; values: float64 [n], finite or not, none missing. Its length is n."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)


class Columns(Mapping):
    """The logged updates by path: 'loss', 'terms/kd/raw', 'probes/router/load_0' -> float64 [updates], nan where a line lacks it.

    A column is made when it is first asked for; one that no line has is all nan."""

    def __init__(self, columns: dict, count: int, strange: dict[int, dict[str, float]]):
        """columns: path -> pyarrow column of the plain lines. count: of all updates. strange: place -> flat line, of the others."""
        self._plain = np.setdiff1d(np.arange(count), np.fromiter(strange, int, len(strange)), assume_unique=True)
        self._columns, self._count, self._strange, self._made = columns, count, strange, {}
        self._paths = list(dict.fromkeys([*columns, *(path for line in strange.values() for path in line)]))

    def __getitem__(self, path: str) -> np.ndarray:
        if path not in self._made:
            values = np.full(self._count, np.nan)
            if path in self._columns:
                values[self._plain] = self._columns[path].cast("float64").to_numpy()
            for place, line in self._strange.items():
                values[place] = line.get(path, np.nan)
            self._made[path] = values
        return self._made[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __contains__(self, path) -> bool:
        return path in self._columns or path in self._paths

    def __len__(self) -> int:
        return len(self._paths)

    def names(self, section: str, field: str = "") -> list[str]:
        """Those of a section: names('probes'), or with a field that each has: names('terms', 'raw')."""
        return [path.removeprefix(f"{section}/").removesuffix(f"/{field}" if field else "") for path in self
                if path.startswith(f"{section}/") and (not field or path.endswith(f"/{field}"))]


class Log(NamedTuple):
    """metrics.jsonl. evaluations, deep, findings: (update, what was measured or said), in order."""

    updates: Columns
    evaluations: list[tuple[int, dict[str, float]]]
    deep: list[tuple[int, dict[str, Any]]]
    findings: list[tuple[int, Finding]]
    broken: int  # lines that are no JSON object: a crash cuts the last one


@dataclasses.dataclass(frozen=True)
class Run:
    """One run. id: NAME-SEED. config: values in force. manifest: {} where it had not begun. row: of the table, once it is finished."""

    id: str
    config: dict
    manifest: dict
    row: dict | None
    log: Log

    @property
    def name(self) -> str:
        return self.id.rsplit("-", 1)[0]

    @property
    def seed(self) -> int:
        return int(self.id.rsplit("-", 1)[1])

    @property
    def updates(self) -> Columns:
        return self.log.updates

    @property
    def steps(self) -> np.ndarray:
        """int [updates]: the number of each logged update; the first is 1."""
        return self.updates["step"].astype(int)

    @property
    def terms(self) -> list[str]:
        return self.updates.names("terms", "raw")

    @property
    def groups(self) -> list[str]:
        return self.updates.names("groups", "lr")

    @property
    def probes(self) -> list[str]:
        return self.updates.names("probes")

    @property
    def knobs(self) -> list[str]:
        return self.updates.names("knobs")

    @property
    def preflight(self) -> dict:
        return self.manifest.get("preflight") or {}

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the config, by its dotted key."""
        node = self.config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return default if node is None else node

    def term(self, name: str, field: str = "raw") -> np.ndarray:
        """float64 [updates]: raw | weight | weighted | count."""
        return self.updates[f"terms/{name}/{field}"]

    def group(self, name: str, field: str) -> np.ndarray:
        """float64 [updates]: grad_norm | param_norm | update_ratio | lr | changed."""
        return self.updates[f"groups/{name}/{field}"]

    def probe(self, name: str) -> Series:
        """A probe, at the updates that were probed."""
        return self._there(f"probes/{name}")

    def sample(self, name: str) -> Series:
        """What was seen of batches that the student wrote, at the updates that had one."""
        return self._there(f"samples/{name}")

    def _there(self, path: str) -> Series:
        values = self.updates[path]
        there = ~np.isnan(values)
        return Series(self.steps[there], values[there])

    def evaluation(self, metric: str) -> Series:
        """A metric ('validation/nll') of every evaluation that has it."""
        found = [(step, values[metric]) for step, values in self.log.evaluations if metric in values]
        return Series(np.asarray([step for step, _ in found], int), np.asarray([value for _, value in found], float))

    def gate(self, name: str) -> Finding | None:
        """What a gate said while training, first."""
        return next((finding for _, finding in self.log.findings if finding.name == name), None)

    def metrics(self) -> list[str]:
        """Names of what evaluations measure."""
        return list(dict.fromkeys(name for _, values in self.log.evaluations for name in values))


@dataclasses.dataclass(frozen=True)
class Job:
    """runs: by id, in the order in which they train. results: of results.json, {} before the first run is finished."""

    workdir: Path
    config: dict
    results: dict
    runs: dict[str, Run]

    @property
    def rows(self) -> list[dict]:
        return self.results.get("rows", [])

    def flag(self, run: Run, key: str, value: Any) -> str:
        """The command-line flag that sets a key for this run: its own where it overrides the job's."""
        node = self.config.get("run", {}).get(run.name, {})
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return f"--config.{key if node is None else f'run.{run.name}.{key}'}={value}"


def read(workdir: str | Path) -> Job:
    """The job in `workdir`, as far as it has come. Raises UserError where there is none, or a file is not as it was written."""
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"workdir {workdir}: no such folder; accepted: the workdir of a job")
    config = load(workdir / "config.json", "the workdir of a job")
    results = load(workdir / "results.json", "the file as it was written", {})
    planned = [f"{name}-{seed}" for seed in config.get("seeds", ()) for name in config.get("runs", ())]
    finished = [f"{row['name']}-{row['seed']}" for row in results.get("rows", ())]
    place = {name: index for index, name in reversed(list(enumerate([*finished, *planned])))}
    folders = sorted((workdir / "runs").glob("*-*"), key=lambda folder: (place.get(folder.name, len(place)), folder.name))
    folders = [folder for folder in folders if folder.is_dir() and not folder.name.startswith(".")]
    return Job(workdir, config, results, {folder.name: read_run(folder) for folder in folders})


def read_run(folder: Path) -> Run:
    """The run in WORKDIR/runs/NAME-SEED."""
    written = "the file as it was written"
    path = folder / "metrics.jsonl"
    try:
        text = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; accepted: {written}") from None
    config, manifest, result = (load(folder / f"{name}.json", written, {}) for name in ("config", "manifest", "result"))
    return Run(folder.name, config, manifest, result.get("row"), parse(text))


def load(path: Path, accepted: str = "the file as it was written", default: dict | None = None) -> dict:
    """A JSON object, with its numbers as numbers; `default` where there is no such file, an error without one."""
    if default is not None and not path.exists():
        return default
    return numbers(read_json(path, accepted))


def parse(text: bytes) -> Log:
    """The lines of metrics.jsonl. What follows the last line end was being written, and is left out."""
    import pyarrow  # here, so that training need not load it

    complete, tail = text[: text.rfind(b"\n") + 1], text[text.rfind(b"\n") + 1 :]
    strange = {}
    if any(mark in complete for mark in STRINGS):
        lines = complete.splitlines()
        strange = {place: line for place, line in enumerate(lines) if any(mark in line for mark in STRINGS)}
        complete = b"\n".join(line for place, line in enumerate(lines) if place not in strange)
    try:
        table = _table(complete)
    except pyarrow.ArrowInvalid:  # a line in the middle is broken, or unlike the others
        table, strange = _table(b""), dict(enumerate(text[: len(text) - len(tail)].splitlines()))
    return _log(table, strange, broken=int(bool(tail.strip())))


def _table(text: bytes):
    import pyarrow
    from pyarrow import json as arrow

    if not text.strip():
        return pyarrow.table({})
    return arrow.read_json(pyarrow.BufferReader(text), read_options=arrow.ReadOptions(block_size=BLOCK))


def _log(table, strange: dict[int, bytes], *, broken: int) -> Log:
    """table: the plain lines, in order. strange: place among all lines -> text."""
    kinds = {"evaluation": [], "deep": [], "findings": []}
    places = np.setdiff1d(np.arange(table.num_rows + len(strange)), np.fromiter(strange, int, len(strange)), assume_unique=True)
    are = _present(table, "loss")
    for kind, found in kinds.items():
        here = np.flatnonzero(_present(table, kind))
        if len(here):
            values, steps = table[kind].take(here).to_pylist(), table["step"].take(here).to_pylist()
            found += zip(places[here], steps, map(_pruned, values), strict=True)
    odd = {}  # place -> flat update
    for place, line in strange.items():
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, TypeError, LookupError):
            broken += bool(line.strip())
            continue
        if "loss" in entry:
            odd[place] = dict(_flat({name: value for name, value in entry.items() if name not in kinds}))
        for kind, found in kinds.items():
            if kind in entry:
                found.append((place, step, numbers(_pruned(entry[kind]))))
    order = np.sort(np.concatenate([places[are], np.fromiter(odd, int, len(odd))]))
    columns = _columns(table.filter(are)) if are.any() else {}
    updates = Columns(columns, len(order), {int(np.searchsorted(order, place)): line for place, line in odd.items()})
    evaluations, deep, said = ([(step, value) for _, step, value in sorted(kinds[kind], key=lambda one: one[0])] for kind in kinds)
    findings = [(step, Finding(**each)) for step, several in said for each in several]
    return Log(updates, evaluations, deep, findings, broken)


def _present(table, name: str) -> np.ndarray:
    """bool [rows]: which rows have it."""
    if name not in table.column_names:
        return np.zeros(table.num_rows, bool)
    return table[name].is_valid().to_numpy()


def _columns(table) -> dict:
    """Path -> column of numbers, structs taken apart."""
    from pyarrow import types

    def walk(path, column):
        if types.is_struct(column.type):
            names = [column.type.field(i).name for i in range(column.type.num_fields)]
            for name, part in zip(names, column.flatten(), strict=True):
                yield from walk(f"{path}/{name}", part)
        elif types.is_integer(column.type) or types.is_floating(column.type) or types.is_boolean(column.type):
            yield path, column

    tops = (name for name in table.column_names if name not in ("evaluation", "deep", "findings"))
    return {path: column for name in tops for path, column in walk(name, table[name])}


def _pruned(value):
    """Without the keys that pyarrow adds, as None, to lines which lack what others have."""
    if isinstance(value, dict):
        return {name: _pruned(item) for name, item in value.items() if item is not None}
    return [_pruned(item) for item in value] if isinstance(value, list) else value


def numbers(value):
    """'nan', 'inf' and '-inf' as the numbers that they stand for: the inverse of training.metrics.plain_json."""
    if isinstance(value, dict):
        return {name: numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [numbers(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def _flat(tree: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) or value in ("nan", "inf", "-inf"):
            yield prefix + name, float(value)
