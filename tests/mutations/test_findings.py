"""Each mutation that shows in a run has a job of the study in which it is planted (experiments/doctor/mutants.py)."""

from experiments.doctor.mutants import JOBS
from jaxdistill.diagnosis.rules import RULES
from tests.mutations.mutations import MUTATIONS


def test_each_has_a_job_and_a_rule():
    known = {mutation.name: mutation.finding for mutation in MUTATIONS if mutation.finding}
    assert set(JOBS) == set(known)
    assert set(known.values()) <= {rule.name for rule in RULES}
