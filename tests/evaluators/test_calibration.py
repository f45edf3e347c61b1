"""Calibration: bins against loops, the temperature against a search, and the figures known of real probabilities."""

import functools
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
from scipy.special import softmax

from jaxdistill.evaluators import calibration


def case(seed=0, rows=400, classes=5, truth=2.0):
    """Logits, and labels drawn from softmax(logits / truth)."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=(rows, classes))
    p = softmax(logits / truth, axis=1)
    return logits, (p.cumsum(1) > rng.random((rows, 1))).argmax(1), p


def test_bins_are_their_definition_for_labels_and_distributions():
    logits, labels, truth = case()
    p = softmax(logits, axis=1)
    for target in (labels, truth, np.eye(5)[labels]):
        found, gap = calibration.reliability(p, target), 0.0
        for i in range(15):
            inside = [n for n in range(len(p)) if i / 15 < p[n].max() <= (i + 1) / 15]
            right = [float(p[n].argmax() == target[n]) if target.ndim == 1 else target[n, p[n].argmax()] for n in inside]
            assert found.count[i] == len(inside)
            assert found.confidence[i] == pytest.approx(np.mean([p[n].max() for n in inside]) if inside else 0.0)
            assert found.correct[i] == pytest.approx(np.mean(right) if inside else 0.0)
            gap += abs(sum(p[n].max() for n in inside) - sum(right))
        assert calibration.ece(p, target) == pytest.approx(gap / len(p), rel=1e-9)
    assert calibration.ece(p, np.eye(5)[labels]) == pytest.approx(calibration.ece(p, labels), rel=1e-12)
    edges = np.asarray([[1.0, 0.0], [0.5, 0.5], [8 / 15, 7 / 15]])
    assert calibration.reliability(edges, np.zeros(3, int)).count.tolist() == [0] * 7 + [2] + [0] * 6 + [1]


def test_the_true_distribution_is_calibrated_where_its_own_likeliest_class_as_label_says_it_is_not():
    _, _, truth = case(1, truth=4.0)
    assert calibration.ece(truth, truth) == pytest.approx(0.0, abs=1e-12)
    assert calibration.ece(truth, truth.argmax(1)) > 0.3


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_temperature_is_the_smallest_nll(seed, soft):
    logits, labels, truth = case(seed)
    target = truth if soft else labels
    found = calibration.fit_temperature(logits, target)
    search = dict(bounds=(0.1, 10), method="bounded", options=dict(xatol=1e-10))
    best = scipy.optimize.minimize_scalar(lambda t: calibration.nll(logits, target, t), **search)
    assert found == pytest.approx(best.x, rel=1e-5)
    assert calibration.nll(logits, target, found) <= best.fun + 1e-12
    assert found == pytest.approx(2.0, rel=1e-6 if soft else 0.15)  # what the labels were drawn with
    assert calibration.fit_temperature(3 * logits + 50, target) == pytest.approx(3 * found, rel=1e-6)
    p = softmax(logits, axis=1)
    loops = -np.mean([np.log(p[n, labels[n]]) if not soft else np.sum(truth[n] * np.log(p[n])) for n in range(len(p))])
    assert calibration.nll(logits, target) == pytest.approx(loops, rel=1e-9)


def test_ends_of_the_temperature():
    eye = np.eye(4)
    assert calibration.fit_temperature(eye, np.arange(4)) == calibration.COLDEST
    assert calibration.fit_temperature(eye, np.arange(4)[::-1]) == calibration.HOTTEST
    assert calibration.fit_temperature(np.ones((4, 3)), np.asarray([0, 1, 2, 0])) == 1.0
    assert calibration.nll(np.asarray([[0.0, -np.inf]]), np.asarray([[1.0, 0.0]])) == 0.0


@pytest.mark.parametrize("soft", [False, True])
def test_probabilities_of_zero_cost_the_same_at_every_temperature(soft):
    logits, labels, truth = case(5)
    p = softmax(logits, axis=1)
    p[p < 0.02] = 0  # also that of some labels
    p /= p.sum(1, keepdims=True)
    z, target = calibration.logs(p), truth if soft else labels
    found = calibration.fit_temperature(z, target)
    grid = np.geomspace(found / 3, found * 3, 200)
    by_hand = []
    for t in (found, *grid):
        q = p ** (1 / t)
        q = np.maximum(q / q.sum(1, keepdims=True), 1e-12)
        by_hand.append(-np.mean(np.sum((truth if soft else np.eye(5)[labels]) * np.log(q), 1)))
        assert calibration.nll(z, target, t) == pytest.approx(by_hand[-1], rel=1e-9)
    assert by_hand[0] <= min(by_hand)


def test_places():
    logits = np.asarray([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0], [np.nan, 1.0, 0.0], [0.0, 5.0, 5.0]])
    assert calibration.place(logits, np.asarray([1, 2, 1, 2])).tolist() == [2, 2, 1, 1]
    assert calibration.place(logits, np.asarray([0, 0, 0, 1])).tolist() == [0, 0, 2, 0]


@functools.cache
def study():
    """experiments/calibration/anchors.py as a module."""
    import importlib.util

    place = Path(__file__).parents[2] / "experiments/calibration/anchors.py"
    spec = importlib.util.spec_from_file_location("anchors", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["cifar10", "mnist", "imdb", "20news"])
def test_real_probabilities_give_the_figures_known_of_them(name):
    folder = Path(os.environ.get("JAXDISTILL_DATA", "/nowhere")) / "label_errors"
    if not folder.is_dir():
        pytest.skip("JAXDISTILL_DATA names no folder with label_errors/")
    wanted = {  # temperature; ECE and NLL of the odd rows before and after
        "cifar10": "1.481 .0307 .0069 .2412 .2143", "mnist": "1.105 .0034 .0030", "imdb": "1.736 .0411 .0153 .2966 .2603",
        "20news": "0.390 .1987 .0116 .6768 .4981",
    }[name].split()
    found = study().anchor(folder, name)
    assert [f"{found[0]:.3f}"] + [f"{value:.4f}".lstrip("0") for value in found[1:]][: len(wanted) - 1] == wanted
