"""Which examples train, choose and test: by groups that stay whole (subjects, cameras, places), within each class, or as given.

What is drawn is drawn by the hash of names: the same on every machine, and an example keeps its side when others are added. A split
that would lie is refused: a test class that never trains, a class of too few examples, a group on two sides.
"""

import dataclasses
import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence

from jaxdistill import UserError

PARTS = ("train", "validation", "test")
KINDS = ("groups", "stratified", "given")


@dataclasses.dataclass(frozen=True)
class Rule:
    """The section `data` of sequences, as far as it says how they are split; `sequences.SequenceConfig` has these keys too."""

    split: str = ""  # groups (each whole) | stratified (within each class) | given (by the source); "": given, else groups, if it can be
    group: str = "subject"  # what may not be on two sides, where the source has it; "": anything may
    test_groups: tuple = ()  # of split groups; (): as published, else a share `test`, drawn
    test: float = 0.2  # share of the groups, or of each class's examples, that are the test where one is drawn
    validation: float = 0.1  # the same, of what trains; 0: no validation split
    fold: int = 0  # which of the disjoint shares is the validation split: 0 to 1 / validation - 1; -1: that of the run's seed
    per_class: int = 0  # examples of each class that train or validate, drawn; 0: all
    imbalance: float = 1.0  # commonest class over rarest, after thinning: class i of K keeps imbalance ** (-i / (K - 1)) of its examples
    min_per_class: int = 2  # training examples that each class must have
    seed: int = 0  # of these draws; -1: the run's

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if not (type(value) is kind or (kind is float and type(value) is int)):
                self.refuse(field.name, kind.__name__)
        if self.split not in ("", *KINDS):
            self.refuse("split", " | ".join(KINDS))
        for name, least, most in (
            ("test", 0, 0.9), ("validation", 0, 0.9), ("fold", -1, math.inf), ("per_class", 0, math.inf), ("imbalance", 1, math.inf),
            ("min_per_class", 1, math.inf), ("seed", -1, 2**31 - 1),
        ):  # fmt: skip
            if not least <= getattr(self, name) <= most:
                self.refuse(name, f"{least} or more" if most == math.inf else f"{least} to {most}")
        if self.fold < 0 and not self.validation:
            self.refuse("fold", "0 with data.validation 0")
        if self.fold > 0 and (self.fold + 1) * self.validation > 1 + 1e-9:
            self.refuse("fold", f"less than 1 / data.validation ({self.validation})")
        if self.test_groups and self.split in ("stratified", "given"):
            self.refuse("test_groups", f"() with data.split {self.split!r}; groups are of 'groups'")

    def of(self, seed: int):
        """The rule of a run with this seed."""
        fold = seed % int(1 / self.validation + 1e-9) if self.fold < 0 else self.fold
        return dataclasses.replace(self, seed=seed if self.seed < 0 else self.seed, fold=fold)

    def refuse(self, name: str, accepted: str):
        raise UserError(f"config key data.{name}: found {getattr(self, name)!r}; accepted: {accepted}")


def ranked(names: Iterable, salt: str = "") -> list:
    """Names in the order of their hashes."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{salt}{name}".encode()).digest())


def held_out(names: Iterable, share: float, *, salt: str = "", fold: int = 0) -> set:
    """The `share` of `names` with the smallest hashes: rounded, at least one and at most all but one; none of a share of 0. fold: the
    next such shares, in a circle."""
    order = ranked(names, salt)
    if share == 0 or len(order) < 2:
        return set()
    start, end = (int(at * share * len(order) + 0.5) for at in (fold, fold + 1))
    count = min(len(order) - 1, max(1, end - start))
    return {order[(start + i) % len(order)] for i in range(count)}


def assign(
    rule: Rule, names: Sequence[str], labels: Sequence[Hashable], groups: Sequence[Hashable] | None = None,
    parts: Sequence[str] | None = None,
) -> dict[str, list[int]]:  # fmt: skip
    """{part: places of its examples, in order}, of PARTS those that are not empty. Train and test never are.

    Args:
      names: of examples, each its own; only they decide what is drawn.
      labels: the class of each, numbers or names.
      groups: of each, what may not be on two sides (rule.group); None: the source has no such thing.
      parts: of each, one of PARTS, where the source is split.

    Raises:
      UserError: groups that no example has; a split without examples; a class of validation or test that does not train, or that
        trains with fewer than `min_per_class`; a group on two sides.
    """
    if len(set(names)) < len(names):
        raise UserError(f"data: two examples are called {Counter(names).most_common(1)[0][0]!r}; accepted: names that differ")
    kind = rule.split or ("given" if parts else "groups" if groups else "stratified")
    side = dict.fromkeys(range(len(names)), "train")
    whole = kind == "groups" or (kind == "given" and groups is not None)  # how validation is cut: as the test was

    def draw(share: float, use: str, fold: int = 0) -> None:
        places, salt = [i for i in side if side[i] == "train"], f"{rule.seed} {use} "
        bins = defaultdict(list)
        for i in places:
            bins[groups[i] if whole else labels[i]].append(i)
        if whole:
            chosen = held_out(bins, share, salt=salt, fold=fold)
            drawn = [i for name in chosen for i in bins[name]]
        else:
            drawn = [i for each in bins.values() for i in _held_out(names, each, share, salt, fold)]
        side.update(dict.fromkeys(drawn, use))

    if kind == "given":
        if not parts:
            rule.refuse("split", "groups | stratified, as this source is not split")
        side = dict(enumerate(parts))
    elif kind == "groups":
        if groups is None:
            rule.refuse("group", "what the source has, or data.split 'stratified'")
        if rule.test_groups:
            side.update(dict.fromkeys(_named(rule, groups), "test"))
        else:
            draw(rule.test, "test")
    else:
        draw(rule.test, "test")
    _thin(rule, names, labels, side)
    if groups is not None:
        _check_groups(rule, groups, _places(side))
    if rule.validation and "validation" not in side.values():
        draw(rule.validation, "validation", rule.fold)
    found = _places(side)
    _check_classes(rule, kind, labels, found)
    return {part: places for part, places in found.items() if places}


def _held_out(names: Sequence[str], places: list[int], share: float, salt: str, fold: int) -> list[int]:
    """`held_out` of the examples at `places`, by their names."""
    at = {names[i]: i for i in places}
    return [at[name] for name in held_out(at, share, salt=salt, fold=fold)]


def counts(found: dict[str, list[int]]) -> str:
    """ "train 120, validation 12, test 40", for people."""
    return ", ".join(f"{part} {len(places)}" for part, places in found.items())


def some(values: Iterable, most: int = 8) -> str:
    """The first few of them, and how many there are when that is more."""
    values = list(values)
    return ", ".join(map(str, values[:most])) + (f" and {len(values) - most} more" if len(values) > most else "")


def _named(rule: Rule, groups: Sequence[Hashable]) -> list[int]:
    """Places of the examples of rule.test_groups. Numbers and their spelling are the same: a table knows only text."""
    wanted = {str(value) for value in rule.test_groups}
    if missing := [value for value in rule.test_groups if str(value) not in set(map(str, groups))]:
        raise UserError(f"config key data.test_groups: found {missing[0]!r}, a {rule.group} that no example has; accepted: some of "
                        f"{some(sorted(set(groups)), 30)}")  # fmt: skip
    return [i for i, group in enumerate(groups) if str(group) in wanted]


def _thin(rule: Rule, names, labels, side: dict[int, str]) -> None:
    """Takes out, of each class, the training examples beyond `per_class` and `imbalance`."""
    by_label = defaultdict(list)
    for i, part in side.items():
        if part == "train":
            by_label[labels[i]].append(i)
    if rule.per_class and (few := [f"{x!r} {len(by_label[x])}" for x in sorted(by_label) if len(by_label[x]) < rule.per_class]):
        rule.refuse("per_class", f"at most the training examples of each class; fewer have {some(few)}")
    for at, label in enumerate(sorted(by_label)):
        at = {names[i]: i for i in by_label[label]} | {None: at / max(len(by_label) - 1, 1)}
        share = rule.imbalance ** -at.pop(None)
        kept = int(share * (rule.per_class or len(at)) + 0.5)
        for name in ranked(at, f"{rule.seed} kept ")[kept:]:
            del side[at[name]]


def _places(side: dict[int, str]) -> dict[str, list[int]]:
    return {part: [i for i in side if side[i] == part] for part in PARTS}


def _check_groups(rule: Rule, groups, found: dict[str, list[int]]) -> None:
    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        if both := {groups[i] for i in found[one]} & {groups[i] for i in found[other]}:
            raise UserError(f"config key data.group: found {rule.group!r}, of which {some(sorted(both))} is in {one} and in {other} "
                            f"({counts(found)}); accepted: data.split 'groups', or data.group '' where that is meant")  # fmt: skip


def _check_classes(rule: Rule, kind: str, labels, found: dict[str, list[int]]) -> None:
    tell = counts(found)
    for part in ("train", "test"):
        if not found[part]:
            raise UserError(f"config key data.split: found {kind!r}, and no {part} example ({tell}); accepted: a split with both")
    if rule.validation and not found["validation"]:
        raise UserError(f"config key data.validation: found {rule.validation}, and nothing to cut it from ({tell}); accepted: 0, or two "
                        "or more groups (or examples a class) that train")  # fmt: skip
    trained = Counter(labels[i] for i in found["train"])
    if len(trained) < 2:
        raise UserError(f"config key data.split: found {kind!r}, and {len(trained)} class to train on ({tell}); accepted: two or more")
    for part in ("test", "validation"):
        if unseen := sorted({labels[i] for i in found[part]} - trained.keys()):
            raise UserError(f"config key data.split: found {kind!r}, and {part} classes that never train: {some(unseen)} ({tell}); "
                            "accepted: classes that train")  # fmt: skip
    if few := [f"{label} {trained[label]}" for label in sorted(trained) if trained[label] < rule.min_per_class]:
        raise UserError(f"config key data.min_per_class: found {rule.min_per_class}, and fewer training examples of {some(few)} ({tell}); "
                        "accepted: a split with as many of each class")  # fmt: skip
