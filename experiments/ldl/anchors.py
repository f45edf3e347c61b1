"""python experiments/ldl/anchors.py FOLDER: what must be beaten on four sets of label distribution learning, in ten folds.

FOLDER holds NAME.mat (keys features, labels); without an argument it is $JAXDISTILL_DATA/ldl. The mean training distribution, and softmax
regression penalised by decay / 2 |W|^2 beside the MEAN of KL, once at the decay that is best on these very folds (which is how such
tables are mostly made, and too kind), once at the one that five inner folds of the training rows choose.
"""

import os
import sys
from pathlib import Path

import numpy as np
import scipy.io
from sklearn.model_selection import KFold

from jaxdistill.evaluators import calibration, distribution, floors

NAMES = ("SJAFFE", "SBU_3DFE", "emotion6", "Painting")
DECAYS = (1.0, 0.1, 0.01, 0.001)


def read(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(features [rows, width], distributions [rows, classes])"""
    found = scipy.io.loadmat(folder / f"{name}.mat")
    x, t = (np.asarray(found[key], np.float64) for key in ("features", "labels"))
    return x, t / t.sum(axis=1, keepdims=True)


def folds(rows: int, number: int = 10, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(KFold(number, shuffle=True, random_state=seed).split(np.empty(rows)))


def measured(p: np.ndarray, t: np.ndarray) -> dict[str, float]:
    """The six measures, and how often the likeliest class is right."""
    each = distribution.measures(calibration.logs(p), t)
    right = calibration.place(p, np.argmax(t, axis=1)) == 0
    return {name: float(np.mean(each[name])) for name in distribution.MEASURES} | {"accuracy": float(np.mean(right))}


def regression(x, t, train, test, decay: float) -> dict[str, float]:
    predict = floors.softmax_regression(x[train], t[train], strength=1 / (decay * len(train)))
    return measured(predict(x[test]), t[test])


def chosen(x, t, train) -> float:
    """The decay with the smallest KL in five folds of the training rows."""
    inner = folds(len(train), 5, seed=1)
    kl = {decay: np.mean([regression(x, t, train[a], train[b], decay)["kl"] for a, b in inner]) for decay in DECAYS}
    return min(kl, key=kl.get)


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def study(folder: Path, name: str, nested: bool = True) -> dict[str, dict[str, float]]:
    """row -> measure -> mean over the ten folds"""
    x, t = read(folder, name)
    outer = folds(len(x))
    rows = {"mean": mean([measured(floors.mean_target(x[a], t[a])(x[b]), t[b]) for a, b in outer])}
    found = {decay: mean([regression(x, t, a, b, decay) for a, b in outer]) for decay in DECAYS}
    best = min(found, key=lambda decay: found[decay]["kl"])
    rows[f"softmax regression, decay {best:g}"] = found[best]
    if nested:
        rows["softmax regression, nested"] = mean([regression(x, t, a, b, chosen(x, t, a)) for a, b in outer])
    return rows


def main() -> None:
    given = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("JAXDISTILL_DATA") and Path(os.environ["JAXDISTILL_DATA"]) / "ldl"
    if not given or not Path(given).is_dir():
        sys.exit(f"ldl: found {str(given or '')!r}; accepted: the folder of NAME.mat as the argument")
    print("| set | | " + " | ".join((*distribution.MEASURES, "accuracy")) + " |\n|---|---|" + "---|" * 7)
    for name in NAMES:
        for row, values in study(Path(given), name).items():
            print(f"| {name} | {row} | " + " | ".join(f"{value:.4f}" for value in values.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
