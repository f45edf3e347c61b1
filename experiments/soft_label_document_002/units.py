"""python experiments/soft_label_document_002/units.py TABLE.npz: the addresses of configs/soft_label.py as a register has them.

The same rows, but for columns that are the same everywhere, with income, rent and land value in money and density in people a square
kilometre: 25,000 beside ratios, as document 002's model saw them.
"""

import sys

import numpy as np

from jaxdistill.data import distributions

UNITS = {"income": (25_000, 6_000), "rent": (900, 200), "density": (6_000, 1_300), "land value": (150_000, 50_000)}  # -> (mean, one unit)


def main() -> None:
    found = distributions.load(distributions.DistributionConfig(validation=0.0))
    rows = {name: np.concatenate([found.splits[part].rows[name] for part in ("train", "test")]) for name in ("x", "target", "group")}
    kept = np.flatnonzero(np.ptp(rows["x"], axis=0))
    columns = [found.columns[i] for i in kept]
    x = rows["x"][:, kept].astype(np.float64)
    for name, (mean, unit) in UNITS.items():
        x[:, columns.index(name)] = mean + unit * x[:, columns.index(name)]
    np.savez(sys.argv[1], x=x.astype(np.float32), target=rows["target"], group=rows["group"])
    print(f"{len(x)} rows, {', '.join(columns)}: {sys.argv[1]}")


if __name__ == "__main__":
    main()
