"""python experiments/ldl/paired.py FINAL CHOOSE [CHOOSE ...]: both models by fold, each at the setting that was best without its test.

Of the jobs of ldl.py; the KL that chooses is the mean over the jobs CHOOSE. A family is what stands before the first _ of a run's name:
softmax, mlp. The interval is Student's t over the folds, with the variance of Nadeau and Bengio (2003): training rows of two folds are
mostly the same, and taken as independent the folds would give an interval that is about 1.5 times too narrow.
"""

import collections
import functools
import json
import statistics
import sys
from pathlib import Path

import numpy as np
from scipy import stats

from jaxdistill.evaluators import distribution

SMALLER = ("kl", "chebyshev", "clark", "canberra")  # is better


def rows(workdir: str) -> dict[int, dict[str, dict]]:
    """fold -> run -> row"""
    found = collections.defaultdict(dict)
    for row in json.loads((Path(workdir) / "results.json").read_text())["rows"]:
        found[row["seed"]][row["name"]] = row
    return found


def nested(final: dict, choose: list[dict], family: str) -> list[dict]:
    """Of each fold the final row of the setting with the smallest validation KL, as a mean over the jobs `choose`."""
    kl = lambda fold, name: statistics.fmean(job[fold][name]["validation"]["validation/kl"] for job in choose)  # noqa: E731
    taken = []
    for fold in sorted(final):
        names = [name for name in final[fold] if name.split("_")[0] == family]
        taken.append(final[fold][min(names, key=functools.partial(kl, fold))])
    return taken


def interval(differences: np.ndarray) -> tuple[float, float]:
    k = len(differences)
    half = stats.t.ppf(0.975, k - 1) * np.sqrt((1 / k + 1 / (k - 1)) * np.var(differences, ddof=1))
    return float(differences.mean() - half), float(differences.mean() + half)


def main() -> None:
    final, *choose = (rows(workdir) for workdir in sys.argv[1:])
    softmax, mlp = (nested(final, choose, family) for family in ("softmax", "mlp"))
    for family, taken in (("softmax", softmax), ("mlp", mlp)):
        print(f"{family}: chosen", dict(collections.Counter(row["name"] for row in taken)))
    print("\n| | mean distribution | softmax regression | MLP | difference, 95 % interval | folds won |\n|---|---|---|---|---|---|")
    for name in (*distribution.MEASURES, "accuracy", "ece15"):
        values = [np.array([row[name] for row in of]) for of in ([final[fold]["constant"] for fold in sorted(final)], softmax, mlp)]
        gap = values[2] - values[1]
        better = gap < 0 if name in (*SMALLER, "ece15") else gap > 0
        low, high = interval(gap)
        means = " | ".join(f"{value.mean():.4f}" for value in values)
        print(f"| {name} | {means} | {gap.mean():+.4f} ({low:+.4f} to {high:+.4f}) | {better.sum()} of {len(gap)} |")


if __name__ == "__main__":
    main()
