"""The source documents' own numbers, typed in as records, and what they say.

Documents 001, 003 and 004 give losses, weights, metrics and updates, and misread them. Documents 000 and 002 give none that a rule
could read: their faults are planted in experiments/reservoir_document_000 and experiments/soft_label_document_002.
"""

import math

import numpy as np
import pytest

from jaxdistill.diagnosis import rules
from jaxdistill.diagnosis.rules import ledger
from tests.diagnosis.made import Made

TERMS_003 = {  # of document 003, update 21,700; it calls them raw
    "kd_loss": 10.8479, "routing_feature_loss": 0.2710, "routing_load_balance_loss": 0.0, "routing_attention_alignment_loss": 2.7772,
    "attention_loss": 0.0507, "layerwise_loss": 160.5575, "contrastive_loss": 0.0200, "lm_loss": 2.6176,
}  # fmt: skip


def records(steps, **columns) -> Made:
    """A log with these updates and no more than the document tells of them."""
    steps = np.asarray(steps)
    whole = {"finite": 1.0, "loss": 0.0, "gap": 0.0, "lr": np.nan, "skipped": 0.0} | columns
    made = Made({"step": steps}, {"monitor": "", "train": {}}, {})
    for path, values in whole.items():
        made.put(path, values)
    return made


def test_177_is_the_sum_of_what_document_003_calls_raw_and_layerwise_owns_90_6_percent():
    """Not 93.7 %, as it says: that is the share of kd and layerwise alone."""
    assert sum(TERMS_003.values()) == pytest.approx(177.1419, abs=5e-5)
    made = records([21_700])
    for name, value in TERMS_003.items():
        made.term(name, value, 1.0)
    (finding,) = rules.judge(made.job())
    assert (finding.name, finding.severity) == ("term_dominates", "note")  # of one update
    assert "layerwise_loss owns 90.6% of the loss (177.1419 at update 21700" in finding.evidence
    assert TERMS_003["layerwise_loss"] / (TERMS_003["layerwise_loss"] + TERMS_003["kd_loss"]) == pytest.approx(0.937, abs=5e-4)


def test_485165195_is_a_clamp():
    made = records([21_700])
    made.evaluations[21_700] = {"validation/loss": 51.66, "validation/perplexity": 485_165_195.41}
    (finding,) = rules.judge(made.job())
    assert (finding.name, finding.severity) == ("metric_clamped", "warning")
    assert "485,165,195.41, which is exp(20)" in finding.evidence
    assert "the true value is that or anything larger" in finding.cause


@pytest.mark.parametrize("value", [484_000_000.0, 485_165_000.0, math.exp(19.999), 67.0, 2.05e12])
def test_other_large_perplexities_are_none(value):
    made = records([21_700])
    made.evaluations[21_700] = {"validation/perplexity": value}
    assert rules.judge(made.job()) == []


def test_28_to_3_is_the_weight_for_the_most_part():
    """Document 001: T^2 KL 37.6 at weight 0.7 beside 1.9 of lm; then 14.0, which it expects, at weight 0.1."""
    made = records([1, 2]).term("kd", [37.6, 14.0], [0.7, 0.1]).term("lm", 1.9, 1.0)
    before, after, held = ledger.reweighted(made.run(), slice(0, 1), slice(1, 2))
    assert [round(value, 1) for value in (before, after, held)] == [28.2, 3.3, 5.7]
    (finding,) = rules.judge(made.job())
    assert (finding.name, finding.severity) == ("weight_schedule_mimics", "note")  # of two updates
    assert "from 28.22 (up to update 1) to 3.3" in finding.evidence
    assert "(kd 0.7 to 0.1) it would be 5.66: 91% of the move" in finding.evidence


def test_perplexities_are_of_the_total():
    """Document 001's table: loss 3.3, 5.2, 9.5, 7.8, 4.2 and perplexity 27, 181, 13,360, 2,441, 67, though the loss has two terms."""
    loss = np.asarray([3.3, 5.2, 9.5, 7.8, 4.2])
    kd, weight = np.asarray([14.0, 12.0, 8.0, 6.0, 2.0]), np.asarray([0.10, 0.28, 0.70, 0.70, 0.70])
    steps = np.asarray([1, 1000, 5000, 10_000, 25_000])
    made = records(steps).term("kd", kd, weight).term("lm", loss - kd * weight, 1.0)
    for step, value in zip(steps, [27.0, 181.0, 13_360.0, 2_441.0, 67.0], strict=True):
        made.evaluations[int(step)] = {"validation/perplexity": value}
    finding = next(finding for finding in rules.judge(made.job()) if finding.name == "perplexity_of_total")
    assert finding.severity == "warning"
    assert "67, exp of the loss of 2 terms (4.2); lm alone is 2.8" in finding.evidence


def test_loss_weights_are_the_learning_rate_times_updates():
    """Document 004: 0.0002 to 0.0697 in 12 epochs of 375 updates at 1.5625e-5, which it takes for a divergence."""
    rate, last = 1.5625e-5, 12 * 375
    assert rate * last == pytest.approx(0.0703, abs=5e-5)
    made = records([round(0.0002 / rate), last], lr=rate).probe("w_sa", [0.0002, 0.0697], every=1)
    (finding,) = rules.judge(made.job())
    assert (finding.name, finding.severity) == ("loss_weights_drift", "note")
    assert "from 0.0002 to 0.0697 in 4487 updates, whose learning rates add up to 0.07011" in finding.evidence
