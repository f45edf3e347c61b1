"""run(config, workdir): resumed to the bit, stopped when sick, refused when it is another job."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import UserError
from jaxdistill.training import checkpoint, loop, metrics, state, store
from tests import jobs, toy
from tests.jobs import changed, read
from tests.training.killed import MOMENTS


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def bits(tree) -> list[bytes]:
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    return [np.asarray(plain(leaf)).tobytes() for leaf in jax.tree.leaves(tree)]


def held(workdir: Path, config) -> dict:
    """All that a finished run of `toy` left: state, memory, lines, result; without the clock's numbers."""
    folder = workdir / "runs" / "toy-0"
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints")
    last, memory = checkpoints.load(checkpoints.steps[-1], jobs.ready(config).abstract)
    result = read(folder / "result.json")
    for clock in (memory, result["row"]):
        assert clock.pop("seconds") > 0
    return {
        "state": bits(last), "memory": memory, "lines": lines(folder), "result": result,
        "exported": (folder / "export" / "params").read_bytes(), "steps": checkpoints.steps,
    }


def interrupt(monkeypatch, *, at: int, by=signal.SIGTERM) -> None:
    """The signal arrives while update `at` is looked at."""
    old = loop.record

    def record(step, found):
        if step == at:
            signal.raise_signal(by)
        return old(step, found)

    monkeypatch.setattr(loop, "record", record)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A job that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    loop.run(jobs.toy(), workdir, quiet=True)
    return workdir


@pytest.fixture(scope="module")
def reference(whole) -> dict:
    return held(whole, jobs.toy())


class TestResume:
    def test_the_reference_is_complete(self, whole, reference):
        numbered = [line["step"] for line in reference["lines"] if "loss" in line]
        assert numbered == list(range(1, 13))
        assert [line["step"] for line in reference["lines"] if "evaluation" in line] == [4, 8, 12]
        assert [line["step"] for line in reference["lines"] if "deep" in line] == [8]  # and the resumed runs have the same
        assert not any("findings" in line for line in reference["lines"])  # a healthy run trips no gate
        assert reference["memory"]["recipe"] == {"seen": [4, 8, 12]}
        assert len({line["probes"]["order"] for line in reference["lines"] if "loss" in line}) == 12
        rates = [line["lr"] for line in reference["lines"] if "loss" in line]
        assert rates[8] < 0.6 * rates[7]  # react halved it after the second evaluation
        assert read(whole / "results.json")["rows"][0]["error"] == reference["result"]["row"]["error"]

    @pytest.mark.parametrize("moment", MOMENTS)
    def test_a_kill_at_any_moment_changes_nothing(self, moment, reference, tmp_path):
        child = subprocess.run(
            [sys.executable, "-m", "tests.training.killed", tmp_path, moment], capture_output=True, text=True, timeout=240,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]
        loop.run(jobs.toy(), tmp_path, quiet=True)
        assert held(tmp_path, jobs.toy()) == reference

    @pytest.mark.parametrize(("by", "code", "at"), [(signal.SIGTERM, 75, 5), (signal.SIGINT, 130, 6), (signal.SIGTERM, 75, 11)])
    def test_a_signal_saves_and_says_how_to_go_on(self, by, code, at, reference, tmp_path, monkeypatch):
        before = signal.getsignal(by)
        with monkeypatch.context() as patch:
            interrupt(patch, at=at, by=by)
            with pytest.raises(loop.Interrupted, match="goes on from here") as caught:
                loop.run(jobs.toy(), tmp_path, quiet=True)
        assert caught.value.code == code
        assert signal.getsignal(by) is before
        steps = checkpoint.Checkpoints(tmp_path / "runs/toy-0/checkpoints").steps
        assert at <= steps[-1] <= at + 1  # the update in flight is finished
        loop.run(jobs.toy(), tmp_path, quiet=True)
        found = held(tmp_path, jobs.toy())
        del found["steps"]
        assert found == {name: value for name, value in reference.items() if name != "steps"}

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as in test_checkpoint
    def test_over_a_damaged_checkpoint(self, reference, tmp_path, monkeypatch, capsys):
        with monkeypatch.context() as patch:
            interrupt(patch, at=8)
            with pytest.raises(loop.Interrupted):
                loop.run(jobs.toy(), tmp_path, quiet=True)
        folder = tmp_path / "runs" / "toy-0" / "checkpoints"
        last = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
        (folder / str(last) / "state" / "manifest.ocdbt").write_bytes(b"")
        loop.run(jobs.toy(), tmp_path)
        assert "passed over" in capsys.readouterr().out
        assert held(tmp_path, jobs.toy()) == reference

    def test_a_finished_run_is_not_trained_again(self, whole, reference, monkeypatch):
        monkeypatch.setattr(loop, "train", None)
        loop.run(jobs.toy(), whole, quiet=True)
        assert held(whole, jobs.toy()) == reference

    def test_more_seeds_and_runs_are_added_to_those_that_are_finished(self, whole, tmp_path, monkeypatch):
        copy, trained = tmp_path / "copy", []
        shutil.copytree(whole, copy)
        train = loop.train
        monkeypatch.setattr(loop, "train", lambda built, *rest, **more: (trained.append(built.run.id), train(built, *rest, **more))[1])
        table = loop.run(changed(jobs.toy(), seeds=(0, 1)), copy, quiet=True)
        assert trained == ["toy-1"]
        assert [row["seed"] for row in table["rows"]] == [0, 1]
        assert read(copy / "config.json")["seeds"] == [0, 1]

    def test_a_stop_by_react_holds(self, tmp_path, monkeypatch):
        config = jobs.toy(stop=4)
        row = loop.run(config, tmp_path, quiet=True)["rows"][0]
        assert (row["steps"], row["stop"]) == (4, "enough")
        (tmp_path / "runs/toy-0/result.json").unlink()  # as if killed before the result was written
        monkeypatch.setattr(loop, "_steps", None)
        assert loop.run(config, tmp_path, quiet=True)["rows"][0] == row

    def test_micro_batches_resume_too(self, tmp_path, monkeypatch):
        config = changed(jobs.toy(), **{"train.micro": 2})
        loop.run(config, tmp_path / "whole", quiet=True)
        interrupt(monkeypatch, at=7)
        with pytest.raises(loop.Interrupted):
            loop.run(config, tmp_path / "cut", quiet=True)
        monkeypatch.undo()
        loop.run(config, tmp_path / "cut", quiet=True)
        a, b = held(tmp_path / "whole", config), held(tmp_path / "cut", config)
        assert (a["state"], a["lines"]) == (b["state"], b["lines"])


def test_what_is_measured_and_exported_is_the_average(tmp_path):
    """The evaluation's line, the row of the table and the export are of the deployed student, which is not the last parameters."""
    config = changed(jobs.toy(), **{"train.steps": 3, "train.eval_every": 3, "train.lr": 0.1})
    row = loop.run(config, tmp_path, quiet=True)["rows"][0]
    folder, ready = tmp_path / "runs/toy-0", jobs.ready(config)
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints")
    last, _ = checkpoints.load(3, ready.abstract)
    checkpoints.close()
    average = state.deployed(last)
    (evaluation,) = [line["evaluation"] for line in lines(folder) if "evaluation" in line]
    for test, found in ((False, evaluation["validation/error"]), (True, row["error"])):
        error, of_the_last = (next(iter(loop.evaluate(ready, params, last.extra, test=test, cache={}).values()))
                              for params in (average, last.params))  # fmt: skip
        assert found == pytest.approx(error, rel=1e-6)
        assert abs(of_the_last / error - 1) > 1e-3
    toy.export(jax.device_get(average), tmp_path / "wanted")
    assert (folder / "export/params").read_bytes() == (tmp_path / "wanted/params").read_bytes()


class TestSick:
    def sick(self, config, workdir, match):
        for _ in range(2):  # and again on a rerun, without training
            with pytest.raises(loop.Sick, match=match) as caught:
                loop.run(config, workdir, quiet=True)
            assert caught.value.code == 1
        assert not (workdir / "runs/toy-0/result.json").exists()

    def test_non_finite_updates_in_a_row(self, tmp_path):
        config = changed(jobs.toy(poison=5), **{"train.batch": 64, "gates.non_finite": 3})
        self.sick(config, tmp_path, "non_finite: update 3")
        assert [line["finite"] for line in lines(tmp_path / "runs/toy-0")][:3] == [False] * 3
        assert lines(tmp_path / "runs/toy-0")[2]["findings"][0]["severity"] == "error"

    def test_a_single_bad_batch_is_skipped_and_reported(self, tmp_path):
        config = changed(jobs.toy(poison=5), **{"train.steps": 8})
        row = loop.run(config, tmp_path, quiet=True)["rows"][0]
        assert (row["steps"], row["skipped"]) == (8, 2)  # one batch of each epoch of four
        bad = [line for line in lines(tmp_path / "runs/toy-0") if not line.get("finite", True)]
        assert [line["findings"][0]["severity"] for line in bad] == ["warning"] * 2

    def test_a_dead_parameter(self, tmp_path):
        self.sick(jobs.toy(dead=True), tmp_path, "zero_gradient: update 10: .*dead/kernel")

    def test_a_teacher_that_changed(self, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            interrupt(patch, at=5)
            with pytest.raises(loop.Interrupted):
                loop.run(jobs.toy(), tmp_path, quiet=True)
        monkeypatch.setattr(toy, "TEACHER", 8)
        with pytest.raises(UserError, match="facts.teacher"):  # its hash tells first
            loop.run(jobs.toy(), tmp_path, quiet=True)
        identity = tmp_path / "runs/toy-0/identity.json"
        identity.write_text(identity.read_text().replace('"teacher": 7', '"teacher": 8'))
        self.sick(jobs.toy(), tmp_path, "frozen_moved: update 8")
        assert [line["findings"][0]["name"] for line in lines(tmp_path / "runs/toy-0") if "findings" in line] == ["frozen_moved"]

    def test_what_stops_can_be_chosen(self, tmp_path):
        config = changed(jobs.toy(dead=True), **{"gates.stop": ("non_finite",), "train.steps": 11})
        assert loop.run(config, tmp_path, quiet=True)["rows"][0]["steps"] == 11
        (found,) = [line["findings"][0] for line in lines(tmp_path / "runs/toy-0") if "findings" in line]
        assert (found["name"], found["severity"]) == ("zero_gradient", "warning")

    def test_calibrate_may_write_what_is_frozen(self, tmp_path, monkeypatch):
        def make(config, old=toy.make):
            def calibrate(variables, frozen, batches):
                still = {"kernel": variables.params["still"]["kernel"] * next(batches)["x"].mean()}
                return variables._replace(params=variables.params | {"still": still})

            return old(config)._replace(calibrate=calibrate)

        monkeypatch.setattr(toy, "make", make)
        row = loop.run(jobs.toy(), tmp_path, quiet=True)["rows"][0]
        assert row["steps"] == 12

    def test_without_validation_a_test_that_cannot_be_measured_shows_before_any_update(self, tmp_path, monkeypatch):
        def make(config, old=toy.make):
            recipe = old(config)
            broken = recipe.evaluators["test"]._replace(measure=lambda *a: {"sum": a[3]["no such column"]})
            return recipe._replace(evaluators={"test": broken})

        monkeypatch.setattr(toy, "make", make)
        with pytest.raises(KeyError, match="no such column"):
            loop.run(jobs.toy(), tmp_path, quiet=True)
        assert not (tmp_path / "runs/toy-0/metrics.jsonl").exists()


class TestRefused:
    def test_another_config(self, whole):
        with pytest.raises(UserError, match=r"train\.lr \(there 0\.01, now 0\.02\)"):
            loop.run(changed(jobs.toy(), **{"train.lr": 0.02}), whole)

    def test_another_mesh_and_cache_are_the_same_job(self, whole):
        loop.run(changed(jobs.toy(), mesh=(2, 1, 1), cache="elsewhere"), whole, quiet=True)

    def test_a_folder_of_other_files(self, tmp_path):
        (tmp_path / "thesis.tex").touch()
        with pytest.raises(UserError, match="other files"):
            loop.run(jobs.toy(), tmp_path)

    def test_a_workdir_in_which_another_process_works(self, tmp_path):
        """Before anything is written; it may come back, also where that process was killed in its first moments."""
        with store.alone(tmp_path), pytest.raises(UserError, match=f"^workdir {tmp_path}: another process is writing it; accepted: one"):
            loop.run(jobs.toy(), tmp_path, quiet=True)
        assert [path.name for path in tmp_path.iterdir()] == [store.RUNNING]
        (tmp_path / ".config.json.123").touch()
        config = changed(jobs.toy(), **{"train.steps": 1})
        loop.run(config, tmp_path, quiet=True)
        with store.alone(tmp_path):
            loop.run(config, tmp_path, quiet=True, held=True)

    def test_the_user_s_home_in_a_path(self, tmp_path, monkeypatch):
        """As in --workdir=~/kd, where no shell opens it."""
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        config = changed(jobs.toy(), cache="~/cache", **{"train.steps": 1})
        config.run.toy.update(cached=True)
        loop.run(config, "~/w", quiet=True)
        assert not list((tmp_path / "here").iterdir())
        assert (tmp_path / "home/w/results.json").exists()
        assert len(list((tmp_path / "home/cache/runs").iterdir())) == 1

    def test_a_workdir_that_is_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="workdir"):
            loop.run(jobs.toy(), tmp_path / "file")

    def test_a_finished_run_of_other_facts(self, whole, monkeypatch):
        monkeypatch.setattr(toy, "FACTS", {"rows": 63})
        with pytest.raises(UserError, match=r"facts\.rows \(there 64, now 63\)"):
            loop.run(jobs.toy(), whole, quiet=True)

    def test_a_changed_export(self, whole, tmp_path):
        shutil.copytree(whole, tmp_path / "copy")
        (tmp_path / "copy/runs/toy-0/export/params").write_bytes(b"other")
        with pytest.raises(UserError, match="do not match result.json"):
            loop.run(jobs.toy(), tmp_path / "copy", quiet=True)

    @pytest.mark.parametrize(("change", "match"), [
        ({"toy.new": 1, "other": 2}, r"config key other: nothing reads it \(nor toy\.new\)"),
        ({"run.toy.onec": True}, r"run\.toy\.onec: nothing reads it"),
        ({"run.toy.train": {"step": 3}}, r"train\.step: found in train, which has no such key; accepted: steps"),
        ({"train.batch": "16"}, r"train\.batch: found '16' \(str\); accepted: int"),
        ({"train.batch": 0}, r"train\.batch: found 0"),
        ({"train.final_lr": 1.5}, r"train\.final_lr: found 1\.5; accepted: a share from 0 to 1"),
        ({"train.lr": float("nan")}, r"train\.lr: found nan"),
        ({"optimizer.eps": 0.0}, r"optimizer\.eps: found 0\.0; accepted with adamw: above 0"),
        ({"optimizer.eps": 1e-50}, r"optimizer\.eps: found 1e-50"),  # 0 in float32
        ({"optimizer.name": "adam"}, r"optimizer\.name: found 'adam'; accepted: adamw, sgd"),
        ({"seeds": (0, 0)}, "seeds: found"),
        ({"runs": ()}, "runs: found"),
        ({"runs": ("no",)}, "runs: found 'no'; accepted: toy"),
        ({"run.toy.recipe": "nosuch"}, "recipe: found 'nosuch'"),
        ({"run.toy.once": "yes"}, r"run\.toy\.once: found 'yes'"),
        ({"run.toy.seconds_of": "late"}, r"run\.toy\.seconds_of: found 'late'; accepted: a run that comes earlier"),
        ({"monitor": "validation/nosuch"}, "monitor: found 'validation/nosuch'; accepted: validation/error"),
        ({"train.batch": 128}, "no batch in the split 'validation'"),
        ({"mesh": (3, 1, 1)}, r"train\.batch: found 16 with train\.micro 1 and 3 data shard"),
    ])
    def test_a_config_that_is_wrong(self, change, match, tmp_path):
        config = jobs.toy()
        with config.unlocked(), config.ignore_type():
            for key, value in change.items():
                *parents, last = key.split(".")
                node = config
                for parent in parents:
                    node = node[parent]
                node[last] = value
        with pytest.raises(UserError, match=match) as caught:
            loop.run(config, tmp_path, quiet=True)
        assert "\n" not in str(caught.value)

    def test_a_missing_key(self, tmp_path):
        config = jobs.toy()
        del config.toy.kd
        with pytest.raises(UserError, match=r"config key toy\.kd: missing; accepted here: contrast"):
            loop.run(config, tmp_path, quiet=True)


class TestLines:
    def test_what_a_kill_cut_short_is_cut(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
        written = metrics.Lines(path, step=3)
        written.write({"step": 3, "loss": float("nan")})
        written.close()
        assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}, {"step": 3, "loss": "nan"}]
