"""What is refused in a table of distributions, what is left out, and what is told of; and how its rows are split.

Nothing is repaired in silence: what is not a finite number or not a distribution is an error that names the row, what is left out or far
out is named in a warning and in the facts. What is drawn is drawn by the hash of names (data.group_splits).
"""

import logging

import numpy as np

from jaxdistill import UserError
from jaxdistill.data.distribution_files import PARTS, Table
from jaxdistill.data.group_splits import held_out, ranked, some

logger = logging.getLogger(__name__)

FAR = 20.0  # standard deviations from the training mean, beyond which a number is told of
SIDES = ("train", "validation", "test")


def distributions(found: Table, tolerance: float) -> np.ndarray:
    """The target, float64 [N, K], of which each row then sums to 1."""
    for bad, accepted in ((~np.isfinite(found.target), "finite numbers"), (found.target < 0, "probabilities, from 0 on")):
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            raise UserError(f"{found.where}: row {found.row[row]} gives {found.classes[column]!r} the probability "
                            f"{found.target[row, column]:g}; accepted: {accepted}")  # fmt: skip
    if found.target.shape[1] < 2:
        raise UserError(f"{found.where}: {found.target.shape[1]} class; accepted: two or more")
    total = found.target.sum(1)
    off = np.abs(total - 1) > tolerance
    if off.any():
        row = int(np.argmax(off))
        raise UserError(f"{found.where}: row {found.row[row]} sums to {total[row]:.6g} ({off.sum()} such of {len(off)}); accepted: rows "
                        f"that sum to 1 within data.tolerance {tolerance:g} (counts are of data.source 'votes')")  # fmt: skip
    return found.target / total[:, None]


def finite(found: Table) -> None:
    """Every input is a number that float32 can hold."""
    bad = ~np.isfinite(found.x) | (np.abs(found.x) > np.finfo(np.float32).max)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise UserError(f"{found.where}: row {found.row[row]} has {found.x[row, column]:g} in {found.columns[column]!r} ({bad.sum()} such "
                        "numbers); accepted: finite numbers of float32, or a file without these rows or columns")  # fmt: skip


def varying(found: Table, train: np.ndarray) -> np.ndarray:
    """bool [F]: the columns that are not the same in all of the rows `train`; the others are told of."""
    varies = found.x[train].min(0) < found.x[train].max(0)
    if not varies.any():
        raise UserError(f"{found.where}: every column of inputs is constant in the training split; accepted: one that varies, or more")
    if not varies.all():
        names = [name for name, kept in zip(found.columns, varies, strict=True) if not kept]
        logger.warning("data: %d of %d columns are constant in the training split and left out: %s", len(names), len(varies), some(names))
    return varies


def far(x: np.ndarray, columns: tuple[str, ...], parts: dict[str, np.ndarray], row: np.ndarray) -> dict[str, int]:
    """split -> how many of its numbers lie more than FAR deviations from the mean of the training split; told of once."""
    mean, std = moments(x[parts["train"]])
    z = np.abs((x - mean[None]) / std[None])
    counts = {part: int((z[at] > FAR).sum()) for part, at in parts.items()}
    if any(counts.values()):
        i, column = np.unravel_index(int(z.argmax()), z.shape)
        logger.warning(
            "data: %s numbers lie more than %g standard deviations from the training mean, the farthest in %r of row %d (%.1f): "
            "an outlier, or another unit", " + ".join(f"{count} {part}" for part, count in counts.items() if count), FAR, columns[column],
            row[i], z[i, column],
        )  # fmt: skip
    return counts


def copies(x: np.ndarray, parts: dict[str, np.ndarray]) -> dict[str, int]:
    """split -> how many of its rows have the very inputs of a training row; told of once."""
    known = {row.tobytes() for row in x[parts["train"]]}
    counts = {part: sum(row.tobytes() in known for row in x[at]) for part, at in parts.items() if part != "train"}
    if any(counts.values()):
        logger.warning("data: rows with the very inputs of a training row: %s", some(f"{part} {count}" for part, count in counts.items()))
    return counts


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 (mean, standard deviation) of the columns of [N, F], by float64; the deviation 1 for a column without any."""
    mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    same = std <= 1e-7 * np.abs(mean)  # what rounding leaves of a constant
    return mean.astype(np.float32), np.where(same, 1.0, std).astype(np.float32)


def split(config, where: str, count: int, group: np.ndarray | None, part: np.ndarray | None) -> dict[str, np.ndarray]:
    """split -> places of its rows, in order. Groups (rows, where there are none) stay whole; those of a file that splits itself must.

    Raises:
      UserError: a group in two splits, rows without a group, a split without rows, more folds than groups."""
    names, code = np.unique(np.arange(count) if group is None else _named(where, group), return_inverse=True)
    names, side = names.tolist(), np.zeros(count, int)

    def draw(chosen, part: str) -> None:
        side[np.asarray([name in chosen for name in names])[code]] = SIDES.index(part)

    if part is not None:
        if config.folds:
            config.refuse("folds", f"0 with {where}, which splits itself")
        side[:] = _given(where, part)
    elif config.folds > len(names):
        config.refuse("folds", f"at most {len(names)}, the groups (or rows) of {where}")
    else:
        salt = f"{config.seed} test "
        draw(set(ranked(names, salt)[config.fold :: config.folds]) if config.folds else held_out(names, config.test, salt=salt), "test")
    there = np.zeros((len(names), len(SIDES)), bool)
    there[code, side] = True
    if (twice := there.sum(1) > 1).any():
        i = int(twice.argmax())
        both = " and in ".join(part for part, found in zip(SIDES, there[i], strict=True) if found)
        raise UserError(f"{where}: group {names[i]!r} is in {both}; accepted: each group in one split")
    if there[:, 1].any() and config.validation_fold:
        config.refuse("validation_fold", f"0 with {where}, which has a validation split")
    if config.validation and not there[:, 1].any():
        draw(held_out([name for name, trains in zip(names, there[:, 0], strict=True) if trains], config.validation,
                      salt=f"{config.seed} validation ", fold=config.validation_fold), "validation")  # fmt: skip
    parts = {part: np.flatnonzero(side == i) for i, part in enumerate(SIDES)}
    for part, least in (("train", 2), ("test", 1), ("validation", 1 if config.validation else 0)):
        if len(parts[part]) < least:
            tell = ", ".join(f"{name} {len(at)}" for name, at in parts.items())
            raise UserError(f"{where}: too few {part} rows ({tell}); accepted: {least} or more (data.test, data.validation)")
    return {part: at for part, at in parts.items() if len(at)}


def _named(where: str, group: np.ndarray) -> np.ndarray:
    names = ["" if name is None or name != name else str(name) for name in group.tolist()]
    if "" in names:
        raise UserError(f"{where}: row {names.index('')} has no group; accepted: one of each row")
    return np.asarray(names)


def _given(where: str, part: np.ndarray) -> list[int]:
    told = [str(value).lower() for value in part.tolist()]
    if odd := next((value for value in told if value not in PARTS), None):
        raise UserError(f"{where}: split {odd!r}; accepted: {', '.join(PARTS)} (any case)")
    return [SIDES.index(PARTS[value]) for value in told]
