"""What results.json says, as a table and in sentences: for the terminal and for the page."""

import math
from collections.abc import Sequence

from jaxdistill.diagnosis.statistics import interval

NAMES = {"bits_per_byte": "bits/byte", "teacher_kl": "KL to teacher", "top1_agreement": "top-1 agr.", "top5_agreement": "top-5 agr.",
         "sa_accuracy": "SA alone", "glca_accuracy": "GLCA alone", "rank1": "rank 1", "reranked_mAP": "re-ranked mAP"}
BRIEF = ("bits_per_byte", "teacher_kl", "top1_agreement", "projector_nll", "accuracy", "sa_accuracy", "glca_accuracy", "mAP", "rank1",
         "reranked_mAP")  # for the terminal; the page has all
FIXED = ("name", "seed", "best", "validation", "steps", "skipped", "seconds", "stop", "parameters")  # of a row; the rest are metrics


def label(metric: str) -> str:
    return NAMES.get(metric, metric)


def metrics(rows: Sequence[dict]) -> list[str]:
    """What the rows measured, in their order."""
    return list(dict.fromkeys(name for row in rows for name in row if name not in FIXED))


def cells(results: dict, *, brief: bool = False) -> tuple[list[str], list[list[str]]]:
    """The headline table: a header and a row a run, seeds averaged. brief: what fits a terminal; else with half the width of the 95 %
    interval of the mean over seeds."""
    metric = results["metric"]
    shown = [metric, *(name for name in metrics(results["rows"]) if name != metric and (not brief or name in BRIEF))]
    header = ["run", *map(label, shown), "at the best step", "parameters", "updates", "seconds"]
    body = []
    for name in dict.fromkeys(row["name"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["name"] == name]
        mean = lambda values: sum(values) / len(values)  # noqa: E731
        values = [_over_seeds([float(row[m]) for row in rows], brief) if all(m in row for row in rows) else "" for m in shown]
        best = ""  # of a floor that has no such metric
        if all(metric in row["best"] for row in rows):
            best = f"{show(mean([float(row['best'][metric]) for row in rows]))} ({mean([row['best']['step'] for row in rows]):.0f})"
        body.append([name if len(rows) == 1 else f"{name} (mean of {len(rows)})", *values, best, f"{rows[0]['parameters']:,}",
                     f"{mean([row['steps'] for row in rows]):.0f}", f"{mean([row['seconds'] for row in rows]):.1f}"])
    return header, body


def _over_seeds(values: list[float], brief: bool) -> str:
    found = interval(values)
    half = "" if brief or not found["interval"] else f" ± {show(found['interval'][1] - found['mean'])}"
    return show(found["mean"]) + half


def differences(results: dict) -> list[str]:
    """The paired comparisons, a sentence each."""
    said = []
    for pair in results["paired"]:
        other = pair["b"] + (" at its best validation step" if pair["b_parameters"] == "best" else "")
        better = (pair["mean"] < 0) == results["minimize"]
        said.append(sentence(pair["a"], other, results["metric"], results["minimize"], pair)
                    + (f", {pair['retention']:.0%} of the way to the teacher" if better and pair.get("retention", 0) > 0 else ""))
    return said


def sentence(a: str, b: str, metric: str, minimize: bool | None, found: dict) -> str:
    """`a` minus `b` in `metric`, as `statistics.interval` gives it, in words. minimize: whether less is better; None: it is not known."""
    if not math.isfinite(found["mean"]):
        return f"{a} and {b} cannot be compared by {label(metric)}: it is not finite"
    words = ("higher", "lower") if minimize is None else ("worse", "better") if minimize else ("better", "worse")
    low_high = found["interval"]
    sure = f"95 % interval {low_high[0]:+.3f} to {low_high[1]:+.3f} over {found['n']} seeds" if low_high else "one seed: no interval"
    return f"{a} is {words[found['mean'] < 0]} than {b} by {abs(found['mean']):.3f} {label(metric)} ({sure})"


def better(results: dict) -> str:
    return f"{'lower' if results['minimize'] else 'higher'} {label(results['metric'])} is better"


def show(value: float) -> str:
    return f"{value:z.3f}" if abs(value) < 1000 else f"{value:.3g}"
