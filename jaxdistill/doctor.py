"""python -m jaxdistill.doctor WORKDIR [--json]: what is wrong with a job, the evidence, the cause and the cure.

Reads what the job wrote, running, finished or crashed; needs no accelerator. Exit code 1 if a finding is an error, else 0.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from jaxdistill import UserError, command
from jaxdistill.diagnosis import records, rules
from jaxdistill.diagnosis.finding import Finding

STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold blue"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"usage: python -m jaxdistill.doctor WORKDIR [--json]: {message}")


def main(argv: list[str]) -> int:
    parser = _Parser(prog="python -m jaxdistill.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--json", action="store_true", help="findings as a JSON list, for machines")
    flags = parser.parse_args(argv[1:])
    job = records.read(flags.workdir)
    findings = rules.judge(job)
    if flags.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        tell(lambda console: show(console, job, findings))
    return int(any(finding.severity == "error" for finding in findings))


def tell(said: Callable[[Console], None]) -> None:
    """Prints what is said: to a terminal as wide as it is, elsewhere 120 columns wide and without the spaces that fill up tables."""
    console = Console(highlight=False)
    if console.is_terminal:
        said(console)
        return
    console = Console(highlight=False, width=120)
    with console.capture() as capture:
        said(console)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()), flush=True)


def show(console: Console, job: records.Job, findings: list[Finding]) -> None:
    """The findings, those of one fault together, worst first; then what was looked at."""
    together: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        together.setdefault((finding.severity, finding.name), []).append(finding)
    for number, several in enumerate(together.values(), 1):
        first = several[0]
        console.print(Text.assemble(f"{number}. ", (first.name, STYLES[first.severity]), f"  {first.severity}"))
        lines = Table.grid(padding=(0, 2))
        lines.add_column(style="dim", no_wrap=True)
        lines.add_column(overflow="fold")
        rows = {"run": ", ".join(finding.run for finding in several), "evidence": first.evidence, "cause": first.cause,
                "cure": first.cure, "see": first.study}  # fmt: skip
        if len(several) > 1:
            rows["evidence"] += f" ({first.run})"
        for name, words in rows.items():
            if words:
                lines.add_row(name, Text(words))
        console.print(Padding(lines, (0, 0, 1, 3)))
    console.print(looked_at(job, findings), markup=False, soft_wrap=True)


def looked_at(job: records.Job, findings: list[Finding]) -> str:
    """One sentence: how many runs in what state, and whether anything is wrong."""
    runs = [f"{run.id} ({_state(run)})" for run in job.runs.values()]
    if not runs:
        return f"{job.workdir}: no run has begun yet"
    return f"{summary(findings)}; looked at {', '.join(runs)}"


def summary(findings: list[Finding]) -> str:
    """How many of each severity."""
    counts = {severity: sum(finding.severity == severity for finding in findings) for severity in STYLES}
    said = [f"{count} {severity}{'s' * (count > 1)}" for severity, count in counts.items() if count]
    return ", ".join(said if counts["error"] + counts["warning"] else ["nothing is wrong", *said])


def _state(run: records.Run) -> str:
    updates = int(run.steps[-1]) if len(run.steps) else 0
    if run.row is not None:
        return f"finished, {updates} updates" if updates else "finished, not trained"
    broken = f", {run.log.broken} broken line{'s' * (run.log.broken > 1)} left out" if run.log.broken else ""
    return f"update {updates} of {run.get('train.steps', '?')}{broken}"


def cli() -> None:
    command(lambda: main(sys.argv))


if __name__ == "__main__":
    cli()
