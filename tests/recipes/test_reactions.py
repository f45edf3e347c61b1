"""What follows an evaluation: pure functions, whose memory is JSON."""

import json

import pytest

from jaxdistill import UserError
from jaxdistill.recipe import Rest, Schedule
from jaxdistill.recipes import reactions


def run(reaction, *found: dict) -> list[tuple]:
    """(controls, stop reason) after each evaluation; the memory goes through JSON in between, as it does in a checkpoint."""
    memory, seen = reaction.memory, []
    for number, metrics in enumerate(found, 1):
        memory, controls, stop = reaction.react(json.loads(json.dumps(memory)), number, metrics)
        seen.append((controls, stop))
    return seen


def test_early_stopping_waits_for_patience_evaluations_in_a_row():
    stops = [stop for _, stop in run(reactions.early_stopping("m", 2), *({"m": m} for m in (3.0, 2.0, 2.0, 1.9, 1.9, 1.95)))]
    assert stops[:5] == [None] * 5
    assert stops[5] == "m has not fallen below 1.9000 for 2 evaluations"


def test_early_stopping_does_not_take_a_lost_run_for_a_better_one():
    stops = [stop for _, stop in run(reactions.early_stopping("m", 2), {"m": 2.0}, {"m": float("nan")}, {"m": float("nan")})]
    assert stops[:2] == [None, None]
    assert stops[2]
    stops = [stop for _, stop in run(reactions.early_stopping("m", 2), *({"m": m} for m in (float("nan"), 2.0, 1.9, 1.9)))]
    assert stops == [None] * 4  # also where it comes first: what follows is better


def test_open_below_opens_once():
    reaction = reactions.open_below("kd", "m", 5.0)
    assert reaction.controls == {"kd": 0.0}
    assert [controls["kd"] for controls, _ in run(reaction, *({"m": m} for m in (6.0, 5.0, 4.9, 7.0)))] == [0, 0, 1, 1]


def test_balance_brings_terms_to_the_size_of_the_reference():
    reaction = reactions.balance("kd", ("hidden", "router"))
    assert reaction.controls == {"hidden": 1.0, "router": 1.0}
    first = {"train/kd": 2.0, "train/hidden": 0.5, "train/router": 0.0}  # the router is not on yet
    second = {"train/kd": 4.0, "train/hidden": 1.5, "train/router": 6.0}
    lost = {"train/kd": float("inf"), "train/hidden": float("nan"), "train/router": 6.0}
    found = [controls for controls, _ in run(reaction, first, second, lost)]
    assert found[0] == {"hidden": 4.0}
    assert found[1] == pytest.approx({"hidden": 3.0 / 1.0, "router": 3.0 / 6.0})  # running means: (2 + 4) / 2, (0.5 + 1.5) / 2
    assert found[2] == pytest.approx(found[1])  # what is not finite changes no mean


def test_what_keeps_the_routing_even_stays_its_share_of_the_router():
    numbers = {"lm": 0.5, "kd": 0.5, "router": 0.1, "router_balance": 0.001, "hidden": 0.1, "hidden_balance": 0.0}
    weights = {name: Schedule(((0.0, weight),)) for name, weight in numbers.items()}
    reaction = reactions.chosen(reactions.ReactConfig(balance="kd"), weights)
    assert reaction.controls == {"router": 1.0, "router_balance": 1.0, "hidden": 1.0}
    controls = run(reaction, {"train/kd": 2.0, "train/hidden": 0.0, "train/router": 0.5})[0][0]
    assert controls == {"router": 4.0, "router_balance": 4.0}


def test_balance_multiplies_by_no_more_than_a_thousand():
    reaction = reactions.balance("kd", ("hidden", "router"))
    found = run(reaction, {"train/kd": 1.0, "train/hidden": 1e-9, "train/router": 1e9})
    assert found[0][0] == {"hidden": reactions.WIDEST, "router": 1 / reactions.WIDEST}


def test_together():
    """Memories by name, controls multiplied, the first reason to stop."""
    both = reactions.together({
        "gate": reactions.open_below("kd", "m", 5.0), "balance": reactions.balance("lm", ("kd",)),
        "first": reactions.early_stopping("m", 1), "second": reactions.early_stopping("n", 1),
    })
    assert both.memory == {"gate": {"opened_at": None}, "balance": {"means": {}}, "first": {"best": None, "waited": 0},
                           "second": {"best": None, "waited": 0}}
    assert both.controls == {"kd": 0.0}
    found = run(both, {"m": 6.0, "n": 1.0, "train/lm": 4.0, "train/kd": 2.0}, {"m": 4.0, "n": 1.0, "train/lm": 4.0, "train/kd": 2.0},
                {"m": 4.5, "n": 1.0, "train/lm": 4.0, "train/kd": 2.0})
    assert [controls["kd"] for controls, _ in found] == [0.0, 2.0, 2.0]
    assert found[0][1] is None
    assert found[1][1].startswith("n has not fallen")
    assert found[2][1].startswith("m has not fallen")
    assert reactions.together({}).react({}, 1, {}) == ({}, {}, None)


def test_chosen():
    weights = {"lm": Rest("kd"), "kd": Schedule(((0.0, 0.5),)), "hidden": Schedule(((0.0, 0.0), (9.0, 1.0))),
               "hidden_balance": Schedule(((0.0, 0.0), (9.0, 0.01))), "router": Schedule(((0.0, 0.0),))}
    assert reactions.chosen(reactions.ReactConfig(), weights).memory == {}
    everything = reactions.chosen(reactions.ReactConfig(patience=1, balance="kd"), weights, gate=5.0)
    assert set(everything.memory) == {"stopping", "gate", "balance"}
    assert everything.controls == {"kd": 0.0, "hidden": 1.0, "hidden_balance": 1.0}  # lm is what kd leaves; the router is off
    with pytest.raises(UserError, match=r"^config key react.balance: found 'router'; accepted: '' or one of lm, kd, hidden$"):
        reactions.chosen(reactions.ReactConfig(balance="router"), weights)
