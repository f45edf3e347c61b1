"""python -m jaxdistill.compare A B [--metric=NAME]: A minus B in a metric of the test split, paired by seed, with a 95 % interval.

A and B are WORKDIR (its headline run), WORKDIR:RUN (a name as in `runs`, all its seeds, or one NAME-SEED) or the folder of one run. What
is not a comparison of the runs alone is refused: other data, another budget, another metric.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from jaxdistill import UserError, command, export
from jaxdistill.diagnosis import headline
from jaxdistill.diagnosis.records import load
from jaxdistill.diagnosis.statistics import interval
from jaxdistill.training import plan

USAGE = "python -m jaxdistill.compare A B [--metric=NAME]"
WRITTEN = "the file as it was written"
BUDGET = ("train.steps", "train.batch", "data.length")  # updates, examples of an update, and for text the tokens of an example
ALIGNMENT = ("teacher_tokens", "teacher_length", "aligned")  # of a split's facts: how it meets a teacher's tokenizer, not what it holds
TOKENS = ("tokens", "rows")  # of text: differ with the tokenizer though the bytes are the same


class Run(NamedTuple):
    """A finished run. row: as in results.json. config: every value in force, flat. used: those that it read. splits: facts of its data,
    None where its recipe tells none."""

    folder: Path
    row: dict
    config: dict
    used: dict
    splits: dict | None


class Side(NamedTuple):
    """label: as the user named it. runs: by seed."""

    label: str
    runs: dict[int, Run]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"usage: {USAGE}: {message}")


def main(argv: list[str]) -> int:
    parser = _Parser(prog="python -m jaxdistill.compare", description=__doc__.splitlines()[0])
    parser.add_argument("a", metavar="A", help="WORKDIR, WORKDIR:RUN or the folder of a run")
    parser.add_argument("b", metavar="B")
    parser.add_argument("--metric", default="", help="of the test split; by default the one that both runs monitor")
    flags = parser.parse_args(argv[1:])
    a, b = read(flags.a), read(flags.b)
    metric, minimize = agreed_metric(a, b, flags.metric)
    seeds = check(a, b, metric)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    for text in said(a, b, metric, minimize, seeds):
        console.print(text, markup=False, soft_wrap=True) if isinstance(text, str) else console.print(text)
    return 0


def read(name: str) -> Side:
    """The finished runs that `name` means."""
    folders = _folders(name)
    finished = {folder: folder / "result.json" for folder in folders if (folder / "result.json").exists()}
    if not finished:
        raise UserError(f"{name}: found {len(folders)} run(s), none finished; accepted: a run with a result.json")
    runs = {}
    for folder, path in finished.items():
        result, manifest = load(path, WRITTEN), load(folder / "manifest.json", WRITTEN)
        try:
            runs[result["row"]["seed"]] = Run(folder, result["row"], plan.leaves(load(folder / "config.json", WRITTEN)),
                                              result["identity"]["config"], manifest["facts"].get("splits"))
        except (LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{folder}: not a run's ({type(error).__name__}: {error}); accepted: {WRITTEN}") from None
    return Side(name, runs)


def _folders(name: str) -> list[Path]:
    path, run = Path(name), ""
    if path.parent.name == "runs" and path.is_dir():
        return [path]
    if not path.is_dir() and ":" in name:
        before, _, run = name.rpartition(":")
        path = Path(before)
    if not (path / "runs").is_dir():
        raise UserError(f"{name}: no job in {path}; accepted: WORKDIR, WORKDIR:RUN or WORKDIR/runs/NAME-SEED")
    run = run or export.headline(path).rpartition("-")[0]
    there = sorted(folder for folder in (path / "runs").iterdir() if (folder / "config.json").exists())
    found = [folder for folder in there if folder.name == run] or [folder for folder in there if folder.name.rpartition("-")[0] == run]
    if not found:
        names = ", ".join(dict.fromkeys(folder.name.rpartition("-")[0] for folder in there)) or "none has begun"
        raise UserError(f"{name}: found no run {run!r} in {path}; accepted: {names}")
    return found


def agreed_metric(a: Side, b: Side, wanted: str) -> tuple[str, bool | None]:
    """The metric to compare, and whether less of it is better (None: not known), or a UserError."""
    (first, one), (second, other) = (_monitored(side) for side in (a, b))
    common = [name for name in headline.metrics(_rows(a)) if all(name in row for row in (*_rows(a), *_rows(b)))]
    accepted = f"accepted: --metric={'|'.join(common)}" if common else "accepted: runs of the same task"
    if not wanted and (first, one) != (second, other):
        words = {True: "lower", False: "higher"}
        raise UserError(f"unlike metrics: {a.label} is judged by {first} ({words[one]} is better), {b.label} by {second} "
                        f"({words[other]} is better); {accepted}")
    metric = wanted or first
    if metric not in common:
        lacking = [side.label for side in (a, b) if not all(metric in row for row in _rows(side))]
        raise UserError(f"unlike metrics: {metric!r} is not measured in {' and '.join(lacking)}; {accepted}")
    known = {direction for name, direction in ((first, one), (second, other)) if name == metric}
    return metric, known.pop() if len(known) == 1 else None


def _monitored(side: Side) -> tuple[str, bool]:
    config = next(iter(side.runs.values())).config
    return config["monitor"].partition("/")[2], config["minimize"]


def _rows(side: Side) -> list[dict]:
    return [run.row for run in side.runs.values()]


def check(a: Side, b: Side, metric: str) -> list[int]:
    """The seeds that both have, or a UserError that says why the runs cannot be compared."""
    seeds = sorted(a.runs.keys() & b.runs.keys())
    if not seeds:
        raise UserError(f"nothing to pair: {a.label} has the seeds {sorted(a.runs)}, {b.label} {sorted(b.runs)}; "
                        "accepted: runs of a seed in common")
    for seed in seeds:
        one, other = a.runs[seed], b.runs[seed]
        if one.folder.resolve() == other.folder.resolve():
            raise UserError(f"nothing to compare: {a.label} and {b.label} are both {one.folder}; accepted: two runs")
        unlike = plan.difference(_data(one), _data(other), sides=("A", "B")) if None not in (one.splits, other.splits) else []
        if unlike:
            raise UserError(f"unlike data, seed {seed}: {'; '.join(unlike[:4])}; "
                            "accepted: runs on the same training, validation and test split")
        budgets = [{key: run.config[key] for key in BUDGET if key in run.config} for run in (one, other)]
        unlike = plan.difference(*budgets, sides=("A", "B"))
        if unlike:
            raise UserError(f"unlike budgets, seed {seed}: {'; '.join(unlike)}; "
                            "accepted: runs of as many updates of as many examples")
    return seeds


def _data(run: Run) -> dict:
    """What identifies the data: fingerprints and sizes of each split."""
    return {name: {key: value for key, value in facts.items() if key not in ALIGNMENT and not ("bytes" in facts and key in TOKENS)}
            for name, facts in run.splits.items()}


def said(a: Side, b: Side, metric: str, minimize: bool | None, seeds: list[int]) -> list:
    """What is printed: a table by seed, the differences in words, and in which keys the runs differ."""
    better = "" if minimize is None else f", {'lower' if minimize else 'higher'} is better"
    table = Table(title=f"test split, {headline.label(metric)}{better}", title_justify="left")
    for name in ("seed", f"A: {a.label}", f"B: {b.label}", "A - B"):
        table.add_column(name, justify="right", overflow="fold")
    pairs = {seed: (a.runs[seed].row, b.runs[seed].row) for seed in seeds}
    for seed, (one, other) in pairs.items():
        apart = f"{one[metric] - other[metric]:+.4f}".replace("+nan", "nan")
        table.add_row(str(seed), headline.show(one[metric]), headline.show(other[metric]), apart)
    differ = lambda of: [of(one) - of(other) for one, other in pairs.values()]  # noqa: E731
    lines = [table, headline.sentence("A", "B", metric, minimize, interval(differ(lambda row: row[metric])))]
    rows = [row for pair in pairs.values() for row in pair]
    if all(metric in row["best"] for row in rows) and any(row["best"]["step"] != row["steps"] for row in rows):
        found = interval(differ(lambda row: row["best"][metric]))
        lines.append(headline.sentence("A", "B, each at its best validation step,", metric, minimize, found))
    left = [f"{side.label} {sorted(side.runs.keys() - set(seeds))}" for side in (a, b) if side.runs.keys() - set(seeds)]
    if left:
        lines.append(f"not paired: the seeds of {', '.join(left)}")
    untold = [side.label for side in (a, b) if any(side.runs[seed].splits is None for seed in seeds)]
    if untold:
        lines.append(f"whether the data are the same is not known: the recipe of {' and of '.join(untold)} has no facts of its splits")
    configs = [{key: value for key, value in side.runs[seeds[0]].used.items() if key != "seed"} for side in (a, b)]
    keys = plan.difference(*configs, sides=("A", "B"))
    lines.append("they differ in " + ("; ".join(keys) if keys else "no key of the config that they read"))
    return lines


def cli() -> None:
    command(lambda: main(sys.argv))


if __name__ == "__main__":
    cli()
