"""Splits: groups stay whole, classes are covered, draws depend on names alone, and what would lie is refused with its counts."""

from collections import Counter

import pytest

from jaxdistill import UserError
from jaxdistill.data.group_splits import Rule, assign, held_out, ranked


def table(groups: int = 10, classes: int = 4, takes: int = 3):
    """Each group shows each class `takes` times: (names, labels, groups)."""
    rows = [(f"{g}/{c}/{t}", c, g) for g in range(groups) for c in range(classes) for t in range(takes)]
    return tuple(map(list, zip(*rows, strict=True)))


def of(found, column):
    return {part: {column[i] for i in places} for part, places in found.items()}


def per_class(places, labels):
    return Counter(labels[i] for i in places)


def test_groups_stay_whole():
    names, labels, groups = table()
    found = assign(Rule(test=0.3, validation=0.2), names, labels, groups)
    sides = of(found, groups)
    assert {part: len(each) for part, each in sides.items()} == {"train": 6, "validation": 1, "test": 3}  # 0.2 of 7 that train
    assert sides["train"] | sides["validation"] | sides["test"] == set(range(10))
    assert sum(map(len, found.values())) == len(names)
    assert all(places == sorted(places) for places in found.values())


@pytest.mark.parametrize("named", [(3, 7), ("3", "7")])  # a table knows only text
def test_named_groups_are_the_test(named):
    names, labels, groups = table()
    sides = of(assign(Rule(test_groups=named), names, labels, groups), groups)
    assert sides["test"] == {3, 7}
    assert not sides["validation"] & sides["train"]


def test_stratified_takes_the_same_share_of_each_class():
    names, labels, _ = table(takes=5)  # 50 of each
    found = assign(Rule(test=0.2, validation=0.1), names, labels)
    for part, count in {"train": 36, "validation": 4, "test": 10}.items():
        assert per_class(found[part], labels) == dict.fromkeys(range(4), count)


def test_a_seed_is_another_draw_and_the_same_seed_the_same():
    names, labels, groups = table()
    draws = [assign(Rule(split=split, group="", seed=seed), names, labels, groups if split == "groups" else None)
             for split in ("groups", "stratified") for seed in (0, 0, 1)]  # fmt: skip
    assert draws[0] == draws[1] != draws[2]
    assert draws[3] == draws[4] != draws[5]
    of_the_run = [assign(Rule(split="stratified", seed=-1).of(seed), names, labels) for seed in (0, 1)]
    assert of_the_run == [draws[3], draws[5]]


def test_an_example_keeps_its_side_when_the_order_changes_and_when_a_class_is_added():
    names, labels, _ = table()
    found = assign(Rule(), names, labels)
    backwards = assign(Rule(), names[::-1], labels[::-1])
    assert of(found, names) == of(backwards, names[::-1])
    more = assign(Rule(), names + [f"new {i}" for i in range(9)], labels + [9] * 9)
    assert of(found, names)["test"] == {name for name in of(more, names + [f"new {i}" for i in range(9)])["test"] if "new" not in name}


def test_given_parts_are_kept_and_validation_is_cut_from_training_alone():
    names, labels, groups = table()
    parts = ["test" if group > 6 else "train" for group in groups]
    by_group = assign(Rule(validation=0.3), names, labels, groups, parts)
    by_class = assign(Rule(validation=0.3, group=""), names, labels, None, parts)
    for found in (by_group, by_class):
        assert {groups[i] for i in found["test"]} == {7, 8, 9}
        assert len(found["train"]) + len(found["validation"]) == 7 * 12
    assert not of(by_group, groups)["validation"] & of(by_group, groups)["train"]
    assert per_class(by_class["validation"], labels) == dict.fromkeys(range(4), 6)
    own = ["validation" if group == 6 else part for group, part in zip(groups, parts, strict=True)]
    assert of(assign(Rule(validation=0.3), names, labels, groups, own), groups)["validation"] == {6}


def test_the_folds_are_disjoint_and_cover_what_trains():
    names, labels, _ = table()  # 30 of each class, of which 24 train
    found = [assign(Rule(validation=0.25, fold=fold), names, labels) for fold in range(4)]
    assert all(each["test"] == found[0]["test"] for each in found)
    cut = [set(each["validation"]) for each in found]
    assert [len(each) for each in cut] == [24] * 4
    assert len(set.union(*cut)) == 96
    of_the_run = [assign(Rule(validation=0.25, fold=-1).of(seed), names, labels)["validation"] for seed in (0, 1, 4)]
    assert [set(each) for each in of_the_run] == [cut[0], cut[1], cut[0]]
    uneven = [held_out(range(9), 0.3, fold=fold) for fold in range(3)]  # 2.7 of 9 at a time
    assert [len(each) for each in uneven] == [3, 2, 3]
    assert len(set.union(*uneven)) == 8


def test_thinning_keeps_the_test_and_takes_validation_from_what_is_left():
    names, labels, groups = table()
    thick = assign(Rule(test_groups=(0, 1)), names, labels, groups)
    thin = assign(Rule(test_groups=(0, 1), per_class=10, validation=0.0), names, labels, groups)
    assert thin["test"] == thick["test"]
    assert per_class(thin["train"], labels) == dict.fromkeys(range(4), 10)
    stratified = assign(Rule(per_class=10, validation=0.2), names, labels)
    assert per_class(stratified["train"], labels) == dict.fromkeys(range(4), 8)
    assert per_class(stratified["validation"], labels) == dict.fromkeys(range(4), 2)
    other = assign(Rule(test_groups=(0, 1), per_class=10, validation=0.0, seed=1), names, labels, groups)
    assert set(other["train"]) != set(thin["train"])


def test_imbalance_falls_from_the_first_class_to_the_last():
    names, labels, _ = table(groups=25)  # 75 of each, 60 that train
    found = assign(Rule(imbalance=10.0, validation=0.0), names, labels)
    assert per_class(found["train"], labels) == {0: 60, 1: 28, 2: 13, 3: 6}  # 60 x 10 ** (-i / 3)
    assert per_class(found["test"], labels) == dict.fromkeys(range(4), 15)


def test_held_out_is_the_smallest_hashes_and_folds_go_round():
    names = [f"name {i}" for i in range(10)]
    assert held_out(names, 0.2) == set(ranked(names)[:2])
    assert held_out(names, 0.2, fold=4) == set(ranked(names)[8:])
    assert held_out(names, 0.3, fold=3) == {ranked(names)[9], *ranked(names)[:2]}
    assert held_out(names, 0.001) == set(ranked(names)[:1])  # at least one
    assert held_out(names, 0.999) == set(ranked(names)[:9])  # but not all
    assert held_out(names, 0.0) == held_out(names[:1], 0.9) == set()
    assert ranked(names, "salt") != ranked(names)


# What is refused: one line, with names and counts


def refused(rule: Rule, *table) -> str:
    with pytest.raises(UserError) as caught:
        assign(rule, *table)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_test_class_that_never_trains():
    names, labels, groups = table()
    labels = [f"class {9 if group == 9 and label == 3 else label}" for group, label in zip(groups, labels, strict=True)]
    said = refused(Rule(test_groups=(9,)), names, labels, groups)
    assert said.startswith("config key data.split: found 'groups', and test classes that never train: class 9 (train 96, validation 12, ")
    parts = ["validation" if group == 9 else "test" if group == 0 else "train" for group in groups]
    assert "validation classes that never train: class 9" in refused(Rule(), names, labels, groups, parts)


def test_fewer_than_k_of_a_class():
    names, labels, groups = table()
    rows = [i for i in range(len(names)) if labels[i] < 2 or groups[i] in (0, labels[i])]  # classes 2 and 3: in two groups only
    few = [[column[i] for i in rows] for column in (names, labels, groups)]
    said = refused(Rule(test_groups=(0,), min_per_class=4, validation=0.0), *few)
    assert "data.min_per_class: found 4, and fewer training examples of 2 3, 3 3 (train 60, validation 0, test 12)" in said


@pytest.mark.parametrize(("parts", "said"), [
    (["train", "test"], "found 'subject', of which 0, 1, 2, 3, 4, 5, 6, 7 and 2 more is in train and in test (train 60, "),
    (["train", "train", "validation", "test"], "is in train and in test (train 60, validation 30, test 30)"),
])  # fmt: skip
def test_a_group_on_two_sides(parts, said):
    names, labels, groups = table()
    given = [parts[i % len(parts)] for i in range(len(names))]
    found = refused(Rule(validation=0.0), names, labels, groups, given)
    assert said in found
    assert "accepted: data.split 'groups', or data.group '' where that is meant" in found
    assign(Rule(validation=0.0), names, labels, None, given)  # as the source's, where no group is named


def test_a_stratified_draw_with_groups():
    names, labels, groups = table()
    assert "is in train and in test" in refused(Rule(split="stratified"), names, labels, groups)


@pytest.mark.parametrize(("rule", "said"), [
    (dict(test_groups=(3, 17)), "data.test_groups: found 17, a subject that no example has; accepted: some of 0, 1, 2, 3, 4, 5, 6, 7"),
    (dict(test_groups=tuple(range(10))), "data.split: found 'groups', and no train example (train 0, validation 0, test 120)"),
    (dict(test_groups=tuple(range(9))), "data.validation: found 0.1, and nothing to cut it from (train 12, validation 0, test 108)"),
    (dict(test=0.0), "and no test example"),
    (dict(split="given"), "data.split: found 'given'; accepted: groups | stratified, as this source is not split"),
    (dict(per_class=28), "data.per_class: found 28; accepted: at most the training examples of each class; fewer have 0 24, 1 24"),
])  # fmt: skip
def test_a_rule_that_does_not_fit_the_data(rule, said):
    assert said in refused(Rule(**rule), *table())


def test_two_examples_of_one_name():
    names, labels, groups = table()
    assert refused(Rule(), [*names[:-1], "0/1/2"], labels, groups) == "data: two examples are called '0/1/2'; accepted: names that differ"


def test_groups_of_a_source_that_has_none():
    names, labels, _ = table()
    assert refused(Rule(split="groups", group="room"), names, labels).startswith("config key data.group: found 'room'; accepted: what the")
    assert "1 class to train on" in refused(Rule(), names, [0] * len(names))


@pytest.mark.parametrize(("rule", "said"), [
    (dict(split="random"), "config key data.split: found 'random'; accepted: groups | stratified | given"),
    (dict(test=1.0), "config key data.test: found 1.0; accepted: 0 to 0.9"),
    (dict(validation="a"), "config key data.validation: found 'a'; accepted: float"),
    (dict(fold=10), "config key data.fold: found 10; accepted: less than 1 / data.validation"),
    (dict(fold=1, validation=0.9), "config key data.fold: found 1; accepted: less than 1 / data.validation"),
    (dict(fold=-1, validation=0.0), "config key data.fold: found -1; accepted: 0 with data.validation 0"),
    (dict(min_per_class=0), "config key data.min_per_class: found 0; accepted: 1 or more"),
    (dict(split="stratified", test_groups=(1,)), "config key data.test_groups: found (1,); accepted: () with data.split 'stratified'"),
])  # fmt: skip
def test_a_rule_that_is_none(rule, said):
    with pytest.raises(UserError) as caught:
        Rule(**rule)
    assert str(caught.value).startswith(said)
