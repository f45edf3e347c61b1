"""Gates: what the loop asks of every step's metrics, and when it stops a run that is not worth going on with.

Pure: (memory, step, metrics) -> (memory, findings). The memory is JSON and is checkpointed, so a resumed run
judges as an uninterrupted one would.
"""

from typing import NamedTuple


class Finding(NamedTuple):
    """name: stable, for machines. severity: 'warning' | 'error' (the run stops). The rest is for people."""

    name: str
    severity: str
    evidence: str
    cause: str
    cure: str

    def __str__(self):
        return f"{self.name}: {self.evidence}. {self.cause}. {self.cure}."


class Gates(NamedTuple):
    """leaves: paths of the trainable parameters. reach: for each, the terms whose gradient reaches it.
    patience: applied updates after which a reached leaf must have moved. streak: non-finite updates in a row that
    are fatal. gap: the largest ledger gap."""

    leaves: tuple[str, ...]
    reach: tuple[frozenset, ...]
    patience: int = 10
    streak: int = 5
    gap: float = 1e-4

    def start(self) -> dict:
        return {"due": [self.patience] * len(self.leaves), "moved": [False] * len(self.leaves)}

    def check(self, memory: dict, step: int, metrics: dict) -> tuple[dict, list[Finding]]:
        """metrics: those of one step, on the host, as train_step returns them."""
        findings = []
        if not metrics["finite"]:
            streak = int(metrics["streak"])
            severity = "error" if streak >= self.streak else "warning"
            findings.append(Finding(
                "non_finite", severity,
                f"update {step}: loss {float(metrics['loss'])}, gradient norm {float(metrics['grad_norm'])}; skipped, "
                f"{streak} in a row, {int(metrics['skipped'])} in all",
                "the loss or a gradient is not finite",
                "look at the batch and at the term that is not finite in metrics.jsonl; a lower train.lr or a shorter "
                f"train.clip often cures it ({self.streak} in a row stop the run: gates.non_finite)",
            ))
            return memory, findings
        if float(metrics["gap"]) > self.gap:
            findings.append(Finding(
                "ledger_gap", "error",
                f"update {step}: the terms add up to another number than the loss (relative gap {float(metrics['gap']):.1e})",
                "the loss holds something that no term reports, or reports what it does not hold",
                "return every addend of the loss as a Term, multiplied by its scale once",
            ))
        if float(metrics["lr"]) > 0:
            memory, stuck = self._movement(memory, metrics)
            if stuck:
                findings.append(Finding(
                    "zero_gradient", "error",
                    f"update {step}: {len(stuck)} parameter(s) had a gradient of exactly 0 in {self.patience} applied "
                    f"updates, though an active term reaches them: {', '.join(stuck[:5])}",
                    "dead units, an underflow, or a stop_gradient where none belongs",
                    "freeze them by a Group if this is meant (gates.zero_gradient=0 turns the gate off)",
                ))
        return memory, findings

    def _movement(self, memory: dict, metrics: dict) -> tuple[dict, list[str]]:
        if not self.patience or all(memory["moved"]):
            return memory, []
        active = {name for name, line in metrics["terms"].items() if line["weight"] != 0 and line["count"] > 0}
        moved = [bool(before or now) for before, now in zip(memory["moved"], metrics["moved"], strict=True)]
        due = [
            left - bool(terms & active) if not done else left
            for left, terms, done in zip(memory["due"], self.reach, moved, strict=True)
        ]
        stuck = [
            leaf for leaf, left, before, done in zip(self.leaves, due, memory["due"], moved, strict=True)
            if not done and left == 0 and before == 1
        ]
        return memory | {"due": due, "moved": moved}, stuck
