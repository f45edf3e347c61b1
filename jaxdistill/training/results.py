"""results.json: a row a run, and paired differences by seed with a 95 % interval."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdistill.diagnosis.records import numbers
from jaxdistill.diagnosis.statistics import interval
from jaxdistill.training import plan
from jaxdistill.training.metrics import plain_json, write_json


def paired(rows: list[dict], headline: str, metric: str) -> list[dict]:
    """`headline` minus each other run of the same seed, in `metric`: on the last parameters of both, and against
    the other's best ones. interval: Student's t over the seeds, 95 %; None below two seeds, or where a difference is not finite."""
    of = {(row["name"], row["seed"]): row for row in rows}
    seeds = sorted(seed for name, seed in of if name == headline)
    found = []
    for other in dict.fromkeys(row["name"] for row in rows if row["name"] != headline):
        for which in ("last", "best"):
            differences = []
            for seed in seeds:
                row = of.get((other, seed))
                value = row and (row["best"] if which == "best" else row).get(metric)
                if value is not None:
                    differences.append(of[headline, seed][metric] - value)
            if not differences or (which == "best" and all(_best_is_last(of.get((other, s))) for s in seeds)):
                continue
            pair = {"a": headline, "b": other, "b_parameters": which, "metric": metric, **interval(differences)}
            found.append(pair | _retention(rows, headline, other, which, metric))
    return found


def _retention(rows: list[dict], headline: str, other: str, which: str, metric: str) -> dict:
    """(a - b) / (teacher - b) over mean values: how much of the baseline's distance to the teacher is gone."""
    mean = lambda name, part="last": np.mean([  # noqa: E731
        (row["best"] if part == "best" else row).get(metric, np.nan) for row in rows if row["name"] == name
    ])
    if other == "teacher" or not any(row["name"] == "teacher" for row in rows):
        return {}
    own, baseline, teacher = mean(headline), mean(other, which), mean("teacher")
    if teacher == baseline or not np.isfinite([own, baseline, teacher]).all():
        return {}
    return {"retention": float((own - baseline) / (teacher - baseline))}


def _best_is_last(row: dict | None) -> bool:
    return row is None or row["best"]["step"] == row["steps"]


def publish(workdir: Path, rows: list[dict], config: Any) -> dict:
    """Writes results.json from the rows so far; returns what it holds."""
    config = plan.as_dict(config)
    metric = config["monitor"].split("/", 1)[-1]
    results = plain_json({
        "metric": metric, "minimize": config["minimize"], "rows": rows,
        "paired": paired(rows, config["headline"], metric) if config["headline"] else [],
    })
    if jax.process_index() == 0:
        write_json(workdir / "results.json", results)
    return numbers(results)
