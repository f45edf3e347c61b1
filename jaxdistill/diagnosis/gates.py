"""Gates: what the loop asks of every step's metrics, and when it stops a run that is not worth going on with.

Pure: (memory, step, metrics) -> (memory, findings). The memory is JSON and is checkpointed, so a resumed run
judges as an uninterrupted one would.
"""

from typing import NamedTuple

from jaxdistill.diagnosis.finding import Finding

STOPS = ("non_finite", "ledger_gap", "zero_gradient", "optimizer_not_stepping", "lr_zero", "all_masked", "frozen_moved")


class Gates(NamedTuple):
    """leaves: paths of the trainable parameters. reach: for each, the terms whose gradient reaches it.
    patience: applied updates after which a reached leaf must have moved. streak: non-finite updates in a row that
    are fatal. gap: the largest ledger gap. idle: updates in a row that may be without effect. stop: the findings that stop a run;
    any other is a warning."""

    leaves: tuple[str, ...]
    reach: tuple[frozenset, ...]
    patience: int = 10
    streak: int = 5
    gap: float = 1e-4
    idle: int = 10
    stop: tuple[str, ...] = STOPS

    def start(self) -> dict:
        return {"due": [self.patience] * len(self.leaves), "moved": [False] * len(self.leaves), "idle": {}, "told": []}

    def check(self, memory: dict, step: int, metrics: dict) -> tuple[dict, list[Finding]]:
        """metrics: those of one step, on the host, as train_step returns them."""
        if not metrics["finite"]:
            streak = int(metrics["streak"])
            return memory, [self.judged(Finding(
                "non_finite", "error" if streak >= self.streak else "warning",
                f"update {step}: loss {float(metrics['loss'])}, gradient norm {float(metrics['grad_norm'])}; skipped, "
                f"{streak} in a row, {int(metrics['skipped'])} in all",
                "the loss, a gradient or what the update would write is not finite",
                "look at the batch and at the term that is not finite in metrics.jsonl; a lower train.lr or a smaller "
                f"optimizer.clip often cures it ({self.streak} in a row stop the run: gates.non_finite)",
            ))]
        found = []
        if float(metrics["gap"]) > self.gap:
            found.append(Finding(
                "ledger_gap", "error",
                f"update {step}: the terms add up to another number than the loss (relative gap {float(metrics['gap']):.1e})",
                "the loss holds something that no term reports, or reports what it does not hold",
                "return every addend of the loss as a Term, multiplied by its scale once",
            ))
        if float(metrics["lr"]) > 0:
            memory, stuck = self._movement(memory, metrics)
            if stuck:
                found.append(Finding(
                    "zero_gradient", "error",
                    f"update {step}: {len(stuck)} parameter(s) had a gradient of exactly 0 in {self.patience} applied "
                    f"updates, though an active term reaches them: {', '.join(stuck[:5])}",
                    "dead units, an underflow, or a stop_gradient where none belongs",
                    "freeze them by a Group if this is meant (gates.zero_gradient=0 turns the gate off)",
                ))
        memory, idle = self._idle(memory, step, metrics)
        told = set(memory["told"])
        new = [self.judged(one) for one in found + idle if one.name not in told]  # once: it would come with every update
        return memory | {"told": sorted(told | {one.name for one in new})}, new

    def judged(self, finding: Finding) -> Finding:
        """An error that is not among those that stop is a warning."""
        return finding if finding.name in self.stop else finding._replace(severity="warning")

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

    def _idle(self, memory: dict, step: int, metrics: dict) -> tuple[dict, list[Finding]]:
        """Finite updates in a row that could change nothing, or should have and did not."""
        lr, norm = float(metrics["lr"]), float(metrics["grad_norm"])
        counts = [float(line["count"]) for line in metrics["terms"].values() if line["weight"] != 0]
        now = {
            "lr_zero": lr == 0,
            # A term that counts no examples (a prior, a penalty) has the count 1, also where everything is masked.
            "all_masked": 0 in counts and max(counts) <= 1,
            "optimizer_not_stepping": lr > 0 and norm > 0 and not any(float(group["changed"]) for group in metrics["groups"].values()),
        }
        idle = {name: memory["idle"].get(name, 0) + 1 for name, still in now.items() if still}
        since = f"the {self.idle} finite updates up to {step}"
        told = {
            "lr_zero": Finding(
                "lr_zero", "error", f"{since}: the learning rate is 0 in all of them",
                "train.lr is 0, or the control `lr` has brought it there: nothing is learned",
                "set train.lr above 0 (as in 1e-3)",
            ),
            "all_masked": Finding(
                "all_masked", "error", f"{since}: no term counts an example or a token (loss {float(metrics['loss']):.4g})",
                "every position is masked as padding, or lacks a label",
                "look at the first batch with its labels and mask (--dry_run), at data.length, and at what the recipe calls valid",
            ),
            "optimizer_not_stepping": Finding(
                "optimizer_not_stepping", "error",
                f"{since}: no bit of any parameter changed, at a learning rate of {lr:.3g} and a gradient of norm {norm:.3g}",
                "the update is never applied, or is lost in rounding: too small for the parameters' type",
                "raise train.lr and optim_rules' lr_mult, keep parameters in float32, and look at what is done with the optimizer's output",
            ),
        }
        return memory | {"idle": idle}, [told[name] for name, rounds in idle.items() if rounds == self.idle]
