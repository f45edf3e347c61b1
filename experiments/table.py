"""python experiments/table.py WORKDIR MEASURE [MEASURE ...]: a job's table in Markdown, means ± deviations over its seeds."""

import collections
import json
import statistics
import sys
from pathlib import Path


def cell(values: list[float], digits: int = 3) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and max(values) > min(values) else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def main() -> None:
    workdir, *measures = sys.argv[1:]
    rows = collections.defaultdict(list)
    for row in json.loads((Path(workdir) / "results.json").read_text())["rows"]:
        rows[row["name"]].append(row)
    print("| run | seeds | " + " | ".join(measures) + " |\n|---|---|" + "---|" * len(measures))
    for name, found in rows.items():
        print(f"| {name} | {len(found)} | " + " | ".join(cell([row[key] for row in found if key in row]) for key in measures) + " |")


if __name__ == "__main__":
    main()
