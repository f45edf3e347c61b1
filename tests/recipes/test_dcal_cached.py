"""A classifier that was stored, by image and by augmented view: training from it is training beside it."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxdistill
from jaxdistill.data import image_batches, images
from jaxdistill.data.image_batches import Views
from jaxdistill.data.teacher_cache import Cache, Options
from jaxdistill.recipes import classifier_teachers
from jaxdistill.training import loop, plan, prepare, teach
from tests.recipes.test_dcal import config

AUGMENTED = dict(rotate=8.0, shift=0.1)
KD = dict(weight=((0.0, 1.0),), temperature=((0.0, 2.0),))


@pytest.fixture(scope="module", autouse=True)
def _forgotten():
    """What is loaded here is of no use to others."""
    yield
    images.load.cache_clear()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """A classifier of two branches, as it begins."""
    folder = tmp_path_factory.mktemp("teacher") / "export"
    recipe = prepare.build(plan.expand(config("sa_glca"))[0]).recipe
    recipe.export(jax.device_get(recipe.init(jax.random.key(5)).params), folder)
    return str(folder)


def job(teacher: str, cache: str = "", **data):
    c = config("sa_only", teacher=dict(path=teacher, cache=cache), kd=KD, data=data)
    c.train.ema = 0.0
    return c


@pytest.fixture(scope="module")
def plain(teacher, tmp_path_factory) -> Path:
    """The cache of images that nothing augments."""
    folder = tmp_path_factory.mktemp("plain")
    teach.run(job(teacher), folder, Options(), say=lambda line: None)
    return folder


def trained(chosen, folder: Path) -> tuple[dict, list, bytes]:
    row = loop.run(chosen, folder, quiet=True)["rows"][0]
    row.pop("seconds")
    run = folder / "runs/sa_only-0"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return row, lines, (run / "export/model.safetensors").read_bytes()


def test_it_trains_and_is_measured_as_beside_the_teacher(teacher, plain, tmp_path):
    online, cached = (trained(job(teacher, cache), tmp_path / name) for name, cache in (("online", ""), ("cached", str(plain))))
    (row, lines, weights), (row_now, lines_now, weights_now) = online, cached
    assert row_now.keys() == row.keys()
    assert {"teacher_kl", "top1_agreement"} <= row.keys()
    assert [line.get("loss") for line in lines_now] == [line.get("loss") for line in lines]
    assert row_now == row
    assert weights_now == weights


def test_views_are_shown_in_turn_with_what_was_said_of_them(teacher, tmp_path):
    """Each batch's stored logits are those of the very pixels beside them, in every epoch; the third repeats the first."""
    cache = tmp_path / "cache"
    teach.run(job(teacher, **AUGMENTED), cache, Options(views=2, seed=5), say=lambda line: None)
    run = plan.expand(job(teacher, **AUGMENTED))[0].config
    chosen = run.data.build(images.ImageConfig)
    sets = images.load(chosen)
    beside = classifier_teachers.choose(run, chosen, sets)
    frozen, logits = beside.load(None), jax.jit(beside.logits)
    recipe = prepare.build(plan.expand(job(teacher, str(cache), **AUGMENTED))[0]).recipe
    data, count, seen = recipe.data("train", 3), len(sets.splits["train"]), {}
    for _ in range(3 * count // 8):
        batch = next(data)
        for name, value in logits(frozen, {"image": batch["image"]}).items():
            np.testing.assert_allclose(batch[f"cached_{name}"], value, atol=1e-5)
        for i, pixels in enumerate(batch["image"]):
            seen.setdefault(batch["cached_sa"][i].tobytes(), set()).add(pixels.tobytes())
    assert all(len(pixels) == 1 for pixels in seen.values())
    assert count < len(seen) <= 2 * count
    held_out = next(recipe.data("validation", 0))
    found = logits(frozen, {"image": held_out["image"]})
    np.testing.assert_allclose(held_out["cached_sa"][held_out["valid"]], found["sa"][held_out["valid"]], atol=1e-5)


def test_views_depend_on_their_own_seed_and_on_nothing_else():
    """Not on the run's seed, the batch, or its order."""
    data = images.ImageConfig(size=(16, 16), classes=4, per_class=6, test_per_class=2, **AUGMENTED)
    split = images.load(data).splits["train"]
    shown = image_batches.rows(split, data, np.arange(len(split)), views=Views(3, 9), view=1)["image"]
    again = image_batches.rows(split, data, np.arange(len(split))[::-1], views=Views(3, 9), view=1)["image"][::-1]
    assert np.array_equal(shown, again)
    for views, view in ((Views(3, 9), 2), (Views(3, 8), 1)):
        assert not np.array_equal(shown, image_batches.rows(split, data, np.arange(len(split)), views=views, view=view)["image"])
    by_label = {}
    epoch = image_batches.batches(split, data, batch=len(split), seed=4, training=True, views=Views(1, 9),
                                  beside=lambda index, view: {"index": index, "view": view})
    for k in range(2):
        batch = next(epoch)
        assert sorted(batch["index"].tolist()) == list(range(len(split)))
        assert set(batch["view"].tolist()) == {k}
        by_label[k] = batch["image"][np.argsort(batch["index"])]
    assert np.array_equal(by_label[0], by_label[1])  # one view: the same in every epoch


@pytest.mark.parametrize(("options", "data", "said"), [
    (Options(), AUGMENTED, "config key data.rotate: found 8.0 with --views=1"),
    (Options(), dict(resize=(20, 20)), "config key data.resize: found (20, 20) with --views=1"),
    (Options(views=2), {}, "--views: found 2 with images that nothing augments"),
    (Options("topk"), {}, "--format: found 'topk' with a classifier"),
    (Options(k=8), {}, "--k: found 8 with --format=logits; accepted: 64, or --format=topk"),
])
def test_what_cannot_be_stored_is_one_line(options, data, said, teacher, tmp_path):
    with pytest.raises(jaxdistill.UserError) as error:
        teach.run(job(teacher, **data), tmp_path / "cache", options)
    assert said in str(error.value)


@pytest.mark.parametrize(("data", "said"), [
    (AUGMENTED, "found images.rotate 0.0"), (dict(per_class=6), "found data.splits.train.sha256"), (dict(classes=4), "found classes"),
])
def test_what_it_was_not_made_for_is_one_line(data, said, plain, tmp_path):
    with pytest.raises(jaxdistill.UserError, match="^config key teacher.cache: " + said):
        prepare.build(plan.expand(job("", str(plain), **data))[0])


def test_another_teacher_is_one_line(teacher, plain, tmp_path):
    other = shutil.copytree(teacher, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file(weights | {"classifier.bias": weights["classifier.bias"] + 1}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(jaxdistill.UserError, match=r"found teacher\.weights"):
        prepare.build(plan.expand(job(str(other), str(plain)))[0])


@pytest.mark.parametrize(("change", "said"), [(dict(mean=(0.1,)), r"found teacher\.mean"), (dict(dtype="bfloat16"), "found dtype float32")])
def test_a_teacher_that_computes_otherwise_is_one_line(change, said, teacher, plain):
    chosen = job(teacher, str(plain))
    chosen.teacher.update(change)
    with pytest.raises(jaxdistill.UserError, match="^config key teacher.cache: " + said):
        prepare.build(plan.expand(chosen)[0])


def test_text_is_not_images(plain):
    assert dataclasses.asdict(Options(format="logits", dtype="float32")) == Cache(plain).made["options"] | {"temperatures": ()}
