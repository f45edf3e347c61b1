"""Classification metrics against their definitions in float64, scikit-learn, and real predicted probabilities."""

import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics
from sklearn.metrics import log_loss, top_k_accuracy_score

from jaxdistill.evaluators import classification
from jaxdistill.evaluators.intervals import group_interval

sums = jax.jit(classification.sums)


def stacked(outputs, labels, where, teacher=None, batch=8):
    rows = [sums({k: v[i : i + batch] for k, v in outputs.items()}, labels[i : i + batch], where[i : i + batch],
                 None if teacher is None else teacher[i : i + batch]) for i in range(0, len(labels), batch)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def case(seed=0, size=40, classes=12):
    rng = np.random.default_rng(seed)
    outputs = {name: jnp.asarray(2 * rng.normal(size=(size, classes)), jnp.float32) for name in ("sa", "glca")}
    return outputs, jnp.asarray(rng.integers(0, classes, size), jnp.int32), jnp.asarray(rng.random(size) < 0.8)


def softmax(logits):
    z = np.asarray(logits, np.float64)
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def ece(p, labels):
    found = 0.0
    for low in range(15):
        inside = (p.max(1) > low / 15) & (p.max(1) <= (low + 1) / 15)
        found += abs(np.sum(p.argmax(1)[inside] == labels[inside]) - p.max(1)[inside].sum())
    return found / len(labels)


@pytest.mark.parametrize("seed", range(3))
def test_they_are_their_definitions(seed):
    outputs, labels, where = case(seed)
    teacher = jnp.asarray(np.random.default_rng(seed + 9).normal(size=(40, 12)), jnp.float32)
    with jax.numpy_dtype_promotion("strict"):
        found = classification.finish(stacked(outputs, labels, where, teacher))
    keep, y = np.asarray(where), np.asarray(labels)[where]
    each = {f"{name}_": softmax(logits)[keep] for name, logits in outputs.items()}
    for prefix, p in {**each, "": sum(each.values()) / 2}.items():
        wanted = {
            "accuracy": np.mean(p.argmax(1) == y), "top5": top_k_accuracy_score(y, p, k=5, labels=range(12)),
            "nll": log_loss(y, p, labels=range(12)), "brier": np.mean(np.sum((p - np.eye(12)[y]) ** 2, 1)), "ece15": ece(p, y),
        }
        assert {name: found[prefix + name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    p, q = sum(each.values()) / 2, softmax(teacher)[keep]
    assert found["teacher_kl"] == pytest.approx(np.mean(np.sum(q * np.log(q / p), 1)), rel=1e-5)
    assert found["top1_agreement"] == np.float32(np.mean(p.argmax(1) == q.argmax(1)))


def test_one_branch_needs_no_name_and_shifts_and_batches_change_nothing():
    outputs, labels, where = case()
    one = {"sa": outputs["sa"]}
    found = classification.finish(stacked(one, labels, where))
    assert set(found) == {"accuracy", "top5", "nll", "brier", "ece15"}
    both = classification.finish(stacked(outputs, labels, where))
    assert {f"sa_{name}": pytest.approx(value, rel=1e-6) for name, value in found.items()}.items() <= both.items()
    assert classification.finish(stacked(one, labels, where, batch=40)) == pytest.approx(found, rel=1e-6)
    assert classification.finish(stacked({"sa": one["sa"] + 50.0}, labels, where)) == pytest.approx(found, rel=1e-5)
    assert classification.finish(stacked({"a": one["sa"], "b": one["sa"]}, labels, where))["nll"] == pytest.approx(found["nll"], rel=1e-6)


def test_padding_gives_nothing_whatever_it_holds():
    outputs, labels, where = case()
    teacher = outputs["glca"] + 1.0
    clean = stacked(outputs, labels, where, teacher)
    dirty = {name: jnp.where(where[:, None], logits, jnp.nan) for name, logits in outputs.items()}
    bad = stacked(dirty, jnp.where(where, labels, -5), where, jnp.where(where[:, None], teacher, jnp.inf))
    jax.tree.map(np.testing.assert_array_equal, clean, bad)
    nothing = classification.finish(stacked(outputs, labels, jnp.zeros(40, bool), teacher))
    assert set(nothing.values()) == {0.0}


def test_soft_labels_on_a_corner_are_hard_ones_and_their_own_prediction_has_their_entropy():
    outputs, labels, where = case()
    hard = classification.finish(stacked(outputs, labels, where))
    assert classification.finish(stacked(outputs, jax.nn.one_hot(labels, 12), where)) == pytest.approx(hard, rel=1e-6)
    soft = jax.nn.softmax(outputs["glca"])
    found = classification.finish(stacked({"p": outputs["glca"]}, soft, where))
    p = softmax(outputs["glca"])[np.asarray(where)]
    assert found["nll"] == pytest.approx(-np.mean(np.sum(p * np.log(p), 1)), rel=1e-5)
    assert found["accuracy"] == 1.0
    assert found["brier"] == pytest.approx(0.0, abs=1e-6)


def test_a_model_that_says_nothing_is_not_right():
    """Equal logits count for the first class alone, those that are not finite for none, and an impossible label is never cheap."""
    labels, where = jnp.arange(10, dtype=jnp.int32), jnp.ones(10, bool)
    finish = lambda logits, labels: classification.finish({k: np.asarray(v)[None] for k, v in sums({"a": logits}, labels, where).items()})  # noqa: E731
    constant = finish(jnp.zeros((10, 10)), labels)
    assert constant["accuracy"] == pytest.approx(0.1)
    assert constant["top5"] == pytest.approx(0.5)
    assert constant["nll"] == pytest.approx(np.log(10), rel=1e-6)
    broken = finish(jnp.zeros((10, 10)).at[3, 7].set(jnp.nan), labels)
    assert np.isnan(broken["nll"])
    assert np.isnan(broken["ece15"])
    assert finish(jnp.full((10, 10), jnp.nan), labels)["accuracy"] == 0.0
    for outside in (-1, 10):
        assert np.isnan(finish(10 * jnp.eye(10), labels.at[3].set(outside))["nll"])


def test_decisions_are_those_of_sklearn():
    rng = np.random.default_rng(0)
    labels, predicted = rng.choice(5, 80, p=[0.5, 0.3, 0.15, 0.05, 0]), rng.integers(0, 5, 80)
    predicted = np.where(rng.random(80) < 0.5, labels, predicted)
    predicted[predicted == 3] = 1  # a class that is never predicted; class 4 has no rows, but is predicted
    table = classification.confusion(labels, predicted, 5)
    np.testing.assert_array_equal(table, metrics.confusion_matrix(labels, predicted, labels=range(5)))
    here = dict(labels=range(4), average="macro", zero_division=0)
    wanted = {f"macro_{name}": getattr(metrics, f"{name}_score")(labels, predicted, **here) for name in ("recall", "precision", "f1")}
    wanted["accuracy"] = metrics.accuracy_score(labels, predicted)
    wanted["balanced_accuracy"] = np.mean([(predicted == k)[labels == k].mean() for k in range(4)])
    assert classification.decisions(table) == pytest.approx(wanted, rel=1e-12)
    assert set(classification.decisions(np.zeros((3, 3), int)).values()) == {0.0}


def test_logits_on_the_host_have_the_metrics_of_sums():
    outputs, labels, where = case(1)
    arrays = dict(logits=outputs["sa"], label=labels, valid=where, group=jnp.arange(40) % 7)
    stack = lambda arrays, batch=8: {name: np.asarray(value).reshape(-1, batch, *value.shape[1:]) for name, value in arrays.items()}  # noqa: E731
    found = classification.finish_logits(stack(arrays))
    wanted = classification.finish(stacked({"sa": outputs["sa"]}, labels, where))
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    predicted, keep = np.asarray(jnp.argmax(outputs["sa"], axis=1)), np.asarray(where)
    here = dict(average="macro", labels=np.unique(labels[keep]))
    assert found["balanced_accuracy"] == pytest.approx(metrics.recall_score(labels[keep], predicted[keep], **here))
    low, high = group_interval((predicted == np.asarray(labels))[keep].astype(float), np.asarray(arrays["group"])[keep])
    assert (found["accuracy_low"], found["accuracy_high"]) == (low, high)
    dirty = arrays | {"logits": jnp.where(where[:, None], outputs["sa"], jnp.nan), "label": jnp.where(where, labels, -5)}
    assert classification.finish_logits(stack(dirty, 20)) == found
    alone = classification.finish_logits(stack({name: value for name, value in arrays.items() if name != "group"}))
    assert found.keys() - alone.keys() == {"accuracy_low", "accuracy_high"}
    assert classification.finish_logits(stack(arrays | {"valid": jnp.zeros(40, bool)})) == {}


def test_on_the_host_too_a_model_that_says_nothing_is_not_right():
    labels, valid = np.arange(20) % 10, np.ones(20, bool)
    finish = lambda logits: classification.finish_logits(dict(logits=logits[None], label=labels[None], valid=valid[None]))  # noqa: E731
    assert finish(np.zeros((20, 10)))["balanced_accuracy"] == pytest.approx(0.1)
    assert finish(np.zeros((20, 10)))["top5"] == pytest.approx(0.5)
    broken = finish(np.full((20, 10), np.nan))
    assert (broken["accuracy"], broken["macro_f1"]) == (0.0, 0.0)
    assert np.isnan(broken["nll"])


@functools.cache
def folder():
    found = Path(os.environ.get("JAXDISTILL_DATA", "/nowhere")) / "label_errors"
    if not found.is_dir():
        pytest.skip("JAXDISTILL_DATA names no folder with label_errors/")
    return found


@pytest.mark.parametrize(("name", "wanted"), [("cifar10", (0.9294, 0.0326, 0.2492)), ("mnist", (0.9913, 0.0030, 0.0303)),
                                              ("imdb", (0.8958, 0.0404, 0.3006)), ("20news", (0.9234, 0.2011, 0.6512))])
def test_real_probabilities_give_the_figures_known_of_them(name, wanted):
    p, labels = np.load(folder() / f"{name}_test_set_pyx.npy"), np.load(folder() / f"{name}_test_set_original_labels.npy")
    logits, y = jnp.asarray(np.log(np.maximum(p, 1e-12)), jnp.float32), jnp.asarray(labels, jnp.int32)  # some are 0
    found = classification.finish(stacked({"p": logits}, y, jnp.ones(len(y), bool), batch=len(y)))
    assert [found[key] for key in ("accuracy", "ece15", "nll")] == pytest.approx(wanted, abs=6e-5)
