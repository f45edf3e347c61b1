"""Sequences as arrays and tables hold them. One function a source: config -> Listing."""

import csv as tables
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxdistill import UserError
from jaxdistill.data.group_splits import PARTS, some


class Listing(NamedTuple):
    """Sequences before they are split.

    names: of each, its own. labels: numbers or names. lengths: frames of each (of files that are not yet read, at most). shape: of a
    frame, (features,) or (joints, coordinates). read: place -> float32 [frames, *shape], finite. stamp: place -> bytes or text that
    tells the content. columns: what groups may be of ("subject", "camera"). trains: of a column, the values that train as
    published. parts: the part of each, where the source is split. class_names: label -> name. facts: JSON-able. lazy: `read` reads
    a file."""

    names: list[str]
    labels: list
    lengths: list[int]
    shape: tuple[int, ...]
    read: Callable[[int], np.ndarray]
    stamp: Callable[[int], object]
    columns: dict[str, list] = {}
    trains: dict[str, tuple] = {}
    parts: list[str] | None = None
    class_names: dict = {}
    facts: dict = {}
    lazy: bool = False


# -- Arrays -------------------------------------------------------------------------------------------------------------------


def npz(config) -> Listing:
    """Arrays x, y. One file: x [N, ...], of which axis `time_axis` is time (0: none, each is one frame) and the others are of a
    frame; y int or text [N]; where there are any, length int [N] (frames that are no padding), split [N] of train, validation and
    test, class_names [classes]; every other array [N] of numbers or text may be a group. A folder with train.npz: such files of the
    parts. Another folder: a file is a sequence, x [time, ...], with y and others scalar."""
    path = Path(os.path.expanduser(config.path))
    if not path.is_dir():
        return _joined(config, {path: None})
    parts = {part: path / f"{part}.npz" for part in PARTS}
    if parts["train"].exists():
        return _joined(config, {file: part for part, file in parts.items() if file.exists()})
    found, labels, names, columns = [], [], [], []
    for file in listed(config, "*.npz"):
        arrays = _arrays(file)
        x = _time_first(config, arrays["x"][None], file)[0]
        y = arrays["y"]
        if y.size != 1 or y.dtype.kind not in "iuU":
            raise UserError(f"{file}: y is {y.dtype} {y.shape}; accepted: one whole number or text, the label of the sequence")
        found.append(finite(x, file))
        labels.append(y.item())
        names.append(file.relative_to(path).with_suffix("").as_posix())
        columns.append({name: value.item() for name, value in arrays.items() if value.size == 1 and value.dtype.kind in "iuU"})
    shared = [name for name in columns[0] if name != "y" and all(name in row for row in columns)]
    return ragged(names, labels, found, columns={name: [row[name] for row in columns] for name in shared})


def _joined(config, files: dict[Path, str | None]) -> Listing:
    """Files of arrays [N, ...], one after another. files: with the part that each is, None where it says so itself or is not split."""
    stored = {file: _arrays(file) for file in files}
    names, labels, parts, sequences, columns = [], [], [], [], []
    for file, part in files.items():
        arrays = stored[file]
        x = _time_first(config, arrays["x"], file)
        count = len(x)
        columns.append({name: value for name, value in arrays.items() if name != "x" and value.shape == (count,)
                        and value.dtype.kind in "iuU"})  # fmt: skip
        for name in ("y", "length", "split"):
            if name in arrays and name not in columns[-1]:
                raise UserError(f"{file}: {name} is {arrays[name].dtype} {arrays[name].shape}; accepted: whole numbers"
                                f"{'' if name == 'length' else ' or text'} [{count}], one for each sequence")  # fmt: skip
        length = np.asarray(columns[-1].pop("length", np.full(count, x.shape[1])))
        if (odd := (length < 1) | (length > x.shape[1])).any():
            raise UserError(f"{file}: length of sequence {odd.argmax()} is {length[odd.argmax()]}; accepted: 1 to {x.shape[1]} (frames "
                            "beyond it are padding)")  # fmt: skip
        own = columns[-1].pop("split", None)
        if own is not None and (odd := set(own.tolist()) - set(PARTS)):
            raise UserError(f"{file}: split {sorted(odd)[0]!r}; accepted: {', '.join(PARTS)}")
        parts += [part] * count if part else [] if own is None else own.tolist()
        labels += columns[-1].pop("y").tolist()
        names += [f"{part or 'sequence'} {i}" for i in range(count)]  # whatever the file is called: the splits hash it
        sequences += [finite(row[:frames], file, i) for i, (row, frames) in enumerate(zip(x, length.tolist(), strict=True))]
    if not names:
        raise UserError(f"{next(iter(files))}: no sequence in it; accepted: one or more")
    shared = [name for name in columns[0] if all(name in each for each in columns)]
    titles = [arrays["class_names"] for arrays in stored.values() if "class_names" in arrays]
    if titles and (titles[0].ndim != 1 or any(type(label) is str or not 0 <= label < len(titles[0]) for label in labels)):
        raise UserError(f"{next(iter(files))}: class_names {titles[0].shape} do not name its labels; accepted: one name for each from 0 on")
    return ragged(
        names, labels, sequences, columns={name: [value for each in columns for value in each[name].tolist()] for name in shared},
        parts=parts or None, class_names=dict(enumerate(map(str, titles[0]))) if titles else {},
    )  # fmt: skip


def _arrays(file: Path) -> dict[str, np.ndarray]:
    try:
        with open(file, "rb") as raw, np.load(raw) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        raise UserError(f"data.path {str(file)!r}: not found; accepted: an .npz file, or a folder of them") from None
    except Exception as error:  # zip, pickle or header damage: numpy raises many kinds
        raise UserError(f"data.path {str(file)!r}: not a readable .npz file ({type(error).__name__}: {first_line(error)})") from None
    for name in ("x", "y"):
        if name not in arrays:
            raise UserError(f"{file}: has {', '.join(arrays) or 'no array'}; accepted: x and y")
    return arrays


def _time_first(config, x: np.ndarray, file: Path) -> np.ndarray:
    """x [N, ...] -> [N, time, ...]."""
    if x.dtype.kind not in "fiub" or x.ndim < 2:
        raise UserError(f"{file}: x is {x.dtype} {x.shape}; accepted: numbers, with one or more axes beside that of the sequences")
    if config.time_axis >= x.ndim:
        config.refuse("time_axis", f"0 (none) to {x.ndim - 1}, as {file} has x {x.shape}")
    x = np.moveaxis(x, config.time_axis, 1) if config.time_axis else x[:, None]
    return x[..., None] if x.ndim == 2 else x


# -- Tables -------------------------------------------------------------------------------------------------------------------


def csv(config) -> Listing:
    """A table with a header: the column `label`, the column `group` where there is one, those of `ignore`, and all others features.
    Each row is a sequence of one frame."""
    path = Path(os.path.expanduser(config.path))
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *rows = [row for row in tables.reader(file) if row] or [[]]
    except (OSError, UnicodeDecodeError, tables.Error) as error:
        raise UserError(f"data.path {config.path!r}: {first_line(error)}; accepted: a .csv file with a header") from None
    if twice := [name for i, name in enumerate(header) if name in header[:i]]:
        raise UserError(f"{path}: column {twice[0]!r} is there twice; accepted: each name once")
    place = {name: i for i, name in enumerate(header)}
    for key in ("label", *(["group"] if config.split == "groups" else [])):
        if getattr(config, key) not in place:
            config.refuse(key, f"a column of {path} ({some(header)})")
    if missing := [name for name in config.ignore if name not in place]:
        raise UserError(f"config key data.ignore: found {missing[0]!r}; accepted: columns of {path} ({some(header)})")
    features = [name for name in header if name not in (config.label, config.group, *config.ignore)]
    if not rows or not features:
        raise UserError(f"{path}: {len(rows)} rows of {len(features)} features; accepted: one or more of each")
    values = np.empty((len(rows), len(features)), np.float64)
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise UserError(f"{path}, row {i + 1}: found {len(row)} cells; accepted: {len(header)}, as in the header")
        try:
            values[i] = [row[place[name]] for name in features]
        except ValueError:
            name = next(name for name in features if not _is_number(row[place[name]]))
            raise UserError(f"{path}, row {i + 1}, column {name!r}: found {row[place[name]]!r}; accepted: a number (data.ignore leaves "
                            "columns out)") from None  # fmt: skip
    found = _narrow(values)
    if not (fine := np.isfinite(found)).all():
        i, j = np.argwhere(~fine)[0]
        raise UserError(f"{path}, row {i + 1}, column {features[j]!r}: found {rows[i][place[features[j]]]!r}; accepted: a finite number")
    columns = {config.group: [row[place[config.group]] for row in rows]} if config.group in place else {}
    names, labels = [f"row {i}" for i in range(len(rows))], [row[place[config.label]] for row in rows]
    return ragged(names, labels, list(found[:, None]), columns=columns)


# -- shared -------------------------------------------------------------------------------------------------------------------


def listed(config, pattern: str) -> list[Path]:
    folder = Path(os.path.expanduser(config.path))
    if not folder.is_dir():
        raise UserError(f"data.path {config.path!r}: not found; accepted: a folder of {pattern}")
    files = sorted(folder.rglob(pattern))
    if not files:
        raise UserError(f"data.path {config.path!r}: no {pattern} in it; accepted: one or more")
    return files


def ragged(names, labels, sequences: list[np.ndarray], **more) -> Listing:
    """A Listing of sequences in memory."""
    shape = sequences[0].shape[1:]
    for name, x in zip(names, sequences, strict=True):
        if x.shape[1:] != shape:
            raise UserError(f"{name}: frames are {x.shape[1:]}, where those of {names[0]} are {shape}; accepted: one shape for all")
        if not len(x):
            raise UserError(f"{name}: a sequence without frames; accepted: one or more")
        if len(x) > 1 and x.dtype.kind == "f" and not x.any():  # of whole numbers, pictures, it is a blank one
            raise UserError(f"{name}: all {len(x)} frames are zeros, as padding is; accepted: sequences with frames in them")
    read = lambda i: np.asarray(sequences[i], np.float32)  # noqa: E731
    return Listing(names, labels, [len(x) for x in sequences], shape, read, lambda i: sequences[i].tobytes(), **more)


def finite(x: np.ndarray, file: Path, i: int | None = None) -> np.ndarray:
    """x [frames, ...], as float32 if it is of floats; numbers that are not finite are an error that tells where."""
    if x.dtype.kind != "f":
        return x
    found = _narrow(x)
    if not (fine := np.isfinite(found)).all():
        frame, *column = np.argwhere(~fine)[0].tolist()
        where = f"frame {frame}, column {', '.join(map(str, column))}"
        where = where if i is None else f"sequence {i}, {where}"
        raise UserError(f"{file}, {where}: found {found[(frame, *column)]}; accepted: finite numbers")
    return found


def _narrow(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # too large a number becomes inf, which is then refused
        return x.astype(np.float32)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


SOURCES = {"npz": npz, "csv": csv}
