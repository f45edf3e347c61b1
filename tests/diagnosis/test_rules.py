"""Each rule on records with its fault, of which it must be the first finding, and on those that look like it, of which it must be quiet."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from jaxdistill.diagnosis import records, rules
from tests.diagnosis.made import Made, blank, classifier, falling, gate, language

PAGE = Path(__file__).parents[2] / "experiments/doctor/README.md"


def findings(made: Made) -> list:
    return rules.judge(made.job())


def loud(made: Made) -> list[str]:
    return [finding.name for finding in findings(made) if finding.severity != "note"]


# --- faults -------------------------------------------------------------------------------------------------------------------------


def lr_zero():
    made = language().put("lr", 0.0)
    made.config["train"]["lr"] = 0.0
    return _still(made, lr=0.0)


def group_without_a_rate():
    """Most of the parameters, by an lr_mult of 0."""
    return language().put("groups/student/lr", 0.0).put("groups/student/update_ratio", 0.0).put("groups/student/changed", 0.0)


def _still(made: Made, **more) -> Made:
    """Parameters that stay as they were, and what follows from it."""
    for name in ("student", "student_no_decay"):
        for field, value in {"update_ratio": 0.0, "changed": 0.0, **more}.items():
            made.put(f"groups/{name}/{field}", value)
    made.term("lm", falling(made, 7.6, 7.6), 0.1).term("kd", falling(made, 5.0, 5.0), 0.9).probe("spread", 1e-4).probe("teacher_kl", 5.0)
    made.evaluations.clear()
    return made.measure("validation/nll", 7.62).measure("validation/teacher_kl", 5.0).measure("validation/bits_per_byte", 3.75)


def not_stepping():
    return _still(language())


def every_other():
    made = language()
    for name in ("student", "student_no_decay"):
        made.put(f"groups/{name}/changed", made.steps % 2).put(f"groups/{name}/update_ratio", made.steps % 2 * 1e-3)
    return made


def one_group_left_out():
    return language().put("groups/student_no_decay/changed", 0.0).put("groups/student_no_decay/update_ratio", 0.0)


def lr_too_small():
    made = _still(language(), changed=0.3, update_ratio=2e-7, lr=1e-9)
    return made.put("lr", 2e-8)


def schedule_over_early():
    made = language()
    lr = np.where(made.steps > 50, 1e-9, 3e-3)
    for path in ("lr", "groups/student/lr", "groups/student_no_decay/lr"):
        made.put(path, lr)
    return made


def lr_too_large():
    made = language()
    for name in ("student", "student_no_decay"):
        made.put(f"groups/{name}/param_norm", 20 * (1 + 300 * made.rising))
        made.put(f"groups/{name}/update_ratio", 0.5 / (1 + 9 * made.rising))
    return made.term("lm", falling(made, 7.6, 7.6) + 12 * made.rising, 0.1).term("kd", 5 + 9 * made.rising, 0.9)


def weights_decay_away():
    """As in document 004: accuracy rises while the new head is learned, then falls as the pretrained weights go."""
    made = classifier(1200)
    made.config["optimizer"]["decay"] = "coupled"
    made.put("groups/student/param_norm", 55.7 * (1 - 0.84 * made.rising))
    cost = np.where(made.rising < 0.3, 5.0 - 10 * made.rising, 2.0 + 2.5 * (made.rising - 0.3))
    return made.term("loss", cost, count=32.0)


def too_much_decay():
    made = classifier()
    made.manifest["groups"][0]["weight_decay"] = 10.0
    made.put("groups/student/param_norm", 20 * np.exp(-10 * np.cumsum(made.columns["lr"])))
    return made.term("loss", falling(made, 3.9, 3.85), count=32.0)


def teacher_drifts():
    made = language()
    noise = 0.02 * np.random.default_rng(0).normal(size=len(made.steps))
    return made.probe("teacher_entropy", 2.6 + 2.0 * made.rising + noise)


def target_meets_the_student():
    made = language()
    kd = falling(made, 5.0, 0.01)
    return made.term("kd", kd, 0.9).probe("teacher_kl", kd).measure("validation/teacher_kl", 3.0)


def projector(opened: bool = True, cost=7.6):
    made = language(300)
    made.config |= {"kd": {"weight": [[0.3, 0.0], [0.6, 0.5]], "mode": "projector"}, "projector": {"gate": not opened}}
    made.term("kd", falling(made, 0.03, 0.02), 0.5 if opened else 0.0).term("lm", falling(made, 7.6, 4.0), 0.5 if opened else 1.0)
    return made.measure("validation/projector_nll", cost)


def teacher_misaligned():
    return language().probe("teacher_nll", 7.9)


def unshifted():
    made = language()
    return made.term("lm", falling(made, 7.6, 0.1), 0.1).measure("validation/nll", 7.7 + made.rising)


def unshifted_everywhere():
    made = language().measure("validation/perplexity", np.exp(0.02))
    return made.term("lm", falling(made, 7.6, 0.02), 0.1).measure("validation/nll", 0.02)


def pads_in_the_divisor():
    made = language().probe("valid", 0.6)
    return made.term("lm", falling(made, 4.5, 2.1), 0.1, count=16 * 128.0)


def pads_predicted():
    made = language().probe("valid", 1.0)
    made.manifest["preflight"]["valid"] = 0.55
    return made.term("lm", falling(made, 7.6, 1.9), 0.1, count=16 * 128.0)


def schedule_makes_progress():
    """Document 001's: the raw values stand, the weight of the large term falls."""
    made = language()
    made.evaluations.clear()
    made.probe("teacher_kl", 4.7)
    return made.term("kd", falling(made, 37.6, 37.6), 0.7 - 0.6 * made.rising).term("lm", falling(made, 7.6, 7.55), 1.0)


def schedule_makes_an_explosion():
    made = language()
    return made.term("hidden", falling(made, 40.0, 39.0), 0.01 + 2 * made.rising)


def one_term_owns_it():
    return language().term("hidden", falling(language(), 160, 150), 0.3)


def gradient_owned():
    made = language().term("hidden", falling(language(), 0.5, 0.4), 0.3)
    return made.look(terms={"lm": {"grad_norm": 0.1, "share": 0.01}, "kd": {"grad_norm": 0.1, "share": 0.02},
                            "hidden": {"grad_norm": 9.7, "share": 0.97}})  # fmt: skip


def clamped():
    """Of a metric that is called loss, as in document 003."""
    made = language()
    made.evaluations.clear()
    return made.measure("validation/perplexity", math.exp(20)).measure("validation/loss", 51.66)


def clamped_round():
    return classifier().measure("validation/nll", 10.0, every=25)


def infinite_metric():
    return language().measure("validation/perplexity", math.inf)


def perplexity_of_total():
    made = language()
    return made.measure("validation/perplexity", np.exp(made.columns["loss"]))


def perplexity_of_total_alone():
    """As the documents have it: no nll is written beside it."""
    made = language()
    made.evaluations.clear()
    return made.measure("validation/perplexity", np.exp(made.columns["loss"]))


def masked():
    made = language()
    return made.term("lm", 0.0, 0.1, count=0.0).term("kd", 0.0, 0.9, count=0.0).put("grad_norm", 0.0).probe("spread", 1e-5)


def masked_at_times():
    made = language()
    empty = made.steps % 4 == 0
    return made.term("kd", np.where(empty, 0, falling(made, 5.0, 0.5)), 0.9, count=np.where(empty, 0, 2000))


def dead():
    made = classifier()
    made.findings[10] = [gate("zero_gradient")]
    return made.term("loss", falling(made, 3.9, 3.9), count=32.0).probe("spread", 1e-6)


def dead_later():
    return classifier().look(zero_gradient=["readout/kaf/alpha"])


def dead_group():
    return classifier().put("groups/student_no_decay/grad_norm", 0.0)


def saturated():
    made = classifier(classes=8)
    return made.probe("entropy", 0.01).probe("spread", 1.2).probe("logit_abs_max", 300.0).term("loss", 9 + made.rising, count=32.0)


def constant():
    made = classifier().probe("spread", 1e-4).probe("logit_std", 1e-4).probe("entropy", 3.9)
    return made.term("loss", falling(made, 3.95, 3.91), count=32.0)


def unreachable(**more):
    made = classifier(classes=8)
    made.manifest["preflight"]["reachable"] = {"largest": 0.157, "target": 0.7, "floor": 0.0, "target_entropy": 1.26} | more
    return made


def floor_above_the_targets():
    return unreachable(largest=1.0, floor=1.5)


def unscaled():
    made = classifier(classes=8)
    made.manifest["preflight"]["input"] = {"abs_max": 5e4, "mean_abs": 900.0, "std_max": 8e3}
    return made.probe("entropy", 0.01).probe("spread", 1.2).term("loss", 30 + made.rising, count=32.0)


def disjoint():
    made = classifier().measure("validation/accuracy", 0.0)
    made.manifest["preflight"]["unseen_classes"] = list(range(25, 50))
    return made


def leaks():
    made = classifier()
    made.manifest["preflight"]["leaks"] = ["subject 3", "subject 4"]
    return made


def memorised():
    made = classifier()
    made.manifest["preflight"]["train_rows"] = 200
    made.row["nll"] = 1.9
    return made.term("loss", falling(made, 3.9, 0.05), count=32.0).measure("validation/nll", falling(made, 3.9, 0.05))


def average_stays():
    made = classifier()
    made.config["train"]["ema"] = 0.999
    return made.look(ema_initial=0.01, ema_distance=0.4)


def average_unused():
    made = classifier()
    made.config["train"]["ema"] = 0.99
    return made.look(ema_initial=0.4, ema_distance=0.0)


def router(load=0.99, entropy=0.05):
    made = language()
    made.config["router"] = {"weight": [[0.0, 0.1]], "balance": 0.01}
    made.term("router", falling(made, 1.0, 0.5), 0.1).put("knobs/router_temperature", 1 - 0.9 * made.rising)
    for name, value in {"load_0": load, "load_1": (1 - load) / 2, "load_2": (1 - load) / 2, "entropy": entropy}.items():
        made.probe(f"router/{name}", value)
    return made


def teacher_knows_nothing():
    made = language()
    made.rows[0] |= {"bits_per_byte": 3.74, "nll": 7.6}
    return made.probe("teacher_nll", 7.6)


def teacher_no_better():
    made = language()
    made.rows[0]["bits_per_byte"] = 2.38
    return made


def of_the_batch():
    return classifier().look(batch_of_one=0.7)


def ends_in_nan():
    made = classifier()
    bad = made.steps > 190
    made.put("finite", ~bad).put("skipped", np.cumsum(bad))
    return made.term("loss", np.where(bad, np.nan, falling(made, 3.9, 0.4)), count=32.0)


def does_not_add_up():
    return language().put("gap", 0.02)


def teacher_moved():
    made = language()
    made.findings[100] = [gate("frozen_moved")]
    return made


def learned_by_heart():
    """Worse in the end than at the first evaluation."""
    made = language()
    made.manifest["preflight"]["train_rows"] = 100
    return made.measure("validation/bits_per_byte", 2.2 + 1.2 * made.rising).term("lm", falling(made, 7.6, 0.8), 0.1)


FAULTS = {
    "lr_zero": (lr_zero, group_without_a_rate),
    "optimizer_not_stepping": (not_stepping, every_other, one_group_left_out),
    "lr_too_small": (lr_too_small, schedule_over_early),
    "lr_too_large": (lr_too_large,),
    "weights_decaying_away": (weights_decay_away, too_much_decay),
    "teacher_follows_student": (teacher_drifts, target_meets_the_student),
    "projector_uninformative": (projector, lambda: projector(opened=False)),
    "teacher_misaligned": (teacher_misaligned,),
    "labels_not_shifted": (unshifted, unshifted_everywhere),
    "padding_counted": (pads_in_the_divisor, pads_predicted),
    "weight_schedule_mimics": (schedule_makes_progress, schedule_makes_an_explosion),
    "term_dominates": (one_term_owns_it, gradient_owned),
    "metric_clamped": (clamped, clamped_round, infinite_metric),
    "perplexity_of_total": (perplexity_of_total, perplexity_of_total_alone),
    "all_masked": (masked, masked_at_times),
    "zero_gradient": (dead, dead_later, dead_group),
    "saturated": (saturated,),
    "constant_predictor": (constant,),
    "target_unreachable": (unreachable, floor_above_the_targets),
    "inputs_unscaled": (unscaled,),
    "classes_disjoint": (disjoint,),
    "groups_leak": (leaks,),
    "memorised_leak": (memorised,),
    "ema_initial": (average_stays,),
    "ema_never_used": (average_unused,),
    "router_collapsed": (router,),
    "teacher_no_better": (teacher_knows_nothing, teacher_no_better),
    "batch_statistics": (of_the_batch,),
    "non_finite": (ends_in_nan,),
    "ledger_gap": (does_not_add_up,),
    "frozen_moved": (teacher_moved,),
    "overfitting": (learned_by_heart,),
}


@pytest.mark.parametrize(("name", "sick"), [(name, sick) for name, several in FAULTS.items() for sick in several])
def test_a_fault_is_the_first_finding(name, sick):
    found = findings(sick())
    assert found[0].name == name, found
    first = found[0]
    assert first.severity in ("warning", "error")
    assert re.search(r"\d", first.evidence)
    assert first.cause
    assert first.cure
    assert first.run == "kd-0"
    assert first.study.startswith("experiments/")
    assert not any("nan" in part for part in (first.evidence, first.cure))


# --- what looks like a fault, and is none -------------------------------------------------------------------------------------------


def small_and_learning():
    """Fine-tuning at 5e-5: an update moves little, the loss falls."""
    made = classifier()
    for name in ("student", "student_no_decay"):
        made.put(f"groups/{name}/update_ratio", 4e-5).put(f"groups/{name}/lr", 5e-5)
    return made.put("lr", 5e-5)


def norm_falls_and_learns():
    """A strong decoupled decay."""
    made = classifier()
    made.manifest["groups"][0]["weight_decay"] = 10.0
    return made.put("groups/student/param_norm", 20 * np.exp(-10 * np.cumsum(made.columns["lr"])))


def norm_grows_and_learns():
    return language().put("groups/student/param_norm", 10 * (1 + 5 * np.linspace(0, 1, 200)))


def a_rate_that_ends_at_zero():
    made = language()
    return made.put("lr", np.where(made.steps == 200, 0.0, made.columns["lr"]))


def confident_and_right():
    made = classifier().probe("logit_abs_max", 40.0)
    cost = falling(made, 3.9, 0.03)
    return made.term("loss", cost, count=32.0).probe("entropy", 0.9 * cost).probe("spread", 3.9 - cost)


def small_penalties():
    """A term 10,000 times as large as the others, by design."""
    made = classifier()
    return made.term("alpha", falling(made, 0.5, 0.4), 1e-4, count=1.0).term("beta", falling(made, 0.5, 0.4), 1e-4, count=1.0)


def a_ramp_from_zero():
    made = language()
    weight = np.clip(made.rising / 0.4 - 0.5, 0, 0.1)
    return made.term("attention", np.where(weight > 0, falling(made, 0.6, 0.4), 0.0), weight, count=np.where(weight > 0, 2000.0, 0.0))


def annealed_router():
    return router(load=0.4, entropy=0.01)


def weights_fall_and_raw_values_too():
    made = language()
    return made.term("kd", falling(made, 5.0, 0.5), 0.9 - 0.8 * made.rising)


def overfits_at_the_end():
    made = language()
    curve = np.where(made.rising < 0.6, 3.7 - 2.5 * made.rising, 2.2 + 0.3 * (made.rising - 0.6))
    return made.measure("validation/bits_per_byte", curve, every=20)


def test_untrained():
    """A run of two updates, whatever it shows, is no reason for anything louder than a note."""
    for make in (lambda: language(2), lambda: classifier(2), lambda: blank(2)):
        made = make()
        assert loud(made) == []
        made.probe("spread", 1e-9, every=1).probe("entropy", 1e-9, every=1).measure("validation/nll", 80.0, every=1)
        assert loud(made.measure("validation/projector_nll", 9.0, every=1)) == []


def learns_from_a_lost_teacher():
    """A projected teacher gets better, and so its likelihood of the labels moves."""
    made = projector(cost=0.0)
    made.evaluations.clear()
    return made.measure("validation/projector_nll", 7 - 3 * made.rising).probe("teacher_nll", 7 - 3 * made.rising)


def overfitted_teaching():
    """The KL to the teacher is met on text that was read forty times."""
    made = target_meets_the_student()
    made.manifest["preflight"]["train_rows"] = 80
    return made


def harder_test():
    """Another family of fonts: the test is worse, and so is validation than training."""
    made = classifier()
    made.manifest["preflight"]["train_rows"] = 200
    made.row["nll"] = 1.9
    return made.term("loss", falling(made, 3.9, 0.05), count=32.0).measure("validation/nll", falling(made, 3.9, 0.4))


def one_bad_update():
    made = language()
    bad = made.steps == 77
    made.put("finite", ~bad).put("skipped", np.cumsum(bad)).put("gap", np.where(bad, np.nan, 0.0))
    return made.term("lm", np.where(bad, np.nan, falling(made, 7.6, 3.4)), 0.1)


def late_average():
    made = classifier()
    made.config["train"]["ema"] = 0.99
    return made.look(ema_initial=0.3, ema_distance=0.1)


def counts_of_classes():
    return classifier().measure("validation/classes_predicted", 8.0, every=20).measure("validation/accuracy", 0.02, every=20)


def logged_sparsely():
    made = language()
    keep = (made.steps == 1) | (made.steps % 20 == 0)
    made.columns = {path: values[keep] for path, values in made.columns.items()}
    return made


def outlier():
    made = classifier()
    made.manifest["preflight"]["input"] = {"abs_max": 140.0, "mean_abs": 0.7, "std_max": 4.0}
    return made


def within_reach():
    return unreachable(largest=0.9, floor=1.2)


HEALTHY = (
    language, classifier, blank, small_and_learning, norm_falls_and_learns, norm_grows_and_learns, a_rate_that_ends_at_zero,
    confident_and_right, small_penalties, a_ramp_from_zero, annealed_router, weights_fall_and_raw_values_too, overfits_at_the_end,
    learns_from_a_lost_teacher, overfitted_teaching, harder_test, one_bad_update, late_average, counts_of_classes, logged_sparsely, outlier,
    within_reach,
)  # fmt: skip


@pytest.mark.parametrize("healthy", HEALTHY)
def test_what_looks_like_a_fault(healthy):
    assert loud(healthy()) == [], findings(healthy())


@pytest.mark.parametrize(("healthy", "name"), [
    (overfits_at_the_end, "overfitting"), (one_bad_update, "non_finite"), (outlier, "inputs_unscaled"),
])
def test_what_is_worth_a_note(healthy, name):
    assert [(finding.name, finding.severity) for finding in findings(healthy())] == [(name, "note")]


@pytest.mark.parametrize("part", [0.05, 0.3, 0.6])
@pytest.mark.parametrize("healthy", HEALTHY)
def test_a_running_run_is_judged_by_what_it_has(healthy, part):
    made = healthy()
    count = max(2, round(part * len(made.steps)))
    made.columns = {path: values[:count] for path, values in made.columns.items()}
    made.row, made.rows = None, made.rows[:2]
    assert loud(made) == [], findings(made)


@pytest.mark.parametrize("lack", [
    "manifest", "config", "terms/", "groups/", "probes/", "knobs/", "streak", "all but one line", "all lines",
])
def test_a_log_may_lack_anything(lack):
    """Whatever is not there is not judged: no rule fails, and none invents a number."""
    for make in [sick for several in FAULTS.values() for sick in several] + list(HEALTHY):
        made = make()
        if lack in ("manifest", "config"):
            setattr(made, lack, {})
        elif "line" in lack:
            made.columns = {path: values[: 1 if "one" in lack else 0] for path, values in made.columns.items()}
        else:
            made.columns = {path: values for path, values in made.columns.items() if not path.startswith(lack)}
        for finding in findings(made):
            assert "nan" not in f"{finding.evidence} {finding.cause} {finding.cure}"


def test_a_frozen_teacher_is_still():
    """The batches differ and the teacher does not: no seed of fifty is taken for a drift."""
    for seed in range(50):
        made = language()
        noise = 0.1 * np.random.default_rng(seed).normal(size=(2, 200))
        made.probe("teacher_entropy", 2.6 * (1 + noise[0])).probe("teacher_nll", 2.7 * (1 + noise[1]))
        assert rules.targets.teacher_follows_student(made.run(), made.job()) is None


def test_a_symptom_is_a_note_beneath_its_cause():
    made = not_stepping()
    found = {finding.name: finding for finding in findings(made)}
    assert found["optimizer_not_stepping"].severity == "error"
    assert found["constant_predictor"].severity == "note"
    assert "explained by optimizer_not_stepping" in found["constant_predictor"].cause


def test_a_gate_that_no_rule_repeats_is_passed_on():
    made = classifier()
    made.findings[10] = [gate("something_new")]
    assert [(finding.name, finding.run) for finding in findings(made)] == [("something_new", "kd-0")]


def test_names_are_unique_and_explain_each_other():
    names = [rule.name for rule in rules.RULES]
    assert len(set(names)) == len(names)
    assert {name for rule in rules.RULES for name in rule.explains} <= set(names)
    assert set(FAULTS) == set(names) - {"loss_weights_drift"}  # which is no fault: test_documents


def test_the_page_has_a_section_for_each():
    sections = set(re.findall(r"^## (\w+)$", PAGE.read_text(), re.M))
    assert sections == {rule.name for rule in rules.RULES}


def test_rules_say_what_they_need_and_what_they_are_not():
    for rule in rules.RULES:
        words = rule.check.__doc__
        assert re.search(r"\bnot\b|\bNot\b", words), rule.name
        assert re.search(r"update|evaluation|probe|deep|preflight|records|finished", words), rule.name


def test_made_records_are_as_they_would_be_read():
    made = language(30)
    made.findings[10] = [gate("zero_gradient")]
    read, held = records.parse(made.text()), made.run().log
    assert sorted(read.updates) == sorted(held.updates)
    for path in held.updates:
        np.testing.assert_array_equal(read.updates[path], held.updates[path], err_msg=path)
    assert read.evaluations == held.evaluations
    assert read.findings == held.findings
