"""Records of runs that look as if something were wrong, where nothing is: HEALTHY."""

import numpy as np

from tests.diagnosis.made import blank, classifier, falling, language
from tests.diagnosis.sick import projector, router, target_meets_the_student, unreachable


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


def two_images_fewer():
    """Of 40 images 23 and then 21 are right: within chance."""
    made = classifier()
    made.manifest["preflight"]["splits"] = {"train": 440, "validation": 40, "test": 160}
    made.config |= {"monitor": "validation/accuracy", "minimize": False}
    made.evaluations.clear()
    made.measure("validation/accuracy", np.where(made.rising < 0.8, 0.575, 0.525))
    return made.measure("validation/nll", 1.4 + 0.05 * made.rising)


def written_by_the_student():
    """Half of the batches are the student's own text: lm counts nothing in them, as there is nothing to be right about."""
    made = language()
    sampled = made.steps % 2 == 0
    made.put("sampled", sampled)
    return made.term("lm", np.where(sampled, 0, falling(made, 7.6, 3.4)), 0.1, count=np.where(sampled, 0, 2000))


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
    within_reach, two_images_fewer, written_by_the_student,
)  # fmt: skip
