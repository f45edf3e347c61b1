"""python -m jaxdistill.report WORKDIR [WORKDIR ...] [--out=FILE]: the table on the terminal, curves.png and report.html in the workdir.

report.html is one self-contained page: no server, no network. Of several workdirs it shows them side by side; it is then
comparison.html in the first one. With --out=FILE nothing is written but FILE and, beside it, FILE's curves.
Works on a running, finished or crashed job.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jaxdistill import UserError, command, doctor
from jaxdistill.diagnosis import headline, plots, records, rules
from jaxdistill.diagnosis.page import Shown, page, validation
from jaxdistill.training import plan

USAGE = "python -m jaxdistill.report WORKDIR [WORKDIR ...] [--out=FILE]"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"usage: {USAGE}: {message}")


def main(argv: list[str]) -> int:
    parser = _Parser(prog="python -m jaxdistill.report", description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="the page; by default report.html, or comparison.html of several, in the (first) workdir")
    flags = parser.parse_args(argv[1:])
    read = {title: records.read(workdir) for title, workdir in titles(flags.workdir).items()}
    jobs = [Shown(title, job, rules.judge(job)) for title, job in read.items()]
    doctor.tell(lambda console: [show(console, one, several=len(jobs) > 1) for one in jobs])
    out = (flags.out or flags.workdir[0] / ("report.html" if len(jobs) == 1 else "comparison.html")).expanduser()
    places = [one.job.workdir / "curves.png" for one in jobs]
    if flags.out:
        places = [out.with_name(f"{out.stem}_curves{f'_{number}' if len(jobs) > 1 else ''}.png") for number in range(1, len(jobs) + 1)]
    written = [curves(one, place) for one, place in zip(jobs, places, strict=True)]
    try:
        out.write_text(page(jobs, unlike([one.job for one in jobs])))
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}; accepted: a file in a folder that can be written") from None
    print()
    for one, path in zip(jobs, written, strict=True):
        if one.findings:
            print(f"doctor  {doctor.summary(one.findings)}: python -m jaxdistill.doctor {one.job.workdir}")
        if path:
            print(f"picture {path}")
    print(f"report  {out}", flush=True)
    return 0


def titles(workdirs: list[Path]) -> dict[str, Path]:
    """Each workdir by its last folder's name, or by as many folders as tell it from the others."""
    whole = [workdir.resolve() for workdir in workdirs]
    if len(set(whole)) < len(whole):
        raise UserError(f"workdirs: found {workdirs[[whole.count(path) > 1 for path in whole].index(True)]} twice; accepted: each once")
    longest = max(len(path.parts) for path in whole)
    depth = next(depth for depth in range(1, longest + 1) if len({path.parts[-depth:] for path in whole}) == len(whole))
    return {str(Path(*path.parts[-depth:])): workdir for path, workdir in zip(whole, workdirs, strict=True)}


def show(console: Console, one: Shown, *, several: bool) -> None:
    """What is wrong, the headline table, and the paired differences."""
    if several:
        console.print(f"\n{one.title}:", markup=False)
    if loud := [finding for finding in one.findings if finding.severity != "note"]:
        doctor.show(console, one.job, loud)
    results = one.job.results
    if not results.get("rows"):
        console.print("no run is finished yet")
        return
    header, body = headline.cells(results, brief=True)
    table = Table(title=f"test split, {headline.better(results)}", title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold", no_wrap=index == 0)
    for row in body:
        table.add_row(*row)
    console.print(table)
    for line in headline.differences(results):
        console.print(line, markup=False, soft_wrap=True)


def curves(one: Shown, path: Path) -> Path | None:
    """Writes them, where there are any."""
    figure, (axis,) = plots.new_figure()
    if not validation(one, axis):
        return None
    name = headline.label(one.metric)
    axis.set(ylabel=name, title=f"{name} on the validation split")
    axis.legend(fontsize=8, frameon=False)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; accepted: a folder that can be written (--out names another)") from None
    return path


def unlike(jobs: list[records.Job]) -> list[tuple[str, list[str]]]:
    """The config keys in which jobs differ, each with all their values."""
    configs = [plan.leaves(job.config) for job in jobs]
    found = [(key, [str(config.get(key, "")) for config in configs]) for key in sorted(set().union(*configs))]
    return [(key, values) for key, values in found if len(set(values)) > 1]


def cli() -> None:
    command(lambda: main(sys.argv))


if __name__ == "__main__":
    cli()
