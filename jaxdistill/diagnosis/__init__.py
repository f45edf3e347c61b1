"""Why a run fails: gates stop it while it trains, rules read its records at any time."""

from pathlib import Path

from jaxdistill.diagnosis import records, rules
from jaxdistill.diagnosis.finding import Finding


def diagnose(workdir: str | Path) -> list[Finding]:
    """What the records of the job in `workdir` show, the likeliest root cause first; [] where all is well.

    Needs no accelerator; the job may be running, finished or crashed. Raises UserError where there is none."""
    return rules.judge(records.read(workdir))
