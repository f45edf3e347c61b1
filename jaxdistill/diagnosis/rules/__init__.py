"""The rules of the doctor, root causes before symptoms, and the judgement that they give together.

A rule is a pure function (run, job) -> Finding | None of the records. Each says in its docstring the symptom, how many records it needs,
and what tells the fault from those that look like it.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxdistill.diagnosis.finding import SEVERITIES, Finding
from jaxdistill.diagnosis.records import Job, Run
from jaxdistill.diagnosis.rules import collapse, data, deployed, ledger, optimizer, targets

PAGE = "experiments/doctor/README.md"


class Rule(NamedTuple):
    """name: of its findings. explains: findings that follow from this one, and are only notes beside it; error_explains: those that do so
    only where this one is an error."""

    name: str
    check: Callable[[Run, Job], Finding | None]
    explains: tuple[str, ...] = ()
    error_explains: tuple[str, ...] = ()

    def follow(self, finding: Finding) -> tuple[str, ...]:
        """What is explained by this finding."""
        return {"note": (), "warning": self.explains, "error": self.explains + self.error_explains}[finding.severity]


UNTRAINED = ("constant_predictor", "projector_uninformative", "teacher_no_better")  # what parameters that do not learn look like

RULES = (
    Rule("ledger_gap", ledger.ledger_gap, ("weight_schedule_mimics", "term_dominates", "perplexity_of_total")),
    Rule("all_masked", ledger.all_masked, (
        *UNTRAINED, "optimizer_not_stepping", "lr_too_small", "zero_gradient", "non_finite", "weights_decaying_away",
        "teacher_misaligned")),
    Rule("lr_zero", optimizer.lr_zero, (*UNTRAINED, "optimizer_not_stepping", "lr_too_small", "ema_never_used")),
    Rule("optimizer_not_stepping", optimizer.optimizer_not_stepping, (*UNTRAINED, "lr_too_small", "ema_never_used", "zero_gradient")),
    Rule("classes_disjoint", data.classes_disjoint, ("overfitting", "memorised_leak", "groups_leak")),
    Rule("inputs_unscaled", data.inputs_unscaled, (
        *UNTRAINED, "saturated", "lr_too_large", "lr_too_small", "non_finite", "zero_gradient", "batch_statistics")),
    Rule("target_unreachable", targets.target_unreachable, ("saturated", *UNTRAINED)),
    Rule("padding_counted", targets.padding_counted, ("labels_not_shifted", "overfitting", "teacher_misaligned", "memorised_leak")),
    Rule("labels_not_shifted", targets.labels_not_shifted, (
        "teacher_misaligned", "teacher_no_better", "overfitting", "teacher_follows_student", "memorised_leak")),
    Rule("teacher_misaligned", targets.teacher_misaligned, ("teacher_no_better", "overfitting")),
    Rule("teacher_follows_student", targets.teacher_follows_student, ("overfitting", "teacher_no_better", "teacher_misaligned")),
    Rule("frozen_moved", deployed.frozen_moved, ("teacher_follows_student",)),
    Rule("projector_uninformative", targets.projector_uninformative, ("teacher_no_better",)),
    Rule("weights_decaying_away", optimizer.weights_decaying_away, (
        *UNTRAINED, "lr_too_small", "lr_too_large", "overfitting", "saturated")),
    Rule("lr_too_large", optimizer.lr_too_large, (
        *UNTRAINED, "non_finite", "saturated", "overfitting", "router_collapsed", "zero_gradient")),
    Rule("lr_too_small", optimizer.lr_too_small, UNTRAINED),
    Rule("non_finite", ledger.non_finite),
    Rule("zero_gradient", collapse.zero_gradient, ("constant_predictor",)),
    Rule("saturated", collapse.saturated, ("overfitting",)),
    Rule("constant_predictor", collapse.constant_predictor, ("overfitting",)),
    Rule("router_collapsed", collapse.router_collapsed),
    Rule("term_dominates", ledger.term_dominates, ("weight_schedule_mimics",)),
    Rule("teacher_no_better", targets.teacher_no_better, (), ("constant_predictor", "saturated")),
    Rule("batch_statistics", deployed.batch_statistics),
    Rule("ema_initial", deployed.ema_initial, ("overfitting",)),
    Rule("ema_never_used", deployed.ema_never_used),
    Rule("metric_clamped", deployed.metric_clamped, ("perplexity_of_total",)),
    Rule("perplexity_of_total", deployed.perplexity_of_total),
    Rule("groups_leak", data.groups_leak, ("memorised_leak",)),
    Rule("memorised_leak", data.memorised_leak),
    Rule("weight_schedule_mimics", ledger.weight_schedule_mimics),
    Rule("overfitting", data.overfitting),
    Rule("loss_weights_drift", optimizer.loss_weights_drift),
)  # fmt: skip


def judge(job: Job) -> list[Finding]:
    """The findings of all runs: by severity, then root causes first, then in the order of the runs."""
    place = {rule.name: index for index, rule in enumerate(RULES)}
    found = [finding for run in job.runs.values() for finding in examine(run, job)]
    return sorted(found, key=lambda one: (-SEVERITIES.index(one.severity), place.get(one.name, len(RULES))))


def examine(run: Run, job: Job) -> list[Finding]:
    """The findings of one run. What a warning or an error explains is demoted to a note; what only a gate saw is passed on."""
    said = [(rule, finding) for rule in RULES if (finding := rule.check(run, job))]
    explained = {name: rule.name for rule, finding in reversed(said) for name in rule.follow(finding)}
    found = []
    for rule, finding in said:
        if finding.name in explained:
            finding = finding._replace(severity="note", cause=f"explained by {explained[finding.name]}; by itself: {finding.cause}")
        found.append(finding._replace(run=run.id, study=finding.study or f"{PAGE}#{rule.name}"))
    names = {finding.name for finding in found}
    gates = {finding.name: finding for _, finding in run.log.findings if finding.severity == "error" and finding.name not in names}
    return found + [finding._replace(run=run.id) for finding in gates.values()]
