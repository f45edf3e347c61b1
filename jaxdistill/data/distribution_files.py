"""Label distributions from files: tables (.parquet, .npz), votes (.csv, .npz) and the .mat sets of label-distribution learning.

Each source returns a `Table`, unchecked but for its own form: what holds of all of them is checked in `distributions`.
"""

import csv
import importlib.util
import os
from typing import NamedTuple

import numpy as np

from jaxdistill import UserError

# Columns of fer2013new.csv (FER+, Barsoum et al. 2016); its last two, unknown and NF (no face), are classes only where data.target says so.
FERPLUS = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt")
PARTS = {  # what a split column calls them -> split
    **dict.fromkeys(("train", "training"), "train"), **dict.fromkeys(("validation", "val", "valid", "publictest"), "validation"),
    **dict.fromkeys(("test", "testing", "privatetest"), "test"),
}  # fmt: skip


class Table(NamedTuple):
    """x: float64 [N, F]. target: float64 [N, K], of votes as a share. group, part: [N] values that say who belongs together and which
    split a row is of, or None. columns, classes: names. where: the file, for errors. row: [N] places in the file. dropped: facts of what
    was left out."""

    x: np.ndarray
    target: np.ndarray
    group: np.ndarray | None
    part: np.ndarray | None
    columns: tuple[str, ...]
    classes: tuple[str, ...]
    where: str
    row: np.ndarray
    dropped: dict


def table(config) -> Table:
    """A .parquet file whose columns data.target hold the distribution, or an .npz with x [N, F], target [N, K], and where there are
    such group [N] and split [N]."""
    where = _path(config, ".parquet", ".npz")
    if config.path.endswith(".npz"):
        return _npz(config, where, "target")
    values, names = _parquet(config.path, where)
    target = _named(config.target, names, "target", where)
    return _columns(config, where, values, target)


def votes(config) -> Table:
    """How many people said what: a .csv with a column of counts for each class (data.target; by default those of FER+), or an .npz with
    x and votes [N, K]. A column `pixels` of numbers between spaces is as many inputs; with data.inputs they are read from that
    .csv, row for row (fer2013.csv beside fer2013new.csv). A column `Usage` or `split` splits.

    data.drop_single: a class with one vote has none, which is FER+'s rule. data.reject: columns of votes for no class (unknown, NF):
    a row where one of them has the most is dropped. Rows without votes are dropped and counted."""
    where = _path(config, ".csv", ".npz")
    if config.path.endswith(".npz"):
        if config.reject or config.inputs:
            key = "reject" if config.reject else "inputs"
            raise UserError(f"config key data.{key}: found {getattr(config, key)!r} with an .npz; accepted: none, they are of a .csv")
        found = _npz(config, where, "votes")
        return _share(found, np.zeros((len(found.x), 0)), config, where)
    values = _csv(config.path, where)
    names = tuple(config.target) or (FERPLUS if set(FERPLUS) <= values.keys() else ())
    target, reject = _named(names, tuple(values), "target", where), _named(config.reject, tuple(values), "reject", where, some=False)
    other = {}
    if config.inputs:
        other = _csv(config.inputs, beside := f"data.inputs {config.inputs!r}")
        if len(next(iter(other.values()))) != len(next(iter(values.values()))):
            raise UserError(f"{beside}: {len(next(iter(other.values())))} rows beside {len(next(iter(values.values())))} of {where}; "
                            "accepted: as many, row for row")  # fmt: skip
        values = {name: values[name] for name in values if name in (*target, *reject, config.group, "Usage", "split")} | other
    rejected = np.stack([_numbers(values.pop(name), name, where) for name in reject], axis=1) if reject else None
    found = _columns(config, where, values, target)
    return _share(found, np.zeros((len(found.x), 0)) if rejected is None else rejected, config, where)


def mat(config) -> Table:
    """A .mat set of label-distribution learning (Geng, TKDE 2016): features [N, F] and labels [N, K]."""
    from scipy.io import loadmat

    where = _path(config, ".mat")
    try:
        found = loadmat(config.path)
    except Exception as error:  # header, compression or matrix damage: scipy raises many kinds
        raise UserError(f"{where}: not a readable .mat file ({_first(error)}); accepted: one of MATLAB's versions before 7.3") from None
    if missing := {"features", "labels"} - found.keys():
        has = ", ".join(name for name in found if not name.startswith("__"))
        raise UserError(f"{where}: has {has or 'nothing'}, no {min(missing)}; accepted: features [rows, inputs] and labels [rows, classes]")
    return _arrays(where, found["features"], found["labels"], None, None)


SOURCES = {"table": table, "votes": votes, "mat": mat}


def _path(config, *endings: str) -> str:
    """The file as errors call it, which is there and ends as it should."""
    where, accepted = f"data.path {config.path!r}", " or ".join(endings)
    if not os.path.isfile(config.path):
        raise UserError(f"{where}: not found; accepted: a {accepted} file with data.source {config.source!r}")
    if not config.path.endswith(endings):
        raise UserError(f"{where}: no {accepted} file; accepted: one, with data.source {config.source!r}")
    return where


def _parquet(path: str, where: str) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{where}: a .parquet file without pyarrow; accepted: pip install pyarrow, or an .npz")
    import pyarrow
    import pyarrow.parquet

    try:
        read = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{where}: not a readable .parquet file ({_first(error)}); accepted: one") from None
    return {name: read.column(name).to_numpy() for name in read.column_names}, tuple(read.column_names)


def _csv(path: str, where: str) -> dict[str, np.ndarray]:
    """Column -> text [N]."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{where}: not a readable .csv file ({_first(error)}); accepted: text in UTF-8 with a line of names") from None
    rows = [row for row in rows if row]
    if len(rows) < 2:
        raise UserError(f"{where}: {len(rows)} lines; accepted: a line of names and one for each row")
    odd = next((i for i, row in enumerate(rows) if len(row) != len(rows[0])), None)
    if odd is not None:
        raise UserError(f"{where}: line {odd + 1} has {len(rows[odd])} fields, the first {len(rows[0])}; accepted: as many in each")
    header = [name.strip() for name in rows[0]]
    if twice := [name for i, name in enumerate(header) if name in header[:i]]:
        raise UserError(f"{where}: column {twice[0]!r} is there twice; accepted: each name once")
    return {name: np.asarray(column) for name, column in zip(header, zip(*rows[1:], strict=True), strict=True)}


def _npz(config, where: str, kind: str) -> Table:
    try:
        with np.load(config.path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except Exception as error:  # zip, pickle or header damage: numpy raises many kinds
        raise UserError(f"{where}: not a readable .npz file ({_first(error)}); accepted: arrays that numpy.savez wrote") from None
    if missing := [name for name in ("x", kind) if name not in found]:
        raise UserError(f"{where}: has {', '.join(found) or 'nothing'}, no {missing[0]}; accepted: x [rows, inputs] and {kind} "
                        "[rows, classes]")  # fmt: skip
    for key in ("target", "features"):
        if getattr(config, key):
            raise UserError(f"config key data.{key}: found {getattr(config, key)!r} with an .npz; accepted: (), columns are of tables")
    group = found.get(_named((config.group,), tuple(found), "group", where)[0] if config.group else "group")
    return _arrays(where, found["x"], found[kind], group, found.get("split"))


def _arrays(where: str, x, target, group, part) -> Table:
    for name, value in (("inputs", x), ("target", target)):
        if value.ndim != 2 or value.dtype.kind not in "fiub" or not value.size:
            raise UserError(f"{where}: {name} are {value.dtype} {value.shape}; accepted: numbers [rows, columns]")
    for name, value in (("target", target), ("group", group), ("split", part)):
        if value is not None and (value.shape[:1] != (len(x),) or (name != "target" and value.ndim != 1)):
            raise UserError(f"{where}: {name} is {value.shape} beside {len(x)} rows of inputs; accepted: one for each")
    columns, classes = tuple(f"column {i}" for i in range(x.shape[1])), tuple(str(i) for i in range(target.shape[1]))
    row = np.arange(len(x))
    return Table(np.asarray(x, np.float64), np.asarray(target, np.float64), group, part, columns, classes, where, row, {})


def _columns(config, where: str, values: dict, target: tuple[str, ...]) -> Table:
    """Named columns as a Table: those of the target, of the group, of the split, and the inputs."""
    group = values[_named((config.group,), tuple(values), "group", where)[0]] if config.group else None
    split = next((name for name in ("split", "Usage") if name in values), None)
    chosen = _named(config.features, tuple(values), "features", where, some=False)
    apart = {*target, config.group, split}
    if shared := [name for name in chosen if name in apart]:
        raise UserError(f"config key data.features: found {shared[0]!r}, which is no input but target, group or split; accepted: others")
    inputs = {name: values[name] for name in chosen or [name for name in values if name not in apart]}
    if "pixels" in inputs:
        pixels = inputs.pop("pixels")
        if inputs and not chosen:  # beside a picture, fer2013's `emotion` and the like are no inputs
            inputs = {}
        try:
            flat = np.asarray([np.asarray(str(text).split(), np.float64) for text in pixels])
        except ValueError:
            raise UserError(f"{where}: column pixels holds rows of different lengths, or no numbers; accepted: as many in each") from None
        inputs |= {f"pixel {i}": column for i, column in enumerate(flat.T)}
    if not inputs:
        raise UserError(f"{where}: no column of inputs beside {', '.join(target)}; accepted: one or more")
    x = np.stack([_numbers(column, name, where) for name, column in inputs.items()], axis=1)
    chances = np.stack([_numbers(values[name], name, where) for name in target], axis=1)
    found = _arrays(where, x, chances, group, None if split is None else values[split])
    return found._replace(columns=tuple(inputs), classes=target)


def _share(found: Table, rejected: np.ndarray, config, where: str) -> Table:
    """Counts -> shares of them; rows without votes, or with most of them for no class, are left out and counted."""
    both = np.concatenate([found.target, rejected], axis=1)
    bad = ~np.isfinite(both) | (both < 0) | (both != np.rint(both))
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        name = (*found.classes, *config.reject)[column]
        raise UserError(f"{where}: row {row} has {both[row, column]:g} votes for {name!r}; accepted: whole numbers from 0 on")
    if config.drop_single:
        both = np.where(both == 1, 0, both)
    counts, rejected = np.split(both, [len(found.classes)], axis=1)
    empty = counts.sum(1) == 0
    lost = ~empty & (rejected.max(1, initial=-1) >= counts.max(1)) if rejected.size else np.zeros(len(counts), bool)
    kept = ~empty & ~lost
    if not kept.any():
        raise UserError(f"{where}: none of {len(counts)} rows has votes for a class; accepted: one or more")
    dropped = {"without_votes": int(empty.sum()), "rejected": int(lost.sum())}
    shares = counts[kept] / counts[kept].sum(1, keepdims=True)
    group, part = (None if values is None else values[kept] for values in (found.group, found.part))
    return found._replace(x=found.x[kept], target=shares, group=group, part=part, row=found.row[kept], dropped=dropped)


def _named(names, there: tuple[str, ...], key: str, where: str, some: bool = True) -> tuple[str, ...]:
    """`names`, all of which are there, each once."""
    odd = [name for i, name in enumerate(names) if name not in there or name in names[:i]]
    if odd or (some and not names):
        listed = ", ".join(there[:12]) + (f" and {len(there) - 12} more" if len(there) > 12 else "")
        raise UserError(f"config key data.{key}: found {odd[0] if odd else ()!r}; accepted: columns of {where}, each once: {listed}")
    return tuple(names)


def _numbers(column: np.ndarray, name: str, where: str) -> np.ndarray:
    try:
        return np.asarray(column, np.float64)
    except (ValueError, TypeError):
        text = next(str(value) for value in column if not _is_number(value))
        raise UserError(f"{where}: column {name!r} holds {text[:40]!r}; accepted: numbers, or data.features that leave it out") from None


def _is_number(value) -> bool:
    try:
        float(value)
    except (ValueError, TypeError):
        return False
    return True


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
