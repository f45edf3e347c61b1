"""The commands as people meet them: what they print, what they leave, and from where they may be called."""

import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import kd, kd_gpt2
from jaxdistill import export, report
from jaxdistill.data import tokenizer
from jaxdistill.data.distributions import DistributionConfig
from jaxdistill.data.images import ImageConfig
from jaxdistill.data.sequences import SequenceConfig
from jaxdistill.data.text import TextConfig
from jaxdistill.diagnosis import headline
from jaxdistill.models import causal, classifier, gpt2, matching
from jaxdistill.models.graph_transformer import GraphConfig
from jaxdistill.models.mlp import MLPConfig
from jaxdistill.models.projector import ProjectorConfig
from jaxdistill.models.readout import ReadoutConfig
from jaxdistill.models.reservoir import ReservoirConfig
from jaxdistill.recipes import classifier_teachers, dcal, reservoir, student_aware, teachers
from jaxdistill.recipes.lm import LMConfig
from jaxdistill.recipes.on_policy import OnPolicyConfig
from jaxdistill.recipes.reactions import ReactConfig
from jaxdistill.recipes.soft_options import SoftConfig
from jaxdistill.training import loop, manifest, plan, preflight

ROOT = Path(__file__).parents[1]
WORDS = ["red", "green", "blue", "one", "two", "three", "four", "five", "while", "until", "under", "over"]


def write_text(folder: Path) -> list[str]:
    """Forty short documents."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    texts = [f"document {i}: " + " ".join(rng.choice(WORDS, 40)) for i in range(40)]
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    return texts


def tiny(folder: Path) -> dict:
    """What makes a config of configs/ a job of seconds, by key."""
    keys = {"mesh": (1, 1, 1), "data.source": "files", "data.path": str(folder / "text"), "data.vocab": 300, "data.length": 16,
            "data.validation": 0.2, "data.test": 0.2, "data.train_tokens": 400, "data.eval_tokens": 0,
            "train.steps": 2, "train.batch": 4, "train.eval_every": 1, "train.checkpoint_every": 1, "run.teacher.train.steps": 2}
    for section in ("student", "teacher", "run.teacher.model"):
        keys |= {f"{section}.width": 8, f"{section}.depth": 1, f"{section}.heads": 2}
    return keys


def overrides(keys: dict) -> list[str]:
    return [f"--config.{key}={value}" for key, value in keys.items()]


def set_keys(config: ConfigDict, keys: dict) -> ConfigDict:
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict(keys)
    return config


KD = f"--config={ROOT / 'configs/kd.py'}:smoke"


def main(*args, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "jaxdistill.main", *args], cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Text, two models of one tokenizer, and a finished job that was run from another folder by the file's full path."""
    root = tmp_path_factory.mktemp("commands")
    texts = write_text(root / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        tok = tokenizer.train(texts, 300, "texts")
        for name, width in (("teacher", 16), ("student", 8)):
            module = gpt2.GPT2(gpt2.GPT2Config(vocab=tok.vocab, length=16, width=width, depth=1, heads=2))
            gpt2.to_hf(module, jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"], root / name)
            tokenizer.save(tok, root / name)
        done = main(*command(root), cwd=root)
    assert done.returncode == 0, done.stderr
    (root / "said.txt").write_text(done.stdout)
    return root


def command(root: Path) -> list[str]:
    keys = tiny(root) | {"cache": str(root / "runs")}
    return [KD, f"--workdir={root / 'job'}", *overrides(keys)]


def test_help_is_fast_and_needs_no_jax():
    since = time.monotonic()
    code = "import sys, jaxdistill.main; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    done = main("--help")
    assert done.returncode == 0
    said = done.stdout
    assert time.monotonic() - since < 2 * 3
    assert "python -m jaxdistill.main --config=configs/kd.py" in said
    assert all(flag in said for flag in ("--config:", "--[no]dry_run:", "--workdir:"))


def test_each_is_installed():
    commands = {path.stem for path in (ROOT / "jaxdistill").glob("*.py") if "def cli()" in path.read_text()}
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {f"jaxdistill-{name}".removesuffix("-main"): f"jaxdistill.{name}:cli" for name in commands}


def test_a_job_from_another_folder(folder):
    said = (folder / "said.txt").read_text()
    assert "test split, lower bits/byte is better" in said
    assert re.search(r"kd is (better|worse) than ce_only by \d\.\d+ bits/byte", said)
    for name in ("config.json", "results.json", "report.html", "curves.png", "runs/kd-0/export"):
        assert (folder / "job" / name).exists()
    rows = json.loads((folder / "job/results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["teacher", "untouched", "ce_only", "kd", "ce_only_same_seconds"]


def test_the_same_command_again_trains_nothing(folder, monkeypatch):
    config = set_keys(kd.get_config("smoke"), tiny(folder) | {"cache": str(folder / "runs")})
    before = (folder / "job/results.json").read_bytes()
    monkeypatch.setattr(loop, "train", None)
    loop.run(config, folder / "job", quiet=True)
    assert (folder / "job/results.json").read_bytes() == before


def test_the_same_teacher_in_another_job_is_not_trained_again(folder, tmp_path, monkeypatch):
    config = set_keys(kd.get_config("smoke"), tiny(folder) | {"cache": str(folder / "runs"), "runs": ("teacher",)})
    monkeypatch.setattr(loop, "train", None)
    [row] = loop.run(config, tmp_path / "other", quiet=True)["rows"]
    assert row == json.loads((folder / "job/results.json").read_text())["rows"][0]


def test_the_report(folder):
    assert report.main(["report", str(folder / "job")]) == 0
    page = (folder / "job/report.html").read_text()
    assert not re.search(r"https?:|<script|<link|<img|@import|url\((?!#)", page)
    assert [page.count(f"<td>{name}</td>") for name in ("teacher", "untouched", "ce_only", "kd", "ce_only_same_seconds")] == [1] * 5
    assert "<span>python -m jaxdistill.main</span> <span>--config=" in page
    assert "<b>loss ledger</b>" in page
    assert (folder / "job/curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(("better", "retention", "said"), [
    (True, 0.62, "kd is better than ce_only by 0.100 bits/byte (one seed: no interval), 62% of the way to the teacher"),
    (False, -0.69, "kd is worse than ce_only by 0.100 bits/byte (one seed: no interval)"),
    (False, 4.14, "kd is worse than ce_only by 0.100 bits/byte (one seed: no interval)"),  # the teacher is worse than both
])
def test_a_difference_in_words(better, retention, said):
    pair = {"a": "kd", "b": "ce_only", "b_parameters": "last", "interval": None, "n": 1}
    pair |= {"mean": -0.1 if better else 0.1, "retention": retention}
    assert headline.differences({"metric": "bits_per_byte", "minimize": True, "paired": [pair]}) == [said]


def test_export_for_transformers(folder, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    assert export.main(["export", str(folder / "job"), str(tmp_path / "out")]) == 0
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = (folder / "text/0.txt").read_text()[:40]
    ids = tok(text)["input_ids"][:16]
    ours, params = gpt2.from_hf(tmp_path / "out")
    assert ids == list(next(tokenizer.load(str(tmp_path / "out")).encode([text])))[:16]
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids])).logits.numpy()
    logits, _ = ours.apply({"params": params}, jnp.asarray([ids]))
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    trained = (folder / "job/runs/kd-0/export/model.safetensors").read_bytes()
    assert (tmp_path / "out/model.safetensors").read_bytes() == trained


def test_dry_run(folder):
    """The shipped smoke job, made small: everything is shown, nothing is left."""
    before = sorted(folder.iterdir())
    keys = tiny(folder) | {"train.micro": 2, "kd.weight": "((0.0, 0.1), (0.2, 0.7))"}
    done = main(KD, "--dry_run", *overrides(keys), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert sorted(folder.iterdir()) == before
    said = done.stdout
    assert "the job: teacher-0, untouched-0, ce_only-0, kd-0, ce_only_same_seconds-0" in said
    assert "kd: 2 updates of 4 in 2 micro-batches" in said
    assert "untouched: 0 updates" in said
    assert "as many updates of 4 as take the seconds of kd" in said
    assert "the program is that of ce_only" in said
    assert said.count("first batch, decoded:") == 2  # the teacher's, and the student's, of fewer tokens
    assert said.count("\ncounts ") >= 2
    assert re.search(r"│ student +│ 1 +│ 0.01 ", said)
    assert re.search(r"│ kd +│ 0.1 +│ 0.4 +│ 0.7 +│", said)
    assert re.search(r"│ kd \(off\)", said)
    assert len(re.findall(r"predicted peak memory of a device: \d+ MiB", said)) == 3
    assert len(re.findall(r"predicted FLOPs of a step on a device: \S+ GFLOP", said)) == 3


def test_predicted_flops_do_not_depend_on_micro_batches(folder, capsys):
    def flops(micro: int) -> float:
        keys = tiny(folder) | {"teacher.path": str(folder / "teacher"), "data.tokenizer": str(folder / "teacher"), "data.train_tokens": 0}
        config = set_keys(kd.get_config("smoke"), keys | {"runs": ("kd",), "train.micro": micro, "train.batch": 16})
        config.run = {"kd": config.run.kd}
        preflight.dry_run(config)
        return float(re.search(r"a device: (\S+) GFLOP", capsys.readouterr().out)[1])

    assert flops(4) == pytest.approx(flops(1), rel=0.1)


def test_dry_run_of_folders(folder, capsys, monkeypatch):
    """configs/kd_gpt2.py on two local folders: a given teacher is measured, and never trained. What its data lack is said."""
    measured, lacking = manifest.preflight, {"leaks": ["2 rows of test train too"], "unseen_classes": ["elk", "fox"]}
    monkeypatch.setattr(manifest, "preflight", lambda *args: measured(*args) | lacking)
    keys = {"teacher.path": str(folder / "teacher"), "student.path": str(folder / "student"), "data.path": str(folder / "text"),
            "mesh": (1, 1, 1), "data.length": 16, "data.validation": 0.2, "data.test": 0.2, "train.batch": 8}
    preflight.dry_run(set_keys(kd_gpt2.get_config(), keys))
    said = capsys.readouterr().out
    assert "teacher: 0 updates" in said
    assert "kd: 20000 updates of 8 in 4 micro-batches" in said
    assert "warning: 2 rows of test train too" in said
    assert "warning: 2 classes never train: elk, fox" in said
    assert "first batch, decoded:" in said
    assert "predicted peak memory of a device:" in said


@pytest.mark.parametrize(("module", "variant"), [(kd, variant) for variant in kd.VARIANTS] + [(kd_gpt2, None)])
def test_every_shipped_config_builds(module, variant, folder, tmp_path):
    """Every run of it, with every key read."""
    config = module.get_config() if variant is None else module.get_config(variant)
    keys = tiny(folder) | {"train.batch": 8, "run.teacher.model.depth": 2}  # a contrastive term and a router ask for as much
    if module is kd_gpt2:
        keys = {key: value for key, value in keys.items() if key.startswith(("data", "train", "mesh"))}
        keys |= {"teacher.path": str(folder / "teacher"), "student.path": str(folder / "student")}
    built = loop.check(set_keys(config, keys), tmp_path)
    assert [one.run.name for one in built] == list(config.runs)
    assert len(plan.expand(config)) == len(config.runs) * len(config.seeds) - (len(config.seeds) - 1)  # the teacher runs once


LANGUAGE = {
    "data": TextConfig, "student": causal.ModelConfig, "teacher": teachers.TeacherConfig, "lm": LMConfig, "kd": student_aware.KDConfig,
    "on_policy": OnPolicyConfig, "projector": ProjectorConfig, "react": ReactConfig, **matching.CONFIGS,
}
IMAGES = {
    "data": ImageConfig, "model": classifier.ModelConfig, "dcal": dcal.DCALConfig, "loss": dcal.LossConfig, "kd": dcal.KDConfig,
    "teacher": classifier_teachers.TeacherConfig,
}
SEQUENCES = {
    "data": SequenceConfig, "reservoir": ReservoirConfig, "readout": ReadoutConfig, "kaf": reservoir.PenalisedKAFConfig,
    "loss": reservoir.LossConfig, "plateau": reservoir.PlateauConfig,
}
DISTRIBUTIONS = {"data": DistributionConfig, "soft": SoftConfig, "model.mlp": MLPConfig, "model.graph": GraphConfig}


@pytest.mark.parametrize(("name", "recipe", "sections"), [
    ("kd", "student_aware", LANGUAGE), ("kd_gpt2", "student_aware", LANGUAGE), ("dcal", "dcal", IMAGES), ("dcal_cub", "dcal", IMAGES),
    ("dcal_distill", "dcal", IMAGES), ("dcal_market1501", "dcal", IMAGES), ("dcal_omniglot", "dcal", IMAGES),
    ("reservoir", "reservoir", SEQUENCES), ("soft_label", "soft_label", DISTRIBUTIONS),
], ids=lambda value: value if isinstance(value, str) else "")
def test_every_option_of_a_recipe_is_a_key_of_its_config(name, recipe, sections):
    """So that the command line reaches it; or it is a key of each of the runs, which set it for themselves."""
    config = importlib.import_module(f"configs.{name}").get_config().to_dict()
    keys = plan.leaves(config).keys()
    runs = [f"run.{run}." for run, spec in config["run"].items() if spec["recipe"] == recipe]
    options = {f"{section}.{field.name}": None for section, kind in sections.items() for field in dataclasses.fields(kind)}
    if name == "kd_gpt2":  # its teacher is one
        options = options.keys() - {"kd.teacher_weights", "kd.mixture"}
    assert [key for key in options if key not in keys and not all(run + key in keys for run in runs)] == []


def test_another_tokenizer_leaves_the_teacher_alone():
    config = kd_gpt2.get_config()
    config.teacher.path = "DIR/teacher"
    assert (config.data.tokenizer, config.run.teacher.model.path) == ("DIR/teacher", "DIR/teacher")
    config.data.tokenizer = "DIR/student"
    assert (config.teacher.path, config.run.teacher.model.path) == ("DIR/teacher", "DIR/teacher")


def test_the_tests_know_every_shipped_config():
    images = {"dcal", "dcal_cub", "dcal_distill", "dcal_market1501", "dcal_omniglot"}  # recipes/test_dcal_configs.py
    others = {"reservoir", "soft_label"}  # recipes/test_NAME.py
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} == {"kd", "kd_gpt2"} | images | others


def test_the_wheel(tmp_path):
    """What an installed package holds: all modules and no tests. Built from a copy, as a build leaves traces."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "jaxdistill", source / "jaxdistill", ignore=shutil.ignore_patterns("__pycache__"))
    (source / "tests").mkdir()
    (source / "tests/__init__.py").touch()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source]
    ways = ([*build, "--no-build-isolation"], build)
    if not any(subprocess.run(way, capture_output=True).returncode == 0 for way in ways):
        pytest.skip("no setuptools here, and no network to get it from")
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "jaxdistill").rglob("*.py")}
    assert modules <= set(names)
    assert "jaxdistill/training/defaults.py" in names
    assert all(name.startswith(("jaxdistill/", "jaxdistill-")) for name in names)
