"""Gates: pure, judged by the memory they were given, and silent where all is well."""

import copy
import json

import pytest

from jaxdistill.diagnosis.gates import Gates

GATES = Gates(("a", "b", "c"), (frozenset({"fit"}), frozenset({"kd"}), frozenset()), patience=3, streak=2)


def metrics(moved=(True, True, False), **changes) -> dict:
    line = lambda weight, count: {"raw": 1.0, "weight": weight, "weighted": weight, "count": count}  # noqa: E731
    return {"finite": True, "streak": 0, "skipped": 0, "loss": 1.0, "grad_norm": 1.0, "gap": 0.0, "lr": 0.1, "moved": moved,
            "terms": {"fit": line(1.0, 4.0), "kd": line(1.0, 4.0)}, "groups": {"all": {"changed": 1.0}}} | changes


def run(gates, several, memory=None) -> tuple[dict, list]:
    memory, all_found = memory or gates.start(), []
    for step, one in enumerate(several, 1):
        before = copy.deepcopy(memory)
        after, found = gates.check(memory, step, one)
        assert memory == before  # pure
        memory = json.loads(json.dumps(after))  # a checkpoint lies between any two updates
        all_found += [(finding.name, finding.severity, step) for finding in found]
    return memory, all_found


def test_a_healthy_run_finds_nothing():
    assert run(GATES, [metrics()] * 20)[1] == []


def test_a_leaf_that_no_term_reaches_may_rest():
    assert run(GATES, [metrics(moved=(True, True, False))] * 20)[1] == []


def test_a_reached_leaf_without_gradient_stops_the_run():
    found = run(GATES, [metrics(moved=(True, False, False))] * 3)[1]
    assert found == [("zero_gradient", "error", 3)]
    _, (finding,) = GATES.check(run(GATES, [metrics(moved=(True, False, False))] * 2)[0], 3, metrics(moved=(True, False, False)))
    assert "b" in finding.evidence
    assert "a" not in finding.evidence.split(": ")[-1]


def test_one_gradient_is_enough():
    assert run(GATES, [metrics(moved=(True, False, False))] * 2 + [metrics()] + [metrics(moved=(False, False, False))] * 20)[1] == []


def test_only_updates_that_could_move_it_count():
    """Not those in which its term has no weight or no examples, or the rate is 0, or which were skipped."""
    still = (True, False, False)
    off = metrics(moved=still)
    off["terms"]["kd"] = {"raw": 0.0, "weight": 0.0, "weighted": 0.0, "count": 4.0}
    empty = metrics(moved=still)
    empty["terms"]["kd"] = {"raw": 0.0, "weight": 1.0, "weighted": 0.0, "count": 0.0}
    skipped = metrics(moved=still, finite=False, streak=1)
    idle = [off, empty, metrics(moved=still, lr=0.0), skipped] * 3
    memory, found = run(GATES, idle)
    assert not any(name == "zero_gradient" for name, _, _ in found)
    assert run(GATES, [metrics(moved=still)] * 3, memory)[1] == [("zero_gradient", "error", 3)]


def test_patience_0_turns_it_off():
    assert run(GATES._replace(patience=0), [metrics(moved=(False, False, False))] * 20)[1] == []


def test_non_finite_updates_warn_and_then_stop():
    bad = [metrics(finite=False, streak=n, loss=float("nan")) for n in (1, 2)]
    assert run(GATES, bad)[1] == [("non_finite", "warning", 1), ("non_finite", "error", 2)]


IDLE = GATES._replace(idle=4)


class TestIdle:
    """Finite updates in a row that could change nothing, or should have and did not."""

    masked = metrics()["terms"] | {name: {"raw": 0.0, "weight": 1.0, "weighted": 0.0, "count": count}
                                   for name, count in (("fit", 0.0), ("kd", 0.0), ("prior", 1.0))}
    sick = {
        "lr_zero": metrics(lr=0.0),
        "all_masked": metrics(terms=masked),
        "optimizer_not_stepping": metrics(groups={"a": {"changed": 0.0}, "b": {"changed": 0.0}}),
    }

    @pytest.mark.parametrize("name", sick)
    def test_in_a_row_they_stop_the_run_and_are_told_once(self, name):
        assert run(IDLE, [self.sick[name]] * 3 + [metrics()] + [self.sick[name]] * 3)[1] == []
        assert run(IDLE, [self.sick[name]] * 12)[1] == [(name, "error", 4)]
        assert run(IDLE._replace(idle=0), [self.sick[name]] * 12)[1] == []

    @pytest.mark.parametrize("well", [
        metrics(groups={"a": {"changed": 0.0}, "b": {"changed": 0.01}}),  # a group may rest
        metrics(groups={"a": {"changed": 0.0}}, grad_norm=0.0),  # nothing to step by: that is another fault
        metrics(terms={"fit": {"raw": 1.0, "weight": 1.0, "weighted": 1.0, "count": 1.0}}),  # a batch of one example
        metrics(terms={"fit": {"raw": 1.0, "weight": 1.0, "weighted": 1.0, "count": 1.0},  # and a term that is switched off
                       "kd": {"raw": 0.0, "weight": 0.0, "weighted": 0.0, "count": 0.0}}),
        metrics(terms={"fit": {"raw": 1.0, "weight": 1.0, "weighted": 1.0, "count": 9.0},  # one term's examples are all missing
                       "kd": {"raw": 0.0, "weight": 1.0, "weighted": 0.0, "count": 0.0}}),
    ])
    def test_healthy_look_alikes(self, well):
        assert run(IDLE, [well] * 12)[1] == []

    def test_skipped_updates_neither_count_nor_break_the_row(self):
        bad, still = metrics(finite=False, streak=1), self.sick["optimizer_not_stepping"]
        assert [one for one in run(IDLE, [still, bad] * 4)[1] if one[0] != "non_finite"] == [("optimizer_not_stepping", "error", 7)]


def test_what_is_not_among_those_that_stop_is_a_warning_and_said_once():
    lenient = GATES._replace(stop=("non_finite",))
    assert run(lenient, [metrics(gap=1.0)] * 5)[1] == [("ledger_gap", "warning", 1)]
    bad = [metrics(finite=False, streak=n) for n in (1, 2, 3)]
    assert run(GATES._replace(stop=()), bad)[1] == [("non_finite", "warning", n) for n in (1, 2, 3)]  # each one was skipped


@pytest.mark.parametrize(("gap", "found"), [(9e-5, []), (2e-4, [("ledger_gap", "error", 1)])])
def test_a_ledger_that_does_not_add_up(gap, found):
    assert run(GATES, [metrics(gap=gap)])[1] == found
