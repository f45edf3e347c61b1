"""Does the doctor name a fault that was planted, and no other, and is it quiet where there is none?

    python -m experiments.doctor.faults WORKDIR [--seeds=0,1,2] [--only=NAME,NAME]

Small jobs of the four systems, a few seconds each: every fault of experiments/doctor/planted.py (or of the config) in one of them, and
healthy ones of every kind. Thresholds were chosen on seed 0; seeds 1 and 2 are what is reported. Prints what was planted against the first
finding, and the alarms on healthy runs. Jobs that have run are not run again; all are judged anew.
"""

import argparse
import collections
import contextlib
import io
import time
from pathlib import Path
from typing import NamedTuple

from configs import dcal, dcal_distill, kd, reservoir, soft_label
from experiments.doctor import planted
from jaxdistill.diagnosis import diagnose
from jaxdistill.training import loop

EVERY = {"mesh": (1, 1, 1), "probes.every": 5, "probes.deep": 25, "train.log_every": 1, "train.checkpoint_every": 1000}
PLANTED = "experiments.doctor.planted"
TEXT = EVERY | {
    "data.vocab": 512, "data.length": 64, "data.eval_tokens": 4096, "data.train_tokens": 60_000, "student.width": 48,
    "run.teacher.model.width": 96, "run.teacher.train.steps": 150, "train.steps": 80, "train.batch": 16, "train.eval_every": 20,
    "runs": ("teacher", "kd"),
}  # fmt: skip
FRAMES = EVERY | {
    "reservoir.units": 40, "readout.filters": 8, "readout.hidden": 64, "readout.width": 64, "readout.pooling": 16, "train.steps": 150,
    "train.eval_every": 30, "runs": ("kaf",),
}  # fmt: skip
TABLE = EVERY | {
    "data.cities": 12, "data.neighbours": 8, "soft.figures": False, "train.steps": 200, "train.eval_every": 40, "headline": "mlp",
    "runs": ("mlp",),
}  # fmt: skip
LETTERS = EVERY | {
    "data.classes": 20, "data.per_class": 24, "data.test_per_class": 8, "dcal.figures": 0, "train.steps": 200, "train.eval_every": 40,
    "headline": "sa_only", "runs": ("sa_only",),
}  # fmt: skip
TAUGHT = EVERY | {
    "data.classes": 20, "train.steps": 150, "train.eval_every": 30, "run.teacher.train.steps": 250, "run.teacher.dcal.figures": 0,
    "runs": ("teacher", "kd"),
}  # fmt: skip


class Job(NamedTuple):
    """config: () -> config. keys: what is changed of it. run: the one that has the fault. base: the recipe that it is put into."""

    config: object
    keys: dict
    run: str
    base: str

    def but(self, **changes) -> "Job":
        """With more keys; of names with __ for dots."""
        return self._replace(keys=self.keys | {name.replace("__", "."): value for name, value in changes.items()})


TEXTS = Job(kd.get_config, TEXT, "kd", "student_aware")
ACTIONS = Job(reservoir.get_config, FRAMES, "kaf", "reservoir")
CITIES = Job(soft_label.get_config, TABLE, "mlp", "soft_label")
GLYPHS = Job(dcal.get_config, LETTERS, "sa_only", "dcal")
PUPIL = Job(dcal_distill.get_config, TAUGHT, "kd", "dcal")
PROJECTED = TEXTS.but(kd__mode="projector", kd__weight=((0.3, 0.0), (0.6, 0.5)), hidden__weight=((0.0, 0.0),))
ROUTED = TEXTS.but(router__weight=((0.0, 0.5),), router__k=((0.0, 1.0),))
BESIDE = TEXTS.but(runs=("teacher", "untouched", "ce_only", "kd"))

FAULTS = {  # what is planted -> where; the finding has the same name but for those of OTHER
    # of language models
    "labels_not_shifted": TEXTS.but(kd__weight=((0.0, 0.3),)),
    "padding_counted": TEXTS,
    "teacher_misaligned": TEXTS,
    "projector_uninformative": PROJECTED.but(projector__init="normal", projector__gate=False),
    "teacher_no_better": BESIDE.but(run__teacher__train__steps=1),
    "term_dominates": TEXTS.but(hidden__weight=((0.0, 0.05),)),
    "router_collapsed": ROUTED,
    "perplexity_of_total": TEXTS,
    "metric_clamped": TEXTS,
    "all_masked": TEXTS,
    # of images
    "teacher_follows_student": PUPIL,
    "constant_predictor": GLYPHS,
    "lr_too_large": GLYPHS.but(train__lr=3.0),
    "weights_decaying_away": GLYPHS.but(optimizer__decay="coupled", optimizer__weight_decay=0.5),
    # of sequences
    "zero_gradient": ACTIONS,
    "batch_statistics": ACTIONS,
    "classes_disjoint": ACTIONS,
    "non_finite": ACTIONS,
    "every_other": ACTIONS,
    # of distributions
    "weight_schedule_mimics": CITIES,
    "ledger_gap": CITIES,
    "saturated": CITIES,
    "inputs_unscaled": CITIES,
    "target_unreachable": CITIES.but(soft__norm_cap=1.0, soft__temperature=4.0, soft__temperature_inference=4.0, soft__guards=False),
    "groups_leak": CITIES,
    "ema_initial": CITIES.but(train__ema=0.9999),
    "ema_never_used": CITIES.but(train__ema=0.9),
    "optimizer_not_stepping": CITIES,
    "lr_zero": CITIES.but(train__lr=0.0),
    "lr_too_small": CITIES.but(train__lr=1e-7),
}  # fmt: skip
OTHER = {"every_other": "optimizer_not_stepping"}

HEALTHY = {
    "kd": BESIDE, "kd:document": TEXTS._replace(config=lambda: kd.get_config("document")), "kd, router": ROUTED,
    "kd, projector": PROJECTED, "kd, average": TEXTS.but(train__ema=0.9),
    "reservoir": ACTIONS, "reservoir, relu": ACTIONS.but(runs=("relu",), headline="relu"),
    "soft_label": CITIES, "soft_label, average": CITIES.but(train__ema=0.9),
    "soft_label, graph": CITIES.but(runs=("graph",), headline="graph"),
    "dcal": GLYPHS, "dcal, full": GLYPHS.but(runs=("full",), headline="full"), "dcal_distill": PUPIL,
}  # fmt: skip


def configured(job: Job, seed: int, fault: str = ""):
    config = job.config()
    config.seeds = (seed,)
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict(job.keys)
        if fault in planted.RECIPES:
            config.run[job.run].recipe, config.run[job.run].planted = PLANTED, {"base": job.base, "fault": fault}
    return config


def train(job: Job, seed: int, workdir: Path, fault: str = "") -> float:
    """Seconds; 0 where it has run before. What a gate stops has run."""
    if (workdir / "done").exists():
        return 0.0
    since = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()), planted.patched(fault), contextlib.suppress(loop.Sick):
        loop.run(configured(job, seed, fault), workdir, quiet=True)
    (workdir / "done").touch()
    return time.monotonic() - since


def verdict(workdir: Path) -> tuple[str, list[str]]:
    """(the first finding above a note, or "", all of them)."""
    loud = [f"{finding.name} ({finding.run})" for finding in diagnose(workdir) if finding.severity != "note"]
    return loud[0].split(" ")[0] if loud else "", loud


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="")
    flags = parser.parse_args()
    seeds, only = [int(seed) for seed in flags.seeds.split(",")], flags.only.split(",") if flags.only else [*FAULTS, *HEALTHY]
    found, alarms, spent = collections.defaultdict(list), {}, 0.0
    for name, job in [*FAULTS.items(), *HEALTHY.items()]:
        for seed in seeds if name in only else ():
            fault = name if name in FAULTS else ""
            workdir = flags.workdir / f"{name.replace(', ', '_').replace(':', '_')}-{seed}"
            seconds = train(job, seed, workdir, fault)
            first, loud = verdict(workdir)
            spent += seconds
            right = first == OTHER.get(name, name) if fault else not first
            print(f"{'ok   ' if right else 'WRONG'} {name} {seed}: {', '.join(loud) or 'quiet'} ({seconds:.0f} s)", flush=True)
            (found[name] if fault else alarms.setdefault(name, [])).append(first)
    table(found, alarms)
    print(f"\n{spent:.0f} s of training")


def table(found: dict, alarms: dict) -> None:
    """The confusion matrix in Markdown, one line a fault: the first finding and how often; then the healthy jobs."""
    print("\n| planted | first finding (of how many seeds) | right |\n|---|---|---|")
    for name, firsts in found.items():
        told = ", ".join(f"{first or 'none'} {count}" for first, count in collections.Counter(firsts).most_common())
        print(f"| {name} | {told} | {sum(first == OTHER.get(name, name) for first in firsts)} of {len(firsts)} |")
    right = sum(first == OTHER.get(name, name) for name, firsts in found.items() for first in firsts)
    print(f"\nright: {right} of {sum(map(len, found.values()))}\n\n| healthy | alarms |\n|---|---|")
    for name, firsts in alarms.items():
        print(f"| {name} | {', '.join(first for first in firsts if first) or '0'} of {len(firsts)} |")
    print(f"\nfalse alarms: {sum(bool(first) for firsts in alarms.values() for first in firsts)} of {sum(map(len, alarms.values()))}")


if __name__ == "__main__":
    main()
