"""The configs of dcal: what they say of the published runs, and that each runs on a small set in the layout that it is for."""

import json
import os

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from configs import dcal, dcal_cub, dcal_distill, dcal_market1501, dcal_omniglot
from jaxdistill.data import images
from jaxdistill.models import vit
from jaxdistill.training import loop, plan, preflight
from tests.data.test_image_layouts import picture, text, write_cars, write_cub, write_market, write_msmt17
from tests.models.test_vit_files import CONFIG, google

DATA = os.environ.get("JAXDISTILL_DATA")
SMALL = {
    "mesh": (1, 1, 1), "data.size": (16, 16), "model.patch": 8, "model.width": 8, "model.depth": 1, "model.heads": 2, "dcal.figures": 0,
    "train.steps": 2, "train.batch": 4, "train.eval_every": 2, "train.checkpoint_every": 2,
}
FILES = {"data.resize": (20, 20), "data.workers": 0}
STORED = dict.fromkeys(("model.patch", "model.width", "model.depth", "model.heads"), 0)


def changed(config: ConfigDict, *changes: dict) -> ConfigDict:
    with config.unlocked(), config.ignore_type():
        for change in changes:
            config.update_from_flattened_dict(change)
    return config


def only(config: ConfigDict, *runs: str) -> ConfigDict:
    """The config without its other runs, which would be built too."""
    return changed(config, {"headline": runs[-1], "runs": runs, "run": ConfigDict({name: config.run[name] for name in runs})})


@pytest.fixture(scope="module", autouse=True)
def _forgotten():
    """What is loaded here is of no use to others."""
    yield
    images.load.cache_clear()


# The published figures


@pytest.mark.parametrize(("variant", "source", "trained_on"), [
    ("", "cub", 5994), ("cars", "cars", 8144), ("aircraft", "aircraft", 3334 + 3333)])
def test_fine_grained_as_published(variant, source, trained_on):
    c = dcal_cub.get_config(variant)
    assert (c.data.source, c.data.resize, c.data.size, c.data.channels, c.data.flip) == (source, (550, 550), (448, 448), 3, True)
    assert c.data.validation == 0
    assert (c.optimizer.name, c.optimizer.decay, c.optimizer.weight_decay, c.optimizer.clip) == ("adamw", "decoupled", 0.05, 0)
    assert (c.optimizer.b1, c.optimizer.b2) == (0.9, 0.999)
    assert c.train.lr == pytest.approx(1.5625e-5, rel=1e-12)  # 5e-4 / 512 x 16
    assert (c.train.batch, c.train.micro, c.train.final_lr) == (16, 1, 0)
    assert c.train.steps * 16 == pytest.approx(100 * trained_on, abs=16)
    assert (c.dcal.queries, c.model.drop_path, c.model.preset) == (0.1, 0.1, "vit_base")
    assert c.runs == ("sa_only", "full")
    for name in c.runs:
        assert c.run[name].to_dict() == {"recipe": "dcal", "dcal": {"mode": name}}


@pytest.mark.parametrize(("variant", "source", "size", "trained_on"), [
    ("", "market1501", (256, 128), 12_936), ("duke", "duke", (256, 128), 16_522),
    ("msmt17", "msmt17", (256, 128), 30_248 + 2_373), ("veri776", "veri776", (256, 256), 37_778)])
def test_reid_as_published(variant, source, size, trained_on):
    c = dcal_market1501.get_config(variant)
    assert (c.data.source, c.data.size, c.data.channels, c.data.flip) == (source, size, 3, True)
    assert c.data.shift == 0.04
    assert c.data.erasing > 0
    assert c.data.validation == 0
    assert (c.optimizer.name, c.optimizer.momentum, c.optimizer.weight_decay, c.optimizer.decay) == ("sgd", 0.9, 1e-4, "coupled")
    assert (c.optimizer.clip, c.train.lr, c.train.final_lr) == (0, 0.008, 0)
    assert (c.loss.identities, c.train.batch // c.loss.identities, c.train.batch) == (16, 4, 64)
    assert (c.loss.margin, c.loss.triplet, c.dcal.queries) == (0.3, ((0.0, 1.0),), 0.3)
    assert c.train.steps * 64 == pytest.approx(120 * trained_on, abs=64)


@pytest.mark.parametrize("module", [dcal_cub, dcal_market1501, dcal_omniglot])
def test_an_unknown_variant(module):
    with pytest.raises(ValueError, match="found variant 'other'; accepted: "):
        module.get_config("other")


# Each on a small set


def write_aircraft(root):
    for part, numbers in (("train", range(4)), ("val", range(4, 8)), ("test", range(8, 12))):
        text(root / f"data/images_variant_{part}.txt", *(f"{n:07} {('A330-200', 'F-16A/B')[n % 2]}" for n in numbers))
        for n in numbers:
            picture(root / f"data/images/{n:07}.jpg", 20 * n, (30, 40))
    return root


def write_duke(root):
    return write_market(root, name="{:04d}_c{}_f{:07d}.jpg")


def write_veri776(root):
    return write_market(root, "image_train", "image_query", "image_test", "{:04d}_c{:03d}_{:08d}_0.jpg")


def write_omniglot(root):
    """Six characters of three alphabets (numbered as the last ones of Omniglot), each by twenty drawers."""
    root.mkdir(parents=True, exist_ok=True)
    rng, y, drawer = np.random.default_rng(0), np.repeat(np.arange(6), 20), np.tile(np.arange(1, 21), 6)
    np.savez(root / "omniglot.npz", x=rng.integers(0, 256, (120, 28, 28), np.uint8), y=y.astype(np.int16), drawer=drawer.astype(np.uint8),
             alphabet=np.repeat([0, 0, 0, 0, 6, 7], 20), class_names=np.array([f"character{i}" for i in range(6)]))
    return root / "omniglot.npz"


PK = {"loss.identities": 2, "model.dtype": "float32"}
CASES = [
    (dcal_cub, "", write_cub, FILES), (dcal_cub, "cars", write_cars, FILES), (dcal_cub, "aircraft", write_aircraft, FILES),
    (dcal_market1501, "", write_market, FILES | PK), (dcal_market1501, "duke", write_duke, FILES | PK),
    (dcal_market1501, "msmt17", write_msmt17, FILES | PK), (dcal_market1501, "veri776", write_veri776, FILES | PK),
    (dcal_omniglot, "", write_omniglot, {}), (dcal_omniglot, "reid", write_omniglot, PK),
]
NAMES = [f"{module.__name__.split('.')[1]}{variant and ':'}{variant}" for module, variant, _, _ in CASES]


@pytest.fixture(scope="module", params=CASES, ids=NAMES)
def small(request, tmp_path_factory):
    """(config, made small and given a set, but not its runs; its name)."""
    module, variant, write, change = request.param
    path = write(tmp_path_factory.mktemp("sets") / (variant or "set"))
    return lambda: changed(module.get_config(variant), SMALL, change, {"data.path": str(path)})


def test_it_builds(small, tmp_path):
    """Every run of it, with every key read; and gives its first batch."""
    config = small()
    built = loop.check(config, tmp_path)
    assert {one.run.name for one in built} == set(config.run)
    batch = next(built[0].recipe.data("train", 0))
    assert batch["image"].shape == (4, 16, 16, config.data.channels)
    if config.data.get("task") == "reid" or config.monitor.endswith("mAP"):
        assert sorted(np.unique(batch["label"], return_counts=True)[1]) == [2, 2]


# (The others are the programs of these two; test_it_builds has their data.)
@pytest.mark.parametrize("small", [CASES[i] for i in (0, 3)], ids=[NAMES[i] for i in (0, 3)], indirect=True)
def test_it_trains(small, tmp_path):
    """Two updates with all branches; without a validation split the last parameters are the ones that are measured."""
    config = only(small(), "full")
    row = loop.run(config, tmp_path, quiet=True)["rows"][0]
    metric = config.monitor.split("/")[1]
    assert (row["steps"], row["skipped"], row["best"]["step"]) == (2, 0, 2)
    assert 0 <= row[metric] <= 1
    assert row["best"][metric] == row[metric]
    assert (config.monitor in row["validation"]) == (config.data.validation > 0)
    [line] = [json.loads(line) for line in (tmp_path / "runs/full-0/metrics.jsonl").read_text().splitlines() if '"loss"' in line][-1:]
    assert {"sa", "glca", "pwca", "prior"} <= line["terms"].keys()
    assert ("pwca_triplet" in line["terms"]) == (metric == "mAP")


@pytest.mark.parametrize(("module", "write", "change"), [
    (dcal_cub, write_cub, FILES), (dcal_market1501, write_market, FILES | PK)], ids=["cub", "market1501"])
def test_dry_run(module, write, change, tmp_path, capsys):
    config = only(module.get_config(), "sa_only", "full")
    preflight.dry_run(changed(config, SMALL, change, {"data.path": str(write(tmp_path)), "train.steps": 100}))
    said = capsys.readouterr().out
    assert "the job: sa_only-0, full-0" in said
    assert "full: 100 updates of 4" in said
    assert "partner" in said
    assert said.count("predicted peak memory of a device:") == 2


@pytest.mark.skipif(not DATA, reason="JAXDISTILL_DATA is unset")
@pytest.mark.parametrize(("variant", "trains", "classes", "tests"), [("", 2178, 242, 2420), ("reid", 165 * 20, 165, 59 * 20 * 2)])
def test_omniglot_itself(variant, trains, classes, tests):
    c = changed(dcal_omniglot.get_config(variant), {"data.path": f"{DATA}/omniglot/omniglot_small12_28.npz"})
    found = images.load(plan.expand(c)[0].config.data.build(images.ImageConfig))
    assert len(found.splits["train"]) == trains
    assert len(found.classes) == classes
    assert len(found.splits["test"]) == tests
    if variant:
        assert found.facts["splits"]["test"]["cameras"] == 20
        assert not found.splits["test"].cameras.min() < 1


# Backbones


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """One ViT of other classes and of larger images, as a Hugging Face folder and as one of Google's files."""
    root = tmp_path_factory.mktemp("backbones")
    module = vit.ViT(CONFIG)
    params = vit.initialise(module, jax.random.key(3))
    vit.to_hf(module, params, root / "folder", names=("cat", "dog", "eel"))
    np.savez(root / "vit.npz", **google(params))
    return root


def test_cub_from_a_backbone(backbones, tmp_path):
    """What is exported before any update is the backbone's, but for head and positions; and it trains."""
    data = write_cub(tmp_path / "cub")
    kept = {}
    for name in ("folder", "vit.npz"):
        change = {"data.path": str(data), "model.path": str(backbones / name), "train.steps": 0, "dcal.weight_lr": 1.0}
        config = changed(only(dcal_cub.get_config(), "sa_only"), SMALL, FILES, STORED, change)
        loop.run(config, tmp_path / name, quiet=True)
        kept[name] = load_file(tmp_path / name / "runs/sa_only-0/export/model.safetensors")
    original = load_file(backbones / "folder/model.safetensors")
    for name, tensors in kept.items():
        new = {key for key in original if not np.array_equal(original[key], tensors[key])}
        assert new == {"classifier.weight", "classifier.bias", "vit.embeddings.position_embeddings"}, name
        assert tensors["classifier.weight"].shape == (2, 24)
        assert tensors["vit.embeddings.position_embeddings"].shape == (1, 5, 24)
    change |= {"train.steps": 2, "dcal.figures": 2, "dcal.weight_lr": 50.0}
    row = loop.run(changed(only(dcal_cub.get_config(), "full"), SMALL, FILES, STORED, change), tmp_path / "full", quiet=True)["rows"][0]
    assert row["skipped"] == 0
    assert (tmp_path / "full/runs/full-0/figures/attention.png").exists()


# The letters, with the floors that they must beat


def test_letters(tmp_path):
    small = {"data.size": (16, 16), "data.classes": 4, "data.per_class": 6, "data.test_per_class": 2}
    rows = loop.run(changed(dcal.get_config(), SMALL, small), tmp_path, quiet=True)["rows"]
    assert [row["name"] for row in rows] == ["constant", "one_nn", "logistic", "sa_only", "full"]
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert [row["steps"] for row in rows] == [0, 0, 0, 2, 2]


# Distillation


LETTERS = {"data.size": (16, 16), "data.classes": 4, "data.per_class": 4, "data.test_per_class": 2, "run.teacher.data.per_class": 6,
           "run.teacher.dcal.figures": 0, "run.teacher.train.steps": 2,
           "monitor": "validation/nll", "minimize": True}  # (accuracies of so few letters tie)
TEACHER = {f"run.teacher.model.{key}": value for key, value in {"patch": 8, "width": 16, "depth": 1, "heads": 2}.items()}


def distill(*changes):
    return changed(dcal_distill.get_config(), SMALL, LETTERS, TEACHER, *changes)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("distilled")
    return workdir, {row["name"]: row for row in loop.run(distill(), workdir, quiet=True)["rows"]}


def test_distillation(distilled):
    workdir, rows = distilled
    assert list(rows) == ["teacher", "untouched", "ce_only", "kd", "ce_only_same_seconds"]
    assert (rows["untouched"]["steps"], rows["kd"]["steps"]) == (0, 2)
    assert {"teacher_kl", "top1_agreement"} <= rows["kd"].keys()
    assert "teacher_kl" not in rows["ce_only"]
    assert "glca_accuracy" in rows["teacher"]
    assert "glca_accuracy" not in rows["kd"]
    assert rows["teacher"]["parameters"] > rows["kd"]["parameters"] == rows["ce_only"]["parameters"]
    names = {path.name: json.loads((path / "export/config.json").read_text())["model_type"] for path in (workdir / "runs").iterdir()}
    assert names["teacher-0"] == "jaxdistill_dcal"
    assert names["kd-0"] == "vit"


def test_a_teacher_of_ones_own_is_measured_as_it_is(distilled, tmp_path, monkeypatch):
    """With the head and the branches that it has: not with new ones, which would know nothing."""
    workdir, rows = distilled
    for name, run, other in (("ours", "teacher", {}), ("vit", "kd", {"run.teacher.model.width": 0})):
        folder = workdir / f"runs/{run}-0/export"
        given = {f"run.teacher.model.{key}": 0 for key in ("patch", "width", "depth", "heads")}
        config = distill(given, other, {"teacher.path": str(folder)})
        config.runs = ("teacher",)
        row = loop.run(config, tmp_path / name, quiet=True)["rows"][0]
        assert row["steps"] == 0
        for metric in ("accuracy", "nll", "brier"):
            assert row[metric] == pytest.approx(rows[run][metric], rel=1e-6)
        assert ("glca_accuracy" in row) == (run == "teacher")
