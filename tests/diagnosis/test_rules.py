"""Each rule on records with its fault, of which it must be the first finding, and on those that look like it, of which it must be quiet."""

import re
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import dcal, kd, reservoir, soft_label
from jaxdistill.diagnosis import records, rules
from tests.diagnosis.look_alikes import HEALTHY, one_bad_update, outlier, overfits_at_the_end, two_images_fewer
from tests.diagnosis.made import Made, blank, classifier, gate, language
from tests.diagnosis.sick import FAULTS, not_stepping

PAGE = Path(__file__).parents[2] / "experiments/doctor/README.md"


def findings(made: Made) -> list:
    return rules.judge(made.job())


def loud(made: Made) -> list[str]:
    return [finding.name for finding in findings(made) if finding.severity != "note"]


@pytest.mark.parametrize(("name", "sick"), [(name, sick) for name, several in FAULTS.items() for sick in several])
def test_a_fault_is_the_first_finding(name, sick):
    found = findings(sick())
    assert found[0].name == name, found
    first = found[0]
    assert first.severity in ("warning", "error")
    assert re.search(r"\d", first.evidence)
    assert first.cause
    assert first.cure
    assert first.run == "kd-0"
    assert first.study.startswith("experiments/")
    assert not any("nan" in part for part in (first.evidence, first.cure))


@pytest.mark.parametrize("healthy", HEALTHY)
def test_what_looks_like_a_fault(healthy):
    assert loud(healthy()) == [], findings(healthy())


@pytest.mark.parametrize(("healthy", "name"), [
    (overfits_at_the_end, "overfitting"), (one_bad_update, "non_finite"), (outlier, "inputs_unscaled"),
])
def test_what_is_worth_a_note(healthy, name):
    assert [(finding.name, finding.severity) for finding in findings(healthy())] == [(name, "note")]


def test_what_is_chance_is_not_even_a_note():
    assert findings(two_images_fewer()) == []


def test_untrained():
    """A run of two updates, whatever it shows, is no reason for anything louder than a note."""
    for make in (lambda: language(2), lambda: classifier(2), lambda: blank(2)):
        made = make()
        assert loud(made) == []
        made.probe("spread", 1e-9, every=1).probe("entropy", 1e-9, every=1).measure("validation/nll", 80.0, every=1)
        assert loud(made.measure("validation/projector_nll", 9.0, every=1)) == []


@pytest.mark.parametrize("part", [0.05, 0.3, 0.6])
@pytest.mark.parametrize("healthy", HEALTHY)
def test_a_running_run_is_judged_by_what_it_has(healthy, part):
    made = healthy()
    count = max(2, round(part * len(made.steps)))
    made.columns = {path: values[:count] for path, values in made.columns.items()}
    made.row, made.rows = None, made.rows[:2]
    assert loud(made) == [], findings(made)


@pytest.mark.parametrize("lack", [
    "manifest", "config", "terms/", "groups/", "probes/", "knobs/", "streak", "all but one line", "all lines",
])
def test_a_log_may_lack_anything(lack):
    """Whatever is not there is not judged: no rule fails, and none invents a number."""
    for make in [sick for several in FAULTS.values() for sick in several] + list(HEALTHY):
        made = make()
        if lack in ("manifest", "config"):
            setattr(made, lack, {})
        elif "line" in lack:
            made.columns = {path: values[: 1 if "one" in lack else 0] for path, values in made.columns.items()}
        else:
            made.columns = {path: values for path, values in made.columns.items() if not path.startswith(lack)}
        for finding in findings(made):
            assert "nan" not in f"{finding.evidence} {finding.cause} {finding.cure}"


def test_a_frozen_teacher_is_still():
    """The batches differ and the teacher does not: no seed of fifty is taken for a drift."""
    for seed in range(50):
        made = language()
        noise = 0.1 * np.random.default_rng(seed).normal(size=(2, 200))
        made.probe("teacher_entropy", 2.6 * (1 + noise[0])).probe("teacher_nll", 2.7 * (1 + noise[1]))
        assert rules.targets.teacher_follows_student(made.run(), made.job()) is None


def test_a_symptom_is_a_note_beneath_its_cause():
    made = not_stepping()
    found = {finding.name: finding for finding in findings(made)}
    assert found["optimizer_not_stepping"].severity == "error"
    assert found["constant_predictor"].severity == "note"
    assert "explained by optimizer_not_stepping" in found["constant_predictor"].cause


def test_a_gate_that_no_rule_repeats_is_passed_on():
    made = classifier()
    made.findings[10] = [gate("something_new")]
    assert [(finding.name, finding.run) for finding in findings(made)] == [("something_new", "kd-0")]


def test_a_flag_that_is_printed_is_a_key_of_a_shipped_config():
    shipped = [config.get_config() for config in (kd, dcal, reservoir, soft_label)]
    keys = {key for config in shipped for key, _ in config_keys(config)}
    files = Path(rules.__file__).parent.glob("*.py")
    printed = {key for file in files for key in re.findall(r"job\.flag\(\w+, ['\"]([\w.]+)", file.read_text())}
    assert len(printed) > 10
    assert printed <= keys, printed - keys


def config_keys(config, prefix: str = ""):
    for key, value in config.items():
        yield f"{prefix}{key}", value
        if isinstance(value, ConfigDict):
            yield from config_keys(value, f"{prefix}{key}.")


def test_names_are_unique_and_explain_each_other():
    names = [rule.name for rule in rules.RULES]
    assert len(set(names)) == len(names)
    assert {name for rule in rules.RULES for name in rule.explains + rule.error_explains} <= set(names)
    assert set(FAULTS) == set(names) - {"loss_weights_drift"}  # which is no fault: test_documents


def test_the_page_has_a_section_for_each():
    sections = set(re.findall(r"^## (\w+)$", PAGE.read_text(), re.M))
    assert sections == {rule.name for rule in rules.RULES}


def test_rules_say_what_they_need_and_what_they_are_not():
    for rule in rules.RULES:
        words = rule.check.__doc__
        assert re.search(r"\bnot\b|\bNot\b", words), rule.name
        assert re.search(r"update|evaluation|probe|deep|preflight|records|finished", words), rule.name


def test_made_records_are_as_they_would_be_read():
    made = language(30)
    made.findings[10] = [gate("zero_gradient")]
    read, held = records.parse(made.text()), made.run().log
    assert sorted(read.updates) == sorted(held.updates)
    for path in held.updates:
        np.testing.assert_array_equal(read.updates[path], held.updates[path], err_msg=path)
    assert read.evaluations == held.evaluations
    assert read.findings == held.findings
