"""Bad inputs. Each gives one line on stderr that names the key or file, what was found and what would be accepted, exit
code 2 and no traceback, and nothing that was computed before is lost."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

import jaxdistill
from configs import kd
from jaxdistill import export, report
from jaxdistill.data import tokenizer
from jaxdistill.models import gpt2
from jaxdistill.training import loop, prepare, store
from jaxdistill.training.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]
GONE = object()  # as a value: the key is taken out


def write_model(folder: Path, tok, **sizes) -> Path:
    sizes = dict(vocab=tok.vocab, length=16, width=8, depth=1, heads=2) | sizes
    module = gpt2.GPT2(gpt2.GPT2Config(**sizes))
    gpt2.to_hf(module, jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"], folder)
    tokenizer.save(tok, folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Texts, a teacher, and each of them spoilt in one way."""
    root = tmp_path_factory.mktemp("files")
    texts = [f"document {i}: " + " ".join(f"word{(7 * i + j) % 50}" for j in range(30)) for i in range(40)]
    for name in ("text", "one", "blank", "latin1"):
        (root / name).mkdir()
    for i, text in enumerate(texts):
        (root / f"text/{i}.txt").write_text(text)
    (root / "one/a.txt").write_text(texts[0])
    (root / "blank/a.txt").write_text("")
    (root / "latin1/a.txt").write_bytes("déjà vu".encode("latin-1"))
    (root / "cut.jsonl").write_text('{"text": "whole"}\n{"text": "cut\n')
    (root / "other.jsonl").write_text('{"body": "no text"}\n')

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        tok, other = tokenizer.train(texts, 300, "texts"), tokenizer.train(texts[:2], 280, "two texts")
    teacher = write_model(root / "teacher", tok)
    write_model(root / "unlike", other, vocab=tok.vocab)
    write_model(root / "short", tok, length=8)
    weights = (teacher / "model.safetensors").read_bytes()

    def spoil(name: str, file: str, content: bytes | None) -> None:
        shutil.copytree(teacher, root / name)
        (root / name / file).unlink() if content is None else (root / name / file).write_bytes(content)

    spoil("no_config", "config.json", None)
    spoil("bad_config", "config.json", b'{"model_type": "gpt2", ')
    for kind in ("mamba", "llama"):  # an unknown family; and a GPT-2's entries under another's name
        entries = (teacher / "config.json").read_text().replace('"model_type": "gpt2"', f'"model_type": "{kind}"')
        spoil(kind, "config.json", entries.encode())
    spoil("only_bin", "model.safetensors", None)
    (root / "only_bin/pytorch_model.bin").write_bytes(b"\x80\x04.")
    spoil("pickle", "model.safetensors", b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00}\x94.")
    spoil("truncated", "model.safetensors", weights[: len(weights) // 2])
    return root


def job(files: Path, **changes) -> ConfigDict:
    """configs/kd.py with a teacher that is given and a student of a few updates; `changes` by dotted keys."""
    config = kd.get_config("smoke").to_dict()
    small = {
        "mesh": (1, 1, 1), "runs": ("teacher", "kd"), "cache": str(files / "runs"), "teacher.path": "{files}/teacher",
        "data.source": "files", "data.path": "{files}/text", "data.tokenizer": "{files}/teacher", "data.length": 16,
        "data.validation": 0.2, "data.test": 0.2, "data.train_tokens": 0, "data.eval_tokens": 0,
        "student.width": 8, "student.depth": 1, "student.heads": 2,
        "train.steps": 3, "train.batch": 4, "train.eval_every": 1, "train.checkpoint_every": 1,
    }
    for key, value in (small | changes).items():
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is GONE:
            del node[last]
        else:
            node[last] = value.replace("{files}", str(files)) if isinstance(value, str) else value
    return ConfigDict(config)


@pytest.fixture
def refused(capsys):
    """Runs a command's body as the command does; returns its one line."""

    def run(body) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            jaxdistill.command(body)
        return one_line(stop.value.code, capsys.readouterr().err)

    return run


def one_line(code: int, stderr: str) -> str:
    assert code == 2
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert "Traceback" not in stderr
    return stderr.removeprefix("error: ").strip()


def contents(folder: Path) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


KD = "--config=configs/kd.py:smoke"


@pytest.mark.parametrize(("args", "said"), [
    pytest.param([], "--config: missing; accepted: a file whose get_config()", id="no config"),
    pytest.param(["--config="], "--config: missing; accepted: a file", id="empty config"),
    pytest.param([KD, "--confg=x"], "Unknown command line flag 'confg'", id="unknown flag"),
    pytest.param([KD, "more"], "found 'more'; accepted: --config=FILE", id="positional argument"),
    pytest.param([KD, "--workdir"], "Missing value for flag --workdir", id="flag without value"),
    pytest.param([KD, "--config.train.stpes=3"], "stpes=3: configs/kd.py has no such key; accepted: batch", id="unknown key"),
    pytest.param([KD, "--config.train.steps.x=3"], "--config.train.steps.x=3: configs/kd.py has no such key", id="key below a value"),
    pytest.param([KD, "--config.train.steps=many"], "--config.train.steps=many: invalid literal for int()", id="wrong type"),
    pytest.param([KD, "--config.seeds[0]=5"], "[0]=5: found a place in a tuple; accepted: the whole, as in --config.seeds=(0", id="place"),
    pytest.param([KD, "--config.seeds[9]=5"], "[9]=5: found a place in a tuple", id="place that is none"),
    pytest.param([KD, "--flagfile=/nowhere"], "Unable to open flagfile: [Errno 2]", id="missing flag file"),
    pytest.param([KD, "--nodry_run=3"], "--nodry_run=3 does not take an argument", id="value for a switch"),
    pytest.param([KD, "--config.train=3"], "--config.train=3: Failed to parse '3'", id="value for a section"),
    pytest.param(["--config.train.steps=3", KD], "--config.train.steps=3 in argv before a value for --config", id="key before config"),
    pytest.param(["--config=configs/kd.py:tiny"], "found variant 'tiny'; accepted: smoke, seeds, document", id="unknown variant"),
    pytest.param(["--config=configs/kd_gpt2.py:tiny"], "takes 0 positional arguments but 1 was given", id="variant where none is"),
    pytest.param(["--config=nowhere.py"], "--config=nowhere.py: no such file; accepted: a file", id="missing config file"),
    pytest.param(["--config=configs"], "--config=configs: no such file; accepted: a file", id="folder as config"),
    pytest.param("def get_config(: pass", "SyntaxError: invalid syntax (job.py, line 1)", id="syntax error"),
    pytest.param("config = 3", "KeyError: 'get_config'; accepted: a file whose get_config()", id="no get_config"),
    pytest.param("def get_config(): pass", "get_config() returned NoneType; accepted", id="nothing returned"),
    pytest.param("import nosuch", "No module named 'nosuch' (line 1)", id="missing import"),
    pytest.param("\ndef get_config(): return 1 / 0", "ZeroDivisionError: division by zero (line 2)", id="config that raises"),
])
def test_a_command_line(args, said, tmp_path):
    if isinstance(args, str):  # the text of a config file
        (tmp_path / "job.py").write_text(args)
        args = [f"--config={tmp_path / 'job.py'}"]
    command = [sys.executable, "-m", "jaxdistill.main", *args]
    if args[-1:] != ["--workdir"]:
        command.append(f"--workdir={tmp_path / 'w'}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert said in one_line(done.returncode, done.stderr)
    assert not (tmp_path / "w").exists()


NO_TEACHER = {"teacher.path": "", "runs": ("kd",), "run.teacher.fills": ""}


@pytest.mark.parametrize(("change", "said"), [
    # The config's keys
    pytest.param({"extra.key": 1}, "config key extra.key: nothing reads it", id="key that nothing reads"),
    pytest.param({"run.kd.onec": True}, "config key run.kd.onec: nothing reads it", id="key of a run that nothing reads"),
    pytest.param({"student.widht": 8}, "config key student.widht: found in student", id="unknown key of a section"),
    pytest.param({"train.lr": GONE}, "config key train.lr: missing", id="missing key of training"),
    pytest.param({"headline": GONE}, "config key headline: missing", id="missing key of the job"),
    pytest.param({"train.steps": "many"}, "config key train.steps: found 'many' (str); accepted: int", id="wrong type"),
    pytest.param({"lm.smoothing": "much"}, "config key lm.smoothing: found 'much' (str); accepted: float", id="wrong type, recipe"),
    pytest.param({"seeds": 0}, "config key seeds: found 0 (int); accepted: tuple", id="number for a list"),
    pytest.param({"train": 3}, "config key train: found 3 (int); accepted: a section", id="number for a section"),
    pytest.param({"run.kd.train": 3}, "config key run.kd.train: found 3 (int); accepted: a section", id="number for a run's section"),
    pytest.param({"run.kd": 3}, "config key run.kd: found 3 (int); accepted: a section", id="number for a run"),
    pytest.param({"run.kd.data": {"length": "long"}}, "config key run.kd.data.length: found 'long'", id="a run's own key"),
    # The plan
    pytest.param({"runs": ("teacher", "kdd")}, "config key runs: found 'kdd'; accepted: ce_only, ", id="unknown run"),
    pytest.param({"runs": ("kd", "kd")}, "config key runs: found 'kd' twice", id="run named twice"),
    pytest.param({"headline": "kdd"}, "config key headline: found 'kdd'; accepted: ce_only, ", id="unknown headline"),
    pytest.param({"seeds": (0, 0)}, "config key seeds: found (0, 0); accepted: different whole numbers", id="duplicate seeds"),
    pytest.param({"seeds": (2**32,)}, "seeds: found (4294967296,); accepted: different whole numbers below 2^32", id="wide seed"),
    pytest.param({"runs": ("ce_only_same_seconds", "kd")}, "run.ce_only_same_seconds.seconds_of: found 'kd'", id="paced by a later run"),
    pytest.param({"run.kd.recipe": "nosuch"}, "recipe: found 'nosuch'", id="unknown recipe"),
    pytest.param({"run.kd.recipe": "tests.jobs"}, "recipe: found 'tests.jobs', which has no `make`", id="module without make"),
    pytest.param({"monitor": "val/nll"}, "config key monitor: found 'val/nll'; accepted: validation/", id="unknown monitor"),
    pytest.param({"monitor": "test/bits_per_byte"}, "config key monitor: found 'test/bits_per_byte'", id="monitor on the test split"),
    # Text
    pytest.param({"data.path": "{files}/nowhere"}, "nowhere': not found; a file, a folder or a glob", id="missing text"),
    pytest.param({"data.path": "{files}/blank"}, "no text (1 empty documents)", id="empty text"),
    pytest.param({"data.path": "{files}/one"}, "of 1 documents none falls into", id="one document"),
    pytest.param({"data.path": "{files}/latin1"}, "latin1/a.txt: invalid UTF-8 at byte 1", id="invalid UTF-8"),
    pytest.param({"data.source": "jsonl", "data.path": "{files}/cut.jsonl"}, "cut.jsonl, line 2: not JSON", id="malformed line"),
    pytest.param({"data.source": "jsonl", "data.path": "{files}/other.jsonl"}, "has only 'body'", id="missing field"),
    pytest.param({"data.source": "csv"}, "data.source 'csv': stdlib | files", id="unknown source"),
    pytest.param({"data.length": 1}, "data.length 1: 2 or more is accepted", id="rows of one label"),
    pytest.param({"data.tokenizer": "", "data.vocab": 2**31}, "data.vocab 2147483648: 257 (all bytes", id="a vocabulary beyond memory"),
    pytest.param({"data.tokenizer": "{files}/nowhere"}, "nowhere': not found", id="missing tokenizer"),
    pytest.param({"data.train_tokens": 10**6}, "data.train_tokens 1000000: the train split has", id="more tokens than there are"),
    # Models
    pytest.param({"teacher.path": "{files}/nowhere"}, "nowhere: found nothing; accepted: a folder", id="no teacher folder"),
    pytest.param({"teacher.cache": (5,)}, "config key teacher.cache: found (5,); accepted: a folder, or a tuple", id="no folder's name"),
    pytest.param({"teacher.cache": 5}, "config key teacher.cache: found 5; accepted: a folder, or a tuple", id="a number for a folder"),
    pytest.param({"teacher.path": "{files}/no_config"}, "no_config/config.json: not found", id="no config.json"),
    pytest.param({"teacher.path": "{files}/bad_config"}, "bad_config/config.json: not readable as JSON", id="corrupted config.json"),
    pytest.param({"teacher.path": "{files}/mamba"}, "model_type: found 'mamba'; accepted: gpt2, llama, qwen2", id="another model"),
    pytest.param({"teacher.path": "{files}/llama"}, "llama/config.json: hidden_size: found nothing", id="entries of another model"),
    pytest.param({"student.family": "mamba"}, "config key student.family: found 'mamba'; accepted: gpt2, llama", id="unknown family"),
    pytest.param({"student.kv_heads": 2}, "student.kv_heads: found 2 with family gpt2; accepted: 0", id="GPT-2 with groups of queries"),
    pytest.param({"teacher.path": "{files}/only_bin"}, "found only pytorch_model.bin, a pickle, which is never", id="only a pickle"),
    pytest.param({"teacher.path": "{files}/pickle"}, "pickle/model.safetensors: not a readable", id="pickle in disguise"),
    pytest.param({"teacher.path": "{files}/truncated"}, "truncated/model.safetensors: not a readable", id="truncated weights"),
    pytest.param({"teacher.path": "{files}/unlike"}, "config key teacher.path: found tokenizer", id="teacher of another tokenizer"),
    pytest.param({"student.path": "{files}/short"}, "data.length: found 16; accepted: at most the 8 positions", id="rows too long"),
    pytest.param(NO_TEACHER, "config key teacher.path: found ''; accepted: a local folder", id="no teacher at all"),
    pytest.param({"student.heads": 3}, "student.heads: found 3 with width 8; accepted: a divisor", id="heads that do not divide"),
    pytest.param({"student.width": -8}, "config key student.width: found -8; accepted: 1 or more", id="negative size"),
    pytest.param({"student.dtype": "float8"}, "config key student.dtype: found 'float8'; accepted: float32, bfloat16", id="bad dtype"),
    # Training
    pytest.param({"train.batch": 0}, "config key train.batch: found 0; accepted: 1 or more", id="empty batch"),
    pytest.param({"train.batch": 5, "train.micro": 2}, "train.batch: found 5 with train.micro 2", id="batch and micro-batches"),
    pytest.param({"mesh": (3, 1, 1)}, "train.batch: found 4 with train.micro 1 and 3 data shard(s)", id="batch and mesh"),
    pytest.param({"mesh": (1, 3, 1), "train.batch": 6}, "mesh: found (1, 3, 1), which cuts axis", id="widths and mesh"),
    pytest.param({"mesh": (16, 1, 1)}, "mesh: found (16, 1, 1) on 8 device(s)", id="more devices than there are"),
    pytest.param({"mesh": ("all", 1, 1)}, "config key mesh: found ('all', 1, 1); accepted: whole numbers", id="word in the mesh"),
    pytest.param({"optimizer.name": "adam"}, "optimizer.name: found 'adam'; accepted: adamw, sgd", id="unknown optimizer"),
    pytest.param({"optimizer.b2": 1.0}, "config key optimizer.b2: found 1.0; accepted: 0 or more, and below 1", id="decay of 1"),
    pytest.param({"train.lr": float("nan")}, "config key train.lr: found nan", id="rate that is no number"),
    pytest.param({"kd.weight": ((0.5, 0.1), (0.2, 0.7))}, "kd.weight: found ((0.5, 0.1), (0.2, 0.7)); accepted: ((fra", id="bad ramp"),
    pytest.param({"kd.weight": ((0.0, 1.5),)}, "kd.weight: found ((0.0, 1.5),); accepted: values from 0 to 1", id="weight above 1"),
    pytest.param({"run.kd.kd": {"weight": 0.5}}, "config key run.kd.kd.weight: found 0.5; accepted: ((fraction", id="a run's own ramp"),
    pytest.param({"kd.temperature": ((0.0, 0.0),)}, "kd.temperature: found ((0.0, 0.0),); accepted: values from 0.001", id="temperature 0"),
])
def test_a_config(change, said, files, tmp_path, refused):
    """Refused before anything trains, in a folder that stays free for the corrected config."""
    line = refused(lambda: loop.run(job(files, **change), tmp_path / "w", quiet=True))
    assert said in line
    assert not (tmp_path / "w").exists() or not list((tmp_path / "w").iterdir())


def test_tensorboard_that_is_not_installed(files, tmp_path, refused, monkeypatch):
    find = prepare.importlib.util.find_spec
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboardX" else find(name, *rest))
    assert "pip install jaxdistill[tensorboard]" in refused(lambda: loop.run(job(files, tensorboard=True), tmp_path, quiet=True))


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("finished") / "w"
    loop.run(job(files), workdir, quiet=True)
    return workdir


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.mark.parametrize(("spoil", "change", "said"), [
    pytest.param({}, {"train.steps": 4, "student.heads": 4}, "differing in student.heads (there 2, now 4); train.steps (there 3, now 4)",
                 id="another config"),
    pytest.param({"config.json": b'{"data": '}, {}, "copy/config.json: cannot be read as JSON", id="damaged config.json"),
    pytest.param({"config.json": b"[]"}, {}, "copy/config.json: found a JSON list", id="config.json of something else"),
    pytest.param({"config.json": None}, {}, "found other files and no config.json; accepted: an empty folder", id="foreign files"),
    pytest.param({"runs/kd-0/result.json": b"\xff"}, {}, "kd-0/result.json: cannot be read as JSON", id="damaged result"),
    pytest.param({"runs/kd-0/export/config.json": b"{}"}, {}, "kd-0/export: found contents that do not match", id="changed export"),
])
def test_a_workdir(spoil, change, said, files, copy, refused):
    for name, content in spoil.items():
        (copy / name).unlink() if content is None else (copy / name).write_bytes(content)
    before = contents(copy)
    assert said in refused(lambda: loop.run(job(files, **change), copy, quiet=True))
    assert contents(copy).keys() == before.keys()
    assert {name for name, content in contents(copy).items() if content != before[name]} <= {Path("results.json")}


def test_a_workdir_below_a_file(files, tmp_path, refused):
    (tmp_path / "file").write_text("")
    assert "file/w: Not a directory; accepted: a folder" in refused(lambda: loop.run(job(files), tmp_path / "file/w", quiet=True))


@pytest.mark.parametrize(("command", "args", "said"), [
    pytest.param(export, ["{files}", "{tmp}/out"], "config.json: No such file or directory; accepted: the workdir", id="no job"),
    pytest.param(export, ["{job}"], "usage: python -m jaxdistill.export WORKDIR OUT", id="export to nowhere"),
    pytest.param(export, ["{job}", "{tmp}/out", "--run=kd-1"], "--run: found 'kd-1', which is not a finished run of", id="unfinished run"),
    pytest.param(export, ["{job}", "{files}/text"], "files0/text: exists already; accepted: a new folder", id="export into a full folder"),
    pytest.param(export, ["{job}", "{job}/runs/kd-0/export/sub"], "sub: found within {job}/runs, where only the", id="export into runs"),
    pytest.param(export, ["{job}", "{files}/one/a.txt/x"], "one/a.txt/x: File exists; accepted: a folder where", id="export below a file"),
    pytest.param(report, ["{tmp}"], "config.json: No such file or directory; accepted: the workdir of a job", id="report of no job"),
    pytest.param(report, [], "usage: python -m jaxdistill.report WORKDIR [WORKDIR ...]", id="report of nothing"),
    pytest.param(report, ["{job}", "{job}/runs/.."], "workdirs: found {job} twice; accepted: each once", id="report of one job twice"),
])
def test_another_command(command, args, said, files, finished, tmp_path, refused):
    args = [arg.format(files=files, job=finished, tmp=tmp_path) for arg in args]
    before = contents(finished)
    assert said.format(job=finished) in refused(lambda: command.main(["command", *args]))
    assert not list(tmp_path.iterdir())
    assert contents(finished) == before


def test_a_metric_that_is_not_measured(files, tmp_path, refused):
    """Which metrics an evaluator gives is known once it has measured: at the first evaluation. Finished runs stay."""
    config = job(files, monitor="validation/bleu")
    line = refused(lambda: loop.run(config, tmp_path / "w", quiet=True))
    assert "config key monitor: found 'validation/bleu'; accepted: validation/bits_per_byte" in line
    assert (tmp_path / "w/runs/teacher-0/result.json").exists()


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "w")


def test_a_disk_that_is_full_at_the_start(files, tmp_path, refused, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert "No space left on device; accepted: a folder that can be written" in refused(
            lambda: loop.run(job(files), tmp_path / "w", quiet=True))
    assert [path.name for path in (tmp_path / "w").iterdir()] == [store.RUNNING]


def test_a_disk_that_fills_up(files, finished, tmp_path, refused, monkeypatch):
    """What was saved before is there, and the same command goes on from it to the same result."""
    save = Checkpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", lambda self, step, *rest: full() if step == 2 else save(self, step, *rest))
        assert "w: No space left on device; accepted" in refused(lambda: loop.run(job(files), tmp_path / "w", quiet=True))
    assert [path.name for path in (tmp_path / "w/runs/kd-0/checkpoints").iterdir()] == ["1"]
    loop.run(job(files), tmp_path / "w", quiet=True)
    results = [json.loads((folder / "runs/kd-0/result.json").read_text())["export"] for folder in (finished, tmp_path / "w")]
    assert results[0] == results[1]


def test_a_small_disk(files, tmp_path):
    """As above, without pretending: orbax and tensorstore report a full disk in their own words, wherever it fills up.

    (Their threads may print more beside our line. With room again, the same command goes on.)"""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        config = f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({job(files).to_dict()!r})\n"
        (tmp_path / "job.py").write_text(config)
        command = [sys.executable, "-m", "jaxdistill.main", f"--config={tmp_path / 'job.py'}", f"--workdir={disk / 'w'}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2
        assert len(said) == 1
        assert "No space left on device; accepted" in said[0]
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        loop.run(job(files), disk / "w", quiet=True)
    finally:
        subprocess.run(["umount", disk], check=True)
