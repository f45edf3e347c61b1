"""jaxdistill.cache: what it stores, and what cannot be stored is one line before the teacher runs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl.testing import flagsaver

from jaxdistill import UserError
from jaxdistill.data.teacher_cache import Cache, Options
from jaxdistill.training import teach
from tests.recipes.conftest import ON, config, refusal

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("options", "changes", "said"), [
    (Options("topk"), dict(kd=dict(mode="alm", temperature=((0.0, 1.0),))), "--format: found 'topk' with kd.mode 'alm'"),
    (Options("topk"), dict(kd=dict(temperature=((0.0, 2.0), (1.0, 1.0)))), "config key kd.temperature: found (2.0, 1.0)"),
    (Options("sampled", temperatures=(1.0, 2.0)), {}, "--temperatures: found (1.0, 2.0)"),
    (Options("logits"), {}, "--format: found 'logits' with a language model"),
    (Options(k=8), {}, "--k: found 8 with --format=hidden; accepted: 64, or --format=topk"),
    (Options("sampled", k=8), {}, "--k: found 8 with --format=sampled"),
    (Options("topk", samples=4), {}, "--samples: found 4 with --format=topk; accepted: 12, or --format=sampled"),
    (Options(draws=2), {}, "--draws: found 2 with --format=hidden"),
    (Options("topk", gamma=0.5), {}, "--gamma: found 0.5 with --format=topk"),
    (Options(temperatures=(2.0,)), {}, "--temperatures: found (2.0,) with --format=hidden; accepted: (), or --format=topk or sampled"),
    (Options(seed=3), {}, "--seed: found 3 with --format=hidden"),
    (Options(views=2), {}, "--views: found 2 with text"),
    (Options(), dict(teacher=dict(cache="somewhere")), "config key teacher.cache: found"),
    (Options(), dict(hidden=ON), "config key hidden.weight: found a weight with a cache of format hidden"),
    (Options("topk"), dict(contrastive=ON), "config key contrastive.weight: found a weight with a cache of format topk"),
    (Options("sampled"), dict(kd=dict(kind="reverse_kl")), "config key kd.kind: found 'reverse_kl' with a cache of format sampled"),
    (Options(), dict(on_policy=dict(fraction=((0.0, 0.5),), prompt=4)), "config key on_policy.fraction: found a fraction with a cache"),
])
def test_what_cannot_be_stored_is_one_line(options, changes, said, job, tmp_path, capsys):
    chosen = config(job)
    chosen.update(changes)
    assert said in refusal(lambda: teach.run(chosen, tmp_path / "cache", options), capsys)
    assert not (tmp_path / "cache/begun.json").exists()


def test_of_several_teachers_each_has_a_cache_of_its_own(job, tmp_path, capsys):
    chosen, both = config(job), (str(job / "teacher"),) * 2
    chosen.teacher.path = both
    line = refusal(lambda: teach.run(chosen, tmp_path / "cache", Options()), capsys)
    assert f"config key teacher.path: found {both} with jaxdistill.cache; accepted: one (each has a cache of its own" in line


def test_a_launcher_that_starts_several_is_told_so(monkeypatch):
    from jaxdistill import cache as command

    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setattr(teach, "run", lambda *args, **options: pytest.fail("it ran"))
    with flagsaver.flagsaver(), pytest.raises(UserError, match="Slurm runs 4 processes .* accepted: one process"):
        command.run(None)


@pytest.mark.parametrize(("flag", "value"), [
    ("distributed", "true"), ("coordinator", "127.0.0.1:8476"), ("num_processes", "2"), ("process_id", "0"), ("meet_seconds", "9"),
])
def test_several_processes_are_refused(monkeypatch, flag, value):
    from jaxdistill import cache as command

    monkeypatch.setattr(teach, "run", lambda *args, **options: pytest.fail("it ran"))
    found = re.escape(f"--{flag}: found with jaxdistill.cache, which is one process; accepted: --config=FILE, ")
    with flagsaver.as_parsed(**{flag: value}), pytest.raises(UserError, match=f"^{found}.*"):
        command.run(None)


def test_several_processes_end_the_command_with_one_line(tmp_path):
    flags = ["--config=configs/kd.py:smoke", f"--workdir={tmp_path / 'cache'}", "--num_processes=2", "--process_id=1"]
    done = subprocess.run([sys.executable, "-m", "jaxdistill.cache", *flags], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: --num_processes: found with jaxdistill.cache, which is one process; accepted: ")
    assert not (tmp_path / "cache").exists()


def test_the_job_stays_as_it_was_asked_for(job, tmp_path):
    """Though only its teacher is run; also where the headline is not among the runs."""
    chosen = config(job)
    chosen.teacher.path, chosen.runs, chosen.seeds = "", ("teacher",), (0, 1)
    chosen.model = dict(chosen.student)
    chosen.run.teacher = dict(recipe="lm", once=True, fills="teacher.path", given="model.path", train=dict(steps=1))
    teach.run(chosen, tmp_path / "cache", Options(dtype="float32"), say=lambda line: None)
    stored = json.loads((tmp_path / "cache/config.json").read_text())
    assert (stored["headline"], stored["seeds"], stored["runs"]) == ("kd", [0, 1], ["teacher"])
    assert Cache(tmp_path / "cache").made["teacher"]["width"]


def test_sizes_are_told_and_nothing_is_stored_in_a_dry_run(job, tmp_path):
    said = []
    teach.run(config(job), tmp_path / "cache", Options("topk", k=4), dry_run=True, say=said.append)
    told = next(line for line in said if line.startswith("train"))
    assert "ids uint16 1x16x4, logits float16 1x16x4, tails float32 1x16x1" in told
    assert "bytes a token (all logits in bfloat16: 600)" in told
    assert not (tmp_path / "cache").exists()


def test_the_command_killed_goes_on_to_the_same_bytes(job, tmp_path):
    """A real command, SIGKILLed while it writes: what another process then finishes is what one would have written alone."""
    done = subprocess.run([sys.executable, "-m", "tests.recipes.killed_cache", str(job), str(tmp_path)], cwd=ROOT)
    assert done.returncode == -9
    assert list((tmp_path / "cut/shards").glob("*-unfinished"))
    flags = [f"--config={tmp_path / 'job.py'}", f"--workdir={tmp_path / 'cut'}", "--dtype=float32"]
    done = subprocess.run([sys.executable, "-m", "tests.recipes.killed_cache", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bytes a token" in done.stdout
    assert "(already there)" in done.stdout
    kept = {name: {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
            for name in ("whole", "cut")}
    assert kept["cut"] == kept["whole"]


def test_a_job_of_which_another_run_could_not_use_it_is_refused(job, tmp_path, capsys):
    """Before the teacher runs: its cache would be of no use to the same job."""
    chosen = config(job)
    chosen.runs, chosen.run.inside = ("inside", "kd"), dict(recipe="student_aware", hidden=ON)
    said = refusal(lambda: teach.run(chosen, tmp_path / "cache", Options()), capsys)
    assert "config key hidden.weight: found a weight with a cache of format hidden" in said
    chosen.runs = ("kd",)  # which is all that is asked for
    teach.run(chosen, tmp_path / "cache", Options(), dry_run=True)


def test_a_teacher_of_each_seed_has_no_cache_in_common(job, tmp_path, capsys):
    chosen = config(job)
    chosen.teacher.path, chosen.seeds = "", (0, 1)
    chosen.run.teacher = dict(recipe="lm", fills="teacher.path", given="model.path", model=dict(chosen.student))
    chosen.runs = ("teacher", "kd")
    said = refusal(lambda: teach.run(chosen, tmp_path / "cache", Options()), capsys)
    assert "config key run.teacher.once: found False with seeds (0, 1); accepted: True, or one seed" in said
    assert not (tmp_path / "cache").exists()
    chosen.run.teacher.once = True
    teach.run(chosen, tmp_path / "cache", Options(), dry_run=True)
