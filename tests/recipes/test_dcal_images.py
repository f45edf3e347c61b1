"""dcal and its images: re-identification, damaged pictures, normalisation."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from jaxdistill import UserError
from jaxdistill.data import images
from jaxdistill.training import loop
from tests.recipes.test_dcal import DATA, MODEL, _forgotten, config, ready  # noqa: F401  (a fixture)


def test_reid(tmp_path):
    """Many more queries than a batch holds; with re-ranking."""
    data = dict(task="reid", classes=12, test=0.25, per_class=6, test_per_class=6)
    c = config("full", data=data, loss=dict(identities=4), dcal=dict(queries=0.5, rerank=True), monitor="validation/mAP", minimize=False)
    row = loop.run(c, tmp_path, quiet=True)["rows"][0]
    for metric in ("mAP", "rank1", "rank5", "mINP", "reranked_mAP", "reranked_rank1"):
        assert 0 < row[metric] <= 1, metric
    assert row["queries"] + row["left_out"] == 3 * 6
    assert row["validation"]["validation/queries"] > 8
    lines = [json.loads(line) for line in (tmp_path / "runs/full-0/metrics.jsonl").read_text().splitlines()]
    terms = next(line["terms"] for line in lines if "loss" in line)
    assert all(terms[f"{branch}_triplet"]["count"] == 8 for branch in ("sa", "glca", "pwca"))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """1,000 pictures of five classes, of which 20 cannot be read."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(1000):
        path = root / f"class {i % 5}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8)).save(path)
        if i % 50 == 7:
            path.write_bytes(path.read_bytes()[:40])
    return root


def files(folder, **changes) -> ConfigDict:
    """One epoch and more."""
    data = dict(source="folder", path=str(folder), size=(16, 16), test=0.1, validation=0.1)
    c = config("sa_only", train=dict(steps=13, batch=64, lr=1e-3))
    c.data = ConfigDict(data | changes)
    return c


def test_pictures_of_which_some_are_damaged(damaged, tmp_path):
    row = loop.run(files(damaged, corrupt=20), tmp_path, quiet=True)["rows"][0]
    assert (row["steps"], row["skipped"]) == (13, 0)
    known = images.load(images.ImageConfig(**files(damaged, corrupt=20).data.to_dict())).splits["train"].damaged
    assert len(known) == 20
    assert all(int(name.split("/")[1].removesuffix(".png")) % 50 == 7 for name in known)


def test_one_damaged_picture_too_many_is_one_line(damaged, tmp_path):
    with pytest.raises(UserError, match=r"^config key data.corrupt: found 19, and 20 image\(s\) that cannot be read, the last ") as caught:
        loop.run(files(damaged, corrupt=19), tmp_path, quiet=True)
    assert "\n" not in str(caught.value)


def test_a_fresh_model_is_normalised_by_its_data():
    """By 0.5, dark pictures all look alike to it: the letters of configs/dcal.py then take more than twice as many updates."""
    one = ready("sa_only")
    found = one.built.recipe.facts["model"]
    values = np.stack([one.built.recipe.data("train", 0).__next__()["image"] for _ in range(8)]) / 255
    assert found["mean"][0] == pytest.approx(values.mean(), abs=0.05)
    assert found["std"][0] == pytest.approx(values.std(), abs=0.05)
    chosen = ready("sa_only", model=dict(mean=(0.1,), std=(0.3,))).built.recipe.facts["model"]
    assert (chosen["mean"], chosen["std"]) == ((0.1,), (0.3,))
