"""Bad inputs of image jobs, as tests/test_bad_inputs.py has them for text: one line that names the key or file, exit code 2, and the
workdir stays free for the corrected config."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import jaxdistill
from configs import dcal
from jaxdistill.data import images
from jaxdistill.models import classifier
from jaxdistill.training import loop
from tests.test_bad_inputs import GONE, ROOT, one_line

SIZES = {"model.patch": 8, "model.width": 8, "model.depth": 1, "model.heads": 2}
SMALL = SIZES | {
    "mesh": (1, 1, 1), "runs": ("full",), "data.size": (16, 16), "data.classes": 6, "data.per_class": 4, "data.test_per_class": 2,
    "data.validation": 0.25, "dcal.figures": 0, "train.steps": 2, "train.batch": 4, "train.eval_every": 1, "train.checkpoint_every": 1,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Pictures, arrays and classifiers, some of them spoilt in one way."""
    root = tmp_path_factory.mktemp("files")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8))
    for folder, labels, count in (("pictures", "ab", 4), ("single", "ab", 1), ("one", "a", 4), ("mixed", ("a", "train"), 4)):
        for label in labels:
            (root / folder / label).mkdir(parents=True)
            for i in range(count):
                picture.save(root / folder / label / f"{i}.png")
    (root / "empty").mkdir()
    (root / "market/bounding_box_train").mkdir(parents=True)
    (root / "market/query").write_text("")
    shutil.copytree(root / "pictures", root / "damaged")
    for path in (root / "damaged").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:30])
    image, label = np.zeros((40, 16, 16), np.uint8), np.arange(40) % 4
    for name, arrays in {
        "good": dict(x=image, y=label, drawer=label), "unnamed": dict(pixels=image, y=label), "floats": dict(x=image / 2, y=label),
        "short": dict(x=image, y=label[:9]), "negative": dict(x=image, y=label - 1),
        "flat": dict(x=image[:, :0], y=label),
    }.items():
        np.savez(root / f"{name}.npz", **arrays)
    (root / "text.npz").write_text("not a zip")

    names = images.load(images.ImageConfig(classes=6, per_class=4, test_per_class=2, size=(16, 16), validation=0.25)).classes
    section, params = classifier.ModelConfig(patch=8, width=8, depth=1, heads=2), None
    for name, channels, classes in (("teacher", 1, names), ("colour", 3, names), ("few", 1, names[:5]), ("unlike", 1, names[::-1])):
        found = classifier.describe(section, "model", image=(16, 16), channels=channels, classes=classes)
        params = params or found.init(jax.random.key(0))
        vit, head = params["vit"], {key: value[..., : len(classes)] for key, value in params["vit"]["head"].items()}
        patch = vit["embed"]["patch"] | {"kernel": jnp.repeat(vit["embed"]["patch"]["kernel"], channels, axis=2)}
        found.save({"vit": vit | {"head": head, "embed": vit["embed"] | {"patch": patch}}}, root / name)
    shutil.copytree(root / "teacher", root / "truncated")
    weights = root / "truncated/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(root / "teacher", root / "gpt2")
    raw = json.loads((root / "gpt2/config.json").read_text())
    (root / "gpt2/config.json").write_text(json.dumps(raw | {"model_type": "gpt2"}))
    return root


def job(files: Path, changes: dict) -> ConfigDict:
    """configs/dcal.py, made small; `changes` by dotted keys."""
    config = dcal.get_config().to_dict()
    for key, value in (SMALL | changes).items():
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is GONE:
            del node[last]
        else:
            node[last] = value.replace("{files}", str(files)) if isinstance(value, str) else value
    config["run"] = {name: config["run"][name] for name in config["runs"] if name in config["run"]}
    return ConfigDict(config)


def folder(name: str) -> dict:
    """Pictures of two classes."""
    return dict.fromkeys(("data.per_class", "data.test_per_class", "data.test_families", "data.seed", "data.classes"), GONE) | {
        "data.source": "folder", "data.path": f"{{files}}/{name}"}


def npz(name: str, **more) -> dict:
    return folder("") | {"data.source": "npz", "data.path": f"{{files}}/{name}.npz"} | more


def model(name: str) -> dict:
    return dict.fromkeys(SIZES, 0) | {"model.path": f"{{files}}/{name}", "runs": ("sa_only",), "headline": "sa_only"}


def taught(name: str, **kd) -> dict:
    return {"teacher.path": f"{{files}}/{name}" if name else "", "kd.weight": ((0.0, 1.0),)} | {f"kd.{key}": x for key, x in kd.items()}


REID = {"data.task": "reid", "data.classes": 8, "data.test_families": (), "monitor": "validation/mAP", "loss.identities": 2}


@pytest.mark.parametrize(("change", "said"), [
    # Images
    pytest.param({"data.source": "glyph"}, "config key data.source: found 'glyph'; accepted: glyphs | npz", id="unknown source"),
    pytest.param({"data.path": "x"}, "config key data.path: found 'x'; accepted: none with data.source 'glyphs'", id="path of letters"),
    pytest.param(folder("nowhere"), "nowhere': not found", id="missing folder"),
    pytest.param({**folder("market"), "data.source": "market1501"}, "market/query: not a folder; accepted:", id="a file for a folder"),
    pytest.param(folder("empty"), "empty': no image in it; accepted: CLASS/*.jpg", id="empty folder"),
    pytest.param(folder("one"), "1 classes to train on", id="one class"),
    pytest.param(folder("single"), "config key data.validation: found 0.25, and no class has two images", id="one image a class"),
    pytest.param(folder("mixed"), "found a, train; accepted: either folders of classes or", id="classes beside splits"),
    pytest.param({"data.test_families": ("serif", "sans", "mono", "stix")}, "accepted: some of sans, mono, serif, stix, not all",
                 id="nothing to train on"),
    pytest.param({"data.classes": 1000}, "config key data.classes: found 1000; accepted: at most", id="more letters than there are"),
    pytest.param({"data.size": (16, 20)}, "config key data.size: found (16, 20); accepted: (rows, columns), multiples of the patch of 8",
                 id="size and patch"),
    pytest.param({"data.size": 16}, "config key data.size: found 16 (int); accepted: tuple", id="number for a size"),
    pytest.param({"data.resize": (8, 8)}, "config key data.resize: found (8, 8); accepted: (0, 0), or data.size", id="small resize"),
    pytest.param({"data.flipped": True}, "config key data.flipped: found in data, which has no such key", id="unknown key of data"),
    pytest.param({"data.task": "retrieval"}, "config key data.task: found 'retrieval'; accepted: classification | reid", id="unknown task"),
    pytest.param(npz("nowhere"), "nowhere.npz': not found; accepted: an .npz file", id="missing arrays"),
    pytest.param(npz("text"), "text.npz': not a readable .npz file", id="text for arrays"),
    pytest.param(npz("unnamed"), "unnamed.npz: has pixels, y; accepted: an array image or images or x", id="arrays of other names"),
    pytest.param(npz("floats"), "floats.npz: images are float64", id="images of floats"),
    pytest.param(npz("flat"), "flat.npz: images are (40, 0, 16), without a pixel; accepted: one or more each way", id="no pixels"),
    pytest.param(npz("short"), "short.npz: labels is int64 (9,); accepted: whole numbers or text [40]", id="fewer labels than images"),
    pytest.param(npz("negative"), "negative.npz': label -1 in classification", id="junk in classification"),
    pytest.param(npz("good", **{"data.camera": "pen"}), "config key data.camera: found 'pen'; accepted: an array of", id="unknown camera"),
    pytest.param(npz("good", **{"data.group": "drawer", "data.test_groups": (9,)}), "data.test_groups: found 9, which no image has",
                 id="unknown group"),
    # Models
    pytest.param(model("nowhere"), "nowhere: found nothing; accepted: a folder", id="no backbone"),
    pytest.param(model("colour"), "config key model.path: found a model of 3 channels in", id="channels of the backbone"),
    pytest.param(model("truncated"), "truncated/model.safetensors: not a readable", id="truncated weights"),
    pytest.param(model("gpt2"), "config.json: model_type: found 'gpt2'; accepted: vit, jaxdistill_dcal", id="a model of text"),
    pytest.param(model("teacher") | {"model.width": 16}, "config key model.width: found 16; accepted: 0, or the 8 of", id="another width"),
    pytest.param(model("teacher") | {"model.head": "old"}, "config key model.head: found 'old'; accepted: new, stored", id="unknown head"),
    pytest.param({"model.heads": 3}, "config key model.heads: found 3; accepted: a divisor of width (8)", id="heads that do not divide"),
    pytest.param({"model.preset": "huge"}, "config key model.preset: found 'huge'; accepted: tiny, deit_tiny", id="unknown preset"),
    pytest.param({"model.dtype": "float8"}, "config key model.dtype: found 'float8'; accepted: float32, bfloat16", id="bad dtype"),
    # Branches and losses
    pytest.param({"run.full.dcal.mode": "both"}, "config key run.full.dcal.mode: found 'both'; accepted: sa_only, sa_glca", id="mode"),
    pytest.param({"dcal.pwca_head": "new"}, "config key dcal.pwca_head: found 'new'; accepted: shared, own", id="head of pwca"),
    pytest.param({"dcal.weighting": "fixed"}, "config key dcal.weighting: found 'fixed'; accepted: learned, equal", id="weighting"),
    pytest.param({"dcal.queries": 0.0}, "config key dcal.queries: found 0.0; accepted: a share of the patches, above 0", id="no queries"),
    pytest.param({"dcal.attach": 2}, "config key dcal.attach: found 2; accepted: at most the depth (1)", id="attached beyond the depth"),
    pytest.param({"dcal.bounds": (1, 2)}, "config key dcal.bounds: found (1, 2); accepted: () or (least, most) around 0", id="bounds"),
    pytest.param({"dcal.bounds": ("a", 2)}, "config key dcal.bounds: found ('a', 2); accepted: () or", id="bounds of words"),
    pytest.param({"dcal.bounds": (-2,)}, "config key dcal.bounds: found (-2,); accepted: () or", id="one bound"),
    pytest.param({"dcal.weight_lr": -1.0}, "config key dcal.weight_lr: found -1.0; accepted: 0 or more", id="negative rate of w"),
    pytest.param({"dcal.figures": 5}, "config key dcal.figures: found 5; accepted: at most train.batch, which is 4", id="many figures"),
    pytest.param({"dcal.rerank": True}, "config key dcal.rerank: found True; accepted: False where data.task is", id="rerank classes"),
    pytest.param({"loss.smoothing": 1.0}, "config key loss.smoothing: found 1.0; accepted: 0 or more, and below 1", id="smoothing of 1"),
    pytest.param({"loss.margin": -0.3}, "config key loss.margin: found -0.3; accepted: 0 or more", id="negative margin"),
    # Teachers
    pytest.param(taught(""), "config key teacher.path: found ''; accepted: a folder", id="no teacher"),
    pytest.param(taught("nowhere"), "nowhere: found nothing; accepted: a folder", id="missing teacher"),
    pytest.param(taught("few"), "config key teacher.path: found 5 classes in", id="teacher of fewer classes"),
    pytest.param(taught("unlike"), "config key teacher.path: found ", id="teacher of classes in another order"),
    pytest.param(taught("colour"), "config key teacher.path: found a model of 3 channels in", id="teacher of colour"),
    pytest.param(taught("teacher", kind="kl"), "config key kd.kind: found 'kl'; accepted: forward_kl", id="unknown divergence"),
    pytest.param(taught("teacher", kind="topk_kl"), "config key kd.kind: found 'topk_kl'; accepted: forward_kl", id="divergence of words"),
    pytest.param(taught("teacher", temperature=((0.0, 0.0),)), "config key kd.temperature: found ((0.0, 0.0),)", id="temperature of 0"),
    pytest.param({"kd.weight": ((0.0, -1.0),)}, "kd.weight: found ((0.0, -1.0),); accepted: values from 0", id="negative weight"),
    pytest.param({"kd.weight": 0.5}, "config key kd.weight: found 0.5; accepted: ((fraction", id="number for a ramp"),
    # Batches
    pytest.param({"train.batch": 6, "train.micro": 4}, "train.batch: found 6 in train.micro 4 parts", id="batch and micro-batches"),
    pytest.param({"train.micro": 4}, "train.batch: found 4 in train.micro 4 parts, and partners are asked for", id="no partner to be had"),
    pytest.param({"train.batch": 1}, "train.batch: found 1 in train.micro 1 parts, and partners are asked for", id="batch of one"),
    pytest.param(REID | {"train.batch": 5}, "train.batch: found 5 for 2 identities; accepted: a multiple", id="batch and identities"),
    pytest.param(REID | {"train.batch": 2}, "config key train.batch: found 2 for 2 identities", id="one image of an identity"),
    pytest.param(REID | {"loss.identities": 50, "train.batch": 100},
                 "config key loss.identities: found 50; accepted: at most the ", id="more identities than train"),
    pytest.param({"monitor": "val/accuracy"}, "config key monitor: found 'val/accuracy'; accepted: validation/", id="unknown monitor"),
])
def test_a_config(change, said, files, tmp_path, capsys):
    """Refused before anything trains, in a folder that stays free for the corrected config."""
    with pytest.raises(SystemExit) as stop:
        jaxdistill.command(lambda: loop.run(job(files, change), tmp_path / "w", quiet=True))
    assert said in one_line(stop.value.code, capsys.readouterr().err)
    assert not (tmp_path / "w").exists() or not list((tmp_path / "w").iterdir())


@pytest.mark.parametrize(("change", "said"), [
    pytest.param(folder("damaged"), "config key data.corrupt: found 0, and 1 image(s) that cannot be read, the last ", id="damaged"),
    pytest.param(REID | {"monitor": "validation/accuracy"}, "config key monitor: found 'validation/accuracy'; accepted: validation/mAP",
                 id="metric of another task"),
])
def test_what_shows_when_images_are_read(change, said, files, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        jaxdistill.command(lambda: loop.run(job(files, change), tmp_path / "w", quiet=True))
    assert said in one_line(stop.value.code, capsys.readouterr().err)


@pytest.mark.parametrize(("args", "said"), [
    pytest.param(["--config=configs/dcal_cub.py"], "config key data.path: found ''; accepted: a path with data.source 'cub'", id="no set"),
    pytest.param(["--config=configs/dcal_cub.py:birds"], "found variant 'birds'; accepted: cars, aircraft", id="unknown variant"),
])
def test_a_command_line(args, said, tmp_path):
    command = [sys.executable, "-m", "jaxdistill.main", *args, f"--workdir={tmp_path / 'w'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert said in one_line(done.returncode, done.stderr)
