"""A finding: what is wrong with a run, as the gates say it while it trains and the doctor afterwards."""

from typing import NamedTuple

SEVERITIES = ("note", "warning", "error")  # in rising order


class Finding(NamedTuple):
    """name: stable, for machines. severity: 'note' (worth knowing) | 'warning' | 'error' (going on is waste). evidence: numbers and
    updates. cause. cure: a config change, or the function to inspect. study: the page that shows the fault. run: as in WORKDIR/runs."""

    name: str
    severity: str
    evidence: str
    cause: str
    cure: str
    study: str = ""
    run: str = ""

    def __str__(self):
        return f"{self.name}: {self.evidence}. {self.cause}. {self.cure}."
