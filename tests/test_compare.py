"""compare: the statistics of a paired comparison, and what is no comparison."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from jaxdistill import UserError, compare
from jaxdistill.diagnosis import headline
from jaxdistill.diagnosis.statistics import interval
from tests import workdirs

A, B = (1.02, 0.95, 1.10), (1.30, 1.12, 1.31)  # nll of three seeds


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two jobs, a and b, of the same data and budget."""
    root = tmp_path_factory.mktemp("compare")
    for name, values, lr in (("a", A, 1e-3), ("b", B, 1e-2)):
        rows = [workdirs.run(root / name, "kd", seed, {"nll": nll, "accuracy": 1 - nll / 2}, config={"train": {"lr": lr}},
                             best={"nll": nll - 0.1 * seed, "accuracy": 0.5} if name == "a" else None) for seed, nll in enumerate(values)]
        rows.append(workdirs.run(root / name, "ce_only", 0, {"nll": 2.0}))
        workdirs.job(root / name, rows, seeds=(0, 1, 2))
    return root


def said(capsys, *args) -> str:
    assert compare.main(["compare", *map(str, args)]) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_interval_is_student_s(n):
    """Against the same from scipy's own distribution, and by hand for two: t(0.975, 1) = tan(0.475 pi)."""
    values = np.random.default_rng(n).normal(size=n)
    found = interval(values)
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert found == {"mean": pytest.approx(values.mean()), "interval": [pytest.approx(low), pytest.approx(high)], "n": n}
    half = math.tan(0.475 * math.pi) * 0.5
    assert interval([1.0, 2.0])["interval"] == [pytest.approx(1.5 - half), pytest.approx(1.5 + half)]
    assert interval([3.0]) == {"mean": 3.0, "interval": None, "n": 1}


def test_a_paired_comparison(folder, capsys):
    """Differences -0.28, -0.17, -0.21: mean -0.22, standard deviation 0.0557, half width 4.3027 * 0.0557 / sqrt(3) = 0.138."""
    found = said(capsys, folder / "a", folder / "b")
    assert "A is better than B by 0.220 nll (95 % interval -0.358 to -0.082 over 3 seeds)" in found
    assert re.search(r"0 │ 1.020 │ 1.300 │ -0.2800 │ │ 1 │ 0.950 │ 1.120 │ -0.1700 │ │ 2 │ 1.100 │ 1.310 │ -0.2100", found)
    assert "A is better than B, each at its best validation step, by 0.320 nll" in found
    assert "they differ in train.lr (A 0.001, B 0.01)" in found
    assert "not paired" not in found


@pytest.mark.parametrize(("a", "b"), [("a:kd", "b:kd"), ("a/runs/kd-1", "b:kd"), ("a:kd-1", "b/runs/kd-1")])
def test_runs_are_named_in_three_ways(folder, capsys, a, b):
    found = said(capsys, folder / a, folder / b)
    if a == "a:kd":
        assert "0.220 nll" in found
    else:
        assert "A is better than B by 0.170 nll (one seed: no interval)" in found
    assert ("not paired: the seeds of" in found) == (a == "a/runs/kd-1")


def test_the_direction_of_another_metric_is_not_guessed(folder, capsys):
    found = said(capsys, folder / "a", folder / "b", "--metric=accuracy")
    assert "A is higher than B by 0.110 accuracy" in found
    assert "better" not in found


def spoilt(root: Path, **change) -> Path:
    """A job whose one run differs in something that makes it another experiment."""
    values = change.pop("values", {"nll": 1.0, "accuracy": 0.5})
    return workdirs.job(root / "c", [workdirs.run(root / "c", "kd", change.pop("seed", 0), values, **change)])


OTHER = workdirs.SPLITS | {"test": {"sha256": "another", "rows": 10}}
TEXT = {"train": {"sha256": "a", "bytes": 70, "tokens": 9, "rows": 3}}


@pytest.mark.parametrize(("change", "line"), [
    (dict(splits=OTHER), "unlike data, seed 0: test.sha256 (A c, B another); accepted: runs on the same"),
    (dict(splits={"train": workdirs.SPLITS["train"]}), "unlike data, seed 0: test (A {'sha256': 'c', 'rows': 10}, B missing)"),
    (dict(config={"train": {"steps": 9}}), "unlike budgets, seed 0: train.steps (A 8, B 9); accepted: runs of as many updates"),
    (dict(config={"train": {"batch": 8}}), "unlike budgets, seed 0: train.batch (A 4, B 8)"),
    (dict(config={"data": {"length": 32}}), "unlike budgets, seed 0: data.length (A 16, B 32)"),
    (dict(config={"monitor": "validation/accuracy", "minimize": False}), "is judged by nll (lower is better), "),
    (dict(config={"minimize": False}), "unlike metrics: "),
    (dict(values={"accuracy": 0.5}), "unlike metrics: 'nll' is not measured in {c}; accepted: --metric=accuracy"),
    (dict(values={"mAP": 0.5}), "unlike metrics: 'nll' is not measured in {c}; accepted: runs of the same task"),
    (dict(seed=7), "nothing to pair: {a} has the seeds [0, 1, 2], {c} [7]; accepted: runs of a seed in common"),
    (dict(values=None), "{c}: found 1 run(s), none finished; accepted: a run with a result.json"),
])
def test_what_is_no_comparison_is_refused(folder, tmp_path, change, line):
    other = spoilt(tmp_path, **change)
    with pytest.raises(UserError) as stop:
        compare.main(["compare", str(folder / "a"), str(other)])
    assert line.replace("{a}", str(folder / "a")).replace("{c}", str(other)) in str(stop.value)
    assert "\n" not in str(stop.value)


def test_the_same_bytes_in_other_tokens_are_the_same_data(tmp_path, capsys):
    for name, facts in (("a", TEXT["train"]), ("b", TEXT["train"] | {"tokens": 7, "rows": 2, "teacher_tokens": 11})):
        workdirs.job(tmp_path / name, [workdirs.run(tmp_path / name, "kd", 0, {"nll": 1.0}, splits={"train": facts})])
    assert "one seed" in said(capsys, tmp_path / "a", tmp_path / "b")


def test_data_of_which_nothing_is_told(folder, tmp_path, capsys):
    other = spoilt(tmp_path)
    path = other / "runs/kd-0/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"facts": {}}))
    found = said(capsys, folder / "a", other)
    assert "one seed" in found
    assert f"whether the data are the same is not known: the recipe of {other} has no facts of its splits" in found


@pytest.mark.parametrize(("args", "line"), [
    (["{a}"], "usage: python -m jaxdistill.compare A B [--metric=NAME]: "),
    (["{a}", "{a}"], "nothing to compare: {a} and {a} are both {a}/runs/kd-0; accepted: two runs"),
    (["{a}:kd", "{a}:qd"], "{a}:qd: found no run 'qd' in {a}; accepted: ce_only, kd"),
    (["{a}", "{a}/nowhere"], "{a}/nowhere: no job in {a}/nowhere; accepted: WORKDIR, WORKDIR:RUN or WORKDIR/runs/NAME-SEED"),
    (["{a}", "{b}", "--metric=bleu"], "unlike metrics: 'bleu' is not measured in {a} and {b}; accepted: --metric=nll|accuracy"),
])
def test_other_mistakes(folder, args, line):
    a, b = folder / "a", folder / "b"
    with pytest.raises(UserError) as stop:
        compare.main(["compare", *(arg.format(a=a, b=b) for arg in args)])
    assert line.format(a=a, b=b) in str(stop.value)


def test_a_damaged_result_is_one_line(tmp_path):
    job = spoilt(tmp_path)
    (job / "runs/kd-0/result.json").write_text('{"row": {"seed": 0}}')
    with pytest.raises(UserError, match="kd-0: not a run's .*identity.*; accepted: the file as it was written"):
        compare.main(["compare", str(job), str(job)])


def test_a_metric_that_is_not_finite_is_said_so(tmp_path, capsys):
    for name, values in (("a", (1.0, "nan")), ("b", ("inf", 1.0))):
        workdirs.job(tmp_path / name, [workdirs.run(tmp_path / name, "kd", seed, {"nll": nll}) for seed, nll in enumerate(values)])
    found = said(capsys, tmp_path / "a", tmp_path / "b")
    assert "0 │ 1.000 │ inf │ -inf │ │ 1 │ nan │ 1.000 │ nan │" in found
    assert "A and B cannot be compared by nll: it is not finite" in found
    assert interval([math.nan, 1.0])["interval"] is None


def test_a_difference_in_words():
    found = interval([0.5, 0.7])
    assert headline.sentence("a", "b", "nll", False, found).startswith("a is better than b by 0.600 nll (95 % interval -0.671 to +1.871")
    assert headline.sentence("a", "b", "nll", True, found).startswith("a is worse than b")
    said = headline.sentence("a", "b", "bits_per_byte", None, interval([-0.5]))
    assert said == "a is lower than b by 0.500 bits/byte (one seed: no interval)"
