"""Labelled sequences for classification: what to read, how it is split, what is done to it on the way.

`load` lists and splits. Everything that is fitted (the number of frames, a reduction) is fitted on the training split alone; values
are otherwise as stored. A table is sequences of one frame.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable

import numpy as np

from jaxdistill.data import actions, cache, group_splits, reduction, sequence_files, skeleton_files
from jaxdistill.data.sequence_files import Listing


def drawn(config) -> Listing:
    """`data.actions`, from nothing: every subject shows every action `takes` times."""
    found = actions.draw(classes=config.classes or len(actions.CLASSES), subjects=config.subjects, takes=config.takes, seed=config.seed)
    columns = [column.tolist() for column in (found.label, found.subject, found.take)]
    names = [f"action {label} subject {subject} take {take}" for label, subject, take in zip(*columns, strict=True)]
    return Listing(
        names, columns[0], found.length.tolist(), (actions.JOINTS, 3), lambda i: found.x[i, : found.length[i]],
        lambda i: found.x[i, : found.length[i]].tobytes(), columns={"subject": columns[1]}, class_names=dict(enumerate(actions.CLASSES)),
    )  # fmt: skip


SOURCES = {"actions": drawn} | skeleton_files.SOURCES | sequence_files.SOURCES
# Keys of one source (or way) only: with another they would be silently without effect.
ONLY = {
    "subjects": ("source", "actions"), "takes": ("source", "actions"), "bodies": ("source", "ntu"), "skip": ("source", "ntu"),
    "cache": ("source", "ntu"), "time_axis": ("source", "npz"), "label": ("source", "csv"), "ignore": ("source", "csv"),
    "components": ("reduce", "pca"), "ranks": ("reduce", "tucker"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SequenceConfig(group_splits.Rule):
    """The section `data`; the keys of `group_splits.Rule` say how it is split. Hashable: `load` remembers what it loaded."""

    source: str = "actions"  # actions | ntu | utd | npz | csv
    path: str = ""  # folder, .npz file or .csv file
    classes: int = 0  # the first n classes; 0: all
    length: int = 0  # frames T of an example; 0: those of the longest training sequence (a file's own count, where it is read later)
    fit: str = "pad"  # to T frames: pad (longer ones are resampled) | cut (longer ones lose their end) | stretch (all are resampled)
    reduce: str = ""  # "" | pca | tucker
    components: int = 0  # pca: of a frame
    ranks: tuple = ()  # tucker: of (frames, joints, coordinates) or (frames, features); 0: as it is
    # actions
    subjects: int = 16
    takes: int = 2  # sequences of each action by each subject
    # ntu
    bodies: int = 2  # those that move most
    skip: str = ""  # file of names of samples to leave out
    cache: int = 512  # MiB of sequences kept in memory once they are read
    # npz
    time_axis: int = 1  # of x [N, ...], the axis that is time; 0: none, each is one frame
    # csv
    label: str = ""  # column of the class
    ignore: tuple = ()  # columns that are no features

    def __post_init__(self):
        super().__post_init__()
        if self.source not in SOURCES:
            self.refuse("source", " | ".join(SOURCES))
        if bool(self.path) == (self.source == "actions"):
            self.refuse("path", "none with data.source 'actions'" if self.path else f"a path with data.source {self.source!r}")
        for name, accepted in (("fit", ("pad", "cut", "stretch")), ("reduce", ("", "pca", "tucker"))):
            if getattr(self, name) not in accepted:
                self.refuse(name, " | ".join(map(repr, accepted)))
        for name, (key, value) in ONLY.items():
            if getattr(self, key) != value and getattr(self, name) != getattr(type(self), name):
                self.refuse(name, f"{getattr(type(self), name)!r}, as it is of data.{key} {value!r}")
        for name, least, most in (
            ("classes", 0, math.inf), ("length", 0, math.inf), ("components", 0, math.inf), ("subjects", 2, 1000), ("takes", 1, 1000),
            ("bodies", 1, 2), ("cache", 0, math.inf), ("time_axis", 0, 8),
        ):  # fmt: skip
            if not least <= getattr(self, name) <= most:
                self.refuse(name, f"{least} or more" if most == math.inf else f"{least} to {most}")
        if self.classes == 1:
            self.refuse("classes", "0 (all), or 2 or more")
        if any(type(rank) is not int for rank in self.ranks):
            self.refuse("ranks", "whole numbers")
        if self.ranks and self.ranks[0] and self.fit != "stretch":
            self.refuse("ranks", f"0 for the frames with data.fit {self.fit!r}; they are reduced with 'stretch'")
        if self.source == "csv" and not self.label:
            self.refuse("label", "the column of the class, with data.source 'csv'")


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """The sequences of one split.

    Attributes:
      names: what each is called, for people.
      labels, subjects: int32 [N]; class indices, and places among the sorted values of the column subject, else of `data.group`
        (-1: the source has neither).
      frames, width: T and F of an example.
      read: place in the split -> float32 [frames, F], 1 to T frames.
    """

    names: tuple[str, ...]
    labels: np.ndarray
    subjects: np.ndarray
    frames: int
    width: int
    read: Callable[[int], np.ndarray]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """int [B] -> {"x": float32 [B, T, F], zero beyond each length, "length", "label", "subject": int32 [B]}.

        Raises:
          UserError: a file that cannot be read, where files are read when asked for.
        """
        indices = np.asarray(indices)
        x = np.zeros((len(indices), self.frames, self.width), np.float32)
        length = np.empty(len(indices), np.int32)
        for row, i in enumerate(indices.tolist()):
            found = self.read(i)
            x[row, : len(found)], length[row] = found, len(found)
        return {"x": x, "length": length, "label": self.labels[indices], "subject": self.subjects[indices]}


@dataclasses.dataclass(frozen=True, eq=False)
class SequenceSet:
    """Sequences, ready to train on.

    Attributes:
      splits: "train", "validation" (unless data.validation is 0 and the source has none), "test" -> Split.
      classes: names of the classes, in order.
      width: F, numbers of a frame.
      facts: JSON-able identity and size of what was read: of each split a fingerprint, sequences, classes, subjects, and how many
        are longer than T (`resampled`, or `cut`).
    """

    splits: dict[str, Split]
    classes: tuple[str, ...]
    width: int
    facts: dict


def load(config: SequenceConfig, seed: int = 0) -> SequenceSet:
    """Lists the sequences of `config.source`, splits them, and fits what is fitted on those that train. seed: the run's, for what is -1.

    Raises:
      UserError: whatever of the user's does not fit, in one line (see `group_splits`, `sequence_files`, `skeleton_files`, `reduction`).
    """
    return _load(config.of(seed))


@functools.lru_cache(maxsize=4)  # the runs of one job share one set
def _load(config: SequenceConfig) -> SequenceSet:
    listing = SOURCES[config.source](config)
    chosen, labels = _classes(config, listing)
    column = lambda name: [listing.columns[name][i] for i in chosen]  # noqa: E731
    if config.group not in listing.columns and config.group not in ("", "subject"):
        config.refuse("group", f"{group_splits.some(listing.columns) or 'none'}, as data.source {config.source!r} has here")
    groups = column(config.group) if config.group in listing.columns else None
    rule = config
    if groups and config.group in listing.trains and config.split in ("", "groups") and not config.test_groups:
        if not (tested := set(groups) - set(listing.trains[config.group])):
            config.refuse("test_groups", f"some of {group_splits.some(sorted(set(groups)), 30)}, as all there are train where published")
        rule = dataclasses.replace(config, test_groups=tuple(sorted(tested)))
    parts = [listing.parts[i] for i in chosen] if listing.parts else None
    found = group_splits.assign(rule, [listing.names[i] for i in chosen], [listing.labels[i] for i in chosen], groups, parts)

    people = next((column(name) for name in ("subject", config.group) if name in listing.columns), None)
    index = {value: i for i, value in enumerate(sorted(set(people or ())))}
    subjects = np.asarray([index[value] for value in people] if people else [-1] * len(chosen), np.int32)
    frames = config.length or max(listing.lengths[chosen[i]] for i in found["train"])
    fitted = functools.partial(fit, frames=frames, how=config.fit)
    raw = lambda i: fitted(listing.read(chosen[i]))  # noqa: E731
    if listing.lazy:
        raw = functools.lru_cache(maxsize=config.cache * 2**20 // (4 * frames * math.prod(listing.shape)))(raw)
    reduced = _reduction(config, lambda: map(raw, found["train"]))
    read = (lambda i: reduced.apply(raw(i))) if reduced else lambda i: raw(i).reshape(-1, math.prod(listing.shape))
    width, out = (reduced.width, reduced.frames or frames) if reduced else (math.prod(listing.shape), frames)

    classes = [listing.class_names.get(label, label) for label in sorted({listing.labels[i] for i in chosen})]
    facts = {"source": config.source, "classes": len(classes), "frames": out, "width": width, **listing.facts, "splits": {}}
    if reduced:
        facts["reduced"] = {"by": config.reduce, "kept": list(reduced.kept)}
    splits = {}
    for part, places in found.items():
        here = [chosen[i] for i in places]
        splits[part] = Split(
            tuple(listing.names[i] for i in here), labels[places], subjects[places], out, width, _at(read, tuple(places))
        )
        content = [item for i in here for item in (listing.names[i], listing.labels[i], listing.stamp(i))]
        facts["splits"][part] = {
            "sha256": cache.key(*content), "sequences": len(here), "classes": len(set(labels[places].tolist())),
            "subjects": len(set(subjects[places].tolist())) if people else 0,
            "cut" if config.fit == "cut" else "resampled": sum(listing.lengths[i] > frames for i in here),
        }  # fmt: skip
    return SequenceSet(splits, tuple(map(str, classes)), width, facts)


def fit(x: np.ndarray, frames: int, how: str = "pad") -> np.ndarray:
    """[t, ...] -> at most `frames` frames, float32 (see SequenceConfig.fit)."""
    if len(x) <= frames and how != "stretch":
        return x
    return x[:frames] if how == "cut" else resample(x, frames)


def resample(x: np.ndarray, frames: int) -> np.ndarray:
    """[t, ...] -> [frames, ...]: equally spaced from the first frame to the last, linear between two."""
    place = np.linspace(0, len(x) - 1, frames, dtype=np.float32)
    before = np.minimum(place.astype(np.int64), max(len(x) - 2, 0))
    after = np.minimum(before + 1, len(x) - 1)
    along = (place - before.astype(np.float32)).reshape(-1, *[1] * (x.ndim - 1))
    return x[before] * (1 - along) + x[after] * along


def moments(rows: Callable[[], Iterable[np.ndarray]]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """({"mean", "std"}: float32 [width], constant: bool [width]) of all the arrays [n, width] that `rows()` gives; it is asked twice. The
    std of a column that is constant to the precision of float32 is 1: it is centred and not scaled."""
    total, square, number = 0.0, 0.0, 0
    for x in rows():
        total, number = total + x.sum(axis=0, dtype=np.float64), number + len(x)
    mean = total / number
    for x in rows():
        square += np.square(x - mean[None]).sum(axis=0)
    std = np.sqrt(square / number)
    constant = std <= 1e-6 * np.maximum(np.abs(mean), 1e-30)
    return {"mean": mean.astype(np.float32), "std": np.where(constant, 1.0, std).astype(np.float32)}, constant


def features(split: Split, parts: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """(float64 [N, W], labels int [N]), for models that know no time: of each channel mean, standard deviation and mean step from frame
    to frame, and its mean in each of `parts` parts of its time; of sequences of one frame, that frame."""
    rows = []
    for i in range(len(split)):
        x = split.read(i).astype(np.float64)
        if split.frames > 1:
            x = x if len(x) >= parts else resample(x, parts)
            whole = [x.mean(axis=0), x.std(axis=0), np.abs(np.diff(x, axis=0)).mean(axis=0)]
            x = np.stack(whole + [part.mean(axis=0) for part in np.array_split(x, parts)])
        rows.append(x.ravel())
    return np.stack(rows), split.labels.astype(np.int64)


def _classes(config: SequenceConfig, listing: Listing) -> tuple[list[int], np.ndarray]:
    """(places of the sequences of the first data.classes classes, their class indices int32)."""
    names = sorted(set(listing.labels))
    if config.classes > len(names):
        config.refuse("classes", f"at most {len(names)} (0: all)")
    index = {name: i for i, name in enumerate(names[: config.classes or None])}
    chosen = [i for i, label in enumerate(listing.labels) if label in index]
    return chosen, np.asarray([index[listing.labels[i]] for i in chosen], np.int32)


def _reduction(config: SequenceConfig, training: reduction.Sequences) -> reduction.Reduction | None:
    if config.reduce == "pca":
        return reduction.fit_pca(training, config.components)
    return reduction.fit_tucker(training, config.ranks) if config.reduce == "tucker" else None


def _at(read: Callable[[int], np.ndarray], places: tuple[int, ...]) -> Callable[[int], np.ndarray]:
    return lambda i: read(places[i])


def describe(batch: dict[str, np.ndarray], classes: tuple[str, ...], rows: int = 8) -> str:
    """A batch for people: its shape, and the label, subject, length and range of the first `rows` rows."""
    x = batch["x"]
    lines = [f"{len(x)} sequences of {x.shape[1]} x {x.shape[2]}, {int(batch['valid'].sum())} valid"]
    for i in range(min(rows, len(x))):
        label, frames = int(batch["label"][i]), int(batch["length"][i])
        values = x[i, :frames]
        lines.append(f"row {batch['row'][i]}: label {label} ({classes[label]}), subject {batch['subject'][i]}, {frames} frames, values "
                     f"{values.min():.3g} to {values.max():.3g}")  # fmt: skip
    return "\n".join(lines) + "\n"
