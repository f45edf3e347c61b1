"""Measures of distributions against plain loops, their ends, padding and batches; intervals against their definition."""

import numpy as np
import pytest
from scipy.special import softmax

from jaxdistill.evaluators import calibration, distribution
from jaxdistill.evaluators.intervals import group_interval

CONSTANT = np.asarray([0.4, 0.3, 0.2, 0.1])


def case(seed=0, size=40, classes=4, zeros=True):
    rng = np.random.default_rng(seed)
    logits = (2 * rng.normal(size=(size, classes))).astype(np.float32)
    target = rng.dirichlet(np.full(classes, 0.5), size)
    if zeros:
        target[rng.random((size, classes)) < 0.3] = 0
        target[:, 0] += 1e-3
    target = (target / target.sum(1, keepdims=True)).astype(np.float32)
    return logits, target, rng.integers(0, 6, size).astype(np.int32), rng.random(size) < 0.8


def stack(logits, target, group, valid, batch=8):
    arrays = dict(logits=logits, target=target, group=group, valid=valid)
    return {name: value.reshape(-1, batch, *value.shape[1:]) for name, value in arrays.items()}


def by_loops(logits, target):
    found = {name: [] for name in (*distribution.MEASURES, "soft_ce", "brier", "entropy", "accuracy", "top2", "top3")}
    for z, t in zip(logits.astype(np.float64), target.astype(np.float64), strict=True):
        p = [float(np.exp(value) / np.exp(z).sum()) for value in z]
        pairs = list(zip(t, p, strict=True))
        found["chebyshev"].append(max(abs(a - b) for a, b in pairs))
        found["clark"].append(sum((a - b) ** 2 / (a + b) ** 2 for a, b in pairs) ** 0.5)
        found["canberra"].append(sum(abs(a - b) / (a + b) for a, b in pairs))
        found["kl"].append(sum(a * np.log(a / b) for a, b in pairs if a > 0))
        found["soft_ce"].append(-sum(a * np.log(b) for a, b in pairs))
        found["cosine"].append(sum(a * b for a, b in pairs) / sum(a * a for a in t) ** 0.5 / sum(b * b for b in p) ** 0.5)
        found["intersection"].append(sum(min(a, b) for a, b in pairs))
        found["brier"].append(sum((a - b) ** 2 for a, b in pairs))
        found["entropy"].append(-sum(b * np.log(b) for b in p))
        order = sorted(range(len(p)), key=lambda k: -p[k])
        for name, k in (("accuracy", 1), ("top2", 2), ("top3", 3)):
            found[name].append(float(max(range(len(t)), key=lambda j: t[j]) in order[:k]))
    return {name: float(np.mean(values)) for name, values in found.items()}


@pytest.mark.parametrize("seed", range(3))
def test_they_are_their_definitions(seed):
    logits, target, group, valid = case(seed)
    found = distribution.finish(stack(logits, target, group, valid), CONSTANT)
    wanted = by_loops(logits[valid], target[valid])
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-9)
    p, t = softmax(logits[valid].astype(np.float64), axis=1), target[valid].astype(np.float64)
    entropy = lambda q: -sum(x * np.log(x) for x in q)  # noqa: E731
    assert found["spread"] == pytest.approx(entropy(p.mean(0)) - np.mean([entropy(q) for q in p]), rel=1e-9)
    assert found["classes_predicted"] == len({int(np.argmax(q)) for q in p})
    constant = np.mean([sum(a * np.log(a / b) for a, b in zip(q, CONSTANT, strict=True) if a > 0) for q in t])
    assert found["kl_constant"] == pytest.approx(constant, rel=1e-9)
    assert found["kl_gain"] == pytest.approx(constant - found["kl"], rel=1e-9)
    assert found["kl_gain_low"] < found["kl_gain"] < found["kl_gain_high"]
    gap = 0.0
    for i in range(15):
        inside = (p.max(1) > i / 15) & (p.max(1) <= (i + 1) / 15)
        gap += abs(p.max(1)[inside].sum() - t[np.arange(len(t)), p.argmax(1)][inside].sum())
    assert found["ece15"] == pytest.approx(gap / len(p), rel=1e-9)


def test_the_truth_itself_is_perfect_and_calibrated():
    _, target, group, valid = case(1)
    found = distribution.finish(stack(calibration.logs(target), target, group, valid), CONSTANT)
    best = dict(kl=0, chebyshev=0, clark=0, canberra=0, brier=0, ece15=0, cosine=1, intersection=1, accuracy=1, top2=1, top3=1)
    assert {name: found[name] for name in best} == pytest.approx(best, abs=1e-5)
    assert found["soft_ce"] == pytest.approx(found["entropy"], abs=1e-6)  # what no prediction is below
    assert found["kl_gain_low"] > 0


def test_the_two_collapses_are_told_apart():
    _, target, group, valid = case(2)
    constant = distribution.finish(stack(np.broadcast_to(np.log(CONSTANT), target.shape), target, group, valid), CONSTANT)
    assert constant["spread"] == pytest.approx(0.0, abs=1e-12)
    assert constant["entropy"] > 1.2
    assert (constant["kl_gain"], constant["classes_predicted"]) == (pytest.approx(0.0, abs=1e-12), 1)
    one_hot = distribution.finish(stack(1e3 * np.eye(4)[np.arange(40) % 4], target, group, valid), CONSTANT)
    assert one_hot["entropy"] == pytest.approx(0.0, abs=1e-12)
    assert one_hot["spread"] > 1.2
    assert one_hot["kl_gain_high"] < 0  # worse than the constant, and the table says so
    assert one_hot["kl"] > 100  # what a sure wrong answer costs is not cut off
    assert one_hot["classes_predicted"] == 4


def test_a_constant_output_has_the_accuracy_of_one_class_and_nan_is_right_for_none():
    target = np.eye(4)[np.arange(40) % 4]
    _, _, group, _ = case()
    found = distribution.finish(stack(np.zeros((40, 4)), target, group, np.ones(40, bool)))
    assert [found[name] for name in ("accuracy", "top2", "top3")] == [0.25, 0.5, 0.75]
    assert "kl_gain" not in found
    logits = 9 * target
    logits[3] = np.nan
    broken = distribution.finish(stack(logits, target, group, np.ones(40, bool)))
    assert broken["accuracy"] == 39 / 40
    assert np.isnan([broken[name] for name in ("kl", "ece15", "spread", "entropy")]).all()


def test_padding_batches_order_and_shifts_change_nothing():
    logits, target, group, valid = case(3)
    found = distribution.finish(stack(logits, target, group, valid), CONSTANT)
    bad = logits.copy()
    bad[~valid] = np.nan
    assert distribution.finish(stack(bad, np.where(valid[:, None], target, np.nan), group, valid), CONSTANT) == found
    assert distribution.finish(stack(logits, target, group, valid, batch=40), CONSTANT) == found
    keep = np.flatnonzero(valid)
    alone = distribution.finish(stack(logits[keep], target[keep], group[keep], valid[keep], batch=1), CONSTANT)
    assert alone == pytest.approx(found, rel=1e-12)
    mixed = np.random.default_rng(0).permutation(40)
    shuffled = distribution.finish(stack(*(value[mixed] for value in (logits, target, group, valid))), CONSTANT)
    assert shuffled == pytest.approx(found, rel=1e-9)  # the interval too: groups are drawn by their number
    assert distribution.finish(stack(logits + 100, target, group, valid), CONSTANT) == pytest.approx(found, rel=1e-4)
    assert distribution.finish(stack(logits, target, group, np.zeros(40, bool)), CONSTANT) == {}


def test_zeros_in_prediction_and_target():
    t = np.asarray([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    p = np.asarray([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    found = distribution.measures(calibration.logs(p), t)
    assert found["kl"][0] == pytest.approx(0.5 * np.log(0.5) + 0.5 * np.log(0.5 / 1e-12), rel=1e-9)
    assert (found["clark"][0], found["canberra"][0]) == pytest.approx((np.hypot(1 / 3, 1), 4 / 3), rel=1e-9)
    exact = dict(kl=0, clark=0, canberra=0, chebyshev=0, cosine=1, intersection=1, entropy=0)
    assert {name: found[name][1] for name in exact} == exact
    finite = distribution.measures(np.asarray([[0.0, -100.0, -100.0]]), t[1:])
    assert finite["kl"][0] == pytest.approx(100.0)  # what a model gives is not cut off


def test_group_interval_is_its_definition_and_repeats():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 9, 200)
    values = rng.normal(size=200) + groups
    low, high = group_interval(values, groups, seed=3, resamples=400)
    draw, means = np.random.default_rng(3), []
    for _ in range(400):
        rows = np.concatenate([values[groups == g] for g in draw.integers(0, 9, 9)])
        means.append(rows.mean())
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), rel=1e-9)
    assert group_interval(values, groups, seed=3, resamples=400) == (low, high)
    assert group_interval(values, groups * 7 - 40, seed=3, resamples=400) == (low, high)  # names of groups do not matter
    alone = group_interval(values, np.arange(200), resamples=400)
    assert alone[1] - alone[0] < (high - low) / 2  # rows of a group are alike: as if independent, far too narrow
    assert group_interval(values, np.zeros(200, int)) is None


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(1), 0
    for seed in range(60):
        groups = np.repeat(np.arange(40), 5)
        values = rng.normal(size=40)[groups] + rng.normal(size=200)
        low, high = group_interval(values, groups, seed=seed, resamples=300)
        hits += low <= 0 <= high
    assert hits >= 51  # of 60; 57 are to be expected, below 51 has a chance of 1 %
