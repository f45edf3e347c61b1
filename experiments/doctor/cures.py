"""Is a sick job healthy once its first finding's cure is applied as it is printed?

    python -m experiments.doctor.cures WORKDIR [--seeds=1,2] [--only=NAME,NAME]

Faults of the config alone, which a flag can cure. Each job runs sick; the flags in the cure (up to the first "or", which begins another
way) are set, and it runs again, in a workdir of its own: it must be without a finding above a note.
"""

import argparse
import ast
import re
from pathlib import Path

from experiments.doctor.faults import BESIDE, CITIES, GLYPHS, PROJECTED, Job, train, verdict
from jaxdistill.diagnosis import diagnose

SICK = {  # finding, and which way -> job
    "lr_zero": CITIES.but(train__lr=0.0),
    "lr_too_small": CITIES.but(train__lr=1e-7),
    "lr_too_large": GLYPHS.but(train__lr=3.0),
    "lr_too_large: of an MLP": CITIES.but(train__lr=100.0),
    "weights_decaying_away: coupled": GLYPHS.but(optimizer__decay="coupled", optimizer__weight_decay=0.5),
    "weights_decaying_away: too much": GLYPHS.but(optimizer__weight_decay=100.0),
    "inputs_unscaled": CITIES.but(soft__standardise=False),
    "target_unreachable: a bound": CITIES.but(
        soft__norm_cap=1.0, soft__temperature=4.0, soft__temperature_inference=4.0, soft__guards=False),
    "target_unreachable: a floor": CITIES.but(soft__entropy_weight=5.0, soft__entropy_floor=1.9, soft__guards=False),
    "projector_uninformative": PROJECTED.but(projector__init="normal", projector__gate=False, projector__lr_mult=1e-5),
    "teacher_no_better": BESIDE.but(run__teacher__train__steps=1),
}
UNSAFE = re.compile(r"\W+")  # in the name of a folder
FLAG = re.compile(r"--config\.([\w.]+)=('[^']*'|[^\s,;)]+)")


def prescribed(cure: str) -> dict:
    """Key -> value, of the flags of the first way that a cure names."""
    return {key: literal(value.strip("'")) for key, value in FLAG.findall(cure.split(" or ")[0])}


def literal(value: str):
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--only", default="")
    flags = parser.parse_args()
    print("| fault of the config | seed | first finding | flags of its cure | after them |\n|---|---|---|---|---|")
    for name in flags.only.split(",") if flags.only else SICK:
        for seed in map(int, flags.seeds.split(",")):
            print(f"| {name} | {seed} | {' | '.join(treated(SICK[name], seed, flags.workdir / UNSAFE.sub('_', name)))} |", flush=True)


def treated(job: Job, seed: int, workdir: Path) -> tuple[str, str, str]:
    """(first finding, flags, findings above a note after them)."""
    sick, cured = (workdir.with_name(f"{workdir.name}-{seed}-{state}") for state in ("sick", "cured"))
    train(job, seed, sick)
    found = diagnose(sick)
    if not found or found[0].severity == "note":
        return "none", "", ""
    keys = prescribed(found[0].cure)
    train(job._replace(keys=job.keys | keys), seed, cured)
    return found[0].name, " ".join(f"{key}={value}" for key, value in keys.items()), ", ".join(verdict(cured)[1]) or "healthy"


if __name__ == "__main__":
    main()
