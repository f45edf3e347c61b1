"""Does the doctor name the faults of the mutation suite, planted in the library's source while a small job runs?

    python -m experiments.doctor.mutants WORKDIR [--seeds=1] [--only=NAME,NAME]

Each mutation of tests/mutations that has a `finding` is planted in the job of JOBS in which it shows. The doctor must name that finding
first. Each job has a cache of its own: a teacher that was trained by a mutant must not be met again.
"""

import argparse
from pathlib import Path

import tests.conftest  # noqa: F401  (before JAX begins: the checks, which mutations name, want eight devices)

# isort: split
from experiments.doctor.faults import ACTIONS, BESIDE, CITIES, GLYPHS, PUPIL, ROUTED, TEXTS, train, verdict
from tests.mutations.mutations import MUTATIONS
from tests.mutations.planting import planted

AVERAGED = CITIES.but(train__ema=0.9)
MICRO = CITIES.but(train__micro=4)
JOBS = {  # mutation -> the job, and what is planted beside it
    "decay_coupled_in_adam": (GLYPHS.but(optimizer__weight_decay=0.5), ""),
    "stepped_every_other_call": (CITIES, ""),
    "never_stepped": (CITIES, ""),
    "rate_in_micro_steps": (MICRO, ""),
    "mean_of_micro_means": (TEXTS.but(train__micro=4), ""),
    "micro_batches_not_divided": (MICRO, ""),
    "not_a_number_applied": (ACTIONS, "non_finite"),
    "factor_not_in_the_ledger": (GLYPHS.but(runs=("full",), headline="full"), ""),
    "average_begins_at_the_initial_weights": (CITIES.but(train__ema=0.9999), ""),
    "average_never_deployed": (AVERAGED, ""),
    "teacher_trained": (PUPIL, ""),
    "labels_not_shifted": (TEXTS.but(kd__weight=((0.0, 0.3),)), ""),
    "pads_counted": (TEXTS, "padded"),
    "mean_over_padding": (TEXTS, "padded"),
    "router_rewarded_for_collapse": (ROUTED.but(router__balance=10.0), ""),
    "router_of_one_feature": (ROUTED, ""),
    "the_target_is_the_student": (BESIDE, ""),
    "layer_norm_over_the_batch": (GLYPHS, ""),
    "kernel_of_the_norm": (ACTIONS, ""),
    "normalised_over_the_batch": (ACTIONS, ""),
    "representation_normalised_over_the_batch": (ACTIONS, ""),
    "groups_drawn_row_by_row": (ACTIONS, ""),
    "inputs_left_as_they_are": (CITIES, ""),
    "entropy_penalty_of_the_wrong_sign": (CITIES.but(soft__entropy_weight=5.0, soft__entropy_floor=0.5), ""),
    "confidence_rewarded": (CITIES.but(soft__confidence_weight=5.0), ""),
    "unreachable_target_accepted": (CITIES.but(soft__norm_cap=1.0, soft__temperature=4.0, soft__temperature_inference=4.0), ""),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--only", default="")
    flags = parser.parse_args()
    known = {mutation.name: mutation for mutation in MUTATIONS if mutation.finding}
    print("| mutation | seed | its finding | first finding | |\n|---|---|---|---|---|")
    for name in flags.only.split(",") if flags.only else JOBS:
        job, beside = JOBS[name]
        for seed in map(int, flags.seeds.split(",")):
            workdir = flags.workdir / f"{name}-{seed}"
            with planted(known[name]):
                train(job.but(cache=str(workdir / "cache")), seed, workdir, beside)
            first, loud = verdict(workdir)
            right = "right" if first == known[name].finding else f"wrong: {', '.join(loud) or 'quiet'}"
            print(f"| {name} | {seed} | {known[name].finding} | {first or 'none'} | {right} |", flush=True)


if __name__ == "__main__":
    main()
