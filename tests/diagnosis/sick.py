"""Records of runs with a fault, each the least that shows it: FAULTS, by the finding that must come first."""

import math

import numpy as np

from tests.diagnosis.made import Made, classifier, falling, gate, language


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


def lr_far_too_large():
    """Off within the first updates, and slowly back: the median of any part but the first update is better than the one before."""
    made = language()
    loss = np.concatenate([[7.6], 250 * np.exp(-np.linspace(0, 3.3, len(made.steps) - 1))])
    norm = np.concatenate([[20.0], 1200 * np.exp(-np.linspace(0, 2, len(made.steps) - 1))])
    for name in ("student", "student_no_decay"):
        made.put(f"groups/{name}/param_norm", norm).put(f"groups/{name}/update_ratio", 0.1)
    return made.term("lm", loss, 0.1).term("kd", loss, 0.9)


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


def teacher_drifts_at_once():
    """Where it is trained along at the student's rate: at the second look it is already another one."""
    made = language()
    noise = 0.02 * np.random.default_rng(0).normal(size=len(made.steps))
    moved = made.steps > 1
    return made.probe("teacher_entropy", np.where(moved, 2.7, 2.0) + noise).probe("teacher_nll", np.where(moved, 5.0, 2.8) + noise)


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


def pads_predicted_but_for_ends():
    """The ends of documents do not count, padding does."""
    made = pads_predicted().probe("valid", 0.97)
    return made.term("lm", falling(made, 7.6, 1.9), 0.1, count=0.97 * 16 * 128.0)


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


def masked_on_a_ramp():
    """The loss is 0 before and after: no change to divide by."""
    made = masked()
    return made.term("hidden", 0.0, 3 - 3 * made.rising, count=0.0).term("hidden_balance", 0.0, 0.03 - 0.03 * made.rising, count=1.0)


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


def surer_than_right():
    """A penalty of the wrong sign: not one-hot, and worse than knowing nothing."""
    made = classifier(classes=8)
    return made.probe("entropy", 0.5).probe("spread", 0.4).term("loss", 2.1 + 1.6 * made.rising, count=32.0)


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


def teacher_hardly_trained():
    """A tenth of the way from the untouched student to the one without it; what it teaches is nearly a constant."""
    made = language()
    rows = {row["name"]: row for row in made.rows}
    begun, trained = rows["untouched"]["bits_per_byte"], rows["ce_only"]["bits_per_byte"]
    made.rows[0] |= {"bits_per_byte": begun - 0.1 * (begun - trained), "nll": 7.3}
    return made.probe("spread", 1e-4).probe("teacher_nll", 7.3)


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
    "lr_too_large": (lr_too_large, lr_far_too_large),
    "weights_decaying_away": (weights_decay_away, too_much_decay),
    "teacher_follows_student": (teacher_drifts, teacher_drifts_at_once, target_meets_the_student),
    "projector_uninformative": (projector, lambda: projector(opened=False)),
    "teacher_misaligned": (teacher_misaligned,),
    "labels_not_shifted": (unshifted, unshifted_everywhere),
    "padding_counted": (pads_in_the_divisor, pads_predicted, pads_predicted_but_for_ends),
    "weight_schedule_mimics": (schedule_makes_progress, schedule_makes_an_explosion),
    "term_dominates": (one_term_owns_it, gradient_owned),
    "metric_clamped": (clamped, clamped_round, infinite_metric),
    "perplexity_of_total": (perplexity_of_total, perplexity_of_total_alone),
    "all_masked": (masked, masked_on_a_ramp, masked_at_times),
    "zero_gradient": (dead, dead_later, dead_group),
    "saturated": (saturated, surer_than_right),
    "constant_predictor": (constant,),
    "target_unreachable": (unreachable, floor_above_the_targets),
    "inputs_unscaled": (unscaled,),
    "classes_disjoint": (disjoint,),
    "groups_leak": (leaks,),
    "memorised_leak": (memorised,),
    "ema_initial": (average_stays,),
    "ema_never_used": (average_unused,),
    "router_collapsed": (router,),
    "teacher_no_better": (teacher_knows_nothing, teacher_hardly_trained, teacher_no_better),
    "batch_statistics": (of_the_batch,),
    "non_finite": (ends_in_nan,),
    "ledger_gap": (does_not_add_up,),
    "frozen_moved": (teacher_moved,),
    "overfitting": (learned_by_heart,),
}
